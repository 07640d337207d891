"""Sweeps with real worker processes, on Ray and Optuna: killed, interrupted, stopped early, failed, resumed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from swept import OPTIONS, TRAINING, VALIDATION, make_followed, make_vae, processes_by_epoch

import pyro_vae as pv

SPACE = {"latent": [1, 2, 3], "lr": [0.1, 0.01, 0.001, 0.0001]}
NEEDS_RAY = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
on_both = pytest.mark.parametrize("engine", [pytest.param("ray", marks=NEEDS_RAY), "optuna"])


def numbers(result):
    return {
        (run.settings["latent"], run.settings["lr"], run.seed): (run.elbo, *run.rows)
        for runs in result.runs
        for run in runs
    }


def children():
    """The processes of this one, and theirs."""
    found, todo = [], [os.getpid()]
    while todo:
        process = todo.pop()
        try:
            own = [
                int(child)
                for task in Path(f"/proc/{process}/task").iterdir()
                for child in (task / "children").read_text().split()
            ]
        except FileNotFoundError:  # it has ended meanwhile
            continue
        found += own
        todo += own
    return found


_BY_IMPORTS = ("PYTEST", "TORCHINDUCTOR", "RAY_CLIENT_MODE")  # variables that others set


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(_BY_IMPORTS)}


@pytest.fixture
def _clean():
    """A sweep leaves no process, no variable of the environment and no handler of a signal."""
    variables = environment()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    processes = set(children())
    yield
    assert environment() == variables
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    end = time.monotonic() + 60
    while left := set(children()) - processes:
        assert time.monotonic() < end, [Path(f"/proc/{process}/cmdline").read_text() for process in left]
        time.sleep(0.1)


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("_clean")]


def swept(make, folder, engine, space=SPACE, **options):
    return pv.sweep(make, space, TRAINING, validation=VALIDATION, folder=folder, engine=engine, **OPTIONS | options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The sweep in this process, without an engine and without a kill."""
    folder = tmp_path_factory.mktemp("here")
    return pv.sweep(make_vae, SPACE, TRAINING, validation=VALIDATION, folder=folder, engine=None, **OPTIONS)


@on_both
def test_a_sweep_with_a_killed_worker_is_complete_with_the_numbers_of_runs_without_a_kill(
    engine, tmp_path, undisturbed
):
    """12 runs by 2 workers, one of which is killed in the middle of training."""
    victim = (2, 0.01)
    make = make_followed(tmp_path, victim)
    result = pv.sweep(make, SPACE, TRAINING, validation=VALIDATION, folder=tmp_path / engine, engine=engine, **OPTIONS)
    assert (tmp_path / "latent 2, lr 0.killed").exists()
    assert result.table["status"].tolist() == ["complete"] * 12
    resumed = processes_by_epoch(tmp_path, "latent 2, lr 0.01")
    assert resumed in ([[1, 2, 3], [3, 4, 5]], [[1, 2, 3], [4, 5]])
    others = {int(path.name[7]): processes_by_epoch(tmp_path, path.name) for path in tmp_path.glob("latent [13]*")}
    assert all(each == [[1, 2, 3, 4, 5]] for each in others.values())
    assert numbers(result) == numbers(undisturbed)
    again = pv.sweep(make, SPACE, TRAINING, validation=VALIDATION, folder=tmp_path / engine, engine=engine, **OPTIONS)
    assert again.table.equals(result.table)  # no process was started
    assert processes_by_epoch(tmp_path, "latent 2, lr 0.01") == resumed


SMALL = {"latent": [1, 2], "lr": [0.1, 0.01]}


def make_or_fail(latent, lr):
    """One that diverges, one that is wrong, and two that are good."""
    if (latent, lr) == (1, 0.1):
        raise LookupError("no such prior")
    return make_vae(latent, 1e30 if lr == 0.1 else lr)


@pytest.mark.slow
@on_both
def test_runs_that_fail_are_in_the_table_with_their_messages_and_are_tried_again(engine, tmp_path):
    result = swept(make_or_fail, tmp_path, engine, SMALL, seeds=[4, 7], every_seconds=30.0)
    table = result.table.set_index(["latent", "lr"])
    assert table["status"].to_dict() == {
        (1, 0.1): "failed",
        (2, 0.1): "failed",
        (1, 0.01): "complete",
        (2, 0.01): "complete",
    }
    assert table["message"][1, 0.1] == "LookupError: no such prior"
    assert table["message"][2, 0.1].startswith("FloatingPointError: ")
    done = [run.folder / "run.json" for runs in result.runs for run in runs if run.status == "complete"]
    assert len(done) == 4
    before = [path.stat().st_mtime_ns for path in done]
    mended = swept(make_vae, tmp_path, engine, SMALL, seeds=[4, 7], every_seconds=30.0)
    assert mended.table["status"].tolist() == ["complete"] * 4
    assert [path.stat().st_mtime_ns for path in done] == before


@pytest.mark.slow
@on_both
def test_bad_runs_are_stopped_early_and_the_best_of_all_is_complete(engine, tmp_path):
    """The good ones come first, so that the others are compared with them, whatever their order in time."""
    space = {"latent": [1], "lr": [0.02, 0.01, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4]}
    result = swept(
        make_vae, tmp_path, engine, space, epochs=40, early_stopping=5, workers=1, seeds=2, every_seconds=30.0
    )
    table = result.table
    assert table["status"][0] == "complete"
    assert table["lr"][0] in (0.02, 0.01)
    stopped = table[table["status"] == "stopped"]
    assert len(stopped) >= 4
    assert (stopped["epochs"] < 80).all()
    assert stopped["elbo"].isna().all()
    assert len(result.to_datatree()["training"]["epoch"]) == 40


@pytest.mark.slow
@on_both
def test_a_searcher_of_the_engine_proposes_settings_by_the_results(engine, tmp_path):
    space = {"latent": [1, 2], "lr": pv.sweeps.log_uniform(1e-4, 1e-1), "width": pv.sweeps.integers(1, 3)}
    make = make_of_three
    result = swept(make, tmp_path, engine, space, search=searcher(engine), num_settings=4, seeds=2, every_seconds=30.0)
    assert result.table["status"].tolist() == ["complete"] * 4
    assert len(set(result.table["lr"])) == 4
    assert (result.table["lr"].between(1e-4, 1e-1) & result.table["width"].isin([1, 2, 3])).all()
    more = swept(make, tmp_path, engine, space, search=searcher(engine, 1), num_settings=5, seeds=2, every_seconds=30.0)
    assert set(result.table["elbo"]) < set(more.table["elbo"])
    assert len(more.table) == 5


def searcher(engine, seed=0):
    if engine == "ray":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=seed)
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=2)


def make_of_three(latent, lr, width):
    return make_vae(latent, lr)


SCRIPT = """
import sys
import pyro_vae as pv
sys.path.insert(0, {tests!r})
from swept import OPTIONS, TRAINING, VALIDATION, make_vae

class Slow:
    def __call__(self, epoch):
        if {sleep}:
            import time
            time.sleep({sleep})

def make(latent, lr):
    return make_vae(latent, lr, callbacks=[Slow()])

print("begin", flush=True)
result = pv.sweep(make, {space!r}, TRAINING, validation=VALIDATION, folder={folder!r}, engine={engine!r}, **OPTIONS)
print(result.table["status"].tolist(), result.table["elbo"].tolist())
"""


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_sweep_of_a_script_that_is_ended_resumes_when_it_is_called_again(engine, how, tmp_path):
    """Functions and classes of a script without a guard of ``__main__``; the second call has other ones."""
    folder = tmp_path / "sweep"

    def start(sleep):
        values = {"tests": str(Path(__file__).parent), "space": SMALL, "folder": str(folder), "engine": engine}
        (tmp_path / "script.py").write_text(SCRIPT.format(sleep=sleep, **values))
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start(1.0)
    while not [path for path in folder.glob("runs/*/*/history.jsonl") if "[2," in path.read_text()]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(how)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert how == signal.SIGKILL or "KeyboardInterrupt" in error
    begun = [path.read_text().count("\n\n") for path in folder.glob("runs/*/*/history.jsonl")]
    assert begun
    resumed = start(0)
    printed, error = resumed.communicate(timeout=300)  # Ray starts slowly on a busy machine
    assert resumed.returncode == 0, error
    assert printed.splitlines()[-1].startswith(str(["complete"] * 4))
    undisturbed = swept(make_vae, tmp_path / "here", None, SMALL)
    assert printed.splitlines()[-1] == f"{['complete'] * 4} {undisturbed.table['elbo'].tolist()}"


def always_killed(epoch):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@on_both
def test_a_run_that_is_killed_each_time_has_failed_and_all_failed_runs_are_an_error(engine, tmp_path):
    make = make_killed
    with pytest.raises(
        RuntimeError,
        match=r"(?s)the only settings of the sweep failed, .*latent 1, lr 0.1, with seed 0: its process ended 2 times",
    ):
        swept(make, tmp_path, engine, {"latent": [1], "lr": [0.1]}, retries=1)


def make_killed(latent, lr):
    return make_vae(latent, lr, callbacks=[always_killed])
