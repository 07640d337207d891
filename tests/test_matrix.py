"""Priors, guides, likelihoods and objectives in all combinations: what fits trains, bounds, is saved.

A new part or objective joins the matrix by being listed here, and a test fails if it is not.
"""

import io
import math
from itertools import cycle, product

import pytest
import torch
from pair_cases import GUIDES, LIKELIHOODS, OBJECTIVES, PAIRS, PRIORS, N, fits, guide_for, marked, takes, vae_of

import pyro_vae as pv
from pyro_vae import guides, likelihoods, objectives, priors
from pyro_vae.compilation.graph import Graph


def test_every_part_and_objective_is_listed():
    assert PRIORS.keys() == set(priors.__all__)
    assert GUIDES.keys() == set(guides.__all__)
    assert LIKELIHOODS.keys() == set(likelihoods.__all__)
    assert {name.partition("-")[0] for name in OBJECTIVES} >= set(objectives.__all__)


def with_likelihoods(combinations):
    """Each combination with one likelihood in turn: each pair of lists, not each product."""
    turns = zip(combinations, cycle(LIKELIHOODS), strict=False)
    return [marked(prior, guide, likelihood, *objective) for (prior, guide, *objective), likelihood in turns]


TRIPLES = [(p, g, o) for p, g in PAIRS for o in OBJECTIVES if takes(o, p, g)]
NAMES = ("prior", "guide", "likelihood", "objective")


def assert_trains(prior, guide, likelihood, objective):
    vae, x = vae_of(prior, guide, likelihood)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    fitted = pv.fit(
        vae.model, guide_for(vae, objective), x, epochs=1, batch_size=4, lr=1e-2, elbo=OBJECTIVES[objective][1]()
    )
    assert set(fitted.history) == {"elbo", "distortion", "rate"}
    assert all(math.isfinite(value[0]) for value in fitted.history.values())
    moved = {name for name, value in vae.named_parameters() if not torch.equal(value, before[name])}
    for part in ("encoder", "decoder"):
        assert any(name.startswith(part) for name in moved), part


@pytest.mark.parametrize(NAMES, with_likelihoods(TRIPLES))
def test_what_fits_trains(prior, guide, likelihood, objective):
    assert_trains(prior, guide, likelihood, objective)


@pytest.mark.parametrize(
    NAMES,
    [
        param if index % 60 == 0 else pytest.param(*param.values, marks=[*param.marks, pytest.mark.slow])
        for index, param in enumerate(with_likelihoods(TRIPLES))
    ],
)
def test_what_fits_is_captured(monkeypatch, prior, guide, likelihood, objective):
    """The graph is replayed uncompiled: what the compiler does with it does not depend on the part."""
    monkeypatch.setattr(Graph, "compile", lambda *_: None)
    found = []
    for compile in (False, True):
        vae, x = vae_of(prior, guide, likelihood)
        vae = vae.double()
        elbo = OBJECTIVES[objective][1]()
        settings = {"epochs": 4, "batch_size": 3, "lr": 1e-2, "elbo": elbo, "compile": compile}
        fitted = pv.fit(vae.model, guide_for(vae, objective), x.double(), **settings)
        found.append((fitted.history["elbo"], torch.cat([value.detach().flatten() for value in vae.parameters()])))
    (eager, theirs), (captured, ours) = found
    # A neural baseline computes in float32.
    assert captured == pytest.approx(eager, rel=1e-6)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("prior", "guide"), [marked(*pair) for pair in PAIRS])
def test_every_combination_trains(prior, guide, likelihood):
    for objective in OBJECTIVES:
        if takes(objective, prior, guide):
            assert_trains(prior, guide, likelihood, objective)


@pytest.mark.parametrize(("prior", "guide", "likelihood"), with_likelihoods(PAIRS))
def test_the_elbo_is_below_log_p_and_goes_through_a_file(prior, guide, likelihood):
    vae, x = vae_of(prior, guide, likelihood)
    pv.fit(vae.model, vae.guide, x, epochs=3, lr=1e-2)
    # Many rows are faster than many draws.
    rows, num_samples = (x, 300) if guide == "PerDatum" else (x.repeat(50, 1), 6)
    elbo = pv.evaluate(vae.model, vae.guide, rows, num_samples=num_samples)["elbo"]
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=5000)
    error = float(estimate.standard_error.square().sum().sqrt()) / N
    assert elbo < float(estimate.log_evidence.mean()) + 5 * error + 0.15
    file = io.BytesIO()
    torch.save(vae.state_dict(), file)
    file.seek(0)
    other, _ = vae_of(prior, guide, likelihood, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert pv.evaluate(other.model, other.guide, x) == pv.evaluate(vae.model, vae.guide, x)


# Each prior and each guide at least once.
ALIKE = [(p, g) for p, g in PAIRS if PRIORS[p][0] == GUIDES[g][0]]
ONCE = [
    (p, g)
    for number, (p, g) in enumerate(ALIKE)
    if p not in {prior for prior, _ in ALIKE[:number]} or g not in {guide for _, guide in ALIKE[:number]}
]


@pytest.mark.parametrize(("prior", "guide"), [marked(*pair) for pair in ONCE])
def test_exact_answers_add_up_and_agree_with_estimates(prior, guide):
    vae, x = vae_of(prior, guide, "Normal")
    vae, x = vae.double().requires_grad_(False), x.double()
    log_evidence = pv.exact.log_evidence(vae.model, x, tolerance=1e-3)
    elbo, kl = (answer(vae.model, vae.guide, x, tolerance=1e-3) for answer in (pv.exact.elbo, pv.exact.kl))
    torch.testing.assert_close(log_evidence, elbo + kl, atol=5e-3, rtol=0)
    assert (kl > -1e-3).all()
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=4000)
    assert ((estimate.log_evidence - log_evidence).abs() < 6 * estimate.standard_error + 5e-3).all()


@pytest.mark.parametrize(("prior", "guide"), [marked(p, g) for p, g in ONCE if g != "PerDatum"])
def test_calibration_and_decomposition_take_every_latent(prior, guide):
    vae, x = vae_of(prior, guide, "Normal")
    calibration = pv.calibrate(vae.model, vae.guide, x, num_simulations=40, num_draws=19)
    assert ((calibration.p_values >= 0) & (calibration.p_values <= 1)).all()
    assert ((calibration.ranks >= 0) & (calibration.ranks <= 19)).all()
    assert calibration.divergence > -6 * calibration.divergence_error
    nats = pv.decompose(vae.model, vae.guide, x)
    assert nats.rate.value == pytest.approx(nats.mutual_information.value + nats.marginal_kl.value, abs=1e-5)
    assert all(math.isfinite(value) for units in nats.units.values() for value in units.activity.flatten().tolist())


@pytest.mark.parametrize(("prior", "guide"), [marked(p, g) for p, g in product(PRIORS, GUIDES) if not fits(p, g)])
def test_a_pair_that_does_not_fit_is_refused_with_one_that_does(prior, guide):
    with pytest.raises((ValueError, TypeError), match=r"What would fit|must be an? (amortized )?guide"):
        vae_of(prior, guide, "Normal")


@pytest.mark.parametrize(
    ("prior", "guide", "objective"),
    [
        marked(p, g, o)
        for p, g in PAIRS
        for o in OBJECTIVES
        if not takes(o, p, g) and o != "TraceMeanField_ELBO"  # Pyro's takes any, and draws where it has no closed form
    ],
)
def test_an_objective_that_is_not_for_a_pair_is_refused_with_one_that_is(prior, guide, objective):
    vae, x = vae_of(prior, guide, "Normal")
    needs = rf"{objective.partition('-')[0]} needs .+, got"
    with pytest.raises((ValueError, TypeError), match=rf"{needs}|`?\w+`? must (be|have)|use Trace_ELBO"):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=OBJECTIVES[objective][1]())
