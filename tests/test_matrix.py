"""Priors, guides, likelihoods and objectives in all combinations: what fits trains, bounds, and goes through a file.

A new part or objective joins the matrix by being listed here, and a test fails if it is not.
"""

import io
import itertools
import math
from importlib.util import find_spec

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, objectives, priors
from pyro_vae.baselines import NeuralBaseline, RunningAverage
from pyro_vae.capture import Graph

D, N = 3, 6  # features of a datum, and data
NET = networks.mlp([4])
CLASSES = (1, 3)

# By name in __all__: the kind of latent, and how to build it. A VampPrior is handed the guide.
PRIORS = {
    "StandardNormal": ("real", lambda q: priors.StandardNormal(2)),
    "Normal": ("real", lambda q: priors.Normal(2)),
    "Laplace": ("real", lambda q: priors.Laplace(2)),
    "StudentT": ("real", lambda q: priors.StudentT(2)),
    "MixtureOfNormals": ("real", lambda q: priors.MixtureOfNormals(2, 3)),
    "VampPrior": ("real", lambda q: priors.VampPrior(q, torch.rand(3, D))),
    "NormalizingFlow": ("real", lambda q: priors.NormalizingFlow(2, transforms=1, hidden=[4])),
    "Bernoulli": ("bits", lambda q: priors.Bernoulli(2, 0.4, learnable=True)),
    "OneHotCategorical": ("classes", lambda q: priors.OneHotCategorical(CLASSES, learnable=True)),
    "RelaxedBernoulli": ("relaxed bits", lambda q: priors.RelaxedBernoulli(2, 0.5)),
    "GumbelSoftmax": ("relaxed classes", lambda q: priors.GumbelSoftmax(CLASSES, 0.5)),
}
GUIDES = {
    "DiagonalNormal": ("real", lambda: guides.DiagonalNormal(D, 2, NET)),
    "FullRankNormal": ("real", lambda: guides.FullRankNormal(D, 2, NET)),
    "LowRankNormal": ("real", lambda: guides.LowRankNormal(D, 2, NET)),
    "MixtureOfNormals": ("real", lambda: guides.MixtureOfNormals(D, 2, NET)),
    "InverseAutoregressiveFlow": (
        "real",
        lambda: guides.InverseAutoregressiveFlow(D, 2, NET, transforms=1, hidden=[4], context=2),
    ),
    "SplineFlow": ("real", lambda: guides.SplineFlow(D, 2, NET, transforms=1, hidden=[4], context=2)),
    "PerDatum": ("real", lambda: guides.PerDatum(families.Normal(2), N)),
    "Bernoulli": ("bits", lambda: guides.Bernoulli(D, 2, NET)),
    "OneHotCategorical": ("classes", lambda: guides.OneHotCategorical(D, CLASSES, NET)),
    "RelaxedBernoulli": ("relaxed bits", lambda: guides.RelaxedBernoulli(D, 2, NET, 0.66)),
    "GumbelSoftmax": ("relaxed classes", lambda: guides.GumbelSoftmax(D, CLASSES, NET, 0.66)),
}
REAL, COUNTS = torch.rand(N, D), torch.arange(N * D).reshape(N, D).remainder(3).float()
LIKELIHOODS = {
    "Normal": (lambda z: likelihoods.Normal(z, D, NET), REAL),
    "Bernoulli": (lambda z: likelihoods.Bernoulli(z, D, NET), (COUNTS > 0).float()),
    "ContinuousBernoulli": (lambda z: likelihoods.ContinuousBernoulli(z, D, NET), REAL),
    "StudentT": (lambda z: likelihoods.StudentT(z, D, NET), REAL),
    "Categorical": (lambda z: likelihoods.Categorical(z, D, 3, NET), COUNTS),
    "Poisson": (lambda z: likelihoods.Poisson(z, D, NET), COUNTS),
    "NegativeBinomial": (lambda z: likelihoods.NegativeBinomial(z, D, NET), COUNTS),
}
ANY = {"real", "bits", "classes", "relaxed bits", "relaxed classes"}
PATHWISE = {"real", "relaxed bits", "relaxed classes"}
# The kinds of latent that each objective is for, and how to build it.
OBJECTIVES = {
    "Trace_ELBO": (ANY, lambda: Trace_ELBO()),
    "TraceMeanField_ELBO": ({"real"}, lambda: TraceMeanField_ELBO()),
    "TraceEnum_ELBO": ({"bits", "classes"}, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "ImportanceWeighted": (PATHWISE, lambda: objectives.ImportanceWeighted(3)),
    "ImportanceWeighted-stl": (PATHWISE, lambda: objectives.ImportanceWeighted(1, "sticking-the-landing")),
    "ImportanceWeighted-dreg": (PATHWISE, lambda: objectives.ImportanceWeighted(3, "doubly-reparameterized")),
    "ScoreFunction": (ANY, lambda: objectives.ScoreFunction(RunningAverage())),
    "ScoreFunction-neural": (ANY, lambda: objectives.ScoreFunction(NeuralBaseline(D, NET))),
    "LeaveOneOut": (ANY, lambda: objectives.LeaveOneOut(2)),
    "VIMCO": (ANY, lambda: objectives.VIMCO(2)),
    "DisARM": ({"bits"}, lambda: objectives.DisARM()),
    "DiscreteKL": ({"relaxed bits", "relaxed classes"}, lambda: objectives.DiscreteKL()),
    "FreeBits": (PATHWISE, lambda: objectives.FreeBits(0.1)),
}


def fits(prior, guide):
    """A relaxed bit is a number on the real line, as its logit: a normal may be its guide, or its prior."""
    kinds = {PRIORS[prior][0], GUIDES[guide][0]}
    if prior == "VampPrior":
        return kinds == {"real"} and guide != "PerDatum"
    return len(kinds) == 1 or kinds == {"real", "relaxed bits"}


def takes(objective, prior, guide):
    """Whether an objective is for this pair: of free bits, one whose variables have a rate of their own."""
    kinds = {PRIORS[prior][0], GUIDES[guide][0]}
    if objective == "FreeBits" and "real" in kinds:
        products = {"StandardNormal", "Normal", "Laplace", "StudentT", "RelaxedBernoulli"}
        return prior in products and guide in {"DiagonalNormal", "PerDatum", "RelaxedBernoulli"}
    return kinds <= OBJECTIVES[objective][0]


PAIRS = [(p, g) for p in PRIORS for g in GUIDES if fits(p, g)]
TRIPLES = [(p, g, o) for p, g in PAIRS for o in OBJECTIVES if takes(o, p, g)]
NEEDS_ZUKO = pytest.mark.skipif(find_spec("zuko") is None, reason="flows need zuko, `pip install 'pyro-vae[flows]'`")


def marked(*names):
    return pytest.param(*names, marks=[NEEDS_ZUKO] if any("Flow" in name for name in names) else [])


def vae_of(prior, guide, likelihood):
    torch.manual_seed(0)
    encoder = GUIDES[guide][1]()
    latent = CLASSES if "classes" in GUIDES[guide][0] else 2
    make, x = LIKELIHOODS[likelihood]
    return pv.VAE(PRIORS[prior][1](encoder), encoder, make(latent)), x


def guide_for(vae, objective):
    return config_enumerate(vae.guide) if objective == "TraceEnum_ELBO" else vae.guide


def test_every_part_and_objective_is_listed():
    assert PRIORS.keys() == set(priors.__all__)
    assert GUIDES.keys() == set(guides.__all__)
    assert LIKELIHOODS.keys() == set(likelihoods.__all__)
    assert {name.partition("-")[0] for name in OBJECTIVES} >= set(objectives.__all__)


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


@pytest.mark.parametrize(
    ("prior", "guide", "likelihood", "objective"),
    [
        marked(p, g, list(LIKELIHOODS)[index % len(LIKELIHOODS)], o)  # each pair of lists, not each quadruple
        for index, (p, g, o) in enumerate(TRIPLES)
    ],
)
def test_what_fits_trains(prior, guide, likelihood, objective):
    assert_trains(prior, guide, likelihood, objective)


def assert_is_captured(monkeypatch, prior, guide, likelihood, objective):
    """The graph is replayed as it is: what a compiler makes of it does not depend on the part."""
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: None)
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


@pytest.mark.parametrize(
    ("prior", "guide", "likelihood", "objective"),
    [
        marked(p, g, list(LIKELIHOODS)[index % len(LIKELIHOODS)], taken[index % len(taken)])
        for index, (p, g) in list(enumerate(PAIRS))[::3]
        if (taken := [o for o in OBJECTIVES if takes(o, p, g)])
    ],
)
def test_what_fits_is_captured(monkeypatch, prior, guide, likelihood, objective):
    assert_is_captured(monkeypatch, prior, guide, likelihood, objective)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "guide", "likelihood", "objective"),
    [marked(p, g, list(LIKELIHOODS)[index % len(LIKELIHOODS)], o) for index, (p, g, o) in enumerate(TRIPLES)],
)
def test_every_objective_is_captured(monkeypatch, prior, guide, likelihood, objective):
    assert_is_captured(monkeypatch, prior, guide, likelihood, objective)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("prior", "guide"), [marked(*pair) for pair in PAIRS])
def test_every_combination_trains(prior, guide, likelihood):
    for objective in OBJECTIVES:
        if takes(objective, prior, guide):
            assert_trains(prior, guide, likelihood, objective)


@pytest.mark.parametrize(
    ("prior", "guide", "likelihood"),
    [marked(p, g, list(LIKELIHOODS)[index % len(LIKELIHOODS)]) for index, (p, g) in enumerate(PAIRS)],
)
def test_the_elbo_is_below_log_p_and_goes_through_a_file(prior, guide, likelihood):
    vae, x = vae_of(prior, guide, likelihood)
    pv.fit(vae.model, vae.guide, x, epochs=3, lr=1e-2)
    elbo = pv.evaluate(vae.model, vae.guide, x, num_samples=300)["elbo"]
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=5000)
    error = float(estimate.standard_error.square().sum().sqrt()) / N
    assert elbo < float(estimate.log_evidence.mean()) + 5 * error + 0.15
    file = io.BytesIO()
    torch.save(vae.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    encoder = GUIDES[guide][1]()
    latent = CLASSES if "classes" in GUIDES[guide][0] else 2
    other = pv.VAE(PRIORS[prior][1](encoder), encoder, LIKELIHOODS[likelihood][0](latent))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert pv.evaluate(other.model, other.guide, x) == pv.evaluate(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    ("prior", "guide"), [marked(p, g) for p, g in itertools.product(PRIORS, GUIDES) if not fits(p, g)]
)
def test_a_pair_that_does_not_fit_is_refused_and_says_what_would(prior, guide):
    with pytest.raises((ValueError, TypeError), match=r"What would fit|accepted is"):
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
def test_an_objective_that_is_not_for_a_pair_is_refused_and_says_what_is(prior, guide, objective):
    vae, x = vae_of(prior, guide, "Normal")
    with pytest.raises((ValueError, TypeError), match=r"accepted (is|are)|use Trace_ELBO"):
        pv.fit(vae.model, vae.guide, x, epochs=1, elbo=OBJECTIVES[objective][1]())
