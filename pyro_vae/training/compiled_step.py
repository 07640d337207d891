"""The step of SVI captured as one graph, with loss, gradients and update, for each signature of its inputs."""

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.traces import log_density
from pyro_vae.compilation import cost
from pyro_vae.compilation.adam import CapturableAdam
from pyro_vae.compilation.graph import CaptureError, Graph, InputSignature, capturable_optimizers, input_signature
from pyro_vae.training.graph_step import REMEDY, GraphStep
from pyro_vae.training.state import discover_parameters
from pyro_vae.training.step import BatchContext, Step, metrics_row

__all__ = ["CapturedStep"]

_FIRST_CHECKS = 3  # replays that are compared with an eager run, and then ever fewer
_SHARE = 0.01  # of the time of a run, for later comparisons
_LOSS_DIGITS = 1e-5  # to which an eager loss and that of the graph agree, relative to their largest terms
_MOST_VALUES = 16  # that a program may read from inputs of one form, such as lengths, for the same reason


class CapturedStep(GraphStep):
    """A :class:`pyro_vae.training.step.Step` that runs its first step eagerly, and replays graphs in all others.

    A step whose loss or gradient is not finite changes nothing. If ``skips`` is false, later steps change nothing
    either: the state stays that of the last good step, and :meth:`diagnose_nonfinite` finds the cause.

    What Python can change is compared by :meth:`refresh`: modules and their flags, the param store, the settings of the
    optimizer, and the Python values that model, guide and ELBO can read. After a change the step is captured again.
    After the first capture of a long graph, such as of a sequence, those for other inputs, such as of other lengths,
    wait until eager steps have taken as long as that capture: where lengths are many, no time is lost by captures.

    What that cannot see is found in replays that are compared with an eager run: sites, distributions, shapes,
    log-densities and the loss with all its weights must be those of the capture.

    ``compiles`` returns whether the graph for some inputs is compiled, or replayed as it is. The first graph is
    compiled at once; another one if it is run twice in a row, and otherwise, such as for a last batch of another size,
    after as many replays as take the time of a compilation. With ``refreshes``, each step begins with :meth:`refresh`;
    other arguments are those of the eager step.
    """

    most_captures = 3  # each takes seconds to compile

    def __init__(
        self, *args: Any, compiles: Callable[..., bool] = lambda *inputs: True, refreshes: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.compiles, self.refreshes = compiles, refreshes
        self._graphs: dict[tuple[BatchContext, InputSignature], list[_StepGraphs]] = {}
        self.pieces: dict[Any, Any] = {}  # compiled parts of graphs
        self._all_finite = torch.ones((), device="cpu")  # read and written by the graphs
        self._may_have_new_parameters = True
        self._groups: list[_Group] = []  # of the optimizer, since the capture
        self._long_capture = 0.0  # seconds of the last capture of a long graph
        self._eager_seconds: defaultdict[Any, float] = defaultdict(float)  # by what was not captured yet
        self._last: tuple[BatchContext, Sequence[Tensor]] | None = None
        self._running: _StepGraphs | None = None  # those of the last step

    def __call__(self, batch_context: BatchContext, *inputs: Tensor, validate: bool = False) -> Tensor:
        """Update the parameters on one batch; return 0 first, and raise nothing, if a replayed step is not finite."""
        if self.refreshes:
            self.refresh()
        if self._may_have_new_parameters:
            if self.optimizer is not None and not self.parameters:
                discover_parameters(self, batch_context, *inputs)
            if self.optimizer is None or self.new_parameters():
                return super().__call__(batch_context, *inputs, validate=validate)
            self._may_have_new_parameters = False
        key = batch_context, input_signature(inputs)
        if key not in self._graphs and self._eager_seconds[key] < self._long_capture:
            started = time.perf_counter()
            with self.own_run():
                row = super().__call__(batch_context, *inputs, validate=validate)
            self._eager_seconds[key] += time.perf_counter() - started
            return row
        self.set_schedules(self.count)
        self.count += 1
        self._last = batch_context, inputs
        try:
            graphs = self._captured_for(key, inputs) or self._captured_also(batch_context, inputs)
            again, self._running = graphs is self._running, graphs
            return graphs(batch_context, inputs, again)
        except CaptureError:
            self.count -= 1
            raise

    def describe(self) -> str:
        """How the steps are computed."""
        return f"compiled{self.describe_kernels()}"

    def compile_in_background(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> Any:
        """Capture the step for inputs like these, and return the compilation of its graph, which has begun.

        The parameters and the optimizer must be there.
        """
        self._may_have_new_parameters = False
        self.compiles = lambda *inputs: False
        graphs = self._captured_also(batch_context, inputs)
        return graphs.step.compile_in_background(inputs, self.pieces)

    def start_clock(self) -> None:
        """Measure the time of a step from now on, of which comparisons may take a share."""
        for graphs in chain(*self._graphs.values()):
            graphs.start_clock()

    def _captured_for(self, key: tuple[BatchContext, InputSignature], inputs: Sequence[Tensor]) -> "_StepGraphs | None":
        """The graphs for inputs of this form, with the same values where the program reads them."""
        found = self._graphs.get(key, [])
        return next((graphs for graphs in found if graphs.step.holds(*inputs)), None)

    def _captured_also(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> "_StepGraphs":
        found = self._graphs.setdefault((batch_context, input_signature(inputs)), [])
        if len(found) == _MOST_VALUES:
            raise CaptureError(
                f"`compile` must be False where a program reads values that change again and again: step {self.count} "
                f"has the set of values number {_MOST_VALUES + 1}, such as another largest length of sequences. "
                "Run to a fixed length, `range(x.shape[1])`, with `poutine.mask`, or leave `compile` out"
            )
        found.append(self._capture(batch_context, inputs))
        return found[-1]

    def _capture(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> "_StepGraphs":
        self.check_contexts()
        self.watch()
        with self.own_run(), self.checked_hooks():
            started = time.perf_counter()
            graphs = _StepGraphs(self, batch_context, inputs)
            self._long_capture = time.perf_counter() - started if graphs.step.is_long else 0.0
        self.watch_hooks()
        self._groups = [_Group(group) for group in self.optimizer.param_groups] if self.optimizer else []
        return graphs

    def replays_before(self, graph: Graph) -> float:
        """How often a graph is replayed before it is compiled."""
        compiled = any(graphs.is_compiled for found in self._graphs.values() for graphs in found)
        return cost.paying_calls(graph) if compiled and not graph.is_long else 0

    def optimizer_has_changed(self) -> bool:
        """Read the learning rates; whether another setting has changed, which the next capture then follows."""
        settings = [group.has_changed() for group in self._groups]  # each one reads its rate
        changed = any(settings) or self._other_groups()
        for group in self._groups if changed else ():
            group.follow(self.optimizer)
        return changed

    def _other_groups(self) -> bool:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [id(group) for group in groups] != [id(group.values) for group in self._groups]

    def finish(self) -> None:
        """Compare the step with an eager run at the end of a training run, with Pyro's validation."""
        self.refresh()
        if self._last is not None:
            batch_context, inputs = self._last
            if graphs := self._captured_for((batch_context, input_signature(inputs)), inputs):
                graphs.check(batch_context, inputs)

    def diagnose_nonfinite(
        self, batch_context: BatchContext, done: Sequence[Sequence[Tensor]], rewind: Callable[[], None]
    ) -> FloatingPointError:
        """Find out, by an eager run, why the last of the steps with inputs ``done`` was not finite."""
        rewind()  # to the random states before the first of these steps
        self._all_finite.zero_()  # the graphs then draw their random numbers and change nothing
        self.set_schedules(self.count - 1)
        self.tensors.note()
        with pyro.validation_enabled(False), self.discard_gradients():
            for inputs in done[:-1]:
                if graphs := self._captured_for((batch_context, input_signature(inputs)), inputs):
                    graphs.step(*inputs)
                else:  # an eager step
                    with batch_context(*inputs) as arguments:
                        self.backward(arguments, *inputs)
                    self.tensors.load_model_state()
        quiet = warnings.catch_warnings(action="ignore")
        with quiet, pyro.validation_enabled(False), self.discard_gradients(), batch_context(*done[-1]) as arguments:
            loss, _ = self.backward(arguments, *done[-1])
            if math.isfinite(loss) and self.gradient_norm().isfinite():
                cause = "the loss or a gradient is not finite in the compiled step, but it is in an eager one"
            else:
                cause = self._describe_nonfinite(loss, tuple(done[-1]))
        self._all_finite.fill_(1.0)
        self.restore_previous()
        return FloatingPointError(f"step {self.count}: {cause}")

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients together, by operations that a compiler joins in one loop."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        squares = [gradient.square().sum() for gradient in gradients]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device="cpu")

    def update(self) -> None:
        """Update the parameters, from the first step on by operations that can be captured."""
        with capturable_optimizers():
            super().update()

    def prepare_capture(self) -> None:
        """Move the flag that the graphs read to the device, and untie the optimizer's frozen parameters."""
        device = next((parameter.device for parameter in self.parameters.values()), None)
        self._all_finite = self._all_finite.to(device)
        if isinstance(self.optimizer, CapturableAdam):
            self.optimizer.untie_frozen()

    def clear_parameter_cache(self) -> None:
        """Find the parameters and capture the step again, after Python has changed some of them, or anything else."""
        super().clear_parameter_cache()
        self._graphs.clear()
        self._running = None
        self._groups = []
        self._may_have_new_parameters = True

    def unguarded(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> Tensor:
        """Run the operations of the step, for a capture."""
        with self.discard_gradients(), batch_context(*inputs) as arguments:
            loss, terms = self.backward(arguments, *inputs)
            norm = self.gradient_norm()
            self.clip(norm)
            self.update()
            return metrics_row(loss.isfinite() & norm.isfinite(), loss, terms)

    def guarded(self, batch_context: BatchContext, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
        """Run the operations of the step, then undo all that it has written if it is not finite, for a capture."""
        before = [tensor.detach().clone() for tensor in written]
        row = self.unguarded(batch_context, inputs)
        with torch.no_grad():
            taken = row[0] > 0
            if not self.skips:
                taken = taken & (self._all_finite > 0)
                self._all_finite.copy_(taken)
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(taken, tensor, old))
            return torch.cat([taken.to(row.dtype)[None], row[1:]])


class _Group:
    """A group of the optimizer with its settings at the capture, of which the graph reads the learning rate alone."""

    def __init__(self, group: dict[str, Any]):
        self.values, self._rate = group, group.get("lr")  # AdagradRMSProp has none
        self._others = self._settings()

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name not in ("params", "lr")}

    def has_changed(self) -> bool:
        """Set the rate to one that was put in its place; return whether another setting differs."""
        if self._rate is not None and (rate := self.values["lr"]) is not self._rate:
            self._rate.fill_(float(rate))
            self.values["lr"] = self._rate
        return self._settings() != self._others

    def follow(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Prepare the optimizer for another capture with the present settings."""
        if isinstance(optimizer, CapturableAdam) and self._settings() != self._others:
            if further := self._settings().keys() - self._others.keys():
                raise CaptureError(
                    f"`compile` must be False where Adam gets a setting later, got {sorted(further)}. Give it to "
                    "`pyro.optim.Adam` at the start"
                )
            optimizer.change_betas(self.values, self._others["betas"])


class _StepGraphs:
    """The graphs for inputs of one signature: of the step, and of the log-densities and loss that it is checked by."""

    def __init__(self, step: CapturedStep, batch_context: BatchContext, inputs: Sequence[Tensor]):
        self.owner, self.calls, self._next_check = step, 0, 0
        step.prepare_capture()
        found: list[_Sites] = []

        def log_probs(*inputs: Tensor) -> list[Tensor]:
            found.append(_Sites(step, batch_context, inputs, step.evaluator.loss))
            return [found[-1].log_probs]

        self.log_probs = Graph(log_probs, inputs)
        self.sites = found[-1]
        unguarded = Graph(lambda *inputs: [step.unguarded(batch_context, inputs)], inputs)
        written = unguarded.written
        self.step = Graph(lambda *inputs: [step.guarded(batch_context, inputs, written)], inputs)
        _check_same_operations(unguarded, self.step)
        self.is_compiled = False
        self._compiled_at = step.replays_before(self.step) if step.compiles(*inputs) else math.inf
        if self._compiled_at == 0:
            self._compile(inputs)
        self._since = time.perf_counter()

    def __call__(self, batch_context: BatchContext, inputs: Sequence[Tensor], again: bool = False) -> Tensor:
        """Run the step; ``again``: by the graphs of the step before, too."""
        if self.calls >= self._next_check:
            self.check(batch_context, inputs)
        if not self.is_compiled and self._compiled_at < math.inf and (again or self.calls >= self._compiled_at):
            self._compile(inputs)
        self.calls += 1
        return self.step(*inputs)[0]

    def _compile(self, inputs: Sequence[Tensor]) -> None:
        self.step.compile(inputs, self.owner.pieces)
        self.owner.start_together(self.step, inputs)
        self.is_compiled = True

    def start_clock(self) -> None:
        """Measure the time of a call from now on."""
        self._since = time.perf_counter()

    def check(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> None:
        """Compare with an eager run, and set the time of the next comparison: they take up to 1 % of the time."""
        started = time.perf_counter()
        with self.owner.own_run():
            self._compare(batch_context, inputs)
        now = time.perf_counter()
        per_call = (started - self._since) / max(1, self.calls)
        self._next_check = self.calls + 1
        if self._next_check >= _FIRST_CHECKS:
            self._next_check = min(2 * self.calls, self.calls + math.ceil((now - started) / (_SHARE * per_call)))

    def _compare(self, batch_context: BatchContext, inputs: Sequence[Tensor]) -> None:
        evaluator = self.owner.evaluator
        # The eager run finds the modules whose buffers the graph changes as well.
        with buffers_kept(evaluator.model, evaluator.guide):
            with preserve_rng_state(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Encountered NaN")  # the step names or skips what is not finite
                sites = _Sites(self.owner, batch_context, inputs, self.owner.evaluator.validated_loss)
            with preserve_rng_state():
                (log_probs,) = self.log_probs(*inputs)
        changed = f"`compile` must be False where steps run different operations: step {self.owner.count} "
        if sites.descriptions != self.sites.descriptions:
            pairs = zip_longest(sites.descriptions, self.sites.descriptions, fillvalue="no further site")
            now, captured = next(pair for pair in pairs if pair[0] != pair[1])
            raise CaptureError(f"{changed}runs {now}, but {captured} was captured. {REMEDY}")
        close = torch.isclose(sites.log_probs[:-1], log_probs[:-1], rtol=1e-3, atol=1e-3, equal_nan=True)
        if not close.all():
            site = sites.descriptions[int((~close).nonzero()[0])]
            raise CaptureError(f"{changed}has another log_prob of {site} than its captured operations. {REMEDY}")
        eager, replayed = sites.log_probs[-1].item(), log_probs[-1].item()
        size = float(sites.log_probs.abs().sum())  # of the terms of the loss, whose digits it cannot have more of
        if math.isfinite(size) and abs(eager - replayed) > _LOSS_DIGITS * size:
            raise CaptureError(
                f"`compile` must be False where a weight changes: step {self.owner.count} has the loss {eager:.6g}, "
                f"with the scales of its sites, but {replayed:.6g} by its captured operations. {REMEDY}"
            )


def _check_same_operations(first: Graph, second: Graph) -> None:
    """Raise if two captures of a step differ; the second one first copies each tensor that the step writes."""
    ours, begin = first.operations, 2 * len(first.written)
    theirs = second.operations[begin : begin + len(ours)]
    different = next((pair for pair in zip_longest(ours, theirs) if pair[0] != pair[1]), None)
    if different is None and not all(map(torch.equal, *first.new_constants(second))):
        different = ("a constant tensor", "another one")
    if different is not None:
        raise CaptureError(
            "`compile` must be False where two runs on the same data differ, such as by a counter or a generator: "
            f"{different[0]} was captured, and {different[1]} a run later. {REMEDY}"
        )


class _Sites:
    """The sites of guide and model in an evaluation of the ELBO, and the sum of each one's log-densities."""

    def __init__(self, step: Step, batch_context: BatchContext, inputs: Sequence[Tensor], compute: Callable[..., Any]):
        with batch_context(*inputs) as arguments:  # with gradients, on which the program may register hooks
            loss = compute(*arguments)
        sites = list(step.evaluator.sites())
        self.descriptions = [
            f"site {name!r} of the {owner}, a {_class_name(site['fn'])} of shape "
            f"{tuple(site['fn'].batch_shape + site['fn'].event_shape)}"
            for owner, name, site in sites
        ]
        log_probs = [log_density(site).detach().sum(dtype=torch.float64) for _, _, site in sites]
        device = log_probs[0].device if log_probs else None
        loss = torch.as_tensor(loss, dtype=torch.float64, device=device)
        self.log_probs = torch.stack([*log_probs, loss.detach()])  # the loss last


def _class_name(distribution: Any) -> str:
    base = getattr(distribution, "base_dist", None)
    return type(distribution).__name__ + (f"({_class_name(base)})" if base is not None else "")
