"""Parts: modules that return a distribution, ``forward(context=None) -> Distribution``.

A part is a family (:mod:`pyro_vae.parts.families`) and what feeds it: free parameters, or a network of a context. The words
of :mod:`pyro_vae.parts.priors`, :mod:`pyro_vae.parts.guides` and :mod:`pyro_vae.parts.likelihoods` are these two with a family filled in.
"""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import as_shape, describe, real_tensor
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.families.relaxed import Relaxed

__all__ = ["Conditional", "Part", "Unconditional", "checked_family", "checked_raw"]


class Part(nn.Module):
    """A module that returns a distribution.

    Any module with ``forward(context=None) -> Distribution`` can stand in a :class:`pyro_vae.VAE`; this base adds
    ``event_shape``, the discrete twin and ``read``.
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
        self.family = checked_family(family)
        raw = torch.zeros(family.num_raw) if raw is None else checked_raw(raw, family)
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
                f"`network` must be a module, such as networks.linear()(2, 3), got a {type(network).__name__}"
            )
        self.family = checked_family(family)
        self.context_shape = as_shape(context, "context")
        self.network = network

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        raw = self.raw_outputs(context)
        try:
            return self.family(raw)
        except ValueError as error:
            if context is None or context.isfinite().all():
                raise
            who = type(self).__name__
            if context.isinf().any():
                raise ValueError(f"`{who}` must be finite numbers, got a context with inf") from error
            raise ValueError(
                f"`{who}` must be a network that knows better, networks.with_missing(network) or its like, got a "
                "context with NaN, for what is missing, and its network reads NaN as a number"
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
                f"`{type(self).__name__}` must be (*, {_spell(self.context_shape)}), got a context of shape "
                f"{tuple(context.shape)}"
            )
        try:
            raw = self.network(context.flatten(batch_dims))
        except RuntimeError as error:
            mismatch = self._mismatch(context)
            if mismatch is None:
                raise
            raise mismatch from error
        if not isinstance(raw, Tensor):
            raise TypeError(f"`network` must be a tensor, (*, {self.family.num_raw}): gives {describe(raw)}")
        if raw.shape[-1:] != (self.family.num_raw,):
            raise ValueError(
                f"`network` must be {self.family.num_raw}, the raw ones of {self.family}: gives {raw.shape[-1] if raw.dim() else 'no'} "
                "outputs"
            )
        if raw.shape[:-1] != context.shape[:batch_dims]:
            raise ValueError(
                "`network` must be a network that leaves the dimensions on the left as they are: of a context of "
                f"shape {tuple(context.shape)} it makes one of {tuple(raw.shape)}"
            )
        return raw

    def _mismatch(self, context: Tensor) -> Exception | None:
        """What a network may have failed at: a context of another dtype or device."""
        parameters = list(self.network.parameters())
        if not parameters:
            return None
        who = type(self).__name__
        devices, dtypes = ({getattr(one, kind) for one in parameters} for kind in ("device", "dtype"))
        if context.device not in devices:
            return ValueError(
                f"`{who}` must be {devices.pop()}, where its network is, got a context on {context.device}. Move the "
                "data with `x.to(device)`, or the model with `vae.to(device)`"
            )
        if context.dtype not in dtypes:
            return TypeError(
                f"`{who}` must be {dtypes.pop()}, that of its network, got a context of {context.dtype}. Convert the "
                "data with `x.to(dtype)`, or bytes with `datasets.grey(x)` and its like"
            )
        return None

    def discrete(self) -> "Conditional":
        return Conditional(self._discrete_family(), self.context_shape, self.network)


def checked_family(family: Family) -> Family:
    """``family`` if it is one."""
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as families.Normal(2), got {describe(family)}")
    return family


def checked_raw(raw: Tensor, family: Family, lead: str = "*") -> Tensor:
    """Free raw outputs, if they are numbers that a family can make a distribution of, and that can be trained."""
    expected = f"floats ({lead}, {family.num_raw}), for {family}"
    if not real_tensor(raw, "raw", expected).is_floating_point():
        raise TypeError(f"`raw` must be {expected}, got {describe(raw)}")
    if raw.shape[-1:] != (family.num_raw,) or not raw.numel():
        raise ValueError(f"`raw` must be {expected}, got shape {tuple(raw.shape)}")
    if raw.isnan().any():
        raise ValueError(f"`raw` must be {expected}: holds nan")
    return raw


def _spell(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))
