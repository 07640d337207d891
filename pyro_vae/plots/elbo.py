"""Pictures of the ELBO: its course in training, its gap to log p(x), and its rate and distortion."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae._utils.validation import describe, number, real_tensor
from pyro_vae.evidence.importance_sampling import Evidence
from pyro_vae.plots.axes import axes_or_new, legend_below
from pyro_vae.plots.colours import PALETTE, style
from pyro_vae.training.fit import Fitted, as_history

__all__ = ["check_history", "rate_distortion", "training_curves"]


def training_curves(
    history: Fitted | Mapping[str, Sequence[float]],
    *,
    terms: Sequence[str] = ("elbo", "distortion", "rate"),
    log_evidence: float | Tensor | Evidence | None = None,
    validation_log_evidence: float | Tensor | Evidence | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Has training converged, does it overfit, and how large is the gap of the ELBO?

    The ELBO is the sum of -distortion and -rate; validation is dashed. A horizontal line is log p(x) of the trained
    model. The arrow at the last epoch is the gap, the mean :math:`\mathrm{KL}(q(z \mid x) \Vert p(z \mid x))`.

    Args:
        history: what :func:`pyro_vae.fit` returns, or its ``history``.
        terms: the terms to draw. For images, draw the rate on separate axes: it is much smaller than the others.
        log_evidence: log p(x) of the training data under the trained model, in nats: ``(N,)`` from
            :func:`pyro_vae.exact.log_evidence`, the :class:`pyro_vae.Evidence`, or the mean. The ELBO of an epoch, a
            mean over steps, is that of one model only when the parameters have stopped moving.
        validation_log_evidence: the same for the validation data.

    Raises:
        TypeError, ValueError: if terms are unknown, log p(x) is not a finite number, or no ELBO to compare it with.

    .. plot::
        :include-source:
        :filename-prefix: training_curves

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> data, net = pv.datasets.two_gaussians(500, seed=0), networks.mlp([16])
        >>> vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
        >>> fitted = pv.fit(vae.model, vae.guide, data.x, epochs=200, lr=2e-2)
        >>> ax = pv.plots.training_curves(fitted, log_evidence=pv.exact.log_evidence(vae.model, data.x))
        >>> ax.get_ylabel()
        'ELBO and its terms, nats per datum'
    """
    unit = history.unit if isinstance(history, Fitted) else "nats per datum"
    history = check_history(history)
    bound = "elbo" if "elbo" in history else "surrogate"
    labels = {
        "elbo": (bound, "ELBO" if bound == "elbo" else "surrogate, no bound", 1.0, "black", ""),
        "distortion": ("distortion", "-distortion", -1.0, PALETTE[0], "s"),
        "rate": ("rate", "-rate", -1.0, PALETTE[1], "^"),
    }
    listed = isinstance(terms, Sequence) and not isinstance(terms, str) and len(terms) > 0
    if not listed or not all(isinstance(term, str) and term in labels for term in terms):
        raise ValueError(f"`terms` must be one or more of {list(labels)}, got {terms!r}")
    levels = [
        (prefix, _level(history, terms, given, prefix))
        for prefix, given in (("", log_evidence), ("validation_", validation_log_evidence))
        if given is not None
    ]
    new, ax = ax is None, axes_or_new(ax)
    styles = {"": ("-", ""), "validation_": ("--", ", validation")}
    for name, label, sign, colour, marker in (labels[term] for term in terms):
        for prefix, (line, suffix) in styles.items():
            if prefix + name in history:
                values = [sign * value for value in history[prefix + name]]
                epochs, every = range(1, len(values) + 1), max(1, len(values) // 8)
                shape = marker or ("o" if len(values) == 1 else "")  # a line with one point would be invisible
                options: dict[str, Any] = {"linestyle": line, "linewidth": 1.2 if marker else 2.0, "color": colour}
                options |= {"marker": shape, "markevery": every, "markersize": 5}
                ax.plot(epochs, values, label=label + suffix, **options)
    for prefix, (level, kind) in levels:
        line, suffix = styles[prefix]
        last = history[prefix + "elbo"][-1]
        label = f"{kind}{suffix}: a gap of {level - last:.3f} nats"
        ax.axhline(level, color="0.45", linestyle=line, linewidth=2.5, zorder=1, label=label)
        epoch = len(history[prefix + "elbo"]) * (1.02 if prefix else 1.0)  # next to the other arrow
        arrow: dict[str, Any] = {"arrowstyle": "<->", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (epoch, level), (epoch, last), arrowprops=arrow)
    names = [label for _, label, *_ in (labels[term] for term in terms)]
    ax.set(xlabel="epoch", ylabel=f"{names[0] if len(names) == 1 else 'ELBO and its terms'}, {unit}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(ax, grow=new)
    return ax


def check_history(history: Fitted | Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    """Return the history if it has a term to draw, and a number for each epoch of each term."""
    history, terms = as_history(history), ["elbo", "surrogate", "distortion", "rate"]
    expected = "the result of `fit`, or a mapping from names to one number per epoch"
    if not any(name in history for name in terms):
        raise ValueError(f"`history` must be {expected}, with one or more of the names {terms}, got {list(history)}")
    if empty := [name for name, values in history.items() if not len(values)]:
        raise ValueError(f"`history` must be {expected}, got no number for {empty[0]!r}")
    return history


def _level(
    history: Mapping[str, Sequence[float]], terms: Sequence[str], given: float | Tensor | Evidence, prefix: str
) -> tuple[float, str]:
    """Return the mean of log p(x) and its label; raise if the ELBO of the same data is not drawn."""
    name = f"{prefix}log_evidence"
    if f"{prefix}elbo" not in history or "elbo" not in terms:
        has = [key for key in history if key.endswith(("elbo", "surrogate"))]
        raise ValueError(
            f"`{name}` must be left out unless the history has '{prefix}elbo' and the terms have 'elbo', got {has} in "
            f"the history and the terms {list(terms)}"
        )
    if isinstance(given, Tensor):
        real_tensor(given, name, "log p(x) of each datum, or its mean")
    values, kind = (given.log_evidence, ", estimated") if isinstance(given, Evidence) else (given, "")
    mean = values.double().mean().item() if isinstance(values, Tensor) else values
    return number(mean, name), f"log p(x){kind}"


def rate_distortion(models: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    r"""How much information about the datum is in the code, and how well does the code reconstruct the datum?

    Each model is a point. Models on one of the lines, distortion + rate = -ELBO, have the same ELBO, which is higher
    further down and to the left. At a rate of 0 the code contains no information, whatever the ELBO.

    Args:
        models: by name, in nats per datum: results of :func:`pyro_vae.evaluate`, objects with ``rate`` and
            ``distortion`` as keys or attributes, or pairs. A ``value`` with a ``standard_error`` has error bars.

    Raises:
        TypeError, ValueError: if there are no models, or one has no finite rate and distortion, or a surrogate's.

    Source: Alemi, Poole, Fischer, Dillon, Saurous and Murphy 2018, "Fixing a broken ELBO", figure 1.

    .. plot::
        :include-source:
        :filename-prefix: rate_distortion

        >>> import torch
        >>> import pyro_vae as pv
        >>> from pyro_vae import guides, likelihoods, networks, priors
        >>> _ = torch.manual_seed(0)
        >>> data, net = pv.datasets.two_gaussians(500, seed=0), networks.mlp([16])
        >>> models = {}
        >>> for beta in (0.5, 1.0, 2.0):
        ...     encoder, decoder = guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net)
        ...     vae, weighted = pv.VAE(priors.StandardNormal(1), encoder, decoder), pv.handlers.WeightKL(beta)
        ...     fitted = pv.fit(weighted(vae.model), weighted(vae.guide), data.x, epochs=80, lr=4e-2)
        ...     models[f"trained with β = {beta:g}"] = pv.evaluate(vae.model, vae.guide, data.x)
        >>> ax = pv.plots.rate_distortion(models)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('rate, nats per datum', 'distortion, nats per datum')
    """
    points = _points(models)
    new, ax = ax is None, axes_or_new(ax)
    handles: list[Any] = []
    for index, (name, ((rate, distortion), errors)) in enumerate(points.items()):
        options = style(index) | {"linestyle": "none", "markersize": 8, "zorder": 3, "label": name}
        if any(errors):
            bars: dict[str, Any] = {"fmt": "none", "ecolor": options["color"], "capsize": 3, "zorder": 3}
            ax.errorbar(rate, distortion, errors[1], errors[0], **bars)
        handles += ax.plot(rate, distortion, **options)
    ends = np.array([middle for middle, _ in points.values()])
    low, high = ends.min(0), ends.max(0)
    room = np.maximum(0.18 * (high - low), 0.1 * max((high - low).max(), 0.5))
    left = low[0] - room[0] * (0.3 if 0 <= low[0] < room[0] else 1.0)  # rates below 0 are impossible
    ax.set(xlim=(left, high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    _equal_elbos(ax, ends)
    handles.append(Line2D([], [], color="0.6", linewidth=0.8, label="equal ELBO"))
    ax.set(xlabel="rate, nats per datum", ylabel="distortion, nats per datum")
    legend_below(ax, handles, grow=new)
    return ax


def _points(models: Mapping[str, Any]) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Return rate and distortion of each model, and their standard errors, which are 0 if not known."""
    if not isinstance(models, Mapping):
        raise TypeError(f"`models` must be a mapping from names to models, got {describe(models)}")
    if not models:
        raise ValueError("`models` must be a mapping with one model or more, got none")
    points, terms = {}, ("rate", "distortion")
    for name, model in models.items():
        if isinstance(model, Mapping) and "surrogate" in model:
            raise ValueError(
                f"`models` must have a rate and a distortion of an ELBO, got those of a surrogate, {name!r}"
            )
        if isinstance(model, Mapping) and set(terms) <= model.keys():
            pair = [model[term] for term in terms]
        elif all(hasattr(model, term) for term in terms):
            pair = [getattr(model, term) for term in terms]
        elif isinstance(model, Sequence | Tensor | np.ndarray) and not isinstance(model, str) and len(model) == 2:
            pair = list(model)
        else:
            raise TypeError(
                f"`models` must have a rate and a distortion each, as keys, attributes or a pair, got {model!r} for "
                f"{name!r}"
            )
        values = [getattr(entry, "value", entry) for entry in pair]
        values = [entry.item() if isinstance(entry, torch.Tensor) and entry.numel() == 1 else entry for entry in values]
        checked = [number(value, f"{term} of models[{name!r}]") for value, term in zip(values, terms, strict=True)]
        errors = [float(getattr(entry, "standard_error", 0.0)) for entry in pair]
        points[name] = (checked[0], checked[1]), (errors[0], errors[1])
    return points


def _equal_elbos(ax: Axes, points: np.ndarray) -> None:
    """Draw lines of equal ELBO within the limits of the axes, with labels far from points and other labels."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    corner, size = np.array([left, bottom]), np.array([right - left, top - bottom])
    taken = list((points - corner) / size)
    for elbo in MaxNLocator(12, steps=[1, 2, 5, 10]).tick_values(-right - top, -left - bottom):
        start, end = max(left, -elbo - top), min(right, -elbo - bottom)
        if start >= end:
            continue
        rates = np.linspace(start, end, 101)
        line = np.stack([rates, -elbo - rates], 1)
        ax.plot(*line.T, color="0.6", linewidth=0.8, zorder=0)
        places = (line - corner) / size
        places = places[((places > (0.14, 0.07)) & (places < (0.86, 0.93))).all(1)]  # where the label fits
        if len(places) == 0:
            continue
        clear = np.linalg.norm(places[:, None] - np.array(taken), axis=-1).min(1)
        best = places[clear.argmax()]
        taken.append(best)
        options: dict[str, Any] = {"color": "0.3", "fontsize": 8, "ha": "center", "va": "center", "zorder": 1}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        turn: dict[str, Any] = {"rotation": -45, "rotation_mode": "anchor", "transform_rotates_text": True}
        across, up = (corner + best * size).tolist()
        ax.text(across, up, f"{elbo:.6g} nats", bbox=box, **options, **turn)
