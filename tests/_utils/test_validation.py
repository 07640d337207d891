"""Errors for invalid arguments name the argument, in all chapters; numbers of NumPy are accepted."""

from functools import partial

import numpy as np
import pytest
import torch
from pairs import gaussian

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.handlers import WeightKL

LINEAR = networks.linear()


NUMBERS = {
    "rate": partial(schedules.exponential, 1.0),
    "floor": partial(schedules.exponential, 1.0, 0.1),
    "start": partial(schedules.linear, end=1.0, steps=3),
    "end": partial(schedules.decayed, 1.0, 3, 0.5),
    "hold": partial(schedules.decayed, 1.0, 3),
    "rise": partial(schedules.cyclical, 0.0, 1.0, 3),
    "value": schedules.constant,
    "weight": WeightKL,
    "min_scale": lambda value: likelihoods.Normal(2, 3, LINEAR, min_scale=value),
    "num_samples": gaussian().generate,
}


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), [0.5]])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_value_that_is_no_number_raises(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a.*got"):
        NUMBERS[name](value)


FLAGS = {
    "missing": lambda value: likelihoods.Poisson(2, 3, LINEAR, missing=value),
    "soft_targets": lambda value: likelihoods.Bernoulli(2, 3, LINEAR, soft_targets=value),
    "learnable": lambda value: priors.Laplace(2, learnable=value),
    "straight_through": lambda value: priors.RelaxedBernoulli(2, 0.5, straight_through=value),
}


@pytest.mark.parametrize("value", ["no", None, 1])
@pytest.mark.parametrize("name", FLAGS)
def test_a_value_that_is_not_boolean_raises(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be True or False, got"):
        FLAGS[name](value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: networks.standardized(LINEAR, loc="a"), "`loc` must be a number or a tensor of them.*got 'a'"),
        (lambda: networks.standardized(LINEAR, scale=None), "`scale` must be a number.*got None"),
        (lambda: priors.Bernoulli(2, probs="a"), "`probs` must be a number.*got 'a'"),
        (lambda: pv.VAE(gaussian().prior, None, gaussian().decoder), "`encoder` must be a module.*got a NoneType"),
        (lambda: gaussian().encode([[0.0] * 3]), r"context of DiagonalNormal must be a tensor \(\*, 3\), got a list"),
    ],
)
def test_a_value_of_another_type_raises(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("hidden", ["ab", None, 2.5, [1.5], ["8"], [True]])
def test_hidden_sizes_that_are_no_integers_raise(hidden):
    with pytest.raises(ValueError, match=r"`hidden` must be a list of positive sizes.*got"):
        networks.mlp(hidden)


def test_numbers_of_numpy_are_accepted():
    two, half = np.int64(2), np.float32(0.5)
    encoder = guides.LowRankNormal(np.int64(3), two, networks.mlp([two]), rank=two)
    decoder = likelihoods.Normal(two, np.int64(3), LINEAR, scale=half)
    built = pv.VAE(priors.MixtureOfNormals(two, num_components=two), encoder, decoder)
    assert decoder.family.fixed_scale == 0.5
    assert built.generate(np.int64(4)).shape == (4, 3)
    fitted = pv.fit(built.model, built.guide, torch.zeros(5, 3), epochs=two, batch_size=two, lr=np.float64(1e-3))
    assert fitted.steps == 4  # batches of 2 and 3 rows
    assert schedules.linear(half, 1.0, two)(1) == 0.75
    assert objectives.ImportanceWeighted(two).loss(built.model, built.guide, torch.zeros(5, 3)) > 0
    assert WeightKL(half).weight == half
