"""A model file that is made to do harm, with the right checksum, calls nothing, allocates nothing, and is refused."""

import codecs
import collections
import copyreg
import functools
import hashlib
import io
import os
import pickle
import random
import struct
import subprocess
import zipfile

import pytest
import torch
from pairs import gaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.saving import files
from pyro_vae.saving.files import FileFormatError

CALLS = []


def alarm(*arguments, **keywords):
    """A function of the user, who trusts the file to store it, but not to call it."""
    CALLS.append(arguments)


class Alarm(nn.Module):
    def __init__(self, *arguments):
        alarm(*arguments)
        super().__init__()


class Call:
    """An object that pickle restores by a call, and gives a state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce_ex__(self, protocol):
        return self.reduced


class New(Call):
    """An object that pickle restores by ``cls.__new__`` with arguments."""

    def __init__(self, cls, *arguments, state=None):
        super().__init__(copyreg.__newobj__, cls, *arguments, state=state)

    @property
    def __class__(self):  # pickle compares it
        return self.reduced[1][0]


def archive(pickled, **records):
    """What torch would write of a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def seal(content, path):
    """Write a file with the checksum that it should have."""
    comment = "pyro_vae model file, version 2, sha256 {}"
    content = content[:-2] + struct.pack("<H", len(comment.format("0" * 64)))
    path.write_bytes(content + comment.format(hashlib.sha256(content).hexdigest()).encode())


def forge(vae, path):
    """Write a model, or anything else, without the checks of ``VAE.save``."""
    torch.save(vae, buffer := io.BytesIO())
    seal(buffer.getvalue(), path)


def with_attribute(value):
    vae = gaussian()
    vars(vae.decoder)["attribute"] = value  # even if it looks like a module
    return vae


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "model.pt"
    assert not CALLS
    assert not (tmp_path / "exploded").exists()


def test_forged_files_are_read_where_they_do_no_harm(path):
    forge(with_attribute([alarm, Alarm, functools.partial(alarm, 3), 2.5]), path)
    assert pv.VAE.load(path, using=[alarm, Alarm]).decoder.attribute[:2] == [alarm, Alarm]


FOREIGN = {
    "posix.system": Call(os.system, "touch exploded"),
    "posix.mkdir": Call(os.mkdir, "exploded"),
    "__builtin__.eval": Call(eval, "open('exploded', 'w')"),
    "io.open": Call(open, "exploded", "w"),
    "__builtin__.getattr": Call(getattr, nn.Linear, "mro"),
    "__builtin__.bytearray": Call(bytearray, 10**12),
    "commands.Popen": Call(subprocess.Popen, ["touch", "exploded"]),  # by its module in Python 2
    "torch.serialization.load": Call(torch.load, "other.pt"),
    "torch.hub.load": Call(torch.hub.load, "someone/else"),
    "torch.storage.UntypedStorage": Call(torch.UntypedStorage, 10**12),
    "pyro_vae.saving.files.write_file": Call(files.write_file, "exploded", ""),
    "pyro_vae.training.checkpoints.Checkpoints": Call(pv.Checkpoints, "exploded"),
    "collections.Counter": Call(collections.Counter, "text"),
}


@pytest.mark.parametrize(("name", "value"), FOREIGN.items(), ids=FOREIGN)
@pytest.mark.parametrize("wrapped", [lambda value: value, lambda value: functools.partial(value.reduced[0])])
def test_names_outside_of_the_allow_list_are_refused(path, name, value, wrapped):
    forge(with_attribute(wrapped(value)), path)
    with pytest.raises(ValueError, match=rf"`using` must have .*model\.pt' needs {name}"):
        pv.VAE.load(path, using=[alarm])


def tensor_of(size, stride, offset=0, storage=None, hooks=None, function=torch._utils._rebuild_tensor_v2):
    if storage is None:
        storage = torch.TypedStorage(wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True)
    return Call(function, storage, offset, size, stride, False, hooks or collections.OrderedDict())


NESTED = functools.reduce(lambda inner, _: (inner, inner), range(40), 1)
LONG = list(range(1000))
SIZE, STATE = tuple(LONG), dict.fromkeys(map(str, LONG))
HARMFUL = {
    "a function of the user is called": Call(alarm, 1), "a class of the user is called": Call(Alarm, 1),
    "a class of torch is called": Call(nn.Linear, 10**6, 10**6),
    "a part is called": Call(pv.priors.MixtureOfNormals, 10**6, 10**6),
    "a class is created with arguments": New(Alarm, 1), "a tensor larger than its storage": tensor_of((10**9,), (1,)),
    "a tensor larger than the file": tensor_of((10**9,), (0,)),
    "a tensor that starts late": tensor_of((4,), (1,), offset=1), "a negative size": tensor_of((-1,), (1,)),
    "a negative stride": tensor_of((4,), (-1,)), "a size of another length": tensor_of((4, 1), (1,)),
    "a size that is no number": tensor_of((2.0,), (1,)),
    "very many dimensions": tensor_of((1,) * 10**4, (1,) * 10**4),
    "a tensor with hooks": tensor_of((4,), (1,), hooks=collections.OrderedDict({1: alarm})),
    "a tensor of no storage": tensor_of((4,), (1,), storage="storage"),
    "a parameter of no tensor": Call(torch._utils._rebuild_parameter, 3, True, collections.OrderedDict()),
    "a state of a tensor": Call(torch._utils._rebuild_tensor_v2, *tensor_of((4,), (1,)).reduced[1], state={"a": 1}),
    "a size of other things": Call(torch.Size, ("a",)),
    "bytes in another encoding": Call(codecs.encode, "abc", "rot13"),
    "a set that takes for ever to hash": Call(set, [NESTED]),
    "a key that may take for ever to hash": {(1, (2, 3)): 1},
    "a partial that is set otherwise": Call(functools.partial, alarm, state=(3, (), {}, None)),
    "a partial with arguments": Call(functools.partial, alarm, 3),
    "a dictionary with arguments": Call(collections.OrderedDict, [(1, 2)]),
    "very many layers": New(nn.GRU, state={"_all_weights": [[3]], "num_layers": 10**12, "bidirectional": False}),
    "the same list in many sets": [Call(set, LONG) for _ in range(50)],
    "the same tuple in many sizes": [Call(torch.Size, SIZE) for _ in range(50)],
    "the same state in many modules": [New(nn.Linear, state=STATE) for _ in range(50)],
    "a module with a state that is none": New(nn.Linear, state=[("a", 1)]),
}  # fmt: skip


@pytest.mark.parametrize("value", HARMFUL.values(), ids=HARMFUL)
def test_harmful_instructions_are_refused(path, value):
    for whole in (with_attribute(value), value):
        forge(whole, path)
        with pytest.raises(FileFormatError, match=r"model\.pt' is not used: "):
            pv.VAE.load(path, using=[alarm, Alarm])


PICKLES = {
    "empty": b"", "cut off": pickle.dumps([1, 2], protocol=2)[:-1], "no pickle": b"abc",
    "of another protocol": pickle.dumps([1, 2], protocol=4), "instance": b"(ios\nsystem\n.",
    "object": b"(cos\nsystem\no.", "extension": b"\x80\x02\x82\x01.",
    "names on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a very long string": b"\x80\x02X\xff\xff\xff\xffa.", "a number of gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "an empty stack": b"\x80\x02R.", "no mark": b"\x80\x02t.", "a memo that is not there": b"\x80\x02h\x05.",
    "an odd number of items": b"\x80\x02}(K\x01u.", "items of a number": b"\x80\x02K\x01(K\x01K\x02u.",
}  # fmt: skip


@pytest.mark.parametrize("pickled", PICKLES.values(), ids=PICKLES)
def test_other_pickles_are_refused(path, pickled):
    seal(archive(pickled), path)
    with pytest.raises(ValueError, match=r"model\.pt' (is no archive|is not used|needs)"):
        pv.VAE.load(path)


def storage_of(count, kind=torch.FloatStorage, key="0"):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", kind, key, "cpu", count) if value is None else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump([None])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "pickled", [storage_of(10**9), storage_of(-1), storage_of(1.0), storage_of(1, key="1"), storage_of(1, kind=alarm)]
)
def test_storages_that_do_not_agree_with_their_records_are_refused(path, pickled):
    seal(archive(pickled, **{"data/0": bytes(4)}), path)
    with pytest.raises(FileFormatError, match=r"model\.pt' is not used: it has the storage|.*'data/1'"):
        pv.VAE.load(path, using=[alarm])


def test_archives_that_claim_more_than_they_have_are_refused(path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    seal(buffer.getvalue(), path)
    with pytest.raises(FileFormatError, match=r"is no archive of torch: .*compressed"):
        pv.VAE.load(path)
    content = archive(bytes(10**4))
    place = content.rindex(b"PK\x01\x02")  # the entry of the last record, "byteorder", in the directory
    seal(content[: place + 24] + struct.pack("<I", 2**31) + content[place + 28 :], path)
    with pytest.raises(FileFormatError, match=r"is no archive of torch: .*claim more bytes"):
        pv.VAE.load(path)


def test_pickles_garbled_anywhere_are_a_model_or_refused_by_the_name_of_the_file(path):
    torch.save(gaussian(), buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    pickled = records.pop("data.pkl")
    chance, refusals = random.Random(0), []
    for _ in range(600):
        garbled = bytearray(pickled)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(garbled))
            new = chance.choice([b"R", b"b", b"\x81", b"}", chance.randbytes(1)])
            garbled[place : place + chance.randint(0, 2)] = new
        seal(archive(bytes(garbled), **records), path)
        try:
            pv.VAE.load(path, using=[alarm])
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 300
    assert all("model.pt" in refusal for refusal in refusals)
