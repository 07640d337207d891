"""What parts refuse: each message names the argument, what was given and what is accepted."""

import math
import warnings
from importlib.util import find_spec

import pytest
import torch

from pyro_vae import families, guides, likelihoods, priors
from pyro_vae.parts.networks import linear, mlp, one_hot

CONDITIONAL = {
    "DiagonalNormal": lambda: guides.DiagonalNormal((3, 2), 2, linear()),
    "guides.Bernoulli": lambda: guides.Bernoulli((3, 2), 2, linear()),
    "OneHotCategorical": lambda: guides.OneHotCategorical((3, 2), (1, 2), linear()),
    "RelaxedBernoulli": lambda: guides.RelaxedBernoulli((3, 2), 2, linear(), temperature=0.5),
    "GumbelSoftmax": lambda: guides.GumbelSoftmax((3, 2), (1, 2), linear(), temperature=0.5),
    "Normal": lambda: likelihoods.Normal((3, 2), 2, linear()),
    "likelihoods.Bernoulli": lambda: likelihoods.Bernoulli((3, 2), 2, linear()),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli((3, 2), 2, linear()),
    "InverseAutoregressiveFlow": lambda: guides.InverseAutoregressiveFlow((3, 2), 2, linear()),
    "SplineFlow": lambda: guides.SplineFlow((3, 2), 2, linear()),
    "Categorical": lambda: likelihoods.Categorical((3, 2), 2, 4, linear()),
    "Poisson": lambda: likelihoods.Poisson((3, 2), 2, linear()),
    "NegativeBinomial": lambda: likelihoods.NegativeBinomial((3, 2), 2, linear()),
    "StudentT": lambda: likelihoods.StudentT((3, 2), 2, linear(), missing=True),
}
HAS_ZUKO = find_spec("zuko") is not None


@pytest.fixture(params=CONDITIONAL.values(), ids=CONDITIONAL.keys())
def part(request):
    if not HAS_ZUKO and "Flow" in request.node.name:
        pytest.skip("flows need zuko, `pip install 'pyro-vae[flows]'`")
    return request.param()


@pytest.mark.parametrize("shape", [(2,), (5, 2, 3), (6,), (5, 3, 3), ()])
def test_context_of_wrong_shape_is_refused_with_both_shapes(part, shape):
    with pytest.raises(ValueError, match=type(part).__name__) as caught:
        part(torch.zeros(shape))
    assert str(shape) in str(caught.value)
    assert "(*, 3, 2)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])
def test_context_of_wrong_dtype_is_refused_with_both_dtypes(part, dtype):
    with pytest.raises(TypeError, match=type(part).__name__) as caught:
        part(torch.zeros(5, 3, 2, dtype=dtype))
    assert str(dtype) in str(caught.value)
    assert "torch.float32" in str(caught.value)


def test_missing_context_is_refused_with_the_shape_that_is_needed(part):
    with pytest.raises(TypeError, match=r"needs a context of shape \(\*, 3, 2\)"):
        part()


def test_an_error_of_the_network_itself_is_passed_on():
    class Broken(torch.nn.Linear):
        def forward(self, inputs):
            raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        guides.Bernoulli(2, 1, Broken)(torch.zeros(2))


@pytest.mark.parametrize("latent", [0, -1, (), (2, 0), 1.5, (1.5,), "2"])
def test_sizes_that_are_not_positive_integers_are_refused(latent):
    with pytest.raises(ValueError, match="accepted is a positive integer or a tuple of them"):
        priors.StandardNormal(latent)
    with pytest.raises(ValueError, match="in_features: got"):
        guides.DiagonalNormal(latent, 2, linear())
    with pytest.raises(ValueError, match="latent: got"):
        likelihoods.Normal(latent, 2, linear())


@pytest.mark.parametrize("latent", [3, (3,), (2, 1), (2, 2, 2)])
def test_one_hot_parts_want_variables_and_classes(latent):
    for build in (
        lambda: priors.OneHotCategorical(latent),
        lambda: priors.GumbelSoftmax(latent, temperature=0.5),
        lambda: guides.OneHotCategorical(2, latent, linear()),
        lambda: guides.GumbelSoftmax(2, latent, linear(), temperature=0.5),
    ):
        with pytest.raises(ValueError, match=r"accepted is \(n, k\), n one-hot variables of k >= 2 classes"):
            build()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan, "0.5", None])
def test_temperatures_out_of_range_are_refused(temperature):
    for build in (
        lambda: priors.RelaxedBernoulli(1, temperature),
        lambda: priors.GumbelSoftmax((1, 2), temperature),
        lambda: guides.RelaxedBernoulli(2, 1, linear(), temperature),
        lambda: guides.GumbelSoftmax(2, (1, 2), linear(), temperature),
    ):
        with pytest.raises(ValueError, match=r"`temperature` must be a positive, finite number.*got"):
            build()


@pytest.mark.parametrize("probs", [0.0, 1.0, -0.1, math.nan, torch.tensor([0.5, 1.0])])
def test_bernoulli_probabilities_out_of_range_are_refused(probs):
    for build in (lambda: priors.Bernoulli(2, probs), lambda: priors.RelaxedBernoulli(2, 0.5, probs)):
        with pytest.raises(ValueError, match=r"`probs` must be .*got .*strictly between 0 and 1"):
            build()


@pytest.mark.parametrize("probs", [(0.5, 0.6), (0.0, 1.0), (1.5, -0.5), (math.nan, 0.5)])
def test_class_probabilities_that_are_none_are_refused(probs):
    probs = torch.tensor(probs)
    for build in (lambda: priors.OneHotCategorical((1, 2), probs), lambda: priors.GumbelSoftmax((1, 2), 0.5, probs)):
        with pytest.raises(ValueError, match=r"`probs` must be .*got .*sum to one by row"):
            build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_any_precision_give_a_prior_of_the_default_one(dtype):
    pair = torch.tensor([0.25, 0.75], dtype=dtype)
    for prior in (
        priors.Bernoulli(2, pair),
        priors.RelaxedBernoulli(2, 0.5, pair).discrete(),
        priors.OneHotCategorical((1, 2), pair),
        priors.GumbelSoftmax((1, 2), 0.5, pair).discrete(),
    ):
        assert prior().mean.dtype == torch.get_default_dtype()
        torch.testing.assert_close(prior().mean.flatten(), pair.float())


@pytest.mark.parametrize("scale", ["global", 0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_none_are_refused(scale):
    for build in (likelihoods.Normal, likelihoods.StudentT):
        with pytest.raises(ValueError, match="scale: got"):
            build(1, 2, linear(), scale=scale)
    with pytest.raises(ValueError, match="df: got"):
        likelihoods.StudentT(1, 2, linear(), df=scale)
    with pytest.raises(ValueError, match="dispersion: got"):
        likelihoods.NegativeBinomial(1, 2, linear(), dispersion=scale)


@pytest.mark.parametrize("num_classes", [0, 1, -2, 2.5, True, "3"])
def test_numbers_of_classes_that_are_none_are_refused(num_classes):
    with pytest.raises(ValueError, match="num_classes: got"):
        likelihoods.Categorical(1, 2, num_classes, linear())
    with pytest.raises(ValueError, match="num_classes: got"):
        one_hot(num_classes, linear())


def test_missing_is_a_yes_or_no():
    with pytest.raises(TypeError, match=r"`missing` must be True and False.*got 0\.3"):
        likelihoods.Poisson(1, 2, linear(), missing=0.3)


@pytest.mark.parametrize("value", [-1.0, 3.0, 0.5])
def test_what_is_no_class_or_count_is_refused(value):
    with pytest.raises(ValueError, match="support"):
        likelihoods.Categorical(1, 2, 3, linear(), missing=True)(torch.zeros(1)).log_prob(torch.tensor([0.0, value]))
    if value != 3:
        for build in (likelihoods.Poisson, likelihoods.NegativeBinomial):
            with pytest.raises(ValueError, match="support"):
                build(1, 2, linear())(torch.zeros(1)).log_prob(torch.tensor([0.0, value]))


@pytest.mark.parametrize("min_scale", [-1e-3, math.nan, math.inf])
def test_floors_out_of_range_are_refused(min_scale):
    with pytest.raises(ValueError, match="min_scale: got"):
        likelihoods.Normal(1, 2, linear(), min_scale=min_scale)


@pytest.mark.parametrize("scale", ["shared", "per_dimension", "network"])
def test_scale_never_falls_below_its_floor_and_binding_is_warned_about(scale):
    family = families.Normal(3, scale=scale, min_scale=0.1)
    raw = torch.zeros(5, family.num_raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family(raw)
    if scale == "network":
        raw[:, 4:5] = -30.0
    else:
        family.log_scale.data.reshape(-1)[:1] = -30.0
    with pytest.warns(UserWarning, match=r"min_scale = 0\.1 binds in (1|all) of 3 dimensions"):
        q = family(raw)
    assert q.stddev.min().item() == pytest.approx(0.1)


def test_scale_is_the_exponential_above_its_floor_so_that_a_bound_scale_can_still_learn():
    family = families.Normal(1, scale="network", min_scale=0.1)
    raw = torch.tensor([[0.0, -2.0], [0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    scale = family(raw).stddev[:, 0]
    torch.testing.assert_close(scale, raw[:, 1].exp() + 0.1)
    torch.testing.assert_close(torch.autograd.grad(scale.sum(), raw)[0][:, 1], raw[:, 1].exp())


def test_a_floor_of_zero_never_binds():
    family = families.Normal(2, scale="shared", min_scale=0.0)
    family.log_scale.data.fill_(-20.0)
    assert family(torch.zeros(2)).stddev.max().item() == pytest.approx(math.exp(-20), rel=1e-5)


def test_a_fixed_scale_is_what_was_asked_for():
    decoder = likelihoods.Normal(1, 2, mlp([3]), scale=0.25)
    assert torch.equal(decoder(torch.randn(4, 1)).stddev, torch.full((4, 2), 0.25))
    assert "family.log_scale" not in decoder.state_dict()


def test_grey_pixels_are_refused_by_a_bernoulli_likelihood_and_taken_by_the_others():
    grey = torch.tensor([0.0, 0.5])
    with pytest.raises(ValueError, match="soft_targets=True"):
        likelihoods.Bernoulli(1, 2, linear())(torch.zeros(1)).log_prob(grey)
    assert likelihoods.Bernoulli(1, 2, linear(), soft_targets=True)(torch.zeros(1)).log_prob(grey).isfinite()
    assert likelihoods.ContinuousBernoulli(1, 2, linear())(torch.zeros(1)).log_prob(grey).isfinite()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.nn.Linear(1, 2), "`network` must be .*got a Linear, a finished module"),
        (linear, r"network: called with \(1, 2\), it says"),
        (mlp, r"`network` must be a factory.*called with"),
        (lambda in_features, out_features: 3, "it returned 3"),
    ],
)
def test_what_is_no_factory_is_refused_as_one(network, message):
    with pytest.raises((TypeError, ValueError), match=message):
        likelihoods.Normal(1, 2, network)


@pytest.mark.parametrize("outputs", [1, 7])
def test_a_network_of_another_number_of_outputs_is_refused(outputs):
    part = likelihoods.Normal(1, 2, lambda in_features, out_features: torch.nn.Linear(in_features, outputs))
    with pytest.raises(ValueError, match=f"`network` must be 2.*gives {outputs} outputs"):
        part(torch.zeros(3, 1))
