"""The sum over ranks of the gradients of a step, of the buffers that it changes, and of its metrics."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.ranks import Ranks
from pyro_vae._utils.validation import describe
from pyro_vae.compilation.recorder import is_recording

__all__ = ["Decisions", "GradientSum"]

_BUCKET = 2**22  # numbers that are added up together, while the backward pass goes on
_PLACE = "a step of fit"
_MOST_TERMS = 8  # of an ELBO


@dataclass
class Decisions:
    """What a run does after a step, which all ranks must do alike.

    Attributes:
        reads: whether to read the metrics.
        saves: whether to write a checkpoint.
        interrupted, terminated: whether a rank has received Ctrl-C or SIGTERM.
    """

    reads: bool = False
    saves: bool = False
    interrupted: bool = False
    terminated: bool = False


@dataclass
class _Bucket:
    """Tensors of one dtype and device whose gradients, or values, are added up together."""

    parameters: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.buffers]

    @torch.no_grad()
    def flat(self, weight: float) -> Tensor:
        """Whether each parameter has a gradient, all gradients, and all buffers, times ``weight``, as one tensor."""
        first = self.tensors[0]
        gradients = [parameter.grad for parameter in self.parameters]
        used = first.new_tensor([one is not None for one in gradients])
        found = [
            torch.zeros_like(parameter).flatten() if one is None else one.detach().flatten()
            for one, parameter in zip(gradients, self.parameters, strict=True)
        ]
        parts = [*found, *(buffer.detach().flatten() for buffer in self.buffers)]
        return torch.cat([used, torch.cat(parts).mul_(weight)])

    def empty(self) -> Tensor:
        """A tensor like that of :meth:`flat`, of a rank that has nothing to add."""
        count = len(self.parameters) + sum(tensor.numel() for tensor in self.tensors)
        return self.tensors[0].new_zeros(count)

    def split(self, flat: Tensor) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients, ``None`` where no rank has one, and the buffers, from their sum."""
        used, *parts = flat.split([len(self.parameters), *(tensor.numel() for tensor in self.tensors)])
        views = [part.view_as(tensor) for part, tensor in zip(parts, self.tensors, strict=True)]
        gradients = [view if count else None for view, count in zip(views, used.tolist(), strict=False)]
        return gradients, views[len(self.parameters) :]


class GradientSum:
    """Make the gradients of each rank's rows those of the whole batch.

    Rank k has :math:`b_k` of the B rows of a batch. Its loss scales them by :math:`N / b_k`, and has all terms outside
    of the data plate. The mean with the weights :math:`b_k / B` is then the loss of the batch:

    .. math:: \\sum_k \\frac{b_k}{B}\\Big(\\frac{N}{b_k}\\sum_{i \\in k} \\ell_i + g\\Big)
        = \\frac{N}{B}\\sum_i \\ell_i + g.

    So are gradients, metrics, and the running averages in buffers. Gradients are added up in buckets: one begins as
    soon as the backward pass has all of its gradients and the buckets before have begun. A last exchange of a step has
    metrics and errors. A rank that fails gives zeros for the buckets that it has not begun, and its error.

    Args:
        ranks: the ranks of the run.
        step: the :class:`pyro_vae.training.step.Step` whose parameters these are.

    Attributes:
        decisions: those of this rank before a step, and of all ranks after it.
        rows: B, the number of rows in the last step.
    """

    def __init__(self, ranks: Ranks, step: Any):
        self.ranks, self.step = ranks, step
        self.decisions, self.rows = Decisions(), 0
        self._buckets: list[_Bucket] = []
        self._known: dict[int, Tensor] = {}  # parameters and buffers that all ranks have alike
        self._expected: dict[int, int] = {}  # how often a backward pass adds to each gradient in a step, by id
        self._counts: Counter[int] = Counter()
        self._begun: list[tuple[Tensor, Callable[[], None]]] = []
        self._is_open = self._is_counting = self._is_late = False
        self._weight = 0.0
        self._handles: list[Any] = []

    # Which tensors

    def start(self) -> None:
        """Begin a run: all ranks have the parameters and buffers of rank 0."""
        named = self.step.named_tensors()
        shapes = {name: describe(tensor) for name, tensor in named.items()}
        self.ranks.check_same(_PLACE, shapes, ". The script must build the same model on every rank")
        self.ranks.copy_from_first(_PLACE, list(named.values()))
        self.step.tensors.note()  # no step has changed the buffers
        self._known = {id(one): one for one in named.values()}
        self.arrange()

    def arrange(self) -> None:
        """Make the buckets, for the parameters and changed buffers of all ranks, which must be the same.

        Raises:
            ValueError: if a rank has other parameters than rank 0.
        """
        named = self.step.named_tensors()
        parameters = {id(one) for one in self.step.parameters.values() if one.requires_grad}
        changed = self._changed_buffers(named) | self._buffer_names(named)
        changed = set().union(*self.ranks.gather(_PLACE, changed))
        chosen = {name: one for name, one in named.items() if id(one) in parameters or name in changed}
        kinds = {}
        for name, one in chosen.items():
            is_new = id(one) in parameters and id(one) not in self._known
            kinds[name] = f"{describe(one)}{f' with the values {_checksum(one)}' if is_new else ''}"
        self.ranks.check_same(_PLACE, kinds, ". Make all parameters in the first run, on all ranks alike")
        self._buckets = []
        latest: dict[Any, _Bucket] = {}
        for one in reversed(chosen.values()):  # in the order in which a backward pass is likely to reach them
            kind = one.dtype, one.device
            size = sum(tensor.numel() for tensor in latest[kind].tensors) if kind in latest else _BUCKET
            if size >= _BUCKET:
                latest[kind] = _Bucket()
                self._buckets.append(latest[kind])
            (latest[kind].parameters if id(one) in parameters else latest[kind].buffers).append(one)
        self._known = {id(one): one for one in named.values()}
        self._watch()

    def _buffer_names(self, named: dict[str, Tensor]) -> set[str]:
        held = {id(one) for bucket in self._buckets for one in bucket.buffers}
        return {name for name, one in named.items() if id(one) in held}

    def _changed_buffers(self, named: dict[str, Tensor]) -> set[str]:
        """The names of buffers with floating-point numbers that the step has changed."""
        changed = self.step.tensors.changed()
        return {name for name, one in named.items() if id(one) in changed and one.is_floating_point()}

    def _must_arrange(self) -> bool:
        held = {id(one): one for bucket in self._buckets for one in bucket.tensors}
        known = all(id(one) in held for one in self.step.parameters.values() if one.requires_grad)
        named = self.step.named_tensors()
        return not known or any(id(named[name]) not in held for name in self._changed_buffers(named))

    # Gradients as they come

    def _watch(self) -> None:
        """Count how often a backward pass adds to each gradient, to begin a bucket at its last one."""
        self.close()
        if len(self._buckets) == 1:  # it begins at the end in any case
            return
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._added))

    def close(self) -> None:
        """Remove what watches the gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _added(self, parameter: Tensor) -> None:
        if not self._is_counting or is_recording():
            return
        self._counts[id(parameter)] += 1
        if any(one is parameter for bucket in self._buckets[: len(self._begun)] for one in bucket.parameters):
            self._is_late = True
        while len(self._begun) < len(self._buckets) and self._is_ready(self._buckets[len(self._begun)]):
            self._begin()

    def _is_ready(self, bucket: _Bucket) -> bool:
        if not bucket.parameters or bucket.buffers or not self._expected:
            return False
        return all(self._counts[id(one)] >= self._expected.get(id(one), 1) for one in bucket.parameters)

    def _begin(self, empty: bool = False) -> None:
        bucket = self._buckets[len(self._begun)]
        flat = bucket.empty() if empty or not self._weight else bucket.flat(self._weight)
        self._begun.append((flat, self.ranks.start_sum(flat)))

    # A step

    @contextmanager
    def step_of_all(self) -> Iterator[None]:
        """Run a step in a block: if it raises on one rank, all raise its error."""
        self._begun, self._is_open, self._is_late, self._weight = [], True, False, 0.0
        self._counts.clear()
        try:
            yield
        except BaseException as error:
            if self._is_open:
                self._begin_all(empty=True)
                self.ranks.fail(error)
            self._wait()
            raise
        finally:
            self._is_open = self._is_counting = False

    def begin(self, rows: int) -> None:
        """Begin the backward pass of this number of rows of this rank."""
        self._weight, self._is_counting = float(rows), True

    def _begin_all(self, empty: bool = False) -> None:
        while len(self._begun) < len(self._buckets):
            self._begin(empty)

    def _wait(self) -> None:
        for _, wait in self._begun:
            wait()

    def __call__(self, loss: Any, terms: Sequence[Any]) -> tuple[float, list[Tensor], Tensor]:
        """Return loss, terms and norm of the gradients of the whole batch; set its gradients if all are finite."""
        rows, self._is_counting = self._weight, False
        self._begin_all()
        own = [rows * float(value) for value in (loss, *terms)] if rows else []
        mine, first = self.decisions, self.ranks.is_first
        decided = [mine.reads and first, mine.saves and first, mine.interrupted, mine.terminated]
        numbers = [rows, self._is_late, self._must_arrange(), *decided, *own, *[0.0] * (_MOST_TERMS + 1 - len(own))]
        self._is_open = False
        total, is_late, must_arrange, *sums = self.ranks.exchange(_PLACE, numbers)
        self.decisions, self.rows = Decisions(*map(bool, sums[: len(decided)])), int(total)
        self._wait()
        if must_arrange:
            self.arrange()
        if is_late or must_arrange:
            self._begun = []
            self._begin_all()
            self._wait()
        if self._counts:
            self._expected = dict(self._counts)
        if not total:
            return 0.0, [], torch.zeros((), device="cpu")
        loss, *means = (value / total for value in sums[len(decided) :])
        found = [torch.tensor(one, dtype=torch.float64, device="cpu") for one in means[: len(self.step.names)]]
        return loss, found, self._set(total, loss)

    @torch.no_grad()
    def _set(self, total: float, loss: float) -> Tensor:
        """Set gradients and buffers to the means over ranks, unless loss or norm is not finite; return the norm."""
        gradients: list[tuple[Tensor, Tensor | None]] = []
        buffers: list[tuple[Tensor, Tensor]] = []
        for bucket, (flat, _) in zip(self._buckets, self._begun, strict=True):
            flat[len(bucket.parameters) :].div_(total)
            of_parameters, of_buffers = bucket.split(flat)
            gradients += zip(bucket.parameters, of_parameters, strict=True)
            buffers += zip(bucket.buffers, of_buffers, strict=True)
        found = [gradient for _, gradient in gradients if gradient is not None]
        norm = torch.nn.utils.get_total_norm(found) if found else torch.zeros((), device="cpu")
        if math.isfinite(loss) and norm.isfinite():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, mean in buffers:
                buffer.copy_(mean)
        return norm


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()):08x}"
