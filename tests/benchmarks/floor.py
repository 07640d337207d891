"""A lower bound on the time: the matrix products of the networks alone, forward and backward.

Torch has two libraries for products in float32, MKL and oneDNN, and which is faster depends on the processor and the
shape. Each product is tried by both first, and the bound takes the faster one.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

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


def by_mkl(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute a product by torch's own choice, which is MKL, into memory that is there."""
    return torch.mm(left, right, out=out)


def by_onednn(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute a product by oneDNN, which has no call that writes into memory that is there."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")


def faster(product: Product, repeats: int = 7) -> "partial[Tensor]":
    """Return the faster of the two ways to compute a product, by the best of some repeats."""
    ways = [partial(by_mkl, *product)]
    if torch.backends.mkldnn.is_available():
        ways.append(partial(by_onednn, *product))
    return min(ways, key=lambda way: min(_seconds(way) for _ in range(repeats)))


def _seconds(run: Callable[[], Tensor]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _repeat(products: Sequence[Callable[[], Tensor]], times: int) -> None:
    for _ in range(times):
        for product in products:
            product()


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Compute the products of all steps, without a loss."""
    torch.manual_seed(seed)
    products = [
        *forward(case.encoder, case.batch_size),
        *forward(case.decoder, case.decoded),
        *backward(case.decoder, case.decoded, reach_inputs=case.guide != "bernoulli"),
        *backward(case.encoder, case.batch_size, reach_inputs=False),
    ]
    fast, steps = list(map(faster, products)), rows // case.batch_size
    for _ in range(epochs):
        _repeat(fast, steps)
        tick(steps)
    return {}


def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> Losses:
    """Compute the products of the encoder once, and of the decoder for all draws."""
    torch.manual_seed(seed)
    chunk = min(case.particles, 50)
    encode, decode = (list(map(faster, forward(*of))) for of in ((case.encoder, rows), (case.decoder, rows * chunk)))
    for _ in range(epochs):
        _repeat(encode, 1)
        _repeat(decode, case.particles // chunk)
        tick(rows * chunk * (case.particles // chunk))
    return {}
