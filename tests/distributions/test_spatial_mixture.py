"""The spatial mixture: the slot of each pixel is summed out exactly, and its posterior is Bayes' rule."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae.distributions import SpatialMixture, find_extent

K, C, P = 3, 2, 4
DEVIATIONS = 5.0


def mixture(batch=(), scale=0.3, seed=0):
    torch.manual_seed(seed)
    logits, loc = torch.randn(*batch, K, P).double(), torch.randn(*batch, K, C, P).double()
    return SpatialMixture(logits.requires_grad_(), loc.requires_grad_(), scale)


def test_the_density_is_the_sum_over_all_assignments_of_pixels_to_slots():
    q = mixture()
    x, log_masks = torch.randn(C, P).double(), q.logits.log_softmax(0)
    terms = []
    for slots in itertools.product(range(K), repeat=P):
        log_prior = sum(log_masks[slot, pixel] for pixel, slot in enumerate(slots))
        image = torch.stack([q.loc[slot, :, pixel] for pixel, slot in enumerate(slots)], 1)
        terms.append(log_prior + dist.Normal(image, 0.3).log_prob(x).sum())
    torch.testing.assert_close(q.log_prob(x), torch.stack(terms).logsumexp(0))


def test_it_is_torchs_mixture_of_pixels_with_its_gradients_and_moments():
    q = mixture(batch=(5,))
    pixels = dist.Normal(q.loc.permute(0, 3, 1, 2), 0.3).to_event(1)
    other = dist.MixtureSameFamily(torch.distributions.Categorical(logits=q.logits.mT), pixels)
    x = torch.randn(7, 5, C, P).double()
    found, expected = q.log_prob(x), other.log_prob(x.mT).sum(-1)
    torch.testing.assert_close(found, expected)
    for each in zip(*(torch.autograd.grad(value.sum(), [q.logits, q.loc]) for value in (found, expected)), strict=True):
        torch.testing.assert_close(*each)
    torch.testing.assert_close(q.mean, other.mean.mT)
    torch.testing.assert_close(q.variance, other.variance.mT)


def test_the_responsibilities_are_bayes_rule_and_add_up_to_one():
    q = mixture(batch=(5,))
    x = torch.randn(5, C, P).double()
    joint = q.masks * dist.Normal(q.loc, 0.3).log_prob(x[:, None]).sum(2).exp()
    torch.testing.assert_close(q.responsibilities(x), joint / joint.sum(1, keepdim=True))
    torch.testing.assert_close(q.masks.sum(1), torch.ones(5, P).double())


def test_draws_have_the_moments_of_the_distribution():
    q, num = mixture(batch=(2,)), 20_000
    torch.manual_seed(1)
    draws = q.sample((num,))
    assert draws.shape == (num, 2, C, P)
    assert bool(((draws.mean(0) - q.mean).abs() < DEVIATIONS * (q.variance / num).sqrt()).all())
    squares = (draws - q.mean) ** 2
    assert bool(((squares.mean(0) - q.variance).abs() < DEVIATIONS * squares.std(0) / math.sqrt(num)).all())


def test_channels_of_a_pixel_come_from_the_same_slot():
    loc = torch.tensor([-10.0, 10.0])[:, None, None].expand(2, C, P)
    torch.manual_seed(0)
    draws = SpatialMixture(torch.zeros(2, P), loc, 0.1).sample((50,))
    assert torch.equal(draws[:, 0] > 0, draws[:, 1] > 0)
    assert 0 < (draws > 0).double().mean() < 1


def test_masks_that_exclude_a_slot_keep_their_digits_in_float32():
    logits = torch.tensor([[200.0], [-200.0]])
    q = SpatialMixture(logits, torch.tensor([0.0, 1.0])[:, None, None].requires_grad_(), 0.01)
    found = q.log_prob(torch.ones(1, 1))  # 400 nats by the mask, or 5000 by the distance
    expected = -400 - math.log(0.01) - 0.5 * math.log(2 * math.pi)
    assert found.item() == pytest.approx(expected, abs=1e-3)
    assert torch.autograd.grad(found, q.loc)[0].isfinite().all()


def test_it_expands_with_its_batch_and_validates_values():
    q = mixture().expand((6, 5))
    assert (q.batch_shape, q.event_shape) == ((6, 5), (C, P))
    x = torch.randn(6, 5, C, P).double()
    torch.testing.assert_close(q.log_prob(x), mixture().log_prob(x))
    assert find_extent(mixture()).low.shape == (C, P)
    checked = SpatialMixture(torch.zeros(K, P), torch.zeros(K, C, P), 0.3, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(torch.full((C, P), torch.nan))
