"""Every picture returns labelled axes, draws only on the axes it is given, and leaves the process as it was."""

import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
from pairs import bernoulli, gaussian, gumbel, relaxed

import pyro_vae as pv
from plots import plot_inputs as inputs
from pyro_vae import plots
from pyro_vae.diagnostics.calibration import Calibration, CalibrationErrors
from pyro_vae.diagnostics.gradients import Comparison

CODES, LABELS = torch.zeros(9, 2), torch.arange(9) % 3
EPOCHS = ("epoch", "ELBO and its terms, nats per datum")
BEST = ("log p(x) minus that of the best, nats per datum", "")
BEST_RUN = ("held-out ELBO minus that of the best, nats per datum", "")
PLANE = ("rate, nats per datum", "distortion, nats per datum")
GAP = {"log_evidence": -1.2, "validation_log_evidence": -1.1}
IMAGES, SHAPE = inputs.IMAGES, (3, 4)
RATIOS = tuple(f"{size} / length of the exact gradient" for size in ("standard deviation", "bias"))
KHAT = ("index of the datum", r"$\hat{k}$, tail shape of the importance weights")
RANKS = ("u, fraction of draws below the truth", "fraction of data below u, minus u")
QUANTILES = tuple(f"z[{i}], at quantiles of the prior" for i in (0, 1))
VARIED = ("value of the row's coordinate; the others are fixed", "coordinate,\nand its value in z")


def posterior_of(make, latent):
    return partial(inputs.draw_posterior, make(latent, 2))


# A name in plots.__all__, perhaps with a variant after "-": the function, and the labels if the picture has axes.
DRAWINGS = {
    "bias_variance": (partial(plots.bias_variance, inputs.COMPARISON), RATIOS),
    "calibration": (lambda **options: plots.calibration(inputs.narrow_calibration(), **options), RANKS),
    "khat": (partial(plots.khat, inputs.EVIDENCE), KHAT),
    "evidence_comparison": (lambda **options: plots.evidence_comparison(inputs.evidence_table(), **options), BEST),
    "training_curves": (partial(plots.training_curves, inputs.HISTORY), EPOCHS),
    "training_curves-validated": (partial(plots.training_curves, inputs.VALIDATED), EPOCHS),
    "training_curves-gap": (partial(plots.training_curves, inputs.VALIDATED, **GAP), EPOCHS),
    "rate_distortion": (partial(plots.rate_distortion, {"one": (1.0, 2.0), "other": (0.5, 3.0)}), PLANE),
    "latent_map": (partial(plots.latent_map, CODES, LABELS), ("z[0]", "z[1]")),
    "latent_map-one": (partial(plots.latent_map, CODES[:, :1], LABELS), ("z", "label, with jitter")),
    "posterior": (posterior_of(gaussian, 1), ("value of z", "density")),
    "posterior-gumbel": (posterior_of(gumbel, (1, 2)), ("log-ratio of the classes of z", "density")),
    "posterior-two": (posterior_of(gaussian, 2), ("z[0]", "z[1]")),
    "posterior-discrete": (posterior_of(bernoulli, 1), ("state of z", "probability")),
    "image_grid": (partial(plots.image_grid, IMAGES.reshape(5, *SHAPE), columns=2), None),
    "manifold": (partial(plots.manifold, inputs.decode, SHAPE, size=3), QUANTILES),
    "traversals": (partial(plots.traversals, inputs.decode, torch.tensor([0.5, -1.0]), SHAPE), VARIED),
    "reconstructions": (partial(plots.reconstructions, lambda x: 0.5 * x, IMAGES, SHAPE), ("", "")),
    "samples": (partial(plots.samples, lambda count: torch.rand(count, 12), SHAPE), None),
    "sweep": (
        lambda **options: plots.sweep(inputs.sweep_of(np.array([[-3.0, -2.8], [-2.0, -2.1]]), Path()), **options),
        BEST_RUN,
    ),
    "plate_diagram": (partial(inputs.draw_diagram, gaussian(1, 2)), None),
    "plate_diagram-relaxed": (partial(inputs.draw_diagram, relaxed(1, 2)), None),
}


def many_names(count, length=60):
    """Names of that length, each another one."""
    return [
        f"{'a long name of a model with many words in it and its number ' * 2}"[: length - 3] + f" {index:02d}"
        for index in range(count)
    ]


def long_evidence(count):
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    normals = (torch.distributions.Normal(0.0, 1 + index / 10) for index in range(count))
    return pv.compare_evidence(
        {name: normal.log_prob(x) for name, normal in zip(many_names(count), normals, strict=True)}
    )


def long_comparison(count):
    measured = inputs.COMPARISON.measured["unbiased"]["all"]
    rows = {name: {"all": replace(measured, variance=1.0 + index)} for index, name in enumerate(many_names(count))}
    return Comparison(rows, dict.fromkeys(rows, 1))


def long_calibration():
    """Twenty coordinates with long names, each outside the band."""
    generator = torch.Generator().manual_seed(0)
    ranks = (torch.rand(500, 21, generator=generator) ** 2 * 20).long()
    errors = CalibrationErrors(*torch.ones(4, 20), (1.0, 0.0, 0.0, 0.0))
    return Calibration(
        (*many_names(20), "log p(x, z)"), ranks, 19, torch.zeros(21), errors, None, 0.0, 0.0, 1.4, alpha=1e-3
    )


ONE = pv.Evidence(torch.zeros(1), torch.ones(1), torch.tensor([0.2]), num_samples=100)
EXTREMES = {
    "bias_variance-many": lambda **options: plots.bias_variance(long_comparison(15), **options),
    "calibration-many": lambda **options: plots.calibration(long_calibration(), **options),
    "evidence_comparison-many": lambda **options: plots.evidence_comparison(long_evidence(15), **options),
    "evidence_comparison-one": lambda **options: plots.evidence_comparison(long_evidence(1), **options),
    "rate_distortion-many": partial(
        plots.rate_distortion, {name: (1.0 + index, 3.0) for index, name in enumerate(many_names(15))}
    ),
    "rate_distortion-unbroken": partial(plots.rate_distortion, {"x" * 90: (1.0, 2.0)}),
    "latent_map-classes": partial(plots.latent_map, torch.randn(40, 3), torch.arange(40) % 20),
    "latent_map-names": partial(plots.latent_map, torch.randn(40, 2), many_names(20) * 2, name="n" * 60),
    "latent_map-strip": partial(plots.latent_map, torch.randn(40, 1), many_names(20) * 2),
    "latent_map-datum": partial(plots.latent_map, torch.randn(1, 5), ["only one"]),
    "khat-one": partial(plots.khat, ONE),
    "training_curves-one": partial(plots.training_curves, {name: each[:1] for name, each in inputs.VALIDATED.items()}),
    "image_grid-one": partial(plots.image_grid, torch.rand(1, 8, 8)),
    "image_grid-names": partial(plots.image_grid, torch.rand(4, 8, 8), columns=2, row_names=["given a label", "real"]),
    "image_grid-colour": partial(plots.image_grid, torch.rand(7, 3, 8, 8), columns=3),
    "samples-colour": partial(plots.samples, lambda count: torch.rand(count, 3 * 8 * 8), (3, 8, 8)),
    "manifold-colour": partial(plots.manifold, lambda z: z.sigmoid().repeat(1, 24), (3, 4, 4), size=3),
}


@pytest.mark.parametrize("name", [*DRAWINGS, *EXTREMES])
def test_nothing_is_cut_off_by_a_plain_savefig(name):
    draw = EXTREMES[name] if name in EXTREMES else DRAWINGS[name][0]
    figure = draw().figure
    figure.canvas.draw()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01, "cut off on the left"
    assert box.y0 >= -0.01, "cut off at the bottom"
    assert box.x1 <= width + 0.01, "cut off on the right"
    assert box.y1 <= height + 0.01, "cut off at the top"
    (ax,) = figure.axes
    inches = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    assert inches.height > 0.25, "the axes have no room"
    assert inches.width > 1.5, "the axes have no room"


@pytest.mark.parametrize("name", plots.__all__)
def test_the_subject_comes_first_and_every_option_is_a_keyword(name):
    parameters = inspect.signature(getattr(plots, name)).parameters
    assert list(parameters)[-1] == "ax"
    for parameter in parameters.values():
        is_option = parameter.default is not parameter.empty
        assert is_option == (parameter.kind is parameter.KEYWORD_ONLY), parameter
    assert parameters["ax"].default is None


@pytest.mark.parametrize("name", plots.__all__)
def test_the_reference_shows_each_function_with_its_picture(name):
    text = inspect.getdoc(getattr(plots, name))
    assert f".. plot::\n    :include-source:\n    :filename-prefix: {name}\n" in text


def test_every_plot_is_in_the_list():
    assert {name.split("-")[0] for name in DRAWINGS} == set(plots.__all__)


@pytest.mark.parametrize(("draw", "labels"), DRAWINGS.values(), ids=DRAWINGS.keys())
def test_a_plot_returns_labelled_axes_that_are_not_blank_and_never_calls_show(draw, labels, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a plot called show()")

    monkeypatch.setattr(plt, "show", fail)
    monkeypatch.setattr(plt.Figure, "show", fail)
    ax = draw()
    assert isinstance(ax, plt.Axes)
    assert ((ax.get_xlabel(), ax.get_ylabel()), ax.axison) == (labels or ("", ""), labels is not None)
    ax.figure.canvas.draw()
    assert np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].std() > 3


@pytest.mark.parametrize("draw", [draw for draw, _ in DRAWINGS.values()], ids=DRAWINGS.keys())
def test_a_plot_draws_on_the_given_axes_and_nowhere_else(draw):
    _, (left, right) = plt.subplots(1, 2)
    figures, empty, before = plt.get_fignums(), len(right.get_children()), len(left.get_children())
    assert draw(ax=left) is left
    assert (plt.get_fignums(), len(right.get_children())) == (figures, empty)
    assert len(left.get_children()) > before


@pytest.mark.parametrize("make", [gaussian, bernoulli])
def test_plots_change_neither_random_states_nor_parameters(make, random_states):
    vae = make(1, 2)
    vae.register()
    state, stored = random_states(), set(pyro.get_param_store().keys())
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    inputs.draw_posterior(vae)
    inputs.draw_diagram(vae)
    plots.latent_map(CODES[:, :1], LABELS)
    plots.image_grid(torch.zeros(2, 3, 3), columns=2)
    plots.manifold(lambda z: z[:, :1].sigmoid(), (1, 1), size=2)
    plots.reconstructions(vae.reconstruct, inputs.DATUM, (1, 2))
    plots.samples(vae.generate, (1, 2), count=3)
    plots.traversals(lambda z: vae.decode(z).mean, torch.zeros(1), (1, 2))
    plots.training_curves(inputs.HISTORY)
    assert (random_states(), set(pyro.get_param_store().keys())) == (state, stored)
    assert all(torch.equal(parameter, before[name]) for name, parameter in vae.named_parameters())
