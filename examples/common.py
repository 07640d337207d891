"""Functions that the examples share: options, images, evaluation, tables, pictures and files of results."""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from scipy.ndimage import label
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, plots, priors, schedules, spatial

Function = Callable[..., Any]
Shape = tuple[int, int]
History = Mapping[str, list[float]]


# --- Command-line options --------------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the docstring, and show the default of each option."""


def folder(name: str) -> Path:
    """Create a folder for the results, so that a wrong name fails before the training and not after it."""
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder {name!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to the folder {name!r}")
    return path


def positive_int(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def make_parser(doc: str | None, name: str, epochs: int, unit: str = "passes over the data") -> argparse.ArgumentParser:
    """Make a parser with ``--out``, ``--epochs`` and ``--seed``; its description is the docstring of the example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Formatter)
    parser.add_argument("--out", type=folder, default=f"results/{name}", help="folder for the results")
    parser.add_argument("--epochs", type=positive_int, default=epochs, help=unit)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def add_training(parser: argparse.ArgumentParser, batch_size: int, lr: float) -> None:
    """Add ``--batch-size``, ``--lr`` and ``--compile``."""
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, help="rows in a mini-batch")
    parser.add_argument("--lr", type=positive_float, default=lr, help="learning rate of Adam")
    compiled = "compile the steps from the first one on; by default long runs do so while they train"
    parser.add_argument("--compile", action="store_true", default=None, help=compiled)


def add_images(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--data`` and ``--folder``: the images to train on; and ``--test-images`` and ``--draws``."""
    kinds = "mnist: 28 × 28 pixels, downloaded once; digits: 8 × 8 pixels, from scikit-learn"
    parser.add_argument("--data", choices=["digits", "mnist"], default=default, help=kinds)
    parser.add_argument("--folder", type=Path, help="read the four IDX files of MNIST from this folder")
    add_evaluation(parser, test_images=1000)


def add_evaluation(parser: argparse.ArgumentParser, test_images: int, draws: int = 200) -> None:
    """Add ``--test-images`` and ``--draws``."""
    parser.add_argument("--test-images", type=positive_int, default=test_images, help="held-out images to evaluate on")
    parser.add_argument("--draws", type=positive_int, default=draws, help="draws in an ArviZ file")


def training_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of :func:`pyro_vae.fit` that are options of the example."""
    return {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed", "compile")}


# --- Images ----------------------------------------------------------------------------------------------------------


def load_images(data: str, folder: Path | None = None) -> tuple[datasets.Dataset, datasets.Dataset, Shape]:
    """Load training images, held-out images, and their height and width."""
    if data == "digits":
        return datasets.digits("train"), datasets.digits("test"), (8, 8)
    try:
        return datasets.mnist("train", folder), datasets.mnist("test", folder), (28, 28)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{error}\n\nNo network? `--folder FOLDER` reads MNIST's four IDX files from a folder, and `--data digits` "
            "trains on smaller digits that need no download."
        ) from None


def load_binary_images(
    data: str, folder: Path | None = None, test_images: int | None = None
) -> tuple[datasets.Dataset, datasets.Dataset, Shape]:
    """Load images with pixels 0 or 1: training images, the first held-out images, and height and width."""
    *both, shape = load_images(data, folder)
    train, test = (datasets.Dataset(datasets.binarize(each.x), each.labels) for each in both)
    return train, datasets.Dataset(test.x[:test_images], test.labels[:test_images]), shape


def load_measurements(percent: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Load measurements of tumours, ``(569, 30)``, standardized, complete and with missing entries, and their names."""
    generator = torch.Generator().manual_seed(seed)
    data = load_breast_cancer()
    values = torch.as_tensor(data.data)[torch.randperm(len(data.data), generator=generator)]
    missing = torch.rand(values.shape, generator=generator) < percent / 100
    train = values.masked_fill(missing, torch.nan)[:400]
    loc = train.nanmean(0)
    complete = ((values - loc) / (train - loc).square().nanmean(0).sqrt()).float()
    return complete, complete.masked_fill(missing, torch.nan), [str(name) for name in data.feature_names]


def mask_labels(labels: Tensor, count: int) -> Tensor:
    """Keep the first labels of each digit, ``count`` in all, and set the others to -1."""
    left = torch.cat([(labels == digit).nonzero()[: count // 10, 0] for digit in range(10)])
    return torch.full_like(labels, -1).index_copy(0, left, labels[left])


def concat_broadcast(x: Tensor, y: Tensor) -> Tensor:
    """Concatenate ``(*, D)`` and ``(*, K)`` to ``(*, D + K)``; an enumerated y has one dimension more on the left."""
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], dim=-1)


def one_hot(labels: Tensor) -> Tensor:
    """Encode labels ``(N,)`` as ``(N, 10)``; the row of a missing label, -1, is arbitrary."""
    return functional.one_hot(labels.clamp(min=0), 10).to(torch.get_default_dtype())


def plain_vae(pixels: int, latent: int, network: networks.NetworkFactory) -> pv.VAE:
    """Make a VAE of binary pixels with a standard normal prior, the baseline that others are compared with."""
    encoder, decoder = guides.DiagonalNormal(pixels, latent, network), likelihoods.Bernoulli(latent, pixels, network)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder)


def prior_as_guide(vae: pv.VAE) -> Function:
    """Return the guide q(z | x) = p(z): its ELBO is Jensen's bound, and its draws are naive Monte Carlo."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.prior())

    return guide


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    pair: Any,
    *data: Tensor,
    seed: int,
    samples: int = 1000,
    elbo: ELBO | None = None,
    exact: Function | None = None,
    compile: bool = False,
) -> dict[str, float]:
    """Estimate ELBO, distortion, rate and log p(x) of held-out data, all in nats per datum.

    Args:
        pair: an object with a ``model`` and a ``guide``.
        data: the arguments of both.
        seed: seed of the draws.
        samples: draws for the log p(x) of each datum; the ELBO uses 20.
        elbo: an ELBO that sums over the enumerated sites of the guide.
        exact: a model with at most two latent dimensions, for log p(x) by quadrature instead of draws.
        compile: whether to compile the weighting of the draws.
    """
    terms = pv.evaluate(pair.model, pair.guide, data, elbo=elbo, num_samples=20, seed=seed)
    if exact is None:
        estimate = pv.log_evidence(pair.model, pair.guide, *data, num_samples=samples, seed=seed, compile=compile)
        log_p = estimate.log_evidence
    else:
        log_p = exact_log_p(exact, *data)
    return terms | {"log_p": log_p.mean().item(), "log_p_standard_error_over_images": standard_error(log_p)}


class AtMeans(Messenger):
    """Draw each latent at the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and not msg["is_observed"]:
            msg["value"], msg["done"] = msg["fn"].mean, True


@torch.no_grad()
def at_means(pair: Any, *data: Tensor, site: str) -> Any:
    """Return the distribution of an observed site with the latents at the means of the guide, one after the other."""
    with AtMeans(), pyro.poutine.trace() as guide:
        pair.guide(*data)
    with pyro.poutine.trace() as model, pyro.poutine.replay(trace=guide.trace):
        pair.model(*data)
    return model.trace.nodes[site]["fn"]


def refine(pair: Any, x: Tensor, args: argparse.Namespace) -> Any:
    """Return the model of a pair, and a guide with a normal for each latent of each datum of x.

    They start at the means of the pair's guide, and are trained on the ELBO. Networks whose parameters need a gradient
    would be trained, too, on these data: freeze them first, by `requires_grad_(False)`.
    """
    with torch.no_grad(), AtMeans(), pyro.poutine.trace() as first:
        pair.guide(x)
    values = {name: site["value"] for name, site in first.trace.nodes.items() if site["type"] == "sample"}
    guide = AutoNormal(pair.model, init_loc_fn=init_to_value(values=values), init_scale=0.05)
    options = training_options(args) | {"epochs": args.refine, "batch_size": len(x), "lr": schedules.decayed(0.05)}
    pv.fit(pair.model, guide, x, **options)
    return SimpleNamespace(model=pair.model, guide=guide)


def exact_log_p(model: Function, x: Tensor) -> Tensor:
    """Integrate a latent of two dimensions; in batches, because one difficult image refines the grid of its batch."""
    return torch.cat([pv.exact.log_evidence(model, rows, tolerance=1e-2) for rows in x.split(50)])


def compare(
    args: argparse.Namespace,
    example: str,
    names: Iterable[str],
    train: Callable[[argparse.Namespace, str, Tensor], tuple[pv.VAE, pv.Fitted]],
) -> None:
    """Train several VAEs on resampled images, one for each name; evaluate them, print a table and save all results."""
    data, test, shape = load_images(args.data, args.folder)
    torch.manual_seed(args.seed)
    x, labels = datasets.resample(test.x)[: args.test_images], test.labels[: args.test_images]
    vaes: dict[str, pv.VAE] = {}
    rows: dict[str, Any] = {}
    for name in names:
        vaes[name], fitted = train(args, name, data.x)
        row = evaluate(vaes[name], x, seed=args.seed, samples=args.samples, compile=args.compile)
        rows[name] = row | {"steps": fitted.steps, "seconds": fitted.seconds, "history": fitted.history}
        print(f"{name}: {fitted.seconds:.0f} s, log p(x) {row['log_p']:.2f}", flush=True)
    error = "{log_p:.2f} ± {log_p_standard_error_over_images:.2f}"
    columns = {"steps": "{steps}", "seconds": "{seconds:.0f}", "ELBO": "{elbo:.2f}", "log p(x)": error}
    notes = f"""in nats per image of {x.shape[1]} pixels, on {len(x)} held-out images, ± the standard error over images;
log p(x) is an estimate with {args.samples} draws for each image, in expectation a lower bound"""
    text = table("", rows, columns, notes)
    print(text)
    best = max(rows, key=lambda name: rows[name]["log_p"])
    figures = draw_images(vaes[best], rows[best]["history"], x, labels, shape)
    if len(rows) > 1:
        figures["comparison"] = draw_elbos(rows)
    save(
        args, {"best": best, "runs": rows}, figures, {example: image_tree(vaes[best], x[:20], labels[:20], args)}, text
    )


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values ``(N,)``."""
    return values.std().item() / len(values) ** 0.5


def purity(posterior: Tensor, labels: Tensor) -> float:
    """Return the share of images whose label is the most frequent one in their class; probabilities are ``(N, K)``."""
    found = posterior.argmax(1)
    return sum(int(labels[found == index].bincount().max()) for index in found.unique()) / len(labels)


def cluster_agreement(posterior: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the purity of clusters with probabilities ``(N, K)``, and the adjusted Rand index, 0 by chance."""
    rand = adjusted_rand_score(labels, posterior.argmax(1))
    return {"same_label": purity(posterior, labels), "adjusted_rand": float(rand)}


def accuracy(found: Tensor, truth: Tensor) -> float:
    """Return the percentage of right values ``(N,)``."""
    return 100 * (found == truth).double().mean().item()


def count_by_ink(train: datasets.Dataset, x: Tensor) -> Tensor:
    """Count the digits of scenes by logistic regression on the amount of ink, fitted with the true counts."""
    ink = [torch.stack([each.sum(1), each.square().sum(1)], 1) / 50 for each in (train.x, x)]
    return torch.as_tensor(LogisticRegression(max_iter=1000).fit(ink[0], train.labels).predict(ink[1]))


def count_regions(train: datasets.DigitScenes, x: Tensor) -> Tensor:
    """Count the digits of scenes by connected regions; pixels that touch at a corner are connected, too.

    How bright a pixel and how large a region must be, is fitted with the true counts of 2000 training scenes.
    """
    most = int(train.labels.max())

    def sizes(rows: Tensor, threshold: float) -> Tensor:
        images = rows.unflatten(1, (train.size, train.size)).numpy() > threshold
        regions = [label(each, np.ones((3, 3)))[0].ravel() for each in images]
        return torch.tensor(np.stack([np.bincount(each, minlength=500)[1:500] for each in regions]))

    def count(found: Tensor, smallest: int) -> Tensor:
        return (found >= smallest).sum(1).clamp(max=most)

    bright = {threshold: sizes(train.x[:2000], threshold) for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}
    rules = [(threshold, smallest) for threshold in bright for smallest in range(1, 25)]
    right = [accuracy(count(bright[each], smallest), train.labels[:2000]) for each, smallest in rules]
    threshold, smallest = rules[int(np.argmax(right))]
    return count(sizes(x, threshold), smallest)


def box_overlap(found: Tensor, truth: Tensor) -> float:
    """Return the mean intersection over union of boxes ``(M, K, 3)``, for the best order of those of each scene.

    Boxes of objects that are not there are NaN; each scene has as many found boxes as true ones.
    """
    orders = [
        spatial.intersection_over_union(found[:, list(order)], truth) for order in permutations(range(truth.shape[1]))
    ]
    return torch.stack([each.nansum(1) for each in orders]).amax(0).sum().item() / int(truth[..., 0].isfinite().sum())


def rand_indices(found: Iterable[Any], masks: Tensor) -> dict[str, Any]:
    """Compare segmentations of scenes with their true masks ``(N, P)``, in which 0 is the background.

    Returns the adjusted Rand index over the pixels of the objects, its mean with the standard error over scenes, and
    the mean over all pixels.
    """
    pairs = [(np.asarray(each), mask.numpy()) for each, mask in zip(found, masks, strict=True)]
    objects = torch.tensor([adjusted_rand_score(true[true > 0], each[true > 0]) for each, true in pairs])
    everything = sum(adjusted_rand_score(true, each) for each, true in pairs) / len(pairs)
    error = standard_error(objects)
    return {"rand": objects.mean().item(), "rand_error": error, "rand_all": everything, "scenes": objects.tolist()}


def cluster_accuracy(found: Tensor, labels: Tensor) -> float:
    """Return the share of right clusters among two, whichever of them is called 1."""
    right = (found == (labels == 1)).double().mean().item()
    return max(right, 1 - right)


def coverage(draws: Tensor, truth: Tensor, levels: Tensor) -> Tensor:
    """Return the share of true values ``(N,)`` inside the central interval of each level, from draws ``(S, N)``."""
    below = (draws < truth).float().mean(0)
    return ((below - 0.5).abs()[:, None] <= levels / 2).float().mean(0)


def wrap(angle: Tensor) -> Tensor:
    """Bring angles to [-π, π)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def angle_crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Return the continuous ranked probability score of angles ``(N,)``, from draws ``(S, N)``: radians, 0 is perfect.

    It is E|a - truth| - E|a - a'| / 2 with distances on the circle, and the error itself for a single draw. It is least
    in expectation for the true distribution: draws must be near the truth, and as uncertain as they have to be (Grimit
    et al. 2006, "The continuous ranked probability score for circular variables").
    """
    between = wrap(draws - draws[:, None]).abs().mean((0, 1))
    return wrap(draws - truth).abs().mean(0) - between / 2


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Compute 2 E|x - y| - E|x - x'| - E|y - y'|, zero for equal distributions (Székely and Rizzo 2013)."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def null_band(num_points: int, repeats: int) -> list[float]:
    """Return the 5th and 95th percentile of the energy distance between two samples of the two Gaussians."""
    samples = [datasets.two_gaussians(num_points, seed=1000 + index).x for index in range(2 * repeats)]
    distances = torch.tensor([energy_distance(*pair) for pair in zip(samples[::2], samples[1::2], strict=True)])
    return distances.quantile(torch.tensor([0.05, 0.95])).tolist()


def linear_forecast(images: Tensor, actions: Tensor, components: int = 20, order: int = 3) -> Function:
    """Fit a linear model of image sequences with actions: a function from images and actions to draws of what follows.

    The principal components c_t of an image are a linear function of c_(t-1), ..., c_(t-order) and the action, plus
    Gaussian noise: dynamic mode decomposition with control (Proctor, Brunton and Kutz 2016), of a higher order.

    Args:
        images: sequences to fit, ``(N, T, pixels)``.
        actions: ``(N, T - 1)``, between the images.
        components: number of principal components.
        order: number of images that a prediction is made from.

    Returns:
        A function of images seen, ``(M, t, pixels)``, actions between them, actions after them, ``(M, H)``, and a
        number of draws, that yields H predictions ``(draws, M, pixels)``, cut to [0, 1].
    """
    loc = images.mean((0, 1))
    basis = torch.linalg.svd(images.flatten(0, 1) - loc, full_matrices=False).Vh[:components].T

    def inputs(codes: list[Tensor], action: Tensor) -> Tensor:
        return torch.cat([*codes, action[..., None], torch.ones_like(action[..., None])], -1)

    codes = ((images - loc) @ basis).unbind(1)
    times = range(order, len(codes))
    x = torch.cat([inputs([*codes[t - order : t]], actions[:, t - 1]) for t in times])
    y = torch.cat([codes[t] for t in times])
    weights = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ y)
    noise = torch.linalg.cholesky((y - x @ weights).T.cov() + 1e-8 * torch.eye(components))

    def predict(seen: Tensor, before: Tensor, after: Tensor, draws: int) -> Iterator[Tensor]:
        codes = [*((seen - loc) @ basis)[:, -order:].expand(draws, -1, -1, -1).unbind(-2)]
        for action in after.T:
            mean = inputs(codes[-order:], action.expand(draws, -1)) @ weights
            codes.append(mean + torch.randn_like(mean) @ noise.T)
            yield (loc + codes[-1] @ basis.T).clamp(0, 1)

    return predict


# --- Tables, pictures and files --------------------------------------------------------------------------------------


def table(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], *notes: str) -> str:
    """Format a table.

    Args:
        corner: the text above the names of the rows.
        rows: numbers by key, by name of the row.
        columns: a format by title, such as ``"{log_p:.2f}"``; a row without that number has an empty cell.
        notes: lines below the table.
    """
    cells = [[_cell(row, column) for column in columns.values()] for row in rows.values()]
    widths = [max(map(len, column)) + 1 for column in zip(columns, *cells, strict=True)]
    frame = pd.DataFrame(cells, pd.Index(rows), pd.Index(columns, name=corner))
    lines = frame.to_string(line_width=1000, col_space=widths).splitlines()
    return "\n".join([*(line.rstrip() for line in lines), *notes])


def _cell(row: Mapping[str, Any], column: str) -> str:
    try:
        return column.format_map(row)
    except KeyError:
        return ""


def draw_elbos(
    rows: Mapping[str, Mapping[str, Any]],
    floor: float = -math.inf,
    names: tuple[str, str] = ("part of the gap that draws of q find", "log p(x), lower bound from draws of q"),
    title: str = "ELBO and log p(x) of held-out images",
) -> Figure:
    """Draw ELBO and log p(x) of each row, and a line between them; rows below the floor have a text.

    The names are those of the line and of log p(x) in the legend.
    """
    figure, ax = plt.subplots(figsize=(9, 1.5 + 0.4 * len(rows)), layout="constrained")
    places = range(len(rows), 0, -1)
    log_p, elbo = ([row[key] for row in rows.values()] for key in ("log_p", "elbo"))
    ax.hlines(places, elbo, log_p, color="0.6", label=names[0])
    ax.plot(elbo, places, "o", color=plots.colours.PALETTE[0], label="ELBO")
    ax.plot(log_p, places, "|", color="black", markersize=14, markeredgewidth=2, label=names[1])
    for place, row in zip(places, rows.values(), strict=True):
        if row["elbo"] < floor:
            ax.text(floor, place, f" not shown: ELBO {row['elbo']:.1f}, log p(x) {row['log_p']:.1f}", va="center")
    ax.set(yticks=places, yticklabels=rows, xlabel="nats per held-out image", ylim=(0.4, len(rows) + 0.6))
    ax.set_title(title)
    if math.isfinite(floor):
        ax.set_xlim(floor, max(log_p) + 0.5)
    ax.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_lines(lines: Mapping[str, tuple[Any, Any]], **axis: Any) -> Figure:
    """Draw lines ``(x, y)`` by name, each in its own colour and style; ``axis`` are arguments of ``ax.set``."""
    figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
    for index, (name, (x, y)) in enumerate(lines.items()):
        ax.plot(x, y, markersize=5, label=name, **plots.colours.style(index))
    ax.set(**axis)
    ax.grid(alpha=0.3)
    plots.axes.legend_below(ax, grow=True)
    return figure


def draw_films(films: Mapping[str, Tensor], times: Sequence[str], **axis: Any) -> Figure:
    """Draw sequences of grey images ``(T, pixels)``, one in each row, and the T times; ``axis`` is for ``ax.set``."""
    figure, ax = plt.subplots(figsize=(2.2 + 0.62 * len(times), 1.1 + 0.62 * len(films)), layout="constrained")
    frames = torch.cat([*films.values()])
    images = frames.unflatten(1, [math.isqrt(frames.shape[1])] * 2)
    plots.image_grid(images, columns=len(times), row_names=[*films], column_names=times, ax=ax)
    ax.set(**axis)
    return figure


def draw_fits(x: Tensor, fits: Mapping[str, tuple[Tensor, Tensor, Any]]) -> Figure:
    """Draw a row for each fit to points ``(N, 2)``: the code of each point, samples, and steps with nats lost."""
    figure, axes = plt.subplots(len(fits), 3, figsize=(9.5, 2.9 * len(fits)), layout="constrained", squeeze=False)
    data, model = plots.colours.PALETTE[:2]
    every_code = torch.cat([codes for codes, _, _ in fits.values()])
    limits = {"vmin": float(every_code.min()), "vmax": float(every_code.max())}  # shared: a code that ignores x is flat
    for (name, (codes, generated, lost)), (left, middle, right) in zip(fits.items(), axes, strict=True):
        left.set_title(name, loc="left", fontsize=10)
        figure.colorbar(left.scatter(*x.T, c=codes, s=8, cmap="cividis", **limits), ax=left, label="mean of z given x")
        middle.scatter(*x.T, s=10, marker="x", linewidths=0.6, label="data", color=data)
        middle.scatter(*generated.T, s=4, label="samples", color=model)
        middle.legend(loc="upper left", fontsize=8)
        for ax in (left, middle):
            ax.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xlabel="x[0]", ylabel="x[1]")
        right.plot(*lost, marker=".", color=data)
        right.set_yscale("symlog", linthresh=0.01)
        right.set(xlabel="step", ylabel="lost against the truth, nats", ylim=(-0.005, 30))
        right.set_yticks([0, 0.01, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
    return figure


@torch.no_grad()
def draw_images(vae: pv.VAE, history: History, x: Tensor, labels: Tensor, shape: Shape) -> dict[str, Figure]:
    """Draw training curves, latent map, reconstructions, samples and, of a 2-D Gaussian latent, the manifold."""
    means = mean_code(vae, x[:1500])
    axes = {
        "training": plots.training_curves(history),
        "latent_map": plots.latent_map(means, labels[:1500], name="the mean of z"),
        "reconstructions": plots.reconstructions(vae.reconstruct, x[:12], shape),
        "samples": plots.samples(partial(vae.generate, mean=True), shape),
    }
    titles = {
        "training": "Training: ELBO = -distortion - rate",
        "latent_map": "Held-out images, each at the mean of its q(z|x)",
        "reconstructions": "Held-out images, and their reconstructions below",
        "samples": "Samples: z from the prior, mean of p(x|z)",
        "manifold": "The decoder's image at each place of the latent space",
    }
    if isinstance(vae.prior, priors.StandardNormal) and means.shape[1] == 2:
        axes["manifold"] = plots.manifold(lambda z: vae.decode(z).mean, shape)
    return {name: set_title(ax, titles[name]) for name, ax in axes.items()}


def set_title(ax: Axes, title: str) -> Figure:
    """Set the title of axes, and return their figure."""
    ax.set_title(title)
    return cast(Figure, ax.figure)


def mean_code(vae: pv.VAE, x: Tensor) -> Tensor:
    """Return the mean of q(z|x), ``(N, D)``; without a closed form, the mean of 100 draws as the decoder reads them."""
    q = vae.encode(x)
    try:
        return q.mean.flatten(1)
    except NotImplementedError:
        return vae.code(q.sample(torch.Size([100]))).mean(0).flatten(1)


def draw_classes(posterior: Tensor, labels: Tensor, title: str, sort: bool = True) -> Figure:
    """Draw the mean class probabilities of the images of each label, from probabilities ``(N, K)``.

    Sorted, classes in which the same label is the most frequent one are next to each other.
    """
    means = torch.stack([posterior[labels == label].mean(0) for label in range(10)]).nan_to_num()
    order = (means / means.sum(0)).nan_to_num().argmax(0).argsort() if sort else torch.arange(means.shape[1])
    figure, ax = plt.subplots(figsize=(0.3 * means.shape[1] + 2.4, 4.2), layout="constrained")
    shown = ax.imshow(means[:, order].numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(order)), order.tolist(), fontsize=8)
    ax.set(xlabel="class", ylabel="label", yticks=range(10), title=plots.axes.wrap(title, 40))
    figure.colorbar(shown, label="mean probability")
    return figure


def draw_confusion(found: Mapping[str, Tensor], labels: Tensor) -> Figure:
    """Draw how often each true number ``(N,)``, from 0 on, is found as each number, for several methods by name."""
    kinds = int(labels.max()) + 1
    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 3.5), layout="constrained", squeeze=False)
    for (name, each), ax in zip(found.items(), axes[0], strict=True):
        table = torch.stack([each[labels == true].bincount(minlength=kinds) for true in range(kinds)])
        share = 100 * table / table.sum(1, keepdim=True)
        ax.imshow(share.numpy(), cmap="Greys", vmin=0, vmax=100)
        for row, column in torch.cartesian_prod(torch.arange(kinds), torch.arange(kinds)).tolist():
            shade = "white" if share[row, column] > 50 else "black"
            ax.text(column, row, f"{share[row, column]:.1f} %", ha="center", va="center", color=shade)
        ax.set(xticks=range(kinds), yticks=range(kinds), xlabel="digits found", ylabel="digits in the scene")
        ax.set_title(f"{plots.axes.wrap(name, 24)}\n{accuracy(each, labels):.1f} % right", fontsize=10)
    return figure


def draw_boxes(x: Tensor, boxes: Tensor, objects: Tensor, title: str) -> Figure:
    """Draw scenes with the boxes of the objects that are found in them, what the model draws, and each object.

    Boxes ``(N, K, 3)`` are NaN where there is no object; objects are pictures ``(N, K, size, size)``.
    """
    n, size = boxes[..., 0].isfinite().sum(1).tolist(), objects.shape[-1]
    names = ["scene, and\nboxes found", "the model's\ndrawing", *(f"object {t + 1}" for t in range(boxes.shape[1]))]
    images = torch.cat([x.unflatten(1, (size, size)), objects.sum(1), *objects.unbind(1)]).clamp(min=0.08)
    figure, ax = plt.subplots(figsize=(10, 5.4), layout="constrained")
    plots.image_grid(images, columns=len(x), row_names=names, column_names=[f"{k} found" for k in n], ax=ax)
    for index, t in [(index, t) for index, count in enumerate(n) for t in range(count)]:
        side, row, column = boxes[index, t].tolist()
        corner = index * (size + 1) + column - side / 2 - 0.5, row - side / 2 - 0.5
        line: Any = {"color": plots.colours.PALETTE[t], "linestyle": "--" if t % 2 else "-", "linewidth": 2}
        ax.add_patch(Rectangle(corner, side, side, fill=False, **line))
        ax.text(*corner, str(t + 1), color=line["color"], fontsize=11, ha="right", va="top")
    ax.set_title(title)
    return figure


def image_tree(
    pair: Any,
    x: Tensor,
    labels: Tensor,
    args: argparse.Namespace,
    *context: Tensor,
    coord: str = "label",
    **dims: list[str],
) -> xr.DataTree:
    """Draw for ArviZ from a pair of model and guide of images, with the labels along ``obs``; ``dims`` by latent."""
    return make_tree(pair, x, args, *context, dims={"x": ["pixel"]} | dims, coords={coord: ("obs", labels)})


def make_tree(pair: Any, x: Tensor, args: argparse.Namespace, *context: Tensor, **names: Any) -> xr.DataTree:
    """Draw for ArviZ from a pair of model and guide, with the names of dimensions and coordinates."""
    return pv.to_datatree(pair.model, pair.guide, x, *context, draws=args.draws, seed=args.seed, parallel=True, **names)


def save_figure(args: argparse.Namespace, name: str, figure: Figure) -> None:
    """Write a picture as a PNG file, and print its path."""
    figure.savefig(args.out / f"{name}.png", dpi=130)
    plt.close(figure)
    print(f"Picture: {args.out / name}.png", flush=True)


def headline(
    quantity: str,
    unit: str,
    value: float,
    *,
    baseline: float,
    baseline_name: str,
    higher_is_better: bool,
    published: str,
    differences: str,
) -> dict[str, Any]:
    """Return the number that an application is judged by, next to a simple baseline and a published or a peer's figure.

    Args:
        quantity: what is measured, such as ``"count accuracy"``.
        unit: its unit, such as ``"%"`` or ``"nats per image"``.
        value: what the model reaches on held-out data.
        baseline: what a simple method reaches on the same data.
        baseline_name: the name of that method, such as ``"majority count"``.
        higher_is_better: whether a larger number is a better one.
        published: a figure from the literature or of a peer, with its source and table.
        differences: how the protocol of that figure differs from this one.
    """
    for name, number in (("value", value), ("baseline", baseline)):
        if not math.isfinite(number):
            raise ValueError(f"`{name}` of {quantity!r} must be a finite number, got {number}")
    return {
        "quantity": quantity, "unit": unit, "value": value, "baseline": baseline, "baseline_name": baseline_name,
        "higher_is_better": higher_is_better, "published": published, "differences": differences,
    }  # fmt: skip


def describe_headline(found: Mapping[str, Any]) -> str:
    """Describe a headline in two lines."""
    better, unit = "higher" if found["higher_is_better"] else "lower", f" {found['unit']}".rstrip()
    return (
        f"{found['quantity']}: {found['value']:.4g}{unit}, {found['baseline_name']}: "
        f"{found['baseline']:.4g}{unit} ({better} is better)\n"
        f"  published: {found['published']}; differences: {found['differences']}"
    )


def save(
    args: argparse.Namespace,
    results: dict[str, Any],
    figures: Mapping[str, Figure],
    trees: Mapping[str, xr.DataTree],
    text: str | None = None,
    headlines: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write results.json with the settings, a PNG of each figure, a netCDF file of each tree, and table.txt.

    Headlines of an application are printed, and are in results.json.
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results = {"settings": settings, **results}
    if headlines := list(headlines):
        results["headlines"] = headlines
        print("\n".join(map(describe_headline, headlines)))
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    for name, figure in figures.items():
        save_figure(args, name, figure)
    for name, tree in trees.items():
        tree.to_netcdf(args.out / f"{name}.nc", engine="h5netcdf")
    written = ["results.json", *(f"{name}.nc" for name in trees)]
    if text is not None:
        (args.out / "table.txt").write_text(text + "\n")
        written.append("table.txt")
    print(f"In {args.out}: {', '.join(written)}")
