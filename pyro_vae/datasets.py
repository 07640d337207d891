"""Data: the two-Gaussian mixture, whose truth is known, scikit-learn's handwritten digits, and MNIST.

Images come as they are stored, and :func:`grey`, :func:`binarize` and :func:`resample` make of them what a likelihood
takes. Each is a ``transform`` for :func:`pyro_vae.fit`, which calls it on the rows of each step.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_vae import idx
from pyro_vae.checks import file_path, kind_of, number, positive, positive_int, real_tensor, seed_number

__all__ = ["MIRRORS", "Dataset", "TwoGaussians", "binarize", "digits", "grey", "mnist", "resample", "two_gaussians"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
"""Where :func:`mnist` looks for its files, in this order."""


@dataclass(frozen=True)
class Dataset:
    """Data ``x`` of N rows and a label for each.

    Attributes:
        x: ``(N, ...)``.
        labels: ``(N,)``, integers.
    """

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class TwoGaussians(Dataset):
    r"""Draws from :math:`z \sim \mathrm{Bernoulli}(1/2),\ x \mid z \sim N(\pm(1, 1), s^2 I)`, and the truth about them.

    Attributes:
        x: ``(N, 2)``.
        labels: ``(N,)``, the z of each point: 1 at (1, 1), 0 at (-1, -1).
        scale: the standard deviation s of each coordinate.
    """

    scale: float

    def _log_joint(self, x: Tensor) -> Tensor:
        if not real_tensor(x, "x", "accepted are points (*, 2)").is_floating_point() or x.shape[-1:] != (2,):
            raise ValueError(f"x: got {kind_of(x)}; accepted are points (*, 2), floats")
        centres = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=x.dtype, device=x.device)
        component = torch.distributions.Normal(centres, self.scale)
        return component.log_prob(x[..., None, :]).sum(-1) + math.log(0.5)

    def log_prob(self, x: Tensor) -> Tensor:
        """The true log-density, in nats: ``(*, 2)`` to ``(*)``."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """The true p(z = 1 | x): ``(*, 2)`` to ``(*)``."""
        return self._log_joint(x).softmax(-1)[..., 1]


def two_gaussians(num_points: int, scale: float = 0.1, seed: int = 0) -> TwoGaussians:
    r"""The mixture problem: :math:`z \sim \mathrm{Bernoulli}(1/2)`, :math:`x \sim N(\pm(1, 1), 0.1)`.

    The text that the problem comes from leaves open what its 0.1 is. Here ``scale`` is a **standard deviation**: the
    covariance is 0.01 times the identity. Another seed gives a fresh test set of the same law.

    Args:
        num_points: N.
        scale: standard deviation of each coordinate about its centre.
        seed: of the draw.

    >>> data = two_gaussians(1000, seed=0)
    >>> data.x.shape, round(float(two_gaussians(100_000, seed=1).log_prob(data.x).mean()), 1)
    (torch.Size([1000, 2]), 1.1)
    """
    positive_int(num_points, "num_points")
    positive(scale, "scale")
    generator = torch.Generator().manual_seed(seed_number(seed))
    labels = (torch.rand(num_points, generator=generator) < 0.5).long()
    noise = torch.randn(num_points, 2, generator=generator)
    return TwoGaussians((2.0 * labels - 1.0)[:, None] + scale * noise, labels, scale)


def digits(split: str = "all") -> Dataset:
    """1797 handwritten digits of 8 × 8 grey pixels k/16 (UCI, as scikit-learn embeds them): no download.

    Args:
        split: ``"train"`` (1500 images), ``"test"`` (the other 297) or ``"all"``. The split is fixed.

    >>> len(digits("train")), binarize(digits("test").x).unique()
    (1500, tensor([0., 1.]))
    """
    splits = {"train": slice(0, 1500), "test": slice(1500, None), "all": slice(None)}
    _check_split(split, splits)
    bunch = load_digits()
    shuffled = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))[splits[split]]
    x = torch.from_numpy(bunch.data).to(torch.get_default_dtype())[shuffled] / 16
    return Dataset(x, torch.from_numpy(bunch.target)[shuffled])


_MNIST = {
    "train": (
        idx.Published(
            "train-images-idx3-ubyte",
            packed="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            content="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        idx.Published(
            "train-labels-idx1-ubyte",
            packed="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            content="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    ),
    "test": (
        idx.Published(
            "t10k-images-idx3-ubyte",
            packed="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            content="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        idx.Published(
            "t10k-labels-idx1-ubyte",
            packed="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            content="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def mnist(split: str = "train", folder: str | Path | None = None, *, mirrors: Sequence[str] = MIRRORS) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 × 28 pixels, kept as bytes.

    The files are downloaded once into a cache (``PYRO_VAE_CACHE``, or the system's folder for caches) and held
    against their published checksums every time they are read.

    Args:
        split: ``"train"`` or ``"test"``.
        folder: one that holds the four IDX files, packed with gzip or not; then nothing is downloaded.
        mirrors: where to download from, tried in turn.

    Returns:
        ``x`` of shape ``(N, 784)``, bytes from 0 to 255. To train on them, hand :func:`grey`, :func:`binarize` or
        :func:`resample` to :func:`pyro_vae.fit` as its ``transform``.

    Raises:
        FileNotFoundError: if the folder lacks a file, naming it.
        ValueError: if a file is truncated or corrupted, naming it.
        OSError: if no mirror can be reached, with what each said.

    Source: LeCun, Cortes and Burges 1998, "The MNIST database of handwritten digits".

    >>> mnist(folder="nowhere")
    Traceback (most recent call last):
        ...
    FileNotFoundError: folder: 'nowhere' is no folder
    """
    _check_split(split, _MNIST)
    if folder is not None:
        folder = file_path(folder, "folder")
    if isinstance(mirrors, str) or not all(isinstance(mirror, str) for mirror in mirrors):
        raise ValueError(f"mirrors: got {mirrors!r}; accepted is a sequence of URLs, such as `datasets.MIRRORS`")
    images, labels = (
        idx.read(idx.download(file, mirrors, _cache()) if folder is None else idx.find(file, folder), file.content)
        for file in _MNIST[split]
    )
    return Dataset(images.flatten(1), labels.long())


def _cache() -> Path:
    import pooch

    return Path(os.environ.get("PYRO_VAE_CACHE", pooch.os_cache("pyro_vae"))) / "mnist"


def _check_split(split: str, splits: Iterable[str]) -> None:
    if not isinstance(split, str) or split not in splits:
        raise ValueError(f"split: got {split!r}; accepted are {', '.join(map(repr, splits))}")


def grey(x: Tensor) -> Tensor:
    """Grey values in [0, 1], of the default dtype: bytes divided by 255, or values that are already there.

    For likelihoods with a density on them, such as :class:`pyro_vae.likelihoods.ContinuousBernoulli`.

    >>> grey(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    real_tensor(x, "x", "accepted are bytes (torch.uint8), or grey values from 0 to 1")
    if x.dtype == torch.uint8 and x.numel() and x.max() == 1:
        raise ValueError("x: got bytes that are 0 and 1, which are no grey values; they are binary as `x.float()`")
    if x.dtype == torch.uint8:
        return x.to(torch.get_default_dtype()) / 255
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):  # of NaN neither holds
        found = f"{x.dtype} from {x.min().item():g} to {x.max().item():g}" if x.numel() else f"no values, {x.dtype}"
        raise ValueError(f"x: got {found}; accepted are bytes (torch.uint8), or grey values from 0 to 1")
    return x


def binarize(x: Tensor, *, threshold: float = 0.5) -> Tensor:
    """1 where the grey value is above the threshold, 0 elsewhere.

    >>> binarize(torch.tensor([0, 127, 128], dtype=torch.uint8))
    tensor([0., 0., 1.])
    """
    number(threshold, "threshold")
    values = grey(x)
    return (values > threshold).to(values.dtype)


def resample(x: Tensor) -> Tensor:
    """1 with the grey value as its probability, 0 otherwise: drawn anew at each call, from torch's random stream.

    As a ``transform`` the data are binarized anew each time that a batch is drawn.

    Source: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders", section 5, after Salakhutdinov and
    Murray 2008.

    >>> resample(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    probs = grey(x)
    return (torch.rand_like(probs) < probs).to(probs.dtype)  # the numbers of torch.bernoulli, five times as fast
