"""The extent of each distribution holds all but a negligible mass, by the distribution functions of SciPy."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_vae.distributions import Extent, LogitNormal, LogitRelaxedBernoulli, LogRelaxedOneHotCategorical, find_extent
from pyro_vae.distributions.mixture import MixtureOfNormals

SHAPES = torch.tensor([0.05, 0.5, 1.0, 3.0, 200.0], dtype=torch.float64)
SIGMOID = scipy.stats.logistic.cdf


# By name: the distribution, its law by SciPy, and the map from coordinates to the values of that law.
CASES = {
    "Normal": (dist.Normal(SHAPES, SHAPES), scipy.stats.norm(SHAPES, SHAPES), lambda y: y),
    "Laplace": (dist.Laplace(SHAPES, SHAPES), scipy.stats.laplace(SHAPES, SHAPES), lambda y: y),
    "StudentT": (dist.StudentT(SHAPES + 1, 0.0, SHAPES), scipy.stats.t(SHAPES + 1, 0, SHAPES), lambda y: y),
    "LogNormal": (dist.LogNormal(SHAPES, 1.0), scipy.stats.norm(SHAPES, 1.0), lambda y: y),
    "HalfNormal": (dist.HalfNormal(SHAPES), scipy.stats.halfnorm(scale=SHAPES), np.exp),
    "HalfCauchy": (dist.HalfCauchy(SHAPES), scipy.stats.halfcauchy(scale=SHAPES), np.exp),
    "InverseGamma": (dist.InverseGamma(SHAPES, 2.0), scipy.stats.invgamma(SHAPES, scale=2.0), np.exp),
    "Gamma": (dist.Gamma(SHAPES, 2.0), scipy.stats.gamma(SHAPES, scale=0.5), np.exp),
    "Exponential": (dist.Exponential(SHAPES), scipy.stats.expon(scale=1 / SHAPES), np.exp),
    "Beta": (dist.Beta(SHAPES, SHAPES.flip(0)), scipy.stats.beta(SHAPES, SHAPES.flip(0)), SIGMOID),
    "Uniform": (dist.Uniform(SHAPES, SHAPES + 1), scipy.stats.uniform(), SIGMOID),
    "LogitNormal": (LogitNormal(SHAPES, 0.5, -1.0, 1.0), scipy.stats.norm(SHAPES, 0.5), lambda y: y),
    "LogitRelaxedBernoulli": (LogitRelaxedBernoulli(0.5, SHAPES), scipy.stats.logistic(SHAPES / 0.5, 2.0), lambda y: y),
}


@pytest.mark.parametrize(("distribution", "reference", "site"), CASES.values(), ids=CASES)
def test_the_box_holds_all_but_a_negligible_mass_and_is_not_much_too_wide(distribution, reference, site):
    box = find_extent(distribution.to_event(1))
    assert ((box.low <= box.middle) & (box.middle <= box.high) & (box.low < box.high)).all()
    below = reference.cdf(site(box.low.numpy()))
    with np.errstate(all="ignore"):
        above = reference.sf(site(box.high.numpy()))
    limit = 1e-7 if isinstance(distribution, dist.StudentT) else 1e-15
    assert (below <= limit).all()
    assert (above <= limit).all()


def test_a_mixture_reaches_as_far_as_its_components():
    loc, scale = torch.tensor([[-5.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    components = dist.Normal(loc, scale).to_event(1)
    box = find_extent(dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
    assert (box.low.item(), box.high.item()) == (-15.0, 21.0)
    box = find_extent(MixtureOfNormals(torch.zeros(2), loc, scale))
    assert box.low < -10 < 10 < box.high


def test_the_box_of_log_ratios_is_broken_where_two_classes_are_equally_likely():
    box = find_extent(LogRelaxedOneHotCategorical(torch.tensor(0.5), torch.tensor([1.0, 0.0, -1.0])))
    assert torch.equal(box.middle, torch.zeros(2))
    torch.testing.assert_close((box.low + box.high) / 2, torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize("distribution", [dist.Pareto(1.0, 2.0), dist.Cauchy(0.0, 1.0), dist.Dirichlet(torch.ones(3))])
def test_an_unknown_extent_is_an_error(distribution):
    with pytest.raises(NotImplementedError, match=r"extent is not known|finite mean and variance"):
        find_extent(distribution)


def test_another_distribution_has_its_own_method_or_is_registered():
    class Own(dist.Normal):
        def extent(self):
            return Extent(self.loc - 1, self.loc, self.loc + 1)

    assert find_extent(Own(torch.tensor(2.0), 1.0).mask(True)).high == 3
