"""Tables with columns of several kinds: log p(x) by SciPy, what is missing, and everything that takes a model."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from pairs import NET, gaussian
from scipy.special import expit, softmax
from torch import nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors

NAN = math.nan
UNLIKELY = 1e-5
SMOOTH = networks.mlp([6], nn.Tanh)


def columns():
    """One column of each kind."""
    return {
        "height": families.Normal(1, scale="shared"),
        "error": families.StudentT(1, scale=0.7),
        "income": families.LogNormal(1, scale="network"),
        "visits": families.Poisson(1),
        "reads": families.NegativeBinomial(1, dispersion=0.4),
        "claims": families.ZeroInflated(families.Poisson(1)),
        "sex": families.Bernoulli(1),
        "species": families.Categorical(1, 3),
        "grade": families.Ordinal(1, 4),
    }


def decoder(latent=1, network=SMOOTH, spread=0.2, **options):
    part = likelihoods.Columns(latent, columns(), network, **options)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return part


def table_vae(latent=1):
    encoder = guides.DiagonalNormal(9, latent, networks.with_missing(NET))
    return gaussian(latent, 9, encoder=encoder, decoder=decoder(latent))


def holed(x, share=0.3):
    return x.masked_fill(torch.rand(x.shape) < share, NAN)


@torch.no_grad()
def log_prob_by_scipy(part, z, x):
    """Return log p(x | z) of each column by SciPy, ``(len(z), 9)``, from the network's outputs in their order."""
    raw = part.raw_outputs(torch.as_tensor(z)).numpy().T
    height, error, income, log_scale, visits, reads, claims, gate, sex, *species, grade = raw
    options = part.family.families
    scale, df = float(options[0].log_scale.exp()), 2 + float(options[1].log_df.exp())
    steps = options[8].raw_cuts[0].numpy()
    cuts = np.cumsum([steps[0], *(np.exp(steps[1:]) + 1e-4)])
    below = np.stack([np.zeros_like(grade), *(expit(cut - grade) for cut in cuts), np.ones_like(grade)])
    theta, pi = 1 / 0.4, expit(gate)
    masses = [
        scipy.stats.norm.pdf(x[0], height, scale),
        scipy.stats.t.pdf(x[1], df, error, 0.7),
        scipy.stats.lognorm.pdf(x[2], np.exp(log_scale), scale=np.exp(income)),
        scipy.stats.poisson.pmf(x[3], np.exp(visits)),
        scipy.stats.nbinom.pmf(x[4], theta, theta / (theta + np.exp(reads))),
        pi * (x[5] == 0) + (1 - pi) * scipy.stats.poisson.pmf(x[5], np.exp(claims)),
        np.where(x[6] == 1, expit(sex), expit(-sex)),
        softmax(species, axis=0)[0 if np.isnan(x[7]) else int(x[7])],
        np.stack([high - low for low, high in pairwise(below)])[0 if np.isnan(x[8]) else int(x[8])],
    ]
    return np.where(np.isnan(x), 0.0, np.log(np.stack(masses, -1)))


@pytest.mark.parametrize("latent", [1, 2])
def test_log_evidence_of_a_mixed_table_with_holes_is_that_of_scipys_quadrature(latent):
    torch.manual_seed(latent)
    vae = table_vae(latent).double()
    x = holed(vae.generate(12), 0.25)
    x[0], x[1] = NAN, vae.generate(1)[0]
    rows = x.numpy()

    def density(row, *z):
        point = np.array(z)[None]
        log_prior = scipy.stats.norm.logpdf(point).sum()
        return np.exp(log_prior + log_prob_by_scipy(vae.decoder, point, rows[row]).sum())

    if latent == 1:
        expected = [scipy.integrate.quad(partial(density, row), -12, 12, epsabs=0, limit=200)[0] for row in range(12)]
    else:
        nodes, weights = scipy.special.roots_legendre(160)
        grid = np.stack(np.meshgrid(9 * nodes, 9 * nodes), -1).reshape(-1, 2)
        log_weights = np.log(81 * np.outer(weights, weights)).ravel() + scipy.stats.norm.logpdf(grid).sum(1)
        each = [log_prob_by_scipy(vae.decoder, grid, row).sum(1) for row in rows]
        expected = [np.exp(log_p + log_weights).sum() for log_p in each]
    found = pv.exact.log_evidence(vae.model, x)
    np.testing.assert_allclose(found.numpy(), np.log(expected), atol=2e-4)
    assert abs(found[0]) < 2e-4  # nothing was observed


@pytest.mark.parametrize("place", [3, 5, 6, 7, 8])
def test_a_missing_column_is_one_that_is_summed_out(place):
    torch.manual_seed(0)
    vae = table_vae().double()
    x = vae.generate(5)
    hole = x.clone()
    hole[:, place] = NAN
    states = torch.arange({6: 2, 7: 3, 8: 4}.get(place, 300), dtype=torch.float64)
    whole = x.repeat(len(states), 1)
    whole[:, place] = states.repeat_interleave(5)
    each = pv.exact.log_evidence(vae.model, whole).reshape(-1, 5)
    torch.testing.assert_close(each.logsumexp(0), pv.exact.log_evidence(vae.model, hole), atol=3e-4, rtol=0)


def test_columns_of_normals_are_the_linear_gaussian_model_of_one_normal():
    torch.manual_seed(0)
    one = likelihoods.Normal(2, 3, networks.linear(), scale="per_dimension", missing=True)
    table = likelihoods.Columns(2, [families.Normal(1, scale="shared", min_scale=1e-3)] * 3, networks.linear())
    table.network.load_state_dict(one.network.state_dict())
    x = holed(torch.randn(30, 3))
    reading = guides.DiagonalNormal(3, 2, networks.with_missing(NET))
    ours, theirs = (gaussian(2, 3, encoder=reading, decoder=part) for part in (table, one))
    for answer in (pv.exact.log_evidence, lambda model, x: pv.exact.posterior(model, x).mean):
        torch.testing.assert_close(answer(ours.model, x), answer(theirs.model, x), atol=1e-5, rtol=1e-5)
    assert isinstance(pv.exact.posterior(ours.model, x), dist.MultivariateNormal)


def test_columns_are_found_by_name_and_in_order():
    p = decoder()(torch.zeros(5, 1))
    assert list(p.columns) == list(columns())
    x = p.sample((7,))
    assert (p.batch_shape, p.event_shape, x.shape) == ((5,), (9,), (7, 5, 9))
    each = [p[name].log_prob(x[..., place : place + 1]) for place, name in enumerate(p.columns)]
    torch.testing.assert_close(p.log_prob(x), sum(each))
    torch.testing.assert_close(p.mean[:, 6:7], p["sex"].mean)
    with pytest.raises(KeyError, match=r"`name` must be one of the columns \['height', .*got 'age'"):
        p["age"]
    unnamed = likelihoods.Columns(1, list(columns().values()), NET)(torch.zeros(1))
    assert list(unnamed.columns) == [str(place) for place in range(9)]


def test_columns_with_one_family_share_its_parameters():
    answers = families.Ordinal(1, 5)
    part = likelihoods.Columns(1, {"first": answers, "second": answers}, NET)
    assert [name for name, _ in part.family.named_parameters()] == ["families.0.raw_cuts"]


BAD = {
    "income": (0.0, "positive numbers", "0"),
    "visits": (-1.0, "counts 0, 1, 2, ...", "-1"),
    "reads": (0.5, "counts 0, 1, 2, ...", "0.5"),
    "claims": (1.5, "counts 0, 1, 2, ...", "1.5"),
    "sex": (2.0, "0 or 1", "2"),
    "species": (3.0, "whole numbers from 0 to 2", "3"),
    "grade": (-1.0, "whole numbers from 0 to 3", "-1"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("missing", [False, True])
def test_what_a_column_cannot_hold_is_refused_with_its_name_and_row(name, missing):
    part = decoder(missing=missing)
    p = part(torch.zeros(6, 1))
    x, place = p.sample(), list(columns()).index(name)
    value, expected, got = BAD[name]
    x[4, place] = value
    with pytest.raises(ValueError, match=f"column '{name}' must hold {expected}, got {got} at row 4") as caught:
        p.log_prob(x)
    assert ("Alternatives" in str(caught.value)) == (name == "income")
    with pytest.raises(ValueError, match=r"`value` must be rows of 9 columns, \(\*, 9\), got shape \(6, 8\)"):
        p.log_prob(x[:, :8])


def test_data_are_refused_at_the_door_by_column_and_row():
    vae = table_vae()
    x = vae.generate(300)
    bad = x.clone()
    bad[250, 6] = 2.0
    before = [parameter.clone() for parameter in vae.parameters()]
    for work in (
        lambda: pv.exact.log_evidence(vae.model, bad),
        lambda: pv.fit(vae.model, vae.guide, bad, epochs=1, batch_size=20),
        lambda: pv.fit(vae.model, vae.guide, bad, epochs=1),
        lambda: pv.fit(vae.model, vae.guide, x, validation=bad, epochs=1),
    ):
        with pytest.raises(ValueError, match=r"` must hold .*column 'sex' must hold 0 or 1, got 2 at row 250"):
            work()
    assert all(map(torch.equal, before, vae.parameters()))


def test_a_mapped_likelihood_is_that_of_one_draw_at_a_time():
    torch.manual_seed(0)
    part, z = decoder(), torch.randn(7, 5, 1)
    x = holed(part(z[0]).sample())
    with pyro.validation_enabled(False):
        mapped = torch.vmap(lambda one: part(one).log_prob(x))(z)
        torch.testing.assert_close(mapped, torch.stack([part(one).log_prob(x) for one in z]))


class Posterior(nn.Module):
    """The exact p(z | x) of a class, by Bayes' rule; ``bias`` spoils it."""

    def __init__(self, decoder, bias=0.0):
        super().__init__()
        self._decoder, self.bias = [decoder], bias

    def forward(self, x):
        states = torch.eye(3).reshape(3, *[1] * x.dim(), 3).expand(3, *x.shape[:-1], 1, 3)
        log_p = self._decoder[0](states).log_prob(x)
        logits = log_p.movedim(0, -1)[..., None, :] + self.bias * torch.eye(3)[0]
        return dist.OneHotCategorical(logits=logits).to_event(1)


def class_vae(bias=0.0):
    part = decoder((1, 3), networks.linear(), spread=0.7)
    return pv.VAE(priors.OneHotCategorical((1, 3)), Posterior(part, bias), part)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_calibration_finds_the_exact_guide_of_a_mixed_table_sound_and_no_other(bias):
    torch.manual_seed(0)
    vae = class_vae(bias)
    x = holed(vae.generate(100))
    result = pv.calibrate(vae.model, vae.guide, x, num_simulations=400, num_draws=50, seed=0)
    assert (not result.faults) == (bias == 0)


def test_imputed_entries_follow_the_exact_conditional_mass():
    torch.manual_seed(0)
    vae = class_vae()
    x = vae.generate(1)
    x[0, [7, 8]] = NAN
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    whole = x.repeat(12, 1)
    whole[:, 7:] = grid
    mass = (pv.exact.log_evidence(vae.model, whole) - pv.exact.log_evidence(vae.model, x)).exp().double()
    assert mass.sum().item() == pytest.approx(1, abs=1e-4)
    draws = vae.impute(x, 20_000)[:, 0]
    assert torch.equal(draws[:, :7], x[0, :7].expand(20_000, -1))
    counts = (draws[:, None, 7:] == grid).all(-1).sum(0)
    assert counts.sum() == 20_000
    assert scipy.stats.chisquare(counts.numpy(), (20_000 * mass / mass.sum()).numpy()).pvalue > UNLIKELY


def test_intervals_of_imputed_entries_cover_what_was_hidden_at_their_nominal_rate_in_each_kind_of_column():
    torch.manual_seed(0)
    vae = class_vae()
    complete = vae.generate(2000)
    x = holed(complete)
    draws = vae.impute(x, 99)
    below, ties = (draws < complete).sum(0), (draws == complete).sum(0)
    ranks = below + (torch.rand(x.shape) * (ties + 1)).long()  # of 100 equally likely ones, ties at random
    inside = (ranks >= 5) & (ranks < 95)
    for place, name in enumerate(columns()):
        found = inside[:, place][x[:, place].isnan()]
        assert scipy.stats.binomtest(int(found.sum()), len(found), 0.9).pvalue > UNLIKELY, name


def test_every_chapter_takes_a_mixed_table_with_holes(tmp_path):
    torch.manual_seed(0)
    vae = table_vae()
    x = holed(vae.generate(12))
    pv.fit(vae.model, vae.guide, x, epochs=3, batch_size=5)
    evidence = pv.exact.log_evidence(vae.model, x)
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=2000, seed=0)
    assert ((estimate.log_evidence - evidence).abs() < 6 * estimate.standard_error + 1e-3).all()
    annealed = pv.annealed_log_evidence(vae.model, vae.guide, x[:4], num_chains=20, num_temperatures=20, seed=0)
    assert (annealed.log_evidence - evidence[:4]).abs().max() < 0.5
    gap = evidence - pv.exact.elbo(vae.model, vae.guide, x) - pv.exact.kl(vae.model, vae.guide, x)
    assert gap.abs().max() < 2e-3
    tree = pv.to_datatree(vae.model, vae.guide, x, draws=4)
    drawn = torch.as_tensor(tree["posterior_predictive"]["x"].values)
    assert drawn.shape == (1, 4, 12, 9)
    assert vae.decoder(torch.zeros(12, 1)).support.check(drawn).all()
    assert drawn.isfinite().all()
    vae.save(tmp_path / "table.pt")
    again = pv.VAE.load(tmp_path / "table.pt")
    assert list(again.decoder(torch.zeros(1)).columns) == list(columns())
    assert torch.equal(pv.exact.log_evidence(again.model, x), evidence)


@pytest.mark.slow
def test_a_mixed_table_is_inspected_and_no_part_is_skipped():
    torch.manual_seed(0)
    vae = table_vae()
    x = holed(vae.generate(12))
    inspection = pv.inspect(vae.model, vae.guide, x, num_samples=10, num_simulations=10, max_rows=3, max_refined=1)
    assert not inspection.skipped


def test_a_column_of_soft_targets_is_no_likelihood():
    part = likelihoods.Columns(1, [families.Normal(1), families.SoftTargetBernoulli(1)], NET)
    assert not pv.distributions.is_normalized(part(torch.zeros(1)))
    assert pv.distributions.is_normalized(decoder()(torch.zeros(1)))
