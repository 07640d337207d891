"""Settings are drawn from the space that was given: all, or some at random, none twice."""

import numpy as np
import pytest
from scipy import stats

import pyro_vae as pv
from pyro_vae import priors
from pyro_vae.sweeps.space import Space, settings_text


def test_without_a_number_all_combinations_of_values_are_drawn_in_order():
    space = Space({"latent": [1, 2], "prior": {"flat": 1.0, "narrow": 0.1}})
    assert space.draw(None, 0) == [
        {"latent": 1, "prior": "flat"}, {"latent": 1, "prior": "narrow"},
        {"latent": 2, "prior": "flat"}, {"latent": 2, "prior": "narrow"},
    ]  # fmt: skip
    assert space.values_of({"latent": 2, "prior": "narrow"}) == {"latent": 2, "prior": 0.1}


@pytest.mark.parametrize("space", [
    {"latent": [1, 2, 3], "hidden": [4, 8]},
    {"latent": pv.sweeps.integers(1, 3), "hidden": [4, 8]},
], ids=["lists", "range"])  # fmt: skip
def test_settings_are_drawn_once_each_up_to_all_of_them_and_follow_from_the_seed(space):
    drawn = [Space(space).draw(6, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for each in drawn:
        assert {(settings["latent"], settings["hidden"]) for settings in each} == {
            (n, m) for n in (1, 2, 3) for m in (4, 8)
        }
    assert Space(space).draw(3, 0) == drawn[0][:3]


@pytest.mark.parametrize(("values", "exact"), [
    (pv.sweeps.uniform(-1.0, 3.0), stats.uniform(-1.0, 4.0)),
    (pv.sweeps.log_uniform(1e-3, 10.0), stats.loguniform(1e-3, 10.0)),
], ids=["uniform", "log_uniform"])  # fmt: skip
def test_real_numbers_have_the_distribution_of_their_range(values, exact):
    numbers = [settings["a"] for settings in Space({"a": values}).draw(4000, 0)]
    assert stats.kstest(numbers, exact.cdf).pvalue > 1e-5


@pytest.mark.parametrize("log", [False, True])
def test_integers_have_the_distribution_of_their_range_with_both_ends(log):
    values, draws = pv.sweeps.integers(2, 9, log=log), np.random.default_rng(0).random(20_000)
    counts = np.bincount([values.at(draw) for draw in draws], minlength=11)
    edges = np.arange(2, 11)
    exact = np.diff(np.log(edges) if log else edges).astype(float)
    assert counts[:2].sum() == counts[10] == 0
    assert stats.chisquare(counts[2:10], exact / exact.sum() * len(draws)).pvalue > 1e-5


def test_functions_and_classes_are_labelled_by_their_names():
    space = Space({"prior": [priors.StandardNormal, priors.Laplace], "scale": [np.float32(0.5), None]})
    assert space.draw(None, 0)[2] == {"prior": "Laplace", "scale": 0.5}
    assert space.values_of({"prior": "Laplace", "scale": 0.5}) == {"prior": priors.Laplace, "scale": np.float32(0.5)}
    assert settings_text({"prior": "Laplace", "scale": 1 / 3}) == "prior Laplace, scale 0.3333"


@pytest.mark.parametrize(("space", "count", "message"), [
    ({}, None, "`space` must have a setting or more"),
    (["lr"], None, "`space` must be a mapping"),
    ({"lr": 0.1}, None, r"`space\['lr'\]` must be a list of values, .* got a float"),
    ({"lr": "high"}, None, r"`space\['lr'\]` must be a list of values, .* got a str"),
    ({"lr": []}, None, r"`space\['lr'\]` must have a value or more, got none"),
    ({"lr": [0.1, 0.1]}, None, r"`space\['lr'\]` must have values that differ, got 0.1 twice"),
    ({"a": [1, 1.0]}, None, "got 1.0 twice"),
    ({"net": [lambda: 1]}, None, r"`space\['net'\]` must be a mapping from labels to values, .* got a function"),
    ({"a": [float("nan")]}, None, "must have strings or finite numbers as labels, got nan"),
    ({"lr": pv.sweeps.uniform(0, 1)}, None, "`num_settings` must be given where the space has a range, as 'lr'"),
    ({"lr": [0.1, 0.2]}, 3, "`num_settings` must be at most 2, all that the space has, got 3"),
    ({"lr": [0.1, 0.2]}, 0, "`num_settings` must be a positive integer, got 0"),
])  # fmt: skip
def test_a_wrong_space_is_refused_with_its_setting(space, count, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Space(space).draw(count, 0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: pv.sweeps.uniform(1.0, 1.0), "`high` must be above `low`, which is 1.0, got 1.0"),
    (lambda: pv.sweeps.log_uniform(0.0, 1.0), "`low` must be a positive number in a logarithmic range, got 0.0"),
    (lambda: pv.sweeps.integers(1, 2.5), "`high` must be an integer, got 2.5"),
    (lambda: pv.sweeps.integers(0, 2, log=True), "`low` must be a positive integer in a logarithmic range, got 0"),
    (lambda: pv.sweeps.uniform("a", 1.0), "`low` must be a finite number, got 'a'"),
])  # fmt: skip
def test_a_wrong_range_is_refused_with_its_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
