"""Coordinates of continuous latents: both directions, and supports that are refused."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, model_of

from pyro_vae import exact
from pyro_vae.distributions.relaxed import LogRelaxedOneHotCategorical
from pyro_vae.exact.coordinates import LatentCoordinates


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(torch.zeros(()).double(), 1.0),
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        dist.Gamma(torch.tensor([0.3, 4.0]), 2.0).to_event(1),
        dist.Beta(torch.tensor([0.5, 2.0]), 1.5).to_event(1),
        dist.Uniform(torch.tensor([-3.0, 1.0]), 2.0).to_event(1),
        dist.Exponential(torch.tensor(2.0)),
        LogRelaxedOneHotCategorical(torch.tensor(0.5).double(), logits=torch.tensor([0.3, -1.0, 0.5]).double()),
    ],
    ids=lambda fn: type(getattr(fn, "base_dist", fn)).__name__,
)
def test_coordinates_go_to_the_site_and_back_and_the_density_over_them_is_one(fn):
    wide = fn.expand((5,))
    coordinates = LatentCoordinates("z", wide, torch.float64)
    box = coordinates.integration_box(wide, 5)
    assert (len(box.low), coordinates.dims) == (1, 2 if fn.event_shape else 1)
    axes = [np.linspace(float(low), float(high), 801) for low, high in zip(box.low[0], box.high[0], strict=True)]
    points = torch.cartesian_prod(*map(torch.from_numpy, axes)).reshape(-1, 1, coordinates.dims)
    values = coordinates.to_site(points)
    mass = (fn.log_prob(values) + coordinates.log_jacobian(points)).exp() * math.prod(a[1] - a[0] for a in axes)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    near = points[(points.abs() < 8).all(-1).flatten()]  # where a number next to a bound keeps its digits
    torch.testing.assert_close(coordinates.to_points(coordinates.to_site(near)), near, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            model_of(dist.FisherSnedecor(3.0, 5.0), dist.Poisson),
            "known extent for quadrature, got a FisherSnedecor .* real line",
        ),
        (model_of(dist.Cauchy(0.0, 1.0), lambda z: dist.Normal(z, 0.5)), "without a finite mean and variance"),
        (gaussian(3, 2).model, "a continuous latent of at most 2 dimensions for quadrature, got 3 at 'z'"),
    ],
)
def test_latents_without_a_quadrature_are_refused_with_the_reason(model, message):
    with pytest.raises(ValueError, match=message):
        exact.log_evidence(model, torch.ones(4, 2) if "dimensions" in message else torch.ones(4))
