"""An inspection finds planted faults, finds none where there are none, and gives a reason where it cannot test."""

import math
import re
from contextlib import suppress

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_pair import COVARIANCE, NOISE, WEIGHT, make_data, make_guide, model, posterior_mean
from pairs import NET, gaussian, guide_of, model_of
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_vae as pv
from pyro_vae import guides


def inspected(model, guide, seed=0, **options):
    options = {"num_samples": 200, "max_refined": 10, "seed": seed, "progress": False} | options
    return pv.inspect(model, guide, make_data(seed), **options)


STANDARD_NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)
# A uniform distribution that excludes a third of the exact posterior.
box_guide = guide_of(lambda x: dist.Uniform(posterior_mean(x) - 0.4, posterior_mean(x) + 0.4).to_event(1))


@pytest.mark.parametrize("seed", range(20))
def test_an_exact_guide_has_no_fault_and_no_warning(seed):
    found = inspected(model, make_guide(), seed)
    assert (found.faults, found.warnings) == ((), ())
    assert found.verdict == "sound"
    assert str(found).startswith("sound, no fault found: 90 % intervals of q(z | x) cover ")


@pytest.mark.parametrize(
    ("guide", "fault"),
    [
        (make_guide(covariance_factor=0.5), "too narrow"),
        (make_guide(covariance_factor=2.5), "too wide"),
        (make_guide(shift=0.5), "biased"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_fault_is_found_and_named(guide, fault, seed):
    found = inspected(model, guide, seed)
    assert any(fault in line for line in found.faults), found
    assert f"FAULT: {found.faults[0]}" in str(found)
    assert str(found).startswith("faulty: 90 % intervals of q(z | x) cover ")


def test_the_text_shows_the_first_faults_and_counts_the_others():
    def twelve(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 12), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.2).to_event(1))  # the posterior has 0.71

    found = pv.inspect(twelve, narrow, torch.randn(50, 12) * 2**0.5, num_samples=100, max_refined=5, progress=False)
    assert len(found.faults) >= 12
    lines = [line for line in str(found).splitlines() if line.startswith("FAULT: ")]
    assert lines[:10] == [f"FAULT: {fault}" for fault in found.faults[:10]]
    assert lines[10:] == [f"FAULT: and {len(found.faults) - 10} more, see `faults`"]


def test_an_error_that_is_no_fault_is_measured_in_the_first_line():
    found = inspected(model, make_guide(covariance_factor=0.8), num_simulations=4000)
    assert (found.verdict, found.faults) == ("approximate", ())
    least, most = (100 * end for end in sorted(found.calibration.coverage(0.9)[0][:2].tolist()))
    line = str(found).splitlines()[0]
    assert re.match(
        rf"approximate, no fault found: 90 % intervals of q\(z \| x\) cover {least:.1f} ± .* to {most:.1f} ± ", line
    )
    assert f"the ELBO is {found.gap.gap.mean():.3f} nats below log p(x)" in line
    assert found.gap.gap.mean() == pytest.approx(0.5 * 2 * (0.8 - 1 - math.log(0.8)), abs=1e-3)


def test_collapse_of_all_variables_is_a_fault():
    decoder_ignores_z = model_of(STANDARD_NORMAL, lambda z: dist.Normal(torch.zeros(4), 1.5).to_event(1))
    found = inspected(decoder_ignores_z, guide_of(lambda x: STANDARD_NORMAL.expand([len(x)])))
    assert len(found.nats.collapse) == 1
    assert set(found.nats.collapse) <= set(found.faults)


def test_collapse_of_one_variable_is_a_warning():
    one_of_two = model_of(STANDARD_NORMAL, lambda z: dist.Normal(z[..., :1] * WEIGHT[0], NOISE).to_event(1))
    precision = 1 + WEIGHT[0].square().sum() / NOISE**2

    def posterior(x):
        mean = x @ WEIGHT[0] / NOISE**2 / precision
        scale = torch.stack([precision**-0.5, torch.tensor(1.0)])
        return dist.Normal(torch.stack([mean, torch.zeros(len(x))], 1), scale).to_event(1)

    found = inspected(one_of_two, guide_of(posterior))
    assert found.faults == ()
    assert any("1 of 2 variables of z" in warning for warning in found.warnings)


def test_the_numbers_agree_with_the_exact_answer():
    found = inspected(model, make_guide(covariance_factor=0.5))
    exact = pv.exact.log_evidence(model, make_data())
    assert (found.evidence.log_evidence - exact).mean().abs() < 0.1
    assert found.gap.is_exact
    assert found.nats.elbo.value == pytest.approx((exact.mean() - found.gap.gap.mean()).item(), abs=0.2)
    assert found.num_data == {"evidence": 200, "nats": 200, "gap": 10}


def test_the_datum_with_the_largest_gap_has_its_index_among_all_data():
    x = make_data()
    x[140] = 9.0

    def q(x):
        shift = torch.where((x == 9.0).all(-1, keepdim=True), 3.0, 0.0)
        return dist.MultivariateNormal(posterior_mean(x) + shift, COVARIANCE)

    found = pv.inspect(model, guide_of(q), x, num_samples=200, max_refined=10, progress=False)
    assert found.gap.worst == (found.gap.gap.max().item(), 140)
    assert "datum 140" in str(found)


def test_inspection_changes_neither_random_states_nor_parameters(random_states):
    guide = guide_of(lambda x: dist.Normal(x[:, :2], pyro.param("scale", torch.ones(2))).to_event(1))
    before = random_states()
    inspected(model, guide)
    assert random_states() == before
    for estimate in (pv.log_evidence, pv.calibrate, pv.exact.elbo, pv.annealed_log_evidence):
        options = {"num_chains": 2, "num_temperatures": 2} if estimate is pv.annealed_log_evidence else {}
        with suppress(ValueError):
            estimate(model, guide, make_data(), **options)
    assert not pyro.get_param_store().keys()


def test_a_guide_that_excludes_a_part_of_the_posterior_has_a_fault():
    found = inspected(model, box_guide)
    assert found.calibration.divergence == float("inf")
    assert any("too narrow" in fault for fault in found.faults)
    assert max(map(len, found.warnings)) < 700, "whole tensors are not for reading"


def test_a_class_that_is_not_inferred_is_a_warning_though_all_its_ranks_are_uniform():
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
    assert any("q(z|x) is not the exact posterior" in warning for warning in found.warnings)


def test_a_part_that_fails_does_not_stop_the_others():
    def likelihood(z):
        return dist.Normal(z @ WEIGHT + (z - z).sqrt().sum(-1, keepdim=True), NOISE).to_event(1)  # of infinite gradient

    found = inspected(model_of(STANDARD_NORMAL, likelihood), box_guide)
    assert "gradient is not finite" in found.skipped["gap"]
    assert found.evidence.log_evidence.isfinite().all()


def test_one_datum_can_be_inspected():
    found = pv.inspect(model, make_guide(covariance_factor=0.3), make_data()[:1], num_samples=200, progress=False)
    assert any("too narrow" in fault for fault in found.faults)
    assert (found.skipped, found.nats.why_no_information) == ({}, "one datum has none with its index")


def test_unreliable_importance_weights_are_a_warning():
    found = inspected(model, make_guide(covariance_factor=0.02))
    assert any("k̂ plus its error is above" in warning for warning in found.warnings)


def test_a_part_that_the_guide_does_not_allow_is_skipped_with_the_reason():
    vae = gaussian(2, 4, encoder=guides.PerDatum(guides.DiagonalNormal(4, 2, NET).family, 20))
    found = pv.inspect(vae.model, vae.guide, make_data(rows=20), num_samples=100, max_refined=5, progress=False)
    assert (found.calibration is None, found.nats is None) == (True, False)
    assert "amortized" in found.skipped["calibration"]
    assert f"calibration was skipped: {found.skipped['calibration']}" in found.warnings
    assert found.num_data["gap"] == 20, "a guide that is not amortized needs all its rows"


COUNTS = [("max_rows", 0, ""), ("max_refined", "a", ""), ("num_samples", 0, "")]
FEW = [("num_samples", 1, "2 or more"), ("num_simulations", 5, "10 or more")]


@pytest.mark.parametrize(("name", "value", "expected"), COUNTS + FEW)
def test_wrong_options_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"`{name}` must be {expected}.*got {value!r}"):
        inspected(model, make_guide(), **{name: value})


def test_log_p_is_estimated_where_quadratures_would_take_long(monkeypatch):
    vae, x = gaussian(2, 3), torch.randn(20, 3)
    options = {"num_samples": 200, "num_simulations": 20, "max_refined": 10}
    exact = pv.inspect(vae.model, vae.guide, x, **options)
    monkeypatch.setattr("pyro_vae.inspection.inspect._MAX_QUADRATURE", 29)
    found = pv.inspect(vae.model, vae.guide, x, **options)
    assert (exact.gap.is_exact, found.gap.is_exact) == (True, False)
    assert "the ELBO is at least" in found.headline
    errors = torch.cat([found.gap.log_evidence_error, found.gap.elbo_error])
    assert (found.gap.gap - exact.gap.gap).mean().abs() < 5 * errors.norm() / 10 + 1e-3
    line = gaussian(1, 3)
    assert pv.inspect(line.model, line.guide, x, **options).gap.is_exact, "one dimension takes little"


def mean_model(x):
    """A global mean; p(mean | x) is normal, of precision 1/4 + N."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mean_guide(factor=1.0, shift=0.0):
    """The exact posterior with an error, which reads the data: no fit is needed for others."""

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / (0.25 + len(x)) + shift, factor * (0.25 + len(x)) ** -0.5))

    return guide


MEANS = torch.linspace(-1, 2, 6)


def test_global_latents_are_inspected_for_all_data_together():
    found = pv.inspect(mean_model, mean_guide(), MEANS, num_samples=200, progress=False)
    assert (found.verdict, found.faults, found.warnings) == ("sound", (), ())
    assert found.calibration.num_data_sets == 100
    exact = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 4.0).log_prob(MEANS)
    assert found.evidence.log_evidence.item() == pytest.approx(exact.item(), abs=1e-3)
    assert found.nats.elbo.value == pytest.approx(exact.item(), abs=1e-3)
    assert "the ELBO is 0.000 nats of all data below log p(x)" in found.headline.replace("-0.000", "0.000")
    assert "In nats of all data." in found._repr_html_()
    narrow = pv.inspect(mean_model, mean_guide(0.5), MEANS, num_samples=200, progress=False)
    assert narrow.verdict == "faulty"
    assert any("too narrow" in fault for fault in narrow.faults)
    assert narrow.gap.gap.item() == pytest.approx((0.25 - 1 + math.log(4)) / 2, abs=1e-3)


def test_without_refits_a_fitted_guide_of_global_latents_is_judged_by_its_gap_or_by_its_khat(monkeypatch):
    def guide(x):
        mean_guide()(MEANS)  # of the given data alone

    found = pv.inspect(mean_model, guide, MEANS, num_samples=500, progress=False)
    assert (found.calibration, found.gap.is_exact) == (None, True)
    assert "`refit` must be options of `pv.fit`" in found.skipped["calibration"]
    assert re.search(r"k̂ is [-.0-9inf]+; q\(z\|x\) was not calibrated$", found.headline)
    assert found.verdict == "sound"
    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae.diagnostics.inference_gap._exact_log_evidence", lambda p, tolerance: None)
        wrong = pv.inspect(mean_model, mean_guide(0.2, 2.0), MEANS, num_samples=500, refit=None, progress=False)
        estimated = pv.inspect(mean_model, guide, MEANS, num_samples=500, progress=False)
    assert (estimated.gap.is_exact, estimated.verdict) == (False, "sound")
    assert wrong.verdict == "faulty"
    assert any("q(z|x) is far from p(z|x)" in warning for warning in wrong.warnings)


def test_refits_calibrate_a_guide_of_global_latents():
    options = {"num_simulations": 20, "num_samples": 100, "processes": 1, "progress": False}
    found = pv.inspect(mean_model, AutoNormal(mean_model), MEANS, refit={"epochs": 20, "lr": 0.1}, **options)
    assert (found.calibration.num_data_sets, found.skipped) == (20, {})


def test_groups_and_latents_that_are_summed_out_are_inspected():
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(3.0 * c, 1.0), obs=x)

    torch.manual_seed(0)
    found = pv.inspect(model, AutoNormal(poutine.block(model, hide=["c"])), MEANS, num_samples=200, progress=False)
    assert (found.evidence.plates, list(found.skipped)) == ((), ["calibration"])
    assert found.nats.elbo.value < found.evidence.log_evidence.item() + 0.5
    assert "nats of all data" in str(found)


def test_a_point_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"`guide` must have a density for each continuous latent, got a point"):
        pv.inspect(mean_model, AutoDelta(mean_model), MEANS, progress=False)
