"""A file is written whole, or the earlier one stays as it was."""

import os
from unittest.mock import Mock

import pytest

from pyro_vae.saving.files import read_file, write_file


@pytest.fixture
def path(tmp_path):
    """A file, which must be there as it was after the test, and nothing else."""
    path = tmp_path / "a"
    write_file(path, b"earlier")
    yield path
    assert (os.listdir(tmp_path), read_file(path, "model")) == (["a"], b"earlier")


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(path, monkeypatch, step, error):
    monkeypatch.setattr(step, Mock(side_effect=error))
    with pytest.raises(type(error)):
        write_file(path, b"new")


def test_a_full_disk_leaves_the_earlier_file(path):
    resource = pytest.importorskip("resource", reason="limits of file size are those of Unix")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_file(path, bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_paths_that_are_no_file_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a model file.*there is no file '.*none\.pt'"):
        read_file(tmp_path / "none.pt", "model")
    with pytest.raises(FileNotFoundError, match=r"`path` must be in a folder.*there is no folder '.*none' for 'a\.pt'"):
        write_file(tmp_path / "none" / "a.pt", b"")
    for action in (lambda path: read_file(path, "model"), lambda path: write_file(path, b"")):
        with pytest.raises(ValueError, match=r"`path` must be a file: .* is a folder"):
            action(tmp_path)
        with pytest.raises(ValueError, match=r"`path` must be a file: '/dev/null' is no regular file, but a device"):
            action("/dev/null")
        with pytest.raises(TypeError, match=r"`path` must be a path, a string or a `pathlib.Path`, got 3"):
            action(3)
