"""A run that is killed and resumed ends with the same bits; damaged and foreign checkpoints are refused by name."""

import copy
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import killed_runs
import pyro
import pytest
import torch
from pairs import gaussian
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.optim.lr_scheduler import OneCycleLR

import pyro_vae as pv
from pyro_vae import objectives, schedules
from pyro_vae.saving.files import FileFormatError
from pyro_vae.saving.tensor_file import read, write
from pyro_vae.training import checkpoints
from pyro_vae.training.state import check_run_state


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A new process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # without a pool of processes for each fork
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        yield worker


def same(ours, theirs):
    """Whether two folders have the same checkpoints to the bit: parameters, optimizer, random states, history."""
    assert (ours / "best.safetensors").exists() == (theirs / "best.safetensors").exists()
    for name, kind in {"last.safetensors": "checkpoint", "best.safetensors": "best parameters"}.items():
        if not (ours / name).exists() and name.startswith("best"):  # without validation data
            continue
        (header, tensors), (other_header, other_tensors) = (read(folder / name, kind) for folder in (ours, theirs))
        names = (header | other_header).keys() - {"engine"}  # a process that has just begun has not chosen it yet
        differing = [name for name in names if header.get(name) != other_header.get(name)]
        differing += list(tensors.keys() ^ other_tensors.keys())
        differing += [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
        assert not differing, (theirs, name, differing)
    return True


SHORT = {"continuous": 10, "discrete": 6, "frozen": 6}
LONG = {"continuous": 150, "discrete": 100, "frozen": 100, "captured": 25, "frozen, captured": 10, "compiled": 8}
SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in LONG.items()]


@pytest.mark.parametrize(("variant", "kills"), [*SHORT.items(), *SLOW])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(worker, variant, kills, tmp_path):
    done, rounds = worker.submit(killed_runs.kill_and_resume, variant, tmp_path, kills, seed=0).result()
    assert done >= kills
    killed = sorted(tmp_path.glob("killed *"))
    assert len(killed) == rounds + 1
    assert all(same(tmp_path / "whole", folder) for folder in killed)


@pytest.mark.slow
def test_fresh_processes_resume_as_forked_ones_do(worker, tmp_path):
    killed = tmp_path / "killed"
    for size in (1, 5, 12):  # checkpoints, of 24
        child = get_context("spawn").Process(target=killed_runs.train, args=("continuous", killed))
        child.start()
        while not (killed / "last.safetensors").exists() or steps_in(killed) < size:
            assert child.is_alive()
        child.kill()
        child.join()
    for folder in (killed, tmp_path / "whole"):
        worker.submit(killed_runs.train, "continuous", folder).result()
    assert same(tmp_path / "whole", killed)


def steps_in(folder):
    try:
        return read(folder / "last.safetensors", "checkpoint")[0]["steps"]
    except FileNotFoundError:  # the last one was moved, and the new one is not there yet
        return 0


def vae_of(latent=1, **parts):
    torch.manual_seed(0)
    return gaussian(latent, 2, **parts)


X, HELD_OUT = pv.datasets.two_gaussians(30, seed=1).x, pv.datasets.two_gaussians(10, seed=2).x


def same_parameters(one, other):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one.parameters(), other.parameters(), strict=True))


def contents(folder):
    """The bytes of each file, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def run(folder, vae=None, data=X, **options):
    pyro.clear_param_store()
    vae = vae_of() if vae is None else vae
    settings = {"epochs": 3, "batch_size": 10, "lr": 1e-2, "seed": 5}
    if folder is not None:
        settings["checkpoints"] = pv.Checkpoints(folder, every_steps=2)
    return pv.fit(vae.model, vae.guide, data, **settings | options)


def damage(path, how):
    content = path.read_bytes()
    damaged = {"empty": b"", "a bit": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]}
    if how == "a model":
        vae_of().save(path)
    elif how == "the best":
        shutil.copy(path.with_name("best.safetensors"), path)
    else:
        path.write_bytes(damaged.get(how, content[: len(content) // 2]))


@pytest.mark.parametrize("how", ["cut off", "empty", "a bit", "a model", "the best"])
def test_where_the_last_is_damaged_the_previous_is_used_with_a_warning(how, tmp_path):
    whole, vae = vae_of(), vae_of()
    expected = run(tmp_path / "whole", whole, validation=HELD_OUT)
    run(tmp_path / "damaged", validation=HELD_OUT)
    damage(tmp_path / "damaged" / "last.safetensors", how)
    message = r"`checkpoints`: '.*last\.safetensors' .*\. The previous checkpoint is used"
    with pytest.warns(UserWarning, match=message) as warned:
        found = run(tmp_path / "damaged", vae, validation=HELD_OUT)
    assert (warned[0].filename, found.history) == (__file__, expected.history)
    assert same_parameters(vae, whole)
    assert same(tmp_path / "whole", tmp_path / "damaged")


def test_a_damaged_checkpoint_never_replaces_the_previous_one(tmp_path, monkeypatch):
    run(tmp_path)
    damage(tmp_path / "last.safetensors", "cut off")
    previous = (tmp_path / "previous.safetensors").read_bytes()
    monkeypatch.setattr(checkpoints, "write", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="The previous checkpoint is used"):
        run(tmp_path, epochs=5)
    assert (tmp_path / "previous.safetensors").read_bytes() == previous


def test_where_all_are_damaged_nothing_is_done(tmp_path):
    run(tmp_path)
    for name in ("last.safetensors", "previous.safetensors"):
        damage(tmp_path / name, "a bit")
    with pytest.raises(FileFormatError, match=r"`checkpoints` must be an empty folder.*last\.safetensors' is damaged"):
        run(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_named_as_one(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"pyro_vae file, version 1, sha256 ...")
    with pytest.raises(FileFormatError, match=r"last\.ckpt' has version 1, which pyro_vae wrote before 0\.1\.0"):
        run(tmp_path)


FOUR = r"is \(4, 1\) float32 in the file and \(4, 3\) float32 in the model"
TWO = r"is \(2,\) float32 in the file and \(6,\) float32 in the model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 15}, "`batch_size` must be 10, as in the run of '.*', got 15; use another folder"),
        ({"batch_size": None}, "`batch_size` must be 10.*got 30"),
        ({"seed": 6}, "`seed` must be 5.*got 6"),
        ({"compile": True}, "`compile` must be None.*got True"),
        ({"elbo": TraceMeanField_ELBO()}, "`elbo` must be 'Trace_ELBO'.*got 'TraceMeanField_ELBO'"),
        ({"data": X[:29]}, r"`data` must be '\(30, 2\) float32.*got '\(29, 2\) float32,"),
        ({"data": X.flip(0)}, r"`data` must be '\(30, 2\) float32, checksum.*got '\(30, 2\) float32, checksum \w+'"),
        ({"data": X + 1e-3}, "`data` must be .*got .*checksum"),
        ({"validation": HELD_OUT}, "`validation` must be None.*got"),
        ({"vae": vae_of(latent=3)}, rf"is of another model.*decoder\.network\.0\.weight {FOUR}.*prior\.raw {TWO}"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(changes, message, tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    vae = changes.get("vae") or vae_of()
    untouched = copy.deepcopy(vae)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"vae": vae, **changes})
    assert same_parameters(vae, untouched)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("batch_size", [10, 12, None])
def test_more_epochs_continue_a_finished_run(batch_size, tmp_path):
    ours, theirs = vae_of(), vae_of()
    for epochs in (1, 2, 5):
        found = run(tmp_path / "in parts", ours, epochs=epochs, batch_size=batch_size, validation=HELD_OUT)
    expected = run(tmp_path / "at once", theirs, epochs=5, batch_size=batch_size, validation=HELD_OUT)
    assert (found.history, found.steps) == (expected.history, expected.steps)
    assert same(tmp_path / "at once", tmp_path / "in parts")


class Counting(torch.optim.SGD):
    """An optimizer with Python numbers in its state."""

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            state["count"], state["share"] = state.get("count", 0) + 1, state.get("share", 1.0) * 0.9
            state["odd"] = not state.get("odd", False)
            weight.sub_(weight.grad, alpha=self.param_groups[0]["lr"] * state["share"] / (1 + state["odd"]))


def one_cycle(optimizer):
    return OneCycleLR(optimizer, 1e-2, 21)


OPTIMIZERS = {  # arguments of a run
    "AdamW": {"optimizer": partial(torch.optim.AdamW, weight_decay=0.1, amsgrad=True)},
    "SGD": {"optimizer": partial(torch.optim.SGD, momentum=0.9), "lr": schedules.from_torch(one_cycle)},
    "RMSprop": {"optimizer": partial(torch.optim.RMSprop, centered=True)},
    "Adagrad": {"optimizer": torch.optim.Adagrad, "lr": schedules.on_plateau(0.1, patience=1, threshold=0.5)},
    "NAdam": {"optimizer": torch.optim.NAdam, "lr": schedules.on_plateau(0.1, patience=1), "validation": HELD_OUT},
    "Adafactor": {"optimizer": torch.optim.Adafactor},
    "ASGD": {"optimizer": torch.optim.ASGD},
    "Rprop": {"optimizer": torch.optim.Rprop, "batch_size": None},
    "Counting": {"optimizer": Counting},
    "Adam, captured": {"lr": schedules.from_torch(one_cycle), "compile": True},
    "SGD, captured": {"optimizer": partial(torch.optim.SGD, momentum=0.9), "compile": True, "lr": 1e-3},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("captured")) for name in OPTIMIZERS]
)
def test_any_optimizer_and_schedule_resumes_with_the_same_bits(name, tmp_path):
    """Each run that fails has taken steps that are in no checkpoint, or has a checkpoint at the end of an epoch."""
    settings = {"epochs": 7, "lr": None} | OPTIMIZERS[name]
    whole, vae = vae_of(), vae_of()
    expected = run(tmp_path / "whole", whole, **settings)
    for last in (1, 2, 5):  # the newest checkpoint is of step 2, 6 or 14, with three steps in an epoch

        def die(epoch, last=last):
            if epoch.number == last:
                raise MemoryError

        with pytest.raises(MemoryError):
            run(tmp_path / "killed", vae, callbacks=[die], **settings)
        vae = vae_of()
    found = run(tmp_path / "killed", vae, **settings)
    assert found.history == expected.history
    assert same_parameters(vae, whole)
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_returns_at_once(tmp_path):
    vae, again = vae_of(), vae_of()
    first = run(tmp_path, vae, validation=HELD_OUT)
    before, callback = contents(tmp_path), Mock()
    second = run(tmp_path, again, validation=HELD_OUT, callbacks=[callback])
    assert (second.history, second.steps, second.stopped) == (first.history, first.steps, first.stopped)
    assert same_parameters(vae, again)
    assert contents(tmp_path) == before
    assert not callback.called


def test_a_run_that_patience_stopped_stays_finished_with_the_best_epoch(tmp_path):
    one, two = vae_of(), vae_of()
    first = run(tmp_path, one, epochs=60, lr=0.3, validation=HELD_OUT, patience=2)
    second = run(tmp_path, two, epochs=100, lr=0.3, validation=HELD_OUT, patience=2)
    assert (first.steps, first.history) == (second.steps, second.history)
    assert first.stopped == second.stopped == "patience"
    assert same_parameters(one, two)


def test_the_best_epoch_can_be_loaded_in_one_line(tmp_path):
    states, vae = [], vae_of()
    callbacks = [lambda epoch: states.append(copy.deepcopy(vae.state_dict()))]
    fitted = run(tmp_path, vae, epochs=12, lr=0.3, validation=HELD_OUT, callbacks=callbacks)
    number = pv.Checkpoints(tmp_path).load_best(fresh := vae_of())
    bounds = fitted.history["validation_elbo"]
    assert bounds[number - 1] == max(bounds)
    assert all(torch.equal(tensor, states[number - 1][name]) for name, tensor in fresh.state_dict().items())
    message = r"`module` must be the model of .*best.safetensors': decoder.network.0.weight is"
    with pytest.raises(ValueError, match=message):
        pv.Checkpoints(tmp_path).load_best(vae_of(latent=2))
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors"):
        pv.Checkpoints(tmp_path / "elsewhere").load_best(vae_of())


@pytest.mark.parametrize(
    ("folder", "error", "message"),
    [
        (3, TypeError, "`folder` must be the path of a folder.*got an int"),
        ("a file", ValueError, "`folder` must be a folder.*got the file '.*'"),
        ("a file/in it", OSError, r"`checkpoints` must be a folder in which.*the folder '.*' cannot be made \(.*\)"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(folder, error, message, tmp_path):
    (tmp_path / "a file").touch()
    model = Mock(spec=[])  # a function, without attributes of a VAE
    with pytest.raises(error, match=message):
        pv.fit(model, model, X, epochs=1, checkpoints=tmp_path / folder if isinstance(folder, str) else folder)
    assert not model.called


def test_a_folder_that_is_not_writable_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match=r"`checkpoints` must be in a folder.*nothing can be written in"):
        run(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("every_steps", 0), ("every_seconds", 0), ("every_seconds", math.nan)])
def test_intervals_that_are_not_positive_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
        pv.Checkpoints(tmp_path, **{name: value})


def test_temporary_files_of_a_killed_run_are_removed_and_no_others(tmp_path):
    run(tmp_path)
    others = {f".{name}.{'0123' * 8}.partial" for name in ("draws.nc", "page.html", "best.safetensors.old")}
    others |= {".mine.partial", f".{'0123' * 8}.partial"}
    for name in (*others, f".last.safetensors.{'0123' * 8}.partial", f".best.safetensors.{'89ab' * 8}.partial"):
        (tmp_path / name).touch()
    run(tmp_path, epochs=4)
    assert {path.name for path in tmp_path.iterdir()} == {"last.safetensors", "previous.safetensors", *others}


def test_a_second_run_in_the_folder_is_refused_at_once_in_this_process_and_in_another(tmp_path):
    """Ours holds the lock while it calls back; afterwards, and after a run that was killed, the folder is free."""
    refused = []

    def second(epoch):
        with pytest.raises(BlockingIOError, match=r"`checkpoints` must .* which another run in this process, \d+ uses"):
            run(tmp_path)
        other = "import sys, pyro_vae as pv\nwith pv.Checkpoints.opened(sys.argv[1]): pass"
        refused.append(subprocess.run([sys.executable, "-c", other, tmp_path], capture_output=True, text=True))

    with pyro.get_param_store().scope():
        run(tmp_path, epochs=1, callbacks=[second])
    assert (
        f"`checkpoints` must be a folder of its own for each run, got '{tmp_path}', which process " in refused[0].stderr
    )
    assert f"process {os.getpid()} on {socket.gethostname()} uses: wait for its end" in refused[0].stderr
    assert not (tmp_path / ".lock").exists()
    run(tmp_path, epochs=2)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holding = "import sys, os, signal, pyro_vae as pv\nwith pv.Checkpoints.opened(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", holding, tmp_path], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    run(tmp_path)
    assert not (tmp_path / ".lock").exists()


class FullDisk:
    """``os.fsync`` that fails in some calls, as on a disk that is full for a while."""

    def __init__(self, failing):
        self.calls, self.failing = 0, failing

    def __call__(self, descriptor):
        self.calls += 1
        if self.calls in self.failing:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", [{2}, {1, 2}, {3, 4, 5, 6, 7}, range(1, 99)])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_the_run_goes_on(failing, tmp_path, monkeypatch):
    whole, vae = vae_of(), vae_of()
    expected = run(None, whole)
    monkeypatch.setattr("os.fsync", FullDisk(failing))
    with pytest.warns(
        UserWarning, match=r"`checkpoints`: '.*' could not be written \(No space left on device\)\. The run"
    ):
        found = run(tmp_path, vae)
    assert found.history == expected.history
    assert same_parameters(vae, whole)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ([] if 98 in failing else ["last.safetensors", "previous.safetensors"])
    if "last.safetensors" in written:
        read(tmp_path / "last.safetensors", "checkpoint")


@pytest.mark.parametrize(("theirs", "ours", "message"), [
    ({"lr": 1e-2}, {"lr": 2e-2}, r"`lr` must be 0\.01, as in the run of '.*', got 0\.02; use another folder"),
    ({"lr": schedules.decayed(1e-2, 24)}, {"lr": schedules.decayed(1e-2, 48)}, "`lr` must be 'a schedule: 0.01, "),
    ({"lr": schedules.constant(1e-2)}, {"lr": 1e-2}, "`lr` must be 'a schedule.*, got 0.01"),
    ({"lr": schedules.on_plateau(0.1)}, {"lr": schedules.on_plateau(0.1, patience=5)},
     "`lr` must be 'ReduceLROnPlateau.start=0.1, factor=0.1, patience=10, .* got .*patience=5"),
    ({}, {"optimizer": torch.optim.AdamW}, "`optimizer` must be 'Adam.*, got 'AdamW"),
    ({"optimizer": partial(torch.optim.SGD, momentum=0.9)}, {"optimizer": partial(torch.optim.SGD, momentum=0.8)},
     r"`optimizer` must be 'SGD\(.*momentum=0\.9.*, got 'SGD\(.*momentum=0\.8"),
    ({"lr": None, "optimizer": partial(torch.optim.SGD, lr=0.01)},
     {"lr": None, "optimizer": partial(torch.optim.SGD, lr=0.02)}, r"`lr` must be 0\.01.*, got 0\.02"),
    ({}, {"clip_norm": 1.0}, "`clip_norm` must be None.*, got 1.0"),
    ({"elbo": Trace_ELBO(num_particles=2)}, {"elbo": Trace_ELBO(num_particles=3)}, "`elbo.num_particles` .* 2.* got 3"),
    ({"elbo": objectives.FreeBits(0.1)}, {"elbo": objectives.FreeBits(0.2)}, r"`elbo.nats` must be 0\.1.* got 0\.2"),
    ({"schedules": {torch.zeros(()): schedules.linear(0.0, 1.0, 9)}},
     {"schedules": {torch.zeros(()): schedules.linear(0.0, 1.0, 8)}}, r"`schedules` must be \['a schedule: 0, 0.11"),
    ({"schedules": {torch.zeros(()): [0.1, 0.2, 0.3].__getitem__}}, {}, r"`schedules` must be \['a sch.*, got \[\]"),
])  # fmt: skip
def test_every_setting_that_differs_on_resuming_is_named_with_both_values(theirs, ours, message, tmp_path):
    run(tmp_path, epochs=1, **theirs)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **theirs | {"schedules": {}} | ours)


def changed(path, change):
    """Write a checkpoint again, with a right checksum, after a change of its header and tensors."""
    header, tensors = read(path, "checkpoint")
    change(header, tensors)
    write(path, "checkpoint", header, tensors)


def test_a_checkpoint_that_lacks_anything_or_holds_another_type_is_no_checkpoint(tmp_path):
    run(tmp_path, validation=HELD_OUT)
    path, whole = tmp_path / "last.safetensors", (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "previous.safetensors").unlink()
    header, tensors = read(path, "checkpoint")
    changes = [lambda h, t, name=name: h.pop(name) for name in header]
    wrong = [(name, value) for name in header for value in (None, "3", [[]])]
    changes += [lambda h, t, name=name, value=value: h.update({name: value}) for name, value in wrong]
    changes += [
        lambda h, t, key=key: h[key[0]].pop(key[1])
        for key in [
            ("trainable_flags", "optimized"),
            ("trainable_flags", "training"),
            ("random", "numpy"),
            ("random", "random"),
        ]
    ]
    changes += [lambda h, t, name=name: t.pop(name) for name in tensors if name.startswith(("model", "random", "best"))]
    changes += [lambda h, t, name=name: t.update({name: torch.zeros(7)}) for name in tensors]
    changes += [lambda h, t: t.update(lonely=torch.zeros(1)), lambda h, t: h["history"].update(elbo=["a"])]
    for change in changes:
        path.write_bytes(whole)
        changed(path, change)
        with pytest.raises(
            FileFormatError, match=r"`checkpoints` must be an empty folder.*last.safetensors' cannot be used"
        ):
            pv.Checkpoints(tmp_path).load(check_run_state)
    path.write_bytes(whole)
    changed(path, lambda h, t: h.pop("steps"))
    with pytest.raises(FileFormatError, match=r"last\.safetensors' cannot be used: it has no 'steps'"):
        run(tmp_path, validation=HELD_OUT)
    write(tmp_path / "best.safetensors", "best parameters", {}, {})
    with pytest.raises(FileFormatError, match=r"best\.safetensors' cannot be used: it has no 'epoch'"):
        pv.Checkpoints(tmp_path).load_best(vae_of())


def test_no_damaged_byte_of_a_checkpoint_is_anything_but_a_format_error(tmp_path):
    run(tmp_path)
    path, chance = tmp_path / "last.safetensors", random.Random(0)
    content = path.read_bytes()
    places = [*range(0, 400, 7), *range(len(content) - 40, len(content)), *chance.choices(range(len(content)), k=100)]
    damaged = [
        content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :] for place in places
    ]
    damaged += [content[:place] for place in places] + [content + b"x", bytes([255] * 8) + content[8:]]
    for one in damaged:
        path.write_bytes(one)
        with pytest.raises(FileFormatError):
            read(path, "checkpoint")


TRAINING = """
import os, signal, sys, torch, pyro_vae as pv
sys.path.insert(0, sys.argv[2])
from pairs import gaussian
torch.manual_seed(0)
vae, x = gaussian(1, 2), torch.randn(30, 2)
def terminate(epoch):
    if epoch.number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
def user(number, frame):
    print("user's handler")
    if sys.argv[3] == "raises":
        sys.exit(7)
if sys.argv[3] != "none":
    signal.signal(signal.SIGTERM, user)
pv.fit(vae.model, vae.guide, x, epochs=4, batch_size=10, callbacks=[terminate], checkpoints=sys.argv[1])
print("finished", signal.getsignal(signal.SIGTERM) in (user, signal.SIG_DFL))
"""


@pytest.mark.parametrize(("handler", "code", "printed", "steps"), [
    ("none", -signal.SIGTERM, "", 7), pytest.param("raises", 7, "user's handler\n", 7, marks=pytest.mark.slow),
    ("returns", 0, "user's handler\nfinished True\n", 12),
])  # fmt: skip
def test_sigterm_ends_the_process_as_before_once_a_checkpoint_is_written(handler, code, printed, steps, tmp_path):
    """The signal comes at the end of the second epoch of three steps: one more step is done, and written."""
    program = [sys.executable, "-c", TRAINING, tmp_path, Path(__file__).parents[1], handler]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr
    assert read(tmp_path / "last.safetensors", "checkpoint")[0]["steps"] == steps


def test_seconds_count_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    files = pv.Checkpoints(tmp_path, every_seconds=10.0)
    assert not files.due(1)
    now[0] = 111.0
    assert files.due(2)
    files.save({}, {})
    assert not files.due(3)


def test_checkpoints_change_nothing_of_a_run(tmp_path):
    ours, theirs = vae_of(), vae_of()
    assert run(tmp_path, ours).history == run(None, theirs).history
    assert same_parameters(ours, theirs)


def test_an_optimizer_whose_state_cannot_be_written_is_refused_before_any_work(tmp_path):
    class Listing(Counting):
        @torch.no_grad()
        def step(self):
            for weight in self.param_groups[0]["params"]:
                self.state[weight]["gradients"] = [weight.grad]

    run(None, optimizer=Listing)
    message = "`optimizer` must keep tensors and numbers in its state .*got Listing, whose 'gradients' is a list"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, optimizer=Listing)
