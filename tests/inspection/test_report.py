"""The page of a report is one file that shows all results, fits into a browser, and is replaced as a whole."""

import html
import re
import shutil
import subprocess

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_pair import make_data, make_guide, model
from matplotlib import pyplot as plt
from pairs import bernoulli, gaussian, guide_of
from pyro.infer.autoguide import AutoNormal
from torch.distributions.transforms import AffineTransform

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, plots, priors

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def page(tmp_path):
    return tmp_path / "page.html"


def reported(page, model, guide, x, **options):
    options = {"num_samples": 50, "num_simulations": 100, "max_refined": 5, "progress": False} | options
    return pv.report(page, model, guide, x, **options)


@pytest.fixture
def digits(page):
    """What was found of a guide with a fault; the page has every picture."""
    torch.manual_seed(0)
    digits, network = pv.datasets.digits("test"), networks.mlp([32])
    x = pv.datasets.binarize(digits.x)
    vae = pv.VAE(priors.StandardNormal(4), guides.DiagonalNormal(64, 4, network), likelihoods.Bernoulli(4, 64, network))
    fitted = pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=50, lr=3e-3)

    narrow = guide_of(lambda x: dist.Normal(vae.encode(x).mean, 0.5 * vae.encode(x).stddev).to_event(1))
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    options = {"history": fitted.history, "labels": digits.labels, "pictures": {'What "else"?': figure}}
    return reported(
        page, vae.model, narrow, x, title="Digits < & >", image_shape=(8, 8), num_simulations=200, **options
    )


def test_the_page_is_one_file_that_contains_what_was_found(page, digits):
    text = page.read_text()
    assert "<title>Digits &lt; &amp; &gt;</title>" in text
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 7
    assert len(re.findall(r'<img alt="[^"]+" ', text)) == 7
    assert 'alt="What &#34;else&#34;?"' in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "it loads other files"
    assert "<script" not in text
    assert any("too narrow" in fault for fault in digits.faults)
    for words in ("Fault.", "mutual information", "amortization", "z[3]", "p-value", "log p(x, z)"):
        assert words in text
    assert f"{digits.nats.rate.value:.3f}" in text
    assert plt.get_fignums() == [1], "the report did not close its own figures"


@pytest.mark.skipif(CHROMIUM is None, reason="headless Chromium is not installed")
def test_nothing_on_the_page_overlaps_or_is_cut_off_on_a_wide_and_a_narrow_screen(page, digits):
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
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    for width in (1200, 390):
        arguments = [f"--window-size={width},2000", "--dump-dom", probe.as_uri()]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)
        title = re.search(r"<title>(.*?)</title>", run.stdout).group(1)
        assert title.startswith("fits, "), title


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("/dev/null", {}, ValueError, "`path` must be .*regular file, got '/dev/null'"),
        ("page.html", {"labels": ["a", 1] * 100}, TypeError, "`labels` must be whole numbers.*got a list"),
        ("page.html", {"found": "sound"}, TypeError, "`found` must be the result of `pv.inspect`, got a str"),
        ("page.html", {"image_shape": 2}, ValueError, "`image_shape` must be height and width.*got 2"),
        ("page.html", {"history": [1.0]}, TypeError, "`history` must be the result of `fit`.*got a list"),
        ("page.html", {"pictures": {"What?": 3}}, TypeError, "`pictures` must be .*figures, got an int for 'What.'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tmp_path, path, options, error, message):
    with pytest.raises(error, match=message):
        pv.report(tmp_path / path, None, None, make_data(), **options)


def test_a_failed_report_leaves_the_old_page_and_nothing_else(page):
    page.write_text("the old page")
    with pytest.raises(UnicodeEncodeError):
        reported(page, model, make_guide(), make_data(rows=20), title="\ud800, which cannot be written as UTF-8")
    assert page.read_text() == "the old page"
    assert list(page.parent.iterdir()) == [page]


def test_a_link_to_a_page_stays_a_link(page):
    link = page.with_name("link.html")
    link.symlink_to(page)
    reported(link, model, make_guide(), make_data(rows=20))
    assert link.is_symlink()
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_page_without_calibration_does_not_claim_that_the_guide_is_sound(page):
    x = make_data(rows=20)

    own_means = guide_of(lambda x: dist.Normal(pyro.param("mean", lambda: x[:, :2].clone()), 0.3).to_event(1))
    found = reported(page, model, own_means, x)
    assert found.calibration is None
    assert (found.verdict, found.gap.is_exact) == ("approximate", True)
    assert "below log p(x); q(z|x) was not calibrated" in str(found)
    assert 'class="sound"' not in page.read_text()


def test_a_page_of_discrete_latents(page):
    vae = bernoulli(3, 4)
    found = reported(page, vae.model, vae.guide, make_data(rows=50), labels=torch.arange(50) % 2)
    assert found.nats.num_samples == 0, "the states are summed over"
    assert "z[2]" in page.read_text()


def test_a_page_of_many_coordinates_keeps_the_quantity_that_depends_on_the_data(page):
    vae = gaussian(70, 4)
    found = reported(page, vae.model, vae.guide, make_data(rows=30), labels=[0, 1] * 15)
    assert len(found.calibration.names) == 71
    assert "The first 59 and the last of 71 rows." in page.read_text()
    assert '<th scope="row">log p(x, z)</th>' in page.read_text()


def test_a_latent_map_of_a_guide_without_a_known_mean_is_labelled_as_draws(page, monkeypatch):
    def q(x):
        return dist.TransformedDistribution(dist.Normal(x[:, :2], 0.3), [AffineTransform(0.0, 0.9)]).to_event(1)

    labels, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (labels.append(figure.axes[0].get_xlabel()), close(figure)))
    reported(page, model, guide_of(q), make_data(rows=20), labels=torch.arange(20) % 2)
    assert "the draw of z[0]" in labels


def test_a_finished_inspection_is_not_computed_again(page, monkeypatch):
    x = make_data(rows=20)
    found = pv.inspect(model, make_guide(), x, num_samples=50, num_simulations=100, max_refined=5)
    monkeypatch.setattr("pyro_vae.inspection.report.inspect", None)
    assert pv.report(page, model, make_guide(), x, found=found) is found
    assert found.headline[1:] in html.unescape(page.read_text())
    with pytest.raises(ValueError, match="`found` must be an inspection of these 10 rows of data, got one of 20 rows"):
        pv.report(page, model, make_guide(), x[:10], found=found)
    with pytest.raises(ValueError, match="`num_samples` must be left out where `found` is given"):
        pv.report(page, model, make_guide(), x, found=found, num_samples=3)


def test_a_report_takes_the_result_of_fit(page):
    vae, x = gaussian(1, 4), make_data(rows=20)
    fitted = pv.fit(vae.model, vae.guide, x, epochs=2)
    reported(page, vae.model, vae.guide, x, history=fitted)
    assert "Has training converged" in page.read_text()


def test_a_report_draws_colour_images_and_named_classes(page, monkeypatch):
    vae, x, drawn = gaussian(3, 12), torch.rand(20, 12), []
    monkeypatch.setattr(plots, "latent_map", lambda z, labels, **options: drawn.append((z.shape, labels)))
    monkeypatch.setattr(plots, "samples", lambda generate, shape, **options: drawn.append((generate(2).shape, shape)))
    names = ["even", "odd"] * 10
    reported(page, vae.model, vae.guide, x, labels=names, image_shape=(3, 2, 2))
    assert drawn == [((20, 3), names), ((2, 12), (3, 2, 2))]
    with pytest.raises(ValueError, match=r"`image_shape` must be .* or \(3, 32, 32\) in colour, got \(4, 3, 1\)"):
        reported(page, vae.model, vae.guide, x, image_shape=(4, 3, 1))


def test_a_page_of_global_latents_has_one_number_for_all_data_and_the_reasons(page):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    found = reported(page, model, AutoNormal(model), torch.linspace(-1, 2, 6), labels=[0, 1] * 3)
    text = page.read_text()
    assert found.evidence.log_evidence.shape == ()
    for words in ("log p(x) of all data", "rate, KL from q(z|x) to the prior", "There is no mutual information"):
        assert words in text
    assert "Can q(z|x) be trusted?" not in text
    assert "calibration was skipped: `refit` must be options of" in html.unescape(text)
