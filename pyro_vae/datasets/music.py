"""Polyphonic music as piano rolls: which of the 88 keys sound in each step of time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.validation import file_path, is_integer, positive_int, seed_number
from pyro_vae.datasets.base import on_default_device

__all__ = ["PianoRolls", "chord_progressions", "piano_rolls"]

_LOWEST, _KEYS = 21, 88  # the MIDI number of the first key, A0


@dataclass(frozen=True, repr=False)
class PianoRolls(Result):
    """N pieces of music of at most T steps.

    Attributes:
        x: ``(N, T, 88)``, 1 where a key sounds, from A0 (MIDI number 21) to C8 (108); 0 after the end of a piece.
        lengths: ``(N,)``, steps of each piece, integers.
    """

    x: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def _line(self) -> str:
        return (
            f"{count_of(len(self), 'piece')} of {int(self.lengths.min())} to {int(self.lengths.max())} steps, "
            f"{float(self.x.sum() / self.lengths.sum()):.2f} keys at once"
        )

    def _table(self) -> Table:
        rows = [
            ("pieces", f"{len(self):,}"),
            ("steps", f"{int(self.lengths.sum()):,}"),
            ("steps of a piece", f"{int(self.lengths.min())} to {int(self.lengths.max())}"),
            ("keys at once", f"{float(self.x.sum() / self.lengths.sum()):.2f}"),
            ("keys in use", f"{int(self.x.flatten(0, 1).any(0).sum())} of {_KEYS}"),
        ]
        return Table(("property", "value"), rows)


def piano_rolls(path: str | Path, split: str | None = None) -> PianoRolls:
    """Read piano rolls from a JSON file: a list of pieces, each a list of steps, each a list of MIDI numbers.

    This is the form of the JSB chorales as JSON: a dictionary with the pieces of ``"train"``, ``"valid"`` and
    ``"test"``. The number -1 is a rest, and an empty step a pause. (The pickled form of the same music is not read:
    unpickling a file can run any code.)

    Args:
        path: of the file.
        split: a key of the dictionary, if the file is one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another form, with the place of the first step that is wrong.

    Source: Boulanger-Lewandowski, Bengio and Vincent 2012, "Modeling temporal dependencies in high-dimensional
    sequences", for the data sets of this form.

    >>> path = Path(getfixture("tmp_path")) / "music.json"
    >>> _ = path.write_text('{"train": [[[60, 64, 67], [60, 65, 69]], [[-1, 55]]]}')
    >>> rolls = piano_rolls(path, "train")
    >>> rolls.x.shape, rolls.lengths.tolist(), (rolls.x[0, 0].nonzero().flatten() + 21).tolist()
    (torch.Size([2, 2, 88]), [2, 1], [60, 64, 67])
    """
    file = file_path(path, "path")
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be a JSON file: there is no file {str(file)!r}")
    try:
        pieces = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a JSON file, got {str(file)!r}: {error}") from error
    if pieces == {}:
        raise ValueError("`path` must have pieces, got an empty dictionary")
    splits = list(pieces) if isinstance(pieces, dict) else [None]
    if not isinstance(split, str | None) or split not in splits:
        must = f"one of {', '.join(map(repr, splits))}" if isinstance(pieces, dict) else "left out for a list of pieces"
        raise ValueError(f"`split` must be {must}, got {split!r}")
    return _rolls(pieces[split] if isinstance(pieces, dict) else pieces)


def chord_progressions(num_pieces: int, seed: int = 0) -> PianoRolls:
    """Compose pieces of four voices: a progression of the triads of a major key, and voices that move little.

    A piece of 12 to 24 steps has a key, uniform over twelve. A chord stays for a step with probability 0.4; else the
    next degree comes from the usual progressions (after the fifth mostly the first). The bass has the root. Tenor,
    alto and soprano each go to the nearest tone of the chord, or with probability 0.1 to the second nearest.

    Args:
        num_pieces: N.
        seed: of the draws. Another seed gives an independent test set.

    >>> rolls = chord_progressions(100)
    >>> rolls.x.shape, rolls.lengths.shape, bool((rolls.x.sum(-1) <= 4).all())
    (torch.Size([100, 24, 88]), torch.Size([100]), True)
    """
    positive_int(num_pieces, "num_pieces")
    rng = np.random.default_rng(seed_number(seed))
    return _rolls([_compose(rng) for _ in range(num_pieces)])


_TRIADS = [[0, 4, 7], [2, 5, 9], [4, 7, 11], [5, 9, 0], [7, 11, 2], [9, 0, 4]]  # I ii iii IV V vi, from the key note
_NEXT = np.array([
    [0.0, 0.15, 0.05, 0.3, 0.35, 0.15],
    [0.1, 0.0, 0.0, 0.1, 0.8, 0.0],
    [0.0, 0.0, 0.0, 0.4, 0.0, 0.6],
    [0.3, 0.2, 0.0, 0.0, 0.5, 0.0],
    [0.75, 0.0, 0.0, 0.05, 0.0, 0.2],
    [0.0, 0.45, 0.05, 0.4, 0.1, 0.0],
])  # fmt: skip
_RANGES = [(36, 52), (48, 62), (55, 69), (60, 78)]  # MIDI numbers of bass, tenor, alto and soprano


def _compose(rng: np.random.Generator) -> list[list[int]]:
    """Compose a piece: the MIDI numbers of each step."""
    key, degree, length = int(rng.integers(12)), 0, int(rng.integers(12, 25))
    notes, steps = [int(rng.integers(low, high)) for low, high in _RANGES], list[list[int]]()
    while len(steps) < length:
        if steps and rng.random() < 0.4:
            steps.append(list(notes))
            continue
        degree = int(rng.choice(6, p=_NEXT[degree])) if steps else 0
        tones = [(key + tone) % 12 for tone in _TRIADS[degree]]
        for voice, (low, high) in enumerate(_RANGES):
            allowed = tones[:1] if voice == 0 else tones
            nearest = sorted(
                (note for note in range(low, high) if note % 12 in allowed), key=lambda note: abs(note - notes[voice])
            )
            notes[voice] = nearest[int(voice > 0 and rng.random() < 0.1)]
        steps.append(list(notes))
    return steps


def _rolls(pieces: Any) -> PianoRolls:
    """Make piano rolls of pieces, each a list of steps, each a list of MIDI numbers."""
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, list) and piece for piece in pieces):
        raise ValueError("`path` must have a list of pieces, each a list of one step or more, got something else")
    x = torch.zeros(len(pieces), max(map(len, pieces)), _KEYS, device="cpu")
    for number, piece in enumerate(pieces):
        for step, notes in enumerate(piece):
            if not isinstance(notes, list) or not all(_is_note(note) for note in notes):
                must = "have steps that are lists of MIDI numbers from 21 to 108, or -1 for a rest"
                raise ValueError(f"`path` must {must}, got {notes!r} in step {step} of piece {number}")
            x[number, step, [int(note) - _LOWEST for note in notes if note != -1]] = 1.0
    return PianoRolls(*on_default_device(x, torch.tensor(list(map(len, pieces)), device="cpu")))


def _is_note(note: Any) -> bool:
    """Whether a number of a JSON file, which may be written as 60.0, is that of a key or a rest."""
    whole = is_integer(note) or (isinstance(note, float) and note.is_integer())
    return whole and (note == -1 or _LOWEST <= note < _LOWEST + _KEYS)
