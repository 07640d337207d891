"""A lower bound on the time: the matrix products of the networks alone, forward and backward, into allocated memory."""

import torch
from cases import Case
from inputs import Inputs, Losses, Tick
from torch import Tensor

Product = tuple[Tensor, Tensor, Tensor]


def forward(layers: list[tuple[int, int]], rows: int) -> list[Product]:
    """Return the product of each layer, y = x W', as ``(out, left, right)``."""
    return [(torch.empty(rows, outs), torch.randn(rows, ins), torch.randn(outs, ins).T) for ins, outs in layers]


def backward(layers: list[tuple[int, int]], rows: int, reach_inputs: bool) -> list[Product]:
    """Return the products for the gradients of weights and inputs; the first layer's inputs only if they need one."""
    products = []
    for number, (inputs, outputs) in enumerate(layers):
        gradient = torch.randn(rows, outputs)
        products.append((torch.empty(outputs, inputs), gradient.T, torch.randn(rows, inputs)))
        if number or reach_inputs:
            products.append((torch.empty(rows, inputs), gradient, torch.randn(outputs, inputs)))
    return products


def _repeat(products: list[Product], times: int) -> None:
    for _ in range(times):
        for out, left, right in products:
            torch.mm(left, right, out=out)


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Compute the products of all steps, without a loss."""
    torch.manual_seed(seed)
    products = [
        *forward(case.encoder, case.batch_size),
        *forward(case.decoder, case.decoded),
        *backward(case.decoder, case.decoded, reach_inputs=case.guide != "bernoulli"),
        *backward(case.encoder, case.batch_size, reach_inputs=False),
    ]
    steps = rows // case.batch_size
    for _ in range(epochs):
        _repeat(products, steps)
        tick(steps)
    return {}


def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Compute the products of the encoder once, and of the decoder for all draws."""
    torch.manual_seed(seed)
    chunk = min(case.particles, 50)
    encode, decode = forward(case.encoder, rows), forward(case.decoder, rows * chunk)
    for _ in range(epochs):
        _repeat(encode, 1)
        _repeat(decode, case.particles // chunk)
        tick(rows * chunk * (case.particles // chunk))
    return {}
