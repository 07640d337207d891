"""Each image lies in its cell, and is the image of its own code, datum or draw."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from pairs import gaussian

from plots.plot_inputs import IMAGES, decode
from pyro_vae import plots
from pyro_vae._utils.rng import seeded
from pyro_vae.plots.colours import MISSING


def cells(ax, shape):
    """The images of a grid, (rows, columns, height, width)."""
    (height, width), sheet = shape, torch.as_tensor(np.asarray(ax.images[0].get_array()))
    rows, columns = (sheet.shape[0] + 1) // (height + 1), (sheet.shape[1] + 1) // (width + 1)
    padded = torch.nn.functional.pad(sheet, (0, 1, 0, 1)).reshape(rows, height + 1, columns, width + 1)
    return padded[:, :height, :, :width].transpose(1, 2)


def test_image_grid_contains_every_image_in_reading_order():
    images = torch.rand(5, 3, 4)
    sheet = plots.image_grid(images, columns=2).images[0].get_array()
    assert sheet.shape == (3 * 4 - 1, 2 * 5 - 1)
    for index, image in enumerate(images):
        top, left = 4 * (index // 2), 5 * (index % 2)
        np.testing.assert_array_equal(sheet[top : top + 3, left : left + 4], image)


def test_names_of_rows_and_columns_are_at_the_middles_of_their_images():
    ax = plots.image_grid(torch.rand(5, 3, 4), columns=2, row_names=["a", "b", "c"], column_names=["x", "y"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y"]
    np.testing.assert_array_equal(ax.get_yticks(), [1.0, 5.0, 9.0])
    np.testing.assert_array_equal(ax.get_xticks(), [1.5, 6.5])
    only_rows = plots.image_grid(torch.rand(2, 3, 4), columns=1, row_names=("a", "b"))
    assert len(only_rows.get_xticks()) == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"row_names": ["a"]}, "`row_names` must be 2 names, one for each of the rows, got 1"),
        ({"column_names": "xyz"}, "`column_names` must be 3 names, .*got a str"),
        ({"column_names": [1, 2, 3]}, "`column_names` must be 3 names"),
    ],
)
def test_names_are_one_for_each_row_or_column(names, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plots.image_grid(torch.rand(5, 3, 4), columns=3, **names)


def test_fewer_images_than_columns_need_no_more_names():
    ax = plots.image_grid(torch.rand(3, 3, 4), column_names=["x", "y", "z"])
    assert ax.images[0].get_array().shape == (3, 3 * 5 - 1)
    with pytest.raises(ValueError, match="`column_names` must be 3 names, one for each of the columns, got 10"):
        plots.image_grid(torch.rand(3, 3, 4), column_names=["x"] * 10)


@pytest.mark.parametrize("values", [torch.rand(5, 1, 3, 4), torch.rand(5, 3, 4)], ids=["one channel", "no channel"])
def test_grey_images_may_have_a_channel(values):
    sheet = plots.image_grid(values, columns=5).images[0].get_array()
    np.testing.assert_array_equal(sheet[:, :4], values.reshape(5, 3, 4)[0])


def test_colour_images_are_red_green_and_blue_in_their_cells():
    images = torch.rand(5, 3, 2, 4)
    sheet = np.asarray(plots.image_grid(images, columns=2).images[0].get_array())
    assert sheet.shape == (3 * 3 - 1, 2 * 5 - 1, 3)
    for index, image in enumerate(images):
        top, left = 3 * (index // 2), 5 * (index % 2)
        np.testing.assert_array_equal(sheet[top : top + 2, left : left + 4], image.movedim(0, -1))
    assert (sheet[2] == 1).all(), "the lines between images are not white"
    assert (sheet[6:, 5:] == 1).all(), "a cell without an image is not white"


@pytest.mark.parametrize("channels", [1, 3])
def test_values_outside_the_range_are_clipped_and_missing_pixels_have_a_colour_of_their_own(channels):
    values = torch.tensor([-0.5, 0.25, 1.5, torch.nan]).expand(1, channels, 1, 4)
    ax = plots.image_grid(values)
    shown = ax.images[0]
    colours = np.asarray(shown.cmap(shown.norm(shown.get_array())) if channels == 1 else shown.get_array())[0, :, :3]
    expected = np.array([0.0, 0.25, 1.0])
    expected = 1 - expected if channels == 1 else expected  # grey images are black on white
    np.testing.assert_allclose(colours[:3], np.tile(expected[:, None], 3), atol=1 / 255)
    np.testing.assert_allclose(colours[3], to_rgb(MISSING), atol=1e-6)


def test_colour_images_of_all_functions_are_those_of_the_grid():
    images = torch.rand(4, 3 * 2 * 5)
    sheet = plots.image_grid(images.reshape(4, 3, 2, 5), columns=4).images[0].get_array()
    np.testing.assert_array_equal(
        plots.samples(lambda count: images, (3, 2, 5), count=4, columns=4).images[0].get_array(), sheet
    )
    pairs = np.asarray(plots.reconstructions(lambda x: x, images, (3, 2, 5), columns=4).images[0].get_array())
    np.testing.assert_array_equal(pairs[:2], sheet)
    np.testing.assert_array_equal(pairs[3:], sheet)
    half = np.asarray(plots.reconstructions(lambda x: x, images, (3, 2, 5), columns=3).images[0].get_array())
    assert (half[6:, 6:] == 1).all(), "cells without an image are not white"
    varied = plots.traversals(lambda z: images[:1].expand(len(z), -1), torch.zeros(1), (3, 2, 5), values=[0.0, 1.0])
    np.testing.assert_array_equal(np.asarray(varied.images[0].get_array())[:, :5], np.asarray(sheet)[:, :5])
    squares = plots.manifold(lambda z: images, (3, 2, 5), size=2).images[0].get_array()
    np.testing.assert_array_equal(np.asarray(squares)[:2], np.asarray(sheet)[:, :11])


def test_manifold_runs_with_z_1_to_the_right_and_z_2_upwards():
    centres = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1 / 6, 3 / 6, 5 / 6]))
    for axis, expected in ((0, centres.expand(3, 3)), (1, centres.flip(0)[:, None].expand(3, 3))):
        ax = plots.manifold(lambda z, axis=axis: z[:, [axis]].sigmoid(), (1, 1), size=3)
        sheet = torch.as_tensor(ax.images[0].get_array()[::2, ::2]).logit()
        torch.testing.assert_close(sheet, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("coordinates", [None, [1], [1, 0]])
def test_a_row_of_traversals_varies_its_coordinate_and_no_other(coordinates):
    z, values = torch.tensor([0.5, -1.0]), [-2.0, 0.0, 3.0]
    ax = plots.traversals(decode, z, (3, 4), values=values, coordinates=coordinates)
    chosen = coordinates or [0, 1]
    codes = z.repeat(len(chosen), 3, 1)
    for row, index in enumerate(chosen):
        codes[row, :, index] = torch.tensor(values)
    torch.testing.assert_close(cells(ax, (3, 4)), decode(codes.flatten(0, 1)).clamp(0, 1).reshape(-1, 3, 3, 4))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"z[{i}] = {z[i]:.2f}" for i in chosen]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-2", "0", "3"]
    assert z.tolist() == [0.5, -1.0], "the user's code was changed"


@pytest.mark.parametrize("columns", [2, 5, 12])
def test_an_image_is_above_its_own_reconstruction(columns):
    ax = plots.reconstructions(lambda x: 0.5 * x, IMAGES, (3, 4), columns=columns)
    shown = cells(ax, (3, 4))
    data, means = (shown[start::2].reshape(-1, 12)[:5] for start in (0, 1))
    torch.testing.assert_close(data, IMAGES)
    torch.testing.assert_close(means, 0.5 * IMAGES)
    assert not shown[::2].reshape(-1, 12)[5:].any(), "cells without an image are not blank"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "mean of p(x|z)"] * (len(shown) // 2)


def test_draws_in_pictures_depend_only_on_the_seed():
    vae = gaussian(1, 2)
    with seeded(3):
        expected = vae.generate(4).clamp(0, 1)
    shown = [
        cells(plots.samples(vae.generate, (1, 2), count=4, columns=2, seed=seed), (1, 2)).reshape(4, 2)
        for seed in (3, 3, 4)
    ]
    torch.testing.assert_close(shown[0], expected)
    torch.testing.assert_close(shown[1], expected)
    assert not torch.equal(shown[2], expected)


CODE, SHAPE = torch.zeros(2), (3, 4)


@pytest.mark.parametrize(("plot", "arguments", "options", "error", "message"), [
    ("traversals", (gaussian(), CODE, SHAPE), {}, TypeError, "`decode` must .*vae.decode.*got a VAE"),
    ("reconstructions", (gaussian(), IMAGES, SHAPE), {}, TypeError, "`reconstruct` must .*vae.reconstruct.*got a VAE"),
    ("samples", (gaussian(), SHAPE), {}, TypeError, "`generate` must .*vae.generate.*got a VAE"),
    ("traversals", (decode, CODE[None], SHAPE), {}, ValueError, r"`z` must be .*got shape \(1, 2\)"),
    ("traversals", (decode, [0.0, 1.0], SHAPE), {}, ValueError, "`z` must be .*got a list"),
    ("traversals", (decode, CODE, SHAPE), {"values": []}, ValueError, r"`values` must be .*got shape \(0,\)"),
    ("traversals", (decode, CODE, SHAPE), {"values": "a"}, TypeError, "`values` must be .*got 'a'"),
    ("traversals", (decode, CODE, (3, 5)), {}, ValueError, r"`decode` must .* 3 by 5 pixels, got .*\(14, 12\)"),
    ("reconstructions", (abs, IMAGES, (4, 4)), {}, ValueError, r"`x` must be .* 4 by 4 pixels, got .*\(5, 12\)"),
    ("reconstructions", (lambda x: x[:2], IMAGES, SHAPE), {}, ValueError, r"`reconstruct` must .*got .*\(2, 12\)"),
    ("reconstructions", (abs, IMAGES, SHAPE), {"columns": 0}, ValueError, "`columns` must be .*got 0"),
    ("samples", (lambda count: IMAGES, SHAPE), {"count": 0}, ValueError, "`count` must be .*got 0"),
])  # fmt: skip
def test_images_that_cannot_be_drawn_are_refused(plot, arguments, options, error, message):
    with pytest.raises(error, match=message):
        getattr(plots, plot)(*arguments, **options)
