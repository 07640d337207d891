"""An ELBO run on a model and guide: its loss, where the nats went, and which site is to blame if there are none."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae.objectives.elbo_terms import bound_name, elbo_terms

__all__ = ["ElboEvaluator"]


_SHOWN = 5  # rows that an error names


class ElboEvaluator:
    """Runs of one ELBO.

    Args:
        model: a Pyro model.
        guide: its guide.
        elbo: any ELBO of ``pyro.infer``.
        plate: name of the data plate; without one nothing is told of each datum.

    Attributes:
        keywords: what model and guide take by name, beside the arguments of a run.
        traces: the (model, guide) traces of the last run, one for each particle that is not in a plate.
    """

    def __init__(self, model: Function, guide: Function, elbo: ELBO, plate: str | None = None):
        self.model, self.guide, self.plate = model, guide, plate
        self.elbo: Any = elbo  # pyro.infer.ELBO declares neither loss nor loss_and_grads
        self.keywords: dict[str, Any] = {}
        self.traces: list[tuple[Trace, Trace]] = []

    def loss(self, *args: Any) -> Any:
        """The loss: a number, or a tensor while it is captured."""
        return self._run(self.elbo.loss, args)

    def loss_and_grads(self, *args: Any) -> Any:
        """The loss; its gradients are added to those of the parameters."""
        return self._run(self.elbo.loss_and_grads, args)

    def _run(self, compute: Function, args: tuple[Any, ...]) -> Any:
        self.traces = []
        with self._capture_traces():
            loss = compute(self.model, self.guide, *args, **self.keywords)
        return loss[0] if isinstance(loss, tuple) else loss

    @contextmanager
    def _capture_traces(self) -> Iterator[None]:
        """Keep the traces that the ELBO makes, with the log-densities that it computes."""
        make = self.elbo._get_trace

        def keep(*args: Any) -> tuple[Trace, Trace]:
            self.traces.append(make(*args))
            return self.traces[-1]

        self.elbo._get_trace = keep
        try:
            yield
        finally:
            del self.elbo._get_trace

    def terms(self, loss: Any) -> dict[str, Tensor]:
        """ELBO, distortion and rate of the last run in nats per datum, or the bound alone where they are not apart.

        Nothing without a data plate.
        """
        if self.plate is None:
            return {}
        model_trace, guide_trace = self.traces[0]
        site, frame = self._data_site(model_trace)
        terms = elbo_terms(self.traces, frame.full_size or frame.size)
        if terms is not None:
            return terms
        # What the loss weighs the data by: all of them under subsampling, and any scale that the model was given.
        bound = -torch.as_tensor(loss, dtype=torch.float64) / (site["scale"] * frame.size)
        return {bound_name(model_trace, guide_trace): bound}

    def _data_site(self, model_trace: Trace) -> tuple[dict[str, Any], Any]:
        """An observed site in the data plate, and its frame there."""
        return next(
            (site, frame)
            for site in observed_sites(model_trace).values()
            for frame in site["cond_indep_stack"]
            if frame.name == self.plate
        )

    @torch.no_grad()
    def first_nonfinite_site(self, rows: Tensor | None = None) -> str | None:
        """The first site of the last run whose log-density is not finite, in the order in which guide and model ran.

        Args:
            rows: the numbers, among all data, of the rows that the run was on.
        """
        for model_trace, guide_trace in self.traces:
            for who, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                    bad = ~log_density(site).isfinite()
                    if bad.any():
                        where = f"at {bad.sum()} of {bad.numel()}{self._rows(bad, site, rows)}"
                        return f"log_prob of site {name!r} in the {who} is not finite {where}"
        return None

    def _rows(self, bad: Tensor, site: dict[str, Any], rows: Tensor | None) -> str:
        """Which rows of the data are bad, in words."""
        dims = [frame.dim for frame in site["cond_indep_stack"] if frame.name == self.plate]
        if not dims or bad.dim() < -dims[0]:
            return ""
        found = bad.movedim(dims[0], 0).reshape(bad.shape[dims[0]], -1).any(1).nonzero().flatten()
        if rows is not None and len(rows) == bad.shape[dims[0]]:
            found = rows.to(found.device)[found]
        shown = ", ".join(map(str, found[:_SHOWN].tolist()))
        return f", in rows {shown}{', ...' if len(found) > _SHOWN else ''} of the data"

    @torch.no_grad()
    def first_nonfinite_site_unvalidated(self, args: tuple[Any, ...], rows: Tensor | None) -> str | None:
        """Validation stops at a distribution whose parameters are NaN, before it has a site: run on, to name that."""
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.loss(*args)
        return self.first_nonfinite_site(rows)
