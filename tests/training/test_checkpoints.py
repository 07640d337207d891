"""A run that is killed and resumed ends with the same bits; damaged and foreign checkpoints are refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pairs import NET, gaussian
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae import likelihoods
from pyro_vae.saving.files import FileFormatError
from pyro_vae.saving.tensor_file import read

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "killed_runs.py"


def run_script(*arguments, cache):
    """Run ``killed_runs.py``, and return what it prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # without a pool of processes for each fork
    }
    script = [sys.executable, str(SCRIPT), *map(str, arguments)]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def same(ours, theirs):
    """Whether two folders have the same checkpoints to the bit: parameters, optimizer, random states, history."""
    kinds = {"last.safetensors": "checkpoint", "best.safetensors": "best parameters"}
    for name, kind in kinds.items():
        (header, tensors), (other_header, other_tensors) = (read(folder / name, kind) for folder in (ours, theirs))
        differing = [name for name in header | other_header if header.get(name) != other_header.get(name)]
        differing += list(tensors.keys() ^ other_tensors.keys())
        differing += [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])]
        assert not differing, (theirs, name, differing)
    return True


SHORT = [("continuous", 12), ("discrete", 8), ("frozen", 8), ("captured", 3)]
LONG = [("continuous", 150), ("discrete", 100), ("frozen", 100), ("captured", 25), ("frozen, captured", 10)]


@pytest.mark.parametrize(
    ("variant", "kills"),
    [*SHORT, *(pytest.param(*row, marks=pytest.mark.slow) for row in (*LONG, ("compiled", 8)))],
)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(variant, kills, tmp_path):
    done, _, rounds = map(int, run_script(variant, tmp_path, kills, 0, cache=tmp_path / "cache").split())
    assert done >= kills
    killed = sorted(tmp_path.glob("killed *"))
    assert len(killed) == rounds + 1
    assert all(same(tmp_path / "whole", folder) for folder in killed)


@pytest.mark.slow
def test_fresh_processes_resume_as_forked_ones_do(tmp_path):
    run_script("continuous", tmp_path / "whole", cache=tmp_path)
    killed = tmp_path / "killed"
    for size in (1, 5, 12):  # checkpoints, of 24
        script = [sys.executable, str(SCRIPT), "continuous", str(killed)]
        child = subprocess.Popen(script, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        while not (killed / "last.safetensors").exists() or steps_in(killed) < size:
            assert child.poll() is None
        child.kill()
        child.wait()
    run_script("continuous", killed, cache=tmp_path)
    assert same(tmp_path / "whole", killed)


def steps_in(folder):
    try:
        return read(folder / "last.safetensors", "checkpoint")[0]["steps"]
    except FileNotFoundError:  # the last one was moved, and the new one is not there yet
        return 0


# --- Which checkpoint is used ----------------------------------------------------------------------------------------


def vae_of(latent=1, **parts):
    torch.manual_seed(0)
    return gaussian(latent, 2, **parts)


X, HELD_OUT = pv.datasets.two_gaussians(30, seed=1).x, pv.datasets.two_gaussians(10, seed=2).x


def run(folder, vae=None, data=X, **options):
    pyro.clear_param_store()
    vae = vae_of() if vae is None else vae
    checkpoints = None if folder is None else pv.Checkpoints(folder, every_steps=2)
    settings = {"epochs": 3, "batch_size": 10, "lr": 1e-2, "seed": 5, "checkpoints": checkpoints}
    return pv.fit(vae.model, vae.guide, data, **settings | options)


def damage(path, how):
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif how == "a pickle":
        torch.save({"w": torch.ones(2)}, path)
    elif how == "a model":
        vae_of().save(path)
    else:
        path.write_bytes(path.with_name("best.safetensors").read_bytes())


DAMAGES = ["cut off", "empty", "a bit", "a pickle", "a model", "the best"]


@pytest.mark.parametrize("how", DAMAGES)
def test_where_the_last_is_damaged_the_previous_is_used_with_a_warning(how, tmp_path):
    whole, vae = vae_of(), vae_of()
    expected = run(tmp_path / "whole", whole, validation=HELD_OUT)
    run(tmp_path / "damaged", validation=HELD_OUT)
    damage(tmp_path / "damaged" / "last.safetensors", how)
    with pytest.warns(
        UserWarning, match=r"`checkpoints`: '.*last\.safetensors' .*\. The previous checkpoint is used"
    ) as warned:
        found = run(tmp_path / "damaged", vae, validation=HELD_OUT)
    assert warned[0].filename == __file__
    assert found.history == expected.history
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vae.parameters(), whole.parameters(), strict=True))
    assert same(tmp_path / "whole", tmp_path / "damaged")


def test_a_damaged_checkpoint_never_replaces_the_previous_one(tmp_path, monkeypatch):
    run(tmp_path)
    damage(tmp_path / "last.safetensors", "cut off")
    previous = (tmp_path / "previous.safetensors").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.training.checkpoints.write", die)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="The previous checkpoint is used"):
        run(tmp_path, epochs=5)
    assert (tmp_path / "previous.safetensors").read_bytes() == previous


def test_where_all_are_damaged_nothing_is_done(tmp_path):
    run(tmp_path)
    for name in ("last.safetensors", "previous.safetensors"):
        damage(tmp_path / name, "cut off")
    with pytest.raises(FileFormatError, match=r"`checkpoints` must be an empty folder.*last\.safetensors' is damaged"):
        run(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_named_as_one(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"pyro_vae file, version 1, sha256 ...")
    with pytest.raises(FileFormatError, match=r"last\.ckpt' has version 1, which pyro_vae wrote before 0\.1\.0"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 15}, "`batch_size` must be 10, as in the run of '.*', got 15; use another folder"),
        ({"batch_size": None}, "`batch_size` must be 10.*got 30"),
        ({"seed": 6}, "`seed` must be 5.*got 6"),
        ({"compile": True}, "`compile` must be False.*got True"),
        ({"elbo": TraceMeanField_ELBO()}, "`elbo` must be 'Trace_ELBO'.*got 'TraceMeanField_ELBO'"),
        ({"data": X[:29]}, r"`data` must be '\(30, 2\) float32.*got '\(29, 2\) float32,"),
        ({"data": X.flip(0)}, r"`data` must be '\(30, 2\) float32, checksum.*got '\(30, 2\) float32, checksum \w+'"),
        ({"data": X + 1e-3}, "`data` must be .*got .*checksum"),
        ({"validation": HELD_OUT}, "`validation` must be None.*got"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(changes, message, tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    vae = vae_of()
    parameters = [parameter.clone() for parameter in vae.parameters()]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, vae, **changes)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vae.parameters(), parameters, strict=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path):
    run(tmp_path)
    other = vae_of(latent=3, decoder=likelihoods.Normal(3, 2, NET, scale="shared"))
    parameters = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match="is of another model") as error:
        run(tmp_path, other)
    for line in (
        "decoder.network.0.weight is (4, 1) float32 in the file and (4, 3) float32 in the model",
        "prior.raw is (2,) float32 in the file and (6,) float32 in the model",
    ):
        assert line in str(error.value)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(other.parameters(), parameters, strict=True))


# --- Finished runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [10, 12, None])
def test_more_epochs_continue_a_finished_run(batch_size, tmp_path):
    ours, theirs = vae_of(), vae_of()
    for epochs in (1, 2, 5):
        found = run(tmp_path / "in parts", ours, epochs=epochs, batch_size=batch_size, validation=HELD_OUT)
    expected = run(tmp_path / "at once", theirs, epochs=5, batch_size=batch_size, validation=HELD_OUT)
    assert found.history == expected.history
    assert found.steps == expected.steps
    assert same(tmp_path / "at once", tmp_path / "in parts")


def test_a_finished_run_returns_at_once(tmp_path):
    vae, again = vae_of(), vae_of()
    first = run(tmp_path, vae, validation=HELD_OUT)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    calls = []
    second = run(tmp_path, again, validation=HELD_OUT, callbacks=[calls.append])
    assert (second.history, second.steps, second.stopped) == (first.history, first.steps, first.stopped)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vae.parameters(), again.parameters(), strict=True))
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert calls == []


def test_a_run_that_patience_stopped_stays_finished_with_the_best_epoch(tmp_path):
    def best_of(vae):
        return [parameter.clone() for parameter in vae.parameters()]

    found = []
    for epochs in (60, 100):
        vae = vae_of()
        fitted = run(tmp_path, vae, epochs=epochs, lr=0.3, validation=HELD_OUT, patience=2)
        assert fitted.stopped == "patience"
        found.append((fitted.steps, fitted.history, best_of(vae)))
    assert found[0][:2] == found[1][:2]
    assert all(map(torch.equal, found[0][2], found[1][2]))


def test_the_best_epoch_can_be_loaded_in_one_line(tmp_path):
    states = []
    vae = vae_of()
    callbacks = [lambda epoch: states.append({name: t.clone() for name, t in vae.state_dict().items()})]
    fitted = run(tmp_path, vae, epochs=12, lr=0.3, validation=HELD_OUT, callbacks=callbacks)
    number = pv.Checkpoints(tmp_path).load_best(fresh := vae_of())
    bounds = fitted.history["validation_elbo"]
    assert bounds[number - 1] == max(bounds)
    assert all(torch.equal(tensor, states[number - 1][name]) for name, tensor in fresh.state_dict().items())
    with pytest.raises(
        ValueError, match=r"`module` must be the model of .*best.safetensors': decoder.network.0.weight is"
    ):
        pv.Checkpoints(tmp_path).load_best(vae_of(latent=2))
    with pytest.raises(FileNotFoundError, match=r"best\.safetensors"):
        pv.Checkpoints(tmp_path / "elsewhere").load_best(vae_of())


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "error", "message"),
    [
        (3, TypeError, "`folder` must be the path of a folder.*got a int"),
        ("a file", ValueError, "`folder` must be a folder.*got the file '.*'"),
        ("a file/in it", OSError, r"`checkpoints` must be a folder in which.*the folder '.*' cannot be made \(.*\)"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(folder, error, message, tmp_path):
    (tmp_path / "a file").touch()
    calls = []

    def model(x):
        calls.append(x)

    with pytest.raises(error, match=message):
        pv.fit(model, model, X, epochs=1, checkpoints=tmp_path / folder if isinstance(folder, str) else folder)
    assert calls == []


def test_a_folder_that_is_not_writable_is_refused_before_any_work(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"`checkpoints` must be in a folder.*nothing can be written in"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "`every_steps` must be .*got 0"),
        ({"every_seconds": 0}, "`every_seconds` must be .*got 0"),
        ({"every_seconds": float("nan")}, "`every_seconds` must be .*got nan"),
    ],
)
def test_intervals_that_are_not_positive_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pv.Checkpoints(tmp_path, **options)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    run(tmp_path)
    (tmp_path / f".{'0123' * 8}.partial").touch()
    (tmp_path / ".mine.partial").touch()
    run(tmp_path, epochs=4)
    assert {path.name for path in tmp_path.iterdir()} == {"last.safetensors", "previous.safetensors", ".mine.partial"}


def test_seconds_count_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pyro_vae.training.checkpoints.time.monotonic", lambda: now[0])
    checkpoints = pv.Checkpoints(tmp_path, every_seconds=10.0)
    assert not checkpoints.due(1)
    now[0] = 111.0
    assert checkpoints.due(2)
    checkpoints.save({}, {})
    assert not checkpoints.due(3)


def test_checkpoints_change_nothing_of_a_run(tmp_path):
    ours, theirs = vae_of(), vae_of()
    assert run(tmp_path, ours).history == run(None, theirs).history
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
