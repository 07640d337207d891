"""A report: what :func:`pyro_vae.inspect` finds, with tables and pictures, as one self-contained page of HTML."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_vae._utils.data import data_tensors
from pyro_vae._utils.display import Table
from pyro_vae._utils.files import replacing
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.ranks import one_process, ranks
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import (
    class_labels,
    describe,
    file_path,
    image_size,
    mapping,
    nonempty_string,
    writable,
)
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.decomposition import units_table
from pyro_vae.inspection.inspect import Inspection, inspect
from pyro_vae.training.fit import Fitted, as_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report"]

_MAX_ROWS = 60  # rows of a table with a row for each latent variable


@report_of_ranks("report")
@any_arguments
def report(
    path: str | os.PathLike[str],
    model: Function,
    guide: Function,
    *data: Data,
    title: str = "Inspection of a fitted model",
    history: Fitted | Mapping[str, Sequence[float]] | None = None,
    labels: Tensor | Sequence[str] | None = None,
    image_shape: tuple[int, ...] | None = None,
    pictures: Mapping[str, "Figure"] | None = None,
    found: Inspection | None = None,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Inspection:
    """Inspect a fitted model and guide, and write the results as one self-contained page of HTML.

    The page begins with the verdict, with the coverage of q, and with the faults and warnings. Tables and pictures
    follow: how good the model is, what the ELBO consists of, what the guide loses, whether q(z | x) can be trusted.

    Args:
        path: path of the page, such as ``"report.html"``. An existing file is replaced, once the new page is complete.
        model, guide: a Pyro model and its guide.
        data: the arguments of both, best held-out data. Images come first.
        title: title of the page.
        history: the result of :func:`pyro_vae.fit`, or its ``history``, for training curves.
        labels: whole numbers or names, ``(N,)``, for a map of the latent space.
        image_shape: ``(height, width)`` of images in [0, 1] at the first observed site, or ``(3, height, width)`` in
            colour, for reconstructions and samples.
        pictures: further figures, by the question that each one answers.
        found: the result of :func:`pyro_vae.inspect` for these data, which is then not computed again.
        plate, seed: name of the data plate, and seed of all draws.
        progress: whether to show a progress bar with the stages; by default only on a terminal or in a notebook.
        options: further arguments of :func:`pyro_vae.inspect`.

    Returns:
        The result of :func:`pyro_vae.inspect`.

    Raises:
        TypeError, ValueError: before any computation, if labels, image shape, history, pictures or ``found`` do not
            have the form above; and the errors of :func:`pyro_vae.inspect`.
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

    writes = ranks().is_first
    path = _page_path(path) if writes else Path(path)
    data = data_tensors(data, "data", model)
    classes = None if labels is None else class_labels(labels, "labels", len(data[0]))
    if image_shape is not None:
        _check_image(image_shape, data[0])
    nonempty_string(title, "title")
    pictures = mapping(pictures, "pictures", "{'Are images sharp?': figure}")
    history = None if history is None else as_history(history)
    check_pictures(history, pictures)
    if found is not None:
        _check_found(found, len(data[0]), options)
    with progress_bar("report", progress, stages=("inspection", "pictures")) as bar:
        if found is None:
            bar.begin("inspection")
            found = inspect(model, guide, *data, plate=plate, seed=seed, **options)
        bar.begin("pictures")
        if writes:
            with one_process(), replacing(path) as partial:
                drawn = draw_pictures(found, model, guide, data, history, classes, image_shape, pictures, seed)
                page = _render(title=title, found=found, sections=_sections(found), pictures=drawn)
                partial.write_text(page, "utf-8")
    return found


def _page_path(path: str | os.PathLike[str]) -> Path:
    path = file_path(path, "path")
    if path.is_dir():
        raise IsADirectoryError(f"`path` must be the path of a file, got {str(path)!r}, a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"`path` must be the path of a regular file, got {str(path)!r}")
    return writable(path, "path").resolve()  # a link stays a link, and its target is replaced


def _check_found(found: object, num_data: int, options: Mapping[str, Any]) -> None:
    if not isinstance(found, Inspection):
        raise TypeError(f"`found` must be the result of `pv.inspect`, got {describe(found)}")
    if (inspected := found.num_data["evidence"]) != num_data:
        raise ValueError(f"`found` must be an inspection of these {num_data} rows of data, got one of {inspected} rows")
    if options:
        name = next(iter(options))
        raise ValueError(f"`{name}` must be left out where `found` is given, which is not computed again")


def _check_image(shape: Any, images: Tensor) -> None:
    size = images[0].numel()
    if math.prod(image_size(shape, "image_shape")) != size:
        raise ValueError(
            f"`image_shape` must be height and width, or (3, height, width), of the {size} pixels in each row of the "
            f"first data tensor, got {shape!r}"
        )


def _render(**variables: Any) -> str:
    import jinja2

    loader, strict = jinja2.PackageLoader("pyro_vae", "inspection"), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True)
    return environment.get_template("report.html.jinja").render(variables)


def _sections(found: Inspection) -> list[tuple[str, list[Table]]]:
    sections = [("How good is the model?", [found.evidence._table()])]
    if found.nats is not None:
        units = [units_table(found.nats.units).limited(_MAX_ROWS)] if found.nats.units else []
        sections.append(("What does the ELBO consist of?", [found.nats._table(), *units]))
    if found.gap is not None:
        sections.append(("How much does the guide lose?", [found.gap._table()]))
    if found.calibration is not None:  # the last quantity, log p(x, z), depends on the data: it is always shown
        sections.append(("Can q(z|x) be trusted?", [found.calibration._table().limited(_MAX_ROWS)]))
    return sections
