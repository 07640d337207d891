"""A file is written whole, or the earlier one stays as it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_vae.saving.files import read_file, write_file


@pytest.fixture
def path(tmp_path):
    write_file(tmp_path / "a", b"earlier")
    return tmp_path / "a"


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(path, monkeypatch, step, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        write_file(path, b"new")
    assert os.listdir(path.parent) == [path.name]
    assert read_file(path, "model") == b"earlier"


FULL = """
import resource, signal, sys
from pyro_vae.saving.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_file(sys.argv[1], bytes(10**6))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits of file size are those of Unix")
def test_a_full_disk_leaves_the_earlier_file(path):
    command = [sys.executable, "-c", FULL, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "File too large" in result.stdout, result.stderr
    assert os.listdir(path.parent) == [path.name]
    assert read_file(path, "model") == b"earlier"


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
