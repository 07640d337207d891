"""Network factories: each row is mapped alone, with any dimensions on its left."""

from math import nan, prod

import pytest
import torch
from torch import nn

from pyro_vae import guides, likelihoods
from pyro_vae.parts.networks import (
    SlotAttention,
    convolutional,
    deconvolutional,
    linear,
    mlp,
    one_hot,
    reshaped,
    spatial_broadcast,
    standardized,
    starting_at,
    with_missing,
)

IMAGES = [(1, 7, 7), (1, 8, 8), (1, 28, 28), (3, 8, 8), (2, 5, 9), (1, 1, 1)]


def strict(in_features, out_features):
    """Convolutions that accept ``(N, 2, 3, 5)`` alone, and return an image for each row."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, out_features, (3, 5)))


def strict_decoder(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, 12), nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 2, 3))


FACTORIES = {
    "linear": (linear(), 4, 3),
    "no hidden layer": (mlp([]), 4, 3),
    "mlp": (mlp([5, 6], nn.Tanh), 4, 3),
    **{f"convolutional {image}": (convolutional(image, [2, 3], nn.Tanh), prod(image), 4) for image in IMAGES},
    **{f"deconvolutional {image}": (deconvolutional(image, [3, 2], nn.Tanh), 4, prod(image)) for image in IMAGES},
    "a perceptron of each pixel": (spatial_broadcast((2, 5, 9), [3, 2], nn.Tanh), 4, 2 * 2 * 5 * 9),
    "two raw outputs per pixel": (deconvolutional((3, 7, 8), [3, 2], nn.Tanh), 4, 2 * 3 * 7 * 8),
    "three convolutions": (convolutional((1, 28, 28), [2, 3, 4], nn.Tanh), 784, 4),
    "standardized": (standardized(mlp([5], nn.Tanh), torch.arange(4.0), torch.arange(1.0, 5.0)), 4, 3),
    "reshaped": (reshaped(strict, (2, 3, 5)), 30, 4),
    "reshaped after the first layer": (reshaped(strict_decoder), 4, 32),
    "starting at numbers": (starting_at(mlp([5], nn.Tanh), torch.arange(3.0)), 4, 3),
    "one convolution": (deconvolutional((1, 7, 7), [2], nn.Tanh), 4, 49),
}


@pytest.mark.parametrize(("factory", "size", "out"), FACTORIES.values(), ids=FACTORIES)
def test_rows_are_mapped_alone_under_any_leading_dimensions_and_every_weight_matters(factory, size, out):
    network = factory(size, out).double()
    rows = torch.randn(6, size, dtype=torch.float64)
    alone = torch.stack([network(row) for row in rows])
    assert alone.shape == (6, out)
    for batch in [(6,), (2, 3), (6, 1), (1, 2, 3)]:
        torch.testing.assert_close(network(rows.reshape(*batch, size)), alone.reshape(*batch, out))
    assert network(rows[:0]).shape == (0, out)
    inputs = torch.randn(50, size, dtype=torch.float64, requires_grad=True)
    outputs = network(inputs)
    assert (outputs.detach().std(0) > 0).all()
    gradients = torch.autograd.grad((outputs**2).sum(), [inputs, *network.parameters()])
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("down", "right"), [(2, 0), (0, 2)])
def test_convolution_sees_the_pixels_of_an_oblong_image_where_they_are(down, right):
    # Shifting an image by the stride shifts the feature map by one.
    network = convolutional((1, 6, 10), [2], nn.Tanh)(60, 2 * 3 * 5).double()
    network.network[-1] = nn.Identity()
    image = torch.zeros(6, 10, dtype=torch.float64)
    image[2, 4] = 1.0
    here, shifted = (network(one.flatten()).view(2, 3, 5) for one in (image, image.roll((down, right), (0, 1))))
    torch.testing.assert_close(shifted[:, down // 2 :, right // 2 :], here[:, : 3 - down // 2, : 5 - right // 2])
    assert not torch.allclose(shifted, here)


def test_second_raw_output_is_a_channel_of_its_own():
    # A normal with a scale from the network reads locations first and log-scales after: changing the weights of the
    # last output channels changes the scale alone.
    image = (2, 7, 7)
    decoder = likelihoods.Normal(3, image, deconvolutional(image, [2]), scale="network")
    z = torch.randn(4, 3)
    before = decoder(z)
    with torch.no_grad():
        decoder.network.network[-1].bias[2:] += 1.0
    after = decoder(z)
    torch.testing.assert_close(after.mean, before.mean)
    assert (after.stddev > before.stddev).all()
    assert before.event_shape == image


def test_convolutional_encoder_and_decoder_take_particles_and_enumerated_states():
    image = (1, 7, 7)
    encoder = guides.Bernoulli(image, 2, convolutional(image, [2]))
    decoder = likelihoods.Bernoulli(2, image, deconvolutional(image, [2]))
    q = encoder(torch.randn(3, 5, *image))
    p = decoder(q.enumerate_support(expand=False))
    assert (q.batch_shape, p.batch_shape, p.event_shape) == ((3, 5), (4, 1, 1), image)


def test_any_function_of_two_integers_is_a_factory():
    sizes = []

    def own(in_features, out_features):
        sizes.append((in_features, out_features))
        return nn.Sequential(nn.Linear(in_features, 5), nn.LayerNorm(5), nn.Linear(5, out_features))

    encoder = guides.DiagonalNormal((2, 3), 4, own)
    assert sizes == [(6, 8)]
    assert encoder(torch.zeros(7, 2, 3)).mean.shape == (7, 4)
    assert guides.Bernoulli(2, 3, nn.Linear)(torch.zeros(2)).event_shape == (3,)


def test_each_call_of_a_factory_builds_weights_of_its_own_and_a_bias_is_optional():
    factory = mlp([3])
    first, second = factory(2, 2), factory(2, 2)
    assert not {*map(id, first.parameters())} & {*map(id, second.parameters())}
    assert torch.equal(linear(bias=False)(3, 2)(torch.zeros(3)), torch.zeros(2))


def test_standardized_takes_the_location_off_and_divides_by_the_scale():
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])
    network = standardized(linear(), loc, scale)(2, 3)
    x = loc + scale * torch.randn(5, 7, 2)
    torch.testing.assert_close(network(x), network[1]((x - loc) / scale))
    torch.testing.assert_close(network[0](x).mean(), ((x - loc) / scale).mean())
    assert {name for name, _ in network.named_parameters()} == {"1.weight", "1.bias"}
    loc.zero_()  # the argument was copied
    torch.testing.assert_close(network[0](torch.tensor([1.0, -2.0])), torch.zeros(2))
    assert network.double()(x.double()).dtype == torch.float64
    assert standardized(linear(), torch.ones(2).double(), 3)(2, 3)(x).dtype == torch.float32


def test_a_decoder_starts_at_the_entropy_of_independent_pixels():
    mean = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    decoder = likelihoods.Bernoulli(2, 3, starting_at(linear(), torch.logit(mean))).double()
    x = (torch.rand(7, 3, dtype=torch.float64) < mean).double()
    expected = x * mean.log() + (1 - x) * (1 - mean).log()
    torch.testing.assert_close(decoder(torch.zeros(2, dtype=torch.float64)).log_prob(x), expected.sum(-1))
    (weight, bias) = decoder.parameters()
    assert weight.abs().max() > 0
    assert bias.requires_grad  # it is trained, and the first biases of another network are its own
    other = likelihoods.Bernoulli(2, 3, linear())
    assert not torch.equal(bias.float(), list(other.parameters())[1])


def test_a_network_within_others_starts_at_the_numbers():
    numbers = torch.tensor([3.0, -4.0])
    factory = standardized(starting_at(with_missing(mlp([5])), numbers), 1.0)
    numbers.zero_()  # the argument was copied
    network = factory(3, 2)
    assert network[1][1][-1].bias.tolist() == [3.0, -4.0]
    assert starting_at(linear(), 2.0)(3, 2).bias.tolist() == [2.0, 2.0]


def ending_with_tanh(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, out_features), nn.Tanh())


@pytest.mark.parametrize("network", [deconvolutional((1, 7, 8), [2]), linear(bias=False), ending_with_tanh])
def test_a_network_that_cannot_start_at_numbers_is_refused(network):
    with pytest.raises(ValueError, match=r"`network` must end with an nn.Linear that has a bias and 56 outputs.*got"):
        starting_at(network, 0.0)(4, 56)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0.0, torch.ones(3)), "`scale` must have 2 numbers, one for each feature, got 3"),
        ((torch.zeros(1, 2),), r"`loc` must be a finite number or a tensor of them, \(in_features,\), got"),
        ((0.0, torch.tensor([1.0, -1.0])), r"`scale` must be positive numbers.*got"),
    ],
)
def test_what_does_not_standardize_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        standardized(linear(), *arguments)(2, 3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((image,), r"`image` must be \(channels, height, width\).*features = 49, got")
        for image in [(1, 8, 8), (8, 8), (64,)]
    ]
    + [(((1, 7, 7), channels), "`channels` must be one or more positive sizes.*got") for channels in ([], [0])],
)
def test_images_and_channels_that_do_not_fit_are_refused(arguments, complaint):
    for factory, sizes in ((convolutional, (49, 2)), (deconvolutional, (2, 49))):
        with pytest.raises(ValueError, match=complaint):
            factory(*arguments)(*sizes)


def test_a_network_for_missing_entries_does_not_take_them_for_zeros():
    network = with_missing(linear())(3, 2)
    x = torch.tensor([[1.0, 0.0, nan], [1.0, nan, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    outputs = network(x)
    assert outputs.isfinite().all()
    assert len(outputs.unique(dim=0)) == 3
    (gradient,) = torch.autograd.grad(outputs.sum(), x)
    assert torch.equal(gradient == 0, x.isnan())
    assert network.double()(x.double()).dtype == torch.float64


def test_a_network_behind_a_standardization_takes_missing_entries_for_the_mean():
    network = standardized(with_missing(linear()), torch.tensor([5.0, -3.0]), 2.0)(2, 1)
    inner = network[1]
    torch.testing.assert_close(network(torch.tensor([nan, 1.0])), inner(torch.tensor([nan, 2.0])))
    torch.testing.assert_close(inner[0](torch.tensor([nan, 2.0])), torch.tensor([0.0, 2.0, 0.0, 1.0]))


def test_images_get_their_mask_as_a_further_channel():
    network = with_missing(convolutional((2, 8, 8)))(64, 3)
    image = torch.rand(5, 64)
    image[:, 32:] = nan
    mask = (~image.isnan()).float().reshape(5, 1, 8, 8)
    assert torch.equal(network[0](image).reshape(5, 2, 8, 8)[:, 1:], mask)
    assert network(image).isfinite().all()


def test_class_numbers_are_read_as_one_hot_vectors_and_missing_ones_as_none():
    network = one_hot(3, linear())(2, 4)
    x = torch.tensor([[0.0, 2.0], [nan, 1.0]])
    expected = torch.tensor([[1.0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]])
    torch.testing.assert_close(network(x), network[1](expected))
    assert torch.equal(network[0](torch.tensor([[0, 2]])), expected[:1])


def test_slots_share_the_attention_of_each_input_and_do_not_depend_on_the_order_of_inputs():
    torch.manual_seed(0)
    network, inputs = SlotAttention(3, 6, iterations=2).double(), torch.randn(4, 2, 10, 6).double()
    slots, attention = network(inputs)
    assert (slots.shape, attention.shape) == ((4, 2, 3, 6), (4, 2, 3, 10))
    torch.testing.assert_close(attention.sum(-2), torch.ones(4, 2, 10).double())
    order = torch.randperm(10)
    moved, moved_attention = network(inputs[..., order, :])
    torch.testing.assert_close(moved, slots)
    torch.testing.assert_close(moved_attention, attention[..., order])
    torch.testing.assert_close(network(inputs[1, 0])[0], slots[1, 0])


def test_slots_move_as_in_the_algorithm_of_the_paper():
    """One iteration, with plain loops and torch's gated recurrent unit."""
    torch.manual_seed(0)
    network, inputs = SlotAttention(2, 3, iterations=1).double(), torch.randn(1, 5, 3).double()
    found, attention = network(inputs)
    keys, values = network.to_keys_and_values(network.norm_inputs(inputs[0])).chunk(2, -1)
    queries = network.to_queries(network.norm_slots(network.start))
    weights = torch.zeros(2, 5).double()
    for place in range(5):
        scores = torch.stack([queries[slot] @ keys[place] / 3**0.5 for slot in range(2)]).exp()
        weights[:, place] = scores / scores.sum()
    torch.testing.assert_close(attention[0], weights)
    recurrent = nn.GRUCell(3, 3).double()
    names = {"weight_ih": "gates_of_update.weight", "weight_hh": "gates_of_slots.weight"}
    names |= {"bias_ih": "gates_of_update.bias", "bias_hh": "gates_of_slots.bias"}
    recurrent.load_state_dict({name: network.get_parameter(other) for name, other in names.items()})
    for slot in range(2):
        update = sum(weights[slot, place] * values[place] for place in range(5)) / weights[slot].sum()
        moved = recurrent(update[None], network.start[slot][None])
        expected = moved + network.residual(network.norm_update(moved))
        torch.testing.assert_close(found[0, slot], expected[0], rtol=1e-4, atol=1e-5)


def test_slots_start_at_different_places_and_every_weight_matters():
    torch.manual_seed(0)
    network = SlotAttention(3, 4)
    slots, _ = network(torch.randn(2, 7, 4))
    assert (slots[:, 0] - slots[:, 1]).abs().min() > 0
    slots.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_inputs_of_another_size_than_the_slots_are_refused():
    with pytest.raises(ValueError, match=r"`inputs` must be \(\*, T, 3\), got .* of shape \(5, 4\)"):
        SlotAttention(2, 3)(torch.zeros(5, 4))


def test_a_bias_moves_attention_and_given_slots_are_the_first_ones():
    torch.manual_seed(0)
    network, inputs = SlotAttention(2, 3, iterations=1).double(), torch.randn(5, 3).double()
    slots, attention = network(inputs, network.start.flip(0))
    torch.testing.assert_close(slots, network(inputs)[0].flip(0))
    bias = torch.tensor([[0.0], [2.0]]).double()
    _, moved = network(inputs, network.start.flip(0), bias)
    torch.testing.assert_close(moved[1] / moved[0], attention[1] / attention[0] * torch.tensor(2.0).double().exp())


def test_a_perceptron_of_each_pixel_reads_the_features_and_the_coordinates_of_the_pixel():
    torch.manual_seed(0)
    decoder = spatial_broadcast((2, 3, 5), [6, 4], nn.Tanh)(3, 2 * 2 * 3 * 5)
    z = torch.randn(7, 3)
    images = decoder(z).reshape(7, 2, 2, 3, 5)  # raw outputs, channels, rows, columns
    plain = nn.Linear(5, 6)
    with torch.no_grad():
        plain.weight.copy_(torch.cat([decoder.of_features.weight, decoder.of_places.weight], 1))
        plain.bias.copy_(decoder.of_features.bias)
    for row, y in enumerate([-2 / 3, 0.0, 2 / 3]):
        for column, x in enumerate([-0.8, -0.4, 0.0, 0.4, 0.8]):
            inputs = torch.cat([z, torch.tensor([y, x]).expand(7, 2)], 1)
            torch.testing.assert_close(images[..., row, column].flatten(1), decoder.network(plain(inputs)))


def test_a_perceptron_of_each_pixel_names_wrong_sizes():
    with pytest.raises(ValueError, match=r"`hidden` must be one or more positive sizes.*got \(0,\)"):
        spatial_broadcast((1, 4, 4), (0,))(2, 16)
    with pytest.raises(ValueError, match=r"`image` must be .* with a product of out_features = 17"):
        spatial_broadcast((1, 4, 4))(2, 17)
