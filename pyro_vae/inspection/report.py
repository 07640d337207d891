"""A report: what :func:`pyro_vae.inspect` finds, with tables and pictures, as one self-contained page of HTML."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.files import replacing
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import (
    file_path,
    image_size,
    mapping,
    nonempty_string,
    whole_numbers,
    writable,
)
from pyro_vae.diagnostics.calibration import Calibration
from pyro_vae.diagnostics.decomposition import Decomposition
from pyro_vae.diagnostics.inference_gap import InferenceGap
from pyro_vae.evidence.importance_sampling import Evidence
from pyro_vae.inspection.inspect import Inspection, inspect
from pyro_vae.training.fit import Fitted, as_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report"]

_MAX_ROWS = 60  # rows of a table with a row for each latent variable


def report(
    path: str | os.PathLike[str],
    model: Function,
    guide: Function,
    *data: Data,
    title: str = "Inspection of a fitted model",
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    labels: Tensor | None = None,
    image_shape: tuple[int, int] | None = None,
    pictures: Mapping[str, "Figure"] | None = None,
    plate: str = "data",
    seed: int = 0,
    **options: Any,
) -> Inspection:
    """Inspect a fitted model and guide, and write the results as one self-contained page of HTML.

    The page begins with the verdict, with the coverage of q, and with the faults and warnings. Tables and pictures
    follow: how good the model is, what the ELBO consists of, what the guide loses, whether q(z | x) can be trusted.

    Args:
        path: path of the page, such as ``"report.html"``. An existing file is replaced, once the new page is complete.
        model, guide: a Pyro model with all sites in one data plate, the rightmost dimension, and its guide.
        data: the arguments of both, best held-out data. Images come first.
        title: title of the page.
        history: the result of :func:`pyro_vae.fit`, or its ``history``, for training curves.
        labels: whole numbers, ``(N,)``, for a map of the latent space.
        image_shape: height and width of images in [0, 1] at the first observed site, for reconstructions and samples.
        pictures: further figures, by the question that each one answers.
        plate, seed: name of the data plate, and seed of all draws.
        options: further arguments of :func:`pyro_vae.inspect`.

    Returns:
        The result of :func:`pyro_vae.inspect`.

    Raises:
        TypeError, ValueError: before any computation, if labels, image shape, history or pictures do not have the form
            above; and the errors of :func:`pyro_vae.inspect`.
        FileNotFoundError, IsADirectoryError, PermissionError: before any computation, if the path cannot be written.

    >>> import tempfile
    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "report.html"
    ...     found = report(page, vae.model, vae.guide, vae.generate(100), max_refined=10)
    ...     page.read_text().startswith("<!DOCTYPE html>")
    True
    """
    from pyro_vae.inspection.pictures import check_pictures, draw_pictures  # only a report needs matplotlib

    path = _page_path(path)
    data = data_tensors(data, "data", model)
    labels = None if labels is None else whole_numbers(labels, "labels", len(data[0]))
    if image_shape is not None:
        _check_image(image_shape, data[0])
    nonempty_string(title, "title")
    pictures = mapping(pictures, "pictures", "{'Are images sharp?': figure}")
    history = None if history is None else as_history(history)
    check_pictures(history, pictures)
    found = inspect(model, guide, *data, plate=plate, seed=seed, **options)
    drawn = draw_pictures(found, model, guide, data, history, labels, image_shape, pictures, seed)
    with replacing(path) as partial:
        partial.write_text(_render(title=title, found=found, sections=_sections(found), pictures=drawn), "utf-8")
    return found


def _page_path(path: str | os.PathLike[str]) -> Path:
    path = file_path(path, "path")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be the path of a file, got {str(path)!r}, a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must be the path of a regular file, got {str(path)!r}")
    return writable(path, "path").resolve()  # a link stays a link, and its target is replaced


def _check_image(shape: Any, images: Tensor) -> None:
    size = images[0].numel()
    if math.prod(image_size(shape, "image_shape")) != size:
        raise ValueError(
            f"`image_shape` must be height and width of the {size} pixels in each row of the first data tensor, got "
            f"{shape!r}"
        )


def _render(**variables: Any) -> str:
    import jinja2

    loader, strict = jinja2.PackageLoader("pyro_vae", "inspection"), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True)
    return environment.get_template("report.html.jinja").render(variables)


class _Table(NamedTuple):
    """A table whose first column names the rows, with a note below."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""


def _sections(found: Inspection) -> list[tuple[str, list[_Table]]]:
    sections = [("How good is the model?", [_evidence(found.evidence)])]
    if found.nats is not None:
        sections.append(("What does the ELBO consist of?", [_nats(found.nats), _units(found.nats)]))
    if found.gap is not None:
        sections.append(("How much does the guide lose?", [_gap(found.gap)]))
    if found.calibration is not None:
        sections.append(("Can q(z|x) be trusted?", [_calibration(found.calibration)]))
    return sections


def _evidence(evidence: Evidence) -> _Table:
    log_p, error = evidence.log_evidence.double(), evidence.standard_error.double()
    count = len(log_p)
    rows = [
        ("mean of log p(x)", f"{log_p.mean():.3f}"),
        ("standard error of the mean", f"{log_p.std() / count**0.5:.3f}" if count > 1 else "unknown"),
        ("standard error due to the draws alone", f"{error.square().sum().sqrt() / count:.3f}"),
        ("median effective sample size", f"{evidence.ess.median():.1f} of {evidence.num_samples} draws"),
        (
            f"unreliable estimates (k̂ plus its error above {evidence.reliable_khat:.2f})",
            f"{evidence.unreliable.double().mean():.1%}",
        ),
    ]
    note = (
        f"In nats per datum, over {count} data. log p(x) is estimated by importance sampling from q(z|x): its "
        "expectation is a lower bound."
    )
    return _Table(("", "value"), rows, note)


def _nats(nats: Decomposition) -> _Table:
    lower, upper = nats.population_information
    rows = [
        ("ELBO = − distortion − rate", nats.elbo),
        ("distortion, the expected −log p(x|z)", nats.distortion),
        ("rate = mutual information + marginal KL", nats.rate),
        ("mutual information of x and z", nats.mutual_information),
        ("marginal KL, from the average q(z|x) to the prior", nats.marginal_kl),
        ("mutual information in the population, lower bound", lower),
        ("mutual information in the population, upper bound", upper),
    ]
    count = nats.num_data
    note = (
        f"In nats per datum, ± the standard error due to the draws. With {count} data the mutual information is at "
        f"most log {count} = {math.log(count):.2f} nats. The bounds for the population hold in expectation."
    )
    return _Table(("", "value"), rows, note)


def _units(nats: Decomposition) -> _Table:
    rows = []
    for name, units in nats.units.items():
        for index in np.ndindex(*units.activity.shape):
            values = (units.rate, units.information, units.activity)
            shown = ("" if value is None else f"{value[index].item():.3f}" for value in values)
            active = "yes" if units.active[index].item() else "no"
            rows.append((f"{name}{list(index)}" if index else name, *shown, active))
    note = f"The first {_MAX_ROWS} of {len(rows)} variables." if len(rows) > _MAX_ROWS else ""
    head = ("latent variable", "rate, nats", "mutual information, nats", "variance of its mean over data", "active")
    return _Table(head, rows[:_MAX_ROWS], note)


def _gap(gap: InferenceGap) -> _Table:
    least = "" if gap.is_exact else "at least "
    worst, row = gap.worst
    rows = [
        ("inference gap, log p(x) − ELBO", f"{least}{gap.gap.mean().item():.3f}"),
        ("approximation gap, due to the family of q", f"{least}{gap.approximation.mean().item():.3f}"),
        ("amortization gap, due to the network of q", f"{gap.amortization.mean().item():.3f}"),
        ("largest inference gap of a datum", f"{worst:.3f} (datum {row})"),
    ]
    kind = "exact" if gap.is_exact else "estimated by importance sampling from the optimized q"
    note = f"In nats per datum, over {len(gap.gap)} data. q was optimized for each of them. log p(x) is {kind}."
    return _Table(("", "value"), rows, note)


def _calibration(calibration: Calibration) -> _Table:
    levels = (0.5, 0.9)
    coverages = [calibration.coverage(level) for level in levels]
    rows = []
    for index, name in enumerate(calibration.names):
        p = calibration.p_values[index].item()
        covered = [f"{share[index].item():.1%} ± {error[index].item():.1%}" for share, error in coverages]
        rows.append((name, f"{p:.2g}" if p >= 1e-4 else "< 0.0001", *covered))
    note = (
        f"The calibration is {calibration.headline}. The p-value tests whether q(z|x) is exact. A trained encoder is "
        "never exact, so its p-values are often small. A fault is reported if one common correction of all variances, "
        "or of all means, would clearly raise the ELBO, if intervals clearly cover another share than they should, or "
        "if q is far off for some of the data."
    )
    if len(rows) > _MAX_ROWS:  # the last quantity, log p(x, z), depends on the data: it is always shown
        note = f"The first {_MAX_ROWS - 1} of {len(rows) - 1} coordinates. {note}"
        rows = [*rows[: _MAX_ROWS - 1], rows[-1]]
    return _Table(("quantity", "p-value", *(f"coverage of the {level:.0%} interval" for level in levels)), rows, note)
