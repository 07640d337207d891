"""The VAE as a Pyro model and guide: names, shared parameters, handlers, errors, methods."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import NET, bernoulli, gaussian, gumbel
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.parts.networks import linear

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[gaussian, gumbel, bernoulli], ids=lambda build: build.__name__)
def vae(request):
    return request.param()


def step(vae, x=X):
    return SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), Trace_ELBO()).step(x)


def stored():
    return dict(pyro.get_param_store().named_parameters())


def diagonal(latent=2, features=3):
    return guides.DiagonalNormal(features, latent, NET)


def test_param_store_holds_the_very_parameters_of_the_module_by_the_names_of_pyro_module(vae):
    step(vae)
    ours = set(stored())
    assert {*map(id, stored().values())} == {*map(id, vae.parameters())}
    pyro.clear_param_store()
    pyro.module(vae.name, vae)
    assert ours == set(stored())


def test_two_vaes_in_one_process_train_apart(vae):
    other = copy.deepcopy(vae)
    assert other.name != vae.name
    before = copy.deepcopy(other.state_dict())
    for trained in (vae, other):
        step(trained)
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        assert unchanged == (trained is vae)
    assert len(stored()) == 2 * len(list(vae.parameters()))
    step(copy.deepcopy(gumbel().discrete()))


def test_a_second_vae_of_the_same_name_is_refused_instead_of_left_untrained():
    first = gaussian(name="mine")
    step(first)
    with pytest.raises(ValueError, match=r"`name` must be one that no other module .* has, got 'mine'"):
        step(gaussian(name="mine"))
    del first  # and with it its name in the store
    step(gaussian(name="mine"))


def test_frozen_parameters_stay_and_the_rest_trains_without_a_warning(vae):
    vae.decoder.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    step(vae)
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("decoder"), name


class MeanOfEncoderPrior(nn.Module):
    """q(z | u) at one learned datum u: it shares the parameters of the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.pseudo_input = nn.Parameter(torch.zeros(3))

    def forward(self, context=None):
        return self.encoder(self.pseudo_input)


def test_a_module_that_is_no_part_may_be_the_prior_and_shared_parameters_are_registered_once():
    encoder = diagonal()
    vae = gaussian(prior=MeanOfEncoderPrior(encoder), encoder=encoder)
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    step(vae)
    assert {*map(id, stored().values())} == {*map(id, vae.parameters())}
    assert len(stored()) == len(list(vae.parameters()))
    assert all(not torch.equal(parameter, before[name]) for name, parameter in vae.named_parameters())
    with pytest.raises(TypeError, match=r"`prior` must be a Part.*got MeanOfEncoderPrior, which has no discrete twin"):
        vae.discrete()


def test_building_a_vae_touches_neither_random_states_nor_running_statistics_nor_the_param_store(random_states):
    def normalised(in_features, out_features):
        return nn.Sequential(nn.Linear(in_features, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, out_features))

    parts = priors.StandardNormal(2), guides.DiagonalNormal(3, 2, normalised), likelihoods.Normal(2, 3, normalised)
    parts[1].network[2].eval()
    modes = [module.training for part in parts for module in part.modules()]
    before, states = [copy.deepcopy(part.state_dict()) for part in parts], random_states()
    pv.VAE(*parts)
    assert random_states() == states
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
    assert [module.training for part in parts for module in part.modules()] == modes
    assert not stored()


def test_double_precision_throughout(vae):
    vae.double()
    x = X.double()
    trace = poutine.trace(vae.model).get_trace(x)
    trace.compute_log_prob()
    assert {trace.nodes[name]["log_prob"].dtype for name in ("z", "x")} == {torch.float64}
    assert poutine.trace(vae.guide).get_trace(x).nodes["z"]["value"].dtype == torch.float64


def test_traces_are_of_the_shape_of_the_story(vae):
    trace = poutine.trace(vae.model).get_trace(X)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == trace.nodes["x"]["log_prob"].shape == (6,)
    assert trace.nodes["x"]["is_observed"]
    assert ("code" in trace.nodes) == isinstance(vae.prior, priors.GumbelSoftmax)


@pytest.mark.parametrize("straight_through", [False, True])
def test_decoder_reads_the_recorded_code(straight_through):
    vae = gumbel(straight_through=straight_through)
    nodes = poutine.trace(vae.model).get_trace(X).nodes
    code = nodes["code"]["value"]
    torch.testing.assert_close(code.sum(-1), torch.ones(6, 2))
    assert set(code.flatten().tolist()) == {0.0, 1.0} if straight_through else (code > 0).all()
    torch.testing.assert_close(nodes["x"]["fn"].mean, vae.decoder(code).mean)
    torch.testing.assert_close(vae.decode(nodes["z"]["value"]).mean, vae.decoder(code).mean)


def test_a_diagram_shows_latent_and_data_in_the_plate_and_predictive_draws_from_the_prior(vae):
    source = pyro.render_model(vae.model, model_args=(X,)).source
    assert "z -> x" in source or "z -> code" in source
    assert "data" in source
    draws = Predictive(vae.model, num_samples=5)(X)
    assert draws["z"].shape == (5, 6, *vae.prior().event_shape)
    assert torch.equal(draws["x"], X.expand(5, 6, 3))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_on_the_unconditioned_model_draws_x_again(vae, parallel):
    model = poutine.uncondition(vae.model)
    x = Predictive(model, guide=vae.guide, num_samples=7, parallel=parallel)(X)["x"]
    assert x.shape == (7, 6, 3)
    assert len(x.flatten(1).unique(dim=0)) == 7


def test_condition_fixes_the_latent(vae):
    z = vae.prior().sample((6,))
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(X)
    torch.testing.assert_close(trace.log_prob_sum(), (vae.prior().log_prob(z) + vae.decode(z).log_prob(X)).sum())


@pytest.mark.parametrize("build", [gaussian, gumbel])
def test_nuts_runs_on_the_model(build):
    vae = build().requires_grad_(False)
    mcmc = MCMC(NUTS(vae.model, max_tree_depth=4), num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run(X[:2])
    z = mcmc.get_samples()["z"]
    assert z.shape == (8, 2, *vae.prior.event_shape)
    assert vae.prior().support.check(z).all()
    assert len(z.flatten(1).unique(dim=0)) > 1


def test_subsampled_rows_are_the_ones_that_are_read(vae):
    rows = torch.tensor([4, 1])
    with pv.handlers.SubsampleRows("data", rows):
        trace = poutine.trace(vae.model).get_trace(X)
    assert torch.equal(trace.nodes["x"]["value"], X[rows])
    assert trace.nodes["x"]["scale"] == 3


class OfTwo(nn.Module):
    def forward(self, context=None):
        return dist.Normal(torch.zeros(2), 1.0)


def too_wide(in_features, out_features):
    return nn.Linear(in_features + 1, out_features)


PAIR = (1, 2)
MISFITS = [  # sizes of z, the parts that replace those of a Gaussian VAE, and words of the error
    (2, {"encoder": diagonal(1)}, ["guides.DiagonalNormal", "priors.StandardNormal", "(1,)", "(2,)", "(latent=2"]),
    (2, {"decoder": likelihoods.Bernoulli(2, (1, 2, 3), NET)}, ["likelihoods.Bernoulli", "fit: in_features=(1, 2, 3)"]),
    (2, {"prior": priors.Bernoulli(2)}, ["a density", "a mass", "guides.Diag", "fit: guides.Bernoulli(latent=2"]),
    (
        2,
        {"prior": priors.Bernoulli(2), "encoder": guides.RelaxedBernoulli(3, 2, NET, 0.5)},
        ["a density", "a mass", "guides.RelaxedBernoulli", "fit: guides.Bernoulli(latent=2"],
    ),
    (
        PAIR,
        {"prior": priors.GumbelSoftmax(PAIR, 0.5), "encoder": guides.OneHotCategorical(3, PAIR, NET)},
        ["a density", "a mass", "priors.GumbelSoftmax", "fit: guides.GumbelSoftmax(latent=(1, 2)"],
    ),
    (
        PAIR,
        {"prior": priors.GumbelSoftmax(PAIR, 0.5)},
        ["log_simplex", "guides.DiagonalNormal", "priors.GumbelSoftmax", "fit: guides.GumbelSoftmax"],
    ),
    (
        PAIR,
        {"prior": priors.OneHotCategorical(PAIR), "encoder": guides.Bernoulli(3, PAIR, NET)},
        ["guides.Bernoulli", "priors.OneHotCategorical", "fit: guides.OneHotCategorical(latent=(1, 2)"],
    ),
    (2, {"prior": priors.Gamma(2)}, ["on [0, inf]", "Real()", "fit: guides.LogNormal(latent=2"]),
    (2, {"prior": priors.Uniform(2, -1.0, 1.0)}, ["on [-1, 1]", "Real()", "fit: guides.LogitNormal(latent=2"]),
    (
        2,
        {"prior": priors.Uniform(2, -1.0, 1.0), "encoder": guides.LogitNormal(3, 2, NET)},
        ["on [-1, 1]", "on [0, 1]", "fit: guides.LogitNormal(latent=2"],
    ),
    (2, {"prior": OfTwo()}, ["OfTwo", "batch shape (2,)", ".to_event()"]),
    (2, {"decoder": likelihoods.Normal(2, 3, too_wide)}, ["decoder", "likelihoods.Normal", "priors.StandardNormal"]),
]


@pytest.mark.parametrize(("latent", "parts", "words"), MISFITS)
def test_parts_that_do_not_fit_are_refused_naming_both_and_what_would(latent, parts, words):
    with pytest.raises(ValueError, match=r"^`(prior|decoder|encoder)` must ") as caught:
        gaussian(latent, **parts)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_density_on_the_same_space_may_be_another_family():
    assert gaussian(prior=priors.RelaxedBernoulli(2, temperature=0.5)).data_shape == (3,)


def test_encode_decode_and_reconstruct_are_the_guide_and_the_model(vae):
    guide = poutine.trace(vae.guide).get_trace(X).nodes["z"]
    assert torch.equal(vae.encode(X).log_prob(guide["value"]), guide["fn"].log_prob(guide["value"]))
    model = poutine.trace(poutine.condition(vae.model, {"z": guide["value"]})).get_trace(X).nodes["x"]
    assert torch.equal(vae.decode(guide["value"]).log_prob(X), model["fn"].log_prob(X))
    pyro.set_rng_seed(3)
    reconstructed = vae.reconstruct(X)
    pyro.set_rng_seed(3)
    assert torch.equal(reconstructed, vae.decode(vae.encode(X).sample()).mean)
    assert not reconstructed.requires_grad


def test_generated_data_have_the_mean_and_spread_of_the_model():
    # x = W z + b + s e, so that E[x] = b and Cov[x] = W W' + s^2 I.
    vae = gaussian(decoder=likelihoods.Normal(2, 3, linear(), scale=0.5))
    weight, bias = vae.decoder.network.weight.detach(), vae.decoder.network.bias.detach()
    n = 20_000
    for mean, noise in ((True, 0.0), (False, 0.25)):
        x = vae.generate(n, mean=mean)
        assert x.shape == (n, 3)
        assert not x.requires_grad
        covariance = weight @ weight.T + noise * torch.eye(3)
        assert ((x.mean(0) - bias).abs() < 4.5 * (covariance.diag() / n).sqrt()).all()
        # The variance of a normal sample variance is 2 sigma^4 / n.
        assert ((x.var(0) - covariance.diag()).abs() < 4.5 * covariance.diag() * (2 / n) ** 0.5).all()


def test_twin_encodes_with_the_same_logits():
    vae = gumbel()
    twin = vae.discrete()
    torch.testing.assert_close(twin.encode(X).base_dist.logits, vae.encode(X).base_dist.logits)
    assert twin.name == vae.name
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(twin.model, config_enumerate(twin.guide), X)
    assert loss == pytest.approx(-pv.exact.elbo(twin.model, twin.guide, X).sum().item(), rel=1e-5)
