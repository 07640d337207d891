"""The pictures of a report: drawn by :mod:`pyro_vae.plots`, each under the question that it answers, encoded as PNG."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from pyro_vae import plots
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import latent_sites, observed_sites
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import describe
from pyro_vae.handlers import ResampleObserved
from pyro_vae.inspection.inspect import Inspection
from pyro_vae.plots.elbo import check_history

__all__ = ["check_pictures", "draw_pictures"]

Picture = tuple[str, str]
"""A question, and the PNG that answers it in base64."""

_MAX_POINTS = 1000  # data in the map of the latent space


def check_pictures(history: Any, pictures: Mapping[str, Any]) -> None:
    """Raise unless the history can be drawn and the pictures are figures."""
    if history is not None:
        check_history(history)
    for question, figure in pictures.items():
        if not isinstance(figure, Figure):
            raise TypeError(f"`pictures` must be matplotlib figures, got {describe(figure)} for {question!r}")


@without_training
def draw_pictures(
    found: Inspection,
    model: Function,
    guide: Function,
    data: tuple[Tensor, ...],
    history: Mapping[str, Sequence[float]] | None,
    labels: list[int] | list[str] | None,
    image_shape: tuple[int, ...] | None,
    pictures: Mapping[str, Figure],
    seed: int,
) -> list[Picture]:
    """Draw all pictures of a report. The arguments are those of :func:`pyro_vae.report`."""
    drawn = []
    if history is not None:
        drawn.append(_draw("Has training converged, and does it overfit?", plots.training_curves, history))
    if found.evidence.khat.numel() > 1:
        drawn.append(_draw("Which estimates of log p(x) are reliable?", plots.khat, found.evidence, sort=True))
    if found.calibration is not None:
        drawn.append(_draw("Is q(z|x) calibrated?", plots.calibration, found.calibration))
    with seeded(seed), torch.no_grad(), poutine.block():
        if labels is not None:
            drawn += _latent_map(guide, data, labels)
        if image_shape is not None:
            drawn += _images(model, guide, data, image_shape)
    return drawn + [(question, _png(figure)) for question, figure in pictures.items()]


def _draw(question: str, plot: Function, *args: Any, size: tuple[float, float] = (6.4, 4.4), **options: Any) -> Picture:
    """Draw a plot in a new figure, and close the figure."""
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    try:
        plot(*args, ax=ax, **options)
        return question, _png(figure)
    finally:
        plt.close(figure)


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return base64.b64encode(file.getvalue()).decode()


def _latent_map(guide: Function, data: tuple[Tensor, ...], labels: list[int] | list[str]) -> Iterator[Picture]:
    """Draw the first continuous latent of each datum, if there is one: the means of q(z | x), or else draws."""
    sites = latent_sites(poutine.trace(guide).get_trace(*data))
    name = next((name for name, site in sites.items() if _has_rows(site, len(labels))), None)
    if name is None:
        return
    values = _mean_or_value(sites[name])
    kind = "draw" if values is sites[name]["value"] else "mean"
    points = values.reshape(len(labels), -1)[:_MAX_POINTS]
    options: dict[str, Any] = {"name": f"the {kind} of {name}", "size": (6.4, 5.6)}
    yield _draw(
        "Where in the latent space does each label lie?", plots.latent_map, points, labels[:_MAX_POINTS], **options
    )


def _has_rows(site: Any, count: int) -> bool:
    """Whether a site is a continuous latent with values for each of so many rows."""
    rows = any(frame.size == count and frame.dim == -1 for frame in site["cond_indep_stack"])
    return rows and not site["infer"].get("is_auxiliary") and not site["fn"].support.is_discrete


def _images(model: Function, guide: Function, data: tuple[Tensor, ...], shape: tuple[int, ...]) -> Iterator[Picture]:
    """Draw reconstructions and samples of the first observed site."""
    name = next(iter(observed_sites(poutine.trace(model).get_trace(*data))))

    def reconstruct(x: Tensor) -> Tensor:
        q = poutine.trace(guide).get_trace(*data)
        return _mean_or_value(poutine.trace(poutine.replay(model, q)).get_trace(*data).nodes[name])[: len(x)]

    def generate(count: int) -> Tensor:
        return _mean_or_value(poutine.trace(ResampleObserved()(model)).get_trace(*data).nodes[name])[:count]

    first = data[0][:12]
    yield _draw("How well are images reconstructed?", plots.reconstructions, reconstruct, first, shape, size=(8.0, 2.2))
    count = min(50, len(data[0]))
    yield _draw("Which images does the model generate?", plots.samples, generate, shape, count=count, size=(8.0, 4.4))


def _mean_or_value(site: Any) -> Tensor:
    """The mean of the site's distribution or, if it has none or it is not known, the value of the site."""
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        return site["value"]
    return mean if mean.isfinite().all() else site["value"]
