"""The sum over ranks of the gradients of a step, of the buffers that it changes, and of its metrics."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae._utils.ranks import Ranks, form
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


class _Bucket:
    """Tensors of one dtype and device whose gradients, or values, are added up together, in one tensor.

    That has a number for each parameter, 1 where the rank has a gradient, all gradients, and the values of all buffers.
    """

    def __init__(self, parameters: Sequence[Tensor], buffers: dict[str, Tensor]):
        self.parameters, self.buffers = parameters, buffers
        tensors = [*parameters, *buffers.values()]
        sizes = [len(parameters), *(tensor.numel() for tensor in tensors)]
        self.flat = tensors[0].detach().new_zeros(sum(sizes))
        self.used, *parts = self.flat.split(sizes)
        self.numbers = self.flat[len(parameters) :]
        self.gradients = self.numbers[: sum(sizes[1 : 1 + len(parameters)])]
        views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
        self.means, self.buffer_means = views[: len(parameters)], views[len(parameters) :]

    @torch.no_grad()
    def fill(self, weight: float) -> None:
        """Set the tensor to that of this rank, times ``weight``; a weight of 0 stands for a rank without rows."""
        if not weight:
            self.flat.zero_()
            return
        gradients = [parameter.grad for parameter in self.parameters]
        pairs = [(mean, one) for mean, one in zip(self.means, gradients, strict=True) if one is not None]
        if len(pairs) < len(gradients):
            self.gradients.zero_()
        pairs += zip(self.buffer_means, self.buffers.values(), strict=True)
        if pairs:
            torch._foreach_copy_([mean for mean, _ in pairs], [one for _, one in pairs])
        self.numbers.mul_(weight)
        self.used.copy_(torch.tensor([float(one is not None) for one in gradients], device="cpu"))


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
        batch_size: B of most batches, by which weights are divided: sums of numbers of 16 bits stay in their range.

    Attributes:
        decisions: those of this rank before a step, and of all ranks after it.
        rows: B, the number of rows in the last step.
    """

    def __init__(self, ranks: Ranks, step: Any, batch_size: int):
        self.ranks, self.step, self._batch_size = ranks, step, batch_size
        self.decisions, self.rows = Decisions(), 0
        self._buckets: list[_Bucket] = []
        self._alike: set[str] = set()  # names of parameters and buffers that all ranks have alike
        self._missed = False  # whether this rank had no rows in a step, in this epoch
        self._expected: dict[int, int] = {}  # how often a backward pass adds to each gradient in a step, by id
        self._counts: Counter[int] = Counter()
        self._begun: list[Callable[[], None]] = []
        self._held: Collection[str] = ()  # the names of what the buckets have
        self._others: list[Tensor] = []  # what they do not have, of the step with a snapshot
        self._others_for: Any = None
        self._is_open = self._is_counting = self._is_late = False
        self._weight = 0.0
        self._handles: list[Any] = []

    # Which tensors

    def start(self) -> None:
        """Begin a run: all ranks have the parameters and buffers of rank 0."""
        named = self.step.named_tensors()
        shapes = {name: _kind(tensor) for name, tensor in named.items()}
        of_modules = {name: shapes[name] for name in self.step.tensors.named()}
        self.ranks.check_same(_PLACE, of_modules, ". The script must build the same model on every rank")
        found = self.ranks.gather(_PLACE, shapes)  # others may have a number for each row of a rank
        same = [name for name, shape in found[0].items() if all(theirs.get(name) == shape for theirs in found)]
        self._alike = set(same)
        self.copy_from_first()
        self.step.tensors.note()  # no step has changed the buffers
        self._find_others()

    def copy_from_first(self) -> None:
        """Set the parameters and buffers that all ranks have alike to those of rank 0."""
        named = self.step.named_tensors()
        self.ranks.copy_from_first(_PLACE, [named[name] for name in named if name in self._alike])

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Raise if parameters, buffers or other values of ranks have become different, by whatever way.

        Integers of a rank that had no rows in some step, such as the number of batches, become those of rank 0.
        """
        named = {name: one for name, one in self.step.named_tensors().items() if name in self._alike}
        whole = [one for one in named.values() if not one.is_floating_point()]
        if self.ranks.exchange(_PLACE, [self._missed])[0]:
            self.ranks.copy_from_first(_PLACE, whole)
        self._missed = False
        remedy = (
            ". Ranks have the sums of gradients and the means of buffers with real numbers; what else a step changes, "
            "such as a count of rows in integers or a draw of an optimizer, must be the same on all of them"
        )
        self.ranks.check_same("the state of ranks", named | dict(values), remedy)

    def arrange(self) -> None:
        """Make the buckets, for what has a gradient or is a changed buffer on any rank; all ranks must have it.

        Raises:
            ValueError: if a rank has other parameters than rank 0.
        """
        named = self.step.named_tensors()
        changed = self.step.tensors.changed()
        ours = {name for name, one in named.items() if name in self._held or _has_news(one, changed)}
        names = set().union(*self.ranks.gather(_PLACE, ours))
        chosen = {name: one for name, one in named.items() if name in names}
        kinds = {name: _kind(one) for name, one in chosen.items()}
        self.ranks.check_same(_PLACE, kinds, ". Make all parameters in the first run, on all ranks alike")
        new = [name for name, one in chosen.items() if name not in self._alike and not _is_buffer(one)]
        self.ranks.copy_from_first(_PLACE, [chosen[name] for name in new])
        self._alike |= chosen.keys()
        groups: list[list[str]] = []
        latest: dict[Any, list[str]] = {}
        for name, one in reversed(chosen.items()):  # in the order in which a backward pass is likely to reach them
            kind = one.dtype, one.device
            if kind not in latest or sum(chosen[held].numel() for held in latest[kind]) >= _BUCKET:
                groups.append([])
                latest[kind] = groups[-1]
            latest[kind].append(name)
        self._buckets = []
        for group in groups:
            buffers = {name: chosen[name] for name in group if _is_buffer(chosen[name])}
            self._buckets.append(_Bucket([chosen[name] for name in group if name not in buffers], buffers))
        self._held = chosen.keys()
        self._find_others()
        self._watch()

    def _find_others(self) -> None:
        """Find what the buckets do not have, and the buffers that have been put in the place of others."""
        named = self.step.named_tensors()
        self._others = [one for name, one in named.items() if name not in self._held]
        self._others_for = self.step.snapshot
        for bucket in self._buckets:
            bucket.buffers = {name: named.get(name, one) for name, one in bucket.buffers.items()}

    def _must_arrange(self) -> bool:
        """Whether something that the buckets do not have must be added up."""
        changed, lacks, snapshot = self.step.tensors.changed(), self._lacks_parameters(), self.step.snapshot
        if changed or lacks or snapshot is None or snapshot is not self._others_for:
            self._find_others()
        return lacks or any(_has_news(one, changed) for one in self._others)

    def _lacks_parameters(self) -> bool:
        """Whether the buckets lack a parameter with a gradient, such as one in the place of another."""
        held = {id(one) for bucket in self._buckets for one in bucket.parameters}
        return any(id(one) not in held for one in self.step.parameters.values() if one.grad is not None)

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
        bucket.fill(0.0 if empty else self._weight / self._batch_size)
        self._begun.append(self.ranks.start_sum(bucket.flat))

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
        for wait in self._begun:
            wait()

    def __call__(self, loss: Any, terms: Sequence[Any]) -> tuple[float, list[Tensor], Tensor]:
        """Return loss, terms and norm of the gradients of the whole batch; set its gradients if all are finite."""
        rows, self._is_counting = self._weight, False
        has_more = self._must_arrange()
        self._begin_all()
        own = [rows * float(value) for value in (loss, *terms)] if rows else []
        mine, first = self.decisions, self.ranks.is_first
        decided = [mine.reads and first, mine.saves and first, mine.interrupted, mine.terminated]
        numbers = [rows, self._is_late, has_more, *decided, *own, *[0.0] * (_MOST_TERMS + 1 - len(own))]
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
        self._missed = self._missed or (bool(total) and not rows)
        if not total:
            return 0.0, [], torch.zeros((), device="cpu")
        loss, *means = (value / total for value in sums[len(decided) :])
        found = [torch.tensor(one, dtype=torch.float64, device="cpu") for one in means[: len(self.step.names)]]
        return loss, found, self._set(total, loss)

    @torch.no_grad()
    def _set(self, total: float, loss: float) -> Tensor:
        """Set gradients and buffers to the means over ranks, unless loss or norm is not finite; return the norm."""
        norms: list[Tensor] = []
        for bucket in self._buckets:
            bucket.numbers.div_(total / self._batch_size)
            norms.append(torch.linalg.vector_norm(bucket.gradients).to(norms[0].device if norms else None))
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device="cpu")
        if math.isfinite(loss) and norm.isfinite():
            for bucket in self._buckets:
                for parameter, mean, used in zip(bucket.parameters, bucket.means, bucket.used.tolist(), strict=True):
                    parameter.grad = mean if used else None
                for buffer, mean in zip(bucket.buffers.values(), bucket.buffer_means, strict=True):
                    buffer.copy_(mean)
        return norm


def _kind(tensor: Tensor) -> str:
    """What tensors of ranks that are added up have in common: not the number of the device, of which each has its own.

    >>> _kind(torch.zeros(2, 3))
    '(2, 3) float32 on cpu'
    """
    return f"{form(tensor)} on {tensor.device.type}"


def _has_news(tensor: Tensor, changed: set[int]) -> bool:
    """Whether a parameter has a gradient, or a buffer is one of those that have changed, by id."""
    return id(tensor) in changed if _is_buffer(tensor) else tensor.grad is not None


def _is_buffer(tensor: Tensor) -> bool:
    """Whether a tensor is no parameter, so that ranks have its mean, as that of a running average."""
    return tensor.is_floating_point() and not tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter)
