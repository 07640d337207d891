"""A page of what :func:`pyro_vae.inspect` finds, with pictures: one file of HTML, for whoever would rather look."""

import base64
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyro_vae import plots
from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import (
    data_tensors,
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
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inspection.inspect import Inspection, inspect
from pyro_vae.plots.elbo import check_history

__all__ = ["report"]


Row = Sequence[object]


_SHOWN = 1000  # data in a latent map


_UNITS = 60  # variables in the table


def report(
    path: str | os.PathLike[str],
    model: Function,
    guide: Function,
    *data: Tensor,
    title: str = "A fitted model, inspected",
    history: Mapping[str, Sequence[float]] | None = None,
    labels: Tensor | None = None,
    image_shape: tuple[int, int] | None = None,
    pictures: Mapping[str, Figure] | None = None,
    plate: str = "data",
    seed: int = 0,
    **options: Any,
) -> Inspection:
    """Inspect a fitted model and guide, and write what is found as one self-contained page of HTML.

    First what is wrong, in words, or that nothing was found to be; then, with tables and pictures, how good the model
    is, where its nats go, what the guide loses, and whether its q(z | x) can be believed.

    Args:
        path: of the page, such as ``"report.html"``; one that is there is replaced.
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites.
        guide: its guide.
        data: what both take, best held-out data. Images come first.
        title: of the page.
        history: of :class:`pyro_vae.Fitted`, for training curves.
        labels: whole numbers, ``(N,)``, for a map of the latents.
        image_shape: height and width, where the first observed site is an image with values in [0, 1]: for
            reconstructions and samples.
        pictures: further ones, by the question that each answers.
        plate: name of the data plate.
        seed: of all draws.
        options: further ones of :func:`pyro_vae.inspect`.

    Returns:
        What was found.

    Raises:
        TypeError, ValueError: before any work, if labels, image shape, history or pictures are of another form; and as
            :func:`pyro_vae.inspect`.
        FileNotFoundError, IsADirectoryError, PermissionError: before any work, if there can be no file at the path.

    >>> import tempfile
    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(1),
    ...     encoder=guides.DiagonalNormal(2, 1, networks.linear()),
    ...     decoder=likelihoods.Normal(1, 2, networks.linear()),
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "report.html"
    ...     found = report(page, vae.model, vae.guide, vae.generate(100), max_refined=10)
    ...     page.read_text().startswith("<!DOCTYPE html>")
    True
    """
    path = _free_path(path)
    data = data_tensors(data, "data")
    labels = None if labels is None else whole_numbers(labels, "labels", len(data[0]))
    if image_shape is not None:
        _check_image(image_shape, data[0])
    nonempty_string(title, "title")
    _check_drawable(history, mapping(pictures, "pictures", "{'Are images sharp?': figure}"))
    found = inspect(model, guide, *data, plate=plate, seed=seed, **options)
    drawn = _Pictures()
    if history is not None:
        drawn.draw("Has training converged, and does it overfit?", lambda ax: plots.training_curves(history, ax))
    drawn.draw("How far can each log p(x) be trusted?", lambda ax: plots.khat(found.evidence, sort=True, ax=ax))
    if found.calibration is not None:
        calibration = found.calibration
        drawn.draw(
            "Is the truth among draws of q(z|x) as one of them?", lambda ax: plots.calibration(calibration, ax=ax)
        )
    with scoped_param_store(), seeded(seed), torch.no_grad(), poutine.block():
        if labels is not None:
            _draw_map(drawn, guide, data, labels)
        if image_shape is not None:
            _draw_images(drawn, model, guide, data, image_shape)
    for question, figure in (pictures or {}).items():
        drawn.add(question, figure)
    path.write_text(_page(title, found, drawn), encoding="utf-8")
    return found


def _free_path(path: str | os.PathLike[str]) -> Path:
    path = file_path(path, "path")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be that of a file in it, got {str(path)!r}, a folder")
    return writable(path, "path")


def _check_image(shape: Any, images: Tensor) -> None:
    size = images[0].numel()
    if math.prod(image_size(shape, "image_shape")) != size:
        raise ValueError(
            f"`image_shape` must be height and width of the first data tensor, whose rows have {size} pixels, got "
            f"{shape!r}"
        )


def _check_drawable(history: Any, pictures: Mapping[str, Any]) -> None:
    if history is not None:
        check_history(history)
    for question, figure in pictures.items():
        if not isinstance(figure, Figure):
            raise TypeError(f"`pictures` must be a Figure, got a {type(figure).__name__} at {question!r}")


class _Pictures:
    """Pictures with the questions that they answer, as HTML."""

    def __init__(self) -> None:
        self.html: list[str] = []

    def draw(self, question: str, onto: Callable[[Axes], object], size: tuple[float, float] = (6.4, 4.4)) -> None:
        """A picture on axes of its own."""
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        onto(ax)
        self.add(question, figure)
        plt.close(figure)

    def add(self, question: str, figure: Figure) -> None:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
        image = base64.b64encode(file.getvalue()).decode()
        words = escape(question)
        self.html.append(
            f'<figure><figcaption>{words}</figcaption><img alt="{words}" src="data:image/png;base64,{image}"></figure>'
        )


def _draw_map(drawn: _Pictures, guide: Function, data: tuple[Tensor, ...], labels: Tensor) -> None:
    """The means of q(z | x) of the first continuous latent, or draws, in its two variables that vary most."""
    sites = latent_sites(poutine.trace(guide).get_trace(*data))
    continuous = [name for name, site in sites.items() if not site["fn"].support.is_discrete]
    if not continuous:
        return
    name = continuous[0]
    means = _mean(sites[name]).reshape(len(labels), -1)[:_SHOWN].cpu()
    kind = "draw" if _mean(sites[name]) is sites[name]["value"] else "mean"
    chosen = means.var(0, correction=0).topk(min(2, means.shape[1])).indices.sort().values

    def onto(ax: Axes) -> None:
        plots.latent_map(means[:, chosen], labels[:_SHOWN].cpu(), ax)
        axes = [f"{kind} of {name}[{index}]" for index in chosen.tolist()]
        ax.set_xlabel(axes[0])
        if len(axes) > 1:
            ax.set_ylabel(axes[1])

    drawn.draw("Where do the data of each label lie, in the two variables that vary most?", onto, (6.4, 5.6))


def _draw_images(
    drawn: _Pictures, model: Function, guide: Function, data: tuple[Tensor, ...], shape: tuple[int, int]
) -> None:
    name = next(iter(observed_sites(poutine.trace(model).get_trace(*data))))

    def reconstruct(x: Tensor) -> Tensor:
        q = poutine.trace(guide).get_trace(*data)
        return _mean(poutine.trace(poutine.replay(model, q)).get_trace(*data).nodes[name])[: len(x)]

    def generate(count: int) -> Tensor:
        return _mean(poutine.trace(ResampleObserved()(model)).get_trace(*data).nodes[name])[:count]

    drawn.draw(
        "What is left of an image in its code?",
        lambda ax: plots.reconstructions(reconstruct, data[0][:12], shape, ax=ax),
        (8.0, 2.2),
    )
    drawn.draw(
        "What does the model draw?",
        lambda ax: plots.samples(generate, shape, count=min(50, len(data[0])), ax=ax),
        (8.0, 4.4),
    )


def _mean(site: Any) -> Tensor:
    """Of the site's distribution; its value where that has none, or it is not known."""
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        return site["value"]
    return mean if mean.isfinite().all() else site["value"]


def _page(title: str, found: Inspection, drawn: _Pictures) -> str:
    sections = [_section("How good is the model?", _evidence(found))]
    if found.nats is not None:
        sections.append(_section("Where do the nats go?", _nats(found.nats), _units(found.nats)))
    if found.gap is not None:
        sections.append(_section("What does the guide lose?", _gap(found.gap)))
    if found.calibration is not None:
        sections.append(_section("Can q(z|x) be believed?", _calibration(found.calibration)))
    sections.append(_section("Pictures", f'<div class="pictures">{"".join(drawn.html)}</div>'))
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            _verdict(found),
            *sections,
            "</main></body></html>",
        ]
    )


def _verdict(found: Inspection) -> str:
    """Faults and cautions, told apart by words and borders and not by colour alone."""
    faults = [f'<p class="fault"><b>Fault.</b> {escape(fault)}.</p>' for fault in found.faults]
    warnings = [f'<p class="caution"><b>Caution.</b> {escape(caution)}.</p>' for caution in found.warnings]
    look = "sound" if found.calibration else "caution"
    clear = f'<p class="{look}"><b>{escape(found.all_clear.capitalize())}.</b></p>'
    return "".join((faults or [clear]) + warnings)


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def _table(head: Row, rows: Iterable[Row], note: str = "") -> str:
    """The first column names the rows."""
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>' + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>"
        for name, *cells in rows
    )
    below = f"<p>{escape(note)}</p>" if note else ""
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{below}'


def _evidence(found: Inspection) -> str:
    evidence = found.evidence
    log_p, error = evidence.log_evidence.double(), evidence.standard_error.double()
    count = len(log_p)
    rows = [
        ("log p(x), mean", f"{log_p.mean():.3f}"),
        ("its standard error, over data", f"{log_p.std() / count**0.5:.3f}" if count > 1 else "unknown"),
        ("of it from the draws", f"{error.square().sum().sqrt() / count:.3f}"),
        ("effective draws, median", f"{evidence.ess.median():.1f} of {evidence.num_samples}"),
        (f"k̂ above {evidence.reliable_khat:.2f}", f"{evidence.unreliable.double().mean():.1%} of the data"),
    ]
    note = f"In nats per datum, of {count} data; importance-weighted from q(z|x), in expectation a lower bound."
    return _table(("", "value"), rows, note)


def _nats(nats: Decomposition) -> str:
    lower, upper = nats.population_information
    rows = [
        ("ELBO = − distortion − rate", nats.elbo),
        ("distortion", nats.distortion),
        ("rate = mutual information + marginal KL", nats.rate),
        ("mutual information of x and z", nats.mutual_information),
        ("marginal KL, of the average q(z|x) from the prior", nats.marginal_kl),
        ("mutual information in the population, at least", lower),
        ("mutual information in the population, at most", upper),
    ]
    most = math.log(nats.num_data)
    note = (
        f"In nats per datum, ± the standard error of the draws. {nats.num_data} data tell {most:.2f} at most. What is "
        "said of the population holds in expectation."
    )
    return _table(("", "value"), rows, note)


def _units(nats: Decomposition) -> str:
    rows = []
    for name, units in nats.units.items():
        for index in np.ndindex(*units.activity.shape):
            rate = "" if units.rate is None else f"{units.rate[index].item():.3f}"
            active = "" if units.active[index].item() else "inactive"
            rows.append(
                (f"{name}{list(index)}" if index else name, rate, f"{units.activity[index].item():.3f}", active)
            )
    note = f"The first {_UNITS} of {len(rows)} variables." if len(rows) > _UNITS else ""
    return _table(("variable", "rate, nats", "variance of its mean over data", ""), rows[:_UNITS], note)


def _gap(gap: InferenceGap) -> str:
    least = "" if gap.is_exact else "at least "
    rows = [
        ("gap, log p(x) − ELBO", f"{least}{gap.gap.mean().item():.3f}"),
        ("approximation: of the family of q", f"{least}{gap.approximation.mean().item():.3f}"),
        ("amortization: of the network of q", f"{gap.amortization.mean().item():.3f}"),
        ("the largest gap of a datum", "{:.3f}, of datum {}".format(*gap.worst)),
    ]
    kind = "exact" if gap.is_exact else "importance-weighted from the refined q"
    note = f"In nats per datum, of {len(gap.gap)} data whose q was refined each on its own; log p(x) {kind}."
    return _table(("", "value"), rows, note)


def _calibration(calibration: Calibration) -> str:
    levels = (0.5, 0.9)
    rows: list[Row] = []
    for index, name in enumerate(calibration.names):
        covered = [tuple(found[index].item() for found in calibration.coverage(level)) for level in levels]
        p = calibration.p_values[index].item()
        shown = f"{p:.2g}" if p >= 1e-4 else "< 0.0001"
        rows.append((name, shown, *(f"{held:.1%} ± {error:.1%}" for held, error in covered)))
    note = (
        f"{calibration.headline}. p: of ranks as uneven as these, if q(z|x) were exact. That of a trained encoder is "
        "small, for none is exact; a fault is what one change of all variances, or of all means, would mend."
    )
    head = ("quantity", "p", *(f"in its {level:.0%} interval" for level in levels))
    if len(rows) > _UNITS:  # the last reads the data, and stays
        note = f"The first {_UNITS - 1} of {len(rows) - 1} coordinates. {note}"
        rows = [*rows[: _UNITS - 1], rows[-1]]
    return _table(head, rows, note)


_STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.fault, .caution, .sound { padding: .5rem .8rem; border-left: .4rem solid; background: #f4f4f4; }
.fault { border-color: #b00020; border-left-style: double; } .caution { border-color: #8a6d00; }
.sound { border-color: #2e7d32; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: normal; } td { white-space: nowrap; } thead th { font-weight: bold; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: bold; margin-bottom: .3rem; } img { max-width: 100%; height: auto; }
"""
