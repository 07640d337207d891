"""What the examples can be told. Nothing heavy is imported here, so that ``--help`` answers at once."""

import argparse
import os
from pathlib import Path
from typing import Any


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it is, and the default of each option."""


def folder(name: str) -> Path:
    """A folder that results can be written to, made if it is not there: before any work, and not after it."""
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder {name!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to the folder {name!r}")
    return path


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a positive integer")
    return int(text)


def positive(text: str) -> float:
    """A positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a positive number")
    return number


def parser(doc: str | None, name: str, epochs: int, unit: str = "passes over the data") -> argparse.ArgumentParser:
    """A parser with ``--out``, ``--epochs`` and ``--seed``, described by the docstring of the example."""
    made = argparse.ArgumentParser(description=doc, formatter_class=_Formatter)
    made.add_argument("--out", type=folder, default=f"results/{name}", help="folder for results")
    made.add_argument("--epochs", type=count, default=epochs, help=unit)
    made.add_argument("--seed", type=int, default=0, help="of all random numbers")
    return made


def add_choice(made: argparse.ArgumentParser, name: str, *choices: str, meaning: str) -> None:
    """Add an option that takes one of these words, the first if left out."""
    made.add_argument(name, choices=choices, default=choices[0], help=meaning)


class _Choices(argparse.Action):
    """The words that were given, each once, or all of them for ``all``."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        chosen = self.choices if "all" in values else dict.fromkeys(values)
        setattr(namespace, self.dest, [word for word in chosen or () if word != "all"])


def add_choices(made: argparse.ArgumentParser, name: str, *choices: str, meaning: str) -> None:
    """Add an option that takes one or more of these words, or ``all``; the first if left out."""
    made.add_argument(name, nargs="+", action=_Choices, choices=[*choices, "all"], default=[choices[0]], help=meaning)


def add_training(made: argparse.ArgumentParser, batch_size: int, lr: float) -> None:
    """Add ``--batch-size``, ``--lr`` and ``--compile``."""
    made.add_argument("--batch-size", type=count, default=batch_size, help="images a step")
    made.add_argument("--lr", type=positive, default=lr, help="learning rate of Adam")
    captured = "capture what is run again and again as graphs and compile them: the same numbers, in less time"
    made.add_argument("--compile", action="store_true", help=captured)


def add_images(made: argparse.ArgumentParser, default: str) -> None:
    """Add ``--data`` and ``--folder``, which say what images to train on, and how many to judge on."""
    kinds = "mnist: 28 × 28 pixels, downloaded once; digits: 8 × 8 pixels, from scikit-learn"
    add_choice(made, "--data", *sorted(["digits", "mnist"], key=lambda kind: kind != default), meaning=kinds)
    made.add_argument("--folder", type=Path, help="a folder with the four IDX files of MNIST, instead of a download")
    _add_judging(made, test_images=1000)


def add_digits(made: argparse.ArgumentParser, test_images: int, draws: int = 200) -> None:
    """Add how many images to judge on, for an example on scikit-learn's digits and no other images."""
    made.set_defaults(data="digits", folder=None)
    _add_judging(made, test_images, draws)


def _add_judging(made: argparse.ArgumentParser, test_images: int, draws: int = 200) -> None:
    made.add_argument("--test-images", type=count, default=test_images, help="held-out images to judge on")
    made.add_argument("--draws", type=count, default=draws, help="draws in an ArviZ file")
