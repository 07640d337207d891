"""Pictures of estimates: how far from the truth, how noisy, and whether to be trusted."""

from matplotlib.axes import Axes

from pyro_vae.gradients import Comparison
from pyro_vae.plot_axes import MARKERS, axes_or_new

__all__ = ["bias_variance"]


def bias_variance(comparison: Comparison, group: str = "all", ax: Axes | None = None) -> Axes:
    """What does each gradient estimator cost, in bias and in noise, relative to the exact gradient?

    Hollow markers at the bottom: no bias that could be told from chance, with the error up to which none was found.
    What has no noise at all, such as enumeration, is not drawn.

    Args:
        comparison: of :func:`pyro_vae.gradients.compare`.
        group: of parameters.
        ax: where to draw.

    >>> from pyro_vae.gradients import Measured
    >>> found = Measured(
    ...     2.0, bias=0.1, bias_error=0.01, variance=4.0, max_z=9.0, num_parameters=3, num_tested=3, repeats=99
    ... )
    >>> bias_variance(Comparison({"relaxed": {"all": found}}, {"relaxed": 1})).get_ylabel()
    'bias / length of the exact gradient'
    """
    ax = axes_or_new(ax)
    shown = {name: row for name, row in comparison.of(group).items() if row.variance > 0 and row.target_norm > 0}
    if not shown:
        raise ValueError("comparison: has no estimator with noise, of a gradient longer than zero, to draw")
    biased = {name for name, row in shown.items() if row.p_value < 1e-3 and row.bias > 0}
    heights = [(row.bias if name in biased else row.bias_error) / row.target_norm for name, row in shown.items()]
    floor = 0.3 * min(heights)
    for index, (name, row) in enumerate(shown.items()):
        noise, sure = row.variance**0.5 / row.target_norm, name in biased
        height = row.bias / row.target_norm if sure else floor
        marker, colour = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        face = colour if sure else "none"
        ax.plot(noise, height, marker, color=colour, markerfacecolor=face, markersize=9, linestyle="none", label=name)
        if not sure:
            ax.plot([noise] * 2, [floor, row.bias_error / row.target_norm], ":", color=colour, linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="standard deviation / length of the exact gradient")
    ax.set_ylabel("bias / length of the exact gradient")
    ax.legend(fontsize=8)
    return ax
