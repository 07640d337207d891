"""Networks of a table: what an encoder reads of its columns, and where a decoder starts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.parts import networks
from pyro_vae.parts.networks import NetworkFactory
from pyro_vae.tables.columns import Column

__all__ = ["input_network", "output_network"]


class _Features(nn.Module):
    r"""From encoded rows to what a network reads well: numbers near 0, one-hot vectors, and masks of observed entries.

    Real numbers and the logarithms of counts and of positive amounts are standardised; a missing one is 0. Next to each
    stands 1 if it is observed, else 0. A missing class is a vector of zeros. Covariates pass unchanged.
    """

    places: Tensor
    logs: Tensor
    shifts: Tensor
    loc: Tensor
    scale: Tensor
    class_places: Tensor
    class_numbers: Tensor

    def __init__(self, columns: Sequence[Column]):
        super().__init__()
        self.num_columns = len(columns)
        numbers = [(place, column.feature) for place, column in enumerate(columns) if column.feature is not None]
        classes = [(place, number) for place, column in enumerate(columns) for number in range(len(column.levels))]
        self.register_buffer("places", torch.tensor([place for place, _ in numbers], dtype=torch.long))
        self.register_buffer("logs", torch.tensor([name != "identity" for _, (name, *_) in numbers], dtype=torch.bool))
        self.register_buffer("shifts", torch.tensor([float(name == "log1p") for _, (name, *_) in numbers]))
        self.register_buffer("loc", torch.tensor([loc for _, (_, loc, _) in numbers]))
        self.register_buffer("scale", torch.tensor([scale for _, (*_, scale) in numbers]))
        self.register_buffer("class_places", torch.tensor([place for place, _ in classes], dtype=torch.long))
        self.register_buffer("class_numbers", torch.tensor([float(number) for _, number in classes]))

    @property
    def num_features(self) -> int:
        """How many numbers a row of columns becomes."""
        return 2 * len(self.places) + len(self.class_places)

    def forward(self, inputs: Tensor) -> Tensor:
        x, covariates = inputs[..., : self.num_columns], inputs[..., self.num_columns :]
        values = x[..., self.places]
        observed = ~values.isnan()
        least = torch.finfo(x.dtype).tiny
        logs = (values + self.shifts).clamp(min=least).log()
        standard = (torch.where(self.logs, logs, values) - self.loc) / self.scale
        one_hot = x[..., self.class_places] == self.class_numbers
        numbers = torch.where(observed, standard, 0.0)
        return torch.cat([numbers, observed.to(x.dtype), one_hot.to(x.dtype), covariates], -1)

    def extra_repr(self) -> str:
        return f"{self.num_columns} columns as {self.num_features} features"


class _Start(nn.Module):
    """Raw outputs shifted by fixed numbers, those of the columns alone, so that a network starts near the data."""

    start: Tensor

    def __init__(self, inner: nn.Module, start: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("start", start)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs) + self.start


class _Offset(nn.Module):
    """Add the last input, with the coefficient 1, to some outputs of a network of the other inputs."""

    which: Tensor

    def __init__(self, inner: nn.Module, which: Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("which", which)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs[..., :-1]) + inputs[..., -1:] * self.which


def input_network(columns: Sequence[Column], network: NetworkFactory) -> NetworkFactory:
    """A factory of networks that read rows of a table, with covariates behind them, by their features."""

    def build(in_features: int, out_features: int) -> nn.Module:
        features = _Features(columns)
        others = in_features - features.num_columns
        if others < 0:
            must = f"{features.num_columns}, the columns of the table, or more with covariates"
            raise ValueError(f"`in_features` must be {must}, got {in_features}")
        return nn.Sequential(features, networks.build(network, features.num_features + others, out_features))

    return build


def output_network(columns: Sequence[Column], network: NetworkFactory, offset: bool) -> NetworkFactory:
    """A factory of networks for the raw outputs of a table, which starts at those of the columns alone.

    With ``offset`` the last input is added to the logarithm of the mean of each column of counts.
    """
    starts = [column.start() for column in columns]
    start = torch.tensor([value for values in starts for value in values])
    logs = [
        float(column.has_log_mean and place == 0)
        for column, values in zip(columns, starts, strict=True)
        for place in range(len(values))
    ]

    def build(in_features: int, out_features: int) -> nn.Module:
        if out_features != len(start):
            must = f"{len(start)}, the raw outputs of the columns of the table"
            raise ValueError(f"`out_features` must be {must}, got {out_features}")
        inner = networks.build(network, in_features - offset, out_features)
        shifted = _Start(inner, start.clone()) if start.any() else inner
        return _Offset(shifted, torch.tensor(logs)) if offset else shifted

    return build
