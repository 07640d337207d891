"""What all parts do with a context, sizes and a network: errors name the argument, what it must be and what came."""

import pytest
import torch
from part_cases import CONDITIONAL, Case

from pyro_vae import guides, likelihoods, priors
from pyro_vae.parts.networks import linear, mlp


@pytest.fixture(params=CONDITIONAL)
def part(request):
    return Case(request.param).part.float()


def test_a_context_of_wrong_shape_is_refused_with_both_shapes(part):
    right = tuple(part.context_shape)
    for shape in [(5, *right, 7), (*right[:-1], right[-1] + 1), ()]:
        with pytest.raises(ValueError, match=rf"the context of {type(part).__name__} must be \(\*, ") as caught:
            part(torch.zeros(shape))
        assert f"got shape {shape}" in str(caught.value)
        assert f"(*, {', '.join(map(str, right))})" in str(caught.value)


def test_a_context_of_wrong_dtype_or_none_is_refused_with_the_one_that_is_needed(part):
    for dtype in (torch.float64, torch.int64, torch.uint8, torch.bool):
        message = rf"the context of {type(part).__name__} must be torch\.float32.*got {dtype}"
        with pytest.raises(TypeError, match=message):
            part(torch.zeros(5, *part.context_shape, dtype=dtype))
    with pytest.raises(TypeError, match=r"must be a tensor \(\*, .*\), got none"):
        part()


def test_an_error_of_the_network_itself_is_passed_on():
    class Broken(torch.nn.Linear):
        def forward(self, inputs):
            raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        guides.Bernoulli(2, 1, Broken)(torch.zeros(2))


@pytest.mark.parametrize("latent", [0, -1, (), (2, 0), 1.5, (1.5,), "2"])
def test_sizes_that_are_not_positive_integers_are_refused(latent):
    for name, build in (
        ("latent", lambda: priors.StandardNormal(latent)),
        ("latent", lambda: guides.DiagonalNormal(2, latent, linear())),
        ("out_features", lambda: likelihoods.Normal(2, latent, linear())),
        ("in_features", lambda: guides.DiagonalNormal(latent, 2, linear())),
        ("latent", lambda: likelihoods.Normal(latent, 2, linear())),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive integer or a tuple of them, got") as caught:
            build()
        assert repr(latent) in str(caught.value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (linear, r"`network` must be a factory.*called with \(1, 2\), it raised"),
        (mlp, r"`network` must be a factory.*called with"),
    ],
)
def test_what_is_no_factory_is_refused(network, message):
    with pytest.raises((TypeError, ValueError), match=message):
        likelihoods.Normal(1, 2, network)
