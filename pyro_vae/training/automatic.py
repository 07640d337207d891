"""The choice of how the steps of a run are computed: eager, replayed, or compiled while the run goes on."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_vae.compilation import cost
from pyro_vae.compilation.graph import CaptureError
from pyro_vae.training.compiled_step import CapturedStep
from pyro_vae.training.optimizers import copy_state
from pyro_vae.training.replayed_step import EAGER_STEPS, ReplayedStep, why_not_captured
from pyro_vae.training.state import discover_parameters
from pyro_vae.training.step import BatchContext, Step

__all__ = ["CHANGED", "AutomaticEngine", "GradientEngine"]

CHANGED = "after a change of modules or of Python's values"
_NO_COMPILER = "without a working C++ compiler, or without repetitions in a long sequence of operations"
_SLACK = 1.5  # times the estimated time to compile, so that a run does not wait
_BEGIN = 0.25  # of the steps before the first compiled one, after which the compiler begins: a short run needs none


class AutomaticEngine:
    """Let a run begin with eager steps, replay their operations, and compile them in the background if that pays.

    Replayed steps have the bits of eager ones, compiled steps have not. The number of the first compiled step,
    ``compiled_from``, therefore depends on the operations alone: it is that by which the compiler, by its estimated
    time, is done. A run waits for it there. Whatever refuses a capture is a reason in :meth:`describe`, and no error.

    Args:
        step: the step that the run begins with.
        make_captured: makes a captured step, which continues with a copy of an optimizer, if there is one.
        last_step: the number of steps of the run, infinite if unknown.

    Attributes:
        step: the step that the run is at.
    """

    def __init__(self, step: ReplayedStep, make_captured: Callable[..., CapturedStep], last_step: float):
        self.step: Step = step
        self.compiled_from = math.inf
        self.reason = ""  # why no step is compiled
        self._replayed, self._make_captured, self._last_step = step, make_captured, last_step
        self._captured: CapturedStep | None = None
        self._compilation: Any = None
        self._resumed_eager = False
        step.last_step = last_step

    @property
    def is_compiled(self) -> bool:
        """Whether the run is at a compiled step."""
        return self.step is not self._replayed

    def has_news(self) -> bool:
        """Whether the next step is to be prepared by :meth:`prepare`: a compilation begins, or its graph takes over."""
        if self.is_compiled or self.reason:
            return False
        replayed = self._replayed
        if replayed.count >= self.compiled_from:
            return True
        if self._compilation is None:
            begins = self.compiled_from == math.inf or replayed.count >= _BEGIN * self.compiled_from
            return replayed.first_graph is not None and begins
        return bool(replayed.reason)

    def prepare(self, batch_context: BatchContext, *inputs: torch.Tensor) -> None:
        """Begin to compile the step for inputs like these, or let its graph take over."""
        if self._replayed.reason:  # another capture would run the code of model and guide again, which may keep that
            self.give_up(self._replayed.reason)
            return
        try:
            if self.compiled_from == math.inf:
                self._estimate(*inputs)
            if self._compilation is None and self.has_news():
                self._begin(batch_context, *inputs)
            if self._compilation is not None and self.has_news():
                if self._replayed.changed:
                    self.close()
                    self._begin(batch_context, *inputs)
                self._take_over()
        except Exception as error:  # of the compiler, or of the user's code under the capture: the run goes on
            self.give_up(why_not_captured(error))

    def _estimate(self, *inputs: torch.Tensor) -> None:
        """Find the number of the step from which on a run is compiled."""
        if not all(tensor.is_cpu for tensor in (*inputs, *self._replayed.parameters.values())):
            self.give_up("on a device other than a CPU")
            return
        graph = self._replayed.first_graph
        assert graph is not None
        wait = _SLACK * cost.compilation_seconds(graph) / cost.replay_seconds(graph)
        self.compiled_from = max(EAGER_STEPS + 1, math.ceil(wait))
        if self._last_step <= self.compiled_from:
            self.give_up(f"in a run of less than about {self.compiled_from:,} steps")

    def _begin(self, batch_context: BatchContext, *inputs: torch.Tensor) -> None:
        self._replayed.changed = False
        self._captured = self._make_captured(self._replayed.optimizer)
        discover_parameters(self._captured, batch_context, *inputs)
        self._compilation = self._captured.compile_in_background(batch_context, inputs)

    def _take_over(self) -> None:
        captured, replayed = self._captured, self._replayed
        assert captured is not None
        assert captured.optimizer is not None
        assert replayed.optimizer is not None
        with warnings.catch_warnings(action="ignore"):  # there may be no compiler
            self._compilation.wait()
        if not self._compilation.succeeded:
            self.give_up(_NO_COMPILER)
            return
        copy_state(replayed.optimizer, captured.optimizer)
        if captured.refresh():
            self.give_up(CHANGED)
            return
        captured.count, captured.names = replayed.count, replayed.names
        captured.start_clock()
        self.step = captured

    def header(self) -> dict[str, Any]:
        """What a checkpoint keeps of the choice, so that a run that resumes from it has the same bits."""
        replayed, found = self._replayed, dict[str, Any]()
        if self.compiled_from < math.inf:
            found |= {"compiled_from": self.compiled_from, "compiled": self.is_compiled, "refused": self.reason}
        if replayed.reason and (replayed.replays or self._resumed_eager):
            found["eager"] = replayed.reason  # which another capture would not find
        return found

    def resumed(self, header: Mapping[str, Any]) -> Step:
        """Return the step that a run continues with after a checkpoint with what :meth:`header` returned."""
        self.compiled_from = header.get("compiled_from", math.inf)
        self.reason, self._replayed.reason = header.get("refused", ""), header.get("eager", "")
        self._resumed_eager = bool(self._replayed.reason)
        if header.get("compiled", False):
            self.step = self._captured = self._make_captured(None)
        return self.step

    def refused(self, error: CaptureError) -> bool:
        """Continue with eager steps; return whether parameters must be found again."""
        if self.is_compiled:
            self.fall_back(error)
            return True
        self._replayed.refuse(why_not_captured(error))
        return False

    def give_up(self, reason: str) -> None:
        """Let all further steps be eager or replayed."""
        self.reason = reason
        self.close()
        self._captured = None

    def fall_back(self, error: CaptureError) -> None:
        """Leave compiled steps, after one of them was refused, at the state that they have reached."""
        captured, replayed = self._captured, self._replayed
        assert captured is not None
        assert captured.optimizer is not None
        if replayed.optimizer is None:  # the run was resumed at compiled steps
            parameters = [one for group in captured.optimizer.param_groups for one in group["params"]]
            replayed.optimizer = replayed.make_optimizer(parameters)
        copy_state(captured.optimizer, replayed.optimizer)
        replayed.count, self.step = captured.count, replayed
        replayed.clear_parameter_cache()
        self.give_up(why_not_captured(error))

    def close(self) -> None:
        """End a compilation that has not ended."""
        if self._compilation is not None:
            self._compilation.cancel()

    def describe(self) -> str:
        """How the steps were computed, and why not in another way."""
        replayed = self._replayed
        if self.is_compiled:
            return f"compiled from step {self.compiled_from + 1:,}"
        if replayed.replays and not replayed.reason:
            how = f"replayed{replayed.describe_kernels()}"
            return f"{how}, and not compiled {self.reason}" if self.reason else how
        if replayed.reason:
            return f"eager, and not captured {replayed.reason}"
        return f"eager: {replayed.count:,} steps are too few for a capture"


class GradientEngine(AutomaticEngine):
    """The same choice on several ranks, whose gradients are added up between the graph and an eager optimizer.

    Only the graph of loss and gradients is compiled. Ranks may be at different stages: all update their parameters by
    the same sums, with the same operations.

    Args:
        step: the step of the run.
        compiles: whether the graph for some inputs is compiled.
        last_step: the number of steps of the run, infinite if unknown.
    """

    def __init__(self, step: ReplayedStep, compiles: Callable[..., bool], last_step: float):
        super().__init__(step, _no_captured_step, last_step)
        self._compiles, self._took_over = compiles, False
        self._gradients: Any = None  # of which the graph is compiled

    @property
    def is_compiled(self) -> bool:
        """Whether the run is at a compiled graph."""
        return self._took_over and not self._replayed.reason

    def _begin(self, batch_context: BatchContext, *inputs: torch.Tensor) -> None:
        self._replayed.changed = False
        self._gradients = self._replayed.graph_for(batch_context, inputs)
        if self._gradients is not None:
            self._compilation = self._gradients.compile_in_background(inputs, self._replayed.pieces)

    def _take_over(self) -> None:
        assert self._gradients is not None
        with warnings.catch_warnings(action="ignore"):  # there may be no compiler
            self._compilation.wait()
        if not self._compilation.succeeded:
            self.give_up(_NO_COMPILER)
        elif self._replayed.changed:
            self.give_up(CHANGED)
        else:
            self._gradients.run_compiled()
            self._took_over = True

    def resumed(self, header: Mapping[str, Any]) -> Step:
        """Return the step that a run continues with after a checkpoint with what :meth:`header` returned."""
        super().resumed({**header, "compiled": False})
        if header.get("compiled", False):
            self._took_over, self._replayed.compiles = True, self._compiles
            self._replayed.capture_now()
        return self.step

    def fall_back(self, error: CaptureError) -> None:
        """Leave compiled graphs: further steps are eager or replayed."""
        self._took_over, self._replayed.compiles = False, None
        self.give_up(why_not_captured(error))


def _no_captured_step(*args: Any) -> CapturedStep:
    raise AssertionError("several ranks compile loss and gradients alone")
