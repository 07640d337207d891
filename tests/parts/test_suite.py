"""The suite of all parts: density, draws, gradients, copies, dtypes. A part joins by a line in part_cases.py."""

import copy

import pytest
import torch
from part_cases import (
    ALL,
    CONDITIONAL,
    DEVICES,
    FLOWS,
    NEEDS_ZUKO,
    NORMALIZED,
    RELAXED,
    ROLES,
    TRAINABLE,
    UNLIKELY,
    Case,
)
from pyro import distributions as dist
from scipy.interpolate import CubicSpline
from scipy.stats import chisquare, kstest
from torch.distributions import biject_to

from pyro_vae import families, guides, likelihoods, priors
from pyro_vae.distributions import Columns
from pyro_vae.distributions.properties import base_distribution, base_support, conditional_mean, is_normalized
from pyro_vae.parts.families import multivariate


@pytest.mark.parametrize("role", ROLES)
def test_every_public_part_is_listed_here(role):
    module = {"priors": priors, "guides": guides, "likelihoods": likelihoods}[role]
    assert {name.partition("-")[0] for name, _ in ROLES[role]} == set(module.__all__)


@NEEDS_ZUKO
def test_every_concrete_family_is_in_some_part_listed_here():
    walked = {type(build().family) for parts in ROLES.values() for _, build in parts}
    public = {getattr(module, name) for module in (families, multivariate) for name in module.__all__}
    assert walked == public - {families.Family, families.Relaxed}


class Grid:
    """The mass of a continuous distribution on a grid of midpoints in unconstrained coordinates."""

    def __init__(self, q, size=200_000):
        self.transform = biject_to(base_support(q))
        self.heavy = isinstance(base_distribution(q), dist.StudentT)  # on the inverse hyperbolic sine, a logarithm
        shape = self.transform.inverse_shape(q.event_shape)
        self.dims = torch.Size(shape).numel()
        assert 1 <= self.dims <= 2
        size = 900 if self.dims == 2 else size  # many: a spline's density has kinks
        self.low, self.high = -45.0, 45.0
        self.step = (self.high - self.low) / size
        axis = self.low + self.step * (torch.arange(size, dtype=torch.float64) + 0.5)
        points = torch.cartesian_prod(*[axis] * self.dims).reshape(-1, *shape)
        log_jacobian = points.cosh().log().flatten(1).sum(1) if self.heavy else 0.0
        points = points.sinh() if self.heavy else points
        self.values = self.transform(points)
        log_jacobian = log_jacobian + self.transform.log_abs_det_jacobian(points, self.values).flatten(1).sum(1)
        self.volume = log_jacobian.exp() * self.step**self.dims
        self.mass = (q.log_prob(self.values).exp() * self.volume).reshape([size] * self.dims).detach()

    def coordinates(self, values):
        points = self.transform.inv(values)
        return (points.asinh() if self.heavy else points).reshape(len(values), self.dims)

    def marginal_cdf(self, dim):
        others = [d for d in range(self.dims) if d != dim]
        marginal = self.mass.sum(others) if others else self.mass
        edges = torch.linspace(self.low, self.high, len(marginal) + 1, dtype=torch.float64)
        spline = CubicSpline(edges.numpy(), torch.cat([marginal.new_zeros(1), marginal.cumsum(0)]).numpy())
        return lambda x: spline(x.clip(self.low, self.high))


def states_of(q):
    """All states of a discrete distribution; of counts, all but a mass of 1e-9 on each axis."""
    if q.has_enumerate_support:
        return q.enumerate_support()
    *_, mean, variance = (moment.detach() for moment in (q.mean, q.variance))
    last = int((mean + 40 * variance.sqrt()).max()) + 20
    axis = torch.arange(last + 1, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * q.event_shape.numel()).reshape(-1, *q.event_shape)


def pooled(counts, expected, least=10.0):
    """Pool the cells of small expected counts, as a chi-square test needs."""
    rare = expected < least
    if not rare.any():
        return counts, expected
    return tuple(torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (counts, expected))


def test_rare_cells_are_pooled_and_none_is_lost():
    counts, expected = pooled(torch.tensor([30.0, 4.0, 1.0]), torch.tensor([29.0, 5.0, 2.0]))
    assert (counts.tolist(), expected.tolist()) == ([30, 5], [29, 7])


@pytest.mark.parametrize("build", NORMALIZED)
def test_density_or_mass_sums_to_one_and_samples_follow_it(build):
    case = Case(build)
    q = case.part(*case.contexts())
    samples = q.sample((20_000,))
    assert is_normalized(q)
    assert q.support.check(samples).all()
    total, p_values = of_columns(q, samples) if isinstance(q, Columns) else of_one_kind(q, samples)
    assert total.item() == pytest.approx(1, abs=1e-6)
    assert min(p_values) > UNLIKELY


def of_one_kind(q, samples):
    """The total of a density or mass, and p-values of the samples."""
    if q.support.is_discrete:
        states = states_of(q)
        mass = q.log_prob(states).exp().detach()
        drawn, times = samples.flatten(1).unique(dim=0, return_counts=True)
        place = (drawn[:, None] == states.flatten(1)).all(-1).int().argmax(1)
        assert torch.equal(states.flatten(1)[place], drawn)
        counts, expected = pooled(torch.zeros_like(mass).index_add(0, place, times.double()), 20_000 * mass)
        return mass.sum(), [chisquare(counts.numpy(), expected.numpy(), sum_check=False).pvalue]
    grid = Grid(q)
    coordinates = grid.coordinates(samples).detach().T.numpy()
    return grid.mass.sum(), [kstest(values, grid.marginal_cdf(dim)).pvalue for dim, values in enumerate(coordinates)]


def of_columns(q, samples):
    """The sum over all states of the discrete columns of the integral over the others, and p-values by column."""
    points, volumes, p_values = [], [], []
    for place, column in enumerate(q.columns.values()):
        p_values += of_one_kind(column, samples[:, place : place + 1])[1]
        grid = None if column.support.is_discrete else Grid(column, 2000)
        points.append(states_of(column)[:, 0] if grid is None else grid.values[:, 0])
        volumes.append(torch.ones_like(points[-1]) if grid is None else grid.volume)
    mass = q.log_prob(torch.cartesian_prod(*points)).exp() * torch.cartesian_prod(*volumes).prod(-1)
    return mass.sum().detach(), p_values


@pytest.mark.parametrize("build", [param for param in ALL if param.id.startswith("likelihoods.")])
def test_mean_is_that_of_samples(build):
    case = Case(build)
    q = case.part(*case.contexts())
    n = 20_000
    try:
        error = (q.variance / n).sqrt()
    except NotImplementedError:
        error = q.sample((n,)).std(0) / n**0.5
    if not error.isfinite().all():
        pytest.skip("the variance is not finite")
    assert ((q.sample((n,)).mean(0) - q.mean).abs() <= 6 * error).all()


@pytest.mark.parametrize("build", TRAINABLE)
def test_log_prob_has_a_finite_gradient_in_every_parameter(build):
    case = Case(build)
    q = case.part(*case.contexts(5))
    q.log_prob(q.sample((7,))).sum().backward()
    assert_gradients([parameter.grad for parameter in case.part.parameters()])


def assert_gradients(gradients):
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


PATHWISE = [p for p in TRAINABLE if "Normal" in p.id or "StudentT" in p.id or p in RELAXED + FLOWS]


@pytest.mark.parametrize("build", PATHWISE)
def test_reparameterised_draws_carry_a_gradient_to_every_parameter(build):
    case = Case(build)
    q = case.part(*case.contexts(5))
    assert q.has_rsample
    assert_gradients(torch.autograd.grad((q.rsample() ** 2).sum(), list(case.part.parameters())))


@pytest.mark.parametrize("build", ALL)
def test_a_loaded_state_and_a_deepcopy_are_equal_and_the_copy_is_apart(build):
    case = Case(build)
    loaded, twin = case.fresh().double(), copy.deepcopy(case.part)
    loaded.load_state_dict(case.part.state_dict())
    contexts = case.contexts(5)
    value = case.part(*contexts).sample()
    before = case.part(*contexts).log_prob(value)
    assert all(torch.equal(other(*contexts).log_prob(value), before) for other in (loaded, twin))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point():  # and not the mask of a network
                tensor.add_(1.0)
    assert torch.equal(case.part(*contexts).log_prob(value), before)


@pytest.mark.parametrize("build", CONDITIONAL)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (4, 1), (2, 1, 3)])
def test_leading_dimensions_are_rows(build, batch):
    case = Case(build)
    (context,) = case.contexts(*batch)
    q = case.part(context)
    value = q.sample()
    assert (q.batch_shape, q.event_shape, value.shape) == (batch, case.part.event_shape, batch + case.part.event_shape)
    rows = zip(context.reshape(-1, *case.part.context_shape), value.reshape(-1, *q.event_shape), strict=True)
    rowwise = torch.stack([case.part(one).log_prob(row) for one, row in rows])
    torch.testing.assert_close(q.log_prob(value).flatten(), rowwise)


@pytest.mark.parametrize("build", ALL)
def test_expansion_keeps_density_and_shapes(build):
    case = Case(build)
    q = case.part(*case.contexts(*([1] if "PerDatum" in repr(case.part) else [3])))
    wide = q.expand((4, 3))
    value = wide.sample((2,))
    assert (wide.batch_shape, value.shape) == ((4, 3), (2, 4, 3, *q.event_shape))
    assert wide.support.check(value).all()
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    torch.testing.assert_close(wide.expand((5, 4, 3)).log_prob(value[0]), q.log_prob(value[0]).expand(5, 4, 3))


@pytest.mark.parametrize("build", [param for param in ALL if param.id.startswith("priors.")])
def test_prior_is_of_one_datum_and_ignores_a_context(build):
    case = Case(build)
    p = case.part()
    assert (p.batch_shape, p.event_shape) == ((), case.part.event_shape)
    value = p.sample((3,))
    assert torch.equal(case.part(torch.randn(3, 2)).log_prob(value), p.log_prob(value))


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(build, dtype, device):
    case = Case(build)
    part = case.fresh().to(device, dtype)
    q = part(*[context.to(device) for context in case.contexts(5, dtype=dtype)])
    value = q.sample()
    made = [value, q.log_prob(value), *[tensor for tensor in part.state_dict().values() if tensor.is_floating_point()]]
    if q.has_enumerate_support:
        made.append(q.enumerate_support())
    if is_relaxed(part):
        made += [part.family.soft(value), part.family.hard(value)]
    elif (mean := conditional_mean(q)[0]) is not None:
        made.append(mean)
    assert {(tensor.dtype, tensor.device.type) for tensor in made} == {(dtype, device)}


def is_relaxed(part):
    return isinstance(part.family, families.Relaxed)


@pytest.mark.parametrize("build", ALL)
def test_repr_names_part_family_and_shape(build):
    part = build()
    text = repr(part)
    assert type(part).__name__ in text
    assert type(part.family).__name__ in text
    assert f"event_shape={tuple(part.event_shape)}" in text
    if is_relaxed(part):
        assert f"temperature={part.family.temperature.item():.4g}" in text
    for name in ("scale", "df", "dispersion", "gate", "num_classes", "num_levels"):
        assert not hasattr(part.family, name) or f"{name}={getattr(part.family, name)!r}" in text
    assert ("missing=True" in text) == getattr(part, "missing", False)


@pytest.mark.parametrize("build", [param for param in ALL if param not in RELAXED])
def test_parts_without_a_discrete_twin_are_refused(build):
    with pytest.raises(TypeError, match="no discrete twin: only relaxed parts have one"):
        build().discrete()
