"""Relaxed families: temperature, discrete twin, and soft and hard readings."""

import pytest
import torch
from part_cases import RELAXED, Case


@pytest.mark.parametrize("build", RELAXED)
def test_temperature_is_in_the_state_dict(build):
    case = Case(build)
    state = case.part.state_dict()
    assert state["family.temperature"].shape == ()
    state["family.temperature"] = torch.tensor(3.0)
    case.part.load_state_dict(state)
    assert (case.part(*case.contexts(2)).base_dist.temperature == 3).all()


@pytest.mark.parametrize("build", RELAXED)
def test_discrete_twin_has_the_very_same_parameters(build):
    part = build()
    twin = part.discrete()
    assert [id(p) for p in twin.parameters()] == [id(p) for p in part.parameters()]
    with torch.no_grad():
        for tensor in (*part.parameters(), *(b for name, b in part.named_buffers() if "raw" in name)):
            tensor.copy_(torch.randn(tensor.shape))
    contexts = [] if not hasattr(part, "context_shape") else [torch.randn(4, *part.context_shape)]
    relaxed = part(*contexts).base_dist.logits
    discrete = twin(*contexts).base_dist.logits
    torch.testing.assert_close(discrete, relaxed)
    assert twin(*contexts).has_enumerate_support


@pytest.mark.parametrize("build", RELAXED)
def test_soft_reading_lies_in_the_hull_of_the_twins_support_and_hard_reading_on_it(build):
    case = Case(build)
    value = case.part(*case.contexts()).sample((1000,))
    soft, hard = case.part.family.soft(value), case.part.family.hard(value)
    assert ((soft >= 0) & (soft <= 1)).all()
    assert case.part.discrete()(*case.contexts()).support.check(hard).all()
    if hard.dim() == 3:
        torch.testing.assert_close(soft.sum(-1), torch.ones(soft.shape[:-1], dtype=soft.dtype))
        assert torch.equal(soft.argmax(-1), hard.argmax(-1))
    else:
        assert torch.equal(soft > 0.5, hard.bool())


@pytest.mark.parametrize("build", [p for p in RELAXED if p.id.startswith("priors.")])
def test_prior_reads_soft_or_straight_through(build):
    prior = Case(build).part
    value = prior().sample((50,)).requires_grad_()
    soft = prior.family.soft(value)
    read = prior.read(value)
    weight = torch.randn_like(soft)
    (soft_gradient,) = torch.autograd.grad((weight * soft).sum(), value)
    (gradient,) = torch.autograd.grad((weight * read).sum(), value)
    assert torch.equal(read, prior.family.hard(value) if prior.straight_through else soft)
    assert torch.equal(gradient, soft_gradient)
    assert gradient.abs().max() > 0
