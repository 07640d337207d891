"""Typicality and the area under the ROC curve, compared with closed forms, all pairs, scikit-learn and resampling."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def scores(seed, normal=40, anomalous=30):
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (2 * torch.randn(size, generator=generator) + shift).round() for size, shift in ((normal, 0), (anomalous, 1))
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_of_all_pairs_and_of_scikit_learn(seed):
    normal, anomalous = scores(seed)
    pairs = (anomalous[:, None] > normal).double() + 0.5 * (anomalous[:, None] == normal)
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))])
    found = pv.auroc(normal, anomalous)
    assert found.value == pytest.approx(pairs.mean().item(), abs=1e-12)
    assert found.value == pytest.approx(roc_auc_score(labels, torch.cat([normal, anomalous])), abs=1e-12)
    assert pv.auroc(anomalous, normal) == pytest.approx((1 - found.value, found.standard_error))
    assert pv.auroc(normal.exp(), anomalous.exp()) == pytest.approx(found), "an increasing function changes nothing"


def test_the_standard_error_is_the_spread_over_new_data_around_the_closed_form():
    torch.manual_seed(0)
    found = [pv.auroc(torch.randn(50), 1 + torch.randn(80)) for _ in range(400)]
    areas = torch.tensor([one.value for one in found]).double()
    expected = 0.5 * (1 + math.erf(1 / 2))  # P(1 + e > e') = Phi(1 / sqrt 2)
    assert areas.mean().item() == pytest.approx(expected, abs=5 * areas.std().item() / 20)
    claimed = torch.tensor([one.standard_error for one in found]).double().square().mean().sqrt()
    assert claimed.item() == pytest.approx(areas.std().item(), rel=0.15)


def test_scores_that_separate_all_or_none():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, torch.inf])
    assert pv.auroc(low, high) == (1.0, 0.0)
    assert pv.auroc(high, low) == (0.0, 0.0)
    assert pv.auroc(torch.zeros(5), torch.zeros(5)) == (0.5, 0.0)


def test_the_score_of_a_normal_in_many_dimensions_is_high_at_its_mode():
    """log p of N(0, I) in 1000 dimensions: draws are at a distance of sqrt(1000), and the mode is the anomaly."""
    torch.manual_seed(0)
    p = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1000), 1.0), 1)
    reference, draws = p.log_prob(p.sample((2000,))), p.sample((500,))
    mode = p.log_prob(0.01 * p.sample((500,)))
    assert pv.auroc(-p.log_prob(draws), -mode).value == 0, "the density of the mode is the highest"
    assert pv.auroc(pv.typicality(p.log_prob(draws), reference), pv.typicality(mode, reference)).value == 1
    # -log p = D/2 log 2 pi + r² / 2, and r² of the mode is about 0: the score is D / 2.
    assert pv.typicality(mode, reference).mean().item() == pytest.approx(500, abs=3)


def test_a_group_has_the_score_of_its_mean_and_varies_less():
    torch.manual_seed(0)
    reference, log_p = torch.randn(10_000) - 5, torch.randn(9001) - 5
    groups = pv.typicality(log_p, reference, group_size=9)
    assert groups.shape == (1000,)
    expected = (log_p[9:18].double().mean() - reference.double().mean()).abs()
    torch.testing.assert_close(groups[1], expected)
    ratio = groups.mean() / pv.typicality(log_p, reference).mean()
    assert ratio.item() == pytest.approx(1 / 3, rel=0.1)


def test_the_results_of_log_evidence_are_taken_as_they_are():
    torch.manual_seed(0)
    net, x = networks.linear(), torch.randn(20, 2)
    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    found = pv.log_evidence(vae.model, vae.guide, x, num_samples=20)
    log_p = found.log_evidence
    assert torch.equal(pv.typicality(found, found), pv.typicality(log_p, log_p))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.typicality([1.0], torch.zeros(3)), "`log_evidence` must be the result of pv.log_evidence"),
        (lambda: pv.typicality(torch.zeros(3), torch.tensor([math.nan])), "`reference` must be .*finite numbers"),
        (lambda: pv.typicality(torch.zeros(3, 2), torch.zeros(3)), r"`log_evidence` must be .*got .*3, 2"),
        (lambda: pv.typicality(torch.zeros(3), torch.zeros(3), 4), "`group_size` must be at most .*3, got 4"),
        (lambda: pv.auroc(torch.zeros(1), torch.zeros(3)), r"`normal` must be scores, numbers \(N,\) with N >= 2"),
        (lambda: pv.auroc(torch.zeros(3), torch.full((3,), math.nan)), "`anomalous` must be scores"),
    ],
)
def test_what_are_no_scores_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
