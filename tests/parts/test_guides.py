"""Guides: a guide for each datum, and a mixture for posteriors of two modes, compared with the exact posterior."""

import pytest
import torch
from pairs import gaussian
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors
from pyro_vae.parts.families import multivariate

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()


def linear_vae(encoder):
    torch.manual_seed(0)
    decoder = likelihoods.Normal(2, 3, networks.linear(), scale=0.5).requires_grad_(False)
    return pv.VAE(priors.StandardNormal(2), encoder, decoder)


class Fold(nn.Module):
    def forward(self, z):
        return z.abs()


FOLD = likelihoods.Normal(1, 1, lambda *sizes: Fold(), scale=0.3)  # x = |z| + noise: posteriors of two modes


def of_many_draws():
    return TraceMeanField_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_full_rank_guide_for_each_datum_finds_the_posterior_of_each(batch_size):
    vae, x = linear_vae(guides.PerDatum(multivariate.FullRankNormal(2), 6)), X.float()
    epochs = 400 if batch_size is None else 150
    for lr in (2e-2, 1e-3):
        pv.fit(vae.model, vae.guide, x, epochs=epochs, batch_size=batch_size, lr=lr, elbo=of_many_draws())
    exact = pv.exact.posterior(vae.model, x)
    q = vae.encode(x)
    torch.testing.assert_close(q.mean, exact.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(q.covariance_matrix, exact.covariance_matrix, atol=0.03, rtol=0)


def test_refining_starts_at_the_amortized_guide_and_closes_its_gap():
    torch.manual_seed(1)
    vae, x = linear_vae(guides.DiagonalNormal(3, 2, networks.mlp([2]))), X.float()
    refined = pv.VAE(vae.prior, guides.PerDatum.refining(vae.encoder, x), vae.decoder)
    torch.testing.assert_close(pv.exact.elbo(refined.model, refined.guide, x), pv.exact.elbo(vae.model, vae.guide, x))
    for lr in (2e-2, 1e-3):
        pv.fit(refined.model, refined.guide, x, epochs=300, lr=lr, elbo=of_many_draws())
    posterior = pv.exact.posterior(vae.model, x)
    precision = posterior.precision_matrix
    mean_field_gap = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - precision.logdet())
    torch.testing.assert_close(pv.exact.kl(refined.model, refined.guide, x), mean_field_gap, atol=5e-3, rtol=0)
    assert not any(parameter is other for parameter in refined.encoder.parameters() for other in vae.parameters())


def test_few_data_are_enough_for_a_guide_of_their_own():
    for n in (1, 2, 5):
        vae = linear_vae(guides.PerDatum(families.Normal(2), n))
        assert pv.exact.elbo(vae.model, vae.guide, X[:n].float()).shape == (n,)


def test_a_mixture_for_each_datum_starts_with_components_that_differ_and_finds_both_modes():
    torch.manual_seed(0)
    x, encoder = torch.tensor([[1.0], [1.2]]), guides.PerDatum(multivariate.MixtureOfNormals(1, num_components=2), 2)
    vae = pv.VAE(priors.StandardNormal(1), encoder, FOLD)
    pv.fit(vae.model, vae.guide, x, epochs=400, lr=2e-2, elbo=of_many_draws())
    assert (encoder(x).loc.squeeze(-1).sign().sum(-1) == 0).all()
    assert (pv.exact.kl(vae.model, vae.guide, x) < 0.3).all()  # one normal: log 2 and more


def test_other_data_than_its_own_are_refused():
    vae = linear_vae(guides.PerDatum(families.Normal(2), 6))
    with pytest.raises(ValueError, match="context of PerDatum must be the 6 data that it was made for, got 4 rows"):
        vae.encode(X[:4].float())
    with pytest.raises(ValueError, match="6"):
        vae.guide(X[:4].float())
    with pytest.raises(ValueError, match=r"`validation` .*amortized guide"):
        pv.fit(vae.model, vae.guide, X.float(), epochs=1, validation=X.float())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (guides.PerDatum, (families.Normal(2), 0), "`raw` must be .*got 0"),
        (guides.PerDatum, (families.Normal(2), torch.zeros(5, 3)), r"`raw` must be floats \(N, 4\), .*shape \(5, 3\)"),
        (guides.PerDatum.refining, (priors.Normal(2), X), "`encoder` must be .*got a Normal"),
    ],
)
def test_what_is_no_guide_for_each_datum_is_refused(make, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(*arguments)


def test_relaxed_latents_of_each_datum_have_a_twin():
    raw = torch.randn(5, 3)
    encoder = guides.PerDatum(families.RelaxedBernoulli(3, 0.5), raw)
    twin = gaussian(3, prior=priors.RelaxedBernoulli(3, 0.5), encoder=encoder).discrete()
    torch.testing.assert_close(twin.encode(X[:5]).mean, raw.sigmoid())
    assert twin.encoder.raw is encoder.raw


def test_it_is_the_same_under_particles_and_importance_weighting():
    vae = linear_vae(guides.PerDatum(families.Normal(2), 6))
    elbo = pv.objectives.ImportanceWeighted(50, "doubly-reparameterized")
    fitted = pv.fit(vae.model, vae.guide, X.float(), epochs=30, batch_size=2, lr=5e-2, elbo=elbo)
    assert fitted.history["elbo"][-1] > fitted.history["elbo"][0]


def test_a_mixture_guide_finds_both_modes_and_closes_the_gap_of_a_normal():
    torch.manual_seed(0)
    x = torch.randn(200, 1).abs() + 0.1 * torch.randn(200, 1)
    gaps = []
    for encoder in (
        guides.DiagonalNormal(1, 1, networks.mlp([16])),
        guides.MixtureOfNormals(1, 1, networks.mlp([16]), num_components=2),
    ):
        vae = pv.VAE(priors.StandardNormal(1), encoder, FOLD)
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
        pv.fit(vae.model, vae.guide, x, epochs=600, lr=1e-2, elbo=elbo)
        gaps.append(float(pv.exact.kl(vae.model, vae.guide, x).mean()))
    assert gaps[1] < 0.2
    assert gaps[0] > gaps[1] + 0.15
