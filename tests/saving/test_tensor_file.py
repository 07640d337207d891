"""A file of tensors is read as it was written, or refused by name if anything in it was changed."""

import hashlib
import json
import math
import os

import numpy as np
import pytest
import safetensors.torch
import torch

from pyro_vae.saving.files import FileFormatError
from pyro_vae.saving.tensor_file import read, write

WEIGHT = torch.arange(12.0).reshape(3, 4)
FOREIGN = [b"", b"\n", b"pyro_vae file", b"PK\3\4", b"\0" * 1000, b"\xff" * 1000, b"x" * 10**6]
SPARSE, META, COMPLEX = torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex128)
TENSORS = {
    "weight": WEIGHT, "the same": WEIGHT, "a part": torch.arange(1000.0)[10:13],
    "transposed": torch.arange(12.0).reshape(3, 4).T, "expanded": torch.tensor([0.5]).expand(4),
    "0-dim": torch.tensor(math.pi, dtype=torch.float64), "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False]), "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.5], dtype=torch.float16), "complex": torch.tensor([1 + 2j]).conj(),
    "bytes": torch.arange(5, dtype=torch.uint8), "int64": torch.tensor([2**62 + 1, -1]),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}  # fmt: skip
HEADER = {
    "floats": [math.inf, -math.inf, 0.1, 5e-324, -0.0], "integers": [0, -1, 2**64, 10**4000],
    "text": 'ü "quoted"\n\ud800', "nothing": None, "true": True, "nested": {"deep": [[], {}, [{"er": [1]}]]},
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some file.safetensors"
    write(path, "model", HEADER, TENSORS)
    return path


def bits(tensor):
    return tensor.detach().resolve_conj().contiguous().flatten().view(torch.uint8)


def test_tensors_come_back_to_the_bit(path, random_states):
    before = random_states()
    write(path, "model", HEADER, TENSORS)
    _, tensors = read(path, "model")
    assert (random_states(), list(tensors)) == (before, list(TENSORS))
    for name, tensor in tensors.items():
        given = TENSORS[name]
        expected = (torch.Tensor, given.dtype, given.shape, False)
        assert (type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad) == expected, name
        assert torch.equal(bits(tensor), bits(given)), name


def test_one_tensor_of_two_names_is_written_once_and_shared_again(path, tmp_path):
    _, tensors = read(path, "model")
    assert tensors["weight"].data_ptr() == tensors["the same"].data_ptr()
    big = torch.randn(10_000)
    write(tmp_path / "two", "model", {}, {"a": big, "b": big, "c": torch.randn(10**6)[:5]})
    assert os.path.getsize(tmp_path / "two") < 1.2 * big.nbytes


def test_other_programs_read_the_tensors_and_the_header(path):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("weight"), WEIGHT)
    assert metadata["kind"] == "model"
    assert json.loads(metadata["header"]) == HEADER == read(path, "model")[0]


@pytest.mark.parametrize("header", [{}, {"nan": math.nan, "nested": {"tuple": (1, (2.5, None))}}])
def test_tensors_may_be_left_out_and_tuples_become_lists(path, header):
    write(path, "model", header, {})
    expected = repr(header).replace("(", "[").replace(")", "]")
    assert [repr(part) for part in read(path, "model")] == [expected, "{}"]


def test_a_file_that_is_damaged_anywhere_is_refused(path):
    whole = path.read_bytes()
    lengths = {*range(300), *range(0, len(whole), 37), *range(len(whole) - 100, len(whole))}
    damaged = [whole[:length] for length in lengths] + [whole + b"\0"]
    for place in {*range(120), *range(0, len(whole), 11)}:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"`path` must be a .*model file.*: .*some file"):
            read(path, "model")


def of_torch():
    torch.save({"w": torch.ones(2)}, "a")


def of_safetensors():
    safetensors.torch.save_file({"w": torch.ones(2)}, "a", {"kind": "model"})


@pytest.mark.parametrize("content", [*FOREIGN, of_torch, of_safetensors])
def test_a_foreign_file_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    content() if callable(content) else (tmp_path / "a").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"`path` must be a model file: .*a' is no file of pyro_vae"):
        read(tmp_path / "a", "model")


def test_other_kinds_and_versions_are_named(path):
    with pytest.raises(FileFormatError, match=r"must be a checkpoint file of version 2.* is a model file of version 2"):
        read(path, "checkpoint")
    path.write_bytes(seal(path.read_bytes().replace(b'"version":"2"', b'"version":"3"')))
    with pytest.raises(FileFormatError, match="is a model file of version 3"):
        read(path, "model")
    path.write_bytes(b"pyro_vae file, version 1, sha256 ...")
    with pytest.raises(FileFormatError, match=r"has version 1, which pyro_vae wrote before 0\.1\.0"):
        read(path, "model")


def seal(content):
    """The content with the checksum that it should have."""
    start = content.index(b'"sha256":"') + 10
    zeroed = content[:start] + b"0" * 64 + content[start + 64 :]
    return zeroed[:start] + hashlib.sha256(zeroed).hexdigest().encode() + zeroed[start + 64 :]


def forge(data=b"\0" * 8, size=None, tensor=None, **metadata):
    """A file with the right checksum, whose header is what the arguments say."""
    valid = {"kind": "model", "version": "2", "header": "{}", "names": '{"w": "w"}', "sha256": "0" * 64}
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | (tensor or {})
    text = json.dumps({"__metadata__": valid | metadata, "w": entry}, separators=(",", ":")).encode()
    return seal((len(text) if size is None else size).to_bytes(8, "little") + text + data)


FORGED = {
    "the header is no JSON": {"header": "{"}, "the header is a list": {"header": "[]"},
    "the header is nested too deeply": {"header": "[" * 10**5}, "the names are a list": {"names": "[]"},
    "a name of no tensor": {"names": '{"w": "v"}'}, "a name that is no string": {"names": '{"w": ["w"]}'},
    "the kind is a number": {"kind": 3}, "a header of an exabyte": {"size": 2**60},
    "a header that ends too early": {"size": 30},
    "a tensor of gigabytes": {"tensor": {"shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    "a shape that does not fit": {"tensor": {"shape": [10**9]}},
    "a shape whose product overflows": {"tensor": {"shape": [2**63, 2**63]}},
    "a negative shape": {"tensor": {"shape": [-2]}}, "offsets after the end": {"tensor": {"data_offsets": [8, 16]}},
    "another type": {"tensor": {"dtype": "F65"}}, "bytes of no tensor": {"data": b"\0" * 16},
}  # fmt: skip


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED)
def test_a_forged_file_is_refused_by_its_name(tmp_path, changes):
    (tmp_path / "a").write_bytes(forge())
    assert read(tmp_path / "a", "model")[1]["w"].tolist() == [0, 0]
    (tmp_path / "a").write_bytes(forge(**changes))
    with pytest.raises(FileFormatError, match=r"`path` must be a model file.*a' "):
        read(tmp_path / "a", "model")


@pytest.mark.parametrize(("header", "tensors", "message"), [
    ([], {}, "`header` must be a dictionary, got a list"),
    ({"a": {1: 2}}, {}, r"`header\['a'\]` must have strings as keys, got 1"),
    ({"a": [0, torch.ones(1)]}, {}, r"`header\['a'\]\[1\]` must be a dictionary, list.*got a torch.float32 tensor"),
    ({"a": np.int64(3)}, {}, r"`header\['a'\]` must be .*got an int64"),
    ({"a": 10**5000}, {}, "`header` must be printable: Exceeds the limit"),
    ({}, {"w": 3.0}, r"`tensors\['w'\]` must be a tensor, got a float"),
    ({}, {3: torch.ones(1)}, "`tensors` must have strings as names, got 3"),
    ({}, {"w": SPARSE}, r"`tensors\['w'\]` must be a dense tensor.*got a torch.sparse_coo tensor"),
    ({}, {"w": META}, r"`tensors\['w'\]` must be .*got a torch.strided tensor on meta"),
    ({}, {"w": COMPLEX}, "`tensors` must have .*data types that safetensors can store"),
    ({}, {"\ud800": torch.ones(2)}, "`tensors` must have names.* that safetensors can store"),
])  # fmt: skip
def test_what_the_file_would_change_is_refused(path, header, tensors, message):
    before = path.read_bytes()
    with pytest.raises(ValueError if isinstance(header, dict) else TypeError, match=message):
        write(path, "model", header, tensors)
    assert path.read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_of_another_device_are_read_on_the_cpu(path):
    weight = torch.ones(2, device="cuda")
    write(path, "model", {}, {"a": weight, "b": weight})
    tensors = read(path, "model")[1]
    assert (tensors["a"].device.type, tensors["a"].data_ptr()) == ("cpu", tensors["b"].data_ptr())
