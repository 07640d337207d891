"""Bytes become grey values, and grey values become zeros and ones."""

import math
from itertools import product

import pyro
import pytest
import torch

from pyro_vae import datasets

BYTES = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
CONVERSIONS = [datasets.grey, datasets.binarize, datasets.resample]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_values_of_bytes_are_their_255ths_in_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        values, binary = datasets.grey(BYTES), datasets.binarize(BYTES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert values.dtype == binary.dtype == dtype
    assert torch.equal(values, torch.arange(256, dtype=dtype).reshape(2, 128) / 255)
    assert torch.equal(binary, (BYTES >= 128).to(dtype))  # split in the middle


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_grey_values_that_are_already_there_stay_as_they_are(dtype):
    values = torch.rand(5, 3).to(dtype)
    assert torch.equal(datasets.grey(values), values)
    assert datasets.grey(values).dtype == datasets.binarize(values).dtype == datasets.resample(values).dtype == dtype


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_bytes_and_their_grey_values_give_the_same_and_stay_as_they_were(convert, random_states):
    data = BYTES.clone()
    pyro.set_rng_seed(1)
    before, result = random_states(), convert(data)
    assert (random_states() == before) == (convert is not datasets.resample)  # which alone draws
    pyro.set_rng_seed(1)
    assert torch.equal(result, convert(datasets.grey(BYTES)))
    assert torch.equal(data, BYTES)
    assert result.shape == data.shape


def test_resampled_pixels_are_0_or_1_with_the_grey_value_as_mean():
    grey, draws = datasets.grey(BYTES), datasets.resample(BYTES.expand(20_000, *BYTES.shape))
    assert set(draws.unique().tolist()) == {0, 1}
    # 256 means, each within 5.5 standard errors: a failure of probability 1e-5 in all; black and white are certain.
    assert ((draws.mean(0) - grey).abs() <= 5.5 * (grey * (1 - grey) / 20_000) ** 0.5).all()
    assert (draws[:, 0, 0] == 0).all()
    assert (draws[:, -1, -1] == 1).all()


def test_resampled_pixels_are_independent():
    draws = datasets.resample(torch.full((40_000, 8), 0.3))
    correlation = torch.corrcoef(draws.T) - torch.eye(8)
    assert correlation.abs().max() < 5.5 / 40_000**0.5


def test_resampling_differs_in_each_call_and_is_the_same_for_one_seed():
    pyro.set_rng_seed(3)
    first, second = datasets.resample(BYTES), datasets.resample(BYTES)
    pyro.set_rng_seed(3)
    assert torch.equal(first, datasets.resample(BYTES))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize(("x", "found"), [
    (torch.tensor([0, 255]), "torch.int64 from 0 to 255"),
    (torch.tensor([0, 127], dtype=torch.int8), "torch.int8 from 0 to 127"),
    (torch.tensor([0.0, 255.0]), "torch.float32 from 0 to 255"),
    (torch.tensor([-0.5, 1.0]), "torch.float32 from -0.5 to 1"),
    (torch.tensor([False, True]), "torch.bool from 0 to 1"),
    (torch.tensor([0.5, math.nan]), "torch.float32 from nan to nan"),
])  # fmt: skip
def test_what_is_neither_bytes_nor_grey_values_is_refused_with_what_was_given(convert, x, found):
    with pytest.raises(ValueError, match=rf"`x` must be bytes \(torch.uint8\), or grey values.*got {found}"):
        convert(x)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_bytes_that_are_0_and_1_are_refused(convert):
    """As grey values they would be black all over."""
    x = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    message = r"`x` must be bytes from 0 to 255.*got bytes that are all 0 or 1: .* binary as `x\.float\(\)`"
    with pytest.raises(ValueError, match=message):
        convert(x)
    convert(0 * x)  # a black image is one


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_no_values_at_all_are_grey_or_refused_by_their_type(convert):
    for dtype, shape in product((torch.uint8, torch.float32), ((0, 3), (3, 0))):
        assert convert(torch.zeros(shape, dtype=dtype)).shape == shape
    with pytest.raises(ValueError, match=r"`x` must be bytes.*got no values, torch\.int64"):
        convert(torch.zeros(0, 3, dtype=torch.int64))


def test_a_threshold_is_passed_by_name():
    """As a transform of two tensors, ``binarize`` would take the second for it."""
    with pytest.raises(TypeError, match="positional"):
        datasets.binarize(torch.rand(3), torch.rand(3))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_pixels_strictly_above_the_threshold_are_1(threshold):
    grey = datasets.digits("test").x
    assert torch.equal(datasets.binarize(grey, threshold=threshold), (grey > threshold).to(grey.dtype))
