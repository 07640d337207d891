"""Images of handwritten digits: those of scikit-learn, and MNIST."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from pyro_vae._utils.validation import file_path
from pyro_vae.datasets import idx
from pyro_vae.datasets.base import Dataset, on_default_device

__all__ = ["MIRRORS", "check_split", "digits", "mnist"]

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")
"""URLs from which :func:`mnist` downloads, tried in this order."""


def digits(split: str = "all") -> Dataset:
    """1797 handwritten digits of 8 × 8 grey pixels k/16, from UCI, which scikit-learn contains: no download.

    Args:
        split: ``"train"`` (1500 images), ``"test"`` (the other 297) or ``"all"``. The split is always the same.

    >>> len(digits("train")), digits("test").x.shape
    (1500, torch.Size([297, 64]))
    """
    splits = {"train": slice(0, 1500), "test": slice(1500, None), "all": slice(None)}
    check_split(split, splits)
    bunch = load_digits()
    shuffled = torch.randperm(len(bunch.data), generator=torch.Generator("cpu").manual_seed(0), device="cpu")[
        splits[split]
    ]
    x = torch.from_numpy(bunch.data).to(torch.get_default_dtype())[shuffled] / 16
    return Dataset(*on_default_device(x, torch.from_numpy(bunch.target)[shuffled]))


_MNIST = {
    "train": (
        idx.RemoteFile(
            "train-images-idx3-ubyte",
            compressed="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            content="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        idx.RemoteFile(
            "train-labels-idx1-ubyte",
            compressed="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            content="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    ),
    "test": (
        idx.RemoteFile(
            "t10k-images-idx3-ubyte",
            compressed="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            content="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        idx.RemoteFile(
            "t10k-labels-idx1-ubyte",
            compressed="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            content="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def mnist(split: str = "train", folder: str | Path | None = None, *, mirrors: Sequence[str] = MIRRORS) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 × 28 pixels, kept as bytes.

    The files are downloaded once into a cache: the folder that the variable ``PYRO_VAE_CACHE`` names, or the system's
    folder for caches. Their published checksums are compared each time they are read.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: folder with the four IDX files, compressed with gzip or not. If it is given, nothing is downloaded.
        mirrors: URLs to download from, tried in turn.

    Returns:
        ``x`` of shape ``(N, 784)``, bytes from 0 to 255. To train on them, pass :func:`grey`, :func:`binarize` or
        :func:`resample` to :func:`pyro_vae.fit` as ``transform``.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, truncated or corrupted; the message names it.
        OSError: if no mirror gives a file; the message has the error of each.

    Source: LeCun, Cortes and Burges 1998, "The MNIST database of handwritten digits".

    >>> mnist(folder="nowhere")
    Traceback (most recent call last):
        ...
    FileNotFoundError: `folder` must be a folder with MNIST's files: there is no folder 'nowhere'
    """
    check_split(split, _MNIST)
    folder = None if folder is None else file_path(folder, "folder")
    if isinstance(mirrors, str) or not all(isinstance(mirror, str) for mirror in mirrors):
        raise ValueError(f"`mirrors` must be a sequence of URLs, such as `datasets.MIRRORS`, got {mirrors!r}")
    import pooch

    cache = Path(os.environ.get("PYRO_VAE_CACHE", pooch.os_cache("pyro_vae"))) / "mnist"
    images, labels = (
        idx.read(idx.download(file, mirrors, cache) if folder is None else idx.find(file, folder), file.content)
        for file in _MNIST[split]
    )
    return Dataset(*on_default_device(images.flatten(1), labels.long()))


def check_split(split: str, splits: Iterable[str]) -> None:
    """Raise unless ``split`` is one of the names."""
    if not isinstance(split, str) or split not in splits:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, splits))}, got {split!r}")
