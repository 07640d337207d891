"""Every picture returns labelled axes, draws only on the axes it is given, and leaves the process as it was."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pytest
import torch
from pairs import bernoulli, gaussian, gumbel, relaxed

from plots import plot_inputs as inputs
from pyro_vae import plots

CODES, LABELS = torch.zeros(9, 2), torch.arange(9) % 3
EPOCHS = ("epoch", "ELBO and its terms, nats per datum")
BEST = ("log p(x) minus that of the best, nats per datum", "")
PLANE = ("rate, nats per datum", "distortion, nats per datum")
GAP = {"log_evidence": -1.2, "validation_log_evidence": -1.1}
IMAGES, SHAPE = inputs.IMAGES, (3, 4)
RATIOS = tuple(f"{size} / length of the exact gradient" for size in ("standard deviation", "bias"))
KHAT = ("index of the datum", r"$\hat{k}$, tail shape of the importance weights")
RANKS = ("u, fraction of draws below the truth", "fraction of data below u, minus u")
QUANTILES = tuple(f"z[{i}], at quantiles of the prior" for i in (0, 1))
VARIED = ("value of the row's coordinate; the others are fixed", "coordinate and its value in z")


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
    "plate_diagram": (partial(inputs.draw_diagram, gaussian(1, 2)), None),
    "plate_diagram-relaxed": (partial(inputs.draw_diagram, relaxed(1, 2)), None),
}


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
