"""The distribution of a row of a table: independent columns, each with a distribution of its own kind."""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae._utils.validation import describe
from pyro_vae.distributions.base import named_arguments
from pyro_vae.distributions.missing import accepts_missing, with_missing
from pyro_vae.distributions.properties import base_support, is_discrete, is_normalized, spell_support

__all__ = ["Columns"]


class _OfColumns(constraints.Constraint):
    """One constraint for each entry of the last dimension."""

    event_dim = 1

    def __init__(self, columns: Mapping[str, constraints.Constraint]):
        self.columns = dict(columns)
        self.is_discrete = all(column.is_discrete for column in self.columns.values())
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.check_entries(value).all(-1)

    def check_entries(self, value: Tensor) -> Tensor:
        """Whether each entry satisfies the constraint of its column, ``(*, D)``."""
        entries = zip(self.columns.values(), value.split(1, -1), strict=True)
        return torch.stack([column.check(entry) for column, entry in entries], -1)

    def __repr__(self) -> str:
        return f"Columns({', '.join(f'{name}: {column}' for name, column in self.columns.items())})"


@named_arguments
class Columns(dist.TorchDistribution):
    r"""A row of a table, whose D columns are independent, each with a distribution of its own kind.

    .. math:: \log p(x) = \sum_{d=1}^{D} \log p_d(x_d).

    A row is one tensor, ``(D,)``: classes, levels and counts are numbers 0, 1, ... in it. Where some columns have a
    mass and others a density, p(x) is a mass in the first and a density in the others: it is 1 in all if it is summed
    over the first and integrated over the others. ``mean`` and ``variance`` are those of each column; of a class, those
    of its number.

    Args:
        columns: distributions of event shape ``(1,)`` by the name of their column, or in a sequence, with the names
            ``"0"``, ``"1"``, ...

    >>> height, sex = dist.Normal(torch.zeros(5, 1), 1.0), dist.Bernoulli(torch.full((5, 1), 0.5))
    >>> p = Columns({"height": height.to_event(1), "sex": sex.to_event(1)})
    >>> p.batch_shape, p.event_shape, p.log_prob(torch.tensor([0.0, 1.0]))[0]
    (torch.Size([5]), torch.Size([2]), tensor(-1.6121))
    >>> p["sex"].mean.shape
    torch.Size([5, 1])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        columns: Mapping[str, dist.TorchDistribution] | Sequence[dist.TorchDistribution],
        validate_args: bool | None = None,
    ):
        self.columns = by_name(columns, "a distribution of one variable, of event shape (1,)", _is_single)
        batch = torch.broadcast_shapes(*(column.batch_shape for column in self.columns.values()))
        self.columns = self._expanded(batch)
        super().__init__(batch, torch.Size([len(self.columns)]), validate_args=validate_args)

    def __getitem__(self, name: str) -> dist.TorchDistribution:
        """The distribution of a column, of event shape ``(1,)``."""
        if name not in self.columns:
            raise KeyError(f"`name` must be one of the columns {list(self.columns)}, got {name!r}")
        return self.columns[name]

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Columns":
        batch = torch.Size(batch_shape)
        new = self._get_checked_instance(Columns, _instance)
        new.columns = self._expanded(batch)
        super(Columns, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def support(self) -> _OfColumns:
        return _OfColumns({name: column.support for name, column in self.columns.items()})

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return all(column.has_rsample for column in self.columns.values())

    @property
    def normalized(self) -> bool:
        """Whether each column is a normalised density or mass, see :func:`is_normalized`."""
        return all(map(is_normalized, self.columns.values()))

    @property
    def accepts_missing(self) -> bool:
        """Whether NaN is a missing entry in each column."""
        return all(map(accepts_missing, self.columns.values()))

    def with_missing(self) -> "Columns":
        """The same columns, in which NaN is a missing entry, see :mod:`pyro_vae.distributions.missing`."""
        return Columns({name: with_missing(column) for name, column in self.columns.items()})

    @property
    def mean(self) -> Tensor:
        return self._of_columns(lambda column: column.mean)

    @property
    def variance(self) -> Tensor:
        return self._of_columns(lambda column: column.variance)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._of_columns(lambda column: column.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._of_columns(lambda column: column.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.event_shape:
            must = f"rows of {len(self.columns)} columns, (*, {len(self.columns)})"
            raise ValueError(f"`value` must be {must}, got shape {tuple(value.shape)}")
        entries = zip(self.columns.values(), value.split(1, -1), strict=True)
        try:
            return reduce(operator.add, [column.log_prob(entry) for column, entry in entries])
        except ValueError as error:  # each column validates its entries
            if (text := self.find_outside(value)) is None:
                raise
            raise ValueError(text) from error

    def _expanded(self, batch: torch.Size) -> dict[str, dist.TorchDistribution]:
        """The columns with a batch shape, which most of them have already."""
        each = self.columns.items()
        return {name: one if one.batch_shape == batch else one.expand(batch) for name, one in each}

    def _of_columns(self, read: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([read(column) for column in self.columns.values()], -1)

    def find_outside(self, value: Tensor, first_row: int = 0) -> str | None:
        """Describe the first entry of ``value``, ``(*, N, D)``, that is not in the support of its column, if any.

        >>> p = Columns({"sex": dist.Bernoulli(torch.full((5, 1), 0.5)).to_event(1)})
        >>> p.find_outside(torch.tensor([[0.0], [1.0], [2.0], [0.0], [0.0]]))
        "column 'sex' must hold 0 or 1, got 2 at row 2"
        """
        outside = ~self.support.check_entries(value)
        if not outside.any():
            return None
        *batch, place = outside.nonzero()[0].tolist()
        name, column = list(self.columns.items())[place]
        where = f" at row {first_row + batch[-1]}" if batch else ""
        alternatives = _alternatives(column)
        text = f"column {name!r} must hold {_in_words(column)}, got {value[(*batch, place)].item():g}{where}"
        return f"{text}. {alternatives}" if alternatives else text


def by_name(columns: Any, kind: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """Return what belongs to each column by its name, ``"0"``, ``"1"``, ... for a sequence; ``kind`` is for errors."""
    must = f"a mapping from names of columns to {kind}, or a sequence of them"
    if isinstance(columns, Sequence) and not isinstance(columns, str):
        columns = {str(place): column for place, column in enumerate(columns)}
    if not isinstance(columns, Mapping):
        raise TypeError(f"`columns` must be {must}, got {describe(columns)}")
    if not columns:
        raise ValueError(f"`columns` must be {must}, got no column")
    for name, column in columns.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"`columns` must be {must}, got the name {name!r}")
        if not fits(column):
            got = column if hasattr(column, "event_shape") and not isinstance(column, type) else describe(column)
            raise ValueError(f"`columns` must be {must}, got {got} for {name!r}")
    return dict(columns)


def _is_single(column: Any) -> bool:
    return isinstance(column, torch.distributions.Distribution) and column.event_shape == (1,)


def _in_words(column: Any) -> str:
    """The values of a column, for messages."""
    support = base_support(column)
    if support is constraints.boolean:
        return "0 or 1"
    if support is constraints.positive:
        return "positive numbers"
    if not is_discrete(column):
        return "finite numbers" if support is constraints.real else f"numbers in {spell_support(column)}"
    if support is constraints.nonnegative_integer:
        return "counts 0, 1, 2, ..."
    return f"whole numbers from {support.lower_bound} to {support.upper_bound}"


def _alternatives(column: Any) -> str:
    """What else a column could be, where its distribution knows it."""
    while not hasattr(column, "alternatives") and hasattr(column, "base_dist"):
        column = column.base_dist
    return getattr(column, "alternatives", "")
