"""What a training run has learnt: parameters, buffers and optimizer as named tensors, and back."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae.training.step import BatchContext, Step

__all__ = [
    "data_fingerprint",
    "discover_parameters",
    "load_model_state",
    "load_optimizer_state",
    "model_state",
    "optimizer_state",
    "set_trainable_flags",
    "trainable_flags",
]

_ROWS = 1000  # that a checksum looks at, or a few less


def discover_parameters(step: Step, take: BatchContext, rows: Tensor) -> None:
    """Let a step find its parameters and modules, by a run that changes nothing."""
    with preserve_rng_state(), buffers_kept(), step.gradients_cleared(), take(rows) as arguments:
        step.backward(arguments, rows)


def data_fingerprint(data: Sequence[Tensor]) -> str:
    """What tells data from others: their sizes, and a checksum of up to a thousand rows from first to last.

    >>> data_fingerprint([torch.zeros(5, 2)]), data_fingerprint([torch.ones(5, 2)])
    ('(5, 2) float32, checksum 2c34ce1d', '(5, 2) float32, checksum 00e1a993')
    """
    digest = sha256()
    for tensor in data:
        rows = torch.arange(0, len(tensor), -(-len(tensor) // _ROWS), device=tensor.device)
        digest.update(tensor.detach()[rows].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    sizes = " and ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in data)
    return f"{sizes}, checksum {digest.hexdigest()[:8]}"


def model_state(step: Step) -> dict[str, Tensor]:
    """The parameters and buffers of a run, by their paths in their modules; those of no module by Pyro's names.

    Frozen parameters are among them: they may have been trained before.
    """
    return {name: tensor.detach() for name, tensor in _named(step).items()}


def _named(step: Step) -> dict[str, Tensor]:
    found = step.tensors.named()  # by path: Pyro's names of modules are numbered, in another process otherwise
    known = {id(tensor) for tensor in found.values()}
    for name, parameter in step.parameters.items():
        if id(parameter) not in known:
            found[name if name not in found else f"{name} of the param store"] = parameter
    return found


@torch.no_grad()
def load_model_state(step: Step, saved: Mapping[str, Tensor]) -> None:
    """Give the run the values of what :func:`model_state` returned, in place."""
    for name, tensor in model_state(step).items():
        tensor.copy_(saved[name])


def trainable_flags(step: Step) -> dict[str, list[Any]]:
    """Which parameters are frozen and which the optimizer has met, and whether each module is set to train."""
    groups = [] if step.optimizer is None else step.optimizer.param_groups
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    return {
        "optimized": [name for name, tensor in _named(step).items() if id(tensor) in optimized],
        "frozen": [
            name
            for name, tensor in _named(step).items()
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        ],
        "training": [module.training for module in step.tensors.modules()],
    }


def set_trainable_flags(step: Step, saved: Mapping[str, Any]) -> None:
    """Set what :func:`trainable_flags` returned."""
    for name, tensor in _named(step).items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(name not in saved["frozen"])
    for module, training in zip(step.tensors.modules(), saved["training"], strict=True):
        module.training = training


def optimizer_state(step: Step) -> dict[str, Tensor]:
    """The optimizer's tensors for each parameter, named ``parameter/name``; none before the first step."""
    state = {} if step.optimizer is None else step.optimizer.state
    return {
        f"{name}/{kind}": value
        for name, parameter in _named(step).items()
        if parameter in state
        for kind, value in state[parameter].items()
    }


def load_optimizer_state(step: Step, names: Sequence[str], saved: Mapping[str, Tensor]) -> None:
    """The optimizer of these parameters as it was when :func:`optimizer_state` returned this."""
    named = _named(step)
    step.optimizer = optimizer = step.make_optimizer([named[name] for name in names]) if names else None
    copies: dict[int, Tensor] = {}  # by place: what parameters share, they share again
    for path, value in saved.items():
        name, _, kind = path.rpartition("/")
        assert optimizer is not None
        place = value.data_ptr()
        if place not in copies:
            copies[place] = value.to(named[name].device, copy=True)
        optimizer.state[named[name]][kind] = copies[place]
