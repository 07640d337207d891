"""What is sent to other processes: functions of the script, modules by path, and nothing to another version."""

import importlib
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

import pyro_vae
from pyro_vae.sweeps import jobs, run
from pyro_vae.sweeps.jobs import described, optional_module, pack, unpack
from pyro_vae.sweeps.run import Task
from pyro_vae.sweeps.space import Space


def task_of(make, tmp_path, data=()):
    return Task(make, Space({"a": [1]}), data, (), {}, 1, 1.0, tmp_path)


def test_a_function_of_the_script_is_sent_with_its_globals(tmp_path, monkeypatch):
    script = sys.modules["__main__"]
    for name, value in {"word": "a script", "make": None}.items():
        monkeypatch.setattr(script, name, value, raising=False)
    exec("def make(a): return word, a", vars(script))
    packed = pack(task_of(script.make, tmp_path))
    monkeypatch.delattr(script, "make")
    monkeypatch.delattr(script, "word")
    assert unpack(packed).make(3) == ("a script", 3)


def test_a_function_of_a_file_is_found_by_the_path_of_the_script(tmp_path, monkeypatch):
    (tmp_path / "of_a_file.py").write_text("def make(a): return 'a file', a\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        packed = pack(task_of(importlib.import_module("of_a_file").make, tmp_path))
    del sys.modules["of_a_file"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert str(tmp_path) not in sys.path
    assert unpack(packed).make(3) == ("a file", 3)
    del sys.modules["of_a_file"]


def test_a_function_of_a_module_that_is_here_alone_is_sent_with_it(tmp_path, monkeypatch):
    document = ModuleType("__a_document__")
    monkeypatch.setitem(sys.modules, "__a_document__", document)
    exec("word = 'a document'\ndef make(a): return word, a\n", vars(document))
    packed = pack(task_of(document.make, tmp_path))
    monkeypatch.delitem(sys.modules, "__a_document__")
    assert unpack(packed).make(3) == ("a document", 3)


def test_data_come_back_as_they_were(tmp_path):
    x = torch.randn(5, 2)
    assert torch.equal(unpack(pack(task_of(len, tmp_path, x))).data, x)


def test_a_worker_of_another_version_is_refused(tmp_path, monkeypatch):
    packed = pack(task_of(len, tmp_path))
    monkeypatch.setattr(pyro_vae, "__version__", "0.0.9")
    with pytest.raises(
        RuntimeError, match=r"a worker of the sweep must have pyro_vae 0\.1\.0, got 0\.0\.9 in '.*pyro_vae'"
    ):
        unpack(packed)


def test_what_cannot_be_pickled_is_refused(tmp_path):
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"`make`, `space`, `data` .* must be what can be pickled.*lock"):
        pack(task_of(lambda a: lock, tmp_path))


@pytest.mark.parametrize(("module", "extra", "package"), [
    ("ray.tune", "sweep", r"ray\[tune\]"), ("optuna", "optuna", "optuna"),
])  # fmt: skip
def test_a_missing_engine_is_an_error_with_the_extra(module, extra, package, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(jobs, "import_module", missing)
    with pytest.raises(ImportError, match=rf"`engine` needs {package}, .*: pip install 'pyro-vae\[{extra}\]'"):
        optional_module(module, extra)


def test_options_are_described_for_a_comparison():
    options = {"lr": 0.1, "callbacks": [print], "optimizer": torch.optim.Adam, "elbo": None, "x": torch.ones(2)}
    shown = {"lr": 0.1, "callbacks": ["print"], "optimizer": "Adam", "elbo": None}
    assert described(options) == shown | {"x": "a torch.float32 tensor of shape (2,)"}


def test_the_same_settings_at_the_same_time_wait_for_each_other(tmp_path):
    order = []

    def other():
        with run._alone(tmp_path):
            order.append("begin")
            time.sleep(0.3)
            order.append("end")

    thread = threading.Thread(target=other)
    thread.start()
    while not order:
        time.sleep(0.01)
    with run._alone(tmp_path):
        order.append("second")
    thread.join()
    assert order == ["begin", "end", "second"]
