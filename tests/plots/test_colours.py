"""Colours that stay apart for colour-blind readers and in grey; styles that do not repeat."""

from itertools import combinations, pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from pyro_vae.plots.colours import EXACT, GUIDE, LINES, MARKERS, PALETTE, style

# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency",
# severity 1, for linear red, green and blue.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour, sight="normal"):
    """CIE 1976 L*a*b* of a colour, as readers with that sight see it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    share = XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_scale_of_lightness_is_that_of_the_standard():
    assert [lab(grey)[0] for grey in ("black", "0.5", "white")] == pytest.approx([0, 53.39, 100], abs=0.01)
    assert lab("red") == pytest.approx([53.24, 80.09, 67.20], abs=0.02)


@pytest.mark.parametrize("sight", SIGHT)
def test_every_two_colours_differ_for_every_sight(sight):
    """A difference of 2.3 is just noticeable; tab:green and tab:brown differ by 9 for a reader with protanopia."""
    assert min(np.linalg.norm(lab(one, sight) - lab(other, sight)) for one, other in combinations(PALETTE, 2)) > 20
    assert np.linalg.norm(lab(EXACT, sight) - lab(GUIDE, sight)) > 20


def test_every_two_colours_differ_in_grey():
    lightness = {colour: lab(colour)[0] for colour in PALETTE}
    assert min(abs(lightness[one] - lightness[other]) for one, other in combinations(PALETTE, 2)) > 5
    assert min(abs(lightness[one] - lightness[other]) for one, other in pairwise(PALETTE)) > 15
    assert max(lightness.values()) < 85, "a colour is too light for a white page"


def test_no_two_of_many_things_have_one_style():
    styles = [tuple(style(index).values()) for index in range(40)]
    assert len(set(styles)) == 40
    for without_colour in (1, 2):
        assert len({each[without_colour] for each in styles[:4]}) == 4, "they differ in colour alone"
    assert {each[1] for each in styles} == set(MARKERS)
    assert {each[2] for each in styles} == set(LINES)


@pytest.mark.parametrize("index", [-1, 1.0, True, "one"])
def test_an_index_that_is_none_is_refused(index):
    with pytest.raises(ValueError, match="`index` must be an integer, 0 or more, got"):
        style(index)


def test_importing_the_pictures_leaves_the_settings_of_matplotlib():
    assert mpl.rcParams["axes.prop_cycle"] == mpl.rcParamsDefault["axes.prop_cycle"]
