"""The band and the p-value of uniform integers, compared with an enumeration of all samples."""

import itertools

import numpy as np
import pytest

from pyro_vae.diagnostics.uniformity import p_value, simultaneous_band

NUM, CELLS = 5, 3
SAMPLES = [np.array(sample) for sample in itertools.product(range(CELLS), repeat=NUM)]


def test_a_p_value_is_the_probability_of_a_p_value_as_small():
    p_values = np.array([p_value(sample, CELLS) for sample in SAMPLES])
    assert len(set(p_values.round(9))) > 3
    for value in p_values:
        assert (p_values <= value + 1e-9).mean() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_the_band_contains_at_least_its_level_of_all_samples(level):
    lower, upper = simultaneous_band(NUM, CELLS, level)
    ecdf = np.array([np.bincount(sample, minlength=CELLS).cumsum()[:-1] / NUM for sample in SAMPLES])
    assert ((lower <= ecdf) & (ecdf <= upper)).all(1).mean() >= level
