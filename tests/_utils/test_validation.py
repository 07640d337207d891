"""Arguments that cannot be used are refused by name, wherever they are taken; NumPy's numbers are numbers."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.handlers import WeightKL

LINEAR = networks.linear()


def vae():
    return pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(3, 2, LINEAR), likelihoods.Normal(2, 3, LINEAR))


NUMBERS = {
    "rate": lambda word: schedules.exponential(1.0, word),
    "floor": lambda word: schedules.exponential(1.0, 0.1, floor=word),
    "start": lambda word: schedules.linear(word, 1.0, 3),
    "end": lambda word: schedules.decayed(1.0, 3, end=word),
    "hold": lambda word: schedules.decayed(1.0, 3, hold=word),
    "rise": lambda word: schedules.cyclical(0.0, 1.0, 3, rise=word),
    "value": lambda word: schedules.constant(word),
    "weight": lambda word: WeightKL(word),
    "min_scale": lambda word: likelihoods.Normal(2, 3, LINEAR, min_scale=word),
    "num_samples": lambda word: vae().generate(word),
}


@pytest.mark.parametrize("word", ["0.5", None, True, float("nan"), [0.5]])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_by_name(name, word):
    with pytest.raises(ValueError, match=rf"`{name}` must be a.*got"):
        NUMBERS[name](word)


FLAGS = {
    "missing": lambda word: likelihoods.Poisson(2, 3, LINEAR, missing=word),
    "soft_targets": lambda word: likelihoods.Bernoulli(2, 3, LINEAR, soft_targets=word),
    "learnable": lambda word: priors.Laplace(2, learnable=word),
    "straight_through": lambda word: priors.RelaxedBernoulli(2, 0.5, straight_through=word),
}


@pytest.mark.parametrize("word", ["no", None, 1])
@pytest.mark.parametrize("name", FLAGS)
def test_what_is_neither_true_nor_false_is_refused_by_name(name, word):
    with pytest.raises(TypeError, match=rf"`{name}` must be True and False.*got"):
        FLAGS[name](word)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: networks.standardized(LINEAR, loc="a"), "`loc` must be a number or a tensor of them.*got 'a'"),
        (lambda: networks.standardized(LINEAR, scale=None), "`scale` must be a number.*got None"),
        (lambda: priors.Bernoulli(2, probs="a"), "`probs` must be a number.*got 'a'"),
        (
            lambda: priors.VampPrior(guides.DiagonalNormal(3, 2, LINEAR), [[0.0] * 3]),
            "`pseudo_data` must be a tensor.*got a list",
        ),
        (
            lambda: pv.VAE(priors.StandardNormal, vae().encoder, vae().decoder),
            "`prior` must be a module.*got the class StandardNormal",
        ),
        (lambda: pv.VAE(vae().prior, None, vae().decoder), "`encoder` must be a module.*got a NoneType"),
        (lambda: vae().model([[0.0] * 3]), r"`x` must be a tensor, \(N, 3\).*got a list"),
        (lambda: vae().encode([[0.0] * 3]), r"context of DiagonalNormal must be a tensor \(\*, 3\), got a list"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("hidden", ["ab", None, 2.5, [1.5], ["8"], [True]])
def test_hidden_sizes_that_are_no_integers_are_refused(hidden):
    with pytest.raises(ValueError, match=r"`hidden` must be a list of positive sizes.*got"):
        networks.mlp(hidden)


def test_numbers_of_numpy_are_numbers():
    two, half = np.int64(2), np.float32(0.5)
    encoder = guides.LowRankNormal(np.int64(3), two, networks.mlp([two]), rank=two)
    decoder = likelihoods.Normal(two, np.int64(3), LINEAR, scale=half)
    built = pv.VAE(priors.MixtureOfNormals(two, num_components=two), encoder, decoder)
    assert decoder.family.fixed_scale == 0.5
    assert built.generate(np.int64(4)).shape == (4, 3)
    fitted = pv.fit(built.model, built.guide, torch.zeros(5, 3), epochs=two, batch_size=two, lr=np.float64(1e-3))
    assert fitted.steps == 6
    assert schedules.linear(half, 1.0, two)(1) == 0.75
    assert objectives.ImportanceWeighted(two).loss(built.model, built.guide, torch.zeros(5, 3)) > 0
    assert WeightKL(half).weight == half
