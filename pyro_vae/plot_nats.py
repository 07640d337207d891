"""Pictures of the nats: how the ELBO came to be, and what it is made of."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyro_vae.plot_axes import axes_or_new

__all__ = ["training_curves"]


def training_curves(
    history: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    terms: Sequence[str] = ("elbo", "distortion", "rate"),
) -> Axes:
    """Has training converged, and does it overfit? The ELBO is the sum of -distortion and -rate; validation is dashed.

    Args:
        history: that of :class:`pyro_vae.Fitted`.
        ax: where to draw.
        terms: which to draw. Of images, the rate is best seen on axes of its own.

    >>> training_curves({"elbo": [-2.0, -1.0], "distortion": [1.5, 0.5], "rate": [0.5, 0.5]}).get_ylabel()
    'nats per datum'
    """
    ax = axes_or_new(ax)
    bound = "elbo" if "elbo" in history else "surrogate"
    labels = {
        "elbo": (bound, "ELBO" if bound == "elbo" else "surrogate, no bound", 1.0, "black"),
        "distortion": ("distortion", "-distortion", -1.0, "tab:blue"),
        "rate": ("rate", "-rate", -1.0, "tab:orange"),
    }
    unknown = sorted(set(terms) - set(labels))
    if unknown or not terms:
        raise ValueError(f"terms: got {list(terms)}; accepted are one or more of {list(labels)}")
    for name, label, sign, colour in (labels[term] for term in terms):
        for prefix, style, suffix in (("", "-", ""), ("validation_", "--", ", validation")):
            if prefix + name in history:
                values = [sign * value for value in history[prefix + name]]
                marker = "o" if len(values) == 1 else ""
                ax.plot(range(1, len(values) + 1), values, style, marker=marker, color=colour, label=label + suffix)
    ax.set(xlabel="epoch", ylabel="nats per datum")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend()
    return ax
