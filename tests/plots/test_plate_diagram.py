"""Circles, plates and arrows of a plate diagram are the sites, plates and dependencies of the model and its guide."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from pairs import gaussian, relaxed

from plots.plot_inputs import draw_diagram
from pyro_vae import plots


def two_level(x):
    """A mean and a spread of all schools, an effect of each school, and a result of each of its pupils."""
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", 2, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("pupils", 3, dim=-1):
            pyro.sample("x", dist.Normal(effect, 1.0), obs=x)


def global_scale(x):
    """A global latent at the same depth as the local latent."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def late_global(x):
    """A global latent that runs after a local latent, and lies between the local latents in depth."""
    root = pyro.sample("root", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    leaf = pyro.sample("leaf", dist.Normal(root, 1.0))
    with pyro.plate("data2", len(x)):
        w = pyro.sample("w", dist.Normal(z + leaf, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def parts_of(ax):
    """Circles by site, boxes by plate, and the numbers of solid and dashed arrows."""

    def patches(kind):
        return [patch for patch in ax.patches if isinstance(patch, kind)]

    places = {text.get_text(): text.get_position() for text in ax.texts}
    circles = {name: patch for patch in patches(Ellipse) for name, at in places.items() if at == tuple(patch.center)}
    boxes = {}
    for patch in patches(FancyBboxPatch):
        x, y, width, height = patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()
        names = [name for name, place in places.items() if np.allclose(place, (x + width, y + 0.05))]
        assert len(names) == 1, f"names of plates overlap: {names}"
        boxes[names[0]] = (x, y, x + width, y + height)
    solid = [arrow.get_linestyle() in ("-", "solid") for arrow in patches(FancyArrowPatch)]
    return circles, boxes, (sum(solid), len(solid) - sum(solid))


def inside(box, circle):
    (x, y), (left, bottom, right, top) = circle.center, box
    return left <= x - 0.3 and x + 0.3 <= right and bottom <= y - 0.3 and y + 0.3 <= top


def outside(box, circle):
    (x, y), (left, bottom, right, top) = circle.center, box
    return x + 0.3 < left or x - 0.3 > right or y + 0.3 < bottom or y - 0.3 > top


def test_plates_of_a_gaussian_vae():
    circles, boxes, arrows = parts_of(draw_diagram(gaussian(1, 2)))
    assert (set(circles), set(boxes)) == ({"z", "x"}, {"data"})
    assert arrows == (1, 1), "the model's z to x, the guide's x to z"
    assert same_color(circles["x"].get_facecolor(), "0.8")
    assert same_color(circles["z"].get_facecolor(), "white")
    assert circles["z"].center[1] > circles["x"].center[1]


def test_plates_of_a_relaxed_vae_show_the_code_that_the_decoder_takes():
    ax = draw_diagram(relaxed(1, 2))
    circles, _, arrows = parts_of(ax)
    dashed = {name: circle.get_linestyle() in ("--", "dashed") for name, circle in circles.items()}
    assert dashed == {"z": False, "code": True, "x": False}
    assert same_color(circles["code"].get_facecolor(), "white"), "it is not observed"
    assert arrows[1] == 1
    assert "code = f(z)" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(("model", "x", "members", "num_arrows"), [
    (two_level, torch.zeros(2, 3), {"schools": {"effect", "x"}, "pupils": {"x"}}, 3),
    (global_scale, torch.zeros(3), {"data": {"z", "x"}}, 2),
    (late_global, torch.zeros(3), {"data": {"z"}, "data2": {"w", "x"}}, 4),
])  # fmt: skip
def test_a_plate_holds_its_sites_and_no_other_and_arrows_are_the_dependencies(model, x, members, num_arrows):
    circles, boxes, arrows = parts_of(plots.plate_diagram(model, None, x))
    assert (set(boxes), arrows) == (set(members), (num_arrows, 0))
    assert set(circles) == pyro.poutine.trace(model).get_trace(x).nodes.keys() - {*members, "_INPUT", "_RETURN"}
    assert len({circle.center for circle in circles.values()}) == len(circles), "circles overlap"
    for plate, box in boxes.items():
        for name, circle in circles.items():
            assert inside(box, circle) if name in members[plate] else outside(box, circle), (plate, name)
