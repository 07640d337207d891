"""Networks, by factory: a function ``(in_features, out_features) -> nn.Module``.

A part such as :class:`pyro_vae.parts.guides.DiagonalNormal` knows the number of input features and of the raw outputs
that its distribution needs; the factory builds the network between them. Any function of two integers is a factory:

>>> from torch import nn
>>> def residual(in_features, out_features):
...     return nn.Sequential(nn.Linear(in_features, 64), nn.Tanh(), nn.Linear(64, out_features))

The module that it returns maps ``(N, in_features)`` to ``(N, out_features)``. Those here take any number of dimensions
on the left, which Pyro's enumeration and ``vae.decode`` of several draws add.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import ceil, prod
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae._utils.validation import (
    boolean,
    broadcasts,
    describe,
    is_integer,
    numbers,
    positive_int,
    real_tensor,
    with_article,
)

__all__ = ["NetworkFactory", "SlotAttention", "build", "convolutional", "deconvolutional", "linear"]
__all__ += ["mlp", "one_hot", "reshaped", "spatial_broadcast", "standardized", "starting_at", "with_missing"]

NetworkFactory = Callable[[int, int], nn.Module]


def build(network: NetworkFactory, in_features: int, out_features: int) -> nn.Module:
    """Build the network of a factory for these sizes, or raise a TypeError if ``network`` is not a factory.

    >>> build(nn.Linear(2, 3), 2, 3)
    Traceback (most recent call last):
        ...
    TypeError: `network` must be a factory, ..., got a Linear, a finished module
    """
    must = "`network` must be a factory, (in_features, out_features) -> nn.Module, such as networks.mlp([32])"
    if isinstance(network, nn.Module):
        raise TypeError(f"{must}, got {with_article(type(network).__name__)}, a finished module")
    positive_int(in_features, "in_features")
    positive_int(out_features, "out_features")
    must = f"{must}: called with ({in_features}, {out_features}), it"
    try:
        module = network(in_features, out_features)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{must} raised: {error}") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"{must} returned {module!r}")
    return module


def linear(bias: bool = True) -> NetworkFactory:
    """A single affine map.

    >>> linear()(2, 3)
    Linear(in_features=2, out_features=3, bias=True)
    """
    boolean(bias, "bias")
    return lambda in_features, out_features: nn.Linear(in_features, out_features, bias=bias)


def mlp(hidden: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> NetworkFactory:
    """A multilayer perceptron with these hidden sizes.

    >>> mlp([32], activation=nn.Tanh)(2, 3)
    Sequential(
      (0): Linear(in_features=2, out_features=32, bias=True)
      (1): Tanh()
      (2): Linear(in_features=32, out_features=3, bias=True)
    )
    """
    listed = isinstance(hidden, Iterable) and not isinstance(hidden, Tensor)
    if not listed or not all(is_integer(size) and size > 0 for size in hidden):
        raise ValueError(f"`hidden` must be a list of positive sizes, such as [400] or [512, 256], got {hidden!r}")
    _check_activation(activation)
    widths = [int(size) for size in hidden]  # numbers of NumPy could not be saved with the layers

    def build(in_features: int, out_features: int) -> nn.Module:
        *inner, last = pairwise([in_features, *widths, out_features])
        layers = [layer for sizes in inner for layer in (nn.Linear(*sizes), activation())]
        return nn.Sequential(*layers, nn.Linear(*last))

    return build


def _check_activation(activation: object) -> None:
    if isinstance(activation, nn.Module) or not callable(activation):
        must = "a class or function of a module, such as nn.Tanh"
        raise TypeError(f"`activation` must be {must}, got {describe(activation)}")


class _Standardized(nn.Module):
    """Subtract a fixed location from the input and divide by a fixed scale."""

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.loc) / self.scale


def standardized(network: NetworkFactory, loc: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> NetworkFactory:
    r"""A network of standardized inputs :math:`(x - \mathrm{loc}) / \mathrm{scale}`; both numbers are fixed.

    For an encoder use the mean of the data as loc; for a decoder both moments of the prior: 0.5 and 0.5 make bits ±1.

    Args:
        network: factory of the network that follows.
        loc: a number, or one for each feature, ``(in_features,)``.
        scale: positive, likewise.

    >>> decoder = standardized(mlp([32]), loc=0.5, scale=0.5)(2, 3)
    >>> decoder[0](torch.tensor([0.0, 1.0]))
    tensor([-1.,  1.])
    """
    fixed = numbers(loc, "loc"), numbers(scale, "scale")  # in the dtype of the network
    for name, value in zip(("loc", "scale"), fixed, strict=True):
        if value.dim() > 1 or not value.isfinite().all():
            raise ValueError(f"`{name}` must be a finite number or a tensor of them, (in_features,), got {value}")
    if not (fixed[1] > 0).all():
        raise ValueError(f"`scale` must be positive numbers, got {scale!r}")

    def build_standardized(in_features: int, out_features: int) -> nn.Module:
        for name, value in zip(("loc", "scale"), fixed, strict=True):
            if value.dim() and len(value) != in_features:
                raise ValueError(f"`{name}` must have {in_features} numbers, one for each feature, got {len(value)}")
        inner = build(network, in_features, out_features)
        return nn.Sequential(_Standardized(*(value.detach().clone() for value in fixed)), inner)

    return build_standardized


def starting_at(network: NetworkFactory, outputs: Tensor | float) -> NetworkFactory:
    r"""A network whose outputs begin near given numbers: those are the first biases of its last layer.

    For a decoder of zeros and ones use the log-odds of the mean of the data, ``torch.logit(x.mean(0), eps=1e-3)``; for
    one of a normal with a ``"shared"`` scale, ``x.mean(0)``. The first steps of training then need not learn the mean.

    Args:
        network: factory of a network whose last layer is an ``nn.Linear`` with a bias.
        outputs: a number, or one for each raw output, ``(out_features,)``.

    Raises:
        ValueError: when the network is built, if its last layer is no such layer, or for another number of outputs.

    >>> x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    >>> starting_at(mlp([32]), torch.logit(x.mean(0), eps=0.1))(3, 2)[-1].bias.data
    tensor([-0.6931,  2.1972])
    """
    fixed = numbers(outputs, "outputs").detach().clone()
    if fixed.dim() > 1 or not fixed.isfinite().all():
        raise ValueError(f"`outputs` must be a finite number or a tensor of them, (out_features,), got {fixed}")

    def build_starting(in_features: int, out_features: int) -> nn.Module:
        module = build(network, in_features, out_features)
        if fixed.dim() and len(fixed) != out_features:
            raise ValueError(f"`outputs` must have {out_features} numbers, one for each raw output, got {len(fixed)}")
        *_, last = module.modules()
        if not isinstance(last, nn.Linear) or last.bias is None or last.out_features != out_features:
            must = f"end with an nn.Linear that has a bias and {out_features} outputs"
            raise ValueError(f"`network` must {must}, such as networks.mlp([32]), got {last!r} at the end")
        with torch.no_grad():
            last.bias.copy_(fixed.expand(out_features))
        return module

    return build_starting


class _Masked(nn.Module):
    """Replace NaN by zeros, and append the mask of observed entries as 0s and 1s."""

    def forward(self, inputs: Tensor) -> Tensor:
        missing = inputs.isnan()
        return torch.cat([inputs.masked_fill(missing, 0.0), (~missing).to(inputs.dtype)], dim=-1)


def with_missing(network: NetworkFactory) -> NetworkFactory:
    r"""A network that reads missing entries, NaN, as :math:`(m \odot x, m)` with the mask :math:`m` of observed ones.

    Without the mask a missing entry would look like an observed zero. ``standardized`` keeps NaN:
    ``standardized(with_missing(mlp([32])), loc, scale)`` puts the mean of each column in place of missing entries.

    Args:
        network: factory of the network that follows, with twice as many inputs; for images, twice as many channels.

    Source: Nazábal, Olmos, Ghahramani and Valera 2020, "Handling incomplete heterogeneous data using VAEs", for the
    zeros; Collier, Nazábal and Williams 2020, "VAEs in the presence of missing data", for the mask.

    >>> encoder = with_missing(linear())(2, 3)
    >>> encoder[0](torch.tensor([5.0, torch.nan])), encoder[1]
    (tensor([5., 0., 1., 0.]), Linear(in_features=4, out_features=3, bias=True))
    """
    return lambda in_features, out_features: nn.Sequential(_Masked(), build(network, 2 * in_features, out_features))


class _OneHot(nn.Module):
    """Turn class numbers into concatenated one-hot vectors; NaN into zeros."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, inputs: Tensor) -> Tensor:
        dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
        classes = torch.arange(self.num_classes, device=inputs.device)
        return (inputs[..., None] == classes).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"


def one_hot(num_classes: int, network: NetworkFactory) -> NetworkFactory:
    """A network that reads class numbers 0 to k - 1 as one-hot vectors: data of a categorical likelihood.

    A missing entry, NaN, becomes zeros, which no class has: no mask is needed.

    Args:
        num_classes: k, the same for every entry.
        network: factory of the network that follows, with k times as many inputs.

    >>> encoder = one_hot(3, linear())(2, 4)
    >>> encoder[0](torch.tensor([2.0, torch.nan])), encoder[1]
    (tensor([0., 0., 1., 0., 0., 0.]), Linear(in_features=6, out_features=4, bias=True))
    """
    if not is_integer(num_classes) or num_classes < 2:
        raise ValueError(f"`num_classes` must be an integer of 2 or more, got {num_classes!r}")
    classes = int(num_classes)  # a number of NumPy could not be saved with the layers
    return lambda in_features, out_features: nn.Sequential(
        _OneHot(classes), build(network, classes * in_features, out_features)
    )


class _OnImages(nn.Module):
    """Merge all dimensions on the left into the one that convolutions take, and restore them afterwards."""

    def __init__(self, network: nn.Module, in_shape: tuple[int, ...]):
        super().__init__()
        self.network, self.in_shape = network, in_shape

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.network(inputs.reshape(-1, *self.in_shape))
        return outputs.reshape(*inputs.shape[:-1], outputs.flatten(1).shape[1])


def reshaped(network: NetworkFactory, shape: Sequence[int] | None = None) -> NetworkFactory:
    """A network of one's own that takes one dimension on the left and no more, such as layers of convolutions.

    All dimensions on the left are merged into one before the network, and restored after it. Each row is read in a
    shape, and the outputs of each row are flattened.

    Args:
        network: factory of a module from ``(N, *shape)`` to ``(N, *)``, with ``out_features`` numbers for each row.
        shape: of a row, such as (channels, height, width), whose product is ``in_features``; by default
            ``(in_features,)``, for a decoder whose first layer is linear.

    Raises:
        ValueError: when the network is built, if ``shape`` does not have ``in_features`` entries.

    >>> def pooled(in_features, out_features):
    ...     return nn.Sequential(nn.Conv2d(3, out_features, kernel_size=3), nn.AdaptiveAvgPool2d(1))
    >>> reshaped(pooled, (3, 8, 8))(192, 4)(torch.zeros(5, 7, 192)).shape
    torch.Size([5, 7, 4])
    """
    if shape is not None and not _are_sizes(shape):
        raise ValueError(f"`shape` must be one or more positive sizes, such as (1, 28, 28), got {shape!r}")

    def build_reshaped(in_features: int, out_features: int) -> nn.Module:
        sizes = (in_features,) if shape is None else tuple(int(size) for size in shape)
        if prod(sizes) != in_features:
            raise ValueError(f"`shape` must have a product of in_features = {in_features}, got {shape!r}")
        return _OnImages(build(network, in_features, out_features), sizes)

    return build_reshaped


def _are_sizes(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(is_integer(size) and size > 0 for size in value)


def _image_and_channels(
    image: Sequence[int], channels: Sequence[int], features: int, name: str, of_channels: str = "channels"
) -> tuple[tuple[int, int, int], list[int]]:
    """Return both as numbers of Python, if the sizes fit: numbers of NumPy could not be saved with the layers."""
    if not _are_sizes(channels):
        raise ValueError(f"`{of_channels}` must be one or more positive sizes, such as (16, 32), got {channels!r}")
    fits = _are_sizes(image) and len(image) == 3
    if not fits or features % prod(image) or (name == "in_features" and features != prod(image)):
        must = f"(channels, height, width) with a product of {name} = {features}"
        raise ValueError(f"`image` must be {must}, got {image!r}")
    return (int(image[0]), int(image[1]), int(image[2])), [int(size) for size in channels]


def convolutional(
    image: tuple[int, int, int], channels: Sequence[int] = (16, 32), activation: Callable[[], nn.Module] = nn.ReLU
) -> NetworkFactory:
    """Convolutions of stride 2 from an image to features, for encoders.

    Args:
        image: ``(channels, height, width)`` of the input, which is flattened.
        channels: output channels of each 3 × 3 convolution; each halves height and width, rounding up.
        activation: the module after each convolution.

    >>> convolutional((1, 8, 8))(64, 4)(torch.zeros(5, 7, 64)).shape
    torch.Size([5, 7, 4])
    """
    _check_activation(activation)

    def build(in_features: int, out_features: int) -> nn.Module:
        shape, widths = _image_and_channels(image, channels, in_features, "in_features")
        layers: list[nn.Module] = []
        for sizes in pairwise([shape[0], *widths]):
            layers += [nn.Conv2d(*sizes, kernel_size=3, stride=2, padding=1), activation()]
        head = nn.Linear(widths[-1] * prod(_halved(shape, len(widths))), out_features)
        return _OnImages(nn.Sequential(*layers, nn.Flatten(), head), shape)

    return build


def deconvolutional(
    image: tuple[int, int, int], channels: Sequence[int] = (32, 16), activation: Callable[[], nn.Module] = nn.ReLU
) -> NetworkFactory:
    """Transposed convolutions of stride 2 from features to an image, for decoders.

    Args:
        image: ``(channels, height, width)`` of the output, which is flattened. Several raw outputs per pixel, such as a
            location and a scale, are further channels.
        channels: input channels of each transposed convolution; each doubles height and width.
        activation: the module before each transposed convolution.

    >>> deconvolutional((1, 28, 28))(2, 784)(torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5, 784])
    """
    _check_activation(activation)

    def build(in_features: int, out_features: int) -> nn.Module:
        shape, widths = _image_and_channels(image, channels, out_features, "out_features")
        sizes = [_halved(shape, depth) for depth in range(len(widths), -1, -1)]
        first = nn.Linear(in_features, widths[0] * prod(sizes[0]))
        layers: list[nn.Module] = [first, nn.Unflatten(1, (widths[0], *sizes[0]))]
        last = shape[0] * (out_features // prod(shape))
        for (before, after), (small, large) in zip(pairwise([*widths, last]), pairwise(sizes), strict=True):
            # A stride of 2 maps n to 2n - 1; an even target needs one row or column more.
            extra = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
            layers += [activation(), nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=extra)]
        return _OnImages(nn.Sequential(*layers), (in_features,))

    return build


class _SpatialBroadcast(nn.Module):
    """Read features and the coordinates of a pixel, for all pixels of an image; return channels of pixels, flat."""

    places: Tensor

    def __init__(self, in_features: int, out_channels: int, size: tuple[int, int], hidden: list[int], activation: Any):
        super().__init__()
        axes = [(2 * torch.arange(extent) + 1) / extent - 1 for extent in size]
        self.register_buffer("places", torch.cartesian_prod(*axes))
        # The first layer of an MLP that reads both, without a copy of the features for each pixel.
        self.of_features, self.of_places = nn.Linear(in_features, hidden[0]), nn.Linear(2, hidden[0], bias=False)
        layers = [layer for sizes in pairwise(hidden) for layer in (activation(), nn.Linear(*sizes))]
        self.network = nn.Sequential(*layers, activation(), nn.Linear(hidden[-1], out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.of_features(inputs)[..., None, :] + self.of_places(self.places)
        return self.network(first).transpose(-1, -2).flatten(-2)


def spatial_broadcast(
    image: tuple[int, int, int], hidden: Sequence[int] = (32, 32), activation: Callable[[], nn.Module] = nn.ReLU
) -> NetworkFactory:
    """One perceptron for all pixels, which reads the features and the coordinates of its pixel; for decoders.

    A shape that moves needs no other weights: the network learns what there is at a distance from its centre. For
    images of few objects it learns faster than :func:`deconvolutional`, and its codes are more often positions.

    Args:
        image: ``(channels, height, width)`` of the output, which is flattened. Several raw outputs per pixel are
            further channels. Coordinates are from -1 to 1 at the edges.
        hidden: hidden sizes of the perceptron.
        activation: the module after each hidden layer.

    Source: Watters, Matthey, Burgess and Lerchner 2019, "Spatial broadcast decoder"; here with convolutions of 1 × 1.

    >>> spatial_broadcast((3, 8, 8))(2, 192)(torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5, 192])
    """
    _check_activation(activation)

    def build(in_features: int, out_features: int) -> nn.Module:
        shape, sizes = _image_and_channels(image, hidden, out_features, "out_features", "hidden")
        channels = out_features // (shape[1] * shape[2])
        return _SpatialBroadcast(in_features, channels, (shape[1], shape[2]), sizes, activation)

    return build


def _halved(image: tuple[int, int, int], times: int) -> tuple[int, int]:
    return ceil(image[1] / 2**times), ceil(image[2] / 2**times)


class SlotAttention(nn.Module):
    r"""Slots that compete for the inputs, such as the places of an image: a differentiable clustering.

    In each iteration every input divides its attention among the K slots, and each slot moves to the mean of what it
    receives, through a gated recurrent unit and a residual network that all slots share,

    .. math:: a_{kt} = \mathrm{softmax}_k\left(\frac{q(s_k)^\top k(h_t)}{\sqrt{D}}\right), \qquad
       u_k = \sum_t \frac{a_{kt}}{\sum_{t'} a_{kt'}} v(h_t), \qquad s_k \leftarrow \mathrm{GRU}(u_k, s_k).

    The first slots are learned, one for each k, and not drawn from one normal as in the paper: slots take roles, and
    learn in fewer steps.

    Args:
        num_slots: K.
        features: D, of inputs and slots.
        iterations: how often the slots move.

    Source: Locatello et al. 2020, "Object-centric learning with slot attention", algorithm 1.

    >>> slots, attention = SlotAttention(num_slots=3, features=8)(torch.randn(5, 100, 8))
    >>> slots.shape, attention.shape
    (torch.Size([5, 3, 8]), torch.Size([5, 3, 100]))
    """

    def __init__(self, num_slots: int, features: int, iterations: int = 3):
        super().__init__()
        self.iterations = positive_int(iterations, "iterations")
        positive_int(num_slots, "num_slots")
        positive_int(features, "features")
        self.start = nn.Parameter(torch.randn(num_slots, features))
        self.norm_inputs, self.norm_slots, self.norm_update = (nn.LayerNorm(features) for _ in range(3))
        self.to_queries = nn.Linear(features, features, bias=False)
        self.to_keys_and_values = nn.Linear(features, 2 * features, bias=False)
        self.gates_of_update, self.gates_of_slots = (nn.Linear(features, 3 * features) for _ in range(2))
        self.residual = nn.Sequential(nn.Linear(features, 2 * features), nn.ReLU(), nn.Linear(2 * features, features))

    def forward(self, inputs: Tensor, slots: Tensor | None = None, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Map inputs ``(*, T, D)`` to slots ``(*, K, D)`` and their last attention, ``(*, K, T)``.

        The attention of an input, over the slots, sums to one.

        Args:
            inputs: such as the features of T places.
            slots: the first slots, ``(*, K, D)``, in place of the learned ones.
            bias: added to the scores, ``(*, K, T)``, such as a penalty of the distance between a slot and a place.
        """
        features = self.start.shape[1]
        real_tensor(inputs, "inputs", f"a tensor (*, T, {features})")
        if inputs.dim() < 2 or inputs.shape[-1] != features:
            raise ValueError(f"`inputs` must be (*, T, {features}), got {describe(inputs)}")
        slots = self.start.expand(*inputs.shape[:-2], -1, -1) if slots is None else slots
        real_tensor(slots, "slots", f"a tensor (*, K, {features})")
        if slots.dim() < 2 or slots.shape[-1] != features or not broadcasts(slots.shape[:-2], inputs.shape[:-2]):
            raise ValueError(f"`slots` must be (*, K, {features}), as many as there are inputs, got {describe(slots)}")
        batch_shape = torch.broadcast_shapes(slots.shape[:-2], inputs.shape[:-2])
        scores_shape = (*batch_shape, slots.shape[-2], inputs.shape[-2])
        if not isinstance(bias, Real):
            bias = real_tensor(bias, "bias", expected := f"a number or a tensor {scores_shape}")
            if not broadcasts(bias.shape, scores_shape):
                raise ValueError(f"`bias` must be {expected}, got {describe(bias)}")
        keys, values = self.to_keys_and_values(self.norm_inputs(inputs)).chunk(2, -1)
        for _ in range(self.iterations):
            scores = self.to_queries(self.norm_slots(slots)) @ keys.mT / keys.shape[-1] ** 0.5
            attention = (scores + bias).softmax(-2)
            update = attention / (attention.sum(-1, keepdim=True) + 1e-6) @ values
            slots = self._recur(update, slots)
            slots = slots + self.residual(self.norm_update(slots))
        return slots, attention

    def _recur(self, update: Tensor, slots: Tensor) -> Tensor:
        """A gated recurrent unit, as ``nn.GRUCell``, which takes no dimensions on the left."""
        reset, keep, new = self.gates_of_update(update).chunk(3, -1)
        own_reset, own_keep, own_new = self.gates_of_slots(slots).chunk(3, -1)
        keep = torch.sigmoid(keep + own_keep)
        return keep * slots + (1 - keep) * torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
