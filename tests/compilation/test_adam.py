"""The Adam of captured steps gives the numbers of torch's Adam."""

import pytest
import torch

from pyro_vae.compilation.adam import CapturableAdam

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}


def weights():
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4,), ())]


def trained(make, closure):
    """Take forty steps: the second weight has no gradient in some, the third joins late with its own settings."""
    first, second, third = weights()
    optimizer = make([first, second], **SETTINGS)

    def loss():
        optimizer.zero_grad(set_to_none=True)
        value = (first - 1).square().sum() + (third * first).sum().tanh()
        if step % 3:
            value = value + (second + 2).abs().sum()
        value.backward()
        return value

    losses = []
    for step in range(40):
        if step == 10:
            optimizer.add_param_group({"params": [third], "lr": 0.01, "betas": (0.5, 0.9)})
        losses.append(optimizer.step(loss).item() if closure else loss().item())
        if not closure:
            optimizer.step()
    return losses, [first, second, third]


@pytest.mark.parametrize("closure", [False, True])
def test_steps_are_those_of_torch_for_parameters_that_pause_or_join_late(closure):
    losses, ours = trained(CapturableAdam, closure)
    expected, theirs = trained(torch.optim.Adam, closure)
    assert losses == pytest.approx(expected, rel=1e-10)
    for weight, other, start in zip(ours, theirs, weights(), strict=True):
        assert not torch.allclose(other, start)
        torch.testing.assert_close(weight, other, rtol=1e-10, atol=1e-12)
