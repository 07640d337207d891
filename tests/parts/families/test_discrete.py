"""Families of classes and counts at any output of a network, and the order of their logits."""

from functools import partial

import pytest
import torch

from pyro_vae import families

FAMILIES = {
    "Categorical": lambda: families.Categorical(2, 3),
    "DiscretizedLogisticMixture": lambda: families.DiscretizedLogisticMixture(2, 3),
    "Ordinal": lambda: families.Ordinal(2, 3),
    "Poisson": lambda: families.Poisson(2),
    "ZeroInflated": lambda: families.ZeroInflated(families.Poisson(2)),
    "ZeroInflated, overdispersed": lambda: families.ZeroInflated(families.NegativeBinomial(2)),
    "Columns": lambda: families.Columns([families.Ordinal(1, 4), families.ZeroInflated(families.Poisson(1))]),
    "NegativeBinomial": lambda: families.NegativeBinomial(2, "network"),
    "StudentT": lambda: families.StudentT(2, df="network", scale="network", min_scale=1e-3),
    "Normal": lambda: families.Normal(2, min_scale=1e-3),
}


@pytest.mark.filterwarnings("ignore:min_scale")
@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_density_and_gradient_are_finite_at_any_output_of_a_network(build, size):
    family = build()
    for corner in torch.cartesian_prod(*[torch.tensor([-size, size])] * family.num_raw):
        raw = corner.clone().requires_grad_()
        q = family(raw)
        for x in (torch.zeros(2), torch.tensor([0.0, 2.0])):
            log_prob = q.log_prob(x)
            assert log_prob.isfinite()
            assert torch.autograd.grad(log_prob, raw, retain_graph=True)[0].isfinite().all()
        assert q.mean.isfinite().all()
        assert q.sample().isfinite().all()


def test_logits_of_classes_come_as_channels_do():
    family = families.Categorical((2, 2), num_classes=3)
    raw = torch.randn(5, 12)
    channels = raw.reshape(5, 3, 2, 2)
    torch.testing.assert_close(family(raw).base_dist.logits, channels.movedim(1, -1).log_softmax(-1))


@pytest.mark.parametrize("latent", [3, (3,), (2, 1), (2, 2, 2)])
def test_one_hot_families_need_variables_and_classes(latent):
    for build in (families.OneHotCategorical, partial(families.RelaxedOneHotCategorical, temperature=0.5)):
        with pytest.raises(ValueError, match=r"`event_shape` must be \(n, k\), n one-hot variables .* got"):
            build(latent)


@pytest.mark.filterwarnings("ignore:min_scale")
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_the_density_of_an_amount_and_its_gradient_are_finite_at_any_output_of_a_network(size):
    family = families.LogNormal(1, min_scale=1e-3)
    for corner in torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * 2):
        raw = corner.clone().requires_grad_()
        for x in (1e-30, 1.0, 1e30):
            log_prob = family(raw).log_prob(torch.tensor([x]))
            assert log_prob.isfinite()
            assert torch.autograd.grad(log_prob, raw)[0].isfinite().all()


@pytest.mark.parametrize("num_levels", [2, 3, 7])
def test_levels_start_alike_and_cut_points_increase_at_any_parameters(num_levels):
    family = families.Ordinal(3, num_levels)
    probs = family(torch.zeros(3)).base_dist.probs
    torch.testing.assert_close(probs, torch.full((3, num_levels), 1 / num_levels))
    for size in (1.0, 30.0, 90.0):
        with torch.no_grad():
            family.raw_cuts.normal_().mul_(size)
            family.raw_cuts[:, 1:].clamp_(max=4.0)
        assert (family.cuts().diff(dim=-1) > 0).all()
        assert family(torch.randn(3)).log_prob(torch.zeros(3)).isfinite()


@pytest.mark.parametrize("gate", [0.0, 1.0, 1.5, -0.1, True, "all", None])
def test_what_is_no_probability_of_a_zero_is_refused(gate):
    with pytest.raises(ValueError, match=f"`gate` must be .*probability.*got {gate!r}"):
        families.ZeroInflated(families.Poisson(1), gate)
