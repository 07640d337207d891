"""What a training run has learnt: its parameters, buffers and optimizer as named tensors, and back."""

from collections.abc import Mapping
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.steps import Step

__all__ = ["learnt", "misfits", "modules_of", "optimizer_state", "put_back", "put_back_optimizer"]


def learnt(step: Step) -> dict[str, Tensor]:
    """The parameters and buffers that a run changes, by their paths in their modules.

    Names that Pyro's param store gives to whole modules are left out: another process numbers them otherwise.
    """
    owners = list(dict.fromkeys(name.partition("$$$")[0] for name in step.parameters if "$$$" in name))
    found: dict[str, Tensor] = {}
    for name, parameter in step.parameters.items():
        owner, _, path = name.partition("$$$")
        found[f"{owners.index(owner)}.{path}" if len(owners) > 1 and path else path or name] = parameter.detach()
    seen = {id(tensor) for tensor in found.values()}
    for number, module in enumerate(_modules(step)):
        for path, buffer in module.named_buffers():
            if id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"buffer {number}.{path}"] = buffer
    return found


def _modules(step: Step) -> list[nn.Module]:
    """The modules of a run, each once: those that it has registered, and those that its functions hold."""
    held = [module for module, *_ in step.modules.values()]
    for part in (step.run.model, step.run.guide, *vars(step.run.elbo).values()):
        held += modules_of(part)
    return list({id(module): module for module in held}.values())


def modules_of(function: Any) -> list[nn.Module]:
    """The modules that a function is, is bound to, or has from around it.

    >>> linear = nn.Linear(2, 1)
    >>> modules_of(lambda x: linear(x)) == [linear]
    True
    """
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, MethodType):
        return (
            modules_of(function.__self__) if isinstance(function.__self__, nn.Module) else modules_of(function.__func__)
        )
    inside = unwrap(function) if isinstance(function, FunctionType) else function
    if inside is not function:
        return modules_of(inside)
    if not isinstance(function, FunctionType):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    names = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [
        module
        for value in (*cells, *names)
        if isinstance(value, nn.Module | MethodType)
        for module in modules_of(value)
    ]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


def misfits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """In what names, shapes and dtypes saved tensors differ from those of a run, in words."""
    lines = [f"{name} {_form(saved[name])} is not in the model" for name in saved if name not in own]
    lines += [f"{name} {_form(own[name])} is not in the file" for name in own if name not in saved]
    for name in own.keys() & saved.keys():
        if _form(own[name]) != _form(saved[name]):
            lines.append(f"{name} is {_form(saved[name])} in the file and {_form(own[name])} in the model")
    return sorted(lines)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def put_back(step: Step, saved: Mapping[str, Tensor]) -> None:
    """Give the run the values of what :func:`learnt` returned, in place."""
    for name, tensor in learnt(step).items():
        tensor.copy_(saved[name])


def optimizer_state(step: Step) -> dict[str, Tensor]:
    """The optimizer's tensors for each parameter, named ``number.name``; none before the first step."""
    if step.optimizer is None:
        return {}
    state = step.optimizer.state
    return {
        f"{number}.{name}": value
        for number, parameter in enumerate(step.parameters.values())
        for name, value in state[parameter].items()
    }


def put_back_optimizer(step: Step, saved: Mapping[str, Tensor]) -> None:
    """The optimizer as it was when :func:`optimizer_state` returned this."""
    if not saved:
        return
    parameters = list(step.parameters.values())
    step.optimizer = step.make_optimizer(parameters)
    for name, value in saved.items():
        number, _, name = name.partition(".")
        step.optimizer.state[parameters[int(number)]][name] = value.clone()
