"""A step of SVI that keeps graphs of its operations: what these fix is watched, and a change leads to new graphs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.ambient import check_no_outer_handlers
from pyro_vae._utils.module_state import ModuleSnapshot
from pyro_vae.compilation.cuda_graph import cuda_device
from pyro_vae.compilation.graph import CaptureError, Graph
from pyro_vae.compilation.python_state import PythonState
from pyro_vae.compilation.recorder import checked_hook
from pyro_vae.compilation.replay import Replay
from pyro_vae.training.step import Step

__all__ = ["REMEDY", "GraphStep"]

REMEDY = "Keep a number that changes, such as a weight, in a 0-dim tensor that `schedules` fill, or leave `compile` out"


class GraphStep(Step):
    """A :class:`pyro_vae.training.step.Step` that replays graphs of operations in place of Python's code.

    What Python can change is compared by :meth:`refresh`: modules and their flags, the param store, hooks on gradients,
    and the Python values that model, guide and ELBO can read. After a change the step is captured again.

    Attributes:
        why_not_together: why the kernels of a GPU are started one by one, and not by CUDA graphs; empty if they are,
            and ``None`` without a GPU.
    """

    most_captures = float("inf")  # that one and the same Python value may lead to
    why_not_together: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._python: PythonState | None = None  # since the capture
        self._hooks: list[int] = []  # on gradients, since the capture
        self._module_hooks: list[dict[int, Any]] = []  # which torch keeps in modules, as they are now
        self._captures: Counter[str] = Counter()  # how often each Python value has led to another capture

    def start_together(self, graph: Graph | Replay, inputs: Sequence[Tensor]) -> None:
        """Start the kernels of a graph at once, where it is on a GPU; where one graph cannot be, no further one is."""
        if not self.why_not_together and cuda_device([*self.parameters.values(), *inputs]) is not None:
            self.why_not_together = graph.start_together(inputs)

    def describe_kernels(self) -> str:
        """How kernels are started, as the end of a report; empty without a GPU."""
        if self.why_not_together is None:
            return ""
        return f", not as CUDA graphs {self.why_not_together}" if self.why_not_together else " as CUDA graphs"

    def clear_parameter_cache(self) -> None:
        """Find the parameters and capture the step again, after Python has changed some of them, or anything else."""
        super().clear_parameter_cache()
        self._python = None

    def watch(self) -> None:
        """Begin to compare what Python can change, before the first capture."""
        if self._python is None:
            self._python = PythonState(*self.evaluator.read)
            self.snapshot = ModuleSnapshot(self.tensors.modules(), list(self.parameters))

    def watch_hooks(self) -> None:
        """Compare the hooks on gradients with those of now, after a capture."""
        modules = self.tensors.modules()
        self._module_hooks = [held for one in modules for held in (one._backward_hooks, one._backward_pre_hooks)]
        self._hooks = self._hook_numbers()

    def check_contexts(self) -> None:
        """Raise inside of handlers of Pyro and of autocast."""
        check_no_outer_handlers()
        device = next((parameter.device for parameter in self.parameters.values()), torch.get_default_device())
        if torch.is_autocast_enabled(device.type):
            raise ValueError("`compile` must be False inside of torch.autocast, got True. Leave one of them out")

    def _hooks_on_gradients(self) -> Iterator[tuple[str, dict[int, Any]]]:
        """The hooks of parameters and modules that a backward pass calls, with the names of their owners."""
        for name, parameter in self.parameters.items():
            yield f"parameter {name!r}", parameter._backward_hooks or {}
        for module in self.tensors.modules():
            for hooks in (module._backward_hooks, module._backward_pre_hooks):
                yield f"a module {type(module).__name__}", hooks

    def _hook_numbers(self) -> list[int]:
        parameters = self.parameters.values()
        accumulated = [len(self._after_accumulation(one)) for one in parameters]
        return [*chain(*self._module_hooks, *(one._backward_hooks or () for one in parameters)), *accumulated]

    def _after_accumulation(self, parameter: Tensor) -> list[Any]:
        """The hooks of the user that run after a gradient is accumulated."""
        hooks = (parameter._post_accumulate_grad_hooks or {}).values()
        return [hook for hook in hooks if getattr(hook, "__self__", self) is not self.gradient_sum]

    def check_forward_hooks(self) -> None:
        """Raise for a hook of the user on a module that runs, which a replay would not call."""
        for module in self.tensors.modules():
            for hook in chain(module._forward_hooks.values(), module._forward_pre_hooks.values()):
                if not str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch."):
                    raise CaptureError(
                        "`compile` must be False where a hook runs before or after a module, got one of a "
                        f"{type(module).__name__}, which a replay would not call"
                    )

    @contextmanager
    def checked_hooks(self) -> Iterator[None]:
        """Raise in a block for hooks on gradients that a replay would not call."""
        for name, parameter in self.parameters.items():
            if self._after_accumulation(parameter):
                raise CaptureError(
                    f"`compile` must be False where a hook runs after a gradient is accumulated, got one of parameter "
                    f"{name!r}, which captured steps would not call. Leave one of them out"
                )
        kept = [(hooks, dict(hooks)) for _, hooks in self._hooks_on_gradients() if hooks]
        for name, hooks in self._hooks_on_gradients():
            for key, hook in hooks.items():
                hooks[key] = checked_hook(hook, name)
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.update(before)

    @contextmanager
    def own_run(self) -> Iterator[None]:
        """Run model and guide in a block; raise if a number changes in it that their code can read, such as a counter.

        A replay does not run their code, so that the number would stand still.
        """
        assert self._python is not None
        error = None
        try:
            yield
        except CaptureError as raised:
            error = raised
        if self._python.has_changed():
            changes = self._python.changes()
            for place, (before, now) in changes.items():
                if isinstance(before, int | float) and isinstance(now, int | float):
                    raise CaptureError(
                        f"`compile` must be False where model or guide change a Python number that they read: {place} "
                        f"was {before!r} before a run and is {now!r} after it. {REMEDY}"
                    ) from error
            self._python.ignore(changes)
            self._python.rebase()
        if error is not None:
            raise error

    def refresh(self) -> bool:
        """Notice what Python has changed since the last step; return whether parameters must be found again."""
        if self._python is None:
            return super().refresh()
        self.rates = None
        self.check_contexts()
        changed = self.snapshot is None or self.snapshot.has_changed() or self._hooks != self._hook_numbers()
        changed = self.optimizer_has_changed() or changed
        if self._python.has_changed():
            changes = self._python.changes()
            self._captures.update(changes.keys())
            for place, (before, now) in changes.items():
                if self._captures[place] > self.most_captures:
                    raise CaptureError(
                        f"`compile` must be False where a Python value changes again and again: {place} was {before!r} "
                        f"and is {now!r} at step {self.count + 1}. {REMEDY}"
                    )
            self._python.rebase()
            changed = changed or bool(changes)
        if changed:
            self.clear_parameter_cache()
        return changed

    def optimizer_has_changed(self) -> bool:
        """Whether settings of the optimizer are others than those that the graphs hold."""
        return False
