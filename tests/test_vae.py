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
from pyro_vae import families, guides, likelihoods, networks, priors
from pyro_vae.parts import Conditional
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


C = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


def conditional(prior=None, latent=2):
    prior = priors.StandardNormal(latent) if prior is None else prior
    encoder, decoder = guides.DiagonalNormal(3 + 3, latent, NET), likelihoods.Normal(latent + 3, 3, NET, missing=True)
    return pv.VAE(prior, encoder, decoder, context=3)


def conditional_prior(context=3):
    return Conditional(families.Normal(2), context, linear()(context, 4))


@pytest.mark.parametrize("prior", [None, conditional_prior], ids=["p(z)", "p(z|c)"])
def test_with_covariates_each_part_reads_them_behind_its_input_as_in_a_pair_written_by_hand(prior):
    vae = conditional(prior and prior())

    def model(x, c):
        with pyro.plate("data", len(x)):
            x, c = pyro.subsample(x, event_dim=1), pyro.subsample(c, event_dim=1)
            z = pyro.sample("z", vae.prior(c) if prior else vae.prior())
            pyro.sample("x", vae.decoder(torch.cat([z, c], -1)), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            x, c = pyro.subsample(x, event_dim=1), pyro.subsample(c, event_dim=1)
            pyro.sample("z", vae.encoder(torch.cat([x, c], -1)))

    ours, theirs = (pv.evaluate(*pair, (X, C), seed=3) for pair in ((vae.model, vae.guide), (model, guide)))
    assert ours == theirs
    torch.testing.assert_close(pv.exact.log_evidence(vae.model, X, C), pv.exact.log_evidence(model, X, C))
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-9, "seed": 1}
    fitted = [pv.fit(*pair, (X, C), **options).history for pair in ((vae.model, vae.guide), (model, guide))]
    assert fitted[0]["elbo"] == pytest.approx(fitted[1]["elbo"], rel=1e-5)


def test_with_covariates_a_model_of_each_level_is_the_model_at_that_level():
    """With a linear decoder a one-hot covariate shifts the mean: log p(x|c) is that of the shifted data."""
    torch.manual_seed(0)
    decoder = likelihoods.Normal(1 + 3, 3, linear())
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(3 + 3, 1, linear()), decoder, context=3)
    plain = pv.VAE(vae.prior, guides.DiagonalNormal(3, 1, linear()), likelihoods.Normal(1, 3, linear()))
    plain.decoder.family.load_state_dict(decoder.family.state_dict())
    weight = decoder.network.weight.detach()
    plain.decoder.network.load_state_dict({"weight": weight[:, :1], "bias": decoder.network.bias})
    levels = torch.eye(3)[torch.arange(6) % 3]
    shifted = X - levels @ weight[:, 1:].T
    expected = pv.exact.log_evidence(plain.model, shifted)
    torch.testing.assert_close(pv.exact.log_evidence(vae.model, X, levels), expected, atol=1e-4, rtol=1e-4)


def test_covariates_pass_through_the_methods(tmp_path):
    vae = conditional(conditional_prior())
    assert vae.reconstruct(X, C).shape == X.shape
    assert vae.generate(4, context=C[:4]).shape == vae.generate(4, mean=True, context=C[0]).shape == (4, 3)
    assert conditional().generate(4, context=C[0]).shape == (4, 3)
    masked = X.masked_fill(X > 0.5, torch.nan)
    missing = pv.VAE(vae.prior, guides.DiagonalNormal(6, 2, networks.with_missing(NET)), vae.decoder, context=3)
    filled = missing.impute(masked, 5, C)
    assert torch.equal(torch.where(masked.isnan(), torch.nan, filled).nan_to_num(), masked.nan_to_num().expand(5, 6, 3))
    vae.save(tmp_path / "model.pt")
    again = pv.VAE.load(tmp_path / "model.pt")
    assert torch.equal(again.encode(X, C).mean, vae.encode(X, C).mean)
    assert pv.inference_gap(vae.model, vae.guide, X, C, steps=2).gap.shape == (6,)


def test_covariates_of_an_image_and_of_a_latent_with_two_dimensions_are_put_behind_the_flat_values():
    prior, encoder = priors.OneHotCategorical((2, 3)), guides.OneHotCategorical(4 + 3, (2, 3), NET)
    vae = pv.VAE(prior, encoder, likelihoods.Bernoulli(6 + 3, (2, 2), NET), context=3)
    x = (torch.rand(6, 2, 2) > 0.5).float()
    assert pv.exact.log_evidence(vae.model, x, C).shape == (6,)
    fitted = pv.fit(vae.model, config_enumerate(vae.guide), (x, C), epochs=1, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert len(fitted.history["elbo"]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian().model(X, C), r"`context` must be left out for a VAE without covariates"),
        (lambda: conditional().model(X), r"`context` must be a tensor \(N, 3\).*got none"),
        (lambda: conditional().model(X, C[:2]), r"`context` must be \(6, 3\), the covariates .* or one row"),
        (lambda: conditional().encode(X, C.long()), r"`context` must be floats \(N, 3\)"),
        (lambda: conditional().generate(5, context=C), r"`context` must be \(5, 3\) or \(3,\), for 5 new data"),
        (lambda: gaussian(prior=conditional_prior()), r"`prior` must take no context, or covariates .*takes \(3,\)"),
        (lambda: conditional(conditional_prior(2)), r"`prior` must take \(3,\), got base.Conditional, which takes"),
        (lambda: pv.VAE(priors.StandardNormal(2), diagonal(), likelihoods.Normal(5, 3, NET), context=3),
         r"`encoder` must take shape \(6,\) from the decoder .* and 3 covariates.*in_features=6"),
        (lambda: gaussian(table=X), r"`table` must be a table, such as pv.tables.Table.from_frame\(frame\), got"),
    ],
)  # fmt: skip
def test_wrong_covariates_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
