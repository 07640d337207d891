"""The eager step of SVI, whose loss and gradients are replayed from a graph: the same bits, without Pyro's handlers."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.ranks import is_shared
from pyro_vae._utils.rng import preserve_rng_state, set_torch_random_states, torch_random_states
from pyro_vae._utils.typing import Function
from pyro_vae._utils.warn import warn_user
from pyro_vae.compilation.graph import CaptureError, Compilation, Graph, InputSignature, input_signature
from pyro_vae.compilation.python_state import PythonState
from pyro_vae.compilation.replay import Replay
from pyro_vae.training.graph_step import REMEDY, GraphStep
from pyro_vae.training.step import BatchContext, metrics_row

__all__ = ["EAGER_STEPS", "ReplayedStep", "why_not_captured"]

EAGER_STEPS = 8  # at the start of a run, and after each change, before a capture
_LEAST_STEPS = 40  # that a run must have left for a capture to pay
_FIRST_CHECKS = 3  # replays that are compared with an eager step, and then ever fewer
_MOST_GRAPHS = 64  # for inputs of different shapes
_DIGITS = 1e-4  # to which gradients agree, where an operation adds in another order each time
_SHARE = 0.02  # of the norm of all gradients, in which compiled ones, and those of units at their kinks, may differ
_KINKS = 3  # comparisons in a row after which a difference is none of a unit at its kink


def why_not_captured(error: Exception) -> str:
    """Return the reason of a refused capture as the end of a sentence."""
    return str(error).removeprefix("`compile` must be False ").partition("\n")[0]


class ReplayedStep(GraphStep):
    """A :class:`pyro_vae.training.step.Step` that replays the operations of loss and gradients where that is possible.

    The optimizer is that of an eager step. So are all numbers, to the bit, apart from operations that torch itself adds
    up in another order each time. A step that is not finite, and one with Pyro's validation, are eager.

    Steps stay eager where a capture is refused, and where model or guide keep something in Python that a replay would
    not: ``reason`` then has the cause. The first replays, and later ever fewer, are compared with eager steps.

    Args:
        reason: why no step is replayed; they are if it is empty.
        last_step: the number of steps of the run: a capture must pay.
        compiles: whether the graph for some inputs is compiled when it is captured. If this is given, steps are
            captured as soon as possible, and what refuses a capture is an error.

    Attributes:
        replays: the number of replayed steps.
        first_graph: the first graph that was captured.
        changed: whether something that a graph holds has changed since a capture.
    """

    def __init__(
        self,
        *args: Any,
        reason: str = "",
        last_step: float = math.inf,
        compiles: Callable[..., bool] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.reason, self.last_step, self.compiles = reason, last_step, compiles
        self.pieces: dict[Any, Any] = {}  # compiled parts of graphs
        self.replays, self.changed = 0, False
        self.first_graph: Graph | None = None
        self._graphs: dict[tuple[BatchContext, InputSignature], list[_Gradients]] = {}
        self._capture_from = EAGER_STEPS if compiles is None else 0  # steps of the run, before which none is captured
        self._is_checked = False  # what the code keeps, in an eager step since the last change
        self._capture_seconds = 0.0  # of the last capture
        self._eager_seconds: defaultdict[Any, float] = defaultdict(float)  # by what was not captured yet
        self._expected: tuple[_Gradients, list[Tensor]] | None = None  # with which the eager step is compared

    def __call__(self, batch_context: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """Update the parameters on one batch, as the eager step does."""
        gradients = None if self.reason or self.has_no_rows(inputs) else self._gradients_for(batch_context, inputs)
        if self.shared is not None:
            self.shared.step = self.count + 1
        if gradients is None:
            return self._eager_step(batch_context, inputs, validate)
        if validate or gradients.calls >= gradients.next_check:
            return self._compared_step(gradients, batch_context, inputs, validate)
        random, buffers = torch_random_states(), gradients.writes_buffers or self.gradient_sum is not None
        if buffers:
            self.tensors.note()
        self.set_schedules(self.count)
        row, norm, *found = gradients(*inputs)
        if not row[0].item():  # an eager step raises or skips
            set_torch_random_states(random)
            if buffers:
                self.tensors.load_model_state()
            return super().__call__(batch_context, *inputs, validate=validate)
        self.count += 1
        self.replays += 1
        gradients.unchecked += 1
        for parameter, gradient in zip(gradients.parameters, found, strict=True):
            parameter.grad = gradient
        if self.gradient_sum is None:
            self.clip(norm)
            self.update()
            return row
        self.gradient_sum.begin(len(inputs[0]))
        with self.discard_gradients():
            return self.take(lambda: (row[1], list(row[2:])), inputs)

    def _eager_step(self, batch_context: BatchContext, inputs: Sequence[Tensor], validate: bool) -> Tensor:
        if self.reason or self.has_no_rows(inputs):
            return super().__call__(batch_context, *inputs, validate=validate)
        places = self._watched_places() if self.count + 1 >= self._capture_from and not self._is_checked else None
        started = time.perf_counter()
        row = super().__call__(batch_context, *inputs, validate=validate)
        self._eager_seconds[batch_context, input_signature(inputs)] += time.perf_counter() - started
        if places is not None:
            self._check_places(places)
            self._is_checked = True
        return row

    def _watched_places(self) -> PythonState:
        return PythonState(*self.evaluator.read, tensors=True)

    def _check_places(self, places: PythonState) -> None:
        """Replay no step where model or guide keep something in Python: a further run would change it, a replay not."""
        if places.sources:
            self.refuse(f"where model or guide read an iterator or a random generator, {places.sources[0]}")
        elif changes := places.changes():
            self.refuse(f"where model or guide keep what they compute or count, in {next(iter(changes))}")

    def _gradients_for(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> "_Gradients | None":
        """Return the graph for inputs of this form, captured now if that pays; ``None`` where the step is eager."""
        try:
            self.refresh()
            if not self._is_checked or self.new_parameters():
                return None
            if gradients := self.graph_for(batch_context, inputs):
                return gradients
            key = batch_context, input_signature(inputs)
            if self._eager_seconds[key] < self._capture_seconds or sum(map(len, self._graphs.values())) > _MOST_GRAPHS:
                return None
            if self.compiles is None and self.last_step - self.count < _LEAST_STEPS:
                return None
            started = time.perf_counter()
            gradients = self._capture(batch_context, inputs)
            self._capture_seconds = time.perf_counter() - started
            if self.compiles is not None and self.compiles(*inputs):
                gradients.compile_in_background(inputs, self.pieces).wait()
                gradients.run_compiled()
            self.start_together(gradients.replay, inputs)
            self._graphs.setdefault(key, []).append(gradients)
            return gradients
        except Exception as error:  # of the user's code under the capture, which the eager step runs as it is
            if self.compiles is not None:
                raise
            self.refuse(why_not_captured(error))
            return None

    def describe(self) -> str:
        """How the steps are computed where each graph is compiled at once."""
        return f"compiled{self.describe_kernels()}"

    def capture_now(self) -> None:
        """Capture at the next step, as an earlier process did: what the code keeps in Python has been checked."""
        self._is_checked, self._capture_from = True, 0

    def graph_for(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> "_Gradients | None":
        """Return the graph for inputs of this form, if it has been captured."""
        found = self._graphs.get((batch_context, input_signature(inputs)), [])
        return next((gradients for gradients in found if gradients.holds(*inputs)), None)

    def _capture(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> "_Gradients":
        self.check_contexts()
        self.check_forward_hooks()
        self.watch()
        with self.own_run(), self.checked_hooks():
            gradients = _Gradients(self, batch_context, inputs)
        self.watch_hooks()
        self.first_graph = self.first_graph or gradients.graph
        return gradients

    def refuse(self, reason: str) -> None:
        """Run all further steps eagerly."""
        if self.compiles is not None:
            raise CaptureError(f"`compile` must be False {reason}. {REMEDY}")
        self.reason = reason
        self._graphs.clear()

    def refresh(self) -> bool:
        """Notice what Python has changed since the last step; return whether parameters must be found again."""
        if self.reason and self._expected is None:
            self._python = None
        return super().refresh()

    def _compared_step(
        self, gradients: "_Gradients", batch_context: BatchContext, inputs: Sequence[Tensor], validate: bool
    ) -> Tensor:
        """Take an eager step, and compare its loss and gradients with those of a replay."""
        self.set_schedules(self.count)
        self.tensors.note()
        with preserve_rng_state():
            found = gradients(*inputs)
        self.tensors.load_model_state()
        places = self._watched_places()
        self._expected = gradients, found
        try:
            with self.own_run():
                row = super().__call__(batch_context, *inputs, validate=validate)
        except CaptureError as error:
            if self.compiles is not None or is_shared(error):
                raise
            self.refuse(why_not_captured(error))
        finally:
            self._expected = None
        if not self.reason:
            self._check_places(places)
        if self.reason and gradients.unchecked:
            warn_user(
                f"fit: step {self.count} runs {self.reason}. The {gradients.unchecked} steps since the last comparison "
                "repeated the operations of an earlier step; all further ones run Pyro's code. With compile=False all "
                "steps do"
            )
        gradients.was_checked()
        return row

    def backward(self, arguments: tuple[Any, ...], *inputs: Tensor) -> tuple[Any, list[Tensor]]:
        """Compute the gradients of the parameters, and compare them with those of a replay in a comparison."""
        loss, terms = super().backward(arguments, *inputs)
        if self._expected is not None:
            gradients, (row, _, *replayed) = self._expected
            eager = [parameter.grad for parameter in gradients.parameters]
            known = {id(parameter) for parameter in gradients.parameters}
            others = [one for one in self.parameters.values() if id(one) not in known and one.grad is not None]
            found = [one for one in eager if one is not None]
            same = not others and len(found) == len(eager)
            if not same or not _close(terms, list(row[2:])) or not gradients.agree(found, replayed):
                self.refuse("other operations than the captured ones")
        return loss, terms

    def gradients(self, batch_context: BatchContext, inputs: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
        """Compute metrics, norm and gradients, for a capture, and add the parameters that have one to ``found``.

        On several ranks the norm is that of their sum, and so it is not computed here.
        """
        with self.discard_gradients(), batch_context(*inputs) as arguments:
            loss, terms = self.backward(arguments, *inputs)
            norm = torch.ones((), device="cpu") if self.gradient_sum is not None else self.gradient_norm()
            found += [parameter for parameter in self.parameters.values() if parameter.grad is not None]
            row = metrics_row(torch.as_tensor(loss).isfinite() & norm.isfinite(), loss, terms)
            return [row, norm, *(parameter.grad for parameter in found if parameter.grad is not None)]

    def clear_parameter_cache(self) -> None:
        """Find the parameters and capture again, some steps after a change."""
        super().clear_parameter_cache()
        self.changed = self.changed or bool(self._graphs)
        self._graphs.clear()
        self._is_checked = False
        self._capture_from = self.count + (EAGER_STEPS if self.compiles is None else 0)


class _Gradients:
    """The graph of loss and gradients for inputs of one signature.

    Attributes:
        parameters: those that have a gradient.
        replay: what runs the graph.
        calls: the number of replays and comparisons.
        next_check: the number of calls after which the next comparison is due.
        unchecked: the number of replays since the last comparison.
        is_compiled: whether calls run compiled code.
    """

    is_compiled = False

    def __init__(self, step: ReplayedStep, batch_context: BatchContext, inputs: Sequence[Tensor]):
        self.parameters: list[Tensor] = []
        self._shared, self._fills = step.shared, list[Function]()
        with nullcontext(self._fills) if step.shared is None else step.shared.captured() as self._fills:
            self.graph = Graph(
                lambda *inputs: step.gradients(batch_context, inputs, self.parameters), inputs, keeps_recurrent=True
            )
        self.writes_buffers = bool(self.graph.written)
        self.holds = self.graph.holds
        self.replay: Graph | Replay = Replay(self.graph)
        self.calls = self.next_check = self.unchecked = self._kinks = 0

    def compile_in_background(self, inputs: Sequence[Tensor], pieces: dict[Any, Any]) -> Compilation:
        """Begin to compile the graph, see :meth:`pyro_vae.compilation.graph.Graph.compile_in_background`."""
        return self.graph.compile_in_background(inputs, pieces)

    def run_compiled(self) -> None:
        """Run the compiled graph from now on, which the next calls are compared with eager steps for."""
        self.replay, self.is_compiled = self.graph, True
        self.calls = self.next_check = 0

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self.calls += 1
        if self._shared is not None:
            self._shared.refill(self._fills)
        return self.replay(*inputs)

    def agree(self, eager: Sequence[Tensor], replayed: Sequence[Tensor]) -> bool:
        """Whether gradients agree, up to a unit at the kink of its function that rounding puts on its other side.

        Compiled code rounds in another way in each step. In a replay this is rare, so that a small difference in one
        step is compared in the next ones, too: other operations differ in all of them.
        """
        if not self.is_compiled and _close(eager, replayed):
            self._kinks = 0
            return True
        norm = torch.nn.utils.get_total_norm
        difference = norm([one - other for one, other in zip(eager, replayed, strict=True)])
        self._kinks += not self.is_compiled
        return bool(difference <= _SHARE * norm(eager)) and self._kinks < _KINKS

    def was_checked(self) -> None:
        self.unchecked = 0
        self.next_check = self.calls if self.calls < _FIRST_CHECKS or self._kinks else 2 * self.calls


def _close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are equal, up to the order of sums."""
    for one, other in zip(found, expected, strict=True):
        if not torch.equal(one, other):
            finite = other[other.isfinite()]
            size = float(finite.abs().max()) if finite.numel() else 0.0
            if not torch.allclose(one, other.to(one.dtype), rtol=_DIGITS, atol=_DIGITS * size, equal_nan=True):
                return False
    return True
