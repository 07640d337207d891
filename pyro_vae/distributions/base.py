"""Base classes of our distributions: parameters that expand with the batch, and draws scored as they are made."""

import inspect
from copy import copy
from functools import wraps
from typing import Any, Self, TypeVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae._utils.validation import describe, number, real_tensor

__all__ = ["Parametric", "ScoresDraws", "named_arguments"]

D = TypeVar("D")


def named_arguments(cls: type[D]) -> type[D]:
    """Let errors of the constructor of a distribution name the argument, which is looked for after an error alone.

    Not for subclasses of torch's distributions, whose ``expand`` does not accept another constructor than torch's.
    """
    init, constraints = cls.__init__, getattr(cls, "arg_constraints", {})
    signature = inspect.signature(init)

    @wraps(init)
    def naming(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError, IndexError) as error:
            try:
                given = signature.bind(self, *args, **kwargs).arguments
            except TypeError:
                raise error from None
            names = [name for name in given if name not in ("self", "validate_args")]
            if any(f"`{name}`" in str(error) for name in names):
                raise
            for name in (name for name in names if name in constraints or name in ("low", "high")):
                _check_parameter(given[name], name)
            listed = " and ".join(f"`{name}`" for name in names)
            raise ValueError(f"{listed} must be arguments that make a {cls.__name__}, which raises: {error}") from error

    cls.__init__ = naming  # type: ignore[method-assign]
    return cls


def _check_parameter(value: Any, name: str) -> None:
    """Raise unless ``value`` is a number or a tensor of finite numbers, as parameters are."""
    expected = "a number or a tensor of them"
    if isinstance(value, Tensor):
        real_tensor(value, name, expected)
        if value.is_floating_point() and value.isnan().any():
            raise ValueError(f"`{name}` must be {expected}, got nan in {describe(value)}")
    else:
        number(value, name)


class Parametric(TorchDistribution):
    """A distribution whose tensor attributes are parameters of shape ``(*batch, ...)``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        named_arguments(cls)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        new, batch = copy(self), torch.Size(batch_shape)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(new, name, value.expand(batch + value.shape[len(self.batch_shape) :]))
        new._batch_shape = batch
        return new


class ScoresDraws:
    """Keeps the log-density of each draw, computed from the noise that it was made of, as long as the draw exists.

    The score is not used where it would be wrong: for another tensor of the same values, such as a detached one; for a
    draw changed in place; and for one made without gradients, when gradients are needed. The score of a draw by
    ``rsample`` has the gradient of the *whole* formula in the parameters, also through the draw, but no gradient in the
    draw: use a detached copy for that.
    """

    _scored: Any = None  # scores by draw, made by the first

    def __getstate__(self) -> dict[str, Any]:
        """Leave the stored scores out of a copy."""
        return {**self.__dict__, "_scored": None}

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the stored score of a draw, and compute that of any other value by ``_score``."""
        distribution: Any = self
        if distribution._validate_args:
            distribution._validate_sample(value)
        stored = self._stored_score(value)
        return distribution._score(value) if stored is None else stored

    def _store_score(self, value: Tensor, score: Tensor) -> None:
        if not value.is_inference():  # inference tensors have no version number
            if self._scored is None:
                self._scored = WeakTensorKeyDictionary()
            self._scored[value] = (value._version, torch.is_grad_enabled(), score)

    def _stored_score(self, value: Tensor) -> Tensor | None:
        """The stored score of a draw, if the draw is unchanged and the score has the gradient that is needed."""
        if self._scored is None or value not in self._scored:
            return None
        version, has_graph, score = self._scored[value]
        if version != value._version or (value.is_leaf and value.requires_grad):
            return None
        if not torch.is_grad_enabled():
            return score.detach()
        return score if has_graph else None
