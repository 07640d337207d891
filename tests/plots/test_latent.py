"""The map of the codes; densities, bars and regions of the guide and the exact posterior, and the gap between them."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of, gumbel, one_hot, relaxed
from pyro import poutine
from torch import nn

import pyro_vae as pv
from plots.plot_inputs import DATUM, draw_posterior
from pyro_vae import plots


def test_latent_map_draws_each_class_at_its_codes():
    z, labels = torch.randn(30, 2), torch.arange(30) % 3
    collections = plots.latent_map(z, labels).collections
    assert len(collections) == 3
    for label, collection in enumerate(collections):
        np.testing.assert_allclose(collection.get_offsets(), z[labels == label])


def test_latent_map_of_one_variable_has_a_row_for_each_class():
    z, labels = torch.randn(30, 1), 5 + torch.arange(30) % 3
    ax = plots.latent_map(z, labels)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["5", "6", "7"]
    for row, collection in enumerate(ax.collections):
        offsets = np.asarray(collection.get_offsets())
        np.testing.assert_allclose(offsets[:, 0], z[labels == 5 + row, 0])
        assert (abs(offsets[:, 1] - row) < 0.5).all(), "rows overlap"
    markers = {collection.get_paths()[0].vertices.tobytes() for collection in ax.collections}
    assert len(markers) == 3, "classes differ in colour alone"


def test_latent_map_of_many_variables_shows_the_principal_components_and_their_shares():
    """Codes on two orthogonal directions of a space of five dimensions, with variances 9 and 1."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    plane = torch.linalg.svd(plane - plane.mean(0), full_matrices=False).U * torch.tensor([3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q[:2]
    ax = plots.latent_map((plane @ basis + 7.0).requires_grad_(), torch.zeros(200))
    found = torch.as_tensor(np.asarray(ax.collections[0].get_offsets()))
    torch.testing.assert_close(found.abs(), plane.abs())
    assert ax.get_xlabel() == "principal component 1 of z,\n90 % of the variance"
    assert ax.get_ylabel() == "principal component 2 of z,\n10 % of the variance"
    again = plots.latent_map(plane @ -basis, torch.zeros(200))
    assert again.get_xlabel() == ax.get_xlabel()


@pytest.mark.parametrize("codes", [torch.zeros(3, 4), torch.randn(1, 4), torch.randn(2, 3), torch.randn(3, 1)])
def test_latent_map_of_few_or_equal_codes_is_drawn(codes):
    ax = plots.latent_map(codes, [0] * len(codes))
    assert np.isfinite(np.asarray(ax.collections[0].get_offsets())).all()
    ax.figure.canvas.draw()


@pytest.mark.parametrize("kind", [list, np.array, pd.Series])
def test_labels_may_be_names_which_are_in_the_legend(kind):
    z, names = torch.randn(6, 2), ["Gentoo", "Adelie", "Gentoo", "Chinstrap", "Adelie", "Gentoo"]
    ax = plots.latent_map(z, kind(names))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Adelie", "Chinstrap", "Gentoo"]
    for name, collection in zip(("Adelie", "Chinstrap", "Gentoo"), ax.collections, strict=True):
        rows = torch.tensor([each == name for each in names])
        np.testing.assert_allclose(collection.get_offsets(), z[rows])


@pytest.mark.parametrize("variables", [1, 2])
def test_a_label_has_the_same_colour_whatever_the_other_labels_are(variables):
    z, labels = torch.randn(30, variables), torch.arange(30) % 10
    colours = [collection.get_facecolor() for collection in plots.latent_map(z, labels).collections]
    assert len({tuple(colour[0]) for colour in colours}) == 10
    for some in ([7], [2, 5, 9], range(1, 10)):
        chosen = torch.isin(labels, torch.tensor(list(some)))
        collections = plots.latent_map(z[chosen], labels[chosen]).collections
        for label, collection in zip(some, collections, strict=True):
            np.testing.assert_array_equal(collection.get_facecolor(), colours[label])


@pytest.mark.parametrize(("make", "latent"), [(gaussian, 1), (relaxed, 1), (gumbel, (1, 2))])
def test_curves_of_the_posterior_are_densities(make, latent):
    ax = draw_posterior(make(latent, 2))
    (line,), (area,) = ax.lines, ax.collections
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=0.02)
    corners = area.get_paths()[0].vertices
    enclosed = abs(np.sum(corners[:-1, 0] * corners[1:, 1] - corners[1:, 0] * corners[:-1, 1])) / 2
    assert enclosed == pytest.approx(1, abs=0.02)


def test_the_curve_of_the_guide_is_its_density():
    vae = gaussian(1, 2)
    (line,) = draw_posterior(vae).lines
    z = torch.as_tensor(line.get_xdata())[:, None, None]
    np.testing.assert_allclose(line.get_ydata(), vae.encode(DATUM).log_prob(z)[:, 0].exp().detach(), rtol=1e-4)


@pytest.mark.parametrize(("make", "latent"), [(bernoulli, 1), (bernoulli, 2), (one_hot, (1, 3))])
def test_bars_of_the_posterior_are_the_probabilities_of_the_states(make, latent):
    vae = make(latent, 2)
    exact, guide = draw_posterior(vae).containers
    truth = pv.exact.posterior(vae.model, DATUM)
    np.testing.assert_allclose([bar.get_height() for bar in exact], truth.probs[:, 0], rtol=1e-5)
    q = vae.encode(DATUM).log_prob(truth.enumerate_support())[:, 0].exp().detach()
    np.testing.assert_allclose([bar.get_height() for bar in guide], q, rtol=1e-5)
    assert sum(bar.get_height() for bar in guide) == pytest.approx(1, abs=1e-5)
    assert exact[0].get_hatch() != guide[0].get_hatch(), "the two differ in colour alone"


class Ring(nn.Module):
    """x ~ N(|z|², 0.5): the posterior is a ring, far from its mean."""

    def forward(self, z):
        return dist.Normal(z.square().sum(-1, keepdim=True), 0.5).to_event(1)


def regions(vae, x):
    """Contours and their levels, of p and q, with the distributions."""
    filled, lines = draw_posterior(vae, x).collections
    exact = pv.exact.posterior(vae.model, x)
    return (filled, list(filled.levels[:-1]), exact), (lines, list(lines.levels), vae.encode(x))


def corners(contours):
    return torch.as_tensor(np.concatenate([path.vertices for path in contours.get_paths()]), dtype=torch.float32)


def test_regions_of_the_posterior_have_the_probabilities_on_their_labels():
    """A normal of two dimensions has mass m where the density is above 1 - m of its maximum."""
    for _, levels, distribution in regions(gaussian(2, 2), DATUM):
        outside = np.exp(np.array(levels) - distribution.log_prob(distribution.mean).item())
        errors = np.sqrt([0.01 * 0.99 / 4000, 0.1 * 0.9 / 4000, 0.5 * 0.5 / 4000])  # of shares of 4000 draws
        np.testing.assert_array_less(abs(outside - [0.01, 0.1, 0.5]), 5 * errors)


def test_contours_of_a_ring_lie_where_the_densities_have_their_levels():
    p, q = regions(gaussian(2, 1, decoder=Ring()), torch.tensor([[2.0]]))
    for contours, levels, distribution in (p, q):
        log_density = distribution.log_prob(corners(contours)[:, None])
        nearest = (log_density - torch.tensor(levels).float()).abs().min(1).values
        assert nearest.max() < 0.15, "nats; a cell of the grid spans about one"
    filled = p[0]
    assert [len(path.to_polygons()) for path in filled.get_paths()] == [4, 4, 2], "rings, each with its hole"
    radii = corners(filled).norm(dim=1)
    assert 0.3 < radii.min() < radii.max() < 2.5


@pytest.mark.parametrize(("make", "latent"), [(gaussian, 1), (bernoulli, 1), (gaussian, 2)])
def test_the_title_of_the_legend_is_the_gap_in_nats(make, latent):
    vae = make(latent, 2)
    gap = float(pv.exact.kl(vae.model, vae.guide, DATUM))
    assert draw_posterior(vae).get_legend().get_title().get_text() == f"KL(q ‖ p) = {gap:.2g} nats"


def test_a_guide_whose_gap_cannot_be_computed_is_drawn_without_it():
    """Quadrature needs the mean and the tails of the guide, which are unknown here."""

    def q(x):
        affine = dist.transforms.AffineTransform(0.0, 1.0)
        return dist.TransformedDistribution(dist.Normal(x[..., :1], 1.0), affine).to_event(1)

    legend = plots.posterior(gaussian(1, 2).model, guide_of(q), DATUM).get_legend()
    assert legend.get_title().get_text() in ("", "None")
    assert [text.get_text() for text in legend.get_texts()] == ["exact $p(z|x)$", "guide $q(z|x)$"]


def test_a_model_with_two_latent_sites_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) + pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"z.*w|w.*z"):
        plots.posterior(model, poutine.block(model, hide=["x"]), torch.zeros(1))
