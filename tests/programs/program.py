"""What each file of this folder makes: a Pyro program, its arguments, and its log p(x) by another way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

import pyro_vae as pv


@dataclass(frozen=True)
class Program:
    """A Pyro program with its arguments.

    ``by_hand`` computes log p(x) of all data at the current parameters, in total or as parts that add up to it, with
    plain torch and no function of the package: ``how`` names the method. ``means`` has the posterior means of some
    latents, and ``loo`` the terms log p(x_i | all other x), by the same method. ``all_rows`` are keywords for a model
    that draws a mini-batch, with which it takes all rows.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    all_rows: Mapping[str, Any] = field(default_factory=dict)
    elbo: ELBO = field(default_factory=Trace_ELBO)
    lr: float = 0.02
    steps: int = 300
    how: str = ""
    by_hand: Callable[[], Tensor] | None = None
    means: Callable[[], dict[str, Tensor]] | None = None
    loo: Callable[[], Tensor] | None = None

    @property
    def data(self) -> tuple[Any, ...]:
        """The data as the package's functions take them."""
        return (pv.Arguments(*self.args, **self.kwargs),) if self.kwargs else self.args
