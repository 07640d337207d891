"""What all objectives share: loss and gradients agree, mini-batches are exact on average, arguments are checked."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import (
    ANY_DISCRETE,
    CALLS,
    DISCRETE_CASES,
    FOR_BERNOULLI,
    GRADIENTS,
    X,
    assert_mean,
    flat,
    gradient,
    neural_baseline,
    normal_vae,
    vae_of,
)
from pyro import poutine

from pyro_vae import objectives
from pyro_vae._utils.traces import latent_sites
from pyro_vae.compilation import torch_private
from pyro_vae.diagnostics.gradients import exact_gradient
from pyro_vae.handlers import SubsampleRows
from pyro_vae.objectives import VIMCO, DisARM, DiscreteKL, ImportanceWeighted, LeaveOneOut, ScoreFunction
from pyro_vae.objectives.baselines import RunningAverage
from pyro_vae.objectives.particle_elbo import ParticleELBO
from pyro_vae.training.elbo_evaluator import ElboEvaluator

IMPORTANCE_WEIGHTED = {name: lambda name=name: ImportanceWeighted(3, name) for name in GRADIENTS}
ALL = FOR_BERNOULLI | IMPORTANCE_WEIGHTED
CASES = DISCRETE_CASES + [("normal", name) for name in IMPORTANCE_WEIGHTED]


def test_every_objective_is_a_particle_elbo_and_in_the_vocabulary():
    modules = (objectives.importance_weighted, objectives.modified_kl, objectives.score_function)
    assert set(objectives.__all__) == {name for module in modules for name in module.__all__}
    assert all(issubclass(getattr(objectives, name), ParticleELBO) for name in objectives.__all__)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_all_methods_compute_minus_the_bound_of_the_draws_and_the_same_gradients(kind, name):
    vae, elbo = normal_vae() if kind == "normal" else vae_of(kind), ALL[name]()
    parameters = list(vae.parameters())

    def run(method):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        return getattr(ALL[name](), method)(vae.model, vae.guide, X)

    pyro.set_rng_seed(3)
    evaluator = ElboEvaluator(vae.model, vae.guide, ALL[name]())
    evaluator.loss(X)
    z = latent_sites(evaluator.traces[0][1])["z"]["value"]
    value, loss = run("loss"), run("differentiable_loss")
    f = vae.prior().log_prob(z) + vae.decode(z).log_prob(X) - vae.encode(X).log_prob(z)
    f = f.reshape(elbo.num_particles, len(X)).detach()
    bound = f.mean(0) if elbo.bound_draws == 1 else f.logsumexp(0) - math.log(len(f))
    assert value == pytest.approx(-bound.sum().item(), rel=1e-12)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert run("loss_and_grads") == pytest.approx(value, rel=1e-12)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-10, atol=1e-12)


class FixedDraws(poutine.messenger.Messenger):
    """Replace the draws of z, ``(K, B, 3)``, or their noise, ``(K, B, 1)``, if z is normal."""

    def __init__(self, values):
        super().__init__()
        self.values = values if len(values) > 1 else values[0]

    def _pyro_sample(self, msg):
        q = msg["fn"]
        if msg["name"] == "z" and (msg["value"] is None or not q.has_rsample):  # DisARM has set a value
            with torch_private.outside_vmap() as level:
                values = torch_private.batched(self.values, level)
            msg["value"] = q.mean + q.stddev * values if q.has_rsample else values
            msg["done"] = True


@pytest.mark.parametrize("take", ["rows", "subsample"])
@pytest.mark.parametrize("name", ALL)
def test_batches_have_on_average_the_loss_and_gradient_of_all_data(name, take):
    """This is exact if the draws of each datum are fixed: the factor N/B is outside of all logarithms and weights."""
    weighted = name in IMPORTANCE_WEIGHTED
    vae = normal_vae() if weighted else vae_of("bernoulli")
    values = torch.randn(3, 4, 1).double() if weighted else vae.encode(X).sample([ALL[name]().num_particles])
    parameters = list(vae.parameters())

    def run(rows):
        pyro.clear_param_store()
        rows, elbo = torch.tensor(rows), ALL[name]()
        with FixedDraws(values[:, rows]):
            if take == "rows":
                model, guide = (poutine.scale(f, scale=len(X) / len(rows)) for f in (vae.model, vae.guide))
                loss = elbo.differentiable_loss(model, guide, X[rows])
            else:
                with SubsampleRows("data", rows):
                    loss = elbo.differentiable_loss(vae.model, vae.guide, X)
        return torch.cat([loss.detach()[None], flat(torch.autograd.grad(loss, parameters))])

    for size in (1, 2, 3):
        batches = [run(rows) for rows in itertools.combinations(range(4), size)]
        torch.testing.assert_close(torch.stack(batches).mean(0), run(range(4)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["neural", "leave-one-out 2", "DisARM 2", "VIMCO 2"])
def test_batches_with_new_draws_are_unbiased(name):
    vae, elbo, copies = vae_of("bernoulli"), FOR_BERNOULLI[name](), 60
    data, parameters = X.repeat(copies, 1), list(vae.parameters())
    expected = flat(exact_gradient(vae.model, vae.guide, X, num_draws=elbo.bound_draws).values())
    estimates = []
    for _ in range(CALLS):
        with SubsampleRows("data", torch.randperm(len(data))[: len(data) // 2]):
            estimates.append(gradient(elbo, vae.model, vae.guide, data, parameters))
    assert_mean(torch.stack(estimates), expected)


def test_the_loss_of_a_baseline_does_not_depend_on_the_size_of_the_batch():
    vae, slopes = vae_of("bernoulli"), []
    for rows in (range(4), [0], [1], [2], [3]):
        pyro.clear_param_store()
        elbo, draw = neural_baseline(), torch.tensor([1.0, 0.0, 1.0]).double()
        with SubsampleRows("data", torch.tensor(rows)), FixedDraws(draw.expand(1, len(rows), 3)):
            slopes.append(gradient(elbo, vae.model, vae.guide, X, list(elbo.baseline.parameters())))
    torch.testing.assert_close(torch.stack(slopes[1:]).sum(0), slopes[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("make", "num_particles", "expected"), [
    *itertools.product([LeaveOneOut, VIMCO, DisARM, DiscreteKL], [0, -1, True, 2.0, "2"], ["an"]),
    *itertools.product([partial(ScoreFunction, RunningAverage())], [0, -1, True, 2.0, "2"], ["an integer, 1 or"]),
    *itertools.product([LeaveOneOut, VIMCO], [1], ["an integer, 2 or more"]),
    *itertools.product([DisARM], [1, 3], ["an even number, 2 or more"]),
])  # fmt: skip
def test_a_wrong_number_of_draws_is_refused(make, num_particles, expected):
    with pytest.raises(ValueError, match=rf"`num_particles` must be {expected}.*, got '?{num_particles}"):
        make(num_particles)


@pytest.mark.parametrize("name", ["running average", "leave-one-out 2"])
def test_nested_plates_are_refused(name):
    def model(x):
        with pyro.plate("columns", 2, dim=-2), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    with pytest.raises(ValueError, match=r"every site in one plate.*got site '\w' in the plates \['columns', 'data'\]"):
        ANY_DISCRETE[name]().loss(model, poutine.block(model, hide=["x"]), X[:, 0].float())
