"""A table: the rows of a frame as tensors, how they were encoded, and the way back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae._utils import display
from pyro_vae._utils.data import DataTensors
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import describe, mapping, positive_int
from pyro_vae.inference_data.datatree import to_datatree
from pyro_vae.parts import guides, likelihoods, networks, priors
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.networks import NetworkFactory
from pyro_vae.tables.columns import Column, make_column
from pyro_vae.tables.covariates import Covariate, Offset
from pyro_vae.tables.frames import as_pandas, is_pandas, native_column, native_frame, storage_of
from pyro_vae.tables.kinds import infer_kind
from pyro_vae.tables.networks import input_network, output_network
from pyro_vae.tables.roles import Problems, Roles
from pyro_vae.tables.tree import by_column
from pyro_vae.vae import VAE

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Table"]


class Table(display.Result, nn.Module):
    r"""The rows of a frame as a tensor x, ``(N, D)``, and how each column was encoded.

    :meth:`from_frame` makes a table. ``print(table)`` shows what it has decided for each column.

    - Real numbers are standardised, log-normal ones divided by their geometric mean, counts stay as they are, and
      classes are their numbers 0 to k - 1. Missing entries are NaN.
    - ``table.vae()`` makes a VAE with a :class:`pyro_vae.parts.likelihoods.Columns` decoder. ``pv.fit`` and everything
      else that takes data takes the table, or its tensors ``table.data``.
    - :meth:`decode`, :meth:`impute`, :meth:`imputed_cells` and :meth:`to_datatree` lead back to the frame's names,
      units and dtypes.
    - A VAE with ``table=`` keeps the encoding, without the rows, and ``vae.save`` stores it in the model's file:
      ``VAE.load(path).table.encode(new_frame)``.

    Attributes:
        x: the encoded rows, ``(N, D)``.
        context: covariates of each row, ``(N, C)``, or ``None``; the offset is the last of them.
        index: names of the rows, an index of pandas.
        columns: what is known of each column, in the order of x.

    >>> import pyro_vae as pv
    >>> table = Table.from_frame(pv.datasets.penguins(), context=["island"])
    >>> print(table)
    Table of 344 rows, 7 columns, 0.8% of entries missing
    column             kind         missing  encoding
    species            categorical     0.0%  Adelie, Chinstrap, Gentoo
    bill_length_mm     normal          0.6%  mean 43.92, sd 5.452
    bill_depth_mm      normal          0.6%  mean 17.15, sd 1.972
    flipper_length_mm  normal          0.6%  mean 200.9, sd 14.04
    body_mass_g        normal          0.6%  mean 4202, sd 800.8
    sex                bernoulli       3.2%  female, male
    year               ordinal         0.0%  2007 < 2008 < 2009
    island             covariate       0.0%  Biscoe, Dream, Torgersen
    >>> vae = table.vae(latent=2)
    >>> fitted = pv.fit(vae.model, vae.guide, table, epochs=2)
    >>> table.decode(vae.generate(2, context=table.context[:2])).columns.tolist() == table.names
    True
    """

    x: Tensor
    context: Tensor | None

    def __init__(
        self,
        columns: Sequence[Column],
        covariates: Sequence[Covariate],
        offset: Offset | None,
        index_name: str | None = None,
    ):
        super().__init__()
        self.columns, self.covariates, self.offset = nn.ModuleList(columns), nn.ModuleList(covariates), offset
        # Buffers follow `table.to(device)`. They are no state: a model file has the encoding alone.
        self.register_buffer("x", torch.zeros(0, len(columns)), persistent=False)
        self.register_buffer("context", None, persistent=False)
        self.index: Any = None
        self._frame: Any = None
        self._index_name = index_name

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        kinds: Mapping[str, str] | None = None,
        context: Sequence[str] = (),
        offset: str | None = None,
        index: str | None = None,
        drop: Sequence[str] = (),
    ) -> "Table":
        """Make a table from a frame of pandas or polars.

        Args:
            frame: the frame. Missing entries are NaN, ``None`` or ``pd.NA``.
            kinds: the kind of a column, one of :data:`KINDS`, by its name. Those that you leave out are inferred, see
                :mod:`pyro_vae.tables.kinds`.
            context: names of columns that are covariates: the model is of the other columns, given these. Numbers are
                standardised; texts, booleans, categories, and columns of a kind of classes in ``kinds``, are one-hot.
            offset: name of a column of positive exposures, such as library sizes or person-years. Their logarithm is
                added to the log-mean of each column of counts, with the coefficient 1.
            index: name of a column that names the rows; by default the index of the frame.
            drop: names of columns to leave out.

        Raises:
            ValueError: with the name of each column that needs a decision, and what can be done: columns with one
                value, without values, with dates or numbers as text, with values of several types, or a row number.
        """
        whole = as_pandas(frame)
        roles = Roles(whole, kinds, context, offset, index, drop)
        problems = Problems()
        columns: list[Column] = []
        for label in roles.columns:
            with problems.of(label):
                column = whole[label]
                kind = roles.kinds.get(str(label)) or infer_kind(column)
                columns.append(make_column(column, kind, storage_of(frame, label)))
        covariates: list[Covariate] = []
        for label in roles.context:
            with problems.of(label):
                stated = roles.kinds.get(str(label))
                covariates.append(Covariate(whole[label], stated, storage_of(frame, label)))
        exposure = None
        if roles.offset is not None:
            with problems.of(roles.offset):
                exposure = Offset(whole[roles.offset])
        problems.raise_all(roles.columns)
        if exposure is not None and not any(column.has_log_mean for column in columns):
            kinds_found = {column.name: column.kind for column in columns}
            raise ValueError(f"`offset` needs a column of counts, got the kinds {kinds_found}: state them in `kinds`")
        return cls(columns, covariates, exposure, index).encode(frame)

    def encode(self, frame: Any, unseen: str = "raise") -> "Table":
        """Encode new rows as those of this table: the same levels, locations and scales.

        Args:
            frame: a frame with the columns of this table; others are left out.
            unseen: what happens to a level that this table does not have: ``"raise"``, or ``"missing"``.

        Returns:
            a table of the new rows.

        Raises:
            ValueError: if a column is not there, or has values that its kind cannot have.
        """
        if unseen not in ("raise", "missing"):
            raise ValueError(f"`unseen` must be 'raise' or 'missing', got {unseen!r}")
        whole, problems = as_pandas(frame, rows=1), Problems()
        needed = [*self._columns(), *self._covariates(), *([self.offset] if self.offset is not None else [])]
        if absent := [part.name for part in needed if part.label not in whole.columns]:
            hint = f"For a column that was not observed: `frame[{absent[0]!r}] = float('nan')`"
            raise ValueError(f"`frame` must have the columns of the table, got none that is called {absent}. {hint}")
        encoded: dict[int, Any] = {}
        for part in needed:
            with problems.of(part.label):
                encoded[id(part)] = part.encode(whole[part.label], unseen)
        problems.raise_all()
        dtype = torch.get_default_dtype()
        x = torch.as_tensor(np.stack([encoded[id(column)] for column in self._columns()], 1), dtype=dtype)
        given = [encoded[id(part)] for part in needed if not isinstance(part, Column)]
        context = torch.as_tensor(np.concatenate(given, 1), dtype=dtype) if given else None
        table = self.without_rows()
        name = self._index_name
        if name is not None and name not in whole.columns:
            raise ValueError(f"`frame` must have the column {name!r}, which names the rows, got {list(whole.columns)}")
        rows = whole.index if name is None else whole.set_index(name).index
        table.x, table.context, table.index, table._frame = x, context, rows, frame
        return table

    def without_rows(self) -> "Table":
        """The encoding alone: a table that shares its columns with this one, and has no rows."""
        return Table(self._columns(), self._covariates(), self.offset, self._index_name)

    # --- What it has -------------------------------------------------------------------------------------------------

    def _columns(self) -> list[Any]:
        return list(self.columns)

    def _covariates(self) -> list[Any]:
        return list(self.covariates)

    @property
    def names(self) -> list[str]:
        """The names of the columns of x."""
        return [column.name for column in self._columns()]

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each column, by its name."""
        return {column.name: column.kind for column in self._columns()}

    def __len__(self) -> int:
        return len(self.x)

    def __bool__(self) -> bool:
        return True

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The arguments of the VAE's model and guide, ``(x,)`` or ``(x, context)``."""
        return (self.x,) if self.context is None else (self.x, self.context)

    def to_data(self) -> DataTensors:
        """The data for everything that takes data: ``pv.fit(vae.model, vae.guide, table)``."""
        self._check_rows()
        columns = [("column", np.array(self.names)), *[None] * (len(self.data) - 1)]
        return DataTensors(self.data, _row_labels(self.index), columns)

    def _check_rows(self) -> None:
        if not len(self):
            raise ValueError("a table must have rows for this, got the encoding alone: `vae.table.encode(frame)`")

    @property
    def num_covariates(self) -> int | None:
        """C, the number of covariates of a row, the offset included; ``None`` without any."""
        count = sum(covariate.width for covariate in self._covariates()) + (self.offset is not None)
        return count or None

    @property
    def log_scale(self) -> Tensor:
        r""":math:`\sum_{d\ \mathrm{observed}} \log s_d` of each row, ``(N,)``: the change of scale in nats.

        The tensor x has real numbers divided by their scale s. In the units of the frame the density is

        .. math:: \log p(\mathrm{row}) = \log p(x) - \sum_{d\ \mathrm{observed}} \log s_d ,

        the same for each way to scale the columns. Compare log p(row), and not log p(x), between tables that scale in
        different ways, such as tables made from different rows, or with ``normal`` and ``student_t``.
        """
        scales = self.x.new_tensor([column.log_scale for column in self._columns()])
        return torch.where(self.x.isnan(), 0.0, scales).sum(-1)

    def describe(self) -> "pd.DataFrame":
        """Return a frame with a row for each column: kind, share of missing entries, and encoding."""
        import pandas as pd

        rows = [(part.name, part.kind, part.missing, part.describe()) for part in self._columns()]
        rows += [(part.name, "covariate", 0.0, part.describe()) for part in self._covariates()]
        rows += [(self.offset.name, "offset", 0.0, self.offset.describe())] if self.offset is not None else []
        return pd.DataFrame(rows, columns=["column", "kind", "missing", "encoding"]).set_index("column")

    def _headline(self) -> str:
        if not len(self):
            return f"Encoding of {len(self.columns)} columns, without rows"
        share = self.x.isnan().double().mean()
        return f"Table of {len(self)} rows, {len(self.columns)} columns, {share:.1%} of entries missing"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """The header, and what was decided for each column."""
        rows = [("column", "kind", "missing", "encoding")]
        return rows + [
            (str(n), kind, f"{missing:.1%}", text) for n, kind, missing, text in self.describe().itertuples()
        ]

    def __repr__(self) -> str:
        rows = self._rows()
        first, second = (max(len(row[place]) for row in rows) for place in (0, 1))
        lines = [f"{name:<{first}}  {kind:<{second}}  {missing:>7}  {text}" for name, kind, missing, text in rows]
        return "\n".join([self._headline(), *lines])

    def _table(self) -> display.Table:
        head, *rows = self._rows()
        return display.Table(head, rows, f"{self._headline()}.")

    # --- A model -----------------------------------------------------------------------------------------------------

    def families(self) -> dict[str, Family]:
        """New families of the columns, by name, for :class:`pyro_vae.parts.likelihoods.Columns`."""
        return {column.name: column.family() for column in self._columns()}

    def network(self, network: NetworkFactory) -> NetworkFactory:
        """A network for encoders: it reads standardised numbers, logarithms, one-hot classes and what is missing.

        >>> import pyro_vae as pv
        >>> table = Table.from_frame(pv.datasets.penguins())
        >>> table.network(networks.mlp([32]))(8, 4)[0]
        _Features(8 columns as 19 features)
        """
        return input_network(self._columns(), network)

    def output_network(self, network: NetworkFactory) -> NetworkFactory:
        """A network for decoders: it starts at the distributions of the columns alone, and adds the offset."""
        return output_network(self._columns(), network, self.offset is not None)

    def vae(self, latent: int = 2, hidden: Sequence[int] = (64,), activation: Callable[[], nn.Module] = nn.Tanh) -> VAE:
        """Make the usual VAE of this table.

        The prior is standard normal and the guide a diagonal normal. It is short for parts that you can replace:

        .. code-block:: python

            net, C = networks.mlp([64], nn.Tanh), table.num_covariates or 0
            encoder = guides.DiagonalNormal(len(table.names) + C, latent, table.network(net))
            decoder = likelihoods.Columns(latent + C, table.families(), table.output_network(net))
            vae = pv.VAE(priors.StandardNormal(latent), encoder, decoder, context=C or None, table=table)

        Args:
            latent: number of latent variables.
            hidden: sizes of the hidden layers of both networks; ``[]`` for a factor analysis, a linear decoder.
            activation: of the hidden layers.
        """
        network, covariates = networks.mlp(hidden, activation), self.num_covariates or 0
        encoder = guides.DiagonalNormal(len(self.columns) + covariates, latent, self.network(network))
        decoder = likelihoods.Columns(latent + covariates, self.families(), self.output_network(network))
        return VAE(priors.StandardNormal(latent), encoder, decoder, context=self.num_covariates, table=self)

    # --- Back to the frame -------------------------------------------------------------------------------------------

    def decode(self, draws: Tensor, index: Any = None) -> Any:
        """Turn encoded rows into a frame with the names, units, levels and dtypes of the first one.

        Args:
            draws: rows ``(N, D)``, such as ``vae.generate(N)``, or several draws of them, ``(S, N, D)``.
            index: names of the rows; by default those of the table if N is its number of rows, else 0, 1, ...

        Returns:
            a frame of N rows; of several draws, one of S N rows, whose index has the number of the draw first; a frame
            of polars has it as the first column, ``draw``.
        """
        values = self._draws(draws)
        columns = {column.label: column.decode(values[..., place].ravel()) for place, column in self._numbered()}
        library = self._library()
        frame = native_frame(columns, library)
        rows = self._row_names(values.shape[-2], index)
        if library != "pandas":
            return _with_draws(frame, values.shape[:-2], len(rows), library)
        frame.index = rows if values.ndim == 2 else _draw_index(len(values), rows)
        return frame

    def _draws(self, draws: Tensor) -> np.ndarray:
        shape = f"({len(self.columns)},)"
        if not isinstance(draws, Tensor) or draws.dim() not in (2, 3) or draws.shape[-1] != len(self.columns):
            must = f"encoded rows, a tensor (N, {len(self.columns)}) or (S, N, {len(self.columns)})"
            raise ValueError(f"`draws` must be {must}, rows of shape {shape}, got {describe(draws)}")
        return draws.detach().cpu().double().numpy()

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._columns())

    def _library(self) -> str:
        return self._columns()[0].storage["library"]

    def _row_names(self, count: int, index: Any) -> Any:
        import pandas as pd

        if index is None:
            return self.index if count == len(self) and self.index is not None else pd.RangeIndex(count)
        if len(index) != count:
            raise ValueError(f"`index` must have a name for each of {count} rows, got {len(index)}")
        return pd.Index(index)

    def impute(self, vae: VAE, num_draws: int = 1000, seed: int = 0) -> Any:
        r"""Return the frame with its missing entries filled in, and its observed ones untouched.

        A missing number becomes the median of its draws, and a missing class the most frequent one. One completed frame
        hides how uncertain its new entries are: see :meth:`imputed_cells`, and for multiple imputation
        ``table.decode(vae.impute(table.x, 20))``.

        Args:
            vae: a VAE of this table.
            num_draws: draws of each missing entry, :math:`z \sim q(z \mid x_\mathrm{obs})`,
                :math:`x_\mathrm{mis} \sim p(x_\mathrm{mis} \mid z)`.
            seed: of the draws.
        """
        draws = self._imputed(vae, num_draws, seed)
        whole = as_pandas(self._frame, rows=1)
        filled: dict[Any, Any] = {}
        for place, column in self._numbered():
            holes = np.flatnonzero(self._holes(place))
            if holes.size:
                centres = column.values(_centre(column, draws[:, holes, place]))
                filled[column.label] = _fill(whole[column.label], holes, centres)
        return _replace(self._frame, whole, filled, self._columns())

    def imputed_cells(
        self, vae: VAE, num_draws: int = 1000, quantiles: Sequence[float] = (0.05, 0.95), seed: int = 0
    ) -> "pd.DataFrame":
        """Return a row for each missing entry: its centre and interval, in the units of the frame.

        Args:
            vae, num_draws, seed: see :meth:`impute`.
            quantiles: between 0 and 1, by default those of an interval of 90 %.

        Returns:
            a frame of pandas with the columns ``row`` and ``column``; ``value``, the median, or the most frequent
            class; one column for each quantile, such as ``5%``, of numbers and ordered levels; ``probability``, the
            share of draws with this value, of classes, levels and counts.
        """
        import pandas as pd

        levels = _checked_quantiles(quantiles)
        draws, rows = self._imputed(vae, num_draws, seed), []
        for place, column in self._numbered():
            for hole in np.flatnonzero(self._holes(place)):
                drawn = draws[:, hole, place]
                centre = _centre(column, drawn[:, None])
                row = {"row": self.index[hole], "column": column.name, "value": column.values(centre).iloc[0]}
                if column.kind not in ("bernoulli", "categorical"):
                    ends = np.quantile(drawn, levels, method="inverted_cdf" if _is_discrete(column) else "linear")
                    row |= {f"{level:.4g}%": end for level, end in zip(
                        np.multiply(levels, 100), column.values(np.atleast_1d(ends)), strict=True)}  # fmt: skip
                if _is_discrete(column):
                    row["probability"] = float((drawn == centre).mean())
                rows.append(row)
        names = ["row", "column", "value", *(f"{100 * level:.4g}%" for level in levels), "probability"]
        return pd.DataFrame(rows, columns=names)

    def _holes(self, place: int) -> np.ndarray:
        return self.x[:, place].isnan().cpu().numpy()

    def _imputed(self, vae: VAE, num_draws: int, seed: int) -> np.ndarray:
        """Draws ``(S, N, D)`` of the missing entries of all rows."""
        positive_int(num_draws, "num_draws")
        self._check_vae(vae)
        with seeded(seed):
            x, *context = self._data_for(vae)
            return self._draws(vae.impute(x, num_draws, *context))

    def _data_for(self, vae: VAE) -> list[Tensor]:
        """The data on the device and in the dtype of a VAE."""
        like = next(vae.decoder.parameters())
        return [tensor.to(like) for tensor in self.data]

    def _check_vae(self, vae: VAE) -> None:
        if not isinstance(vae, VAE):
            raise TypeError(f"`vae` must be a VAE of this table, such as `table.vae()`, got {describe(vae)}")
        self._check_rows()
        shapes = (tuple(vae.data_shape), vae.context)
        if shapes != ((len(self.columns),), self.num_covariates):
            must = f"of {len(self.columns)} columns and {self.num_covariates or 'no'} covariates, as the table"
            raise ValueError(f"`vae` must be {must}, got data of shape {shapes[0]} and {shapes[1] or 'no'} covariates")

    def to_datatree(self, vae: VAE, draws: int = 1000, seed: int = 0, **options: Any) -> "xr.DataTree":
        """Export draws for ArviZ with a variable for each column, in the units of the frame.

        The groups are those of :func:`pyro_vae.to_datatree`. In ``posterior_predictive``, ``prior_predictive`` and
        ``observed_data`` each column is a variable along ``obs``, whose coordinate is the index of the frame. Classes
        are their numbers, or their levels if these are numbers; the attribute ``levels`` names them. ``imputed`` has
        the draws of the missing entries alone, along a dimension for each column, such as ``sex_missing``.
        Covariates are in ``constant_data``.

        Args:
            vae: a VAE of this table.
            draws, seed: number of draws, and their seed.
            options: further arguments of :func:`pyro_vae.to_datatree`, such as ``history`` or ``coords``.
        """
        self._check_vae(vae)
        coords = {"obs": _row_labels(self.index)} | dict(mapping(options.pop("coords", None), "coords", "{}"))
        constants = self._constants() | dict(mapping(options.pop("constant_data", None), "constant_data", "{}"))
        names: dict[str, Any] = {"coords": coords, "constant_data": constants}
        tree = to_datatree(vae.model, vae.guide, *self._data_for(vae), draws=draws, seed=seed, **names, **options)
        return by_column(tree, self._columns())

    def _constants(self) -> dict[str, np.ndarray]:
        if not self.num_covariates:
            return {}
        whole = as_pandas(self._frame, rows=1)
        needed = [*self._covariates(), *([self.offset] if self.offset is not None else [])]
        return {part.name: part.values(whole[part.label]) for part in needed}


def _draw_index(count: int, rows: Any) -> Any:
    """An index of draws and rows."""
    import pandas as pd

    draws = np.repeat(np.arange(count), len(rows))
    names = ["draw", *rows.names] if isinstance(rows, pd.MultiIndex) else ["draw", rows.name or "row"]
    levels = [rows.get_level_values(level).repeat(1) for level in range(rows.nlevels)]
    return pd.MultiIndex.from_arrays([draws, *(np.tile(level, count) for level in levels)], names=names)


def _with_draws(frame: Any, lead: tuple[int, ...], rows: int, library: Any) -> Any:
    """Put the numbers of draws in front of the columns of a frame that has no index."""
    if not lead:
        return frame
    import narwhals as nw

    draws = np.repeat(np.arange(lead[0]), rows).tolist()
    found = nw.from_native(frame, eager_only=True)
    number = nw.new_series("draw", draws, nw.Int64, backend=library)
    return nw.to_native(found.select(number, nw.all()))


def _is_discrete(column: Any) -> bool:
    return column.feature is None or column.has_log_mean


def _centre(column: Any, draws: np.ndarray) -> np.ndarray:
    """The median of draws ``(S, K)``, or of classes the most frequent number."""
    if column.kind not in ("bernoulli", "categorical"):
        return np.quantile(draws, 0.5, axis=0, method="inverted_cdf" if _is_discrete(column) else "linear")
    counts = np.stack([(draws == number).sum(0) for number in range(len(column.levels))])
    return counts.argmax(0).astype(float)


def _fill(column: "pd.Series", holes: np.ndarray, values: "pd.Series") -> "pd.Series":
    """Fill entries of a column; observed ones stay the same objects."""
    import pandas as pd

    filled = column.astype("object").to_numpy(dtype=object, copy=True)
    filled[holes] = values.to_numpy(dtype=object)
    return pd.Series(filled, column.index, dtype=object)


def _replace(frame: Any, whole: "pd.DataFrame", filled: Mapping[Any, "pd.Series"], columns: Sequence[Any]) -> Any:
    """Return the frame with other columns of the same dtypes."""
    made = {
        column.label: native_column(column.name, filled[column.label], storage_of(frame, column.label))
        for column in columns
        if column.label in filled
    }
    if is_pandas(frame):
        found = whole.copy()
        for label, column in made.items():
            found[label] = column
        return found
    import narwhals as nw

    found = nw.from_native(frame, eager_only=True)
    return nw.to_native(found.with_columns(*(nw.from_native(column, series_only=True) for column in made.values())))


def _checked_quantiles(quantiles: Any) -> list[float]:
    is_list = isinstance(quantiles, Sequence) and not isinstance(quantiles, str)
    if not is_list or not all(isinstance(level, int | float) and 0 <= level <= 1 for level in quantiles):
        raise ValueError(f"`quantiles` must be numbers between 0 and 1, such as (0.05, 0.95), got {quantiles!r}")
    return [float(level) for level in quantiles]


def _row_labels(index: Any) -> np.ndarray:
    """Names of rows for a coordinate: numbers, times or texts."""
    import pandas as pd

    if isinstance(index, pd.MultiIndex):
        return np.array([" ".join(map(str, row)) for row in index])
    if index.dtype.kind in "iufM":
        return index.to_numpy()
    return index.map(str).to_numpy(dtype=str)
