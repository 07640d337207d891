"""Pictures of images: grids, decoded codes, reconstructions and samples."""

from collections.abc import Callable, Iterable, Sequence
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from torch import Tensor, nn

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import describe, image_size, is_integer, numbers, positive_int, real_tensor
from pyro_vae.plots.axes import axes_or_new, fit_figure, grow_figure
from pyro_vae.plots.colours import MISSING
from pyro_vae.vae import VAE

__all__ = ["image_grid", "manifold", "reconstructions", "samples", "traversals"]

Shape = tuple[int, int] | tuple[int, int, int]
"""Height and width of grey images, or channels, 1 or 3, height and width."""

ToImages = Callable[[Tensor], Tensor]
Generate = Callable[[int], Tensor]


def image_grid(
    images: Tensor,
    *,
    columns: int = 10,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw images in a grid, row by row: in grey with black for 1, or in colour as red, green and blue.

    Values are clipped to [0, 1]: below 0 is drawn as 0, above 1 as 1. A missing pixel, NaN, is drawn in orange.

    Args:
        images: ``(N, height, width)`` or ``(N, 1, height, width)`` in grey, ``(N, 3, height, width)`` in colour, with
            values in [0, 1].
        columns: images per row, at most.
        row_names: a name for each row, on its left.
        column_names: a name for each column, below the last row.

    Raises:
        TypeError, ValueError: if images have another type or shape, or are integers above 1, or the number of names is
            not that of rows or columns.

    .. plot::
        :include-source:
        :filename-prefix: image_grid

        >>> import pyro_vae as pv
        >>> ax = pv.plots.image_grid(pv.datasets.digits("test").x[:40].reshape(-1, 8, 8), columns=10)
        >>> ax.images[0].get_array().shape
        (35, 89)
    """
    positive_int(columns, "columns")
    expected = "a tensor (N, height, width), or (N, 3, height, width) in colour, with N >= 1"
    if not isinstance(images, Tensor) or images.dim() not in (3, 4) or 0 in images.shape:
        raise ValueError(f"`images` must be {expected}, got {_shape_or_type(images)}")
    if images.dim() == 4 and images.shape[1] not in (1, 3):
        raise ValueError(f"`images` must be {expected}, got shape {tuple(images.shape)}")
    real_tensor(images, "images", "a tensor of values in [0, 1]")
    if not images.is_floating_point() and images.max() > 1:  # bytes, which would all be black
        raise ValueError(
            f"`images` must have values in [0, 1], such as `x / 255`, got {images.dtype} up to {images.max()}"
        )
    new, ax = ax is None, axes_or_new(ax)
    pixels = images.detach().cpu().float().clamp(0, 1)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    row_names = _checked_names(row_names, "row_names", rows, "rows")
    column_names = _checked_names(column_names, "column_names", columns, "columns")
    sheet = torch.full(
        (channels, rows * (height + 1) - 1, columns * (width + 1) - 1), float(channels == 3), device="cpu"
    )
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    if channels == 1:
        ax.imshow(sheet[0].numpy(), cmap=colormaps["gray_r"].with_extremes(bad=MISSING), vmin=0, vmax=1)
    else:
        missing = sheet.isnan().any(0)
        ax.imshow(
            torch.where(missing, torch.tensor(to_rgb(MISSING), device="cpu")[:, None, None], sheet)
            .movedim(0, -1)
            .numpy()
        )
    ax.set_axis_off()
    if row_names or column_names:
        _label(ax, (height, width), row_names, column_names)
    if new:
        fit_figure(ax, *sheet.shape[1:])
    return ax


def _checked_names(names: Sequence[str] | None, name: str, count: int, what: str) -> Sequence[str]:
    """Return a name for each row or column; none for ``None``."""
    if names is None:
        return []
    must = f"{count} names, one for each of the {what}"
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(one, str) for one in names):
        raise TypeError(f"`{name}` must be {must}, got {describe(names)}")
    if len(names) != count:
        raise ValueError(f"`{name}` must be {must}, got {len(names)}")
    return names


@torch.no_grad()
@without_training
def manifold(decode: ToImages, shape: Shape, *, size: int = 15, ax: Axes | None = None) -> Axes:
    """Which image does each point of a latent space with two standard normal dimensions decode to?

    Args:
        decode: from codes ``(S, 2)`` to mean images ``(S, pixels)``: ``lambda z: vae.decode(z).mean``. The
            codes are on the device of the first module that the function refers to.
        shape: ``(height, width)`` of an image, or ``(3, height, width)`` in colour.
        size: images per row and column, at the quantiles 1/(2 size), ... of the prior.

    Raises:
        TypeError, ValueError: if ``decode`` is not a function, or returns images of another shape.

    .. plot::
        :include-source:
        :filename-prefix: manifold

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> digits, net = pv.datasets.digits("train"), networks.mlp([64])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, net), likelihoods.Bernoulli(2, 64, net))
        >>> x = pv.datasets.binarize(digits.x)
        >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=25, batch_size=100, lr=1e-2)
        >>> ax = pv.plots.manifold(lambda z: vae.decode(z).mean, (8, 8))
        >>> ax.get_xlabel()
        'z[0], at quantiles of the prior'
    """
    _check_function(decode, "decode", "`lambda z: vae.decode(z).mean`")
    positive_int(size, "size")
    quantiles = torch.special.ndtri((torch.arange(size, device=_device(decode)) + 0.5) / size)
    z = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)
    ax = image_grid(_as_images(_call(decode, "decode", z), shape, "decode", size**2), columns=size, ax=ax)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[], xlabel="z[0], at quantiles of the prior", ylabel="z[1], at quantiles of the prior")
    return ax


@torch.no_grad()
@without_training
def traversals(
    decode: ToImages,
    z: Tensor,
    shape: Shape,
    *,
    values: Sequence[float] | Tensor = (-3, -2, -1, 0, 1, 2, 3),
    coordinates: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What does each latent coordinate do? In each row one coordinate varies, and the others are fixed.

    If nothing changes in a row, the decoder ignores that coordinate.

    Args:
        decode: from codes ``(S, D)`` to mean images ``(S, pixels)``: ``lambda z: vae.decode(z).mean``.
        z: ``(D,)``, the code to vary: that of a datum, such as ``vae.encode(x[:1]).mean[0]``, or the mean of the prior.
        shape: ``(height, width)`` of an image, or ``(3, height, width)`` in colour.
        values: values of the coordinate, one per column. -3 to 3 cover a standard normal prior, whose quantiles are
            ``dist.Normal(0.0, 1.0).icdf(torch.linspace(0.05, 0.95, 7))``; a binary latent has 0 and 1.
        coordinates: the coordinates to vary, one per row; by default all.

    Raises:
        TypeError, ValueError: if an argument has another type or shape, or a coordinate does not exist.

    .. plot::
        :include-source:
        :filename-prefix: traversals

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> digits, net = pv.datasets.digits("train"), networks.mlp([64])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, net), likelihoods.Bernoulli(2, 64, net))
        >>> x = pv.datasets.binarize(digits.x)
        >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=25, batch_size=100, lr=1e-2)
        >>> ax = pv.plots.traversals(lambda z: vae.decode(z).mean, vae.encode(x[:1]).mean[0], (8, 8))
        >>> len(ax.get_yticklabels())
        2
    """
    _check_function(decode, "decode", "`lambda z: vae.decode(z).mean`")
    if not isinstance(z, Tensor) or z.dim() != 1 or len(z) == 0:
        example = "`vae.encode(x[:1]).mean[0]`"
        raise ValueError(f"`z` must be one code, a tensor (D,), such as {example}, got {_shape_or_type(z)}")
    steps = numbers(values, "values").to(z)
    if steps.dim() != 1 or len(steps) == 0:
        raise ValueError(f"`values` must be one or more numbers, (V,), got shape {tuple(steps.shape)}")
    if not isinstance(coordinates, Iterable | None) or isinstance(coordinates, Tensor):
        raise TypeError(f"`coordinates` must be integers from 0 to {len(z) - 1}, got {describe(coordinates)}")
    chosen = list(range(len(z)) if coordinates is None else coordinates)
    wrong = [index for index in chosen if not is_integer(index) or not 0 <= index < len(z)]
    if wrong or not chosen:
        raise ValueError(f"`coordinates` must be one or more integers from 0 to {len(z) - 1}, got {chosen}")
    codes = z.repeat(len(chosen), len(steps), 1)
    for row, index in enumerate(chosen):
        codes[row, :, index] = steps
    images = _as_images(_call(decode, "decode", codes.flatten(0, 1)), shape, "decode", len(chosen) * len(steps))
    new, ax = ax is None, image_grid(images, columns=len(steps), ax=ax)
    rows = [f"z[{index}] = {round(float(z[index]), 2) + 0.0:.2f}" for index in chosen]
    _label(ax, shape, rows, [f"{value:.3g}" for value in steps.tolist()])
    if new:
        grow_figure(ax, 0.8)
    ax.set(xlabel="value of the row's coordinate; the others are fixed", ylabel="coordinate,\nand its value in z")
    return ax


@torch.no_grad()
@without_training
def reconstructions(
    reconstruct: ToImages, x: Tensor, shape: Shape, *, columns: int = 12, seed: int = 0, ax: Axes | None = None
) -> Axes:
    """How well are images reconstructed from their codes? Each image is above the mean of p(x | z) at its code.

    Args:
        reconstruct: function from images ``(N, pixels)`` to means of the same shape: ``vae.reconstruct`` for
            one draw z ~ q(z | x), or ``lambda x: vae.decode(vae.encode(x).mean).mean`` for the mean of a normal q.
        x, shape: images, ``(N, pixels)``, and ``(height, width)`` or ``(3, height, width)`` of one.
        columns: images per row.
        seed: seed of the draws.

    Raises:
        TypeError, ValueError: if ``reconstruct`` is not a function, or images have another shape.

    .. plot::
        :include-source:
        :filename-prefix: reconstructions

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> digits, net = pv.datasets.digits("train"), networks.mlp([64])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, net), likelihoods.Bernoulli(2, 64, net))
        >>> x = pv.datasets.binarize(digits.x)
        >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=25, batch_size=100, lr=1e-2)
        >>> ax = pv.plots.reconstructions(vae.reconstruct, x[:12], (8, 8))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['data', 'mean of p(x|z)']
    """
    _check_function(reconstruct, "reconstruct", "`vae.reconstruct`")
    data = _as_images(x, shape, "x")
    columns = min(positive_int(columns, "columns"), len(data))
    with seeded(seed):
        means = _as_images(_call(reconstruct, "reconstruct", x), shape, "reconstruct", len(data))
    blank = torch.full_like(data[:1], float(data.dim() == 4)).expand(-len(data) % columns, *data.shape[1:])  # white
    pairs = [torch.cat([images, blank.to(images)]).split(columns) for images in (data, means)]
    ax = image_grid(torch.cat([row for pair in zip(*pairs, strict=True) for row in pair]), columns=columns, ax=ax)
    _label(ax, shape, ["data", "mean of p(x|z)"] * len(pairs[0]), [])
    for pair in range(1, len(pairs[0])):
        ax.axhline(2 * pair * (shape[-2] + 1) - 1, color="black", linewidth=0.8)
    return ax


@torch.no_grad()
@without_training
def samples(
    generate: Generate, shape: Shape, *, count: int = 50, columns: int = 10, seed: int = 0, ax: Axes | None = None
) -> Axes:
    """Which images does the model generate, from codes that are drawn from the prior?

    Args:
        generate: function from a count to images ``(count, pixels)``: ``vae.generate`` for draws of x, or
            ``lambda count: vae.generate(count, mean=True)`` for the means of p(x | z), which look better than draws.
        shape: ``(height, width)`` of an image, or ``(3, height, width)`` in colour.
        count, columns: number of images, in all and per row.
        seed: seed of the draws.

    Raises:
        TypeError, ValueError: if ``generate`` is not a function, or returns images of another shape or number.

    .. plot::
        :include-source:
        :filename-prefix: samples

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> digits, net = pv.datasets.digits("train"), networks.mlp([64])
        >>> vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, net), likelihoods.Bernoulli(2, 64, net))
        >>> x = pv.datasets.binarize(digits.x)
        >>> fitted = pv.fit(vae.model, vae.guide, x, epochs=25, batch_size=100, lr=1e-2)
        >>> ax = pv.plots.samples(lambda count: vae.generate(count, mean=True), (8, 8))
        >>> ax.images[0].get_array().shape
        (44, 89)
    """
    _check_function(generate, "generate", "`vae.generate`")
    positive_int(count, "count")
    with seeded(seed):
        drawn = _as_images(_call(generate, "generate", count), shape, "generate", count)
    return image_grid(drawn, columns=columns, ax=ax)


def _check_function(value: object, name: str, example: str) -> None:
    if not callable(value) or isinstance(value, VAE):
        raise TypeError(f"`{name}` must be a function, such as {example}, got {describe(value)}")


def _device(function: Any) -> torch.device | None:
    """Return the device of the first module that a function refers to; ``None``, the default, if there is none."""
    function = getattr(function, "func", function)  # of a functools.partial
    found = [function, getattr(function, "__self__", None)]
    if isinstance(getattr(function, "__func__", function), FunctionType):
        names = getclosurevars(function)
        found += [*names.nonlocals.values(), *names.globals.values()]
    tensors = [tensor for one in found if isinstance(one, nn.Module) for tensor in one.state_dict().values()]
    return tensors[0].device if tensors else None


def _call(function: Callable[[Any], Tensor], name: str, argument: Any) -> Tensor:
    """Call a function of the user, and name it if it does not take the argument."""
    try:
        return function(argument)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"`{name}` must be a function of {describe(argument)}, got one that raises: {error}"
        ) from error


def _shape_or_type(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else describe(value)


def _as_images(values: Tensor, shape: Shape, name: str, count: int | None = None) -> Tensor:
    """Reshape ``x``, or the return value of a function, to images: ``(N, height, width)``, or with 3 channels."""
    channels, height, width = image_size(shape, "shape")
    pixels = channels * height * width
    fits = isinstance(values, Tensor) and values.dim() > 1 and values.shape[1:].numel() == pixels
    if not fits or len(values) == 0 or count not in (None, len(values)):
        verb, rows = ("be", "N") if count is None else ("return", count)
        colours = f"{channels} colours for each of " if channels > 1 else ""
        raise ValueError(
            f"`{name}` must {verb} images ({rows}, {pixels}), of {colours}{height} by {width} pixels, got "
            f"{_shape_or_type(values)}"
        )
    return values.reshape(-1, *((height, width) if channels == 1 else (channels, height, width)))


def _label(ax: Axes, shape: Shape, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Label the rows and columns of a grid of images, at their middles."""
    ax.set_axis_on()
    for set_ticks, size, names in ((ax.set_yticks, shape[-2], rows), (ax.set_xticks, shape[-1], columns)):
        set_ticks([index * (size + 1) + (size - 1) / 2 for index in range(len(names))], names)
