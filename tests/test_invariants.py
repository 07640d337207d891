"""Properties of public functions that hold for all arguments, tested on random ones."""

import copy
import math
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pairs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae import exact, families, guides, likelihoods, networks, priors, schedules
from pyro_vae._utils import validation
from pyro_vae.parts.families import multivariate

SEEDS = st.integers(0, 2**32 - 1)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomized(vae, seed, size):
    """The VAE with parameters from N(0, size^2)."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return vae


def binary(seed=0, size=1.0, latent=3):
    prior, encoder = priors.Bernoulli(latent, learnable=True), guides.Bernoulli(2, latent, pairs.NET)
    return randomized(pairs.gaussian(latent, 2, prior=prior, encoder=encoder), seed, size)


def gaussian(seed=0, size=1.0):
    return randomized(pairs.gaussian(1, 2, prior=priors.Normal(1)), seed, size)


FAMILIES = {
    "normal": lambda: families.Normal(3),
    "normal, shared scale": lambda: families.Normal((2, 2), scale="shared"),
    "Laplace": lambda: families.Laplace(3),
    "Student-t": lambda: families.StudentT(3, df="network"),
    "Poisson": lambda: families.Poisson(3),
    "negative binomial": lambda: families.NegativeBinomial(3, dispersion="network"),
    "categorical": lambda: families.Categorical(3, num_classes=4),
    "Bernoulli": lambda: families.Bernoulli(3),
    "continuous Bernoulli": lambda: families.ContinuousBernoulli(3),
    "one-hot": lambda: families.OneHotCategorical((2, 3)),
    "relaxed Bernoulli": lambda: families.RelaxedBernoulli(3, temperature=0.5),
    "Gumbel-softmax": lambda: families.RelaxedOneHotCategorical((2, 3), temperature=0.5),
    "full rank": lambda: multivariate.FullRankNormal(2),
    "low rank": lambda: multivariate.LowRankNormal(3, rank=1),
    "mixture": lambda: multivariate.MixtureOfNormals(2, num_components=3),
    "flow": lambda: multivariate.Flow(2, transforms=2, hidden=[4]),
}
if find_spec("zuko") is None:
    del FAMILIES["flow"]


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=SEEDS, size=st.floats(0.1, 5.0), rows=st.integers(1, 4))
@examples(15)
def test_the_log_density_of_a_draw_is_finite_and_agrees_in_single_and_double_precision(name, seed, size, rows):
    family = FAMILIES[name]()
    raw = size * torch.randn(rows, family.num_raw, generator=seeded(seed)).clamp(-2.0, 2.0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        single = family(raw)
        value = single.sample()
        found = single.log_prob(value)
        truth = copy.deepcopy(family).double()(raw.double()).log_prob(value.double())
    assert found.shape == (rows,)
    assert truth.isfinite().all()
    # Rounding a location to 24 bits matters most where the scale is small, at the largest sizes.
    torch.testing.assert_close(found.double(), truth, rtol=2e-3, atol=2e-2)


BATCHES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@given(batch=BATCHES, event=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), latent=st.integers(1, 3))
@examples(20)
def test_batch_dimensions_on_the_left_are_kept_for_all_event_shapes(batch, event, latent):
    vae = pv.VAE(
        priors.RelaxedBernoulli(latent, temperature=0.5),
        guides.RelaxedBernoulli(event, latent, networks.linear(), temperature=0.5),
        likelihoods.Normal(latent, event, networks.linear()),
    )
    x = torch.zeros(*batch, *event)
    q = vae.encode(x)
    z = q.sample((2,))
    assert (q.batch_shape, q.event_shape, z.shape) == (batch, (latent,), (2, *batch, latent))
    assert vae.code(z).shape == z.shape
    p = vae.decode(z)
    assert (p.batch_shape, p.event_shape) == ((2, *batch), event)
    assert p.log_prob(x).shape == (2, *batch)
    assert vae.reconstruct(x).shape == x.shape


ENUMERATED = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)


@given(seed=SEEDS, size=st.floats(0.1, 3.0), latent=st.integers(1, 4), rows=st.integers(1, 5))
@examples(20)
def test_the_elbo_is_below_log_p_by_the_kl_and_is_minus_distortion_minus_rate(seed, size, latent, rows):
    vae = binary(seed, size, latent).double()
    x = size * torch.randn(rows, 2, generator=seeded(seed)).double()
    elbo, log_p = exact.elbo(vae.model, vae.guide, x), exact.log_evidence(vae.model, x)
    gap = exact.kl(vae.model, vae.guide, x)
    assert (gap >= -1e-9).all()
    torch.testing.assert_close(log_p - elbo, gap, rtol=1e-6, atol=1e-7)
    terms = pv.evaluate(vae.model, config_enumerate(vae.guide), x, elbo=ENUMERATED)
    assert terms["elbo"] == pytest.approx(-terms["distortion"] - terms["rate"], rel=1e-9)
    assert terms["elbo"] == pytest.approx(elbo.mean().item(), rel=1e-6, abs=1e-6)
    assert terms["rate"] >= -1e-9


@given(seed=SEEDS, size=st.floats(0.1, 2.0), rows=st.integers(2, 6))
@examples(8)
def test_a_decomposition_adds_up(seed, size, rows):
    vae = binary(seed, size)
    nats = pv.decompose(vae.model, vae.guide, torch.randn(rows, 2, generator=seeded(seed)))
    information, marginal_kl = nats.mutual_information.value, nats.marginal_kl.value
    assert nats.elbo.value == pytest.approx(-nats.distortion.value - nats.rate.value, abs=1e-5)
    assert nats.rate.value == pytest.approx(information + marginal_kl, abs=1e-5)
    assert -1e-6 <= information <= math.log(rows) + 1e-6
    assert marginal_kl >= -1e-6


@pytest.mark.parametrize("build", [binary, gaussian])
@given(seed=SEEDS, order=st.permutations(range(5)), kept=st.integers(1, 5))
@examples(6)
def test_exact_answers_of_each_datum_follow_its_row(build, seed, order, kept):
    vae, x = build(seed), torch.randn(5, 2, generator=seeded(seed))
    rows = torch.tensor(order[:kept])
    for found in (
        lambda x: exact.log_evidence(vae.model, x),
        lambda x: exact.elbo(vae.model, vae.guide, x),
        lambda x: exact.kl(vae.model, vae.guide, x),
        lambda x: exact.posterior(vae.model, x).mean,
    ):
        torch.testing.assert_close(found(x)[rows], found(x[rows]), rtol=1e-3, atol=1e-3)


@given(seed=SEEDS, order=st.permutations(range(6)))
@examples(10)
def test_a_comparison_does_not_depend_on_the_order_of_data_and_models(seed, order):
    found = torch.randn(3, 6, generator=seeded(seed)).double()
    names, rows = ["a", "b", "c"], torch.tensor(order)
    table = pv.compare_evidence(dict(zip(names, found, strict=True)))
    other = pv.compare_evidence(dict(zip(names[::-1], found[:, rows].flip(0), strict=True)))
    assert list(table.index) == list(other.index)
    np.testing.assert_allclose(table.to_numpy(), other.to_numpy(), rtol=1e-9, atol=1e-12)
    assert (table["difference"] <= 0).all()


POSITIVE = st.floats(1e-3, 1e3)
STEPS = st.lists(st.integers(0, 10_000), min_size=2, max_size=20).map(sorted)


def assert_monotone(values, start, end, rounding):
    """Assert that values go from ``start`` towards ``end``, and never leave the interval between them."""
    sign = 1 if end >= start else -1
    assert all(sign * (after - before) >= -rounding for before, after in pairwise(values))
    assert all(min(start, end) - rounding <= value <= max(start, end) + rounding for value in values)


@given(start=POSITIVE, rate=st.floats(0, 1), floor=st.floats(0, 10), every=st.integers(1, 500), steps=STEPS)
@examples(50)
def test_an_exponential_decay_falls_from_its_start_to_its_floor(start, rate, floor, every, steps):
    values = [schedules.exponential(start, rate, floor, every)(step) for step in steps]
    assert_monotone(values, max(start, floor), floor, rounding=0)


@given(start=st.floats(-10, 10), end=st.floats(-10, 10), length=st.integers(1, 5000), steps=STEPS)
@examples(50)
def test_a_linear_schedule_is_monotone_from_its_start_to_its_end(start, end, length, steps):
    schedule = schedules.linear(start, end, length)
    rounding = 1e-12 * max(1.0, abs(start), abs(end))
    assert_monotone([schedule(step) for step in steps], start, end, rounding)
    assert schedule(0) == start
    assert schedule(length) == pytest.approx(end, abs=rounding)


@given(period=st.integers(1, 500), rise=st.floats(0.01, 1.0), step=st.integers(0, 5000))
@examples(50)
def test_a_cyclical_schedule_repeats_between_its_ends(period, rise, step):
    schedule = schedules.cyclical(0.0, 1.0, period, rise)
    assert 0.0 <= schedule(step) <= 1.0
    assert schedule(step) == schedule(step + period)


@given(start=POSITIVE, length=st.integers(1, 5000), hold=st.floats(0, 0.99), end=st.floats(0, 1), steps=STEPS)
@examples(50)
def test_a_decayed_learning_rate_falls_from_its_start_to_its_final_share(start, length, hold, end, steps):
    schedule = schedules.decayed(start, length, hold, end)
    assert_monotone([schedule(step) for step in steps], start, start * end, rounding=1e-12 * start)
    assert schedule(length) == pytest.approx(start * end, abs=1e-12 * start)


ANYTHING = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.text(max_size=3), st.none(), st.lists(st.integers()),
    st.integers(-100, 100).map(np.int64), st.floats(width=32).map(np.float32), st.complex_numbers(),
)  # fmt: skip


def accepts(check, value, **options):
    """Whether a check accepts a value; if not, its message must name the argument and the value."""
    refusal = None
    try:
        check(value, "argument", **options)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith("`argument` must be ") and ", got " in refusal)
    return refusal is None


@given(value=ANYTHING)
@examples(300)
def test_checks_accept_exactly_what_their_messages_describe(value):
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    is_number = is_integer or isinstance(value, float | np.floating)
    finite = is_number and math.isfinite(value)
    assert validation.is_integer(value) == is_integer
    is_size = is_integer and 1 <= value < 2**63
    is_shape = isinstance(value, list) and bool(value) and min(value) > 0 and math.prod(value) < 2**63
    assert accepts(validation.positive_int, value) == is_size
    assert accepts(validation.as_shape, value) == (is_size or is_shape)
    assert accepts(validation.seed_number, value) == (is_integer and 0 <= value < 2**32)
    assert accepts(validation.positive, value) == (finite and value > 0)
    assert accepts(validation.number, value) == finite
    assert accepts(validation.number, value, least=0) == (finite and value >= 0)
    assert accepts(validation.boolean, value) == isinstance(value, bool)
    assert accepts(validation.nonempty_string, value) == (isinstance(value, str) and value != "")
