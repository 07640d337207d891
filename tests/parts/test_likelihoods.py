"""Likelihoods: which data and options they take, and the model behind a mean-squared error."""

import math

import pytest
import torch

from pyro_vae import likelihoods
from pyro_vae.parts.networks import linear, mlp, one_hot


@pytest.mark.parametrize("value", ["global", 0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_none_are_refused(value):
    for name, build in (
        ("scale", likelihoods.Normal),
        ("scale", likelihoods.StudentT),
        ("df", likelihoods.StudentT),
        ("dispersion", likelihoods.NegativeBinomial),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            build(1, 2, linear(), **{name: value})


@pytest.mark.parametrize("num_classes", [0, 1, -2, 2.5, True, "3"])
def test_numbers_of_classes_that_are_none_are_refused(num_classes):
    for build in (lambda: likelihoods.Categorical(1, 2, num_classes, linear()), lambda: one_hot(num_classes, linear())):
        with pytest.raises(ValueError, match=f"`num_classes` must be .*integer.*got {num_classes!r}"):
            build()


@pytest.mark.parametrize("value", [-1.0, 3.0, 0.5])
def test_what_is_no_class_or_count_is_refused(value):
    with pytest.raises(ValueError, match="support"):
        likelihoods.Categorical(1, 2, 3, linear(), missing=True)(torch.zeros(1)).log_prob(torch.tensor([0.0, value]))
    if value != 3:
        for build in (likelihoods.Poisson, likelihoods.NegativeBinomial):
            with pytest.raises(ValueError, match="support"):
                build(1, 2, linear())(torch.zeros(1)).log_prob(torch.tensor([0.0, value]))


def test_a_fixed_scale_is_the_argument():
    decoder = likelihoods.Normal(1, 2, mlp([3]), scale=0.25)
    assert torch.equal(decoder(torch.randn(4, 1)).stddev, torch.full((4, 2), 0.25))
    assert "family.log_scale" not in decoder.state_dict()


def test_grey_pixels_are_refused_by_a_bernoulli_likelihood_and_taken_by_the_others():
    grey = torch.tensor([0.0, 0.5])
    with pytest.raises(ValueError, match="soft_targets=True"):
        likelihoods.Bernoulli(1, 2, linear())(torch.zeros(1)).log_prob(grey)
    assert likelihoods.Bernoulli(1, 2, linear(), soft_targets=True)(torch.zeros(1)).log_prob(grey).isfinite()
    assert likelihoods.ContinuousBernoulli(1, 2, linear())(torch.zeros(1)).log_prob(grey).isfinite()
