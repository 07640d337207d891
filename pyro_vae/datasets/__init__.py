"""Data sets: two Gaussians, digits, scenes, colour images, films of a pendulum, cells, a table, music, and sentences.

Images come as they are stored. :func:`grey`, :func:`binarize` and :func:`resample` turn them into the values that a
likelihood takes. Each is a ``transform`` for :func:`pyro_vae.fit`, which calls it on the rows of each step.
"""

from pyro_vae.datasets.base import Dataset
from pyro_vae.datasets.cells import CellCounts, pbmc
from pyro_vae.datasets.coloured_scenes import ShapeScenes, shape_scenes
from pyro_vae.datasets.colours import Shapes, photograph_patches, shapes
from pyro_vae.datasets.images import MIRRORS, digits, mnist
from pyro_vae.datasets.modalities import hide_modalities, measure_images
from pyro_vae.datasets.music import PianoRolls, chord_progressions, piano_rolls
from pyro_vae.datasets.pendulum import Pendulum, PendulumSequences, pendulum
from pyro_vae.datasets.pixels import binarize, grey, resample
from pyro_vae.datasets.scenes import DigitScenes, digit_scenes
from pyro_vae.datasets.tables import penguins
from pyro_vae.datasets.text import SentencePairs, Sentences, sentence_pairs, sentences
from pyro_vae.datasets.two_gaussians import TwoGaussians, two_gaussians

__all__ = [
    "MIRRORS", "CellCounts", "Dataset", "DigitScenes", "Pendulum", "PendulumSequences", "PianoRolls", "SentencePairs",
    "Sentences", "ShapeScenes", "Shapes", "TwoGaussians", "binarize", "chord_progressions", "digit_scenes", "digits",
    "grey", "hide_modalities", "measure_images", "mnist", "pbmc", "pendulum", "penguins", "photograph_patches",
    "piano_rolls", "resample", "sentence_pairs", "sentences", "shape_scenes", "shapes", "two_gaussians",
]  # fmt: skip
