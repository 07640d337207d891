"""Effect handlers that change a Pyro model or guide from outside: rows of a plate, resampling, the weight of the KL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae._utils.param_store import register
from pyro_vae._utils.traces import is_deterministic
from pyro_vae._utils.validation import describe, mapping, number

__all__ = [
    "FixedSubsample",
    "MaskSites",
    "ResampleObserved",
    "SubsampleRows",
    "SubsampleStatements",
    "UnsizedPlates",
    "WeightKL",
    "register",
]


class ResampleObserved(UnconditionMessenger):
    """Draw the observed sites again, as ``poutine.uncondition`` does, but leave deterministic sites as they are.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> with ResampleObserved():
    ...     pyro.sample("x", dist.Normal(9.0, 1e-4), obs=torch.tensor(0.0)).round()
    tensor(9.)
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


class SubsampleRows(Messenger):
    """Restrict a plate to these rows.

    Inside, ``pyro.subsample`` returns the rows, and sites are scaled by N/B, for an unbiased ELBO of a mini-batch.

    Args:
        plate: name of the plate.
        rows: row numbers, ``(B,)``. With all N rows the order of the data is kept: Pyro does not index them then.

    >>> import pyro, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.subsample(x, event_dim=0)
    >>> with SubsampleRows("data", torch.tensor([3, 1])):
    ...     model(torch.arange(5.0))
    tensor([3., 1.])
    """

    def __init__(self, plate: str, rows: Tensor):
        super().__init__()
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`rows` must be row numbers, integers of shape (B,), got {describe(rows)}")
        if not len(rows):
            raise ValueError("`rows` must be one or more row numbers, (B,), got none")
        self.plate, self.rows = plate, rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            msg["value"], msg["done"] = self.rows, True


class FixedSubsample(Messenger):
    """Make ``pyro.subsample`` of a tensor return given rows, the same for model and guide.

    Args:
        data: the tensors that the model reads. The attribute ``read`` says whether each has been read.
        rows: for each tensor, its rows in the subsampled plate.

    >>> import pyro, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.subsample(x, event_dim=0)
    >>> x = torch.arange(5.0)
    >>> with SubsampleRows("data", torch.tensor([3, 1])), FixedSubsample([x], [torch.tensor([-3.0, -1.0])]):
    ...     model(x)
    tensor([-3., -1.])
    """

    def __init__(self, data: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__()
        for name, tensors in (("data", data), ("rows", rows)):
            if not isinstance(tensors, Sequence) or not all(isinstance(one, Tensor) for one in tensors):
                raise TypeError(f"`{name}` must be a sequence of tensors, got {describe(tensors)}")
        if len(rows) != len(data):
            raise ValueError(f"`rows` must be one tensor for each of the {len(data)} of `data`, got {len(rows)}")
        self.data, self.rows, self.read = data, rows, [False] * len(data)

    @property
    def takes_all(self) -> bool:
        """Whether there is no tensor to replace."""
        return not self.data

    def _pyro_subsample(self, msg: Any) -> None:
        for index, tensor in enumerate(self.data):
            if msg["args"][0] is tensor:
                self.read[index] = True
                msg["value"], msg["done"] = self.rows[index], True
                msg["kwargs"] = {**msg["kwargs"], "event_dim": None}  # so that the plate does not index the rows


class MaskSites(Messenger):
    """Mask sites by their names, further to the masks that they have.

    Args:
        masks: for each site, which of its cells count, of the shape of its batch.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro import poutine
    >>> with poutine.trace() as tracer, MaskSites({"z": torch.tensor([True, False])}):
    ...     _ = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
    >>> tracer.trace.nodes["z"]["mask"]
    tensor([ True, False])
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        super().__init__()
        for name, mask in mapping(masks, "masks", "{'z': mask}").items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"`masks` must be tensors of booleans, got {describe(mask)} for {name!r}")
        self.masks = masks

    def _pyro_sample(self, msg: Any) -> None:
        if (mask := self.masks.get(msg["name"])) is not None:
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


class SubsampleStatements(Messenger):
    """Count the ``pyro.subsample`` statements that run inside, and the plates that set the size of their subsample."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.own = 0

    def _pyro_sample(self, msg: Any) -> None:
        self.own += site_is_subsample(msg) and msg["fn"].subsample_size is not None

    def _pyro_subsample(self, msg: Any) -> None:
        self.count += 1


class UnsizedPlates(Messenger):
    """List the names of plates without a size, ``pyro.plate("data")``, of the statements that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _process_message(self, msg: Any) -> None:
        self.names += [frame.name for frame in msg["cond_indep_stack"] if frame.size == -1]


class WeightKL(Messenger):
    r"""Weight the log-densities of the latents by β, in model and guide: the objective
    :math:`\mathbb{E}_q[\log p(x \mid z)] - \beta\,\mathrm{KL}(q \Vert p(z))` of a β-VAE.

    For β other than 1 that is no ELBO. :func:`pyro_vae.fit` reports the ELBO at β = 1 for every weight.

    Args:
        weight: β, zero or more. At 0 the prior has no effect. A 0-dim tensor is read in each run, so that a schedule
            can change it: ``fit(..., schedules={beta: schedules.linear(0, 1, 1000)})``.

    Source: Higgins et al. 2017, "beta-VAE", equation 4.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro import poutine
    >>> guide = WeightKL(0.5)(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    >>> poutine.trace(guide).get_trace().nodes["z"]["scale"]
    0.5
    """

    def __init__(self, weight: float | Tensor):
        super().__init__()
        if isinstance(weight, Tensor) and weight.dim():
            raise ValueError(f"`weight` must be one number, 0 or more, got shape {tuple(weight.shape)}")
        number(weight.item() if isinstance(weight, Tensor) else weight, "weight", least=0)
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight
