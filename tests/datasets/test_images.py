"""The digits are those of scikit-learn, and the published files are MNIST."""

import os

import pytest
import torch
from sklearn.datasets import load_digits

from pyro_vae import datasets

REAL = os.environ.get("PYRO_VAE_MNIST")


def images(dataset):
    """Each image as a row of numbers that can be compared, with its label."""
    return [(*(16 * row).int().tolist(), label) for row, label in zip(dataset.x, dataset.labels.tolist(), strict=True)]


def test_digits_are_those_of_scikit_learn_each_with_its_label(random_states):
    before = random_states()
    bunch, data = load_digits(), datasets.digits()
    assert random_states() == before
    theirs = sorted((*row.astype(int).tolist(), label) for row, label in zip(bunch.data, bunch.target, strict=True))
    assert sorted(images(data)) == theirs
    assert (data.x.shape, data.x.dtype) == ((1797, 64), torch.get_default_dtype())
    assert (data.x.min(), data.x.max()) == (0, 1)
    assert torch.equal(16 * data.x, (16 * data.x).round())  # grey values are sixteenths


def test_the_split_is_disjoint_and_complete():
    train, test, everything = (datasets.digits(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1500, 297, 1797)
    assert images(train) + images(test) == images(everything)
    assert not set(images(train)) & set(images(test))
    for part in (train, test):
        shares = part.labels.bincount() / len(part)
        assert len(shares) == 10
        assert shares.min() > 0.05


@pytest.mark.parametrize(
    ("make", "accepted"), [(datasets.digits, "'train', 'test', 'all'"), (datasets.mnist, "'train', 'test'")]
)
def test_an_unknown_split_is_refused_with_the_known_ones(make, accepted):
    with pytest.raises(ValueError, match=rf"^`split` must be one of {accepted}, got 'valid'$"):
        make("valid")


@pytest.mark.skipif(REAL is None, reason="PYRO_VAE_MNIST names no folder with the four files of MNIST")
def test_the_published_files_are_mnist():
    train, test = datasets.mnist("train", folder=REAL), datasets.mnist("test", folder=REAL)
    assert (train.x.shape, test.x.shape, train.x.dtype) == ((60_000, 784), (10_000, 784), torch.uint8)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels.bincount().tolist() == counts
    assert (len(test.labels), test.labels.unique().tolist()) == (10_000, list(range(10)))
    assert datasets.grey(train.x).mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert (train.x.min(), train.x.max()) == (0, 255)
