"""Estimators for discrete latents, held against enumeration: unbiased, of the bound that they tell."""

import itertools
import math
import warnings
from copy import deepcopy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae._utils.traces import latent_sites, recorded
from pyro_vae.diagnostics.gradients import exact_gradient
from pyro_vae.handlers import SubsampleRows, WeightKL
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage
from pyro_vae.objectives.modified_kl import DiscreteKL, FreeBits
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction

TANH = networks.mlp([4], activation=nn.Tanh)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
CALLS = 200
SCORES = 6.5  # of 200 calls: a failure of 1e-9 each, and there are fewer than 3000 numbers here


def vae_of(kind, prior_probs=0.3):
    """Small, in float64, and away from symmetry: prior, encoder and decoder are all trained."""
    torch.manual_seed(0)
    prior, encoder, latent = {
        "bernoulli": lambda: (priors.Bernoulli(3, prior_probs, learnable=True), guides.Bernoulli(2, 3, TANH), 3),
        "one-hot": lambda: (
            priors.OneHotCategorical((2, 3), torch.tensor([0.2, 0.3, 0.5]), learnable=True),
            guides.OneHotCategorical(2, (2, 3), TANH),
            (2, 3),
        ),
        "relaxed": lambda: (
            priors.RelaxedBernoulli(3, 0.5, probs=0.3, learnable=True),
            guides.RelaxedBernoulli(2, 3, TANH, 0.66),
            3,
        ),
        "gumbel": lambda: (
            priors.GumbelSoftmax((2, 3), 0.5, torch.tensor([0.2, 0.3, 0.5]), learnable=True),
            guides.GumbelSoftmax(2, (2, 3), TANH, 0.66),
            (2, 3),
        ),
    }[kind]()
    return pv.VAE(prior, encoder, likelihoods.Normal(latent, 2, TANH, scale="shared")).double()


def running():
    return ScoreFunction(RunningAverage())


def neural():
    torch.manual_seed(5)
    return ScoreFunction(NeuralBaseline(2, TANH).double())


ANY_DISCRETE = {
    "running average": running,
    "running average, 3 draws": lambda: ScoreFunction(RunningAverage(), num_particles=3),
    "neural": neural,
    "leave-one-out 2": lambda: LeaveOneOut(2),
    "leave-one-out 4": lambda: LeaveOneOut(4),
    "VIMCO 2": lambda: VIMCO(2),
    "VIMCO 3": lambda: VIMCO(3),
}
OF_BERNOULLI = ANY_DISCRETE | {"DisARM 2": lambda: DisARM(2), "DisARM 4": lambda: DisARM(4)}
OF_ELBO = {name: make for name, make in OF_BERNOULLI.items() if "VIMCO" not in name}
CASES = [("bernoulli", name) for name in OF_BERNOULLI] + [("one-hot", name) for name in ANY_DISCRETE]


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def gradient(elbo, model, guide, data, parameters):
    """Minus the estimated gradient of the loss, per datum."""
    loss = elbo.differentiable_loss(model, guide, data)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return -flat(z if g is None else g for g, z in zip(found, zeros, strict=True)) / len(data)


def assert_mean(estimates, expected, calls=CALLS):
    """Of all numbers at once; what float64 rounds is no deviation."""
    assert len(estimates) == calls
    error = estimates.std(0) / calls**0.5
    assert ((estimates.mean(0) - expected).abs() < SCORES * error + 1e-9).all()


def assert_unbiased(elbo, model, guide, expected, parameters, copies=100):
    """Each call sees every datum many times, each with draws of its own."""
    data = X.repeat(copies, 1)
    assert_mean(torch.stack([gradient(elbo, model, guide, data, parameters) for _ in range(CALLS)]), expected)


def by_states(vae, x, num_draws=1):
    """log p(x, z) - log q(z | x), and log q, of every combination of K states: each ``(combinations, K, N)``."""
    states = vae.prior().enumerate_support()[:, None]
    log_q = vae.encode(x).log_prob(states)
    f = vae.prior().log_prob(states) + vae.decode(states).log_prob(x) - log_q
    chosen = torch.tensor(list(itertools.product(range(len(states)), repeat=num_draws)))
    return f[chosen], log_q[chosen]


def exact_bound(vae, x, num_draws):
    """The expectation of the K-sample bound, ``(N,)``."""
    f, log_q = by_states(vae, x, num_draws)
    return (log_q.sum(1).exp() * (f.logsumexp(1) - math.log(num_draws))).sum(0)


# --- Right on average ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_estimator_has_the_mean_of_its_own_target(kind, name):
    vae, elbo = vae_of(kind), OF_BERNOULLI[name]()
    draws = elbo.num_particles if isinstance(elbo, VIMCO) else 1
    target = exact_gradient(vae.model, vae.guide, X, num_draws=draws)
    parameters = dict(vae.named_parameters())
    assert target.keys() == parameters.keys()
    assert all(value.abs().max() > 1e-3 for value in target.values())
    assert_unbiased(elbo, vae.model, vae.guide, flat(target.values()), list(parameters.values()))


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("name", [name for name in OF_ELBO if "draws" not in name])
def test_a_weighted_kl_is_weighted(name, beta):
    vae = vae_of("bernoulli")
    states = vae.prior().enumerate_support()[:, None]
    log_q, log_p = vae.encode(X).log_prob(states), vae.prior().log_prob(states)
    kl = (log_q.exp() * (log_q - log_p)).sum(0)
    target = ((log_q.exp() * vae.decode(states).log_prob(X)).sum(0) - beta * kl).mean()
    parameters = list(vae.parameters())
    expected = flat(torch.autograd.grad(target, parameters))
    model, guide = WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide)
    assert_unbiased(OF_ELBO[name](), model, guide, expected, parameters)


# --- The bound that is reported --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_minus_the_bound_of_its_draws(kind, name):
    vae, elbo, traces = vae_of(kind), OF_BERNOULLI[name](), []
    loss = elbo.loss(vae.model, recorded(vae.guide, traces), X)
    z = latent_sites(traces[0])["z"]["value"]
    f = vae.prior().log_prob(z) + vae.decode(z).log_prob(X) - vae.encode(X).log_prob(z)
    f = f.reshape(elbo.num_particles, len(X)).detach()
    bound = f.logsumexp(0) - math.log(len(f)) if isinstance(elbo, VIMCO) else f.mean(0)
    assert loss == pytest.approx(-bound.sum().item(), rel=1e-12)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_loss_and_gradients_are_one_however_they_are_asked_for(kind, name):
    vae = vae_of(kind)
    parameters = list(vae.parameters())
    pyro.set_rng_seed(3)
    value = OF_BERNOULLI[name]().loss(vae.model, vae.guide, X)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    loss = OF_BERNOULLI[name]().differentiable_loss(vae.model, vae.guide, X)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    assert OF_BERNOULLI[name]().loss_and_grads(vae.model, vae.guide, X) == pytest.approx(value, rel=1e-12)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_the_bound_of_vimco_grows_with_its_draws_and_stays_below_the_truth(kind):
    vae, copies = vae_of(kind), 500
    with torch.no_grad():
        bounds = [pv.exact.elbo(vae.model, vae.guide, X)] + [exact_bound(vae, X, count) for count in (2, 3, 4)]
    bounds.append(pv.exact.log_evidence(vae.model, X))
    for lower, higher in itertools.pairwise(bounds):
        assert (higher - lower > 1e-4).all()
    for count, expected in zip((2, 3, 4), bounds[1:], strict=False):
        told = [-VIMCO(count).loss(vae.model, vae.guide, X.repeat(copies, 1)) / copies for _ in range(50)]
        assert_mean(torch.tensor(told)[:, None].double(), expected.sum(), calls=50)


# --- Mini-batches ----------------------------------------------------------------------------------------------------


class Given(poutine.messenger.Messenger):
    """These draws of z, ``(K, B, 3)``, in the place of an estimator's own."""

    def __init__(self, draws):
        super().__init__()
        self.value = draws if len(draws) > 1 else draws[0]

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["value"], msg["done"] = self.value, True


def sliced(elbo, vae, table, rows, parameters):
    model, guide = (poutine.scale(function, scale=len(X) / len(rows)) for function in (vae.model, vae.guide))
    return both(elbo, model, guide, X[rows], table[:, rows], parameters)


def subsampled(elbo, vae, table, rows, parameters):
    with SubsampleRows("data", rows):
        return both(elbo, vae.model, vae.guide, X, table[:, rows], parameters)


def both(elbo, model, guide, data, draws, parameters):
    with Given(draws):
        loss = elbo.differentiable_loss(model, guide, data)
    return torch.cat([loss.detach()[None], flat(torch.autograd.grad(loss, parameters))])


@pytest.mark.parametrize("take", [sliced, subsampled])
@pytest.mark.parametrize("name", OF_BERNOULLI)
def test_batches_have_on_average_the_loss_and_gradient_of_all_data(name, take):
    """With each datum's draws held fixed, exactly: N/B is outside of everything, of VIMCO's logarithm too."""
    vae = vae_of("bernoulli")
    table = vae.encode(X).sample([OF_BERNOULLI[name]().num_particles])

    def run(rows):
        pyro.clear_param_store()
        return take(OF_BERNOULLI[name](), vae, table, torch.tensor(rows), list(vae.parameters()))

    for size in (1, 2, 3):
        batches = [run(rows) for rows in itertools.combinations(range(4), size)]
        torch.testing.assert_close(torch.stack(batches).mean(0), run(range(4)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["neural", "leave-one-out 2", "DisARM 2", "VIMCO 2"])
def test_batches_are_unbiased_with_draws_of_their_own(name):
    vae, elbo, copies = vae_of("bernoulli"), OF_BERNOULLI[name](), 60
    data, parameters = X.repeat(copies, 1), list(vae.parameters())
    draws = elbo.num_particles if isinstance(elbo, VIMCO) else 1
    expected = flat(exact_gradient(vae.model, vae.guide, X, num_draws=draws).values())
    estimates = []
    for _ in range(CALLS):
        with SubsampleRows("data", torch.randperm(len(data))[: len(data) // 2]):
            estimates.append(gradient(elbo, vae.model, vae.guide, data, parameters))
    assert_mean(torch.stack(estimates), expected)


def test_a_baseline_learns_from_a_datum_as_much_in_a_batch_as_among_all():
    vae = vae_of("bernoulli")
    found = []
    for rows in (torch.arange(4), torch.tensor([0]), torch.tensor([1]), torch.tensor([2]), torch.tensor([3])):
        pyro.clear_param_store()
        elbo = neural()
        with SubsampleRows("data", rows), Given(torch.tensor([1.0, 0.0, 1.0]).double().expand(1, len(rows), 3)):
            found.append(gradient(elbo, vae.model, vae.guide, X, list(elbo.baseline.parameters())))
    torch.testing.assert_close(torch.stack(found[1:]).sum(0), found[0], rtol=1e-10, atol=1e-12)


# --- A Gaussian beside a Bernoulli -----------------------------------------------------------------------------------

Y = X[:, 0]
NODES, WEIGHTS = (torch.from_numpy(values).double() for values in np.polynomial.hermite_e.hermegauss(24))
LOG_WEIGHTS = (WEIGHTS / WEIGHTS.sum()).log()


def mixed_parameters():
    values = {"p": -0.4, "slope": 0.8, "lift": 1.1, "q0": 0.3, "q1": 0.7, "m0": 0.2, "m1": 0.5, "m2": -0.6, "s": -0.5}
    return {name: torch.tensor(value).double().requires_grad_() for name, value in values.items()}


def log_joint(v, b, g, y):
    """b ~ Bernoulli, g ~ N(b / 2, 1), y ~ N(a tanh of both, 0.8^2)."""
    prior = b * v["p"] - softplus(v["p"]) + dist.Normal(b / 2, 1.0).log_prob(g)
    return prior + dist.Normal(v["slope"] * torch.tanh(g) + v["lift"] * b * g, 0.8).log_prob(y)


def mixed_pair(v, gaussian_first):
    def model(y):
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Bernoulli(logits=v["p"]))
            g = pyro.sample("g", dist.Normal(b / 2, 1.0))
            pyro.sample("y", dist.Normal(v["slope"] * torch.tanh(g) + v["lift"] * b * g, 0.8), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            if gaussian_first:
                g = pyro.sample("g", dist.Normal(v["m0"] + v["m1"] * y, v["s"].exp()))
                pyro.sample("b", dist.Bernoulli(logits=v["q0"] + v["q1"] * y + v["m2"] * g))
            else:
                b = pyro.sample("b", dist.Bernoulli(logits=v["q0"] + v["q1"] * y))
                pyro.sample("g", dist.Normal(v["m0"] + v["m1"] * y + v["m2"] * b, v["s"].exp()))

    return model, guide


def mixed_bound(v, gaussian_first, num_draws):
    """Enumeration times quadrature over the noise of g, with weights and places that follow the parameters."""
    b, noise = torch.tensor([0.0, 1.0]).double().repeat(24)[:, None], NODES.repeat_interleave(2)[:, None]
    g = v["m0"] + v["m1"] * Y + noise * v["s"].exp() + (0 if gaussian_first else v["m2"] * b)
    logits = (v["q0"] + v["q1"] * Y + (v["m2"] * g if gaussian_first else 0)).expand(48, len(Y))
    log_mass = b * logits - softplus(logits)
    log_g = -0.5 * noise**2 - v["s"] - 0.5 * math.log(2 * math.pi)
    f = log_joint(v, b, g, Y) - log_mass - log_g
    log_weight = log_mass + LOG_WEIGHTS.repeat_interleave(2)[:, None]
    chosen = torch.cartesian_prod(*[torch.arange(48)] * num_draws).reshape(-1, num_draws)
    bound = f[chosen].logsumexp(1) - math.log(num_draws)
    return (log_weight[chosen].sum(1).exp() * bound).sum() / len(Y)


@pytest.mark.parametrize("gaussian_first", [False, True], ids=["Bernoulli first", "Gaussian first"])
@pytest.mark.parametrize("name", ["running average", "leave-one-out 2", "leave-one-out 4", "VIMCO 2"])
def test_a_gaussian_and_a_bernoulli_have_pathwise_and_score_gradients(name, gaussian_first):
    v, elbo = mixed_parameters(), ANY_DISCRETE[name]()
    parameters = list(v.values())
    draws = 2 if "VIMCO" in name else 1
    expected = flat(torch.autograd.grad(mixed_bound(v, gaussian_first, draws), parameters))
    assert (expected.abs() > 1e-3).all()
    data = Y.repeat(100)
    pair = mixed_pair(v, gaussian_first)
    assert_mean(torch.stack([gradient(elbo, *pair, data, parameters) for _ in range(CALLS)]), expected)


def test_of_gaussians_alone_there_is_no_score():
    """The estimator is then Pyro's pathwise one."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    loc = torch.tensor(0.3).double().requires_grad_()

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc * y, 0.7))

    found = []
    for elbo in (LeaveOneOut(2), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)):
        pyro.set_rng_seed(0)
        found.append(gradient(elbo, model, guide, Y, [loc]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_disarm_refuses_a_gaussian_and_names_it():
    model, guide = mixed_pair(mixed_parameters(), gaussian_first=False)
    with pytest.raises(ValueError, match=r"`DisARM` must be Bernoullis.*site 'g' of the guide is a Normal"):
        DisARM().loss(model, guide, Y)


# --- Antithetic pairs ------------------------------------------------------------------------------------------------

ALPHA = torch.tensor([-1.5, 0.0, 0.8]).double()
ROWS = 40_000


def wide_pair(alpha, shift=0.0):
    """Each row has logits of its own: its gradient there is an estimate of its own."""
    weight = torch.tensor([1.0, -0.7, 0.5]).double()

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.5]).double()).to_event(1))
            pyro.sample("y", dist.Normal((z * weight).sum(-1) + z[..., 0] * z[..., 2], 0.7), obs=y)
            pyro.factor("shift", torch.as_tensor(shift).double().expand(len(y)))

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=alpha).to_event(1))

    return model, guide


def f_of(z, y, alpha):
    model, _ = wide_pair(alpha)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(y)
    log_joint = sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in ("z", "y"))
    return (log_joint - dist.Bernoulli(logits=alpha).log_prob(z).sum(-1)).detach()


def row_gradients(elbo, shift=0.0, seed=0):
    """Estimates of the gradient in the logits, ``(rows, 3)``."""
    alpha = ALPHA.expand(ROWS, 3).clone().requires_grad_()
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(*wide_pair(alpha, shift), torch.full((ROWS,), 0.9).double())
    return -torch.autograd.grad(loss, [alpha])[0]


def row_target():
    alpha = ALPHA.clone().requires_grad_()
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    weight = dist.Bernoulli(logits=alpha).log_prob(states).sum(-1).exp()
    # The gradient of log q in f has the mean zero.
    return torch.autograd.grad((weight * f_of(states, torch.full((8,), 0.9).double(), alpha)).sum(), [alpha])[0]


@pytest.mark.parametrize("name", OF_ELBO)
def test_each_row_has_an_unbiased_gradient_of_its_own(name):
    elbo = OF_ELBO[name]() if name != "neural" else ScoreFunction(NeuralBaseline(1, TANH).double())
    assert_mean(row_gradients(elbo), row_target(), calls=ROWS)


@pytest.mark.parametrize("count", [2, 4])
def test_each_half_of_disarms_draws_is_the_guides_and_they_are_antithetic(count):
    traces = []
    alpha = ALPHA.expand(ROWS, 3)
    model, guide = wide_pair(alpha)
    DisARM(count).loss(model, recorded(guide, traces), torch.zeros(ROWS).double())
    z = latent_sites(traces[0])["z"]["value"]
    assert z.shape == (count, ROWS, 3)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    first, second = z[: count // 2], z[count // 2 :]
    probs = ALPHA.sigmoid()
    for half in (first, second):
        assert_mean(half.reshape(-1, 3), probs, calls=ROWS * count // 2)
    # As negatively correlated as two such variables can be: both 1 with probability max(0, 2p - 1), both 0 likewise.
    assert_mean((first * second).reshape(-1, 3), (2 * probs - 1).clamp(min=0), calls=ROWS * count // 2)
    assert_mean(((1 - first) * (1 - second)).reshape(-1, 3), (1 - 2 * probs).clamp(min=0), calls=ROWS * count // 2)
    assert torch.equal(second[..., 1], 1 - first[..., 1])
    # Variables are independent of each other, within a draw and across the pair.
    for left, right in ((first, first), (first, second)):
        product = left[..., 0] * right[..., 2]
        assert_mean(product.reshape(-1, 1), probs[0] * probs[2], calls=ROWS * count // 2)


def test_disarm_has_the_variance_of_arm_at_most():
    """ARM by hand, from the same pairs: (f(1[u > 1 - p]) - f(1[u < p])) (u - 1/2)."""
    u = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(2)).double()
    y = torch.full((ROWS,), 0.9).double()
    first, second = ((u > 1 - ALPHA.sigmoid()).double(), (u < ALPHA.sigmoid()).double())
    arm = (f_of(first, y, ALPHA) - f_of(second, y, ALPHA))[:, None] * (u - 0.5)
    assert_mean(arm, row_target(), calls=ROWS)
    disarm = row_gradients(DisARM(2))
    for one, other in zip(disarm.T, arm.T, strict=True):
        squares = (one - one.mean()) ** 2, (other - other.mean()) ** 2
        error = math.sqrt(sum(float(square.var()) / ROWS for square in squares))
        assert squares[1].mean() - squares[0].mean() > SCORES * error


def test_a_pair_more_halves_the_variance():
    for make in (DisARM, LeaveOneOut):
        few, many = (row_gradients(make(count)).var(0) for count in (2, 4))
        # A factor of 2 for independent pairs; all pairs among four independent draws do better still.
        assert (many < few / 2 * 1.1).all()
    # The variance of 40,000 numbers with light tails is known to 2 %.
    ratio = row_gradients(DisARM(2)).var(0) / row_gradients(DisARM(4)).var(0)
    torch.testing.assert_close(ratio, torch.full((3,), 2.0).double(), rtol=0.1, atol=0)


def chain(dependent):
    """Two Bernoulli sites, the second one's logits from the first in the guide if they are ``dependent``."""
    v = {name: torch.tensor(0.5).double().requires_grad_() for name in ("a", "b", "c")}

    def model(y):
        with pyro.plate("data", len(y)):
            first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.4).double()))
            second = pyro.sample("second", dist.Bernoulli(0.2 + 0.5 * first))
            pyro.sample("y", dist.Normal(first - 2 * second, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            first = pyro.sample("first", dist.Bernoulli(logits=v["a"] + 0 * y))
            pyro.sample("second", dist.Bernoulli(logits=v["b"] * y + (2 * v["c"] * first if dependent else v["c"])))

    return v, model, guide


def test_disarm_of_two_independent_sites_is_unbiased():
    v, model, guide = chain(dependent=False)
    expected = enumerated_chain(v, dependent=False)
    data = Y.repeat(100)
    found = torch.stack([gradient(DisARM(), model, guide, data, list(v.values())) for _ in range(CALLS)])
    assert_mean(found, expected)


def enumerated_chain(v, dependent):
    total = torch.zeros(()).double()
    for first, second in itertools.product((0.0, 1.0), repeat=2):
        one, two = torch.tensor(first).double(), torch.tensor(second).double()
        logits = v["b"] * Y + (2 * v["c"] * one if dependent else v["c"])
        log_q = dist.Bernoulli(logits=v["a"]).log_prob(one) + dist.Bernoulli(logits=logits).log_prob(two)
        log_p = dist.Bernoulli(torch.tensor(0.4).double()).log_prob(one)
        log_p = log_p + dist.Bernoulli(0.2 + 0.5 * one).log_prob(two) + dist.Normal(one - 2 * two, 1.0).log_prob(Y)
        total = total + (log_q.exp() * (log_p - log_q)).mean()
    return flat(torch.autograd.grad(total, list(v.values())))


@pytest.mark.parametrize("name", ["running average", "leave-one-out 4"])
def test_a_chain_of_sites_is_unbiased(name):
    v, model, guide = chain(dependent=True)
    elbo, data = ANY_DISCRETE[name](), Y.repeat(100)
    found = torch.stack([gradient(elbo, model, guide, data, list(v.values())) for _ in range(CALLS)])
    assert_mean(found, enumerated_chain(v, dependent=True))


def test_disarm_of_a_chain_of_sites_is_refused():
    """The two of a pair have different probabilities there, and the formula is that of equal ones."""
    _, model, guide = chain(dependent=True)
    with pytest.raises(ValueError, match=r"DisARM: site 'second' of the guide depends on other latents"):
        DisARM().loss(model, guide, Y)


# --- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
def test_where_f_is_constant_leave_one_out_hears_nothing(count):
    """The guide is the posterior of a model whose data tell nothing."""
    logits = torch.tensor([0.3, -1.0]).double().requires_grad_()

    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=logits.detach()).to_event(1))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    assert gradient(LeaveOneOut(count), model, guide, Y, [logits]).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["leave-one-out 2", "leave-one-out 4", "DisARM 2", "DisARM 4", "VIMCO 2", "VIMCO 3"])
def test_a_constant_in_the_likelihood_changes_no_gradient(name):
    plain, shifted = (row_gradients(OF_BERNOULLI[name](), shift) for shift in (0.0, 50.0))
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-11)


def test_a_baseline_makes_it_quieter():
    """Far from zero, the plain score function is loud; a baseline that is there takes that off."""
    shift = 10.0
    loud = row_gradients(ScoreFunction(RunningAverage()), shift).var(0)
    elbo = ScoreFunction(RunningAverage().double())
    row_gradients(elbo, shift, seed=1)
    quiet = row_gradients(elbo, shift).var(0)
    assert (quiet < loud / 5).all()


# --- Baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_a_running_average_is_the_weighted_mean_of_the_steps_before(decay):
    average, x = RunningAverage(decay).double(), torch.zeros(3, 2)
    means = []
    for step in range(6):
        weights = torch.tensor([decay ** (step - 1 - i) for i in range(step)], dtype=torch.float64)
        expected = (
            (weights * torch.tensor(means, dtype=torch.float64)).sum() / weights.sum() if step else torch.zeros(())
        )
        b = average(x)
        torch.testing.assert_close(b, expected.double(), rtol=1e-9, atol=1e-12)
        f = torch.randn(2, 3).double() + 4
        assert average.learn(f, b.expand(3)).eq(0).all()
        means.append(f.mean().item())


def test_the_score_function_uses_what_was_before_its_draws():
    """The first step has no baseline at all: it is Trace_ELBO's."""
    vae = vae_of("bernoulli")
    elbo = ScoreFunction(RunningAverage().double())
    parameters = list(vae.encoder.parameters())
    b = 0.0
    for _ in range(3):
        pyro.set_rng_seed(1)
        z = vae.encode(X).sample()
        log_q = vae.encode(X).log_prob(z)
        f = (vae.prior().log_prob(z) + vae.decode(z).log_prob(X) - log_q).detach()
        expected = flat(torch.autograd.grad(((f - b) * log_q).mean(), parameters))
        pyro.set_rng_seed(1)
        torch.testing.assert_close(gradient(elbo, vae.model, vae.guide, X, parameters), expected)
        b = f.mean()  # the draws of each step are those of the first


def test_a_neural_baseline_learns_what_can_be_learned():
    torch.manual_seed(0)
    baseline = NeuralBaseline(2, networks.mlp([16], activation=nn.Tanh)).double()
    x = torch.randn(200, 2).double()
    optimizer = torch.optim.Adam(baseline.parameters(), lr=1e-2)
    errors = []
    for _ in range(500):
        f = 5 + 3 * x[:, 0] - x[:, 1] + 0.1 * torch.randn(2, 200).double()
        loss = baseline.learn(f, baseline(x))
        assert loss.shape == (200,)
        errors.append(loss.mean().item())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert errors[20] > 5
    assert errors[-1] < 0.2


def trained_by_fit(vae, elbo, x):
    pv.fit(vae.model, vae.guide, x, epochs=100, lr=1e-2, elbo=elbo)


def trained_by_svi(vae, elbo, x):
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), elbo)
    for _ in range(100):
        svi.step(x)


def baseline_error(elbo, vae, x):
    z = vae.encode(x).sample([50])
    f = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - vae.encode(x).log_prob(z)
    return ((f - elbo.baseline(x)) ** 2).mean().item()


@pytest.mark.parametrize("train", [trained_by_fit, trained_by_svi])
def test_a_neural_baseline_is_trained_along(train):
    x = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(3)).double()
    vae, elbo = vae_of("bernoulli"), neural()
    for parameter in vae.decoder.parameters():
        parameter.requires_grad_(False)
    before = deepcopy(elbo.baseline.state_dict()), baseline_error(elbo, vae, x)
    train(vae, elbo, x)
    after = elbo.baseline.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in before[0].items())
    assert elbo.baseline.centre.steps == 100
    assert baseline_error(elbo, vae, x) < before[1] / 2
    store = pyro.get_param_store()
    assert all(store[f"{elbo.name}$$${name}"] is value for name, value in elbo.baseline.named_parameters())


def test_a_second_baseline_has_a_name_of_its_own_and_is_trained():
    vae = vae_of("bernoulli")
    trained_by_fit(vae, neural(), X)
    elbo = neural()
    before = deepcopy(list(elbo.baseline.parameters()))
    trained_by_fit(vae, elbo, X)
    assert not any(torch.equal(old, new) for old, new in zip(before, elbo.baseline.parameters(), strict=True))


def test_a_second_baseline_under_the_same_name_is_refused():
    """Pyro's store holds the first one's parameters under that name: the second would stand still unnoticed."""
    vae = vae_of("bernoulli")
    first, second = neural(), neural()
    second.name = first.name
    trained_by_fit(vae, first, X)
    with pytest.raises(ValueError, match=f"name: Pyro's param store holds other parameters under '{first.name}'"):
        trained_by_fit(vae, second, X)


@pytest.mark.parametrize("make", [lambda: RunningAverage(0.8), lambda: NeuralBaseline(2, TANH, 0.8)])
def test_a_baseline_goes_through_a_state_dict(make):
    first, x = make(), X.float()
    for _ in range(3):
        first.learn(torch.randn(2, 4) + 3, first(x).expand(4))
    second = make()
    second.load_state_dict(first.state_dict())
    assert first(x).abs().min() > 0
    assert torch.equal(first(x), second(x))
    f = torch.randn(2, 4)
    for baseline in (first, second):
        baseline.learn(f, baseline(x).expand(4))
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("ask", ["loss", "evaluate", "validation"])
def test_looking_at_a_loss_teaches_a_baseline_nothing(ask):
    vae, elbo = vae_of("bernoulli"), neural()
    if ask == "loss":
        elbo.loss(vae.model, vae.guide, X)
    elif ask == "evaluate":
        pv.evaluate(vae.model, vae.guide, X, elbo=elbo)
    else:
        pv.fit(vae.model, vae.guide, X, epochs=7, elbo=elbo, validation=X + 1)
    assert elbo.baseline.centre.steps == (7 if ask == "validation" else 0)


# --- The KL of the twins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["relaxed", "gumbel"])
def test_discrete_kl_is_relaxed_distortion_and_the_twins_rate(kind, count):
    vae, traces, elbo = vae_of(kind), [], DiscreteKL(count)
    loss = elbo.loss(vae.model, recorded(vae.guide, traces), X)
    z = latent_sites(traces[0])["z"]["value"].reshape(count, 4, *vae.prior().event_shape)
    log_likelihood = vae.decode(z).log_prob(X).mean(0)
    twin = vae.discrete()
    states = twin.prior().enumerate_support()[:, None]
    log_q = twin.encode(X).log_prob(states)
    rate = (log_q.exp() * (log_q - twin.prior().log_prob(states))).sum(0)
    assert loss == pytest.approx((rate - log_likelihood).sum().item(), rel=1e-10)


@pytest.mark.parametrize("kind", ["relaxed", "gumbel"])
def test_the_gradient_of_discrete_kl_is_of_what_it_tells(kind):
    vae = vae_of(kind)
    parameters = list(vae.parameters())
    pyro.set_rng_seed(2)
    found = gradient(DiscreteKL(), vae.model, vae.guide, X, parameters)
    pyro.set_rng_seed(2)
    z = vae.encode(X).rsample()
    twin = vae.discrete()
    states = twin.prior().enumerate_support()[:, None]
    log_q = twin.encode(X).log_prob(states)
    rate = (log_q.exp() * (log_q - twin.prior().log_prob(states))).sum(0)
    expected = flat(torch.autograd.grad((vae.decode(z).log_prob(X) - rate).mean(), parameters))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_discrete_kl_weighs_the_rate():
    vae = vae_of("relaxed")
    losses = []
    for beta in (0.0, 1.0, 3.0):
        pyro.set_rng_seed(0)
        losses.append(DiscreteKL().loss(WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide), X))
    assert losses[1] > losses[0] + 1e-3
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-9)


def test_discrete_kl_refuses_what_is_not_relaxed():
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"`DiscreteKL` must be relaxed variables.*site 'z' is a Bernoulli"):
        DiscreteKL().loss(vae.model, vae.guide, X)


@pytest.mark.parametrize("kind", ["relaxed", "gumbel"])
def test_histories_have_the_relaxed_elbo_and_not_the_mixed_one(kind):
    vae, elbo = vae_of(kind), DiscreteKL()
    history = pv.fit(vae.model, vae.guide, X, epochs=1, lr=1e-12, elbo=elbo, seed=4).history
    pyro.set_rng_seed(4)
    z = vae.encode(X).sample()
    distortion = -vae.decode(z).log_prob(X).mean().item()
    rate = (vae.encode(X).log_prob(z) - vae.prior().log_prob(z)).mean().item()
    assert history["distortion"][0] == pytest.approx(distortion, rel=1e-6)
    assert history["rate"][0] == pytest.approx(rate, rel=1e-6)
    assert history["elbo"][0] == pytest.approx(-distortion - rate, rel=1e-6)
    pyro.set_rng_seed(4)
    assert history["elbo"][0] != pytest.approx(-elbo.loss(vae.model, vae.guide, X) / 4, rel=1e-3)


@pytest.mark.parametrize("kind", ["relaxed", "gumbel"])
def test_svi_trains_with_discrete_kl(kind):
    vae = vae_of(kind)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), DiscreteKL(2))
    losses = [svi.step(X) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])


# --- Any pair, SVI and fit -------------------------------------------------------------------------------------------


def users_pair():
    """Two discrete sites and a Poisson likelihood; data are counts, ``(N,)``."""

    def model(x):
        rates = pyro.param("rates", torch.tensor([1.0, 4.0]), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            x = pyro.subsample(x, event_dim=0)
            first = pyro.sample("first", dist.Bernoulli(0.4))
            second = pyro.sample("second", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Poisson(rates[0] + rates[1] * first + 5 * second), obs=x)

    def guide(x):
        slopes = pyro.param("slopes", torch.tensor([0.1, 0.2]))
        with pyro.plate("rows", len(x)):
            x = pyro.subsample(x, event_dim=0)
            pyro.sample("first", dist.Bernoulli(logits=slopes[0] * (x - 4)))
            pyro.sample("second", dist.Bernoulli(logits=slopes[1] * (x - 4)))

    return model, guide


COUNTS = torch.tensor([0.0, 3.0, 5.0, 9.0, 12.0, 1.0])
FOR_USERS = OF_BERNOULLI | {"neural": lambda: ScoreFunction(NeuralBaseline(1, networks.linear()))}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", FOR_USERS)
def test_fit_trains_a_users_own_pair(name, batch_size):
    model, guide = users_pair()
    fitted = pv.fit(
        model, guide, COUNTS, epochs=60, lr=0.05, batch_size=batch_size, elbo=FOR_USERS[name](), plate="rows"
    )
    assert sorted(fitted.history) == ["distortion", "elbo", "rate"]
    elbo = torch.tensor(fitted.history["elbo"])
    torch.testing.assert_close(elbo, -torch.tensor(fitted.history["distortion"]) - torch.tensor(fitted.history["rate"]))
    assert elbo[-10:].mean() > elbo[:10].mean()
    assert (pyro.param("slopes") != torch.tensor([0.1, 0.2])).all()


@pytest.mark.parametrize("name", FOR_USERS)
def test_svi_trains_a_users_own_pair(name):
    model, guide = users_pair()
    svi = SVI(model, guide, Adam({"lr": 0.05}), FOR_USERS[name]())
    losses = torch.tensor([svi.step(COUNTS) for _ in range(60)])
    assert losses.isfinite().all()
    assert losses[-10:].mean() < losses[:10].mean()
    assert (pyro.param("slopes") != torch.tensor([0.1, 0.2])).all()
    assert math.isfinite(svi.evaluate_loss(COUNTS))


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [0, -1, True, 2.0, "2"])
@pytest.mark.parametrize(
    "make",
    [LeaveOneOut, VIMCO, DisARM, DiscreteKL, lambda num_particles: ScoreFunction(RunningAverage(), num_particles)],
)
def test_no_number_of_draws_is_refused(make, num_particles):
    with pytest.raises(ValueError, match=r"`num_particles` must be an.*got"):
        make(num_particles)


@pytest.mark.parametrize(
    ("make", "num_particles", "accepted"),
    [
        (LeaveOneOut, 1, "an integer, 2 or more"),
        (VIMCO, 1, "an integer, 2 or more"),
        (DisARM, 1, "an even number, 2 or more"),
        (DisARM, 3, "an even number, 2 or more"),
    ],
)
def test_too_few_draws_are_refused(make, num_particles, accepted):
    with pytest.raises(ValueError, match=rf"`num_particles` must be {accepted}.*got {num_particles}"):
        make(num_particles)


@pytest.mark.parametrize("baseline", [None, 0.5, nn.Linear(2, 1), RunningAverage])
def test_a_wrong_baseline_is_refused(baseline):
    with pytest.raises(TypeError, match=r"`baseline` must be a module such as baselines.RunningAverage\(\).*got"):
        ScoreFunction(baseline)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(ValueError, match=r"`decay` must be a number from 0 to below 1.*got"):
        RunningAverage(decay)


@pytest.mark.parametrize("name", OF_BERNOULLI)
def test_a_site_outside_the_plate_is_refused_and_named(name):
    def model(x):
        weather = pyro.sample("weather", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z + weather, 1.0), obs=x)

    def guide(x):
        pyro.sample("weather", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"site 'weather' is in the plates \[\]; accepted is one data plate"):
        OF_BERNOULLI[name]().loss(model, guide, Y.float())


def test_a_site_in_another_plate_is_refused():
    """One class for all data, in a plate of its own, would count once for each datum."""

    def model(x):
        with pyro.plate("one", 1):
            shared = pyro.sample("shared", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shared, 1.0), obs=x)

    def guide(x):
        with pyro.plate("one", 1):
            pyro.sample("shared", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"site 'shared' is in the plates"):
        LeaveOneOut(2).loss(model, guide, Y.float())


def test_nested_plates_are_refused():
    def model(x):
        with pyro.plate("columns", 2, dim=-2), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    def guide(x):
        with pyro.plate("columns", 2, dim=-2), pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    for elbo in (running(), LeaveOneOut(2)):
        with pytest.raises(ValueError, match=r"`^\w+` must be one data plate around all sites"):
            elbo.loss(model, guide, Y.float())


@pytest.mark.parametrize("name", OF_BERNOULLI)
def test_a_guide_of_other_latents_is_refused(name):
    vae = vae_of("bernoulli")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("other", dist.Bernoulli(torch.full((3,), 0.5).double()).to_event(1))

    with pytest.raises(ValueError, match=r"latents"):
        pv.fit(vae.model, guide, X, epochs=1, elbo=OF_BERNOULLI[name]())
    accepted = (
        r"the model's latents are \['z'\], those of the guide \['other'\]; accepted is a guide of the same latents"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro's, of the same
        with pytest.raises(ValueError, match=accepted):
            OF_BERNOULLI[name]().loss(vae.model, guide, X)


# --- Masks, scales and graphs that a user may bring ------------------------------------------------------------------

MASK = torch.tensor([True, True, False, True])


def masked_target(vae):
    """The gradient of the ELBO in which a masked datum has a likelihood, and no rate."""
    states = vae.prior().enumerate_support()[:, None]
    log_q, log_p = vae.encode(X).log_prob(states), vae.prior().log_prob(states)
    rate = torch.where(MASK, log_q - log_p, 0.0)
    return (log_q.exp() * (vae.decode(states).log_prob(X) - rate)).sum(0).mean()


class MaskLatents(poutine.messenger.Messenger):
    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["mask"] = MASK.repeat(msg["cond_indep_stack"][0].size // 4)


@pytest.mark.parametrize("name", [name for name in OF_ELBO if "draws" not in name])
def test_a_masked_latent_that_the_likelihood_reads_keeps_its_score(name):
    vae = vae_of("bernoulli")
    parameters = list(vae.parameters())
    expected = flat(torch.autograd.grad(masked_target(vae), parameters))
    assert_unbiased(OF_ELBO[name](), MaskLatents()(vae.model), MaskLatents()(vae.guide), expected, parameters)


@pytest.mark.parametrize("kind", ["relaxed", "gumbel"])
@pytest.mark.parametrize("make", [DiscreteKL, lambda: FreeBits(1e-6)], ids=["DiscreteKL", "FreeBits"])
def test_a_mask_takes_a_datum_out_of_the_rate(kind, make):
    vae = vae_of(kind)
    pyro.set_rng_seed(1)
    whole = make().loss(poutine.mask(vae.model, mask=MASK), poutine.mask(vae.guide, mask=MASK), X)
    pyro.set_rng_seed(1)
    z = poutine.trace(vae.guide).get_trace(X).nodes["z"]["value"]
    likelihood = vae.decode(z).log_prob(X)[MASK].sum()
    if make is DiscreteKL:
        twin = vae.discrete()
        q, p = twin.encode(X[MASK]).base_dist, twin.prior().base_dist
        rate = torch.distributions.kl_divergence(q, p).sum()
        assert whole == pytest.approx(float((rate - likelihood).detach()), rel=1e-6)
    assert math.isfinite(whole)


def test_a_masked_distribution_is_refused_where_its_rate_is_in_closed_form():
    vae = vae_of("relaxed")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encode(x).mask(MASK))

    with pytest.raises(ValueError, match=r"site 'z' is a masked distribution; accepted is poutine\.mask"):
        DiscreteKL().loss(vae.model, guide, X)


@pytest.mark.parametrize("order", [1, -1])
def test_bounds_of_several_draws_refuse_observed_sites_of_different_weight(order):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4).double()))
            for name, scale in (("a", 0.1), ("b", 1.0))[::order]:
                with poutine.scale(scale=scale):
                    pyro.sample(name, dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x))

    with pytest.raises(ValueError, match=r"`VIMCO` must be one scale for all.*observed sites have the scales"):
        VIMCO(4).loss(model, guide, X[:, 0])
    assert math.isfinite(LeaveOneOut(4).loss(model, guide, X[:, 0]))


class Wrong(RunningAverage):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x):
        return torch.zeros(2, len(x)) if self.method == "forward" else super().forward(x)

    def learn(self, f, b):
        return (f - b) ** 2 if self.method == "learn" else super().learn(f, b)


@pytest.mark.parametrize("method", ["forward", "learn"])
def test_a_baseline_of_another_shape_is_refused(method):
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=rf"`baseline` must be \(4,\).*its {method} gives shape \(2, 4\)"):
        ScoreFunction(Wrong(method), num_particles=2).loss_and_grads(vae.model, vae.guide, X)


def test_a_network_in_float32_is_a_baseline_of_float64_data_and_one_of_other_features_is_refused():
    vae = vae_of("bernoulli")
    assert math.isfinite(ScoreFunction(NeuralBaseline(2, TANH)).loss_and_grads(vae.model, vae.guide, X))
    with pytest.raises(ValueError, match="baseline: its network takes 3 features, and a datum has 2 in the first"):
        ScoreFunction(NeuralBaseline(3, TANH)).loss_and_grads(vae.model, vae.guide, X)


def test_disarm_refuses_a_chain_whose_weight_is_still_zero():
    weight = torch.zeros((), requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=x))
            pyro.sample("b", dist.Bernoulli(logits=x + weight * a))

    with pytest.raises(ValueError, match="site 'b' of the guide depends on other latents"):
        DisARM().loss_and_grads(model, guide, X[:, 0].float())


def test_disarm_refuses_spins_and_names_them():
    spin = torch.distributions.AffineTransform(-1.0, 2.0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Bernoulli(logits=x), [spin]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.TransformedDistribution(dist.Bernoulli(torch.tensor(0.5)), [spin]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'z' of the guide is a TransformedDistribution; accepted are Bernoullis"):
        DisARM().loss(model, guide, X[:, 0].float())


def test_a_model_without_data_is_refused():
    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="LeaveOneOut: the model has no observed sites to learn from"):
        LeaveOneOut(2).loss(prior, prior, X)
