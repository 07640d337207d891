"""One look at a pair finds what is wrong and is silent where nothing is; the page of it shows the same."""

import re
import shutil
import subprocess
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from torch.distributions.transforms import AffineTransform

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

WEIGHT = torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, -1.0, 0.5]])
NOISE = 0.6
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def model(x):
    """Linear and Gaussian, so that the exact posterior can be written as a guide."""
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT, NOISE).to_event(1), obs=x)


def guide_of(covariance_factor=1.0, shift=0.0):
    precision = torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2
    covariance = torch.linalg.inv(precision)

    def guide(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            loc = x @ WEIGHT.T / NOISE**2 @ covariance + shift
            pyro.sample("z", dist.MultivariateNormal(loc, covariance_factor * covariance))

    return guide


def ignoring(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


def flat(x):
    """A model that does not use its latent, whose posterior is the prior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.5).to_event(1), obs=x)


def data(seed, rows=200):
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(rows, size, generator=generator) for size in (2, 4))
    return z @ WEIGHT + NOISE * noise


def inspected(model, guide, seed=0, **options):
    return pv.inspect(model, guide, data(seed), num_samples=200, max_refined=10, seed=seed, progress=False, **options)


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_guide_has_no_fault_and_no_caution(seed):
    found = inspected(model, guide_of(), seed)
    assert found.faults == ()
    assert found.warnings == ()
    assert "no fault found" in str(found)


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (guide_of(covariance_factor=0.5), "too narrow"),
        (guide_of(covariance_factor=2.5), "too wide"),
        (guide_of(shift=0.5), "biased"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_fault_is_found_and_named(guide, words, seed):
    found = inspected(model, guide, seed)
    assert any(words in fault for fault in found.faults), found
    assert f"FAULT: {found.faults[0]}" in str(found)


def test_collapse_is_a_fault_and_a_silent_variable_a_caution():
    assert any("z carries nothing about x" in fault for fault in inspected(flat, ignoring).faults)

    def half(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :1] * WEIGHT[0], NOISE).to_event(1), obs=x)

    precision = 1 + WEIGHT[0].square().sum() / NOISE**2

    def guide(x):
        loc = (x @ WEIGHT[0] / NOISE**2 / precision)[:, None]
        with pyro.plate("data", len(x)):
            locs = torch.cat([loc, torch.zeros_like(loc)], 1)
            pyro.sample("z", dist.Normal(locs, torch.stack([precision**-0.5, torch.tensor(1.0)])).to_event(1))

    found = inspected(half, guide)
    assert found.faults == ()
    assert any("1 of 2 variables of z carry nothing" in caution for caution in found.warnings)


def test_numbers_are_those_of_the_parts():
    found = inspected(model, guide_of(covariance_factor=0.5))
    x = data(0)
    exact = pv.exact.log_evidence(model, x)
    assert (found.evidence.log_evidence - exact).mean().abs() < 0.1
    assert found.gap.is_exact
    assert found.nats.elbo.value == pytest.approx((exact.mean() - found.gap.gap.mean()).item(), abs=0.2)
    assert found.num_data == {"evidence": 200, "nats": 200, "gap": 10}


def test_the_datum_with_the_largest_gap_goes_by_its_number_among_all():
    x = data(0)
    x[140] = 9.0
    covariance = torch.linalg.inv(torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2)

    def guide(x):
        with pyro.plate("data", len(x)):
            off = torch.where((x == 9.0).all(-1, keepdim=True), 3.0, 0.0)
            pyro.sample("z", dist.MultivariateNormal(x @ WEIGHT.T / NOISE**2 @ covariance + off, covariance))

    found = pv.inspect(model, guide, x, num_samples=200, max_refined=10, progress=False)
    assert found.gap.worst == (found.gap.gap.max().item(), 140)
    assert "of datum 140" in str(found)


def test_inspecting_leaves_nothing_behind():
    def guide(x):
        scale = pyro.param("scale", lambda: torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], scale).to_event(1))

    state = torch.get_rng_state()
    inspected(model, guide)
    assert torch.equal(torch.get_rng_state(), state)
    for estimate in (pv.log_evidence, pv.calibrate, pv.exact.elbo, pv.annealed_log_evidence):
        options = {"num_chains": 2, "num_temperatures": 2} if estimate is pv.annealed_log_evidence else {}
        with suppress(ValueError):
            estimate(model, guide, data(0), **options)
    assert not pyro.get_param_store().keys()


def boxed(x):
    """Without density at a third of what the posterior holds."""
    mean = x @ WEIGHT.T / NOISE**2 @ torch.linalg.inv(torch.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(mean - 0.4, mean + 0.4).to_event(1))


def test_a_guide_without_density_where_the_posterior_has_some_is_a_fault():
    found = inspected(model, boxed)
    assert found.calibration.divergence == float("inf")
    assert any("too narrow" in fault for fault in found.faults)
    assert max(map(len, found.warnings)) < 700, "whole tensors are not for reading"


def test_a_class_that_is_not_inferred_is_a_caution_though_all_its_ranks_are_uniform():
    def classes(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Normal(2.0 * c - 1, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(len(x), 2)))
            pyro.sample("z", dist.Normal((x.sum(-1) + 2.0 * c - 1) / 5, 5**-0.5))

    found = inspected(classes, guide)
    assert found.calibration.faults == {}
    assert any("q(z|x) is certainly not p(z|x)" in caution for caution in found.warnings)


def test_where_faults_could_not_be_looked_for_none_is_denied(tmp_path):
    x, page = data(0, rows=20), tmp_path / "page.html"

    def own(x):
        loc = pyro.param("loc", lambda: x[:, :2].clone())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))

    found = pv.report(page, model, own, x, num_samples=50, progress=False)
    assert found.calibration is None
    assert "no fault found, but whether q(z|x) can be believed was not asked" in str(found)
    assert 'class="sound"' not in page.read_text()


def test_a_part_that_breaks_does_not_take_the_others_with_it():
    def broken(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            nothing = (z - z).sqrt().sum(-1, keepdim=True)  # whose gradient is not finite
            pyro.sample("x", dist.Normal(z @ WEIGHT + nothing, NOISE).to_event(1), obs=x)

    found = inspected(broken, boxed)
    assert "gradient is not finite" in found.skipped["gap"]
    assert found.evidence.log_evidence.isfinite().all()


def test_one_datum_can_be_inspected():
    found = pv.inspect(model, guide_of(covariance_factor=0.3), data(0)[:1], num_samples=200, progress=False)
    assert any("too narrow" in fault for fault in found.faults)
    assert list(found.skipped) == ["nats"]


def test_draws_that_do_not_reach_the_posterior_are_a_caution():
    found = inspected(model, guide_of(covariance_factor=0.02))
    assert any("k̂ is above" in caution for caution in found.warnings)


def test_what_a_pair_cannot_be_asked_is_said_with_the_reason():
    x = data(0, rows=20)
    own = pv.VAE(
        priors.StandardNormal(2),
        guides.PerDatum(guides.DiagonalNormal(4, 2, networks.linear()).family, len(x)),
        likelihoods.Normal(2, 4, networks.linear()),
    )
    found = pv.inspect(own.model, own.guide, x, num_samples=100, max_refined=5, progress=False)
    assert found.calibration is None
    assert found.nats is not None
    assert "not amortized" in found.skipped["calibration"]
    assert any(caution.startswith("calibration is not told: guide: is not amortized") for caution in found.warnings)
    assert found.num_data["gap"] == 20, "rows of a guide that is not amortized cannot be left out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "`max_rows` must be .*got 0"),
        ({"max_refined": "a"}, "`max_refined` must be .*got 'a'"),
        ({"num_samples": 0}, "`num_samples` must be .*got 0"),
        ({"num_samples": 1}, "`num_samples` must be 2 or more.*got 1"),
        ({"num_simulations": 5}, "`num_simulations` must be 10 or more.*got 5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pv.inspect(model, guide_of(), data(0), **options)


# --- The page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits_page(tmp_path):
    """A page with every picture, of a guide with a fault."""
    torch.manual_seed(0)
    digits = pv.datasets.digits("test")
    x = pv.datasets.binarize(digits.x)
    network = networks.mlp([32])
    vae = pv.VAE(priors.StandardNormal(4), guides.DiagonalNormal(64, 4, network), likelihoods.Bernoulli(4, 64, network))
    fitted = pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=50, lr=3e-3)

    def narrow(x):
        with pyro.plate("data", len(x)):
            q = vae.encode(x)
            pyro.sample("z", dist.Normal(q.mean, 0.5 * q.stddev).to_event(1))

    further, ax = plt.subplots()
    ax.plot([0, 1])
    page = tmp_path / "page.html"
    found = pv.report(
        page,
        vae.model,
        narrow,
        x,
        title="Digits < & >",
        history=fitted.history,
        labels=digits.labels,
        image_shape=(8, 8),
        pictures={"What else?": further},
        num_samples=100,
        num_simulations=200,
        max_refined=10,
        progress=False,
    )
    return page, found


def test_the_page_is_of_one_file_and_says_what_was_found(digits_page):
    page, found = digits_page
    text = page.read_text()
    assert "<title>Digits &lt; &amp; &gt;</title>" in text
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 7
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "it asks for what is not in it"
    assert any("too narrow" in fault for fault in found.faults)
    for words in ("Fault.", "mutual information", "amortization", "z[3]", "What else?", "log p(x, z)"):
        assert words in text
    assert f"{found.nats.rate.value:.3f}" in text
    assert plt.get_fignums() == [1], "figures of its own are closed"


@pytest.mark.skipif(CHROMIUM is None, reason="headless Chromium is not installed")
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_on_the_page_overlaps_or_is_cut_off(digits_page, width):
    page, _ = digits_page
    probe = page.with_name("probe.html")
    script = """<script>addEventListener('load', () => {
      const parts = [...document.querySelectorAll('h1, h2, p, .wide, figcaption, img')];
      const boxes = parts.map(e => e.getBoundingClientRect());
      const wrong = [];
      if (document.documentElement.scrollWidth > innerWidth) wrong.push('wider than the window');
      if ([...document.images].some(i => !i.complete || i.naturalWidth === 0)) wrong.push('an image is broken');
      boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        if (across > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) wrong.push('overlap');
      }));
      document.title = wrong.length ? wrong.join(', ') : 'fits, ' + boxes.length + ' boxes in ' + innerWidth;
    });</script>"""
    probe.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    told = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    dom = subprocess.run(
        [CHROMIUM, *told, profile, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    title = re.search(r"<title>(.*?)</title>", dom).group(1)
    assert title.startswith("fits, "), title


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("nowhere/page.html", {}, FileNotFoundError, "path: there is no folder .*nowhere"),
        (".", {}, IsADirectoryError, "`path` must be .*got .*, a folder"),
        ("page.html", {"labels": torch.zeros(3)}, ValueError, r"`labels` must be .*got shape \(3,\); .* \(200,\)"),
        ("page.html", {"labels": ["a"] * 200}, TypeError, "`labels` must be whole numbers.*got a list"),
        ("page.html", {"labels": torch.arange(200) / 7}, ValueError, "`labels` must be whole.*got 0.14"),
        (
            "page.html",
            {"image_shape": (28, 28)},
            ValueError,
            r"`image_shape` must be .*got \(28, 28\); .* have 4 pixels",
        ),
        ("page.html", {"image_shape": 2}, ValueError, "`image_shape` must be height and width.*got 2"),
        ("page.html", {"history": [1.0]}, TypeError, "`history` must be `fitted.history`.*got a list"),
        ("page.html", {"pictures": {"What?": 3}}, TypeError, "`pictures` must be a Figure.*got a int at 'What.'"),
    ],
)
def test_what_a_page_cannot_be_made_of_is_refused_before_any_work(tmp_path, path, options, error, message):
    with pytest.raises(error, match=message):
        pv.report(tmp_path / path, None, None, data(0), **options)


def test_a_page_of_discrete_latents(tmp_path):
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.Bernoulli(3), guides.Bernoulli(4, 3, networks.linear()), likelihoods.Normal(3, 4, networks.linear())
    )
    x = data(0, rows=50)
    labels = torch.arange(50) % 2
    found = pv.report(tmp_path / "page.html", vae.model, vae.guide, x, labels=labels, max_refined=5, progress=False)
    assert found.nats.num_samples == 0, "its states are summed over"
    assert "z[2]" in (tmp_path / "page.html").read_text()


def test_a_page_of_many_coordinates_keeps_what_reads_the_data(tmp_path):
    torch.manual_seed(0)
    vae = pv.VAE(
        priors.StandardNormal(70),
        guides.DiagonalNormal(4, 70, networks.linear()),
        likelihoods.Normal(70, 4, networks.linear()),
    )
    options = {"labels": [0, 1] * 15, "num_simulations": 100, "num_samples": 50, "max_refined": 5, "progress": False}
    found = pv.report(tmp_path / "page.html", vae.model, vae.guide, data(0, rows=30), **options)
    text = (tmp_path / "page.html").read_text()
    assert len(found.calibration.names) == 71
    assert "The first 59 of 70 coordinates." in text
    assert '<th scope="row">log p(x, z)</th>' in text


def test_a_map_of_a_guide_whose_means_are_not_known_is_of_draws_and_says_so(tmp_path, monkeypatch):
    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, :2], 0.3)
            pyro.sample("z", dist.TransformedDistribution(base, [AffineTransform(0.0, 0.9)]).to_event(1))

    shown = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (shown.append(figure.axes[0].get_xlabel()), close(figure)))
    options = {"num_simulations": 20, "num_samples": 50, "max_refined": 5, "progress": False}
    pv.report(tmp_path / "page.html", model, guide, data(0, rows=20), labels=torch.arange(20) % 2, **options)
    assert "draw of z[0]" in shown
