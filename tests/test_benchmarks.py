"""The benchmarks run in a short form, and their contestants compute the same; times are never asserted."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
try:
    cases, comparison, inputs, measuring, processes, result_tables = map(
        importlib.import_module, ("cases", "comparison", "inputs", "measuring", "processes", "result_tables")
    )
finally:
    sys.path.remove(str(BENCHMARKS))
HAS_NUMPYRO = importlib.util.find_spec("numpyro") is not None


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    """The benchmarks import modules of their own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def bench(out, *options):
    """Run the short form with these options, and return its results."""
    command = [sys.executable, str(BENCHMARKS), "--tiny", "--threads", "1", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(out / 'log.txt').read_text()}"
    assert (out / "results.md").read_text().count("\n## ") == done.stdout.count("## ")
    return json.loads((out / "results.json").read_text())


def losses(module, case, given, runs, **options):
    """Return the mean losses of a contestant for some seeds, in this process."""
    run = inputs.runner(module, case.task, **options)
    found = [run(case, given, lambda _: None, epochs=case.check, rows=case.check_rows, seed=seed) for seed in runs]
    return {name: [sum(each[name]) / len(each[name]) for each in found] for name in found[0]}


def inputs_of(case, folder):
    inputs.write(case, folder)
    return inputs.read(case, folder)


@pytest.mark.parametrize("name", cases.CASES)
def test_contestants_compute_the_same(name, tmp_path):
    case = cases.shortened(cases.CASES[name])
    data = inputs_of(case, tmp_path)
    reference = "plain_pyro" if case.task == "export" else "handwritten"
    results = {reference: {"losses": losses(reference, case, data, range(100, 108))}}
    results["ours"] = {"losses": losses("ours", case, data, range(3))}
    results["plain_pyro"] = results.get("plain_pyro", {"losses": losses("plain_pyro", case, data, range(3))})
    compared = measuring.agreement(results, reference)["contestants"]
    assert {judged["contestant"] for judged in compared} == {"ours", "plain_pyro"} - {reference}
    for judged in compared:
        assert judged["agrees"], judged
        assert judged["allowed"] < 0.05 * abs(judged["reference_loss"]) or name in ("export", "mixture"), judged


def test_a_contestant_has_the_engine_of_its_name(tmp_path, monkeypatch):
    case = cases.shortened(cases.CASES["mixture"])
    data, fitted, fit = inputs_of(case, tmp_path), [], pv.fit
    monkeypatch.setattr(pv, "fit", lambda *args, **options: fitted.append(fit(*args, **options)) or fitted[-1])
    found = {}
    for name in ("replayed", "eager"):
        run = inputs.runner("ours", "train", **processes.CONTESTANTS[name].options)
        found[name] = run(case, data, lambda _: None, epochs=200, rows=case.rows, seed=0)
        assert fitted[-1].engine.startswith(name)
    assert found["replayed"] == found["eager"]


CHANGES = {
    "mixture": {"lr": 2e-2}, "digits": {"activation": "relu"}, "gumbel": {"temperatures": (0.67, 0.5)},
    "importance": {"latent": (40,)}, "enumerated": {"guide": "normal"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES)
def test_another_model_is_detected(name, change, tmp_path):
    case = cases.CASES[name] if name == "mixture" else cases.shortened(cases.CASES[name])
    another = replace(case, **change)
    results = {
        "handwritten": {"losses": losses("handwritten", case, inputs_of(case, tmp_path), range(16))},
        "another": {"losses": losses("handwritten", another, inputs_of(another, tmp_path), range(100, 104))},
    }
    compared = measuring.agreement(results, "handwritten")["contestants"]
    assert compared
    assert not all(judged["agrees"] for judged in compared)


def test_the_floor_computes_the_products_of_a_step(tmp_path):
    floor, layers = importlib.import_module("floor"), [(784, 400), (400, 40)]
    products = [*floor.forward(layers, 128), *floor.backward(layers, 128, reach_inputs=False)]
    operations = sum(left.shape[0] * left.shape[1] * right.shape[1] for _, left, right in products)
    assert operations == 128 * (2 * 784 * 400 + 3 * 400 * 40)  # nothing needs the gradient of the data
    assert all(out.shape == (left.shape[0], right.shape[1]) for out, left, right in products)


def test_the_floor_takes_the_faster_way_and_both_are_the_product(monkeypatch):
    floor = importlib.import_module("floor")
    out, left, right = torch.empty(3, 4), torch.randn(3, 5), torch.randn(4, 5).T
    floor.by_mkl(out, left, right)
    assert torch.allclose(out, floor.by_onednn(out, left, right), atol=1e-6)
    for quick in (floor.by_mkl, floor.by_onednn):
        monkeypatch.setattr(floor, "_seconds", lambda way, quick=quick: 1.0 if way.func is quick else 2.0)
        assert floor.faster((out, left, right)).func is quick


def test_a_slower_contestant_misses_its_target():
    times = {"captured": 2.0, "numpyro": 2.5, "replayed": 6.4, "handwritten": 4.0}
    found = {"mixture": {"contestants": {name: {"time": time} for name, time in times.items()}}}
    report = result_tables.of_targets(found)
    assert report.count("missed") == report.count("met") == 1


def results(times, cases=("mixture",), **machine):
    """Results of one contestant with these times of a step in each case."""
    entrant = measuring.Entrant("eager")
    entrant.found["begun_with"] = {"peak": 1.0}
    entrant.turns = [{"seconds": 10 * each, "work": 10, "peak": 2.0} for each in times]
    described = {"processor": "one", "load": times[0], "packages": {"torch": "2"}} | machine
    found = {name: {"contestants": {"eager": entrant.result()}} for name in cases}
    return {"machine": described, "settings": {"rounds": 3}, "cases": found, "growth": {}, "minutes": 1.0}


@pytest.mark.parametrize(
    ("times", "said"), [([2.0, 2.1, 2.2], "slower"), ([0.5, 0.51, 0.52], "faster"), ([0.9, 1.02, 1.3], None)]
)
def test_a_comparison_names_what_changed_by_more_than_the_noise(times, said):
    line = comparison.compare(results([0.9, 1.0, 1.1]), results(times)).splitlines()[-1]
    assert f" {times[1]:.2f} " in line
    assert [word for word in ("slower", "faster") if word in line] == ([said] if said else [])


def test_a_comparison_says_what_is_not_the_same_about_two_runs():
    first, second = results([1.0, 1.0]), results([2.0, 2.0], processor="two", packages={"torch": "3"})
    report = comparison.compare(first, second)
    assert "- processor: one, two" in report
    assert "- torch: 2, 3" in report
    assert "load" not in report
    assert "These are not the same" not in comparison.compare(first, first)
    assert "in common" in comparison.compare(first, results([1.0], cases=("digits",)))


def test_parts_of_one_run_are_merged_and_no_others():
    first, second = results([1.0, 2.0]), results([3.0, 4.0], cases=("digits",))
    merged = comparison.merge({"a": first, "b": second})
    assert merged["cases"] == first["cases"] | second["cases"]
    assert merged["minutes"] == 2.0
    with pytest.raises(SystemExit, match="mixture of c is in a file before it"):
        comparison.merge({"a": first, "b": second, "c": first})
    with pytest.raises(SystemExit, match="a and d are not parts of one run:\n- processor: one, two"):
        comparison.merge({"a": first, "d": results([1.0], cases=("gumbel",), processor="two")})


def test_the_clock_of_the_processor_stands_still_while_a_process_sleeps():
    clocks = importlib.import_module("worker").CLOCKS

    def seconds(name, do):
        begun = clocks[name]()
        do()
        return clocks[name]() - begun

    assert seconds("wall", lambda: time.sleep(0.2)) >= 0.2
    assert seconds("processor", lambda: time.sleep(0.2)) < 0.1
    assert seconds("processor", lambda: sum(range(10**6))) > 0


def test_quartiles_hold_the_middle_half_of_the_rounds():
    found = results([5.0, 1.0, 2.0, 4.0, 3.0])["cases"]["mixture"]["contestants"]["eager"]
    assert [found[key] for key in ("fastest", "lower", "time", "upper", "slowest")] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.slow
def test_the_short_form(tmp_path):
    names = ["eager", "handwritten", *["numpyro"] * HAS_NUMPYRO, "floor"]
    found = bench(tmp_path, "--cases", "mixture", "--growth", "mapped", "--contestants", *names)
    case = found["cases"]["mixture"]
    assert list(case["contestants"]) == names
    for result in case["contestants"].values():
        assert 0 < result["fastest"] <= result["lower"] <= result["time"] <= result["upper"] <= result["slowest"]
        assert len(result["turns"]) == found["settings"]["rounds"]
        assert all(turn["work"] > 0 for turn in result["turns"])
        assert result["peak"] >= result["begun_with"]["peak"] > 0
    agreement = case["agreement"]
    assert agreement["reference"] == "handwritten"
    assert [judged["contestant"] for judged in agreement["contestants"]] == names[:1] + names[2:-1]
    assert all(judged["agrees"] for judged in agreement["contestants"])
    assert [point["case"]["rows"] for point in found["growth"]["mapped"]["points"]] == [20_000]


def test_a_task_without_a_contestant_gives_an_empty_table(tmp_path):
    found = bench(tmp_path, "--cases", "--growth", "evidence-draws", "--contestants", "captured")
    assert all(point["contestants"] == {} for point in found["growth"]["evidence-draws"]["points"])


NUMPYRO = """
import json, sys
from pathlib import Path
import cases, inputs

found = {}
for name in sys.argv[2:]:
    case = cases.shortened(cases.CASES[name])
    given, run = inputs.read(case, Path(sys.argv[1]) / name), inputs.runner("numpyro_scan", case.task)
    losses = run(case, given, lambda _: None, epochs=case.check, rows=case.check_rows, seed=0)
    found[name] = {bound: [sum(values) / len(values)] for bound, values in losses.items()}
print(json.dumps(found))
"""


@pytest.mark.skipif(not HAS_NUMPYRO, reason="needs the extra `bench`")
def test_numpyro_computes_the_same(tmp_path):
    names = ["gumbel", "importance", "enumerated", "evidence"]  # and the mixture above
    data = {name: inputs_of(cases.shortened(cases.CASES[name]), tmp_path / name) for name in names}
    # In a separate process, since JAX starts threads.
    command = [sys.executable, "-c", NUMPYRO, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        case = cases.shortened(cases.CASES[name])
        results = {"handwritten": {"losses": losses("handwritten", case, data[name], range(100, 108))}}
        results["numpyro"] = {"losses": found}
        (judged,) = measuring.agreement(results, "handwritten")["contestants"]
        assert judged["agrees"], (name, judged)


@pytest.mark.slow
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("name", [name for name, case in cases.CASES.items() if case.task == "train"])
def test_the_captured_step_computes_the_same(name, by_step, tmp_path):
    case = cases.shortened(cases.CASES[name])
    data = inputs_of(case, tmp_path)
    results = {"handwritten": {"losses": losses("handwritten", case, data, range(100, 116))}}
    results["captured"] = {"losses": losses("ours", case, data, [0], compile=True, by_step=by_step)}
    (judged,) = measuring.agreement(results, "handwritten")["contestants"]
    assert judged["agrees"], judged
