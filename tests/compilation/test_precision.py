"""Products of networks are rounded to bfloat16, forward and backward, and nothing else is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.compilation import rolling, torch_private
from pyro_vae.compilation.graph import Graph
from pyro_vae.compilation.precision import bfloat16_products

ROUNDING = 2.0**-8  # the largest relative error of a number rounded to bfloat16
LAYERS = {
    "linear": (lambda: nn.Linear(256, 256), (64, 256)),
    "linear, in two plates": (lambda: nn.Linear(256, 256), (4, 16, 256)),
    "linear, without a bias": (lambda: nn.Linear(256, 256, bias=False), (64, 256)),
    "convolution in one dimension": (lambda: nn.Conv1d(8, 16, 3, dilation=2), (4, 8, 50)),
    "convolution in two dimensions": (lambda: nn.Conv2d(8, 16, 3, stride=2, groups=2), (4, 8, 16, 16)),
    "convolution in three dimensions": (lambda: nn.Conv3d(2, 4, 3, padding=1), (4, 2, 6, 6, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2), (4, 8, 9, 9)),
    "a recurrent network": (lambda: nn.RNN(128, 128), (3, 64, 128)),
    "LSTM": (lambda: nn.LSTM(128, 128, bidirectional=True), (3, 64, 128)),
    "GRU": (lambda: nn.GRU(128, 128, num_layers=2), (3, 64, 128)),
    "a cell of a GRU": (lambda: nn.GRUCell(128, 128), (64, 128)),
    "attention": (lambda: Attention(), (16, 8, 128)),
}


class Attention(nn.MultiheadAttention):
    """Attention of a sequence to itself."""

    def __init__(self):
        super().__init__(128, 4)

    def forward(self, x):
        return super().forward(x, x, x)


def result_and_gradients(layer, x):
    """Return the result of a layer, and the gradients of a function of it in the input and in the parameters."""
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    inputs = [
        x,
        *(one for name, one in layer.named_parameters() if "hh" not in name or not isinstance(layer, nn.GRUCell)),
    ]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def layer_and_input(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return make(), torch.randn(shape, requires_grad=True)


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_of_layers_are_those_of_float32_to_the_digits_of_bfloat16(name):
    layer, x = layer_and_input(name)
    plain = result_and_gradients(layer, x)
    with bfloat16_products():
        found = result_and_gradients(layer, x)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == torch.float32
        assert distance(one, other) < 2 * ROUNDING
    assert distance(found[0], plain[0]) > ROUNDING / 20, "the factors are rounded"
    assert all(map(torch.equal, result_and_gradients(layer, x), plain)), "outside of the block nothing is"


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_records_the_products_in_bfloat16_and_gives_the_same_bits(name):
    layer, x = layer_and_input(name)

    def function(x):
        with bfloat16_products():
            return result_and_gradients(layer, x.detach().requires_grad_())

    graph = Graph(function, [x.detach()])
    assert all(map(torch.equal, graph(x.detach()), function(x)))


def test_the_gradient_of_a_weight_over_the_steps_of_a_sequence_is_one_product_in_bfloat16(monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.GRU(64, 128), torch.randn(12, 64, 64)
    monkeypatch.setattr("pyro_vae.compilation.graph._LONG", 100)
    monkeypatch.setattr(torch_private, "compile_graph", lambda module, _: module)
    products = []
    monkeypatch.setattr(rolling, "matrix_product", lambda a, b: products.append((a.dtype, len(b))) or a @ b)

    def function(x):
        with bfloat16_products():
            return result_and_gradients(layer, x.detach().requires_grad_())

    graph = Graph(function, [x])
    graph.compile([x])
    plain = result_and_gradients(layer, x.requires_grad_())
    for one, other, third in zip(graph(x.detach()), function(x), plain, strict=True):
        assert distance(one, other) < ROUNDING
        assert distance(one, third) < 2 * ROUNDING
    ((dtype, terms),) = set(products)
    assert dtype == torch.bfloat16
    assert terms >= 64 * 8, "of the rows of most steps"


def test_a_product_is_that_of_the_rounded_factors_rounded_once_and_the_bias_is_added_in_float32():
    layer, x = layer_and_input("linear")
    with bfloat16_products():
        found = layer(x).double()
    exact = x.bfloat16().double() @ layer.weight.bfloat16().double().t()
    error = (found - layer.bias.double() - exact).abs()
    assert (error <= exact.abs() * ROUNDING + 1e-6).all()


def test_products_that_are_no_layers_are_in_float32_with_their_gradients():
    torch.manual_seed(0)
    scale = torch.eye(128) + 0.05 * torch.randn(128, 128).tril()
    points, scale = torch.randn(100, 128, requires_grad=True), scale.requires_grad_()

    def function():
        layer = functional.linear(points, scale).detach()  # between products that are none
        density = dist.MultivariateNormal(torch.zeros(128), scale_tril=scale).log_prob(points @ scale @ scale)
        return [density, *torch.autograd.grad((density + layer.sum()).sum(), [points, scale])]

    plain = function()
    with bfloat16_products():
        found = function()
    assert all(map(torch.equal, found[1:], plain[1:]))
    assert torch.equal(found[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["few numbers", "float64"])
def test_small_products_and_those_in_float64_are_as_they_were(dtype):
    layer = nn.Linear(256, 256).to(dtype)
    x = torch.randn(15 if dtype == torch.float32 else 64, 256, dtype=dtype)
    with bfloat16_products():
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_each_tensor_is_rounded_once():
    layers, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), torch.randn(64, 256)

    def function(x):
        with bfloat16_products():
            return torch.autograd.grad(layers(x).square().sum(), layers.parameters())

    code = Graph(function, [x]).code
    assert code.count("aten.mm") == 5, "two forward, and backward all but that of the data"
    assert code.count("dtype=torch.bfloat16") == 6, "two inputs, two weights, two gradients of results"


@pytest.mark.parametrize(
    "write", [lambda w: w.data.mul_(2), lambda w: w.detach().copy_(2 * w)], ids=["data", "detached"]
)
def test_what_was_changed_in_place_is_rounded_again(write):
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(64, 256)
    with bfloat16_products(), torch.no_grad():
        before = layer(x)
        write(layer.weight)
        assert torch.equal(layer(x), 2 * before)
        assert torch.equal(layer(x[:32]), 2 * before[:32])


def test_rounded_copies_of_freed_tensors_are_freed_and_not_found_again():
    layer = nn.Linear(256, 256, bias=False)
    with bfloat16_products(), torch.no_grad():
        for number in range(200):
            x = torch.full((64, 256), float(number))  # in the memory of the one before
            expected = number * layer.weight.bfloat16().float().sum(1)
            assert torch.allclose(layer(x)[0], expected, rtol=ROUNDING, atol=1e-3 * number)


WIDE = 300


def wide_vae():
    torch.manual_seed(0)
    encode, decode = networks.mlp([WIDE]), networks.mlp([WIDE])
    return pv.VAE(
        priors.StandardNormal(30), guides.DiagonalNormal(100, 30, encode), likelihoods.Bernoulli(30, 100, decode)
    )


torch.manual_seed(1)
X = (torch.rand(400, 100) < torch.rand(400, 1)).float()


def fitted(vae=None, **options):
    pyro.clear_param_store()
    vae = vae or wide_vae()
    options = {"epochs": 3, "batch_size": 200, "seed": 0, "precision": "bf16-mixed"} | options
    return pv.fit(vae.model, vae.guide, X, **options)


def test_training_is_that_of_float32_to_the_digits_of_bfloat16():
    mixed, plain = (fitted(precision=precision).history["elbo"] for precision in ("bf16-mixed", None))
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=2 * ROUNDING)


@pytest.mark.usefixtures("uncompiled")
def test_captured_steps_have_the_losses_of_eager_ones():
    assert fitted(compile=True).history["elbo"] == pytest.approx(fitted(compile=False).history["elbo"], rel=1e-5)


def test_replayed_steps_have_the_bits_of_eager_ones():
    eager, chosen = fitted(compile=False, epochs=100), fitted(epochs=100)
    assert chosen.engine.startswith("replayed")
    assert chosen.history == eager.history


@pytest.mark.integration
def test_compiled_steps_have_the_losses_of_eager_ones():
    assert fitted(compile=True).history["elbo"] == pytest.approx(fitted(compile=False).history["elbo"], rel=1e-4)


def test_parameters_and_their_gradients_stay_in_float32_and_outside_of_steps_nothing_is_rounded():
    vae = wide_vae()
    seen = []
    vae.encoder.network[0].weight.register_hook(lambda gradient: seen.append(gradient.dtype))
    fitted(vae)
    assert set(seen) == {torch.float32}
    assert {one.dtype for one in vae.parameters()} == {torch.float32}
    layer, x = layer_and_input("linear")
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_validation_and_evaluation_are_in_float32():
    vae = wide_vae()
    history = fitted(vae, validation=X, epochs=2).history
    found = pv.evaluate(vae.model, vae.guide, X, batch_size=200, seed=0)
    assert {name: history[f"validation_{name}"][-1] for name in found} == found


def test_enumerated_states_are_summed_in_float32():
    """A sum over states by products of their probabilities is no layer."""
    torch.manual_seed(0)
    logits, rates = torch.randn(300, 200, requires_grad=True), torch.randn(200, 50)

    def model(x):
        probabilities = logits.softmax(-1)
        with pyro.plate("data", 300):
            state = pyro.sample("state", dist.Categorical(probabilities))
            pyro.sample("x", dist.Normal(rates.sum(1)[state], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 300):
            pyro.sample("state", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    x, elbo = torch.randn(300), TraceEnum_ELBO(max_plate_nesting=1)

    def loss():
        return elbo.differentiable_loss(model, config_enumerate(guide), x)

    plain = [loss().detach(), *torch.autograd.grad(loss(), logits)]
    with bfloat16_products():
        found = [loss().detach(), *torch.autograd.grad(loss(), logits)]
    assert all(map(torch.equal, found, plain))


def svi(**options):
    pyro.clear_param_store()
    vae = wide_vae()
    return pv.SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), Trace_ELBO(), precision="bf16-mixed", **options)


def losses_of(trainer, steps=3):
    torch.manual_seed(0)
    return [trainer.step(X) for _ in range(steps)]


@pytest.mark.usefixtures("uncompiled")
def test_svi_takes_mixed_steps_and_evaluates_in_float32():
    trainer = svi()
    torch.manual_seed(0)
    first = trainer.evaluate_loss(X)
    losses = losses_of(trainer)
    assert losses[0] != first
    assert losses[0] == pytest.approx(first, rel=ROUNDING)
    assert losses_of(svi(compile=True)) == pytest.approx(losses, rel=1e-5)


def test_autocast_and_mixed_precision_exclude_each_other():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"`precision` must be None inside of torch\.autocast.*got 'bf16-mixed'"),
    ):
        fitted()


def test_a_run_resumes_with_its_precision_alone_and_then_with_the_same_bits(tmp_path):
    whole = fitted(epochs=4).history
    fitted(epochs=2, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"`precision` must be 'bf16-mixed', as in the run of '.*', got None"):
        fitted(epochs=4, checkpoints=tmp_path, precision=None)
    assert fitted(epochs=4, checkpoints=tmp_path).history == whole
