"""The scale of continuous families: its floor, and the warning where it binds."""

import math
import warnings

import pytest
import torch

from pyro_vae import families


@pytest.mark.parametrize("scale", ["shared", "per_dimension", "network"])
def test_scale_never_falls_below_its_floor_and_binding_is_warned_about(scale):
    family = families.Normal(3, scale=scale, min_scale=0.1)
    raw = torch.zeros(5, family.num_raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family(raw)
    if scale == "network":
        raw[:, 4:5] = -30.0
    else:
        family.log_scale.data.reshape(-1)[:1] = -30.0
    with pytest.warns(UserWarning, match=r"min_scale = 0\.1 binds in (1|all) of 3 dimensions"):
        q = family(raw)
    assert q.stddev.min().item() == pytest.approx(0.1)


def test_scale_is_the_exponential_above_its_floor_so_that_a_bound_scale_can_still_learn():
    family = families.Normal(1, scale="network", min_scale=0.1)
    raw = torch.tensor([[0.0, -2.0], [0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    scale = family(raw).stddev[:, 0]
    torch.testing.assert_close(scale, raw[:, 1].exp() + 0.1)
    torch.testing.assert_close(torch.autograd.grad(scale.sum(), raw)[0][:, 1], raw[:, 1].exp())


def test_a_floor_of_zero_never_binds():
    family = families.Normal(2, scale="shared", min_scale=0.0)
    family.log_scale.data.fill_(-20.0)
    assert family(torch.zeros(2)).stddev.max().item() == pytest.approx(math.exp(-20), rel=1e-5)
