"""Inspection of a fitted model and guide: evidence, ELBO, inference gap and calibration, with a verdict in words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae._utils.data import DataTensors, data_tensors
from pyro_vae._utils.display import Result, Table, count_of, per_cell
from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.plates import every_row
from pyro_vae._utils.progress import Progress, progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.calibration import Calibration, calibrate
from pyro_vae.diagnostics.decomposition import Decomposition, decompose
from pyro_vae.diagnostics.inference_gap import InferenceGap, inference_gap
from pyro_vae.diagnostics.refits import check_refit
from pyro_vae.evidence.importance_sampling import Evidence, log_evidence
from pyro_vae.model_guide import ModelGuide

__all__ = ["Inspection", "inspect"]

_NEGLIGIBLE = 0.01  # nats of KL(q || p) that are no difference
_MAX_UNRELIABLE = 0.1  # fraction of the data with an unreliable k̂ above which there is a warning
_TOLERANCE = 1e-3  # nats of a quadrature: a tenth of the time of 1e-4
_MAX_QUADRATURE = 2**14  # numbers of data for which quadratures over two dimensions take seconds
_MAX_DATA_SETS = 100  # that are simulated, whatever the number of data that may be
_SHOWN_FAULTS = 10  # of a text; each coordinate of an image may have one
_MAX_REASON = 600  # characters of an error message that are kept: messages of Pyro contain whole tensors

Found = TypeVar("Found")


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """The results of :func:`inspect`. ``print`` shows them as text; :func:`pyro_vae.report` writes them with pictures.

    The first line is the verdict, with the coverage of q and its distance from the posterior.

    Where a datum has no latents of its own, as with global latents, the numbers are those of all data together, or of
    each cell of the plates that all sites share.

    Attributes:
        evidence: log p(x) of each datum, of each cell, or of all data.
        nats: the terms of the ELBO.
        gap: the gap between log p(x) and the ELBO, split into approximation and amortization.
        calibration: the calibration of q(z | x) on data drawn from the model.
        skipped: the parts that could not be computed for this pair, with the reason. Their attributes are ``None``.
        num_data: the number of rows used for ``evidence``, ``nats`` and ``gap``.
    """

    evidence: Evidence
    nats: Decomposition | None
    gap: InferenceGap | None
    calibration: Calibration | None
    skipped: Mapping[str, str]
    num_data: Mapping[str, int]

    @property
    def faults(self) -> tuple[str, ...]:
        """Errors that a better guide or model would remove, in words; empty if none was found."""
        calibration = {} if self.calibration is None else self.calibration.faults
        found = [f"q(z|x), {name}: {fault}" for name, fault in calibration.items()]
        return (*found, *(self._collapse if self._all_collapsed else ()))

    @property
    def verdict(self) -> str:
        """The verdict on q(z | x), as one word (or two).

        * ``"sound"``: no test shows a difference from p(z | x), and the ELBO reaches log p(x).
        * ``"approximate"``: there is a difference, which :attr:`headline` measures, and no fault.
        * ``"faulty"``: there are :attr:`faults`.
        * ``"not tested"``: no fault was found, but there is neither a calibration nor another test of q.

        Without a calibration, an exact gap is a test, since it is KL(q(z | x) ‖ p(z | x)). So is an estimate of
        log p(x) for each cell of plates, or for all data: its k̂ is small if q is close to p(z | x) wherever q draws.
        What q does not draw, such as a second mode, it cannot see.
        """
        if self.faults:
            return "faulty"
        tested = self.gap is not None and (self.gap.is_exact or self.gap.plates is not None)
        if self.calibration is None and not tested:
            return "not tested"
        reliable = self.gap is None or self.gap.is_exact or not self.evidence.unreliable.any()
        calibrated = reliable if self.calibration is None else self.calibration.verdict == "sound"
        return "sound" if calibrated and not self._is_below_evidence else "approximate"

    @property
    def headline(self) -> str:
        """One line with the verdict, the coverage of 90 % intervals, and the distance from p(z | x) in nats."""
        begins = {
            "sound": "sound, no fault found",
            "approximate": "approximate, no fault found",
            "not tested": "no fault found, but the calibration of q(z|x) was not tested",
        }
        found = [] if self.calibration is None else [self.calibration.summary]
        if self.gap is not None:
            least = "" if self.gap.is_exact else "at least "
            of = "" if self.gap.plates is None else f" {per_cell(self.gap.plates)}"
            found.append(f"the ELBO is {least}{self.gap.gap.mean().item():.3f} nats{of} below log p(x)")
        if self.calibration is None and self.verdict != "not tested":
            k = "" if self.evidence.khat.numel() > 1 else f"k̂ is {float(self.evidence.khat):.2f}; "
            found.append(f"{k}q(z|x) was not calibrated")
        return ": ".join([begins.get(self.verdict, self.verdict), *(["; ".join(found)] if found else [])])

    @property
    def _is_below_evidence(self) -> bool:
        """Whether the mean gap is above zero by more than the noise of the draws."""
        if self.gap is None:
            return False
        noise = torch.cat([self.gap.log_evidence_error, self.gap.elbo_error]).double().norm() / len(self.gap.gap)
        return bool(self.gap.gap.mean() > _NEGLIGIBLE + 3 * noise)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to read the numbers, or to use the latents, with care; empty if there are none."""
        share = self.evidence.unreliable.double().mean().item()
        unreliable = (
            f"{self.evidence.unreliable_share}: their estimated log p(x) may be too low, by an unknown amount. "
            "Increase num_samples, or use pv.annealed_log_evidence"
        )
        if self.evidence.khat.numel() == 1:
            unreliable = (
                f"{self.evidence.unreliable_share}: q(z|x) is far from p(z|x), and the estimated log p(x) may be too "
                "low, by an unknown amount. Use pv.annealed_log_evidence, or a richer guide"
            )
        found = [unreliable] if share > _MAX_UNRELIABLE else []
        found += [*(() if self._all_collapsed else self._collapse), *self._unexplained_divergence]
        return (*found, *(f"{name} was skipped: {reason}" for name, reason in self.skipped.items()))

    @property
    def _collapse(self) -> tuple[str, ...]:
        return () if self.nats is None else self.nats.collapse

    @property
    def _all_collapsed(self) -> bool:
        return self.nats is not None and self.nats.is_collapsed

    @property
    def _unexplained_divergence(self) -> tuple[str, ...]:
        """A warning if q with discrete latents is not exact, but no coordinate is at fault: q may ignore x."""
        found = self.calibration
        if found is None or found.num_data_sets or found.elbo_corrections or found.is_exact or found.faults:
            return ()
        return (
            "the ranks show that q(z|x) is not the exact posterior, but not which latent is wrong: both KL divergences "
            f"add up to {found.divergence:.2f} ± {found.divergence_error:.2f} nats per datum",
        )

    def _line(self) -> str:
        counts = [count_of(len(found), noun) for found, noun in ((self.faults, "fault"), (self.warnings, "warning"))]
        skipped = f", skipped: {', '.join(self.skipped)}" if self.skipped else ""
        return f"{self.headline}; {count_of(self.num_data['evidence'], 'datum', 'data')}, {', '.join(counts)}{skipped}"

    def _table(self) -> Table:
        log_p = self.evidence.log_evidence.double().mean().item()
        rows: list[tuple[str, object]] = [("verdict on q(z|x)", self.verdict), ("log p(x), at least", f"{log_p:.3f}")]
        if self.evidence.khat.numel() == 1:
            rows.append(("k̂ of the importance weights", f"{float(self.evidence.khat):.2f}"))
        if self.nats is not None:
            rows.append(("ELBO", self.nats.elbo))
        if self.nats is not None and self.nats.mutual_information is not None:
            rows.append(("mutual information of x and z", self.nats.mutual_information))
        if self.gap is not None:
            least = "" if self.gap.is_exact else "at least "
            rows.append(("inference gap, log p(x) − ELBO", f"{least}{self.gap.gap.mean().item():.3f}"))
        if self.calibration is not None and not math.isnan(self.calibration.divergence):
            both = f"{self.calibration.divergence:.3f} ± {self.calibration.divergence_error:.3f}"
            rows.append(("KL(q‖p) + KL(p‖q) of q(z|x) and p(z|x)", both))
        rows += [("fault", fault) for fault in self.faults] + [("warning", warning) for warning in self.warnings]
        data = ", ".join(f"{number} for {name}" for name, number in self.num_data.items())
        return Table(("quantity", "value"), rows, f"In nats {per_cell(self.evidence.plates)}. Data used: {data}.")

    def __str__(self) -> str:
        lines = [self.headline, *(f"FAULT: {fault}" for fault in self.faults[:_SHOWN_FAULTS])]
        if (more := len(self.faults) - _SHOWN_FAULTS) > 0:
            lines.append(f"FAULT: and {more} more, see `faults`")
        lines += [str(part) for part in (self.evidence, self.nats, self.gap) if part is not None]
        lines += [] if self.calibration is None else [self.calibration.headline]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


@report_of_ranks("inspect")
@any_arguments
def inspect(
    model: Function,
    guide: Function,
    *data: Data,
    num_samples: int = 1000,
    num_simulations: int = 1000,
    max_rows: int = 1000,
    max_refined: int = 100,
    refit: Mapping[str, Any] | None = None,
    processes: int | None = None,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Inspection:
    r"""Inspect a fitted model and guide, best on held-out data.

    :func:`pyro_vae.log_evidence` tests how good the model is, :func:`pyro_vae.decompose` what the ELBO consists of,
    :func:`pyro_vae.inference_gap` how much the guide loses and why, and :func:`pyro_vae.calibrate` whether q(z | x) can
    be trusted. ``log_evidence`` uses all rows. The cost of the others is bounded, see :attr:`Inspection.num_data`.

    With global latents, or others that are not those of one datum, each of these is for all data together, or for each
    cell of the plates that all sites share; what has no meaning then is left out, with the reason. The calibration
    takes a fit of the guide to each simulated data set, and is skipped without ``refit``.

    Args:
        model, guide: a Pyro model and its guide.
        data: the arguments of both.
        num_samples: draws per datum for log p(x).
        num_simulations: data drawn from the model for the calibration; of whole data sets at most 100.
        max_rows: largest number of rows for the decomposition, whose cost grows with its square. Of more rows, evenly
            spaced ones are used; if the guide is not amortized, all rows are used.
        max_refined: largest number of rows for the gap, which optimizes q for each row; chosen in the same way. Its
            quadratures, for latents of one or two dimensions, have a tolerance of 0.001 nats; log p(x) is estimated
            instead where two dimensions meet more than 16384 numbers of data, such as 100 images of 784 pixels. Other
            choices, and a longer refinement, are arguments of :func:`pyro_vae.inference_gap`.
        refit, processes: of :func:`pyro_vae.calibrate`: the options of a fit to each simulated data set, and the number
            of processes.
        plate, seed: name of the data plate, and seed of all draws.
        progress: whether to show a progress bar with the stages; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if the guide has a point for a latent, or the likelihood is not normalised. Errors of a single
            part do not stop the others: they are in :attr:`Inspection.skipped`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> _ = torch.manual_seed(0)
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> found = inspect(vae.model, vae.guide, vae.generate(200), max_refined=20)
    >>> found.faults[0]  # the guide is not trained
    'q(z|x), all coordinates: too ...'
    """
    for name, value, least in (("num_samples", num_samples, 2), ("num_simulations", num_simulations, 10)):
        if positive_int(value, name) < least:
            raise ValueError(f"`{name}` must be {least} or more, to estimate a standard error, got {value}")
    positive_int(max_rows, "max_rows")
    positive_int(max_refined, "max_refined")
    options = {"refit": None if refit is None else check_refit(refit), "processes": processes}
    if processes is not None:
        positive_int(processes, "processes")
    data = data_tensors(data, "data", model)
    with progress_bar("inspect", progress, stages=("evidence", "decomposition", "gap", "calibration")) as bar:
        return _inspect(
            model, guide, data, num_samples, num_simulations, max_rows, max_refined, options, plate, seed, bar
        )


def _inspect(
    model: Function,
    guide: Function,
    data: DataTensors,
    num_samples: int,
    num_simulations: int,
    max_rows: int,
    max_refined: int,
    refits: Mapping[str, Any],
    plate: str,
    seed: int,
    bar: Progress,
) -> Inspection:
    count = len(data[0])
    bar.begin("evidence")
    evidence = log_evidence(model, guide, *data, num_samples=num_samples, plate=plate, seed=seed)
    with scoped_param_store(), every_row(), seeded(seed):
        _, pair = ModelGuide.on_few_rows(model, guide, data, plate)
        amortized = pair.by_rows and pair.is_amortized("model") and pair.is_amortized("guide")
    rows, refined_rows = (_evenly_spaced(count, most if amortized else count) for most in (max_rows, max_refined))
    skipped: dict[str, str] = {}

    def run_or_skip(
        name: str, diagnostic: Callable[..., Found], rows: Tensor | None = None, **options: Any
    ) -> Found | None:
        """Run a diagnostic on some rows; if it fails, return ``None`` and keep the reason."""
        chosen = data if rows is None else [tensor[rows.to(tensor.device)] for tensor in data]
        try:
            return diagnostic(model, guide, *chosen, plate=plate, seed=seed, **options)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            skipped[name] = shorten(str(error), _MAX_REASON, placeholder=" ...")
            return None

    bar.begin("decomposition")
    nats = run_or_skip("nats", decompose, rows)
    bar.begin("gap")
    latent_size = 2 if nats is None or not nats.units else sum(units.activity.numel() for units in nats.units.values())
    numbers = len(refined_rows) * max(tensor[0].numel() for tensor in data)
    costly = pair.by_rows and latent_size > 1 and numbers > _MAX_QUADRATURE
    options: dict[str, Any] = {"num_samples": num_samples, "tolerance": None if costly else _TOLERANCE}
    gap = run_or_skip("gap", inference_gap, refined_rows, **options)
    if gap is not None and gap.plates is None and len(gap.rows) == len(refined_rows):
        gap = replace(gap, rows=refined_rows.to(data[0].device))
    bar.begin("calibration")
    if refits["refit"] is not None or not pair.by_rows:
        num_simulations = min(num_simulations, _MAX_DATA_SETS * evidence.khat.numel())
    calibration = run_or_skip("calibration", calibrate, num_simulations=num_simulations, **refits)
    num_data = {"evidence": count, "nats": len(rows), "gap": len(refined_rows)}
    return Inspection(evidence, nats, gap, calibration, skipped, num_data)


def _evenly_spaced(count: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``count`` rows."""
    return torch.arange(min(most, count), device="cpu") * count // min(most, count)
