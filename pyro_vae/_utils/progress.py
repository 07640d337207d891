"""One progress bar for a long call, with the names of its stages, on a terminal or in a notebook."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from pyro_vae._utils.ranks import ranks
from pyro_vae._utils.validation import boolean

__all__ = ["Progress", "check_progress", "counted_for_all", "progress_bar"]

_WIDTH = 100  # characters of a bar in a notebook
_STAGED = "{desc} {percentage:3.0f} % |{bar}| {elapsed}"


def check_progress(progress: object) -> None:
    """Raise unless the argument ``progress`` is ``True``, ``False`` or ``None``."""
    if progress is not None:
        boolean(progress, "progress")


class Progress:
    """How much of a call is done, in units of ``total``, or in stages, each of which is one unit.

    A call inside of another one has no bar of its own. It fills the current stage of the outer call.
    """

    def __init__(
        self, name: str, total: float, stages: Sequence[str], bar: "tqdm | None", outer: "Progress | None" = None
    ):
        self.name, self.total, self.stages = name, total, list(stages)
        self.done: float = 0
        self._bar, self._outer, self._stage = bar, outer, 0
        self.counts = 1  # how often what is done here counts, as where other ranks do as much

    def advance(self, amount: float = 1) -> None:
        """Add to what is done."""
        done = self.done + amount * self.counts
        self.advance_to(done if self.counts == 1 else min(done, self.total))

    def advance_to(self, done: float) -> None:
        """Set what is done."""
        step, self.done = done - self.done, done
        if self._bar is not None:
            self._bar.update(step)
        if self._outer is not None:
            self._outer._fill(done / self.total)

    def begin(self, stage: str) -> None:
        """Begin a stage: those before it are done, or were left out."""
        self._stage = self.stages.index(stage)
        self.advance_to(self._stage)
        self._describe()

    def note(self, values: dict[str, str]) -> None:
        """Show values at the end of the bar, from its next step on."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def _fill(self, fraction: float) -> None:
        if self.stages:
            self.advance_to(self._stage + min(fraction, 1.0))

    def _describe(self, inner: str = "") -> None:
        stage, *left = self.stages[self._stage :]
        text = stage + (f" ({inner})" if inner else "") + (f", then {', '.join(left)}" if left else "")
        if self._bar is not None:
            self._bar.set_description_str(f"{self.name}: {text}")
        elif self._outer is not None and self._outer.stages:
            self._outer._describe(stage)


_current: ContextVar[Progress | None] = ContextVar("the call whose progress is shown", default=None)


@contextmanager
def progress_bar(
    name: str,
    progress: bool | None,
    *,
    total: float = 0,
    stages: Sequence[str] = (),
    unit: str = "it",
    unit_scale: bool = False,
) -> Iterator[Progress]:
    """Open the bar of a call for a block; inside of the block of another call, a part of that call's bar.

    Of several ranks, the first one shows it.

    Args:
        name: the name of the function.
        progress: whether to show the bar; if ``None``, on a terminal and in a notebook alone. There, the environment
            variable ``TQDM_DISABLE=1``, set before the import, hides it.
        total: what there is to do, in units of ``unit``; with ``unit_scale`` shown as 1.5k.
        stages: the names of the stages of the call, in place of ``total``.
    """
    check_progress(progress)
    outer = _current.get()
    shown = outer is None and ranks().is_first
    bar = _open_bar(name, progress, total, stages, unit=unit, unit_scale=unit_scale) if shown else None
    current = Progress(name, len(stages) or total, stages, bar, outer)
    token = _current.set(current)
    try:
        yield current
        if stages:
            current.advance_to(len(stages))
    finally:
        _current.reset(token)
        if bar is not None:
            bar.close()


@contextmanager
def counted_for_all(size: int) -> Iterator[None]:
    """Run a block in which a rank does its share of what is shown, as the others do, of ``size`` in all."""
    current = _current.get()
    before = 1 if current is None else current.counts
    try:
        if current is not None:
            current.counts = before * size
        yield
    finally:
        if current is not None:
            current.counts = before


def _open_bar(name: str, progress: bool | None, total: float, stages: Sequence[str], **options: Any) -> tqdm:
    notebook = _in_notebook()
    if progress is not None:
        options["disable"] = not progress
    elif not notebook:
        options["disable"] = None  # quiet unless the output is a terminal
    if stages:
        options["bar_format"] = _STAGED
    return (_NotebookBar if notebook else tqdm)(desc=name, total=len(stages) or total, **options)


def _in_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook, which shows rich output."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class _NotebookBar(tqdm):
    """A bar that is one line of text below a cell, rewritten in place. It needs no widgets.

    The bar of ``tqdm.notebook`` needs ipywidgets, and a bar that is printed with carriage returns fills a saved
    notebook with its old states.
    """

    def __init__(self, **options: Any):
        self._shown: Any = None
        super().__init__(file=io.StringIO(), ncols=_WIDTH, mininterval=0.25, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the current state."""
        from IPython.display import display

        line = {"text/plain": str(self) if msg is None else msg}
        if self._shown is None:
            self._shown = display(line, raw=True, display_id=True)
        else:
            self._shown.update(line, raw=True)
        return True
