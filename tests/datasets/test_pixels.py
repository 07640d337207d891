"""Bytes become grey values, and grey values become zeros and ones."""

import math

import pyro
import pytest
import torch

from pyro_vae import datasets

BYTES = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
CONVERSIONS = [datasets.grey, datasets.binarize, datasets.resample]


def test_grey_values_of_bytes_are_their_255ths():
    values = datasets.grey(BYTES)
    assert values.dtype == torch.get_default_dtype()
    torch.testing.assert_close(values, torch.arange(256).reshape(2, 128) / 255, rtol=0, atol=0)
    assert torch.equal((255 * values).round().to(torch.uint8), BYTES)


def test_grey_values_are_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert datasets.grey(BYTES).dtype == datasets.binarize(BYTES).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_grey_values_that_are_already_there_stay_as_they_are(dtype):
    values = torch.rand(5, 3).to(dtype)
    assert torch.equal(datasets.grey(values), values)
    assert datasets.grey(values).dtype == datasets.binarize(values).dtype == datasets.resample(values).dtype == dtype


def test_bytes_are_split_in_the_middle():
    assert torch.equal(datasets.binarize(BYTES), (BYTES >= 128).float())


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_bytes_and_their_grey_values_give_the_same(convert):
    pyro.set_rng_seed(1)
    of_bytes = convert(BYTES)
    pyro.set_rng_seed(1)
    assert torch.equal(of_bytes, convert(datasets.grey(BYTES)))


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_the_data_stay_as_they_were(convert):
    data = BYTES.clone()
    result = convert(data)
    assert torch.equal(data, BYTES)
    assert result.shape == data.shape


def test_resampled_pixels_are_0_or_1_with_the_grey_value_as_mean():
    grey = datasets.grey(BYTES)
    draws = datasets.resample(BYTES.expand(20_000, *BYTES.shape))
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
    again = datasets.resample(BYTES)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("convert", [datasets.grey, datasets.binarize])
def test_nothing_is_drawn_where_nothing_is_random(convert, random_states):
    before = random_states()
    convert(BYTES)
    assert random_states() == before


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.tensor([0, 255]), "torch.int64 from 0 to 255"),
        (torch.tensor([0, 127], dtype=torch.int8), "torch.int8 from 0 to 127"),
        (torch.tensor([0.0, 255.0]), "torch.float32 from 0 to 255"),
        (torch.tensor([-0.5, 1.0]), "torch.float32 from -0.5 to 1"),
        (torch.tensor([False, True]), "torch.bool from 0 to 1"),
        (torch.tensor([0.5, math.nan]), "torch.float32 from nan to nan"),
    ],
)
def test_what_is_neither_bytes_nor_grey_values_is_refused_with_what_was_given(convert, x, found):
    with pytest.raises(ValueError, match=rf"`x` must be bytes \(torch.uint8\), or grey values.*got {found}"):
        convert(x)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_bytes_that_are_0_and_1_are_refused(convert):
    """As grey values they would be black all over."""
    x = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"`x` must be bytes from 0 to 255.*got bytes that are all 0 or 1: .* binary as `x\.float\(\)`"
    ):
        convert(x)
    convert(0 * x)  # a black image is one


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_no_values_at_all_are_grey_or_refused_by_their_type(convert):
    for dtype in (torch.uint8, torch.float32):
        assert convert(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
        assert convert(torch.zeros(3, 0, dtype=dtype)).shape == (3, 0)
    with pytest.raises(ValueError, match=r"`x` must be bytes.*got no values, torch\.int64"):
        convert(torch.zeros(0, 3, dtype=torch.int64))


def test_a_threshold_is_passed_by_name():
    """As a transform of two tensors, ``binarize`` would take the second for it."""
    with pytest.raises(TypeError, match="positional"):
        datasets.binarize(torch.rand(3), torch.rand(3))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5])
def test_pixels_strictly_above_the_threshold_are_1(threshold):
    grey = datasets.digits("test").x
    binary = datasets.binarize(grey, threshold=threshold)
    assert torch.equal(binary == 1, grey > threshold)
    assert torch.equal(binary == 0, grey <= threshold)
    assert binary.dtype == grey.dtype
