"""Score-function estimators against enumeration: their gradients are unbiased, and their bounds are bounds."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import (
    ANY_DISCRETE,
    DISCRETE_CASES,
    FOR_BERNOULLI,
    OF_ELBO,
    SCORES,
    TANH,
    X,
    assert_mean,
    enumerated,
    flat,
    gradient,
    gradients,
    vae_of,
)
from pairs import guide_of, model_of
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae import networks
from pyro_vae._utils.traces import latent_sites
from pyro_vae.diagnostics.gradients import exact_gradient
from pyro_vae.handlers import WeightKL
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction
from pyro_vae.training.elbo_evaluator import ElboEvaluator

Y = X[:, 0]
DATA = X.repeat(100, 1)
COUNTS = torch.tensor([0.0, 3.0, 5.0, 9.0, 12.0, 1.0])
FOR_USERS = FOR_BERNOULLI | {"neural": lambda: ScoreFunction(NeuralBaseline(1, networks.linear()))}
ALPHA = torch.tensor([-1.5, 0.0, 0.8]).double()
ROWS = 40_000
NODES, WEIGHTS = (torch.from_numpy(values).double() for values in np.polynomial.hermite_e.hermegauss(24))
LOG_WEIGHTS = (WEIGHTS / WEIGHTS.sum()).log()


@pytest.mark.parametrize(("kind", "name"), DISCRETE_CASES)
def test_the_gradient_of_every_estimator_is_unbiased(kind, name):
    vae, elbo = vae_of(kind), FOR_BERNOULLI[name]()
    target = exact_gradient(vae.model, vae.guide, X, num_draws=elbo.bound_draws)
    parameters = dict(vae.named_parameters())
    assert target.keys() == parameters.keys()
    assert all(value.abs().max() > 1e-3 for value in target.values())
    assert_mean(gradients(elbo, vae.model, vae.guide, DATA, list(parameters.values())), flat(target.values()))


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("name", [name for name in OF_ELBO if "draws" not in name])
def test_a_weighted_kl_is_weighted(name, beta):
    vae = vae_of("bernoulli")
    parameters = list(vae.parameters())
    log_q, log_p, log_likelihood = enumerated(vae)
    target = (log_q.exp() * (log_likelihood - beta * (log_q - log_p))).sum(0).mean()
    expected = flat(torch.autograd.grad(target, parameters))
    model, guide = WeightKL(beta)(vae.model), WeightKL(beta)(vae.guide)
    assert_mean(gradients(OF_ELBO[name](), model, guide, DATA, parameters), expected)


def exact_bound(vae, num_draws):
    """The expectation of the K-sample bound, ``(N,)``, over all combinations of K states."""
    log_q, log_p, log_likelihood = enumerated(vae)
    f = log_p + log_likelihood - log_q
    index = torch.tensor(list(itertools.product(range(len(f)), repeat=num_draws)))
    return (log_q[index].sum(1).exp() * (f[index].logsumexp(1) - math.log(num_draws))).sum(0)


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_the_bound_of_vimco_grows_with_its_draws_and_stays_below_the_truth(kind):
    vae, copies = vae_of(kind), 500
    with torch.no_grad():
        bounds = [pv.exact.elbo(vae.model, vae.guide, X)] + [exact_bound(vae, count) for count in (2, 3, 4)]
    bounds.append(pv.exact.log_evidence(vae.model, X))
    for lower, higher in itertools.pairwise(bounds):
        assert (higher - lower > 1e-4).all()
    for count, expected in zip((2, 3, 4), bounds[1:], strict=False):
        losses = [VIMCO(count).loss(vae.model, vae.guide, X.repeat(copies, 1)) for _ in range(50)]
        assert_mean(-torch.tensor(losses)[:, None].double() / copies, expected.sum(), calls=50)


def mixed_parameters():
    values = {"p": -0.4, "slope": 0.8, "lift": 1.1, "q0": 0.3, "q1": 0.7, "m0": 0.2, "m1": 0.5, "m2": -0.6, "s": -0.5}
    return {name: torch.tensor(value).double().requires_grad_() for name, value in values.items()}


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
    """Enumeration and quadrature over the noise of g. Weights and nodes depend on the parameters."""
    b, noise = torch.tensor([0.0, 1.0]).double().repeat(24)[:, None], NODES.repeat_interleave(2)[:, None]
    g = v["m0"] + v["m1"] * Y + noise * v["s"].exp() + (0 if gaussian_first else v["m2"] * b)
    logits = (v["q0"] + v["q1"] * Y + (v["m2"] * g if gaussian_first else 0)).expand(48, len(Y))
    log_mass = b * logits - softplus(logits)
    log_g = -0.5 * noise**2 - v["s"] - 0.5 * math.log(2 * math.pi)
    log_prior = b * v["p"] - softplus(v["p"]) + dist.Normal(b / 2, 1.0).log_prob(g)
    f = log_prior + dist.Normal(v["slope"] * torch.tanh(g) + v["lift"] * b * g, 0.8).log_prob(Y) - log_mass - log_g
    log_weight = log_mass + LOG_WEIGHTS.repeat_interleave(2)[:, None]
    index = torch.cartesian_prod(*[torch.arange(48)] * num_draws).reshape(-1, num_draws)
    bound = f[index].logsumexp(1) - math.log(num_draws)
    return (log_weight[index].sum(1).exp() * bound).sum() / len(Y)


@pytest.mark.parametrize("gaussian_first", [False, True], ids=["Bernoulli first", "Gaussian first"])
@pytest.mark.parametrize("name", ["running average", "leave-one-out 2", "leave-one-out 4", "VIMCO 2"])
def test_a_gaussian_and_a_bernoulli_have_pathwise_and_score_gradients(name, gaussian_first):
    v, elbo = mixed_parameters(), ANY_DISCRETE[name]()
    parameters = list(v.values())
    draws = 2 if "VIMCO" in name else 1
    expected = flat(torch.autograd.grad(mixed_bound(v, gaussian_first, draws), parameters))
    assert (expected.abs() > 1e-3).all()
    assert_mean(gradients(elbo, *mixed_pair(v, gaussian_first), Y.repeat(100), parameters), expected)


def test_gaussian_latents_have_pyros_pathwise_gradient_and_no_score():
    model = model_of(dist.Normal(torch.zeros(()).double(), 1.0), lambda z: dist.Normal(z, 1.0))
    loc = torch.tensor(0.3).double().requires_grad_()
    guide, found = guide_of(lambda y: dist.Normal(loc * y, 0.7)), []
    for elbo in (LeaveOneOut(2), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)):
        pyro.set_rng_seed(0)
        found.append(gradient(elbo, model, guide, Y, [loc]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def wide_pair(alpha, shift=0.0):
    """A pair where each row has its own logits, so that each row gives one estimate of the gradient."""
    weight = torch.tensor([1.0, -0.7, 0.5]).double()

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.5]).double()).to_event(1))
            pyro.sample("y", dist.Normal((z * weight).sum(-1) + z[..., 0] * z[..., 2], 0.7), obs=y)
            pyro.factor("shift", torch.as_tensor(shift).double().expand(len(y)))

    return model, guide_of(lambda y: dist.Bernoulli(logits=alpha).to_event(1))


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
    # The gradient of log q in f has mean zero.
    return torch.autograd.grad((weight * f_of(states, torch.full((8,), 0.9).double(), alpha)).sum(), [alpha])[0]


@pytest.mark.parametrize("name", OF_ELBO)
def test_the_gradients_of_rows_are_unbiased(name):
    elbo = OF_ELBO[name]() if name != "neural" else ScoreFunction(NeuralBaseline(1, TANH).double())
    assert_mean(row_gradients(elbo), row_target(), calls=ROWS)


@pytest.mark.parametrize("count", [2, 4])
def test_both_halves_of_the_draws_of_disarm_follow_the_guide_and_are_antithetic(count):
    model, guide = wide_pair(ALPHA.expand(ROWS, 3))
    evaluator = ElboEvaluator(model, guide, DisARM(count))
    evaluator.loss(torch.zeros(ROWS).double())
    z = latent_sites(evaluator.traces[0][1])["z"]["value"]
    assert (z.shape, set(z.unique().tolist())) == ((count, ROWS, 3), {0.0, 1.0})
    first, second = z.reshape(2, -1, 3)
    probs, calls = ALPHA.sigmoid(), ROWS * count // 2
    assert_mean(first, probs, calls)
    assert_mean(second, probs, calls)
    # The correlation is as negative as possible: both are 1 with probability max(0, 2p - 1), similarly for 0.
    assert_mean(first * second, (2 * probs - 1).clamp(min=0), calls)
    assert_mean((1 - first) * (1 - second), (1 - 2 * probs).clamp(min=0), calls)
    assert torch.equal(second[:, 1], 1 - first[:, 1])
    # Variables are independent of each other, within a draw and across the pair.
    assert_mean(first[:, :1] * first[:, 2:], probs[:1] * probs[2:], calls)
    assert_mean(first[:, :1] * second[:, 2:], probs[:1] * probs[2:], calls)


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


def test_twice_as_many_pairs_halve_the_variance():
    # The factor is 2 for independent pairs. The variance of 40,000 numbers with light tails is known to 2 %.
    ratio = row_gradients(DisARM(2)).var(0) / row_gradients(DisARM(4)).var(0)
    torch.testing.assert_close(ratio, torch.full((3,), 2.0).double(), rtol=0.1, atol=0)
    # All pairs among four independent draws are still better.
    assert (row_gradients(LeaveOneOut(4)).var(0) < row_gradients(LeaveOneOut(2)).var(0) / 2 * 1.1).all()


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


def enumerated_chain(v, dependent):
    one, two = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]).double()[..., None]
    logits = v["b"] * Y + (2 * v["c"] * one if dependent else v["c"])
    log_q = dist.Bernoulli(logits=v["a"]).log_prob(one) + dist.Bernoulli(logits=logits).log_prob(two)
    log_p = dist.Bernoulli(torch.tensor(0.4).double()).log_prob(one)
    log_p = log_p + dist.Bernoulli(0.2 + 0.5 * one).log_prob(two) + dist.Normal(one - 2 * two, 1.0).log_prob(Y)
    elbo = (log_q.exp() * (log_p - log_q)).sum(0).mean()
    return flat(torch.autograd.grad(elbo, list(v.values())))


@pytest.mark.parametrize("name", ["DisARM 2", "running average", "leave-one-out 4"])
def test_two_sites_are_unbiased(name):
    dependent = "DisARM" not in name
    v, model, guide = chain(dependent)
    found = gradients(FOR_BERNOULLI[name](), model, guide, Y.repeat(100), list(v.values()))
    assert_mean(found, enumerated_chain(v, dependent))


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_disarm_refuses_a_chain_of_sites_even_if_its_weight_is_still_zero(weight):
    """The two draws of a pair would have different probabilities, and the formula is for equal ones."""
    v, model, guide = chain(dependent=True)
    v["c"].data.fill_(weight)
    with pytest.raises(ValueError, match=r"DisARM needs latents .* got site 'second' of the guide, which depends on"):
        DisARM().loss_and_grads(model, guide, Y)


def test_disarm_refuses_latents_that_are_no_bernoullis_and_names_them():
    model, guide = mixed_pair(mixed_parameters(), gaussian_first=False)
    with pytest.raises(ValueError, match=r"DisARM needs Bernoulli latents, got a Normal for site 'g' of the guide"):
        DisARM().loss(model, guide, Y)
    spin = torch.distributions.AffineTransform(-1.0, 2.0)
    spins = guide_of(lambda x: dist.TransformedDistribution(dist.Bernoulli(logits=x), [spin]))
    with pytest.raises(ValueError, match=r"needs Bernoulli latents, got a TransformedDistribution for site 'z'"):
        DisARM().loss(spins, spins, Y)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_leave_one_out_has_no_noise_if_f_is_constant(count):
    """The guide is the posterior of a model whose data do not depend on z."""
    logits, noise = torch.tensor([0.3, -1.0]).double().requires_grad_(), dist.Normal(0.0, 1.0)
    model = model_of(dist.Bernoulli(logits=logits.detach()).to_event(1), lambda z: noise)
    guide = guide_of(lambda y: dist.Bernoulli(logits=logits).to_event(1))
    assert gradient(LeaveOneOut(count), model, guide, Y, [logits]).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["leave-one-out 2", "leave-one-out 4", "DisARM 2", "DisARM 4", "VIMCO 2", "VIMCO 3"])
def test_a_constant_in_the_likelihood_changes_no_gradient(name):
    plain, shifted = (row_gradients(FOR_BERNOULLI[name](), shift) for shift in (0.0, 50.0))
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-11)


def test_a_baseline_reduces_the_variance():
    """The score function of f far from zero has a large variance, which a baseline near f removes."""
    elbo = ScoreFunction(RunningAverage().double())
    plain = row_gradients(elbo, shift=10.0).var(0)  # the first step has no baseline
    assert (row_gradients(elbo, shift=10.0, seed=1).var(0) < plain / 5).all()


def users_model(x):
    """Two discrete sites and a Poisson likelihood; data are counts, ``(N,)``."""
    rates = pyro.param("rates", torch.tensor([1.0, 4.0]), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        first, second = pyro.sample("first", dist.Bernoulli(0.4)), pyro.sample("second", dist.Bernoulli(0.7))
        x = pyro.subsample(x, event_dim=0)
        pyro.sample("x", dist.Poisson(rates[0] + rates[1] * first + 5 * second), obs=x)


def users_guide(x):
    slopes = pyro.param("slopes", torch.tensor([0.1, 0.2]))
    with pyro.plate("rows", len(x)):
        x = pyro.subsample(x, event_dim=0)
        pyro.sample("first", dist.Bernoulli(logits=slopes[0] * (x - 4)))
        pyro.sample("second", dist.Bernoulli(logits=slopes[1] * (x - 4)))


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", FOR_USERS)
def test_fit_trains_any_pair(name, batch_size):
    settings = {"epochs": 60, "lr": 0.05, "batch_size": batch_size, "plate": "rows", "elbo": FOR_USERS[name]()}
    history = pv.fit(users_model, users_guide, COUNTS, **settings).history
    assert sorted(history) == ["distortion", "elbo", "rate"]
    elbos, distortions, rates = (torch.tensor(history[name]) for name in ("elbo", "distortion", "rate"))
    torch.testing.assert_close(elbos, -distortions - rates)
    assert elbos[-10:].mean() > elbos[:10].mean()
    assert (pyro.param("slopes") != torch.tensor([0.1, 0.2])).all()


@pytest.mark.parametrize("name", FOR_USERS)
def test_svi_trains_any_pair(name):
    svi = SVI(users_model, users_guide, Adam({"lr": 0.05}), FOR_USERS[name]())
    losses = torch.tensor([svi.step(COUNTS) for _ in range(60)])
    assert losses.isfinite().all()
    assert losses[-10:].mean() < losses[:10].mean()
    assert (pyro.param("slopes") != torch.tensor([0.1, 0.2])).all()
    assert math.isfinite(svi.evaluate_loss(COUNTS))
