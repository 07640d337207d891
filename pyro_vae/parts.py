"""Parts: modules that return a distribution, ``forward(context=None) -> Distribution``.

A part is a family (:mod:`pyro_vae.families`) and what feeds it: free parameters, or a network of a context. The words
of :mod:`pyro_vae.priors`, :mod:`pyro_vae.guides` and :mod:`pyro_vae.likelihoods` are these two with a family filled in.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.families import Family, Relaxed, as_shape
from pyro_vae.recipes import Recorded

__all__ = ["Conditional", "Part", "Unconditional"]


class Part(Recorded, nn.Module):
    """A module that returns a distribution.

    Any module with ``forward(context=None) -> Distribution`` can stand in a :class:`pyro_vae.VAE`; this base adds
    ``event_shape``, the discrete twin and ``read``, and keeps the arguments of its constructor, so that a model with it
    can be saved.
    """

    family: Family

    @property
    def event_shape(self) -> torch.Size:
        return self.family.event_shape

    def read(self, value: Tensor) -> Tensor:
        """What the decoder sees of a site's value: for most priors, the value."""
        return value

    def discrete(self) -> "Part":
        """The discrete twin of a relaxed part: the same parameters, shared, under the discrete distribution."""
        raise self._no_twin()

    def _discrete_family(self) -> Family:
        if not isinstance(self.family, Relaxed):
            raise self._no_twin()
        return self.family.discrete()

    def _no_twin(self) -> TypeError:
        return TypeError(
            f"{type(self).__name__} has no discrete twin; relaxed parts have one: RelaxedBernoulli, GumbelSoftmax"
        )


class Unconditional(Part):
    """A family fed with free outputs of its own.

    Args:
        family: the map from raw outputs to a distribution.
        raw: the raw outputs, ``(family.num_raw,)``. An ``nn.Parameter`` is trained; a plain tensor is fixed. Zeros
            and fixed if left out.

    >>> from pyro_vae import families
    >>> Unconditional(families.Normal(2))().mean
    tensor([0., 0.])
    """

    def __init__(self, family: Family, raw: Tensor | None = None):
        super().__init__()
        self.family = family
        raw = torch.zeros(family.num_raw) if raw is None else raw
        if isinstance(raw, nn.Parameter):
            self.raw = raw
        else:
            self.register_buffer("raw", raw)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.family(self.raw)

    def discrete(self) -> "Unconditional":
        return Unconditional(self._discrete_family(), self.raw)


class Conditional(Part):
    """A family fed by a network of a context.

    Args:
        family: the map from raw outputs to a distribution.
        context: size or shape of the context, flattened before the network.
        network: a module from ``(*, context features)`` to ``(*, family.num_raw)``.

    >>> from pyro_vae import families, networks
    >>> family = families.Normal(1)
    >>> encoder = Conditional(family, 2, networks.mlp([32])(2, family.num_raw))
    >>> encoder(torch.zeros(7, 5, 2)).batch_shape
    torch.Size([7, 5])
    """

    def __init__(self, family: Family, context: int | Sequence[int], network: nn.Module):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network: got a {type(network).__name__}; accepted is a module, such as networks.linear()(2, 3)"
            )
        self.family = family
        self.context_shape = as_shape(context, "context")
        self.network = network

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        raw = self.raw_outputs(context)
        try:
            return self.family(raw)
        except ValueError as error:
            if context is None or not context.isnan().any():
                raise
            raise ValueError(
                f"{type(self).__name__}: got a context with NaN, for what is missing, and its network reads NaN as a "
                "number; accepted is a network that knows better, networks.with_missing(network) or its like"
            ) from error

    def raw_outputs(self, context: Tensor | None) -> Tensor:
        """What the network makes of a context, ``(*, family.num_raw)``."""
        if not isinstance(context, Tensor):
            given = "none" if context is None else f"a {type(context).__name__}"
            raise TypeError(
                f"{type(self).__name__} needs a context of shape (*, {_spell(self.context_shape)}); got {given}"
            )
        batch_dims = context.dim() - len(self.context_shape)
        if batch_dims < 0 or context.shape[batch_dims:] != self.context_shape:
            raise ValueError(
                f"{type(self).__name__}: got a context of shape {tuple(context.shape)}; "
                f"accepted is (*, {_spell(self.context_shape)})"
            )
        try:
            raw = self.network(context.flatten(batch_dims))
        except RuntimeError as error:
            dtypes = {parameter.dtype for parameter in self.network.parameters()}
            if dtypes and context.dtype not in dtypes:
                raise TypeError(
                    f"{type(self).__name__}: got a context of {context.dtype}; accepted is {dtypes.pop()}, that of its "
                    "network. Convert the data with `x.to(dtype)`, or bytes with `datasets.grey(x)` and its like"
                ) from error
            raise
        if raw.shape[-1] != self.family.num_raw:
            raise ValueError(
                f"network: gives {raw.shape[-1]} outputs; accepted are {self.family.num_raw}, the raw ones of "
                f"{self.family}"
            )
        return raw

    def discrete(self) -> "Conditional":
        return Conditional(self._discrete_family(), self.context_shape, self.network)


def _spell(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))
