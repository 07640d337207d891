"""Checks of the scripts of figures while Sphinx runs them: no warning, and one figure that has axes.

The directive ``plot`` shows whatever a script leaves, and prints no warning of a script.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.sphinxext import plot_directive


def install() -> None:
    """Let the directive check each script that it runs; a script that fails is a warning of Sphinx."""
    plot_directive._run_code = checked(plot_directive._run_code)


def checked(run_code: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs a script like ``run_code``, and raises an error if the script warns or draws nothing.

    Raises:
        PlotError: from the function, which is the directive's own error.
    """

    @functools.wraps(run_code)
    def run(code: str, path: str | None, *arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = run_code(code, path, *arguments)
        figures = [plt.figure(number) for number in plt.get_fignums()]
        if len(figures) != 1 or not figures[0].axes:
            without = " without axes" if len(figures) == 1 else ""
            raise plot_directive.PlotError(
                f"{path} must leave one figure with axes, and leaves {len(figures)}{without}"
            )
        return found

    return run
