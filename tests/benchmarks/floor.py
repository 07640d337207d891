"""The floor: the matrix products of the networks alone, forward and backward, into memory that is there already."""

from collections.abc import Callable

import torch
from cases import Case
from inputs import Inputs
from torch import Tensor

Tick = Callable[[float], None]
Product = tuple[Tensor, Tensor, Tensor]


def set_threads(threads: int) -> None:
    """Of torch."""
    torch.set_num_threads(threads)


def runner(task: str) -> Callable[..., dict[str, list[float]]]:
    """What does the task."""
    if task == "export":
        raise NotImplementedError("export: it is no matter of matrix products")
    return {"train": train, "evaluate": evaluate}[task]


def forward(layers: list[tuple[int, int]], rows: int) -> list[Product]:
    """The products of each layer, y = x W', as ``(out, left, right)``."""
    return [
        (torch.empty(rows, outputs), torch.randn(rows, inputs), torch.randn(outputs, inputs).T)
        for inputs, outputs in layers
    ]


def backward(layers: list[tuple[int, int]], rows: int, reach_inputs: bool) -> list[Product]:
    """The gradients of each layer: those of the weights, and of the inputs of all but what nothing stands before."""
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


def train(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> dict[str, list[float]]:
    """The products of as many steps. No loss comes of them."""
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


def evaluate(case: Case, given: Inputs, tick: Tick, *, epochs: int, rows: int, seed: int) -> dict[str, list[float]]:
    """The products of the decoder at so many draws, and of the encoder once."""
    torch.manual_seed(seed)
    chunk = min(case.particles, 50)
    encode, decode = forward(case.encoder, rows), forward(case.decoder, rows * chunk)
    for _ in range(epochs):
        _repeat(encode, 1)
        _repeat(decode, case.particles // chunk)
        tick(rows * chunk * (case.particles // chunk))
    return {}
