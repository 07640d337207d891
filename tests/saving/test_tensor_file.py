"""A file of tensors comes back as it was or is refused by name, whatever happened to it."""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.saving import tensor_file
from pyro_vae.saving.tensor_file import FileFormatError

WEIGHT = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    "weight": WEIGHT,
    "the same": WEIGHT,
    "a part": torch.arange(1000.0)[10:13],
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "expanded": torch.tensor([0.5]).expand(4),
    "0-dim": torch.tensor(math.pi, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False]),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.5], dtype=torch.float16),
    "complex": torch.tensor([1 + 2j]).conj(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "int64": torch.tensor([2**62 + 1, -1]),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
HEADER = {
    "floats": [math.inf, -math.inf, 0.1, 5e-324, -0.0],
    "integers": [0, -1, 2**64, 10**4000],
    "text": 'ü "quoted"\n\ud800',
    "nothing": None,
    "true": True,
    "nested": {"deep": [[], {}, [{"er": [1]}]]},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some file.pt"
    tensor_file.write(path, "model", HEADER, TENSORS)
    return path


def bits(tensor):
    return tensor.detach().resolve_conj().contiguous().flatten().view(torch.uint8)


def test_tensors_come_back_to_the_bit(path):
    _, tensors = tensor_file.read(path, "model")
    assert list(tensors) == list(TENSORS)
    for name, tensor in tensors.items():
        given = TENSORS[name]
        assert (tensor.dtype, tensor.shape) == (given.dtype, given.shape), name
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert torch.equal(bits(tensor), bits(given)), name


def test_one_tensor_of_two_names_is_written_once_and_shared_again(path, tmp_path):
    _, tensors = tensor_file.read(path, "model")
    assert tensors["weight"].data_ptr() == tensors["the same"].data_ptr()
    big = torch.randn(10_000)
    tensor_file.write(tmp_path / "two", "model", {}, {"a": big, "b": big, "c": torch.randn(10**6)[:5]})
    assert os.path.getsize(tmp_path / "two") < 1.2 * big.nbytes


def test_the_header_comes_back(path):
    assert tensor_file.read(path, "model")[0] == HEADER
    assert path.read_bytes().splitlines()[1].startswith(b'{"kind": "model", "header": {"floats": [Infinity')


def test_states_of_random_streams_go_into_the_header(tmp_path):
    numpy_state = np.random.default_rng(3).bit_generator.state
    header = {"python": random.getstate(), "numpy": numpy_state, "nan": math.nan}
    tensor_file.write(tmp_path / "a", "checkpoint", header, {"torch": torch.get_rng_state()})
    read, tensors = tensor_file.read(tmp_path / "a", "checkpoint")
    version, internal, gauss = read["python"]
    assert (version, tuple(internal), gauss) == random.getstate()
    assert read["numpy"] == numpy_state
    assert math.isnan(read["nan"])
    assert torch.equal(tensors["torch"], torch.get_rng_state())


def test_without_tensors_and_with_an_empty_header(tmp_path):
    tensor_file.write(tmp_path / "a", "model", {}, {})
    assert tensor_file.read(tmp_path / "a", "model") == ({}, {})


# --- Damage ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(path):
    whole = path.read_bytes()
    lengths = {*range(300), *range(0, len(whole), 37), *range(len(whole) - 100, len(whole))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="some file") as caught:
            tensor_file.read(path, "model")
        assert "accepted is a model file" in str(caught.value) or "is damaged: cut off" in str(caught.value)


def test_a_file_with_one_bit_turned_anywhere_is_refused(path):
    whole = path.read_bytes()
    for place in sorted({*range(120), *range(0, len(whole), 11)}):
        turned = bytearray(whole)
        turned[place] ^= 1 << place % 8
        path.write_bytes(turned)
        with pytest.raises(FileFormatError, match="some file"):
            tensor_file.read(path, "model")
    path.write_bytes(whole)
    tensor_file.read(path, "model")


def test_a_file_with_more_at_its_end_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FileFormatError, match="is damaged"):
        tensor_file.read(path, "model")


@pytest.mark.parametrize("content", [b"", b"\n", b"pyro_vae file", b"PK\3\4", b"\0" * 1000, b"x" * 10**6])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"a\.pt' is not a file of pyro_vae.*accepted is a model file"):
        tensor_file.read(tmp_path / "a.pt", "model")


def test_a_file_of_torch_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match=r"a\.pt' is not a file of pyro_vae"):
        tensor_file.read(tmp_path / "a.pt", "model")


def test_another_kind_is_refused(path):
    with pytest.raises(FileFormatError, match=r"some file\.pt' is a model file; accepted is a checkpoint file"):
        tensor_file.read(path, "checkpoint")


def test_a_later_version_is_refused(path):
    path.write_bytes(path.read_bytes().replace(b"version 1", b"version 12", 1))
    with pytest.raises(FileFormatError, match=r"some file\.pt' is a file of version 12; this pyro_vae reads version 1"):
        tensor_file.read(path, "model")


def forge(path, line, payload):
    """A file with the right checksum and any content."""
    rest = line + b"\n" + payload
    path.write_bytes(f"pyro_vae file, version 1, sha256 {hashlib.sha256(rest).hexdigest()}\n".encode() + rest)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("value", [{"w": Bomb()}, Bomb(), [torch.ones(1)], {"w": 1.0}, {1: torch.ones(1)}])
def test_a_forged_payload_is_refused_and_runs_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    torch.save(value, "payload")
    forge(tmp_path / "a.pt", b'{"kind": "model", "header": {}}', (tmp_path / "payload").read_bytes())
    with pytest.raises(FileFormatError, match=r"a\.pt' holds something else than tensors"):
        tensor_file.read("a.pt", "model")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"3", b'{"kind": "model"}', b'{"kind": "model", "header": 3}', b"[" * 10**5, b"\xff"]
)
def test_a_forged_header_is_refused(tmp_path, line):
    torch.save({}, tmp_path / "payload")
    forge(tmp_path / "a.pt", line, (tmp_path / "payload").read_bytes())
    with pytest.raises(FileFormatError, match=r"a\.pt"):
        tensor_file.read(tmp_path / "a.pt", "model")


def test_a_payload_that_is_no_archive_of_torch_is_refused(tmp_path):
    forge(tmp_path / "a.pt", b'{"kind": "model", "header": {}}', b"cos\nmkdir\n")
    with pytest.raises(FileFormatError, match=r"a\.pt' lacks a header or tensors"):
        tensor_file.read(tmp_path / "a.pt", "model")


# --- Paths -----------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_file_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.pt'; accepted is a model file"):
        tensor_file.read(tmp_path / "none.pt", "model")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*none' for 'a\.pt'"):
        tensor_file.write(tmp_path / "none" / "a.pt", "model", {}, {})
    for action in (lambda path: tensor_file.read(path, "model"), lambda path: tensor_file.write(path, "m", {}, {})):
        with pytest.raises(ValueError, match="is a folder; accepted is a file"):
            action(tmp_path)
        with pytest.raises(ValueError, match="'/dev/null' is a device or the like; accepted is a file"):
            action("/dev/null")
        with pytest.raises(TypeError, match="`path` must be the path of a file.*got a int"):
            action(3)


# --- Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {1: 2}}, r"`header\['a'\]` must be strings.*got the key 1"),
        ({"a": [0, torch.ones(1)]}, r"`header\['a'\]\[1\]` must be dictionaries, lists.*got a Tensor"),
        ({"a": np.int64(3)}, r"`header\['a'\]` must be .*got a int64"),
        ({"a": 10**5000}, "header: Exceeds the limit"),
    ],
)
def test_a_header_that_json_would_change_is_refused(path, header, message):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        tensor_file.write(path, "model", header, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": 3.0}, r"`tensors\['w'\]` must be a dense tensor.*got a float"),
        ({3: torch.ones(1)}, "`tensors` must be strings.*got the name 3"),
        ({"w": torch.ones(2).to_sparse()}, r"tensors\['w'\]: got a torch.sparse_coo tensor"),
        ({"w": torch.ones(2, device="meta")}, r"tensors\['w'\]: got a torch.strided tensor on meta"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(path, tensors, message):
    with pytest.raises(ValueError, match=message):
        tensor_file.write(path, "model", {}, tensors)


def test_a_header_that_is_no_dictionary_is_refused(path):
    with pytest.raises(TypeError, match="`header` must be a dictionary.*got a list"):
        tensor_file.write(path, "model", [], {})


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(path, monkeypatch, step, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        tensor_file.write(path, "model", {"new": True}, {})
    assert os.listdir(path.parent) == [path.name]
    assert tensor_file.read(path, "model")[0] == HEADER


FULL = """
import resource, signal, sys, torch
from pyro_vae.saving import tensor_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    tensor_file.write(sys.argv[1], "model", {}, {"w": torch.zeros(10**6)})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits of file size are those of Unix")
def test_a_full_disk_is_told_as_such(path):
    command = [sys.executable, "-c", FULL, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "File too large" in result.stdout, result.stderr
    assert os.listdir(path.parent) == [path.name]
    assert tensor_file.read(path, "model")[0] == HEADER


def test_the_file_is_what_a_person_reads(path):
    first, second, *_ = path.read_bytes().split(b"\n")
    rest = path.read_bytes().partition(b"\n")[2]
    assert first.decode() == f"pyro_vae file, version 1, sha256 {hashlib.sha256(rest).hexdigest()}"
    assert json.loads(second)["kind"] == "model"


def test_the_process_stays_as_it_was(path, random_states):
    before = random_states()
    tensor_file.write(path, "model", HEADER, TENSORS)
    tensor_file.read(path, "model")
    assert random_states() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_of_another_device_are_read_on_any(path):
    weight = torch.ones(2, device="cuda")
    tensor_file.write(path, "model", {}, {"a": weight, "b": weight})
    tensors = tensor_file.read(path, "model")[1]
    assert tensors["a"].device.type == "cpu"
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    assert tensor_file.read(path, "model", map_location="cuda")[1]["a"].device.type == "cuda"


def test_a_device_is_chosen_as_in_torch(path):
    assert tensor_file.read(path, "model", map_location=torch.device("meta"))[1]["weight"].device.type == "meta"
