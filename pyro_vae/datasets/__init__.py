"""Data: the two-Gaussian mixture, whose truth is known, scikit-learn's handwritten digits, and MNIST.

Images come as they are stored, and :func:`grey`, :func:`binarize` and :func:`resample` make of them what a likelihood
takes. Each is a ``transform`` for :func:`pyro_vae.fit`, which calls it on the rows of each step.
"""

from pyro_vae.datasets.base import Dataset
from pyro_vae.datasets.images import MIRRORS, digits, mnist
from pyro_vae.datasets.pixels import binarize, grey, resample
from pyro_vae.datasets.two_gaussians import TwoGaussians, two_gaussians

__all__ = ["MIRRORS", "Dataset", "TwoGaussians", "binarize", "digits", "grey", "mnist", "resample", "two_gaussians"]
