"""IDX files are downloaded once, from the first mirror with the published bytes, and refused if one byte is wrong."""

import gzip
import hashlib
import re
import shutil
import socket
import struct
import threading
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pyro_vae import datasets
from pyro_vae.datasets import idx, images

IMAGES = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3) * 8
LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


def idx_bytes(array, shape=None):
    """An array of bytes as an IDX file, whose header may claim another shape."""
    shape = array.shape if shape is None else shape
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


CONTENTS = {"images": idx_bytes(IMAGES), "labels": idx_bytes(LABELS)}
PACKED = {name: gzip.compress(data, mtime=0) for name, data in CONTENTS.items()}
FILES = {name: idx.RemoteFile(name, sha256(PACKED[name]), sha256(data)) for name, data in CONTENTS.items()}


@pytest.fixture(autouse=True)
def small_mnist(monkeypatch):
    """Replace the published files by small ones."""
    monkeypatch.setattr(images, "_MNIST", dict.fromkeys(["train", "test"], tuple(FILES.values())))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mnist"


class Server(ThreadingHTTPServer):
    """Mirrors, one in each folder. ``answers`` has the responses for each path, one after the other."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers, self.requests = {}, []

    def mirror(self, name, **answers):
        """Return the URL of a mirror that sends bytes, a status, or a list of these for each file."""
        for file in FILES:
            answer = answers.get(file, PACKED[file])
            self.answers[f"/{name}/{file}.gz"] = list(answer) if isinstance(answer, list) else [answer]
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        answers = self.server.answers[self.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            return self.send_error(answer)
        body, length = answer if isinstance(answer, tuple) else (answer, len(answer))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        return self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine, without a proxy, and without a pause between attempts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.fixture
def refusing():
    """The URL of a closed port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}/gone"


def flipped(data, position, bit=0x10):
    """Flip one bit."""
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


FAULTY = {  # what a mirror sends instead of the images
    "corrupted": flipped(PACKED["images"], 20), "cut short": PACKED["images"][:-3], "empty": b"",
    "cut short on the way": (PACKED["images"][:-3], len(PACKED["images"])),
    "an error page": b"<html>maintenance</html>", "not found": 404, "broken": 500,
}  # fmt: skip


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def assert_is_ours(data):
    assert (data.x.dtype, data.labels.dtype, len(data)) == (torch.uint8, torch.int64, 5)
    assert torch.equal(data.x, torch.from_numpy(IMAGES).flatten(1))
    assert data.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("end", ["", "/"])
def test_files_are_downloaded_once_and_then_read_without_a_network(server, cache, refusing, end):
    for mirror in (server.mirror("one") + end, refusing):
        assert_is_ours(datasets.mnist(mirrors=[mirror]))
        assert server.requests == ["/one/images.gz", "/one/labels.gz"]
        assert files_in(cache) == ["images.gz", "labels.gz"]


@pytest.mark.parametrize("fault", FAULTY.values(), ids=FAULTY)
def test_a_mirror_that_fails_is_tried_again_and_then_the_next_one(server, cache, fault):
    assert_is_ours(datasets.mnist(mirrors=[server.mirror("one", images=[fault, PACKED["images"]])]))
    assert server.requests == ["/one/images.gz", "/one/images.gz", "/one/labels.gz"]
    shutil.rmtree(cache)
    server.requests.clear()
    assert_is_ours(datasets.mnist(mirrors=[server.mirror("first", images=fault), server.mirror("second")]))
    assert server.requests == ["/first/images.gz"] * 2 + ["/second/images.gz", "/first/labels.gz"]
    assert files_in(cache) == ["images.gz", "labels.gz"]


def test_the_next_mirror_is_tried_after_a_closed_port(server, cache, refusing):
    assert_is_ours(datasets.mnist(mirrors=[refusing, server.mirror("second")]))
    assert server.requests == ["/second/images.gz", "/second/labels.gz"]


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_mirror_is_tried_as_often_as_requested(server, tmp_path, attempts):
    for mirrors in ([], [server.mirror("one", images=404)]):
        with pytest.raises(OSError, match=r"`mirrors` must have one that gives images\.gz"):
            idx.download(FILES["images"], mirrors, tmp_path, attempts)
    assert len(server.requests) == attempts


def test_where_all_mirrors_fail_the_errors_and_the_alternatives_are_named_and_nothing_is_left(server, cache, refusing):
    mirrors = [server.mirror("first", images=404), server.mirror("second", images=PACKED["images"][:-1]), refusing]
    with pytest.raises(OSError, match=r"`mirrors` must have one that gives images\.gz") as caught:
        datasets.mnist(mirrors=mirrors)
    message = str(caught.value)
    for part in (f"{mirrors[0]}: 404", f"{mirrors[1]}: SHA256", f"{mirrors[2]}: ", "`folder`", str(cache)):
        assert part in message
    assert files_in(cache) == []


def test_a_second_file_that_fails_is_named_and_the_first_one_kept(server, cache):
    with pytest.raises(OSError, match=r"`mirrors` must have one that gives labels\.gz"):
        datasets.mnist(mirrors=[server.mirror("one", labels=404)])
    assert files_in(cache) == ["images.gz"]


def test_a_download_that_is_broken_off_leaves_nothing(server, cache, monkeypatch):
    # The last moment before the bytes reach the cache.
    monkeypatch.setattr("pooch.core.hash_matches", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        datasets.mnist(mirrors=[server.mirror("one")])
    assert files_in(cache) == []


@pytest.mark.parametrize("fault", ["corrupted", "cut short", "empty"])
def test_a_damaged_file_in_the_cache_is_fetched_again_and_never_used(server, cache, refusing, fault):
    mirror = server.mirror("one")
    datasets.mnist(mirrors=[mirror])
    (cache / "images.gz").write_bytes(FAULTY[fault])
    with pytest.raises(OSError, match=r"`mirrors` must have one that gives images\.gz"):
        datasets.mnist(mirrors=[refusing])
    assert_is_ours(datasets.mnist(mirrors=[mirror]))
    assert (server.requests[2:], (cache / "images.gz").read_bytes()) == (["/one/images.gz"], PACKED["images"])


def test_without_a_variable_files_go_to_the_systems_folder_for_caches(server, tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_VAE_CACHE", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "system" / name)
    datasets.mnist(mirrors=[server.mirror("one")])
    assert files_in(tmp_path / "system" / "pyro_vae") == ["images.gz", "labels.gz"]


@pytest.fixture
def folder(tmp_path):
    """One file packed, one not."""
    (tmp_path / "images.gz").write_bytes(PACKED["images"])
    (tmp_path / "labels").write_bytes(CONTENTS["labels"])
    return tmp_path


@pytest.mark.parametrize(("split", "kind"), [("train", str), ("test", Path)])
def test_a_folder_is_read_packed_by_any_program_or_not_and_without_a_network(folder, split, kind, monkeypatch):
    monkeypatch.setattr(idx, "download", None)
    for data in (PACKED["images"], gzip.compress(CONTENTS["images"], compresslevel=1, mtime=12345)):
        (folder / "images.gz").write_bytes(data)
        assert_is_ours(datasets.mnist(split, folder=kind(folder)))


@pytest.mark.parametrize("missing", ["images.gz", "labels"])
def test_a_file_that_is_missing_is_named(folder, missing):
    (folder / missing).unlink()
    (folder / missing).mkdir()  # a folder of that name is no file
    name = missing.removesuffix(".gz")
    message = rf"`folder` must be .*: there is no {name}\.gz or {name} in .*{folder.name}"
    with pytest.raises(FileNotFoundError, match=message):
        datasets.mnist(folder=folder)


@pytest.mark.parametrize("name", ["nowhere", "labels"])
def test_a_folder_that_is_not_there_is_no_folder(folder, name):
    with pytest.raises(FileNotFoundError, match=rf"`folder` must be .*: there is no folder .*{name}'"):
        datasets.mnist(folder=folder / name)


DAMAGES = {
    "packed, cut short": ("images.gz", PACKED["images"][:-9]), "packed, of no bytes": ("images.gz", b""),
    "packed, with bytes after the end": ("images.gz", PACKED["images"] + b"more"),
    "packed in name only": ("images.gz", CONTENTS["images"]), "unpacked in name only": ("labels", PACKED["labels"]),
    "cut short": ("labels", CONTENTS["labels"][:-1]), "of no bytes": ("labels", b""),
    "another file": ("labels", CONTENTS["images"]), "another file, packed": ("images.gz", PACKED["labels"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_not_the_published_one_is_refused_by_its_path(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^`path` must be .*: {re.escape(repr(str(folder / name)))} is damaged"):
        datasets.mnist(folder=folder)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_no_flipped_bit_gives_another_array(tmp_path, suffix):
    """Some bits of a gzip file do not belong to the content: the time and the system."""
    data = PACKED["labels"] if suffix else CONTENTS["labels"]
    path, refusals = tmp_path / f"labels{suffix}", []
    for position, bit in product(range(len(data)), range(8)):
        path.write_bytes(flipped(data, position, 1 << bit))
        try:
            read = idx.read(path, FILES["labels"].content)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert read.tolist() == LABELS.tolist()
    assert all(str(path) in refusal for refusal in refusals)
    assert len(refusals) == 8 * len(data) if not suffix else len(refusals) > 8 * (len(data) - 8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("shape", [(30,), (0, 2, 3), (5, 6), (5, 2, 3), (1, 30, 1, 1)])
def test_an_array_is_read_as_it_was_written(tmp_path, shape, suffix):
    array, path = np.resize(IMAGES, shape), tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(array)) if suffix else idx_bytes(array))
    read = idx.read(path)
    assert (read.dtype, tuple(read.shape)) == (torch.uint8, shape)
    np.testing.assert_array_equal(read, array)
    read += 1  # a writable tensor, not a view of immutable bytes


WRONG_FORMS = {
    "numbers of another type": b"\0\0\x0d" + CONTENTS["labels"][3:], "no IDX file": b"PK\x03\x04" + bytes(20),
    "no magic number": b"\0\0", "of no bytes": b"", "a header without its sizes": b"\0\0\x08\x03" + bytes(5),
    "more rows in the header": idx_bytes(IMAGES, (6, 2, 3)), "fewer rows in the header": idx_bytes(IMAGES, (4, 2, 3)),
    "very many rows in the header": idx_bytes(IMAGES, (2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "one dimension more in the header": idx_bytes(IMAGES, (5, 2, 3, 1))[:-1],
    "more dimensions than an array has": idx_bytes(np.zeros(1, np.uint8), (1,) * 200),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("form", WRONG_FORMS.values(), ids=WRONG_FORMS)
def test_another_form_is_refused_by_its_path(tmp_path, form, suffix):
    path = tmp_path / f"array{suffix}"
    path.write_bytes(gzip.compress(form) if suffix else form)
    with pytest.raises(ValueError, match=f"^`path` must be an IDX file of .*: {re.escape(repr(str(path)))} "):
        idx.read(path)


BOMBS = {
    "a header of very many bytes, of which none is there": (2**28, 0),
    "a header of very many bytes that are there": (2**28, 2**28),
    "a header of eight bytes before very many": (8, 2**28),
    "sizes whose product no memory holds": (2**32 - 1, 10),
}


@pytest.mark.parametrize(("claimed", "count"), BOMBS.values(), ids=BOMBS)
def test_a_small_file_takes_no_memory_for_what_it_claims(tmp_path, claimed, count):
    """Sizes in the header are compared with the file's, whatever it decompresses to."""
    packer, block = zlib.compressobj(1, wbits=31), bytes(2**24)
    parts = [packer.compress(struct.pack(">4BI", 0, 0, 8, 1, claimed))]
    parts += [packer.compress(block[: min(count, 2**24)]) for _ in range(-(-count // 2**24))]
    (tmp_path / "bomb.gz").write_bytes(b"".join([*parts, packer.flush()]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^`path` must be .*bomb\.gz' "):
            idx.read(tmp_path / "bomb.gz")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
