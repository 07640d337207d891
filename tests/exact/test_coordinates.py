"""Coordinates of continuous latents: both directions, and supports that are refused."""

import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, model_of

from pyro_vae import exact
from pyro_vae.distributions.relaxed import LogRelaxedOneHotCategorical
from pyro_vae.exact.coordinates import LatentCoordinates

LOG_SIMPLEX = LogRelaxedOneHotCategorical(torch.tensor(0.5).double(), logits=torch.tensor([0.3, -1.0, 0.5]).double())


@pytest.mark.parametrize(
    ("fn", "dims"),
    [
        (dist.Normal(torch.zeros(()).double(), 1.0), 1),
        (dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), 2),
        (LOG_SIMPLEX, 2),
    ],
)
def test_values_return_from_their_coordinates(fn, dims):
    coordinates = LatentCoordinates("z", fn, torch.float64)
    values = fn.sample((5, 3))
    points = coordinates.to_points(values)
    assert points.shape == (5, 3, dims)
    torch.testing.assert_close(coordinates.to_site(points), values.reshape(coordinates.to_site(points).shape))


def normal(z):
    return dist.Normal(z, 0.5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(dist.HalfCauchy(1.0), normal), "known extent for quadrature, got a HalfCauchy at 'z'.* real line"),
        (model_of(dist.HalfNormal(1.0), normal), "known extent for quadrature, got a HalfNormal at 'z'.* real line"),
        (model_of(dist.Cauchy(0.0, 1.0), normal), "without a finite mean and variance"),
        (gaussian(3, 2).model, "a continuous latent of at most 2 dimensions for quadrature, got 3 at 'z'"),
    ],
)
def test_latents_without_a_quadrature_are_refused_with_the_reason(model, message):
    x = torch.randn(4)
    with pytest.raises(ValueError, match=message):
        exact.log_evidence(model, x if "dimensions" not in message else torch.randn(4, 2))
