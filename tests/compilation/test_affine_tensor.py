"""Tensors that are affine in variables: their functions are those of the numbers, and nothing else is accepted."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, layer_norm, linear, pad

from pyro_vae.compilation.affine_tensor import AffineTensor, NotAffineError, affine_form, affine_variables

torch.manual_seed(0)
LINEAR, WEIGHT, TALL = nn.Linear(4, 4), torch.randn(2, 3, 5), torch.randn(5, 4)
CHOSEN = torch.rand(5, 4) > 0.5


def in_place(z):
    h = LINEAR(z)
    h += 1
    h[:, 0] = z[:, 1]
    return h


def through_views(z):
    h = z.clone()
    h.copy_(2 * z)
    whole = h.view(-1)
    h[0] = z[1]
    h[1].zero_()
    return whole.view_as(z)


AFFINE = {
    "a layer": LINEAR,
    "a layer on a vector": lambda z: LINEAR(z[1]),
    "dropout in evaluation mode": lambda z: nn.Dropout(0.5).eval()(LINEAR(z)),
    "a residual": lambda z: torch.cat([z + LINEAR(z), z.sum(-1, keepdim=True) / 3], -1),
    "a masked weight": lambda z: linear(z, LINEAR.weight * torch.ones(4, 4).tril(), LINEAR.bias),
    "einsum": lambda z: torch.einsum("nd,dk->nk", z, torch.ones(4, 3)) @ torch.ones(3, 2),
    "einsum of a vector": lambda z: torch.einsum("d,dk->k", z[0], torch.ones(4, 3)),
    "tensordot": lambda z: torch.tensordot(z, torch.ones(4, 2, 3), 1),
    "a vector on the left": lambda z: z[0] @ WEIGHT[0, 0, :4],
    "a vector and a matrix": lambda z: z[0] @ TALL.T,
    "a matrix and a vector": lambda z: z @ TALL[0] + z.mv(TALL[1]),
    "a batch of matrices": lambda z: WEIGHT @ z,
    "a batch on the right": lambda z: z.T[None] @ WEIGHT.mT,
    "a batch and a vector": lambda z: WEIGHT @ z[:, 0],
    "a vector and a batch": lambda z: z[:, 0] @ WEIGHT.mT,
    "addmm": lambda z: torch.addmm(z, torch.ones(5, 5), z, beta=0.5, alpha=2),
    "addmm of constants": lambda z: torch.addmm(z, torch.ones(5, 5), TALL, beta=2),
    "addcmul": lambda z: torch.addcmul(z, z, TALL, value=0.3),
    "a choice by a constant": lambda z: torch.where(CHOSEN, z, torch.full((), 7.0)),
    "a choice between numbers": lambda z: torch.where(CHOSEN, 2 * z, torch.arange(4)),
    "filled": lambda z: z.masked_fill(CHOSEN, 3.0) - z.tril(),
    "rows by index": lambda z: z[torch.tensor([0, 0, 1, 3, 2])] * torch.arange(5.0)[:, None] - z.mean(0),
    "gathered": lambda z: z.gather(1, torch.tensor([[0], [3], [1], [1], [2]])),
    "put": lambda z: torch.index_put(z, (torch.tensor([1, 2]),), z[3]),
    "stacked": lambda z: torch.stack([z[0], z[1], torch.ones(4)], -1),
    "sums along an axis": lambda z: z.cumsum(0) + z.cumsum(1) - z.mean(),
    "constants": lambda z: 1 - z + torch.zeros_like(z) + z.new_tensor(3.0),
    "padded": lambda z: pad(z, (1, 2), value=2.0),
    "expanded": lambda z: z.unsqueeze(1)[..., None].expand(5, 1, 4, 3),
    "wider": lambda z: z.double() * TALL.double(),
    "moved": lambda z: z.roll(1, 0) - z.flip(1) + z.transpose(0, 1).contiguous().view(5, 4),
    "split": lambda z: z.split(2, 1)[1].unbind(0)[2],
    "differences": lambda z: z.diff(dim=0),
    "copied": lambda z: copy.deepcopy(z) - z.data.clone(),
    "in place": in_place,
    "through views": through_views,
    "scaled in place": lambda z: z.clone().mul_(3).t(),
}


@pytest.mark.parametrize("function", AFFINE.values(), ids=AFFINE)
def test_the_functions_of_an_affine_result_are_those_of_numbers(function):
    with torch.no_grad():
        found, z = function(affine_variables((5, 4), 3, 25, torch.zeros(()))), torch.randn(5, 4)
        assert isinstance(found, AffineTensor)
        expected = function(z.clone())
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        form = affine_form(found, found.shape, 25)
        others = torch.zeros(3), torch.zeros(2)
        numbers = form.constant + form.matrix @ torch.cat([others[0], z.flatten(), others[1]]).double().numpy()
        torch.testing.assert_close(torch.tensor(numbers).view_as(expected), expected.double(), rtol=1e-4, atol=1e-5)


NOT_AFFINE = {
    "a bend": lambda z: z.relu(),
    "a clamp": lambda z: z.clamp(-50, 50),
    "a layer norm": lambda z: layer_norm(z, (4,)),
    "batch norm in training mode": lambda z: batch_norm(z, None, None, training=True),
    "a square": lambda z: z * z,
    "a product with itself": lambda z: z @ z.T,
    "a quotient": lambda z: 1 / z,
    "a rounded quotient": lambda z: torch.div(z, 3, rounding_mode="floor"),
    "a choice": lambda z: torch.where(z > 3, z, 2 * z),
    "rounding": lambda z: z.half().float(),
    "whole numbers": lambda z: z.long(),
    "a branch": lambda z: z if z.max() > 9 else 2 * z,
    "a number": lambda z: float(z[0, 0]) * torch.ones(2),
    "an index": lambda z: TALL[z[:, 0] > 0],
    "values written to a constant": lambda z: torch.zeros(5, 4).copy_(z),
    "a bend in place": lambda z: z.clone().relu_(),
    "data": lambda z: z.data.abs(),
}
VALUES = {
    "NumPy": lambda z: torch.from_numpy(np.asarray(z)),
    "a list": lambda z: torch.tensor(z.tolist()),
    "a list of numbers": lambda z: torch.tensor([z[0, 0], z[1, 1]]),
}


@pytest.mark.parametrize("function", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_other_operations_are_refused(function):
    with torch.no_grad(), pytest.raises(NotAffineError):
        function(affine_variables((5, 4), 0, 20, torch.zeros(())))


@pytest.mark.parametrize("function", VALUES.values(), ids=VALUES)
def test_there_are_no_values_to_read(function):
    with torch.no_grad(), pytest.raises(RuntimeError):
        function(affine_variables((5, 4), 0, 20, torch.zeros(())))
