"""The arguments of a table: which column has which role, and what is wrong with columns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyro_vae._utils.validation import describe
from pyro_vae.tables.kinds import KINDS, UnreadableColumn

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Problems", "Roles"]


class Roles:
    """Which column of a frame has which role, checked."""

    def __init__(self, frame: "pd.DataFrame", kinds: Any, context: Any, offset: Any, index: Any, drop: Any):
        self._labels = {str(label): label for label in frame.columns}
        self.kinds = {str(name): kind for name, kind in _mapping_of_kinds(kinds).items()}
        for name, kind in self.kinds.items():
            self._label(name, "kinds")
            if kind not in KINDS:
                raise ValueError(f"`kinds` must be one of {', '.join(KINDS)}, got {kind!r} for {name!r}")
        self.context = [self._label(name, "context") for name in _names(context, "context")]
        self.offset = None if offset is None else self._label(offset, "offset")
        self.index = None if index is None else self._label(index, "index")
        self.dropped = [self._label(name, "drop") for name in _names(drop, "drop")]
        taken = [*self.context, *self.dropped]
        taken += [label for label in (self.offset, self.index) if label is not None]
        if twice := [label for place, label in enumerate(taken) if label in taken[:place]]:
            raise ValueError(
                f"a column must have one role of `context`, `offset`, `index` and `drop`, got two for {twice[0]!r}"
            )
        self.columns = [label for label in frame.columns if label not in taken]
        if not self.columns:
            raise ValueError("`frame` must have a column that is no covariate, offset, index, or left out, got none")

    def _label(self, name: Any, argument: str) -> Any:
        if str(name) not in self._labels:
            raise ValueError(f"`{argument}` must be columns of the frame, {list(self._labels.values())}, got {name!r}")
        return self._labels[str(name)]


def _mapping_of_kinds(kinds: Any) -> Mapping[Any, Any]:
    if not isinstance(kinds, Mapping | None):
        raise TypeError(f"`kinds` must be a mapping, such as {{'sex': 'bernoulli'}}, got {describe(kinds)}")
    return kinds or {}


def _names(value: Any, argument: str) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"`{argument}` must be a list of names of columns, such as ['batch'], got {value!r}")
    return list(value)


class Problems:
    """What is wrong with the columns of a frame, collected so that one error names them all."""

    def __init__(self) -> None:
        self._found: dict[Any, str] = {}

    @contextmanager
    def of(self, label: Any) -> Iterator[None]:
        """Collect what is wrong with a column inside the block."""
        try:
            yield
        except UnreadableColumn as error:
            self._found[label] = str(error)

    def raise_all(self, may_drop: Sequence[Any] = ()) -> None:
        """Raise if there is a problem; ``may_drop`` are the columns that can be left out."""
        if not self._found:
            return
        texts = [f"column {label!r} {text}" for label, text in self._found.items()]
        droppable = [label for label in self._found if label in may_drop]
        hint = f"\nTo leave out: drop={droppable!r}" if droppable else ""
        lead = "`frame` must have columns that can be encoded: "
        if len(texts) == 1:
            raise ValueError(f"{lead}{texts[0]}.{hint}")
        raise ValueError("".join([lead.rstrip(), *(f"\n- {text}" for text in texts), hint]))
