"""The cost model is that of the formulas, and agrees with simulations and counts; `make scale` runs in a short form."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

SCALING = Path(__file__).parent / "scaling"
sys.path.append(str(SCALING))
try:
    cost_model, workloads, page = map(importlib.import_module, ("cost_model", "workloads", "page"))
finally:
    sys.path.remove(str(SCALING))
LINK = cost_model.Link(latency=1e-5, bandwidth=1e9)
NEAR = cost_model.Cluster(LINK, LINK, ranks_per_machine=64)
WORK = cost_model.Work(parameters=250_000, fixed=1e-3, per_row=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_of_messages_takes_the_time_of_the_formula(ranks):
    found = cost_model.simulate_ring(np.zeros(ranks), 1e6, LINK)
    assert found == pytest.approx(cost_model.ring(1e6, ranks, LINK))
    # By hand: each rank sends 2(K - 1) messages of a K-th of a megabyte, at a gigabyte a second.
    assert found == pytest.approx(2 * (ranks - 1) * (1e-5 + 1e-3 / ranks))


def test_a_ring_ends_at_most_one_sum_after_its_last_rank():
    ready = np.random.default_rng(0).exponential(1e-2, 16)
    found, alone = cost_model.simulate_ring(ready, 1e6, LINK), cost_model.ring(1e6, 16, LINK)
    assert (found <= ready.max() + alone + 1e-12).all()
    assert (found >= ready.max()).all()


def test_one_rank_sums_nothing_and_machines_sum_parts():
    assert cost_model.step(WORK, NEAR, 1, 1024).seconds == pytest.approx(1e-3 + 1024e-5)
    far = cost_model.Cluster(LINK, cost_model.Link(1e-4, 1e8), ranks_per_machine=4)
    inside = 2 * 3 * 1e-5 + 2 * 3 / 4 * 1e6 / 1e9
    between = 2 * 1e-4 + 2 / 2 * 0.25e6 / 1e8
    assert cost_model.all_reduce(1e6, 8, far) == pytest.approx(inside + between)
    assert cost_model.all_reduce(1e6, 4, far) == pytest.approx(inside)


def test_a_few_numbers_take_as_many_messages_as_a_tree_has_levels():
    found = [cost_model.collected(ranks, LINK) for ranks in (1, 2, 3, 4, 5, 64)]
    messages, received = np.array([0, 2, 3, 3, 4, 7]), np.array([0, 1, 2, 3, 4, 63])
    assert found == pytest.approx(1e-5 * messages + cost_model.RECEIVE * received)
    alone = cost_model.step(WORK, NEAR, 8, 1024).seconds
    with_exchange = cost_model.step(WORK, replace(NEAR, exchange=LINK), 8, 1024).seconds
    assert with_exchange - alone == pytest.approx(cost_model.collected(8, LINK))


def test_the_largest_share_of_rows_decides_and_readers_share_a_disk():
    assert cost_model.step(WORK, NEAR, 4, 9).compute == pytest.approx(1e-3 + 3e-5)
    work = cost_model.Work(0, 0.0, 0.0, row_bytes=1000.0)
    disk = cost_model.Cluster(LINK, LINK, 4, read_rank=3e6, read_machine=4e6)
    seconds = [cost_model.step(work, disk, ranks, 1200).reading for ranks in (1, 2, 4, 8)]
    assert seconds == pytest.approx([0.4, 0.3, 0.3, 0.15])


def test_strong_scaling_ends_where_compute_is_as_long_as_the_rest():
    """Without fixed times, K ranks have the efficiency C / (C + K A)."""
    work = cost_model.Work(parameters=250_000, fixed=0.0, per_row=1e-5)
    for ranks in (2, 4, 16):
        summed = cost_model.ring(1e6, ranks, LINK)
        expected = 1 / (1 + ranks * summed / 10.24e-3)
        assert cost_model.efficiency(work, NEAR, ranks, 1024) == pytest.approx(expected)
        weak = 1 / (1 + summed / 10.24e-3)
        assert cost_model.efficiency(work, NEAR, ranks, 1024, weak=True) == pytest.approx(weak)
    useful = cost_model.largest_useful(work, NEAR, 1024)
    assert cost_model.efficiency(work, NEAR, useful, 1024) >= 0.5 > cost_model.efficiency(work, NEAR, 2 * useful, 1024)


def test_work_and_link_are_found_again_from_their_times():
    batches = (256, 512, 1024)
    times = [cost_model.step(WORK, NEAR, 1, batch).seconds for batch in batches]
    found = cost_model.fitted_work(WORK.parameters, batches, times)
    assert (found.fixed, found.per_row) == pytest.approx((WORK.fixed, WORK.per_row))
    sums = [(size, cost_model.ring(size, 4, LINK)) for size in (32, 1e6)]
    found = cost_model.fitted_link(4, *sums)
    assert (found.latency, found.bandwidth) == pytest.approx((LINK.latency, LINK.bandwidth))


@pytest.mark.parametrize("ranks", [1, 2, 7, 64])
def test_the_expected_maximum_of_exponential_times_is_a_harmonic_number(ranks):
    harmonic = sum(1 / number for number in range(1, ranks + 1))
    assert cost_model.expected_maximum(stats.expon.isf, ranks) == pytest.approx(harmonic, abs=1e-4)


@pytest.mark.parametrize("ranks", [2, 8])
def test_stragglers_cost_what_their_maximum_says(ranks):
    """Each step waits for its slowest rank: the simulation of messages agrees with the integral over quantiles."""
    variation, steps = 0.2, 4000
    quick = cost_model.Cluster(cost_model.Link(1e-9, 1e15), LINK, ranks_per_machine=64)
    sigma = np.sqrt(np.log1p(variation**2))
    times = stats.lognorm(sigma, scale=np.exp(-(sigma**2) / 2))
    own = cost_model.step(WORK, quick, ranks, 1024).compute
    expected = own * cost_model.expected_maximum(times.isf, ranks)
    found = cost_model.simulate_training(WORK, quick, ranks, 1024, steps, variation)
    assert found == pytest.approx(expected, abs=5 * own * variation / np.sqrt(steps))
    assert expected > 1.1 * own
    still = cost_model.simulate_training(WORK, NEAR, ranks, 1024, 10, variation=0.0)
    assert still == pytest.approx(cost_model.step(WORK, NEAR, ranks, 1024).seconds)


def test_flops_are_those_counted_by_hand():
    """Three products for each weight of a layer, but two in the first one, whose input needs no gradient."""
    found = workloads.counted("counts")
    layers = {"first": 2000 * 128, "others": 128 * 20 + 10 * 128 + 128 * 2000}
    assert found.flops == 2 * (2 * layers["first"] + 3 * layers["others"])
    assert found.parameters == sum(layers.values()) + 128 + 20 + 128 + 2000 + 2000
    encoder = [32 * 32 * 27 * 32, 16 * 16 * 288 * 64, 8 * 8 * 576 * 128, 4 * 4 * 1152 * 256, 4096 * 128]
    decoder = [64 * 4096, 4 * 4 * 256 * 9 * 128, 8 * 8 * 128 * 9 * 64, 16 * 16 * 64 * 9 * 32, 32 * 32 * 32 * 9 * 3]
    assert workloads.counted("images").flops == 2 * (3 * sum(encoder + decoder) - encoder[0])


def test_the_numbers_of_the_page_are_those_of_the_run_and_the_model():
    run, text = json.loads(page.RUN.read_text()), page.PAGE.read_text()
    assert page.fill(text, run) == text, "python tests/scaling/page.py results/scaling.json"
    assert {found[2] for found in page.FRAGMENT.finditer(text)} == set(page.FRAGMENTS)
    for name in workloads.WORKLOADS:
        found = workloads.counted(name)
        for key, value in run["counted"][name].items():
            assert value == pytest.approx(getattr(found, key), rel=0.1), "torch counts other operations than before"
    # The prediction for two ranks comes from one rank and from sums alone; other load adds to the time on the clock.
    model = run["model"]
    assert 1 / 1.5 < model["two_processor"] / model["two"] < 1.5


@pytest.mark.slow
def test_scaling_is_measured_in_a_short_form(tmp_path):
    out = tmp_path / "scaling.json"
    command = [sys.executable, str(SCALING), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{done.stderr}\n{out.with_suffix('.log').read_text()}"
    found = json.loads(out.read_text())
    assert set(found["gains"]) == {"strong"}
    assert {len(turns["wall"]) for turns in found["turns"].values()} == {found["settings"]["rounds"]}
    one, two = (found["held_out"][ranks] for ranks in "12")
    assert abs(two["difference"]) < 10 * (two["difference_error"] + 1)
    assert -600 < one["mean"] < -400
    assert "| strong" in done.stdout
    assert page.fill("<!-- scaling: measured -->\n<!-- end -->", page.kept(found)).count("|") > 4
