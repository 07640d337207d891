"""The numbers by hand are right by Pyro alone, before the package is compared with them."""

import math
import statistics

import pytest

from programs import harness
from programs.by_hand import importance_sampling

GLOBAL = [
    "baseball", "bayesian_network", "capture_recapture", "change_point", "crossed_effects", "eight_schools",
    "flow_guide", "forecasting", "gaussian_process", "kalman", "mixture", "poisson_regression", "radon",
    "state_space", "survival",
]  # fmt: skip
"""Programs of few latents, for all data together, whose guide is close enough for importance sampling."""
FAST = {"survival", "hmm", "missing_labels"}


def test_there_are_enough_programs_each_with_an_answer_by_hand():
    assert len(harness.NAMES) >= 24
    assert set(GLOBAL) <= set(harness.NAMES)


@pytest.mark.filterwarnings("ignore")  # of Pyro, as its users see them
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in harness.NAMES]
)
def test_log_evidence_by_hand_is_above_the_elbo(name):
    trained = harness.Trained(name)
    program = trained.trained()
    elbo, error = harness.elbo_by_hand(program, 50)
    assert math.isfinite(trained.log_evidence)
    gap = trained.log_evidence - elbo
    # Too large a number by hand is seen as well: no guide of these is off by more than a tenth.
    assert -5 * error - 1e-3 < gap < 0.1 * abs(trained.log_evidence) + 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("name", GLOBAL)
def test_log_evidence_by_hand_is_that_of_importance_sampling(name):
    trained = harness.Trained(name)
    program = trained.trained()
    estimates = [float(importance_sampling(program, 200)) for _ in range(10)]
    error = statistics.stdev(estimates) / 10**0.5
    assert statistics.fmean(estimates) == pytest.approx(trained.log_evidence, abs=6 * error + error**2 * 10 + 0.02)
