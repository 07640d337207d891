"""The state of a training run, as named tensors and numbers of a checkpoint, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae._utils.data import DataTensors
from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.ranks import Ranks
from pyro_vae._utils.rng import is_random_state, preserve_rng_state, random_states, reseed, set_random_states
from pyro_vae.training.checkpoints import Contents, misfits
from pyro_vae.training.optimizers import RunOptimizer
from pyro_vae.training.step import BatchContext, Step

__all__ = [
    "RunState", "check_run_state", "data_fingerprint", "discover_parameters", "engine_of", "load_model_state",
    "load_optimizer_state", "load_rank_state", "load_run_state", "model_state", "optimizer_state", "rank_state",
    "run_state", "set_trainable_flags", "trainable_flags",
]  # fmt: skip

_ROWS = 1000  # an upper bound on the rows in a checksum


@dataclass
class RunState:
    """The progress of a run: what a checkpoint holds besides parameters, buffers, optimizer and random states."""

    epoch: int = 0  # number of finished epochs
    batch: int = 0  # number of finished batches of the current epoch
    skipped: int = 0  # number of skipped steps, whose loss or gradient was not finite
    consecutive_skips: int = 0  # number of skipped steps since the last finite one
    stop_reason: str = "epochs"  # why the run ended: "epochs", "patience", "callback" or "interrupted"
    history: dict[str, list[float]] = field(default_factory=dict)  # one number per epoch, by name
    metrics: list[list[float]] = field(default_factory=list)  # of the current epoch, as far as they were read
    best_epoch: int = 0  # number of the epoch with the best validation ELBO; 0 before the first one
    best_bound: float = 0.0  # its validation ELBO
    best_parameters: dict[str, Tensor] = field(default_factory=dict)  # its parameters and buffers


def run_state(step: Step, state: RunState, own: Sequence[Contents]) -> Contents:
    """Collect all that a run resumes from; ``own`` is what :func:`rank_state` returned on each rank."""
    (of_first, random), *others = own
    header = vars(state) | {"steps": step.count, "trainable_flags": trainable_flags(step)} | of_first
    groups = {
        "model": model_state(step),
        "optimizer": optimizer_state(step),
        "best": header.pop("best_parameters"),
        "random": random,
    }
    if others:
        header["ranks"] = [header_of_rank for header_of_rank, _ in others]
        groups["ranks"] = {
            f"{rank}/{name}": one for rank, (_, found) in enumerate(others, 1) for name, one in found.items()
        }
    return header, {f"{group}/{name}": tensor for group, found in groups.items() for name, tensor in found.items()}


def rank_state(batches: Mapping[str, Tensor], **values: Any) -> Contents:
    """Collect what a rank alone resumes from: its random states, those of its batches, and values that it has.

    The order of the epoch is drawn from the random states of ``batches``.
    """
    random, streams = random_states()
    given = {name: value for name, value in values.items() if value is not None}
    return {"random": random, **given}, streams | dict(batches)


def _rank_states(header: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> list[Contents]:
    """Return what :func:`rank_state` returned on each rank; a file of one process has one."""
    found: list[Contents] = [(dict(header), dict(groups["random"]))]
    found += [(one, {}) for one in header.get("ranks", [])]
    for path, tensor in groups["ranks"].items():
        rank, _, name = path.partition("/")
        found[1:][int(rank) - 1][1][name] = tensor
    return found


def check_run_state(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless header and tensors are what :func:`run_state` returns, so that a run can resume from them."""
    types: dict[str, Any] = {one.name: type(one.default) for one in fields(RunState)}
    types |= {"steps": int, "run": dict, "trainable_flags": dict, "history": dict, "metrics": list}
    del types["best_parameters"]
    for name, kind in types.items():
        if type(header[name]) is not kind and (kind, type(header[name])) != (float, int):
            raise ValueError(f"its {name!r} is {header[name]!r}")
    if header["stop_reason"] not in ("epochs", "patience", "callback", "interrupted"):
        raise ValueError(f"its 'stop_reason' is {header['stop_reason']!r}")
    numbers = [*header["history"].values(), *header["metrics"]]
    if not all(isinstance(row, list) and row and all(isinstance(one, int | float) for one in row) for row in numbers):
        raise ValueError("its history holds something else than numbers")
    groups, flags = _by_group(tensors), header["trainable_flags"]
    model = groups["model"]
    if unknown := {*flags["optimized"], *flags["frozen"]} - model.keys():
        raise ValueError(f"it has no tensor for {sorted(unknown)}")
    if not all(isinstance(training, bool) for training in flags["training"]):
        raise ValueError("its modes of modules are not True or False")
    if lines := misfits(groups["best"] or model, model):
        raise ValueError(f"its best parameters are those of another model: {'; '.join(lines)}")
    for path, tensor in groups["optimizer"].items():
        if not _fits(tensor, model[path.rpartition("/")[0]]) and tensor.shape != (2,):  # the powers of the betas
            raise ValueError(f"its state of the optimizer, {path!r}, has shape {tuple(tensor.shape)}")
    if type(header.get("ranks", [])) is not list:
        raise ValueError(f"its 'ranks' is {header['ranks']!r}")
    with preserve_rng_state():
        for own in _rank_states(header, groups):
            _check_rank_state(*own)


def _check_rank_state(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise unless this is what :func:`rank_state` returns; change the random states."""
    for name, what in (
        ("random", "random states"), ("sampler", "state of a sampler"), ("engine", "way to compute steps")
    ):  # fmt: skip
        if type(header[name] if name == "random" else header.get(name, {})) is not dict:
            raise ValueError(f"its {what} is {header[name]!r}")
    set_random_states(header["random"], tensors)
    for name in {name for name in tensors if not is_random_state(name)} | {"order"}:
        torch.Generator("cpu").set_state(tensors[name])


def _fits(state: Tensor, parameter: Tensor) -> bool:
    """Whether the state has the shape of a moment, of means of its rows or columns, or of a count of steps."""
    try:
        return torch.broadcast_shapes(state.shape, parameter.shape) == parameter.shape
    except RuntimeError:
        return False


def _by_group(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}, "random": {}, "ranks": {}}
    for path, tensor in tensors.items():
        group, _, name = path.partition("/")
        groups[group][name] = tensor
    return groups


def load_run_state(step: Step, state: RunState, discover: Callable[[], None], contents: Contents, source: str) -> None:
    """Set ``step`` and ``state`` to what :func:`run_state` returned; raise if the model differs."""
    header, tensors = contents
    groups, flags = _by_group(tensors), header["trainable_flags"]
    discover()
    own = model_state(step)
    differences = misfits(groups["model"], own)
    if len(flags["training"]) != (modules := sum(1 for _ in step.tensors.modules())):
        differences.append(f"{len(flags['training'])} modules in the file and {modules} in the model")
    if differences:
        raise ValueError(
            f"`checkpoints` must be those of this model, got {source}, which is of another model: "
            + "; ".join(differences)
        )
    if flags != trainable_flags(step):
        set_trainable_flags(step, flags)
        step.clear_parameter_cache()
        discover()
    load_model_state(step, groups["model"])
    load_optimizer_state(step, flags["optimized"], groups["optimizer"], _is_capturable(header))
    step.count = header["steps"]
    for name in vars(state).keys() & header.keys():
        setattr(state, name, header[name])
    state.best_parameters = {name: tensor.to(own[name].device) for name, tensor in groups["best"].items()}
    if state.stop_reason == "interrupted":
        state.stop_reason = "epochs"


def load_rank_state(
    contents: Contents, ranks: Ranks, seed: int, unchanged: tuple[Mapping[str, Tensor], Any]
) -> tuple[dict[str, Tensor], Any]:
    """Set the random states of this rank to those of a checkpoint; return those of its batches, and of its sampler.

    In a run on another number of ranks than that of the checkpoint, rank 0 continues its random states, and others get
    new ones, from the seed, the rank and the step. Of batches and samplers, such a run continues what all ranks had
    in common. What each rank had of its own, as of a stream of its own rows, is as in ``unchanged``.
    """
    header, tensors = contents
    own = _rank_states(header, _by_group(tensors))
    if len(own) != ranks.size:
        if ranks.is_first:
            set_random_states(own[0][0]["random"], own[0][1])
        else:
            reseed(int(np.random.SeedSequence([seed, ranks.rank, header["steps"], 2]).generate_state(1)[0]))
        states, sampler = unchanged
        found = dict(states) | {
            name: tensor
            for name, tensor in own[0][1].items()
            if not is_random_state(name)
            and all(name in others and torch.equal(tensor, others[name]) for _, others in own)
        }
        samplers = [one.get("sampler") for one, _ in own]
        return found, samplers[0] if all(one == samplers[0] for one in samplers) else sampler
    of_rank, random = own[ranks.rank]
    set_random_states(of_rank["random"], random)
    return {name: one for name, one in random.items() if not is_random_state(name)}, of_rank.get("sampler")


def engine_of(header: Mapping[str, Any], ranks: Ranks) -> Mapping[str, Any]:
    """Return how the steps of this rank were computed, by the header of a checkpoint; those of rank 0 for a new one."""
    of_ranks = [header, *header.get("ranks", [])]
    return of_ranks[ranks.rank if len(of_ranks) == ranks.size else 0].get("engine", {})


def discover_parameters(step: Step, batch_context: BatchContext, *inputs: Tensor) -> None:
    """Let a step find its parameters and modules in a run that changes nothing."""
    kept = buffers_kept(step.evaluator.model, step.evaluator.guide)
    with preserve_rng_state(), kept, step.discard_gradients(), batch_context(*inputs) as arguments:
        step.backward(arguments, *inputs)


def data_fingerprint(data: DataTensors) -> str:
    """Describe data by their sizes and a checksum of up to a thousand evenly spaced rows.

    Data of which some rows alone can be checked, as of a data set or a stream, have no checksum.

    >>> data_fingerprint(DataTensors([torch.zeros(5, 2)])), data_fingerprint(DataTensors([torch.ones(5, 2)]))
    ('(5, 2) float32, checksum 2c34ce1d', '(5, 2) float32, checksum 00e1a993')
    """
    digest, count = sha256(), len(data[0])
    if data.num_checked < count:
        return data.form
    for tensor in data.rows(torch.arange(0, count, -(-count // _ROWS), device=data[0].device)):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{data.form}, checksum {digest.hexdigest()[:8]}"


def model_state(step: Step) -> dict[str, Tensor]:
    """Return parameters, frozen ones too, and buffers, by their paths in modules or by Pyro's names outside of them."""
    return {name: tensor.detach() for name, tensor in step.named_tensors().items()}


@torch.no_grad()
def load_model_state(step: Step, saved: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers, in place, to what :func:`model_state` returned."""
    for name, tensor in model_state(step).items():
        tensor.copy_(saved[name])


def trainable_flags(step: Step) -> dict[str, list[Any]]:
    """Return which parameters are frozen, which the optimizer has, and whether each module is in training mode."""
    groups = [] if step.optimizer is None else step.optimizer.param_groups
    optimized = {id(parameter) for group in groups for parameter in group["params"]}
    named = step.named_tensors()
    parameters = {name: tensor for name, tensor in named.items() if isinstance(tensor, nn.Parameter)}
    return {
        "optimized": [name for name, tensor in named.items() if id(tensor) in optimized],
        "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
        "training": [module.training for module in step.tensors.modules()],
    }


def set_trainable_flags(step: Step, saved: Mapping[str, Any]) -> None:
    """Set the flags to what :func:`trainable_flags` returned."""
    for name, tensor in step.named_tensors().items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(name not in saved["frozen"])
    for module, training in zip(step.tensors.modules(), saved["training"], strict=True):
        module.training = training


_NUMBERS: dict[str, tuple[Any, torch.dtype]] = {
    "bool": (bool, torch.bool), "int": (int, torch.int64), "float": (float, torch.float64)
}  # fmt: skip
"""By the name of a type: the type, and the dtype of a tensor that holds a number of it."""


def optimizer_state(step: Step) -> dict[str, Tensor]:
    """Return the optimizer's state of each parameter, named ``parameter/name``; none before the first step.

    A Python number, such as a count of steps, is a tensor whose name ends with its type: ``parameter/name:int``.
    """
    found: dict[str, Tensor] = {}
    state = {} if step.optimizer is None else step.optimizer.state
    for name, parameter in step.named_tensors().items():
        for kind, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{kind}"] = value
            else:
                number = type(value).__name__
                found[f"{name}/{kind}:{number}"] = torch.tensor(value, dtype=_NUMBERS[number][1], device="cpu")
    return found


def _is_capturable(header: Mapping[str, Any]) -> bool:
    """Whether the optimizer of a checkpoint is one for captured steps, as in one process that has compiled them."""
    is_compiled = header["run"].get("compile") is True or header.get("engine", {}).get("compiled") is True
    return is_compiled and "ranks" not in header


def load_optimizer_state(
    step: Step, names: Sequence[str], saved: Mapping[str, Tensor], is_capturable: bool | None = None
) -> None:
    """Make an optimizer of the named parameters with the state that :func:`optimizer_state` returned.

    ``is_capturable``: whether that was the state of an optimizer for captured steps; by default, if the step has one.
    """
    make = step.make_optimizer
    if isinstance(make, RunOptimizer) and is_capturable not in (None, make.is_capturable):
        step.make_optimizer = make.capturable(not make.is_capturable)
        load_optimizer_state(step, names, saved)
        step.make_optimizer = make
        step.optimizer = None if step.optimizer is None else make.continued(step.optimizer)
        return
    named = step.named_tensors()
    step.optimizer = optimizer = step.make_optimizer([named[name] for name in names]) if names else None
    copies: dict[int, Tensor] = {}  # by address: parameters that shared a tensor share its copy
    for path, value in saved.items():
        name, _, kind = path.rpartition("/")
        kind, _, number = kind.partition(":")
        assert optimizer is not None
        if number:
            optimizer.state[named[name]][kind] = _NUMBERS[number][0](value.item())
            continue
        address = value.data_ptr()
        if address not in copies:
            copies[address] = value.to(named[name].device, copy=True)
        optimizer.state[named[name]][kind] = copies[address]
