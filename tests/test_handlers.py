"""Effect handlers: rows of a plate, the weight of the KL, and traces of runs."""

import math

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae import priors
from pyro_vae._utils.param_store import parameters_of
from pyro_vae._utils.traces import latent_sites, observed_sites
from pyro_vae.handlers import SubsampleRows, SubsampleStatements, WeightKL
from pyro_vae.objectives.elbo_terms import elbo_terms

X = torch.randn(6, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([4, 1, 5])
WEIGHTS = [0.0, 0.3, 1.0, 4.0]


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("doubled", 2 * mu, event_dim=0)
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=0)
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("scale", torch.tensor(0.5))), obs=x)
    return x


def guide(x):
    pyro.sample("mu", dist.Normal(0.3, 0.5))
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=0)
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def trace(function, *handlers, x=X):
    for handler in handlers:
        function = handler(function)
    return poutine.trace(function).get_trace(x)


@pytest.mark.parametrize("rows", [ROWS, *map(torch.arange, (1, 4, 6))])
def test_rows_are_what_subsample_returns_and_scale_the_plates_sites_alone(rows):
    nodes, scale = trace(model, SubsampleRows("data", rows)).nodes, 6 / len(rows)
    assert torch.equal(nodes["_RETURN"]["value"], X[rows])
    assert torch.equal(nodes["x"]["value"], X[rows])
    assert nodes["z"]["value"].shape == rows.shape
    assert (nodes["x"]["scale"], nodes["z"]["scale"], nodes["mu"]["scale"]) == (scale, scale, 1)
    (frame,) = nodes["x"]["cond_indep_stack"]
    assert (frame.size, frame.full_size) == (len(rows), 6)


def test_rows_reach_model_and_guide_through_replay():
    with SubsampleRows("data", ROWS):
        guide_trace = trace(guide)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(X)
    assert torch.equal(model_trace.nodes["z"]["value"], guide_trace.nodes["z"]["value"])
    assert torch.equal(guide_trace.nodes["z"]["fn"].mean, X[ROWS] / 2)
    assert torch.equal(model_trace.nodes["x"]["value"], X[ROWS])
    inner = trace(poutine.replay(model, guide_trace), SubsampleRows("data", ROWS))
    assert torch.equal(inner.nodes["x"]["value"], X[ROWS])


def test_the_loss_of_rows_is_that_of_these_rows_scaled_and_unbiased_for_all():
    def local(x):
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=0)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def nothing(x):
        pass

    losses = []
    for rows in torch.arange(6).split(2):
        with SubsampleRows("data", rows):
            losses.append(Trace_ELBO().loss(local, nothing, X))
        assert losses[-1] == pytest.approx(-3 * dist.Normal(0.0, 1.0).log_prob(X[rows]).sum().item(), rel=1e-5)
    assert sum(losses) / 3 == pytest.approx(Trace_ELBO().loss(local, nothing, X), rel=1e-5)


def test_a_plate_of_another_name_and_a_later_run_keep_their_rows():
    assert torch.equal(trace(model, SubsampleRows("other", ROWS)).nodes["x"]["value"], X)
    trace(model, SubsampleRows("data", ROWS))
    assert torch.equal(trace(model).nodes["x"]["value"], X)


def test_subsample_statements_are_counted_and_change_nothing():
    def pair_reader(x):
        with pyro.plate("data", len(x)):
            return pyro.subsample(x, event_dim=0), pyro.subsample(-x, event_dim=0)

    with SubsampleStatements() as statements:
        with pyro.plate("other", 6):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=X)
        assert statements.count == 0
        first, second = pair_reader(X)
        assert statements.count == 2
        pair_reader(X)
    pair_reader(X)
    assert statements.count == 4
    assert torch.equal(first, X)
    assert torch.equal(second, -X)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weight_is_on_the_latents_and_neither_on_data_nor_on_what_is_deterministic(weight):
    nodes = trace(model, WeightKL(weight)).nodes
    scales = {name: nodes[name]["scale"] for name in ("mu", "z", "x", "doubled", "data")}
    assert scales == {"mu": weight, "z": weight, "x": 1, "doubled": 1, "data": 1}


def test_weight_multiplies_the_scale_of_rows_and_of_other_weights():
    nodes = trace(model, WeightKL(0.5), SubsampleRows("data", ROWS), WeightKL(3.0)).nodes
    assert (nodes["z"]["scale"], nodes["mu"]["scale"], nodes["x"]["scale"]) == (3.0, 1.5, 2.0)


def weighted_loss_and_terms(elbo, model, guide, x, weight):
    """The loss per datum of the weighted pair, and the terms at weight 1 of the very same draws."""
    traces = [], []
    pyro.set_rng_seed(0)
    runs = [pairs.record_traces(WeightKL(weight)(run), kept) for run, kept in zip((model, guide), traces, strict=True)]
    loss = elbo.loss(*runs, x)
    return loss / len(x), elbo_terms([(traces[0][-1], traces[1][-1])], len(x))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_loss_is_distortion_plus_weight_times_rate(weight):
    loss, terms = weighted_loss_and_terms(Trace_ELBO(), model, guide, X, weight)
    assert loss == pytest.approx(float(terms["distortion"] + weight * terms["rate"]), rel=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_enumerated_loss_is_distortion_plus_weight_times_rate_and_its_gradient_finite(weight):
    vae, x = pairs.bernoulli(), torch.randn(5, 3)
    elbo, enumerated = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide)
    loss, terms = weighted_loss_and_terms(elbo, vae.model, enumerated, x, weight)
    exact = pv.exact.elbo(vae.model, vae.guide, x).mean()
    assert float(terms["elbo"]) == pytest.approx(float(exact), rel=1e-5)
    assert loss == pytest.approx(float(terms["distortion"] + weight * terms["rate"]), rel=1e-5)
    elbo.loss_and_grads(WeightKL(weight)(vae.model), WeightKL(weight)(enumerated), x)
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())


def test_at_weight_0_the_prior_has_no_gradient():
    vae, x, free = pairs.gaussian(prior=priors.Normal(2)), torch.randn(5, 3), WeightKL(0.0)
    Trace_ELBO().loss_and_grads(free(vae.model), free(vae.guide), x)
    for name, parameter in vae.named_parameters():
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved == (not name.startswith("prior")), name


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=rf"`weight` must be a finite number, 0 or more.*got {weight}"):
        WeightKL(weight)


def test_a_weight_in_a_tensor_is_read_at_each_run():
    beta = torch.tensor(0.5)
    weight = WeightKL(beta)
    for value in (0.5, 2.0):
        beta.fill_(value)
        assert float(trace(model, weight).nodes["z"]["scale"]) == value
    with pytest.raises(ValueError, match=r"`weight` must be one number.*got shape \(2,\)"):
        WeightKL(torch.ones(2))


def test_sites_are_sorted_into_latent_observed_and_parameters():
    kept = trace(model, SubsampleRows("data", ROWS))
    assert list(latent_sites(kept)) == ["mu", "z"]
    assert list(observed_sites(kept)) == ["x"]
    (unconstrained,) = parameters_of(kept).values()
    assert unconstrained is pyro.get_param_store()._params["scale"]


def test_sites_that_are_masked_out_do_not_count_as_observed():
    assert not observed_sites(trace(model, poutine.mask(mask=False)))
    assert list(observed_sites(trace(model, poutine.mask(mask=torch.tensor([True] + 5 * [False]))))) == ["x"]


def test_parameters_are_the_unconstrained_ones_that_are_trained():
    def positive(x):
        pyro.param("positive", torch.tensor(2.0), constraint=dist.constraints.positive)

    (value,) = parameters_of(trace(positive)).values()
    assert (value.item(), value.requires_grad, value.is_leaf) == (pytest.approx(math.log(2)), True, True)
