"""Warnings that point at the line of the user, through any number of frames of the package."""

import contextlib
import sys
import warnings
from pathlib import Path

__all__ = ["warn_user"]

_OURS = str(Path(__file__).parents[1])


def warn_user(message: str) -> None:
    """Warn at the line outside of the package that its function was called from."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OURS, contextlib.__file__)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
