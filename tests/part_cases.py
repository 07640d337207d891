"""Every part in each of its roles: a new part joins the suites by a line here."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from pyro_vae import families, guides, likelihoods, priors
from pyro_vae.parts.families import multivariate
from pyro_vae.parts.networks import mlp

NET = mlp([4], nn.Tanh)
PAIR = torch.tensor([0.3, 0.6])
TRIPLE = torch.tensor([0.2, 0.5, 0.3])

# (id, constructor): the id is the name in __all__, with a variant after "-". At most two dimensions are integrated.
PRIORS = [
    ("StandardNormal", lambda: priors.StandardNormal(2)),
    ("Normal", lambda: priors.Normal(2)),
    ("Laplace", lambda: priors.Laplace(1)),
    ("Laplace-learnable", lambda: priors.Laplace((1, 1), learnable=True)),
    ("StudentT", lambda: priors.StudentT(2, df=4.0)),
    ("StudentT-learnable", lambda: priors.StudentT(1, df=3.0, learnable=True)),
    ("Gamma", lambda: priors.Gamma(2, concentration=PAIR + 1, rate=2.0)),
    ("Gamma-learnable", lambda: priors.Gamma((1, 1), concentration=1.5, learnable=True)),
    ("Uniform", lambda: priors.Uniform(2, low=-PAIR, high=2.0)),
    ("MixtureOfNormals", lambda: priors.MixtureOfNormals(2, 3)),
    ("VampPrior", lambda: priors.VampPrior(guides.DiagonalNormal(3, 2, NET), torch.randn(4, 3))),
    ("VampPrior-full_rank", lambda: priors.VampPrior(guides.FullRankNormal((3, 1), 1, NET), torch.randn(2, 3, 1))),
    ("Bernoulli", lambda: priors.Bernoulli(3, probs=0.3)),
    ("Bernoulli-learnable", lambda: priors.Bernoulli((2, 2), learnable=True)),
    ("OneHotCategorical", lambda: priors.OneHotCategorical((2, 3), probs=TRIPLE)),
    ("OneHotCategorical-learnable", lambda: priors.OneHotCategorical((1, 4), learnable=True)),
    ("RelaxedBernoulli", lambda: priors.RelaxedBernoulli(2, temperature=0.5, probs=PAIR)),
    ("RelaxedBernoulli-learnable", lambda: priors.RelaxedBernoulli(1, temperature=0.9, learnable=True)),
    ("RelaxedBernoulli-hard", lambda: priors.RelaxedBernoulli(2, temperature=0.5, straight_through=True)),
    ("GumbelSoftmax", lambda: priors.GumbelSoftmax((1, 3), temperature=0.5, probs=TRIPLE)),
    ("GumbelSoftmax-learnable", lambda: priors.GumbelSoftmax((2, 2), temperature=0.8, learnable=True)),
    ("GumbelSoftmax-hard", lambda: priors.GumbelSoftmax((1, 3), temperature=0.5, straight_through=True)),
    ("NormalizingFlow", lambda: priors.NormalizingFlow(2, transforms=2, hidden=[4])),
    ("NormalizingFlow-matrix", lambda: priors.NormalizingFlow((2, 1), transforms=1, hidden=[4, 4])),
    ("NormalizingFlow-spline", lambda: priors.NormalizingFlow(1, transforms=2, kind="spline")),
]


def experts(latent):
    return [guides.DiagonalNormal((2, 1), latent, NET), guides.DiagonalNormal(3, latent, NET)]


GUIDES = [
    ("DiagonalNormal", lambda: guides.DiagonalNormal(3, 2, NET)),
    ("LogNormal", lambda: guides.LogNormal(3, 2, NET)),
    ("LogitNormal", lambda: guides.LogitNormal(3, 2, NET, low=-PAIR, high=2.0)),
    ("FullRankNormal", lambda: guides.FullRankNormal(3, 2, NET)),
    ("FullRankNormal-one", lambda: guides.FullRankNormal(3, 1, NET)),
    ("LowRankNormal", lambda: guides.LowRankNormal(3, 2, NET, rank=1)),
    ("MixtureOfNormals", lambda: guides.MixtureOfNormals(3, 2, NET, num_components=3)),
    ("MixtureOfNormals-one", lambda: guides.MixtureOfNormals(3, 1, NET)),
    ("ProductOfExperts-Normal", lambda: guides.ProductOfExperts(experts(2), priors.Normal(2))),
    ("ProductOfExperts-matrix", lambda: guides.ProductOfExperts(experts((1, 2)))),
    ("MixtureOfExperts-Normal", lambda: guides.MixtureOfExperts(experts(2))),
    ("PerDatum", lambda: guides.PerDatum(families.Normal(2), 1)),
    ("PerDatum-full_rank", lambda: guides.PerDatum(multivariate.FullRankNormal(2), 1)),
    ("Bernoulli", lambda: guides.Bernoulli((3, 1), 3, NET)),
    ("OneHotCategorical", lambda: guides.OneHotCategorical(3, (2, 3), NET)),
    ("RelaxedBernoulli", lambda: guides.RelaxedBernoulli(3, 2, NET, temperature=0.66)),
    ("GumbelSoftmax", lambda: guides.GumbelSoftmax(3, (1, 3), NET, temperature=0.5)),
    ("GumbelSoftmax-pair", lambda: guides.GumbelSoftmax(3, (2, 2), NET, temperature=0.66)),
    ("InverseAutoregressiveFlow", lambda: guides.InverseAutoregressiveFlow(3, 2, NET, 2, hidden=[4], context=2)),
    ("InverseAutoregressiveFlow-plain", lambda: guides.InverseAutoregressiveFlow((3, 1), (1, 2), NET, 1, [4], 0)),
    ("SplineFlow", lambda: guides.SplineFlow(3, 1, NET, transforms=1, hidden=[4], context=2)),
]
LIKELIHOODS = [
    ("Normal-shared", lambda: likelihoods.Normal(3, 2, NET)),
    ("Normal-per_dimension", lambda: likelihoods.Normal(3, (1, 2), NET, scale="per_dimension")),
    ("Normal-network", lambda: likelihoods.Normal((1, 3), 2, NET, scale="network")),
    ("Normal-fixed", lambda: likelihoods.Normal(3, 2, NET, scale=0.5)),
    ("Bernoulli", lambda: likelihoods.Bernoulli(3, (2, 2), NET)),
    ("Bernoulli-soft_targets", lambda: likelihoods.Bernoulli(3, 2, NET, soft_targets=True)),
    ("ContinuousBernoulli", lambda: likelihoods.ContinuousBernoulli(3, 2, NET)),
    ("Categorical", lambda: likelihoods.Categorical(3, (1, 2), 3, NET)),
    ("Poisson", lambda: likelihoods.Poisson(3, 2, NET)),
    ("NegativeBinomial-shared", lambda: likelihoods.NegativeBinomial(3, 2, NET)),
    ("NegativeBinomial-per_dimension", lambda: likelihoods.NegativeBinomial(3, (1, 2), NET, "per_dimension")),
    ("NegativeBinomial-network", lambda: likelihoods.NegativeBinomial((1, 3), 2, NET, "network")),
    ("NegativeBinomial-fixed", lambda: likelihoods.NegativeBinomial(3, 1, NET, dispersion=0.1)),
    ("StudentT-shared", lambda: likelihoods.StudentT(3, 2, NET)),
    ("StudentT-per_dimension", lambda: likelihoods.StudentT(3, (1, 2), NET, df="per_dimension", scale="network")),
    ("StudentT-network", lambda: likelihoods.StudentT(3, 2, NET, df="network", scale="network")),
    ("StudentT-fixed", lambda: likelihoods.StudentT(3, 2, NET, df=1.5, scale=0.5)),
]


def mixed_columns():
    return {"height": families.Normal(1), "sex": families.Bernoulli(1), "grade": families.Ordinal(1, 3)}


def skewed_columns():
    counts = families.ZeroInflated(families.Poisson(1), gate="shared")
    return [families.LogNormal(1, scale="shared"), counts, families.Categorical(1, 3)]


LIKELIHOODS += [
    ("LogNormal-shared", lambda: likelihoods.LogNormal(3, 2, NET)),
    ("LogNormal-network", lambda: likelihoods.LogNormal(3, (1, 2), NET, scale="network")),
    ("DiscretizedLogisticMixture", lambda: likelihoods.DiscretizedLogisticMixture((1, 3), (1, 2), NET, 9)),
    ("DiscretizedLogisticMixture-two",
        lambda: likelihoods.DiscretizedLogisticMixture(3, 2, NET, 12, num_components=2)),
    ("Ordinal", lambda: likelihoods.Ordinal((1, 3), (1, 2), 4, NET)),
    ("ZeroInflatedPoisson-network", lambda: likelihoods.ZeroInflatedPoisson(3, 2, NET)),
    ("ZeroInflatedPoisson-shared", lambda: likelihoods.ZeroInflatedPoisson(3, (1, 2), NET, gate="shared")),
    ("ZeroInflatedPoisson-fixed", lambda: likelihoods.ZeroInflatedPoisson(3, 2, NET, gate=0.3)),
    ("ZeroInflatedNegativeBinomial-per_dimension",
        lambda: likelihoods.ZeroInflatedNegativeBinomial(3, 2, NET, 0.2, gate="per_dimension")),
    ("Columns-mixed", lambda: likelihoods.Columns(3, mixed_columns(), NET, missing=False)),
    ("Columns-skewed", lambda: likelihoods.Columns((1, 3), skewed_columns(), NET, missing=False)),
]  # fmt: skip
OF_DATA = {"Categorical": lambda: (2, 3), "Ordinal": lambda: (2, 3), "Columns": lambda: (mixed_columns(),)}


def with_missing_entries(name):
    return getattr(likelihoods, name)(3, *OF_DATA.get(name, lambda: (2,))(), NET, missing=True)


LIKELIHOODS += [(f"{name}-missing", partial(with_missing_entries, name)) for name in likelihoods.__all__]
ROLES = {"priors": PRIORS, "guides": GUIDES, "likelihoods": LIKELIHOODS}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
UNLIKELY = 1e-5


class Case:
    """A part with random parameters, in float64, and its contexts."""

    def __init__(self, build):
        self.build = build
        self.part = self.fresh().double()

    def fresh(self):
        part = self.build()
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.5)
        return part

    def contexts(self, *batch, dtype=torch.float64):
        """The arguments of a call: none for a prior."""
        shape = getattr(self.part, "context_shape", None)
        return () if shape is None else (torch.randn(*batch, *shape, dtype=dtype),)


HAS_ZUKO = find_spec("zuko") is not None
NEEDS_ZUKO = pytest.mark.skipif(not HAS_ZUKO, reason="flows need zuko, `pip install 'pyro-vae[flows]'`")
ALL = [
    pytest.param(build, id=f"{role}.{name}", marks=[NEEDS_ZUKO] if "Flow" in name else [])
    for role, parts in ROLES.items()
    for name, build in parts
]
FLOWS = [param for param in ALL if "Flow" in param.id]
CONDITIONAL = [param for param in ALL if not param.id.startswith("priors.") and "PerDatum" not in param.id]
RELAXED = [param for param in ALL if "Relaxed" in param.id or "Gumbel" in param.id]
TRAINABLE = [param for param in ALL if param in FLOWS or list(param.values[0]().parameters())]
NORMALIZED = [param for param in ALL if "soft_targets" not in param.id]
