"""One look at a fitted pair: how good the model is, how good its q(z | x), and what is wrong with them, in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import data_tensors, positive_int
from pyro_vae.diagnostics.calibration import Calibration, calibrate
from pyro_vae.diagnostics.decomposition import COLLAPSE_NATS, Decomposition, decompose
from pyro_vae.diagnostics.inference_gap import InferenceGap, inference_gap
from pyro_vae.evidence.importance_sampling import Evidence, log_evidence
from pyro_vae.model_guide import is_amortized

__all__ = ["Inspection", "inspect"]

_UNRELIABLE = 0.1  # share of the data at which k̂ is worth a word


Found = TypeVar("Found")


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found. Printed, it is a page of text; :func:`pyro_vae.inspection.report` makes one with pictures.

    Attributes:
        evidence: log p(x) of each datum.
        nats: where the ELBO goes.
        gap: of the guide, in two.
        calibration: of q(z | x) on the model's own data.
        skipped: what could not be told of this pair, and why; its attribute is then ``None``.
        num_data: of the rows that ``evidence``, ``nats`` and ``gap`` are of.
    """

    evidence: Evidence
    nats: Decomposition | None
    gap: InferenceGap | None
    calibration: Calibration | None
    skipped: Mapping[str, str]
    num_data: Mapping[str, int]

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words, and would be mended by a better guide or model; empty if nothing is."""
        found = []
        if self.calibration is not None:
            found += [f"q(z|x), {name}: {fault}" for name, fault in self.calibration.faults.items()]
        return (*found, *(self._collapse if self._carries_nothing else ()))

    @property
    def all_clear(self) -> str:
        """Where there are no faults: whether they were looked for."""
        return "no fault found" + ("" if self.calibration else ", but whether q(z|x) can be believed was not asked")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the numbers are believed, or more is made of the latents."""
        found = []
        share = self.evidence.unreliable.double().mean().item()
        if share > _UNRELIABLE:
            found.append(
                f"k̂ is above {self.evidence.reliable_khat:.2f} for {share:.0%} of the data: their log p(x) is a lower "
                "bound, and how much too low is not known. Draw more, or see pv.annealed_log_evidence"
            )
        found += () if self._carries_nothing else self._collapse
        if self.calibration is not None and self.calibration.elbo_corrections is None:
            found += self._unexplained(self.calibration)
        return (*found, *(f"{name} is not told: {reason}" for name, reason in self.skipped.items()))

    @staticmethod
    def _unexplained(calibration: Calibration) -> Iterator[str]:
        """What ranks tell of discrete latents where no coordinate is at fault, such as of a q that does not read x."""
        if not calibration.is_exact and not calibration.faults:
            yield (
                "q(z|x) is certainly not p(z|x), by the ranks, and which of its latents is off they do not tell: "
                f"{calibration.divergence:.2f} ± {calibration.divergence_error:.2f} nats, both KL divergences together"
            )

    @property
    def _collapse(self) -> tuple[str, ...]:
        return () if self.nats is None else self.nats.collapse

    @property
    def _carries_nothing(self) -> bool:
        return self.nats is not None and self.nats.mutual_information.value <= COLLAPSE_NATS

    def __str__(self) -> str:
        parts: list[Any] = [self.evidence, self.nats, self.gap]
        lines = [str(part) for part in parts if part is not None]
        lines += [] if self.calibration is None else [self.calibration.headline]
        lines += [f"FAULT: {fault}" for fault in self.faults] or [self.all_clear]
        return "\n".join([*lines, *(f"caution: {caution}" for caution in self.warnings)])


def inspect(
    model: Function,
    guide: Function,
    *data: Tensor,
    num_samples: int = 1000,
    num_simulations: int = 1000,
    max_rows: int = 1000,
    max_refined: int = 100,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Inspection:
    r"""Inspect a fitted model and guide on data, best on held-out data.

    How good is the model: :func:`pyro_vae.log_evidence`. Where do its nats go: :func:`pyro_vae.decompose`. What does
    the guide lose, and why: :func:`pyro_vae.inference_gap`. Can q(z | x) be believed: :func:`pyro_vae.calibrate`. Each
    but the first, which takes all rows, is bounded in its cost by default, and the result says by how many rows.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide.
        data: what both take.
        num_samples: draws of each datum for log p(x).
        num_simulations: data drawn from the model, for calibration.
        max_rows: of the data for the decomposition, whose cost grows with their square; evenly spaced ones if there are
            more. All, of a guide that is not amortized.
        max_refined: of the data for the gap, each of which is refined; in the same way.
        plate: name of the data plate.
        seed: of all draws.
        progress: whether to show a progress bar; only on a terminal if left out.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised. What only one of the
            parts cannot take is in :attr:`Inspection.skipped`.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> torch.manual_seed(0)
    <torch...>
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> found = inspect(vae.model, vae.guide, vae.generate(200), max_refined=20)
    >>> found.faults[0]  # nobody has trained it
    'q(z|x), all coordinates: too ...'
    """
    for name, value, least in (("num_samples", num_samples, 2), ("num_simulations", num_simulations, 10)):
        if positive_int(value, name) < least:
            raise ValueError(f"`{name}` must be {least} or more, whose spread tells of an error, got {value}")
    positive_int(max_rows, "max_rows")
    positive_int(max_refined, "max_refined")
    data = data_tensors(data, "data")
    told: dict[str, Any] = {"plate": plate, "seed": seed}
    evidence = log_evidence(model, guide, *data, num_samples=num_samples, progress=progress, **told)
    with scoped_param_store(), seeded(seed):
        sliced = is_amortized(model, data, plate) and is_amortized(guide, data, plate)
    some, few = (_spaced(len(data[0]), count if sliced else len(data[0])) for count in (max_rows, max_refined))

    def refined() -> InferenceGap:
        rows = few.to(data[0].device)
        return replace(inference_gap(model, guide, *_taken(data, few), num_samples=num_samples, **told), rows=rows)

    skipped: dict[str, str] = {}
    return Inspection(
        evidence=evidence,
        nats=_run_or_skip("nats", skipped, lambda: decompose(model, guide, *_taken(data, some), **told)),
        gap=_run_or_skip("gap", skipped, refined),
        calibration=_run_or_skip(
            "calibration",
            skipped,
            lambda: calibrate(model, guide, *data, num_simulations=num_simulations, **told),
        ),
        skipped=skipped,
        num_data={"evidence": len(data[0]), "nats": len(some), "gap": len(few)},
    )


def _spaced(count: int, most: int) -> Tensor:
    """The numbers of at most so many rows, evenly spaced."""
    return torch.arange(min(most, count)) * count // min(most, count)


def _taken(data: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[rows.to(tensor.device)] for tensor in data)


def _run_or_skip(name: str, skipped: dict[str, str], ask: Callable[[], Found]) -> Found | None:
    """The answer, or ``None`` and the reason in ``skipped``: each part says what pairs it is not for."""
    try:
        return ask()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        skipped[name] = shorten(str(error), 600, placeholder=" ...")  # Pyro's own hold whole tensors
        return None
