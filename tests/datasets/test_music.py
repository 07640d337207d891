"""Piano rolls: files of MIDI numbers, and music that is composed by rule."""

import json

import pytest
import torch

from pyro_vae import datasets

PIECES = [[[60, 64, 67], [60, 65, 69.0]], [[-1, 55], [], [21, 108]]]


def test_keys_of_a_file_are_those_of_its_numbers(tmp_path):
    path = tmp_path / "music.json"
    path.write_text(json.dumps({"train": PIECES, "test": PIECES[1:]}))
    rolls = datasets.piano_rolls(path, "train")
    assert rolls.lengths.tolist() == [2, 3]
    assert rolls.x.shape == (2, 3, 88)
    found = [[(rolls.x[piece, step].nonzero().flatten() + 21).tolist() for step in range(3)] for piece in range(2)]
    assert found == [[[60, 64, 67], [60, 65, 69], []], [[55], [], [21, 108]]]
    assert len(datasets.piano_rolls(path, "test")) == 1
    path.write_text(json.dumps(PIECES))
    assert torch.equal(datasets.piano_rolls(str(path)).x, rolls.x)
    assert "2 pieces of 2 to 3 steps, 1.80 keys at once" in repr(rolls)
    assert "5 of 88" not in rolls._repr_html_()
    assert "8 of 88" in rolls._repr_html_()


@pytest.mark.parametrize(("text", "split", "says"), [
    ('{"train": [[[60]]]}', None, "`split` must be one of 'train', got None"),
    ('{"train": [[[60]]]}', "valid", "`split` must be one of 'train', got 'valid'"),
    ("[[[60]]]", "train", "`split` must be left out for a list of pieces, got 'train'"),
    ("[[[60], [109]]]", None, r"`path` must have steps.*got \[109\] in step 1 of piece 0"),
    ("[[[60]], [60]]", None, r"`path` must have steps.*got 60 in step 0 of piece 1"),
    ("[[[60.5]]]", None, r"got \[60.5\]"), ("[[[true]]]", None, r"got \[True\]"), ('[[["C4"]]]', None, r"got \['C4'\]"),
    ("[]", None, "`path` must have a list of pieces"), ("[[]]", None, "`path` must have a list of pieces"),
    ("{}", None, "`path` must have pieces, got an empty dictionary"),
    ("3", None, "`path` must have a list of pieces"), ("{", None, "`path` must be a JSON file"),
])  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path, text, split, says):
    path = tmp_path / "music.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        datasets.piano_rolls(path, split)


def test_a_missing_file_and_a_binary_one_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a JSON file: there is no file"):
        datasets.piano_rolls(tmp_path / "nothing.json")
    (tmp_path / "music.pickle").write_bytes(b"\x80\x03}q\x00.")
    with pytest.raises(ValueError, match="`path` must be a JSON file"):
        datasets.piano_rolls(tmp_path / "music.pickle")


def test_composed_pieces_are_chords_of_a_key_and_move_little():
    rolls = datasets.chord_progressions(200, seed=3)
    assert torch.equal(rolls.x, datasets.chord_progressions(200, seed=3).x)
    assert not torch.equal(rolls.x[:, :12], datasets.chord_progressions(200, seed=4).x[:, :12])
    assert set(rolls.lengths.tolist()) == set(range(12, 25))
    steps = torch.arange(24) < rolls.lengths[:, None]
    assert rolls.x[~steps].sum() == 0
    voices = rolls.x[steps].sum(-1)
    assert ((voices >= 2) & (voices <= 4)).all()
    major = torch.tensor([0, 2, 4, 5, 7, 9, 11])
    for piece, length in zip(rolls.x, rolls.lengths, strict=True):
        classes = ((piece[:length].any(0).nonzero().flatten() + 21) % 12).unique()
        keys = [key for key in range(12) if torch.isin(classes, (major + key) % 12).all()]
        assert keys, "all notes are those of one major key"
    pairs = steps[:, 1:]
    held = (rolls.x[:, 1:] == rolls.x[:, :-1]).all(-1)[pairs].float().mean()
    assert float(held) == pytest.approx(0.4, abs=5 * (0.24 / int(pairs.sum())) ** 0.5 + 0.02)
