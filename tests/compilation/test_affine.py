"""The degree of a function in its argument, read from its graph: 1 only if it is affine everywhere."""

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, relu

from pyro_vae.compilation.affine import AffineGraph

torch.manual_seed(0)
LINEAR, CONV, BATCH_NORM = nn.Linear(4, 4), nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(4).eval()


def in_place(z):
    h = LINEAR(z)
    h += 1
    h[:, 0] = z[:, 1]
    return h


def hidden_bend(z):
    h = LINEAR(z)
    h[:, 0] = relu(z[:, 1])
    return h


def bend_through_a_view(z):
    h = torch.zeros_like(z)
    whole = h.view(-1)
    h.copy_(z.abs())
    return whole.view_as(z)


AFFINE = {
    "layers": lambda z: BATCH_NORM(CONV(z[:, None]).flatten(1)[:, :4]),
    "dropout in evaluation mode": lambda z: nn.Dropout(0.5).eval()(LINEAR(z)),
    "a residual": lambda z: torch.cat([z + LINEAR(z), z.sum(-1, keepdim=True) / 3], -1),
    "a masked weight": lambda z: nn.functional.linear(z, LINEAR.weight * torch.ones(4, 4).tril(), LINEAR.bias),
    "products of any name": lambda z: torch.einsum("nd,dk->nk", z, torch.ones(4, 3)) @ torch.ones(3, 2),
    "in place": in_place,
}
NOT_AFFINE = {
    "a bend far out": lambda z: z + relu(z - 1e6),
    "a clamp": lambda z: z.clamp(-50, 50),
    "a layer norm": lambda z: layer_norm(z, (4,)),
    "a square": lambda z: z * z,
    "a product with itself": lambda z: z @ z.T,
    "a quotient": lambda z: 1 / z,
    "a choice": lambda z: torch.where(z > 3, z, 2 * z),
    "rounding": lambda z: z.half().float(),
    "batch norm in training mode": lambda z: nn.functional.batch_norm(z, None, None, training=True),
    "in place": hidden_bend,
    "through a view": bend_through_a_view,
}


@pytest.mark.parametrize("function", AFFINE.values(), ids=AFFINE)
def test_affine_functions_have_degree_1_and_their_values_in_float64(function):
    with torch.no_grad():
        graph = AffineGraph(lambda z: [function(z), torch.ones(2)], torch.randn(5, 4))
        assert graph.degrees == [1, 0]
        z, other = torch.randn(2, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(graph(z)[0].float(), function(z.float()), rtol=1e-4, atol=1e-5)
        middle = (graph(z)[0] + graph(other)[0]) / 2
        torch.testing.assert_close(graph((z + other) / 2)[0], middle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_other_functions_have_no_degree(function):
    with torch.no_grad():
        assert AffineGraph(lambda z: [function(z)], torch.randn(5, 4)).degrees == [None]


@pytest.mark.parametrize("function", [lambda z: torch.from_numpy(z.numpy()), lambda z: z if z.max() > 9 else 2 * z])
def test_functions_that_read_values_are_refused(function):
    with pytest.raises(ValueError, match="reads the value of a tensor"):
        AffineGraph(lambda z: [function(z)], torch.randn(5, 4))


def test_tensors_that_the_function_changes_are_left_as_they_are():
    count = torch.zeros(())
    graph = AffineGraph(lambda z: [z + count.add_(1)], torch.ones(2))
    graph(torch.ones(2))
    assert count == 0
