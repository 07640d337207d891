"""Files with the data of a case and the initial weights, which all contestants can read."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case, initial_weights

Tick = Callable[[float], None]
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Inputs:
    """The data and initial weights of a contestant."""

    x: np.ndarray  # (rows, features), float32, or grey values as bytes if batches are binarized
    weights: Mapping[str, np.ndarray]


def runner(module: str, task: str, **options: Any) -> Callable[..., Losses]:
    """Return the function of a contestant's module that performs a task, with these options."""
    run = getattr(importlib.import_module(module), task, None)
    if run is None:
        raise NotImplementedError(f"{task}: {module} has nothing that is comparable")
    return partial(run, **options)


def write(case: Case, folder: Path, mnist: Path | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if case.mapped:
        _write_large(case, folder / "x.npy")
    else:
        np.save(folder / "x.npy", np.ascontiguousarray(_data(case, mnist)[: case.rows]))
    np.savez(folder / "weights.npz", **initial_weights(case))


def read(case: Case, folder: Path) -> Inputs:
    """Read the inputs; mapped data stay in their file."""
    with np.load(folder / "weights.npz") as file:
        weights = dict(file)
    # Mode c, since torch warns about arrays that are read-only; nothing is written.
    return Inputs(np.load(folder / "x.npy", mmap_mode="c" if case.mapped else None), weights)


def _data(case: Case, mnist: Path | None) -> np.ndarray:
    from pyro_vae import datasets  # here, since the process of JAX needs no torch

    if case.data == "two_gaussians":
        return datasets.two_gaussians(case.rows, seed=0).x.numpy()
    if case.data == "digits":
        return _repeated(datasets.binarize(datasets.digits().x).numpy(), case.rows)
    return images("train", case.rows, mnist)


def images(split: str, rows: int, mnist: Path | None) -> np.ndarray:
    """Return images of 784 bytes: those of MNIST from its folder, or else enlarged digits of 8 × 8 pixels."""
    from pyro_vae import datasets

    x = _enlarged(datasets.digits(split).x.numpy()) if mnist is None else datasets.mnist(split, mnist).x.numpy()
    return _repeated(x, rows)


def _enlarged(digits: np.ndarray) -> np.ndarray:
    """Enlarge digits of 8 × 8 pixels to 28 × 28 bytes: the speed is that of MNIST, without a download."""
    images = np.kron(digits.reshape(-1, 8, 8), np.ones((3, 3)))
    return np.pad(255 * images, ((0, 0), (2, 2), (2, 2))).round().astype(np.uint8).reshape(len(digits), -1)


def _repeated(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x] * -(-rows // len(x)))[:rows]


def _write_large(case: Case, path: Path) -> None:
    """Write bytes in parts, so that the whole is never in memory."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(case.rows, case.features))
    random = np.random.default_rng(0)
    for start in range(0, case.rows, 10_000):
        part = file[start : start + 10_000]
        part[:] = random.integers(0, 256, part.shape, dtype=np.uint8)
    file.flush()
