"""Priors, guides, likelihoods and objectives, and which of them fit together: a new one joins the suites here."""

import pytest
import torch
from part_cases import NEEDS_ZUKO, mixed_columns
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, objectives, priors
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage

D, N = 3, 6  # features of a datum, and data
NET = networks.mlp([4])
CLASSES = (1, 3)


def experts():
    """The experts of two modalities: two features, and one."""
    return [guides.DiagonalNormal(features, 2, NET) for features in (2, 1)]


# By name in __all__: the kind of latent, and how to build it from the guide, which a VampPrior needs.
PRIORS = {
    "StandardNormal": ("real", lambda q: priors.StandardNormal(2)),
    "Normal": ("real", lambda q: priors.Normal(2)),
    "Laplace": ("real", lambda q: priors.Laplace(2)),
    "StudentT": ("real", lambda q: priors.StudentT(2)),
    "Gamma": ("positive", lambda q: priors.Gamma(2, 2.0, learnable=True)),
    "Uniform": ("box", lambda q: priors.Uniform(2, low=-1.0, high=2.0)),
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
    "LogNormal": ("positive", lambda: guides.LogNormal(D, 2, NET)),
    "LogitNormal": ("box", lambda: guides.LogitNormal(D, 2, NET, low=-1.0, high=2.0)),
    "FullRankNormal": ("real", lambda: guides.FullRankNormal(D, 2, NET)),
    "LowRankNormal": ("real", lambda: guides.LowRankNormal(D, 2, NET)),
    "MixtureOfNormals": ("real", lambda: guides.MixtureOfNormals(D, 2, NET)),
    "ProductOfExperts": ("real", lambda: guides.ProductOfExperts(experts())),
    "MixtureOfExperts": ("real", lambda: guides.MixtureOfExperts(experts())),
    "InverseAutoregressiveFlow": ("real", lambda: guides.InverseAutoregressiveFlow(D, 2, NET, 1, [4], context=2)),
    "SplineFlow": ("real", lambda: guides.SplineFlow(D, 2, NET, transforms=1, hidden=[4], context=2)),
    "PerDatum": ("real", lambda: guides.PerDatum(families.Normal(2), N)),
    "Bernoulli": ("bits", lambda: guides.Bernoulli(D, 2, NET)),
    "OneHotCategorical": ("classes", lambda: guides.OneHotCategorical(D, CLASSES, NET)),
    "RelaxedBernoulli": ("relaxed bits", lambda: guides.RelaxedBernoulli(D, 2, NET, 0.66)),
    "GumbelSoftmax": ("relaxed classes", lambda: guides.GumbelSoftmax(D, CLASSES, NET, 0.66)),
}
REAL, COUNTS = torch.rand(N, D), torch.arange(N * D).reshape(N, D).remainder(3).float()
MIXED = torch.stack([REAL[:, 0], (COUNTS[:, 1] > 0).float(), COUNTS[:, 2]], 1)
LIKELIHOODS = {
    "Normal": (lambda z: likelihoods.Normal(z, D, NET), REAL),
    "Bernoulli": (lambda z: likelihoods.Bernoulli(z, D, NET), (COUNTS > 0).float()),
    "ContinuousBernoulli": (lambda z: likelihoods.ContinuousBernoulli(z, D, NET), REAL),
    "StudentT": (lambda z: likelihoods.StudentT(z, D, NET), REAL),
    "Categorical": (lambda z: likelihoods.Categorical(z, D, 3, NET), COUNTS),
    "Poisson": (lambda z: likelihoods.Poisson(z, D, NET), COUNTS),
    "NegativeBinomial": (lambda z: likelihoods.NegativeBinomial(z, D, NET), COUNTS),
    "LogNormal": (lambda z: likelihoods.LogNormal(z, D, NET), REAL),
    "DiscretizedLogisticMixture": (lambda z: likelihoods.DiscretizedLogisticMixture(z, D, NET, 3), COUNTS),
    "Ordinal": (lambda z: likelihoods.Ordinal(z, D, 3, NET), COUNTS),
    "ZeroInflatedPoisson": (lambda z: likelihoods.ZeroInflatedPoisson(z, D, NET), COUNTS),
    "ZeroInflatedNegativeBinomial": (lambda z: likelihoods.ZeroInflatedNegativeBinomial(z, D, NET), COUNTS),
    "Columns": (lambda z: likelihoods.Columns(z, mixed_columns(), NET), MIXED),
}
CONTINUOUS = {"real", "positive", "box"}
PATHWISE = CONTINUOUS | {"relaxed bits", "relaxed classes"}
ANY = PATHWISE | {"bits", "classes"}
# The kinds of latent that each objective is for, and how to build it.
OBJECTIVES = {
    "Trace_ELBO": (ANY, lambda: Trace_ELBO()),
    "TraceMeanField_ELBO": (CONTINUOUS, lambda: TraceMeanField_ELBO()),
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
    "TotalCorrelation": (CONTINUOUS | {"relaxed bits"}, lambda: objectives.TotalCorrelation(3.0)),
}


def fits(prior, guide):
    """Whether prior and guide have one support: the logit of a relaxed bit is a real number, as a normal is."""
    kinds = {PRIORS[prior][0], GUIDES[guide][0]}
    if prior == "VampPrior":
        return GUIDES[guide][0] in CONTINUOUS and guide != "PerDatum"
    return len(kinds) == 1 or kinds == {"real", "relaxed bits"}


def takes(objective, prior, guide):
    """Whether an objective is for this pair: those that look at single variables need independent ones."""
    kinds = {PRIORS[prior][0], GUIDES[guide][0]}
    if objective == "FreeBits" and "real" in kinds:
        products = {"StandardNormal", "Normal", "Laplace", "StudentT", "RelaxedBernoulli"}
        return prior in products and guide in {"DiagonalNormal", "PerDatum", "ProductOfExperts", "RelaxedBernoulli"}
    products = {"DiagonalNormal", "LogNormal", "LogitNormal", "PerDatum", "ProductOfExperts", "RelaxedBernoulli"}
    if objective == "TotalCorrelation" and guide not in products:
        return False
    return kinds <= OBJECTIVES[objective][0]


PAIRS = [(p, g) for p in PRIORS for g in GUIDES if fits(p, g)]


def marked(*names):
    return pytest.param(*names, marks=[NEEDS_ZUKO] if any("Flow" in name for name in names) else [])


def vae_of(prior, guide, likelihood, seed=0):
    torch.manual_seed(seed)
    encoder = GUIDES[guide][1]()
    latent = CLASSES if "classes" in GUIDES[guide][0] else 2
    make, x = LIKELIHOODS[likelihood]
    return pv.VAE(PRIORS[prior][1](encoder), encoder, make(latent)), x


def guide_for(vae, objective):
    return config_enumerate(vae.guide) if objective == "TraceEnum_ELBO" else vae.guide
