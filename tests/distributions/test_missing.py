"""NaN is an entry that was not observed: log p(x_obs) and its gradients are those of the observed entries."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import NET, gaussian, model_of
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors
from pyro_vae.distributions import Columns
from pyro_vae.distributions.missing import WithMissing, with_missing
from pyro_vae.distributions.properties import base_support

NAN = math.nan
Z_UNLIKELY = 4.5  # two-sided probability 7e-6


def kinds():
    """A column of each kind of support."""
    return [
        families.Normal(1),
        families.LogNormal(1),
        families.Ordinal(1, 3),
        families.ZeroInflated(families.Poisson(1)),
    ]


OPTIONS = {
    "Normal": {"scale": "network"},
    "StudentT": {"df": "network", "scale": "network"},
    "Categorical": {"num_classes": 3},
    "Ordinal": {"num_levels": 3},
    "NegativeBinomial": {"dispersion": "network"},
}
LIKELIHOODS = {
    name: partial(getattr(likelihoods, name), out_features=4, network=NET, **OPTIONS.get(name, {}))
    for name in likelihoods.__all__
    if name != "Columns"
}
LIKELIHOODS["Columns"] = lambda latent, missing=False: likelihoods.Columns(latent, kinds(), NET, missing)
LIKELIHOODS["Bernoulli, soft"] = partial(LIKELIHOODS["Bernoulli"], soft_targets=True)
ALL = pytest.mark.parametrize("build", LIKELIHOODS.values(), ids=LIKELIHOODS)


def holed(x, share=0.3, seed=0):
    """x with this share of its entries missing."""
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return x.masked_fill(hidden, NAN)


def reading(features=2, latent=1, network=NET):
    """A guide that reads missing entries."""
    return guides.DiagonalNormal(features, latent, networks.with_missing(network))


def gaussian_vae(missing=True, reads=True, **likelihood):
    network = networks.mlp([8], nn.Tanh)
    encoder = reading(network=network) if reads else guides.DiagonalNormal(2, 1, network)
    return gaussian(encoder=encoder, decoder=likelihoods.Normal(1, 2, network, missing=missing, **likelihood), latent=1)


def log_prob_of_entries(p, x):
    if isinstance(p, Columns):
        return torch.stack([one.log_prob(x[..., d : d + 1]) for d, one in enumerate(p.columns.values())], -1)
    return p.base_dist.log_prob(x)


@ALL
def test_likelihood_of_a_row_is_that_of_its_observed_entries(build):
    part, strict = build(3, missing=True), build(3)
    strict.load_state_dict(part.state_dict())
    z = torch.randn(6, 3)
    p, x = part(z), strict(z).sample()
    seen = torch.rand(6, 4) < 0.6
    seen[0], seen[1] = False, True
    torch.testing.assert_close(p.log_prob(torch.where(seen, x, NAN)), (log_prob_of_entries(p, x) * seen).sum(-1))
    assert p.log_prob(torch.where(seen, x, NAN))[0] == 0
    torch.testing.assert_close(p.log_prob(x), strict(z).log_prob(x))
    torch.testing.assert_close(p.mean, strict(z).mean)
    assert not p.sample((50,)).isnan().any()


@ALL
def test_a_missing_entry_has_no_part_in_any_gradient(build):
    part = build(3, missing=True)
    z = torch.randn(6, 3, requires_grad=True)
    leaves = [z, *part.parameters()]
    x = part(z).sample().detach()
    x[:, 1] = NAN
    q = part(z)
    gradients = torch.autograd.grad(q.log_prob(x).sum(), leaves)
    complete = build(3)
    complete.load_state_dict(part.state_dict())
    each = log_prob_of_entries(complete(z), x.nan_to_num(1))[:, [0, 2, 3]]
    expected = torch.autograd.grad(each.sum(), [z, *complete.parameters()], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients, expected)  # NaN is not close to NaN


@ALL
def test_values_outside_the_support_are_refused_next_to_missing_ones(build):
    q = build(3, missing=True)(torch.zeros(3))
    if base_support(q) is not torch.distributions.constraints.real:
        with pytest.raises(ValueError, match=r"support|0s and 1s|positive numbers"):
            q.log_prob(torch.tensor([NAN, -0.5, 1.0, 1.0]))


@pytest.mark.parametrize(
    "base",
    [
        dist.Gamma(torch.tensor([2.0, 3.0]), 1.0),
        dist.LogNormal(torch.zeros(2), 1.0),
        dist.Beta(torch.ones(2), 2.0),
        dist.Uniform(3.0, torch.tensor([4.0, 5.0])),
        dist.Binomial(3, torch.tensor([0.2, 0.3])),
        dist.Geometric(torch.tensor([0.2, 0.3])),
    ],
    ids=lambda base: type(base).__name__,
)
def test_any_distribution_of_single_variables_accepts_missing_ones(base):
    q = with_missing(base.to_event(1))
    x = base.sample()
    assert q.log_prob(x) == base.log_prob(x).sum()
    assert q.log_prob(torch.tensor([NAN, x[1]])) == base.log_prob(x)[1]
    assert q.support.check(torch.tensor([NAN, x[1]]))
    wide = q.expand([3])
    assert (wide.batch_shape, wide.log_prob(x).shape) == ((3,), (3,))


def test_vectors_that_are_one_variable_are_refused():
    with pytest.raises(ValueError, match=r"`base_dist` must be .*got a OneHotCategorical of event shape \(3,\)"):
        WithMissing(dist.OneHotCategorical(torch.ones(3)))


X = holed(torch.randn(40, 2), seed=1)
WORK = {
    "fit": lambda vae: pv.fit(vae.model, vae.guide, X, epochs=1),
    "fit, in batches": lambda vae: pv.fit(vae.model, vae.guide, X, epochs=1, batch_size=7),
    "fit, validation": lambda vae: pv.fit(vae.model, vae.guide, X.nan_to_num(), validation=X, epochs=1),
    "evaluate": lambda vae: pv.evaluate(vae.model, vae.guide, X),
    "log_evidence": lambda vae: pv.log_evidence(vae.model, vae.guide, X, num_samples=10),
    "exact.log_evidence": lambda vae: pv.exact.log_evidence(vae.model, X),
    "exact.posterior": lambda vae: pv.exact.posterior(vae.model, X),
    "exact.elbo": lambda vae: pv.exact.elbo(vae.model, vae.guide, X),
    "exact.kl": lambda vae: pv.exact.kl(vae.model, vae.guide, X),
    "to_datatree": lambda vae: pv.to_datatree(vae.model, vae.guide, X, draws=5),
    "to_datatree, parallel": lambda vae: pv.to_datatree(vae.model, vae.guide, X, draws=5, parallel=True),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_everything_takes_missing_entries_where_the_likelihood_does(work):
    work(gaussian_vae())


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_missing_entries_are_refused_without_the_option(work):
    vae = gaussian_vae(missing=False)
    before = [parameter.clone() for parameter in vae.parameters()]
    where = r"got nan at row \d+, column \(\d,\)"
    with pytest.raises(ValueError, match=rf"`(data|validation)` must hold finite numbers, {where}.*`missing=True`"):
        work(vae)
    assert all(map(torch.equal, before, vae.parameters()))


def test_an_encoder_that_cannot_read_nan_is_refused_with_a_way_out():
    for work in (*map(WORK.get, ["fit", "evaluate", "to_datatree", "exact.elbo"]), lambda vae: vae.impute(X, 5)):
        with pytest.raises(ValueError, match=r"must accept missing entries.*with_missing.*got a context with NaN"):
            work(gaussian_vae(reads=False))


def test_a_model_of_ones_own_accepts_nan_by_its_distribution_and_infinite_entries_are_refused():
    def model(x, y, missing=True):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            p = dist.Normal(x @ w, 1.0)
            pyro.sample("y", WithMissing(p) if missing else p, obs=y)

    def guide(x, y):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    x, y = torch.randn(20, 2), holed(torch.randn(20))
    pv.fit(model, guide, (x, y), epochs=2)
    with pytest.raises(ValueError, match=r"`data` must hold finite numbers, got nan at row \d+"):
        pv.fit(lambda x, y: model(x, y, missing=False), guide, (x, y), epochs=2)
    with pytest.raises(ValueError, match=r"`data` must hold finite numbers, got nan at row \d+, column"):
        pv.fit(model, guide, (holed(x), y.nan_to_num()), epochs=2)
    with pytest.raises(ValueError, match=r"`data` must hold finite numbers, got inf at row 0, column \(1,\)"):
        pv.evaluate(gaussian_vae().model, gaussian_vae().guide, torch.tensor([[NAN, math.inf]]))


def test_a_transform_sees_missing_entries_and_may_make_or_fill_them():
    vae, strict = gaussian_vae(), gaussian_vae(missing=False, reads=False)
    before = X.clone()
    for options in ({}, {"batch_size": 7}):
        pv.fit(vae.model, vae.guide, X, transform=lambda x: x * 2, epochs=1, **options)
        pv.fit(vae.model, vae.guide, X.nan_to_num(), transform=lambda x: holed(x, seed=3), epochs=1, **options)
        pv.fit(strict.model, strict.guide, X, transform=lambda x: x.nan_to_num(), epochs=1, **options)
    assert torch.equal(X.isnan(), before.isnan())


def test_soft_targets_with_missing_ones_are_no_likelihood_either():
    decoder = likelihoods.Bernoulli(1, 2, NET, soft_targets=True, missing=True)
    vae = gaussian(1, 2, encoder=reading(), decoder=decoder)
    x = torch.tensor([[0.3, NAN]])
    assert "surrogate" in pv.evaluate(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match="must have a normalised likelihood"):
        pv.exact.log_evidence(vae.model, x)


def moments(vae):
    """Mean and covariance of p(x), and those of z."""
    prior = vae.prior().base_dist
    weight, bias = vae.decoder.network.weight, vae.decoder.network.bias
    noise = vae.decoder(weight.new_zeros(1, weight.shape[1])).variance[0]
    covariance = weight @ prior.variance.diag() @ weight.T + noise.diag()
    return bias + weight @ prior.loc, covariance, prior, weight


@pytest.mark.parametrize("scale", ["shared", "per_dimension"])
def test_evidence_and_posterior_of_a_linear_gaussian_model_are_those_of_the_observed_coordinates(scale):
    decoder = likelihoods.Normal(2, 5, networks.linear(), scale=scale, missing=True)
    vae = gaussian(2, 5, prior=priors.Normal(2), encoder=reading(5, 2), decoder=decoder).double()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = holed(torch.randn(40, 5, dtype=torch.float64), 0.4)
    x[0], x[1] = NAN, 1.0
    with torch.no_grad():
        loc, covariance, prior, weight = moments(vae)
        evidence, posterior = pv.exact.log_evidence(vae.model, x), pv.exact.posterior(vae.model, x)
        for row, value in enumerate(x):
            seen = ~value.isnan()
            if not seen.any():
                assert abs(evidence[row]) < 1e-9
                torch.testing.assert_close(posterior.mean[row], prior.loc)
                continue
            marginal = dist.MultivariateNormal(loc[seen], covariance[seen][:, seen])
            torch.testing.assert_close(evidence[row], marginal.log_prob(value[seen]))
            gain = prior.variance.diag() @ weight[seen].T @ torch.linalg.inv(covariance[seen][:, seen])
            torch.testing.assert_close(posterior.mean[row], prior.loc + gain @ (value - loc)[seen])
            left = prior.variance.diag() - gain @ weight[seen] @ prior.variance.diag()
            torch.testing.assert_close(posterior.covariance_matrix[row], left)


def test_quadrature_enumeration_and_importance_sampling_leave_out_what_is_missing():
    x = holed(torch.randn(30, 2), seed=2)
    linear = gaussian_vae(scale=0.7)
    linear.decoder.network = nn.Linear(1, 2)
    closed = pv.exact.log_evidence(linear.model, x)
    linear.decoder.network = nn.Sequential(nn.Linear(1, 2), nn.Softplus())  # no longer linear: by quadrature
    integrated = pv.exact.log_evidence(linear.model, x)
    for row, seen in enumerate(~x.isnan()):  # the model of the observed columns alone
        decoder = lambda z, seen=seen: dist.Normal(linear.decoder(z).mean[..., seen], 0.7).to_event(1)  # noqa: E731
        columns = model_of(linear.prior(), decoder)
        alone = pv.exact.log_evidence(columns, x[row : row + 1, seen]) if seen.any() else torch.zeros(1)
        torch.testing.assert_close(integrated[row], alone[0], atol=1e-3, rtol=0)
    assert (closed - integrated).abs().max() > 0.01
    estimate = pv.log_evidence(linear.model, linear.guide, x, num_samples=4000)
    error = (estimate.log_evidence - integrated).abs() / (estimate.standard_error + 1e-6)
    assert error.max() < 6
    gap = pv.exact.elbo(linear.model, linear.guide, x) + pv.exact.kl(linear.model, linear.guide, x) - integrated
    assert gap.abs().max() < 1e-3


def test_classes_are_enumerated_with_missing_entries():
    encoder = guides.OneHotCategorical(2, (1, 3), networks.one_hot(4, NET))
    decoder = likelihoods.Categorical((1, 3), 2, 4, networks.linear(), missing=True)
    vae = pv.VAE(priors.OneHotCategorical((1, 3)), encoder, decoder)
    x = holed(torch.randint(4, (20, 2)).float())
    evidence = pv.exact.log_evidence(vae.model, x)
    probs = vae.decode(torch.eye(3)[:, None]).base_dist.base_dist.probs  # (state, column, class)
    seen = ~x.isnan()
    chosen = probs[:, torch.arange(2), x.nan_to_num().long()]
    torch.testing.assert_close(evidence, torch.where(seen, chosen, 1.0).prod(-1).mean(0).log())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    fitted = pv.fit(vae.model, config_enumerate(vae.guide), x, epochs=200, lr=2e-2, elbo=elbo)
    assert fitted.history["elbo"][-1] > evidence.mean()


@ALL
def test_every_likelihood_trains_in_a_vae_and_agrees_with_the_exact_answer(build):
    decoder = build(1, missing=True)
    network = networks.one_hot(3, NET) if isinstance(decoder, likelihoods.Categorical) else networks.with_missing(NET)
    vae = gaussian(1, 4, encoder=guides.DiagonalNormal(4, 1, network), decoder=decoder)
    x = holed(vae.generate(60))
    fitted = pv.fit(vae.model, vae.guide, x, epochs=20, batch_size=20, lr=1e-2)
    if "surrogate" in fitted.history:
        return
    evidence = pv.exact.log_evidence(vae.model, x)
    elbo, kl = pv.exact.elbo(vae.model, vae.guide, x), pv.exact.kl(vae.model, vae.guide, x)
    assert (evidence - elbo - kl).abs().max() < 2e-3
    assert kl.min() > -1e-3
    draws = vae.impute(x, 5)
    assert draws.isfinite().all()
    assert vae.decode(torch.zeros(5, 60, 1)).support.check(draws).all()


def test_class_numbers_may_be_integers_where_none_is_missing():
    encoder = guides.DiagonalNormal(2, 1, networks.one_hot(3, NET))
    vae = gaussian(1, 2, encoder=encoder, decoder=likelihoods.Categorical(1, 2, 3, NET))
    x = torch.randint(3, (20, 2))
    assert torch.equal(pv.exact.log_evidence(vae.model, x), pv.exact.log_evidence(vae.model, x.float()))
    assert pv.evaluate(vae.model, vae.guide, x) == pv.evaluate(vae.model, vae.guide, x.float())
    pv.fit(vae.model, vae.guide, x, epochs=1, batch_size=5)


def test_other_objectives_autoguides_and_diagrams_leave_out_what_is_missing():
    vae = gaussian_vae()
    encoder = guides.Bernoulli(2, 2, networks.with_missing(NET))
    bits = pv.VAE(priors.Bernoulli(2), encoder, likelihoods.Normal(2, 2, NET, missing=True))
    baseline = pv.baselines.NeuralBaseline(2, networks.with_missing(NET))
    for model, guide, elbo in (
        (vae.model, vae.guide, pv.objectives.ImportanceWeighted(4, "doubly-reparameterized")),
        (vae.model, vae.guide, RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
        (vae.model, vae.guide, TraceMeanField_ELBO()),
        (vae.model, AutoNormal(vae.model), Trace_ELBO()),
        (bits.model, bits.guide, pv.objectives.ScoreFunction(baseline)),
        (bits.model, bits.guide, pv.objectives.VIMCO(4)),
        (bits.model, bits.guide, pv.objectives.DisARM()),
    ):
        fitted = pv.fit(model, guide, X, epochs=5, lr=1e-2, elbo=elbo)
        assert all(math.isfinite(nats) for nats in fitted.history["elbo"])
    assert all(parameter.isfinite().all() for parameter in (*bits.parameters(), *baseline.parameters()))
    pv.plots.plate_diagram(vae.model, vae.guide, X)


def test_what_a_missing_entry_would_have_been_changes_no_gradient():
    vae = gaussian_vae()
    x = holed(torch.randn(30, 2), seed=5)
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    gradients = torch.autograd.grad(loss, list(vae.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    # The weights of the column that a row lacks have a gradient of zero.
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, torch.tensor([[0.3, NAN]]))
    (gradient,) = torch.autograd.grad(loss, vae.decoder.network[-1].weight)
    assert (gradient != 0).any(-1).tolist() == [True, False]


class PosteriorEncoder(nn.Module):
    """The exact p(z | x_obs) of a linear Gaussian decoder of one latent, which does not pass gradients to it."""

    def __init__(self, decoder):
        super().__init__()
        self._decoder = [decoder]

    def forward(self, x):
        (decoder,) = self._decoder
        with torch.no_grad():
            loc = decoder(x.new_zeros(1, 1)).mean
            weight = decoder(x.new_ones(1, 1)).mean - loc
            noise = decoder(x.new_zeros(1, 1)).variance
            seen = ~x.isnan()
            precision = 1 + (seen * weight**2 / noise).sum(-1, keepdim=True)
            pull = torch.where(seen, (x - loc) * weight / noise, 0.0).sum(-1, keepdim=True)
        return dist.Normal(pull / precision, precision**-0.5).to_event(1)


def ppca():
    """A linear VAE of one latent with its exact posterior for a guide."""
    decoder = likelihoods.Normal(1, 5, networks.linear(), missing=True)
    return gaussian(1, 5, encoder=PosteriorEncoder(decoder), decoder=decoder)


@torch.no_grad()
def true_ppca():
    vae = ppca()
    vae.decoder.network.weight.copy_(torch.tensor([[1.0], [-0.8], [0.5], [1.5], [0.0]]))
    vae.decoder.network.bias.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]))
    vae.decoder.family.log_scale.fill_(math.log(0.5))
    return vae


def fit_closely(x):
    vae = ppca()
    for lr in (5e-2, 5e-3, 1e-3):
        pv.fit(vae.model, vae.guide, x, epochs=400, lr=lr)
    return vae


@pytest.mark.slow
def test_training_with_a_third_missing_finds_the_parameters_of_the_complete_data():
    x = true_ppca().generate(2000)
    covariance = x.T.cov(correction=0).double()
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[:-1].mean()  # Tipping and Bishop 1999: maximum likelihood on the complete data
    weight = vectors[:, -1:] * (values[-1] - noise).sqrt()
    missing = holed(x)
    vae = fit_closely(missing)
    found = vae.decoder.network.weight.detach().double()
    # At N = 2000 the standard errors of the weights are about 0.03, of their squares 0.07; with less data more.
    torch.testing.assert_close(found @ found.T, weight @ weight.T, atol=0.12, rtol=0)
    torch.testing.assert_close(vae.decoder.network.bias.detach(), x.mean(0), atol=0.08, rtol=0)
    scale = vae.decoder(torch.zeros(1, 1)).stddev[0, 0]
    assert float(scale.detach()) == pytest.approx(float(noise.sqrt()), abs=0.02)
    # And it is the maximum for the observed entries: no worse than the truth on what it was fitted to.
    ours, truth = (pv.exact.log_evidence(p.model, missing).mean() for p in (vae, true_ppca()))
    assert truth < ours < truth + 0.02
    # Not so where zeros, or means, stand in for what is missing.
    filled = fit_closely(torch.where(missing.isnan(), missing.nanmean(0), missing))
    assert filled.decoder.network.weight.norm() < 0.85 * found.norm()


def test_an_amortized_guide_that_reads_the_mask_comes_near_the_evidence():
    x = holed(true_ppca().generate(1000))
    torch.manual_seed(1)
    encoder = reading(5, 1, networks.mlp([32], nn.Tanh))
    vae = gaussian(1, 5, encoder=encoder, decoder=likelihoods.Normal(1, 5, networks.linear(), missing=True))
    pv.fit(vae.model, vae.guide, x, epochs=300, batch_size=250, lr=1e-2)
    kl = pv.exact.kl(vae.model, vae.guide, x)
    assert 0 <= kl.mean() < 0.1
    entries = float((~x.isnan()).sum() / len(x))
    assert pv.exact.log_evidence(vae.model, x).mean() > -1.35 * entries


def test_imputed_draws_keep_what_is_observed_and_fill_in_the_rest():
    vae = gaussian_vae()
    draws, seen = vae.impute(X, num_samples=30), ~X.isnan()
    assert draws.shape == (30, 40, 2)
    assert torch.equal(draws[:, seen], X[seen].expand(30, -1))
    assert draws.isfinite().all()
    assert (draws[:, ~seen].std(0) > 0).all()


def test_imputed_draws_are_those_of_the_conditional_normal():
    vae = true_ppca()
    with torch.no_grad():
        loc, covariance, *_ = moments(vae)
    x = torch.tensor([[1.0, NAN, 0.5, NAN, 0.0]])
    seen = ~x[0].isnan()
    gain = covariance[~seen][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
    mean = loc[~seen] + gain @ (x[0] - loc)[seen]
    left = covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]
    n = 20_000
    draws = vae.impute(x, num_samples=n)[:, 0, ~seen]
    assert ((draws.mean(0) - mean).abs() < Z_UNLIKELY * (left.diagonal() / n).sqrt()).all()
    spread = (left.diagonal()[:, None] * left.diagonal() + left**2).div(n).sqrt()
    assert ((draws.T.cov() - left).abs() < Z_UNLIKELY * spread).all()


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_cover_what_was_hidden_at_their_nominal_rate(level):
    vae = true_ppca()
    complete = vae.generate(4000)
    x = holed(complete)
    hidden = x.isnan()
    # Of 399 draws and the truth each order is as likely, so that these bounds have the level exactly.
    ranks = (vae.impute(x, num_samples=399) < complete).sum(0)
    inside = (ranks >= 200 - 200 * level) & (ranks < 200 + 200 * level)
    rows = hidden.any(1)
    excess = ((inside.double() - level) * hidden).sum(1)[rows]  # entries of a row share its z: rows are independent
    assert abs(excess.mean()) < Z_UNLIKELY * excess.std() / len(excess) ** 0.5
    assert abs(excess.sum() / hidden.sum()) < 0.02


@pytest.mark.parametrize("parallel", [False, True])
def test_datatree_holds_missing_data_as_they_are_and_complete_predictions(parallel, tmp_path):
    vae = gaussian_vae()
    tree = pv.to_datatree(vae.model, vae.guide, X, draws=20, parallel=parallel)
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    observed = torch.as_tensor(tree["observed_data"]["x"].values)
    torch.testing.assert_close(observed, X, equal_nan=True)
    for group in ("posterior", "prior", "posterior_predictive", "prior_predictive", "guide"):
        assert all(bool(variable.notnull().all()) for variable in tree[group].data_vars.values()), group
    assert set(tree["guide"].data_vars) == {"z_loc", "z_scale"}
