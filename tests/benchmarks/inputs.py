"""The data of a case and the weights that all contestants start from, in files that any of them can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import Case, initial_weights


@dataclass(frozen=True)
class Inputs:
    """What a contestant is given.

    Attributes:
        x: ``(rows, features)``, float32, or bytes of grey values where they are to be binarized.
        weights: those to start from, by name.
    """

    x: np.ndarray
    weights: Mapping[str, np.ndarray]


def write(case: Case, folder: Path, mnist: Path | None = None) -> None:
    """Write what :func:`read` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    if case.mapped:
        _write_large(case, folder / "x.npy")
    else:
        np.save(folder / "x.npy", np.ascontiguousarray(_data(case, mnist)[: case.rows]))
    np.savez(folder / "weights.npz", **initial_weights(case))


def read(case: Case, folder: Path) -> Inputs:
    """What was written; data that are mapped stay in their file."""
    with np.load(folder / "weights.npz") as file:
        weights = dict(file)
    # Copy on write, and nothing is written: torch warns of arrays that can't be.
    return Inputs(np.load(folder / "x.npy", mmap_mode="c" if case.mapped else None), weights)


def _data(case: Case, mnist: Path | None) -> np.ndarray:
    from pyro_vae import datasets  # which brings torch, and the process that runs JAX has no use for it

    if case.data == "two_gaussians":
        return datasets.two_gaussians(case.rows, seed=0).x.numpy()
    digits = datasets.digits().x
    if case.data == "digits":
        return _repeated(datasets.binarize(digits).numpy(), case.rows)
    if mnist is not None:
        return _repeated(datasets.mnist("train", mnist).x.numpy(), case.rows)
    return _repeated(_enlarged(digits.numpy()), case.rows)


def _enlarged(digits: np.ndarray) -> np.ndarray:
    """Bytes of 28 × 28 pixels from the digits of 8 × 8: the speed is that of MNIST, which needs a download."""
    images = np.kron(digits.reshape(-1, 8, 8), np.ones((3, 3)))
    return np.pad(255 * images, ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8).reshape(len(digits), -1)


def _repeated(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x] * -(-rows // len(x)))[:rows]


def _write_large(case: Case, path: Path) -> None:
    """Bytes in a file, by parts: the whole is never in memory."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(case.rows, case.features))
    random = np.random.default_rng(0)
    for start in range(0, case.rows, 10_000):
        part = file[start : start + 10_000]
        part[:] = random.integers(0, 256, part.shape, dtype=np.uint8)
    file.flush()
