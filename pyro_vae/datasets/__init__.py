"""Data sets: the two-Gaussian mixture, whose density is known, handwritten digits, MNIST, a table, and music.

Images come as they are stored. :func:`grey`, :func:`binarize` and :func:`resample` turn them into the values that a
likelihood takes. Each is a ``transform`` for :func:`pyro_vae.fit`, which calls it on the rows of each step.
"""

from pyro_vae.datasets.base import Dataset
from pyro_vae.datasets.images import MIRRORS, digits, mnist
from pyro_vae.datasets.music import PianoRolls, chord_progressions, piano_rolls
from pyro_vae.datasets.pixels import binarize, grey, resample
from pyro_vae.datasets.tables import penguins
from pyro_vae.datasets.two_gaussians import TwoGaussians, two_gaussians

__all__ = [
    "MIRRORS", "Dataset", "PianoRolls", "TwoGaussians", "binarize", "chord_progressions", "digits", "grey", "mnist",
    "penguins", "piano_rolls", "resample", "two_gaussians",
]  # fmt: skip
