"""Effect handlers: what the package does to a Pyro model or guide from outside, without touching its code."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.checks import kind_of, number

__all__ = [
    "Anew",
    "Drawn",
    "Rows",
    "SubsampleStatements",
    "WeightKL",
    "borrowed_store",
    "deterministic_sites",
    "guide_sites",
    "latent_sites",
    "none_left_if_refused",
    "observed_sites",
    "parameters_of",
    "recorded",
    "register",
    "registered_once",
]


class Anew(UnconditionMessenger):
    """Draw the observed sites anew, as ``poutine.uncondition``; deterministic sites stay as they are: they are no data.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> with Anew():
    ...     pyro.sample("x", dist.Normal(9.0, 1e-4), obs=torch.tensor(0.0)).round()
    tensor(9.)
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


class Rows(Messenger):
    """Restrict a plate to these rows.

    Inside, ``pyro.subsample`` returns the rows, and the plate's sites are scaled by N/B: the ELBO of a mini-batch is
    an unbiased estimate of that of all data.

    Args:
        plate: name of the plate.
        rows: row numbers, ``(B,)``. All rows at once stay in the order that they have: there Pyro reads none by number.

    >>> import pyro, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.subsample(x, event_dim=0)
    >>> with Rows("data", torch.tensor([3, 1])):
    ...     model(torch.arange(5.0))
    tensor([3., 1.])
    """

    def __init__(self, plate: str, rows: Tensor):
        super().__init__()
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"rows: got {kind_of(rows)}; accepted are row numbers, integers of shape (B,)")
        if not len(rows):
            raise ValueError("rows: got none; accepted are one or more row numbers, (B,)")
        self.plate = plate
        self.rows = rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg):
            msg["value"] = self.rows
            msg["done"] = True


class Drawn(Messenger):
    """Let ``pyro.subsample`` of a tensor return these rows: drawn beforehand, the same for model and guide.

    Args:
        data: the tensors as the model reads them.
        rows: for each, the rows that a subsampled plate is given.

    Attributes:
        read: whether each tensor has been read.

    >>> import pyro, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         return pyro.subsample(x, event_dim=0)
    >>> x = torch.arange(5.0)
    >>> with Rows("data", torch.tensor([3, 1])), Drawn([x], [torch.tensor([-3.0, -1.0])]):
    ...     model(x)
    tensor([-3., -1.])
    """

    def __init__(self, data: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__()
        self.data = data
        self.rows = rows
        self.read = [False] * len(data)

    def _pyro_subsample(self, msg: Any) -> None:
        for index, tensor in enumerate(self.data):
            if msg["args"][0] is tensor:
                self.read[index] = True
                msg["value"], msg["done"] = self.rows[index], True
                msg["kwargs"] = {**msg["kwargs"], "event_dim": None}  # which tells the plate to leave the rows alone


class SubsampleStatements(Messenger):
    """Count the ``pyro.subsample`` statements that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _pyro_subsample(self, msg: Any) -> None:
        self.count += 1


class WeightKL(Messenger):
    r"""Weight the log-densities of the latents by β, in model and guide: the objective
    :math:`\mathbb{E}_q[\log p(x \mid z)] - \beta\,\mathrm{KL}(q \Vert p(z))` of a β-VAE.

    For β other than 1 that is no ELBO. :func:`pyro_vae.fit` reports the ELBO at β = 1 whatever the weight.

    Args:
        weight: β, zero or more. At 0 the prior plays no part, and codes drift apart. A 0-dim tensor is read anew in
            each run, so that a schedule can change it: ``fit(..., schedules={beta: schedules.linear(0, 1, 1000)})``.

    Source: Higgins et al. 2017, "beta-VAE", equation 4.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> guide = WeightKL(0.5)(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    >>> poutine.trace(guide).get_trace().nodes["z"]["scale"]
    0.5
    """

    def __init__(self, weight: float | Tensor):
        super().__init__()
        if isinstance(weight, Tensor) and weight.dim():
            raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted is one number, 0 or more")
        number(weight.item() if isinstance(weight, Tensor) else weight, "weight", least=0)
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


def recorded(function: Callable[..., Any], traces: list[Trace]) -> Callable[..., Any]:
    """``function``, appending a trace of each of its runs, with what outer handlers did to it, to ``traces``."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        with poutine.trace() as tracer:
            result = function(*args, **kwargs)
        traces.append(tracer.trace)
        return result

    return recording


@contextmanager
def borrowed_store() -> Iterator[None]:
    """Run a block with the parameters of Pyro's store, and leave none there that were not there before.

    >>> import pyro, torch
    >>> with borrowed_store():
    ...     w = pyro.param("w", torch.zeros(2))
    >>> "w" in pyro.get_param_store()
    False
    """
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


@contextmanager
def none_left_if_refused() -> Iterator[None]:
    """Run a block; if it raises, take the parameters that it added to Pyro's store out again.

    >>> import pyro, torch
    >>> try:
    ...     with none_left_if_refused():
    ...         w = pyro.param("w", torch.zeros(2))
    ...         raise ValueError
    ... except ValueError:
    ...     "w" in pyro.get_param_store()
    False
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - before:
            del store[name]
        raise


Registered = dict[str, tuple[nn.Module, str, Tensor]]
"""By name: a module, and the name and value of one of its parameters."""

_registered: ContextVar[tuple[Registered, bool]] = ContextVar("registered")


@contextmanager
def registered_once(modules: Registered, known: bool) -> Iterator[None]:
    """Inside, :func:`register` adds modules to this dict, by name.

    Args:
        modules: by name.
        known: whether one parameter is enough of those that are there: a loop knows the others from its first step,
            and Pyro's ELBOs are told by one that there are some.
    """
    token = _registered.set((modules, known))
    try:
        yield
    finally:
        _registered.reset(token)


def register(name: str, module: nn.Module) -> None:
    """Register the parameters of a module with Pyro, as ``pyro.module(name, module)`` does, each once.

    Where ``pyro.module`` would warn at every step of frozen parameters, this passes over them; where it would leave a
    second module of the same name untrained without a word, this raises.
    """
    modules, known = _registered.get(({}, False))
    if known and name in modules and modules[name][0] is module:
        pyro.param(*modules[name][1:])
        return
    store = pyro.get_param_store()
    for path, parameter in module.named_parameters():
        key = f"{name}$$${path}"
        if not parameter.requires_grad:
            continue
        if key in store and store[key] is not parameter:
            raise ValueError(
                f"name: Pyro's param store holds other parameters under {name!r} ({path}), and these would not be "
                "trained. Give each a name of its own (leave it out and it is), or call pyro.clear_param_store()."
            )
        pyro.param(key, parameter)
        modules[name] = module, key, parameter


def deterministic_sites(trace: Trace) -> dict[str, Any]:
    """The sites of ``pyro.deterministic``, by name."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site for name, site in nodes.items() if site["type"] == "sample" and site["infer"].get("_deterministic")
    }


def latent_sites(trace: Trace) -> dict[str, Any]:
    """The unobserved sample sites, by name."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def guide_sites(trace: Trace) -> dict[str, Any]:
    """The latent sites of a guide, by name; a model in its place is refused, whose likelihood would count into q."""
    if observed := observed_sites(trace):
        raise ValueError(
            f"guide: it observes {list(observed)}, whose densities are none of q(z | x); accepted is a function with "
            "latent sites alone, such as `vae.guide`"
        )
    return latent_sites(trace)


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters that a trace has met, by their names in the param store."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: site["value"].unconstrained() for name, site in nodes.items() if site["type"] == "param"}


def observed_sites(trace: Trace) -> dict[str, Any]:
    """The observed sample sites that count (``pyro.deterministic`` and masked-out ones do not), by name."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and site["mask"] is not False
        and not site["infer"].get("_deterministic")
    }
