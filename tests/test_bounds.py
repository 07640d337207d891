"""What is called an ELBO is below log p(x): log p and log q are normalised, unweighted, and of the same latents."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, guide_of, model_of
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae.handlers import WeightKL

N = 12
X = torch.randn(N, generator=torch.Generator().manual_seed(0))
GREY = X.sigmoid()
SMALL = 1e-3
UNCHECKED = {"validate_args": False}
normal_model = model_of(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
normal_guide = guide_of(lambda x: dist.Normal(x / 2, 0.7))


def two_latents(x):
    w = pyro.sample("w", dist.Normal(0.0, SMALL))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    d = pyro.sample("d", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(d[0], 1.0))
        pyro.sample("x", dist.Normal(w + z, s), obs=x)


def half_a_map(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["s", "z"])))
    guide.append(AutoDelta(poutine.block(model, expose=["w", "d"])))
    return guide


def is_called_elbo(model, guide, x=X, **options):
    """Whether `evaluate` and `fit` give the name "elbo"; both give the same one."""
    terms = pv.evaluate(model, guide, x, **options)
    history = pv.fit(model, guide, x, epochs=1, lr=1e-9, **options).history
    assert terms.keys() == history.keys()
    assert ("elbo" in terms) != ("surrogate" in terms)
    return "elbo" in terms


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_autoguides_have_a_density_of_their_latents(make):
    assert is_called_elbo(two_latents, make(two_latents))


@pytest.mark.parametrize("make", [AutoDelta, half_a_map, AutoLaplaceApproximation])
def test_a_point_for_a_continuous_latent_bounds_nothing(make):
    assert not is_called_elbo(two_latents, make(two_latents))


def test_a_local_point_next_to_a_density_bounds_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, SMALL))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + z, 1.0), obs=x)

    def guide(x, log_density=0.0):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Delta(torch.zeros(len(x)), log_density))
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    for log_density in (0.0, 5.0):  # of its own, a point may have any
        terms = pv.evaluate(model, lambda x, value=log_density: guide(x, value), X)
        with pytest.raises(KeyError, match=r"no ELBO, but a 'surrogate': `guide` must have a density .* for 'a'"):
            terms["elbo"]
    with pytest.raises(ValueError, match=r"`guide` must have a density .* got a point .* for 'a'"):
        pv.log_evidence(model, guide, X)


ESTIMATES = {
    "fit": lambda model, guide: pv.fit(model, guide, X, epochs=1),
    "evaluate": lambda model, guide: pv.evaluate(model, guide, X),
    "exact": lambda model, guide: pv.exact.kl(model, guide, X),
    "evidence": lambda model, guide: pv.log_evidence(model, guide, X),
    "decompose": lambda model, guide: pv.decompose(model, guide, X),
    "gap": lambda model, guide: pv.inference_gap(model, guide, X),
    "calibrate": lambda model, guide: pv.calibrate(model, guide, X),
}
BINARY = dist.Bernoulli(0.5)
RELAXED = dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(0.5))
KINDS = {
    "mass for density": (dist.Normal(0.0, 1.0), BINARY, "a density for the latent 'z', .* got a mass, a Bernoulli"),
    "density for mass": (BINARY, dist.Normal(0.0, 1.0), "a mass for the latent 'z', .* got a density, a Normal"),
    "relaxed for mass": (BINARY, RELAXED, "a mass for the latent 'z', .* A relaxed guide needs a relaxed prior"),
    "all for positive": (dist.HalfNormal(1.0), dist.Normal(9.0, SMALL), r"'z' on \[0, inf\], .* a Normal on Real\(\)"),
    "three for two": (dist.Categorical(torch.ones(2)), dist.Categorical(torch.ones(3)), r"'z' on \[0, 1\].*\[0, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
@pytest.mark.parametrize(("prior", "q", "message"), KINDS.values(), ids=KINDS)
def test_a_mass_and_a_density_are_never_compared(estimate, prior, q, message):
    model, guide = model_of(prior, lambda z: dist.Normal(z, 1.0)), guide_of(lambda x: q.expand([len(x)]))
    with pytest.raises(ValueError, match=f"`guide` must have (its latent )?{message}"):
        estimate(model, guide)


def test_a_guide_on_a_part_of_the_support_is_a_bound():
    guide = guide_of(lambda x: dist.LogNormal(0 * x, 0.5))
    assert is_called_elbo(normal_model, guide)
    found = pv.evaluate(normal_model, guide, X, num_samples=500)["elbo"]
    assert found < pv.exact.log_evidence(normal_model, X).mean()


def shifted(x, in_factor=0.0, in_delta=0.0):
    """z = x/2 + s u: its density is that of u over s."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        jacobian = torch.full((len(x),), -math.log(SMALL))
        pyro.sample("z", dist.Delta(x / 2 + SMALL * u, log_density=in_delta * jacobian))
        if in_factor:
            pyro.factor("jacobian", in_factor * jacobian, has_rsample=True)


@pytest.mark.parametrize("share", [{"in_factor": 1.0}, {"in_delta": 1.0}, {"in_factor": 0.25, "in_delta": 0.75}])
def test_a_change_of_volume_counts_as_in_pyro_and_gives_the_elbo_of_the_density(share):
    def guide(x):
        return shifted(x, **share)

    same = guide_of(lambda x: dist.Normal(x / 2, SMALL))
    assert is_called_elbo(normal_model, guide)
    pyro.set_rng_seed(0)
    loss = Trace_ELBO().loss(normal_model, guide, X)
    found = pv.evaluate(normal_model, guide, X)
    assert found["elbo"] == pytest.approx(-loss / N, rel=1e-5)
    assert found == pytest.approx(pv.evaluate(normal_model, same, X), rel=1e-4)
    weighted = pv.fit(normal_model, guide, X, epochs=1, lr=1e-9, elbo=pv.objectives.ImportanceWeighted(1)).history
    assert weighted["elbo"][0] == pytest.approx(found["elbo"], abs=1.0)


def bonus(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))
        pyro.factor("bonus", torch.full((len(x),), -50.0), has_rsample=True)


def scattered(x):
    """An auxiliary draw that no latent is a function of: its entropy is no part of a bound."""
    with pyro.plate("data", len(x)):
        shift = pyro.sample("shift", dist.Normal(0.0, 100.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2 + SMALL * shift, 0.7))


def degenerate(x):
    """Two latents that are functions of one number lie on a line."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(torch.stack([u, u], -1), event_dim=1))


plane_model = model_of(dist.Normal(torch.zeros(2), SMALL).to_event(1), lambda z: dist.Normal(z.sum(-1), 1.0))
NO_DENSITY = {
    "no change of volume": (normal_model, shifted, "the change of volume of .*'z'.* as functions of .*'u'"),
    "half of it": (normal_model, lambda x: shifted(x, in_factor=0.5), "the change of volume"),
    "a factor": (normal_model, bonus, r"latent sites alone, got pyro.factor statements \['bonus'\]"),
    "an auxiliary draw": (normal_model, scattered, r"functions of its auxiliary sites \['shift'\], one to one, got 12"),
    "a line in a plane": (plane_model, degenerate, "functions of its auxiliary sites .* 12 auxiliary numbers for 24"),
}


@pytest.mark.parametrize(("model", "guide", "message"), NO_DENSITY.values(), ids=NO_DENSITY)
def test_a_guide_without_a_density_of_its_latents_bounds_nothing(model, guide, message):
    assert not is_called_elbo(model, guide)
    with pytest.raises(KeyError, match=message):
        pv.evaluate(model, guide, X)["elbo"]


def test_a_vector_mapped_by_hand_has_its_change_of_volume():
    slope = torch.tensor([[1.0, 0.5], [0.0, 2.0]])

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 0.1).to_event(1), infer={"is_auxiliary": True})
            z = (u @ slope).exp()
            pyro.sample("z", dist.Delta(z, log_density=-z.log().sum(-1) - math.log(2), event_dim=1))

    prior = dist.LogNormal(torch.zeros(2), 1.0).to_event(1)
    assert is_called_elbo(model_of(prior, lambda z: dist.Normal(z.sum(-1), 1.0)), guide)


MASK = torch.arange(N) % 2 == 0


def masked_model(x, by_latent=False, inside=False):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mask = z > 0 if by_latent else MASK
        with poutine.mask(mask=True if inside else mask):
            fn = dist.Normal(z, 1.0)
            pyro.sample("x", fn.mask(mask) if inside else fn, obs=x)


@pytest.mark.parametrize("inside", [False, True], ids=["poutine.mask", "masked distribution"])
def test_a_mask_of_the_data_may_depend_on_data_alone(inside):
    assert is_called_elbo(lambda x: masked_model(x, inside=inside), normal_guide)

    def by_latent(x):
        return masked_model(x, by_latent=True, inside=inside)

    assert not is_called_elbo(by_latent, normal_guide)
    for estimate in (pv.exact.log_evidence, lambda model, x: pv.log_evidence(model, normal_guide, x)):
        with pytest.raises(ValueError, match=r"`model` must have a mask of 'x' that depends on data .* \['z'\]"):
            estimate(by_latent, X)


def test_a_mask_is_compared_at_other_latents_where_code_takes_plain_tensors_alone():
    def plain(z):
        if type(z) is not torch.Tensor:
            raise TypeError("a plain tensor is needed")
        return z

    def model(x, by_latent):
        with pyro.plate("data", len(x)):
            z = plain(pyro.sample("z", dist.Normal(0.0, 1.0)))
            pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0 if by_latent else MASK), obs=x)

    assert is_called_elbo(lambda x: model(x, by_latent=False), normal_guide)
    assert not is_called_elbo(lambda x: model(x, by_latent=True), normal_guide)


def test_masks_of_latents_remove_the_same_rows_and_their_data():
    assert not is_called_elbo(normal_model, poutine.mask(normal_guide, mask=MASK))
    hidden = poutine.mask(normal_model, mask=MASK), poutine.mask(normal_guide, mask=MASK)
    assert is_called_elbo(*hidden)

    def free(x):  # no rate, but the likelihood depends on the latent
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert not is_called_elbo(free, poutine.mask(normal_guide, mask=False))


def test_a_prior_must_be_normalised_and_drawn_by_the_guide():
    improper = dist.ImproperUniform(constraints.real, (), ())
    assert not is_called_elbo(model_of(improper, lambda z: dist.Normal(z, 1.0)), normal_guide)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, SMALL))
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        assert not is_called_elbo(model, normal_guide)


OUTSIDE = {
    "grey pixels": (lambda z: dist.Bernoulli(logits=z, **UNCHECKED), GREY),
    "grey and masked": (lambda z: dist.Bernoulli(logits=z, **UNCHECKED).mask(MASK), GREY),
    "no counts": (lambda z: dist.Poisson(z.exp(), **UNCHECKED), GREY),
    "negative": (lambda z: dist.Exponential(z.exp(), **UNCHECKED), -GREY),
    "soft classes": (lambda z: dist.OneHotCategorical(logits=torch.stack([z, -z], -1), **UNCHECKED),
        torch.stack([GREY, 1 - GREY], -1)),
    "pixels of an image": (lambda z: dist.Bernoulli(logits=z[:, None].expand(-1, 3), **UNCHECKED).to_event(1),
        torch.where(torch.arange(3 * N).reshape(N, 3) == 7, 0.5, 1.0)),
}  # fmt: skip
INSIDE = {
    "binary": (lambda z: dist.Bernoulli(logits=z, **UNCHECKED), GREY.round()),
    "continuous": (lambda z: dist.ContinuousBernoulli(logits=z, **UNCHECKED), GREY),
    "grey where masked": (lambda z: dist.Bernoulli(logits=z, **UNCHECKED).mask(MASK), torch.where(MASK, 1.0, GREY)),
    "counts": (lambda z: dist.Poisson(z.exp(), **UNCHECKED), (5 * GREY).round()),
}
latent_guide = guide_of(lambda x: dist.Normal(torch.zeros(len(x)), 0.7))


@pytest.mark.parametrize(("likelihood", "x"), OUTSIDE.values(), ids=OUTSIDE)
def test_data_outside_of_the_support_have_no_likelihood_whatever_is_validated(likelihood, x):
    model = model_of(dist.Normal(0.0, 1.0), likelihood)
    assert not is_called_elbo(model, latent_guide, x)
    for estimate in (pv.exact.log_evidence, lambda model, x: pv.log_evidence(model, latent_guide, x)):
        with pytest.raises(ValueError, match=r"`data` must hold values in the support .* 'x'.* such as in row \d+"):
            estimate(model, x)


@pytest.mark.parametrize(("likelihood", "x"), INSIDE.values(), ids=INSIDE)
def test_data_inside_of_the_support_have_one(likelihood, x):
    assert is_called_elbo(model_of(dist.Normal(0.0, 1.0), likelihood), latent_guide, x)


def binary_model(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z, **UNCHECKED), obs=x)


def binary_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=0), 0.7))


@pytest.mark.parametrize("transform", [None, lambda x: x / 255], ids=["plain", "transformed"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_data_of_all_batches_and_of_validation_are_looked_at(transform, batch_size):
    factor = 1.0 if transform is None else 255.0
    binary, late = factor * GREY.round(), factor * GREY.round()
    late[9] = 0.5 * factor
    options = {"epochs": 1, "batch_size": batch_size, "transform": transform}
    assert "elbo" in pv.fit(binary_model, binary_guide, binary, **options, validation=binary[:5]).history
    with pytest.raises(KeyError, match="in row 9"):
        pv.fit(binary_model, binary_guide, late, **options).history["elbo"]
    with pytest.raises(ValueError, match=r"`validation` must hold values in the support .* in row 2"):
        pv.fit(binary_model, binary_guide, binary, **options, validation=late[7:])


def weighted_labels(x, y):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(4.0 * k - 2.0, 1.0))
        with poutine.scale(scale=0.1):
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_marginalised_model_with_weights_has_its_elbo_at_weight_1(weight):
    y = (X > 0).float()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def guide(x, y):
        with pyro.plate("data", len(x)), WeightKL(weight):
            pyro.sample("z", dist.Normal(x, SMALL))

    z = X.double()
    parts = [math.log(p) + dist.Normal(m, 1.0).log_prob(z) for p, m in ((0.3, -2.0), (0.7, 2.0))]
    log_p = torch.stack(parts).logsumexp(0) + dist.Normal(z, 0.5).log_prob(z) + dist.Bernoulli(logits=z).log_prob(y)
    expected = float((log_p + math.log(SMALL) + 0.5 * math.log(2 * math.pi) + 0.5).mean())
    found = pv.evaluate(weighted_labels, guide, (X, y), elbo=elbo, num_samples=50)
    assert found["elbo"] == pytest.approx(expected, abs=0.1)  # by the noise of log q, sqrt(1/2 / 600)
    sliced = pv.fit(weighted_labels, guide, (X, y), epochs=40, batch_size=4, lr=1e-9, elbo=elbo).history["elbo"]
    assert sum(sliced) / 40 == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
def test_the_rate_of_mean_field_objectives_is_the_closed_form_of_the_loss(particles):
    elbo, vae = TraceMeanField_ELBO(**particles, max_plate_nesting=1), gaussian().double()
    x = torch.randn(N, 3).double()
    pyro.set_rng_seed(0)
    loss = elbo.loss(vae.model, vae.guide, x)
    found = pv.evaluate(vae.model, vae.guide, x, elbo=elbo)
    kl = torch.distributions.kl_divergence(vae.encode(x), vae.prior().expand([N])).mean().item()
    assert found["rate"] == pytest.approx(kl, rel=1e-9)
    assert found["elbo"] == pytest.approx(-loss / N, rel=1e-9)
    weighted = WeightKL(0.25)
    again = pv.evaluate(weighted(vae.model), weighted(vae.guide), x, elbo=elbo)
    assert again == pytest.approx(found, rel=1e-9)


def test_an_objective_without_a_loss_is_refused_before_any_step():
    elbo = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    with pytest.raises(ValueError, match=r"`elbo` must be an ELBO with a loss .* got TraceTailAdaptive_ELBO, .* use"):
        pv.fit(normal_model, normal_guide, X, epochs=1, elbo=elbo)
    with pytest.raises(ValueError, match="`loss` must be an ELBO with a loss"):
        pv.SVI(normal_model, normal_guide, Adam({"lr": 1e-3}), elbo)
