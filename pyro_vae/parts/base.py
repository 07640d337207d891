"""Parts: modules that return a distribution, ``forward(context=None) -> Distribution``.

A part is a family (:mod:`pyro_vae.parts.families`) and the source of its raw outputs: free parameters
(:class:`Unconditional`) or a network of a context (:class:`Conditional`). The classes of :mod:`pyro_vae.parts.priors`,
:mod:`pyro_vae.parts.guides` and :mod:`pyro_vae.parts.likelihoods` are these two with a family filled in.
"""

import inspect
from functools import wraps
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._utils.typing import Shape
from pyro_vae._utils.validation import as_shape, describe, real_tensor
from pyro_vae.parts.families.base import Family
from pyro_vae.parts.families.relaxed import Relaxed

__all__ = ["Conditional", "Part", "Unconditional", "checked_amortized", "checked_family", "checked_raw"]


class Part(nn.Module):
    """A module that returns a distribution, with ``event_shape``, the discrete twin and ``read``.

    Any module with ``forward(context=None) -> Distribution`` can be a part of a :class:`pyro_vae.VAE`.
    """

    family: Family

    def __init_subclass__(cls, **options: Any) -> None:
        """Let errors of a family name the argument of the part: ``latent``, or ``out_features`` of a likelihood."""
        super().__init_subclass__(**options)
        if init := vars(cls).get("__init__"):
            names = inspect.signature(init).parameters.keys()
            own = [name for name in ("event_shape", "out_features", "latent") if name in names]

            @wraps(init)
            def renaming(self: Any, *args: Any, **kwargs: Any) -> None:
                try:
                    init(self, *args, **kwargs)
                except (TypeError, ValueError) as error:
                    if "`event_shape`" not in str(error) or not own:
                        raise
                    raise type(error)(str(error).replace("`event_shape`", f"`{own[0]}`")) from error

            cls.__init__ = renaming  # type: ignore[method-assign]

    @property
    def event_shape(self) -> torch.Size:
        return self.family.event_shape

    def read(self, value: Tensor) -> Tensor:
        """The decoder's input for a value of the site: for most priors, the value itself."""
        return value

    def discrete(self) -> "Part":
        """The discrete twin of a relaxed part: a discrete distribution with the same parameters, shared."""
        raise self._no_twin()

    def _discrete_family(self) -> Family:
        if isinstance(self.family, Relaxed):
            return self.family.discrete()
        raise self._no_twin()

    def _no_twin(self) -> TypeError:
        which = "only relaxed parts have one, such as RelaxedBernoulli and GumbelSoftmax"
        return TypeError(f"{type(self).__name__} has no discrete twin: {which}")


class Unconditional(Part):
    """A family with free raw outputs of its own.

    Args:
        family: the map from raw outputs to a distribution.
        raw: ``(family.num_raw,)``, an ``nn.Parameter``, which is trained, or a fixed tensor; by default fixed zeros.

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
    """A family whose raw outputs are a network's output for a context.

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

    def __init__(self, family: Family, context: Shape, network: nn.Module):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` must be a module, such as networks.linear()(2, 3), got {describe(network)}")
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
            who, ready = type(self).__name__, "networks.with_missing(network)"
            message = f"the network of {who} must accept missing entries, such as {ready}, got a context with NaN"
            if context.isinf().any():
                message = f"the context of {who} must be finite numbers, got inf"
            raise ValueError(message) from error

    def raw_outputs(self, context: Tensor | None) -> Tensor:
        """The network's output for a context, ``(*, family.num_raw)``."""
        who, spelled = type(self).__name__, ", ".join(["*", *map(str, self.context_shape)])
        if not isinstance(context, Tensor):
            given = "none" if context is None else describe(context)
            raise TypeError(f"the context of {who} must be a tensor ({spelled}), got {given}")
        batch_dims = context.dim() - len(self.context_shape)
        if batch_dims < 0 or context.shape[batch_dims:] != self.context_shape:
            raise ValueError(f"the context of {who} must be ({spelled}), got shape {tuple(context.shape)}")
        try:
            raw = self.network(context.flatten(batch_dims))
        except (RuntimeError, TypeError, ValueError) as error:  # of torch, or of a part inside of the network
            if (mismatch := self._mismatch(context)) is None:
                raise
            raise mismatch from error
        if not isinstance(raw, Tensor):
            raise TypeError(f"`network` must return a tensor, (*, {self.family.num_raw}), got {describe(raw)}")
        if raw.shape[-1:] != (self.family.num_raw,):
            must = f"{self.family.num_raw} outputs, the raw outputs of {self.family}"
            raise ValueError(f"`network` must return {must}, got {raw.shape[-1] if raw.dim() else 'no'}")
        if raw.shape[:-1] != context.shape[:batch_dims]:
            shapes = f"outputs of shape {tuple(raw.shape)} for a context of shape {tuple(context.shape)}"
            raise ValueError(f"`network` must keep the dimensions on the left, got {shapes}")
        return raw

    def _mismatch(self, context: Tensor) -> Exception | None:
        """The error for a context of another dtype or device than the network's, if it is that."""
        parameters = list(self.network.parameters())
        if not parameters:
            return None
        who = type(self).__name__
        devices, dtypes = ({getattr(one, kind) for one in parameters} for kind in ("device", "dtype"))
        if context.device not in devices:
            hint = "Move the data with `x.to(device)`, or the model with `vae.to(device)`"
            must = f"must be on {devices.pop()}, as its network is, got {context.device}. {hint}"
            return ValueError(f"the context of {who} {must}")
        if context.dtype not in dtypes:
            hint = "Convert the data with `x.to(dtype)`, or bytes with `datasets.grey(x)`"
            must = f"must be {dtypes.pop()}, as its network is, got {context.dtype}. {hint}"
            return TypeError(f"the context of {who} {must}")
        return None

    def discrete(self) -> "Conditional":
        return Conditional(self._discrete_family(), self.context_shape, self.network)


def checked_amortized(encoder: Conditional) -> Conditional:
    """Return ``encoder`` if it is an amortized guide."""
    if not isinstance(encoder, Conditional):
        raise TypeError(f"`encoder` must be an amortized guide of this package, a Conditional, got {describe(encoder)}")
    return encoder


def checked_family(family: Family) -> Family:
    """Return ``family`` if it is a family."""
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as families.Normal(2), got {describe(family)}")
    return family


def checked_raw(raw: Tensor, family: Family, lead: str = "*") -> Tensor:
    """Return free raw outputs if they are floats of the family's shape, without NaN."""
    expected = f"floats ({lead}, {family.num_raw}), for {family}"
    if not real_tensor(raw, "raw", expected).is_floating_point():
        raise TypeError(f"`raw` must be {expected}, got {describe(raw)}")
    if raw.shape[-1:] != (family.num_raw,) or not raw.numel():
        raise ValueError(f"`raw` must be {expected}, got shape {tuple(raw.shape)}")
    if raw.isnan().any():
        raise ValueError(f"`raw` must be {expected}, got nan in it")
    return raw
