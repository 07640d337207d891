"""Pictures: each answers its question truly, labels its axes, and leaves the process alone."""

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, plots, priors
from pyro_vae._utils.rng import seeded
from pyro_vae.diagnostics.gradients import Comparison, Measured
from pyro_vae.parts.networks import linear, mlp

NET = mlp([4], nn.Tanh)
DATUM = torch.tensor([[0.3, -0.2]])
X = torch.zeros(4, 2)
HISTORY = {"elbo": [-3.0, -2.0, -1.5], "distortion": [2.5, 1.2, 1.0], "rate": [0.5, 0.8, 0.5]}
VALIDATED = HISTORY | {f"validation_{name}": [value + 0.1 for value in values] for name, values in HISTORY.items()}


def gaussian(latent=1):
    return pv.VAE(
        priors.StandardNormal(latent), guides.DiagonalNormal(2, latent, NET), likelihoods.Normal(latent, 2, NET)
    )


def relaxed():
    return pv.VAE(
        priors.RelaxedBernoulli(1, temperature=0.5),
        guides.RelaxedBernoulli(2, 1, NET, temperature=0.66),
        likelihoods.Normal(1, 2, linear()),
    )


def gumbel():
    return pv.VAE(
        priors.GumbelSoftmax((1, 2), temperature=0.5),
        guides.GumbelSoftmax(2, (1, 2), NET, temperature=0.66),
        likelihoods.Normal((1, 2), 2, linear()),
    )


def bernoulli(latent=1):
    return pv.VAE(priors.Bernoulli(latent), guides.Bernoulli(2, latent, NET), likelihoods.Normal(latent, 2, linear()))


def one_hot():
    return pv.VAE(
        priors.OneHotCategorical((1, 3)),
        guides.OneHotCategorical(2, (1, 3), NET),
        likelihoods.Normal((1, 3), 2, linear()),
    )


CONTINUOUS = {"gaussian": gaussian, "relaxed": relaxed, "gumbel": gumbel}
DISCRETE = {"bernoulli": bernoulli, "two bernoullis": lambda: bernoulli(2), "one-hot": one_hot}


def posterior_of(make, **options):
    vae = make()
    return plots.posterior(vae.model, vae.guide, DATUM, **options)


def plates_of(make, **options):
    vae = make()
    return plots.plate_diagram(vae.model, X, guide=vae.guide, **options)


IMAGES = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))


def decode(z):
    """Images of which every pixel tells the code."""
    return (z @ torch.tensor([[1.0], [10.0]])).expand(-1, 12) / 100


COMPARISON = Comparison(
    {
        "biased": {"all": Measured(2.0, 0.1, 0.01, 4.0, max_z=9.0, num_parameters=3, num_tested=3, repeats=99)},
        "unbiased": {"all": Measured(2.0, 0.0, 0.02, 9.0, max_z=1.0, num_parameters=3, num_tested=3, repeats=99)},
        "enumerated": {"all": Measured(2.0, 0.0, 0.0, 0.0, max_z=0.0, num_parameters=3, num_tested=3, repeats=99)},
    },
    {"biased": 1, "unbiased": 1, "enumerated": 8},
)


def narrow():
    """Of two coordinates one too narrow, and log p(x, z) with them."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.tensor([0.5**0.5, 0.3])).to_event(1))

    return pv.calibrate(model, guide, X, num_simulations=500)


SHAPES = pv.Evidence(
    torch.zeros(6), torch.ones(6), torch.tensor([0.1, 0.9, -torch.inf, 0.4, torch.nan, 0.7]), num_samples=1000
)


def table():
    """Three models of 40 data: by quadrature, by draws to be trusted, and by draws that are not."""
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    exact = {scale: dist.Normal(0.0, scale).log_prob(x) for scale in (1.0, 1.5, 2.0)}
    shapes = torch.arange(40) / 40.0
    return pv.compare_evidence(
        {
            "exact": exact[1.0],
            "good": pv.Evidence(exact[1.5], torch.full((40,), 500.0), torch.zeros(40), 1000),
            "bad": pv.Evidence(exact[2.0], torch.full((40,), 20.0), shapes, 1000),
        }
    )


# Name in plots.__all__, a variant after "-"; the drawing; the labels of its axes, of pictures that have axes.
DRAWINGS = [
    (
        "bias_variance",
        lambda **o: plots.bias_variance(COMPARISON, **o),
        ("standard deviation / length of the exact gradient", "bias / length of the exact gradient"),
    ),
    (
        "calibration",
        lambda **o: plots.calibration(narrow(), **o),
        ("u, the share of draws below the truth", "share of data below u, less u"),
    ),
    (
        "khat",
        lambda **o: plots.khat(SHAPES, **o),
        ("number of the datum", r"$\hat{k}$, the shape of the tail of its weights"),
    ),
    (
        "evidence_comparison",
        lambda **o: plots.evidence_comparison(table(), **o),
        ("log p(x) less that of the best, nats per datum", ""),
    ),
    ("training_curves", lambda **o: plots.training_curves(HISTORY, **o), ("epoch", "nats per datum")),
    ("training_curves-validated", lambda **o: plots.training_curves(VALIDATED, **o), ("epoch", "nats per datum")),
    (
        "training_curves-gap",
        lambda **o: plots.training_curves(VALIDATED, log_evidence=-1.2, validation_log_evidence=-1.1, **o),
        ("epoch", "nats per datum"),
    ),
    (
        "rate_distortion",
        lambda **o: plots.rate_distortion({"one": (1.0, 2.0), "other": (0.5, 3.0)}, **o),
        ("rate, nats per datum", "distortion, nats per datum"),
    ),
    ("latent_map", lambda **o: plots.latent_map(torch.zeros(9, 2), torch.arange(9) % 3, **o), ("$z_1$", "$z_2$")),
    (
        "latent_map-one",
        lambda **o: plots.latent_map(torch.zeros(9, 1), torch.arange(9) % 3, **o),
        ("$z$", "label (with jitter)"),
    ),
    ("posterior", lambda **o: posterior_of(gaussian, **o), ("value of site $z$", "density")),
    ("posterior-gumbel", lambda **o: posterior_of(gumbel, **o), ("log-ratio of the classes of $z$", "density")),
    (
        "posterior-two",
        lambda **o: posterior_of(lambda: gaussian(2), **o),
        ("variable 1 of site $z$", "variable 2 of site $z$"),
    ),
    ("posterior-discrete", lambda **o: posterior_of(bernoulli, **o), ("state of $z$", "probability")),
    ("image_grid", lambda **o: plots.image_grid(torch.rand(5, 3, 4), 2, **o), None),
    (
        "manifold",
        lambda **o: plots.manifold(lambda z: z.sigmoid()[:, :1].expand(-1, 12), (3, 4), size=3, **o),
        ("$z_1$, at quantiles of the prior", "$z_2$, at quantiles of the prior"),
    ),
    (
        "traversals",
        lambda **o: plots.traversals(decode, torch.tensor([0.5, -1.0]), (3, 4), **o),
        ("value that the coordinate of the row takes; the others stay", "coordinate and its own value"),
    ),
    ("reconstructions", lambda **o: plots.reconstructions(lambda x: 0.5 * x, IMAGES, (3, 4), **o), ("", "")),
    ("samples", lambda **o: plots.samples(lambda count: torch.rand(count, 12), (3, 4), **o), None),
    ("plate_diagram", lambda **o: plates_of(gaussian, **o), None),
    ("plate_diagram-relaxed", lambda **o: plates_of(relaxed, **o), None),
]


def test_every_plot_is_in_the_list():
    assert {name.split("-")[0] for name, *_ in DRAWINGS} == set(plots.__all__)


@pytest.mark.parametrize(("draw", "labels"), [row[1:] for row in DRAWINGS], ids=[row[0] for row in DRAWINGS])
def test_a_plot_returns_labelled_axes_that_are_not_blank_and_shows_nothing(draw, labels, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plot called plt.show()")

    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(plt.Figure, "show", refuse)
    ax = draw()
    assert isinstance(ax, plt.Axes)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (labels or ("", ""))
    assert ax.axison == (labels is not None)
    ax.figure.canvas.draw()
    assert np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].std() > 3


@pytest.mark.parametrize("draw", [row[1] for row in DRAWINGS], ids=[row[0] for row in DRAWINGS])
def test_a_plot_draws_where_it_is_told_and_nowhere_else(draw):
    _, (left, right) = plt.subplots(1, 2)
    figures, empty, before = plt.get_fignums(), len(right.get_children()), len(left.get_children())
    assert draw(ax=left) is left
    assert plt.get_fignums() == figures
    assert len(right.get_children()) == empty
    assert len(left.get_children()) > before


@pytest.mark.parametrize("make", [gaussian, bernoulli])
def test_pictures_of_a_pair_touch_neither_random_streams_nor_parameters(make, random_states):
    vae = make()
    vae.register()
    state, stored = random_states(), set(pyro.get_param_store().keys())
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    plots.posterior(vae.model, vae.guide, DATUM)
    plots.plate_diagram(vae.model, X, guide=vae.guide)
    plots.latent_map(torch.zeros(9, 1), torch.arange(9) % 3)
    plots.image_grid(torch.zeros(2, 3, 3), columns=2)
    plots.manifold(lambda z: z[:, :1].sigmoid(), (1, 1), size=2)
    plots.reconstructions(vae.reconstruct, torch.zeros(3, 2), (1, 2))
    plots.samples(vae.generate, (1, 2), count=3)
    plots.traversals(lambda z: vae.decode(z).mean, torch.zeros(1), (1, 2))
    plots.training_curves(HISTORY)
    assert random_states() == state
    assert set(pyro.get_param_store().keys()) == stored
    assert all(torch.equal(parameter, before[name]) for name, parameter in vae.named_parameters())


# --- Training curves -------------------------------------------------------------------------------------------------


def test_elbo_in_the_picture_is_the_lower_of_minus_distortion_by_the_rate():
    curves = {line.get_label(): line for line in plots.training_curves(VALIDATED).lines}
    assert set(curves) == {name + end for name in ("ELBO", "-distortion", "-rate") for end in ("", ", validation")}
    for end in ("", ", validation"):
        elbo, distortion = curves["ELBO" + end].get_ydata(), curves["-distortion" + end].get_ydata()
        key = "validation_" if end else ""
        assert list(elbo) == VALIDATED[key + "elbo"]
        np.testing.assert_allclose(distortion, -np.array(VALIDATED[key + "distortion"]))
        assert list(curves["ELBO" + end].get_xdata()) == [1, 2, 3]
    assert curves["ELBO"].get_linestyle() != curves["ELBO, validation"].get_linestyle()


def test_a_surrogate_is_not_called_an_elbo():
    history = {"surrogate" if name == "elbo" else name: values for name, values in HISTORY.items()}
    labels = [line.get_label() for line in plots.training_curves(history).lines]
    assert "surrogate, no bound" in labels
    assert "ELBO" not in labels


@pytest.mark.parametrize("terms", [["rate"], ["elbo", "distortion"]])
def test_some_of_the_terms_are_drawn_alone(terms):
    labels = [line.get_label() for line in plots.training_curves(HISTORY, terms=terms).lines]
    assert labels == [{"elbo": "ELBO", "distortion": "-distortion", "rate": "-rate"}[term] for term in terms]


@pytest.mark.parametrize("terms", [["loss"], []])
def test_terms_that_there_are_not_are_refused(terms):
    with pytest.raises(ValueError, match=r"`terms` must be one or more of \['elbo', 'distortion', 'rate'\]"):
        plots.training_curves(HISTORY, terms=terms)


@pytest.mark.parametrize("history", [HISTORY, VALIDATED], ids=["training", "validated"])
def test_one_epoch_is_a_point_that_is_seen(history):
    """A line from a point to itself is none."""
    lines = plots.training_curves({name: values[:1] for name, values in history.items()}).lines
    assert [line.get_marker() not in ("", "None") for line in lines] == [True] * len(history)


def test_terms_and_data_are_told_apart_without_colour():
    lines = plots.training_curves(VALIDATED, log_evidence=-1.0, validation_log_evidence=-0.9).lines
    looks = {(line.get_marker(), line.get_linestyle(), line.get_linewidth()) for line in lines}
    assert len(looks) == len(lines) == 8


ESTIMATE = pv.Evidence(torch.tensor([-1.5, -0.5]), torch.full((2,), 50.0), torch.tensor([0.2, 0.3]), 100)


@pytest.mark.parametrize(
    ("given", "words"),
    [(-1.0, "log p(x)"), (torch.tensor([-1.5, -0.5]), "log p(x)"), (ESTIMATE, "log p(x), estimated")],
    ids=["number", "tensor", "evidence"],
)
def test_the_gap_is_from_the_last_elbo_to_log_evidence(given, words):
    ax = plots.training_curves(VALIDATED, log_evidence=given, validation_log_evidence=-0.9)
    lines = {line.get_label(): line for line in ax.lines}
    for label, level, end in (
        (f"{words}: a gap of 0.500 nats", -1.0, -1.5),
        ("log p(x), validation: a gap of 0.500 nats", -0.9, -1.4),
    ):
        assert list(lines[label].get_ydata()) == pytest.approx([level, level])
        assert (level, end) in [(arrow.xy[1], pytest.approx(arrow.xyann[1])) for arrow in ax.texts]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validation_log_evidence": -1.0}, ValueError, "validation_log_evidence: there is no validation_elbo drawn"),
        (
            {"log_evidence": -1.0, "terms": ["rate"]},
            ValueError,
            r"log_evidence: there is no elbo .* terms are \['rate'",
        ),
        ({"log_evidence": float("nan")}, ValueError, "`log_evidence` must be a finite number.*got nan"),
        ({"log_evidence": "-1"}, ValueError, "`log_evidence` must be .*got '-1'"),
    ],
)
def test_a_gap_that_there_is_not_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        plots.training_curves(HISTORY, **options)


def test_a_surrogate_has_no_gap():
    history = {"surrogate" if name == "elbo" else name: values for name, values in HISTORY.items()}
    with pytest.raises(ValueError, match=r"log_evidence: there is no elbo drawn .* the history has \['surrogate'\]"):
        plots.training_curves(history, log_evidence=-1.0)


# --- Rate and distortion ---------------------------------------------------------------------------------------------


class Measure:
    """A number with its error, as `pv.decompose` has them."""

    def __init__(self, value, standard_error):
        self.value, self.standard_error = value, standard_error


class Decomposed:
    rate, distortion = Measure(2.0, 0.1), Measure(1.0, 0.2)


MODELS = {
    "pair": (1.0, 2.5),
    "evaluated": {"elbo": -2.8, "rate": 0.8, "distortion": 2.0},
    "tensors": (torch.tensor(0.0), torch.tensor(4.0)),
    "decomposed": Decomposed(),
}


def test_models_lie_at_their_rate_and_distortion():
    ax = plots.rate_distortion(MODELS)
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines}
    expected = {"pair": (1.0, 2.5), "evaluated": (0.8, 2.0), "tensors": (0.0, 4.0), "decomposed": (2.0, 1.0)}
    assert {name: points[name] for name in MODELS} == expected
    assert len({line.get_marker() for line in ax.lines if line.get_label() in MODELS}) == len(MODELS)
    bars = [bar.get_segments()[0] for bar in ax.collections]
    np.testing.assert_allclose(sorted(np.ptp(bar, axis=0).max() for bar in bars), [0.2, 0.4])


@pytest.mark.parametrize("models", [MODELS, {"one": (0.0, 0.0)}, {"far": (1000.0, 2.0), "near": (0.0, -1000.0)}])
def test_every_point_of_a_line_has_the_elbo_that_is_written_on_it(models):
    ax = plots.rate_distortion(models)
    lines = [line for line in ax.lines if line.get_linestyle() == "-"]
    elbos = [-(line.get_xdata() + line.get_ydata()) for line in lines]
    for elbo in elbos:
        np.testing.assert_allclose(elbo, elbo[0], atol=1e-9 + 1e-9 * abs(elbo[0]))
    written = [float(text.get_text().removesuffix(" nats")) for text in ax.texts]
    assert len(written) >= 2
    for name, text in zip(written, ax.texts, strict=True):
        rate, distortion = text.get_position()
        assert -(rate + distortion) == pytest.approx(name, rel=1e-5, abs=1e-9)
        assert np.isclose(name, [elbo[0] for elbo in elbos], rtol=1e-5).any()


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ({}, ValueError, "`models` must be .*got none"),
        ([(1.0, 2.0)], TypeError, "`models` must be .*got a list"),
        ({"a": 3.0}, TypeError, "`models` must be .*'a' is 3.0"),
        ({"a": "ab"}, TypeError, "models: 'a' is 'ab'"),
        ({"a": (1.0, 2.0, 3.0)}, TypeError, "models: 'a' is"),
        ({"a": (1.0, float("inf"))}, ValueError, "models: distortion of 'a': got inf"),
        ({"a": {"surrogate": 1.0, "rate": 1.0, "distortion": 2.0}}, ValueError, "models: 'a' is of a surrogate"),
    ],
)
def test_models_without_rate_and_distortion_are_refused(models, error, message):
    with pytest.raises(error, match=message):
        plots.rate_distortion(models)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7, 40, 1000])
def test_epochs_are_counted_in_whole_numbers(epochs):
    ax = plots.training_curves({name: values[:1] * epochs for name, values in HISTORY.items()})
    ticks = ax.get_xticks()
    assert len(ticks) > 0
    np.testing.assert_array_equal(ticks, np.round(ticks))


# --- Calibration -----------------------------------------------------------------------------------------------------


def test_what_leaves_the_band_is_named_and_has_a_style_of_its_own():
    result = narrow()
    ax = plots.calibration(result)
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"within the band: z[0]", "z[1]", "log p(x, z)"}
    assert len({line.get_linestyle() + line.get_color() for line in lines.values()}) == 3
    assert lines["z[1]"].get_linestyle() != "-", "it differs in colour alone"
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    for index, label in ((0, "within the band: z[0]"), (1, "z[1]")):
        places, difference, lower, upper = result.ecdf_difference(index)
        np.testing.assert_allclose(lines[label].get_ydata(), difference)
        assert ((lower <= difference) & (difference <= upper)).all() == (index == 0)
        share = [(result.ranks[:, index] < round(u * 100)).double().mean().item() for u in places]
        np.testing.assert_allclose(difference, np.array(share) - places, atol=1e-12)
    assert (band.min(), band.max()) == pytest.approx((lower.min(), upper.max()))


# --- Estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", [False, True])
def test_each_datum_is_at_its_khat_and_marked_if_that_is_not_reliable(sort):
    ax = plots.khat(SHAPES, sort=sort)
    good, bad, limit = ax.get_legend().legend_handles[:3]
    good, bad = (next(line for line in ax.lines if line.get_label() == h.get_label()) for h in (good, bad))
    assert good.get_label() == "reliable: 3 of 6 data"
    assert bad.get_label() == "not reliable: 3 of 6 data (50.0 %)"
    assert good.get_marker() != bad.get_marker()
    where = {4: 0, 1: 1, 5: 2, 3: 3, 0: 4, 2: 5} if sort else {number: number for number in range(6)}
    drawn = dict(zip(good.get_xdata(), good.get_ydata(), strict=True))
    drawn |= dict(zip(bad.get_xdata(), bad.get_ydata(), strict=True))
    for number in (0, 1, 3, 5):
        assert drawn[where[number]] == pytest.approx(SHAPES.khat[number].item())
    assert set(bad.get_xdata()) == {where[1], where[4], where[5]}
    assert drawn[where[4]] == max(drawn.values()), "unknown, at the top"
    assert drawn[where[2]] == min(drawn.values()), "no tail, at the bottom"
    assert [text.get_text().strip() for text in ax.texts] == ["no tail", "unknown"]
    assert limit.get_label() == "reliable up to 0.67, of 1000 draws each"
    (line,) = (line for line in ax.lines if line.get_label() == limit.get_label())
    assert list(line.get_ydata()) == pytest.approx([2 / 3, 2 / 3])


def test_khat_of_one_draw_each_is_unknown():
    ax = plots.khat(pv.Evidence(torch.zeros(3), torch.ones(3), torch.full((3,), torch.nan), num_samples=1))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["reliable: 0 of 3 data", "not reliable: 3 of 3 data (100.0 %)"]
    ax.figure.canvas.draw()


def test_differences_in_the_picture_are_those_of_the_table():
    found = table()
    ax = plots.evidence_comparison(found)
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["exact", "good", "bad"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the best is not at the top"
    points = {int(line.get_ydata()[0]): line for line in ax.lines if len(line.get_xdata()) == 1}
    bars = {
        (line.get_ydata()[0], line.get_linewidth()): line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2
    }
    for row, (_, entry) in enumerate(found.iterrows()):
        assert points[row].get_xdata()[0] == pytest.approx(entry["difference"])
        assert (points[row].get_markerfacecolor() == "white") == (entry["unreliable"] > 0)
        for column, width in (("difference_error", 1.5), ("difference_monte_carlo_error", 5.0)):
            if row == 0:
                assert (row, width) not in bars
            else:
                low, high = bars[row, width]
                assert (high - low) / 2 == pytest.approx(entry[column])
                assert (high + low) / 2 == pytest.approx(entry["difference"])
    assert "unreliable: 32 %" in ax.get_yticklabels()[2].get_text()
    assert f"{found.loc['bad', 'log_evidence']:.3f} nats" in ax.get_yticklabels()[2].get_text()


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.khat(torch.zeros(3)), TypeError, "`evidence` must be what pv.log_evidence.*got a Tensor"),
        (lambda: plots.khat(SHAPES, sort="no"), TypeError, "`sort` must be .*got 'no'"),
        (
            lambda: plots.evidence_comparison({"a": SHAPES}),
            TypeError,
            "`table` must be .*got a dict; .*pv.compare_evidence",
        ),
        (lambda: plots.evidence_comparison(table()[:0]), ValueError, "table: has no rows"),
        (lambda: plots.evidence_comparison(table()[["difference"]]), ValueError, r"table: lacks .*'log_evidence'"),
    ],
)
def test_what_is_no_evidence_is_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


# --- Latent map and images -------------------------------------------------------------------------------------------


def test_latent_map_draws_each_class_where_it_lies():
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
        assert (abs(offsets[:, 1] - row) < 0.5).all(), "rows run into each other"
    markers = {collection.get_paths()[0].vertices.tobytes() for collection in ax.collections}
    assert len(markers) == 3, "classes differ in colour alone"


@pytest.mark.parametrize("variables", [1, 2])
def test_a_label_has_its_colour_whichever_others_are_there(variables):
    z, labels = torch.randn(30, variables), torch.arange(30) % 10
    colours = [collection.get_facecolor() for collection in plots.latent_map(z, labels).collections]
    assert len({tuple(colour[0]) for colour in colours}) == 10
    for some in ([7], [2, 5, 9], range(1, 10)):
        chosen = torch.isin(labels, torch.tensor(list(some)))
        collections = plots.latent_map(z[chosen], labels[chosen]).collections
        for label, collection in zip(some, collections, strict=True):
            np.testing.assert_array_equal(collection.get_facecolor(), colours[label])


def test_image_grid_holds_every_image_in_reading_order():
    images = torch.rand(5, 3, 4)
    sheet = plots.image_grid(images, columns=2).images[0].get_array()
    assert sheet.shape == (3 * 4 - 1, 2 * 5 - 1)
    for index, image in enumerate(images):
        top, left = 4 * (index // 2), 5 * (index % 2)
        np.testing.assert_array_equal(sheet[top : top + 3, left : left + 4], image)


def test_manifold_runs_with_z_1_to_the_right_and_z_2_upwards():
    centres = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1 / 6, 3 / 6, 5 / 6]))
    for axis in (0, 1):
        ax = plots.manifold(lambda z, axis=axis: z[:, [axis]].sigmoid(), (1, 1), size=3)
        sheet = torch.as_tensor(ax.images[0].get_array()[::2, ::2]).logit()
        expected = centres.expand(3, 3) if axis == 0 else centres.flip(0)[:, None].expand(3, 3)
        torch.testing.assert_close(sheet, expected, atol=1e-5, rtol=1e-5)


def cells(ax, shape):
    """The images of a sheet, (rows, columns, height, width)."""
    (height, width), sheet = shape, torch.as_tensor(np.asarray(ax.images[0].get_array()))
    rows, columns = (sheet.shape[0] + 1) // (height + 1), (sheet.shape[1] + 1) // (width + 1)
    return (
        torch.nn.functional.pad(sheet, (0, 1, 0, 1))
        .reshape(rows, height + 1, columns, width + 1)[:, :height, :, :width]
        .transpose(1, 2)
    )


@pytest.mark.parametrize("coordinates", [None, [1], [1, 0]])
def test_a_row_of_traversals_varies_its_coordinate_and_no_other(coordinates):
    z, values = torch.tensor([0.5, -1.0]), [-2.0, 0.0, 3.0]
    ax = plots.traversals(decode, z, (3, 4), values=values, coordinates=coordinates)
    shown = cells(ax, (3, 4))
    chosen = coordinates or [0, 1]
    assert shown.shape == (len(chosen), 3, 3, 4)
    for row, index in zip(shown, chosen, strict=True):
        for image, value in zip(row, values, strict=True):
            code = z.clone()
            code[index] = value
            torch.testing.assert_close(image, decode(code[None]).reshape(3, 4))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"z[{i}] = {z[i]:.2f}" for i in chosen]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-2", "0", "3"]
    assert z.tolist() == [0.5, -1.0], "the code of the user's was written to"


@pytest.mark.parametrize("columns", [2, 5, 12])
def test_an_image_is_above_its_own_reconstruction(columns):
    ax = plots.reconstructions(lambda x: 0.5 * x, IMAGES, (3, 4), columns=columns)
    shown = cells(ax, (3, 4))
    data, means = (shown[start::2].reshape(-1, 12)[:5] for start in (0, 1))
    torch.testing.assert_close(data, IMAGES)
    torch.testing.assert_close(means, 0.5 * IMAGES)
    assert not shown[::2].reshape(-1, 12)[5:].any(), "places that are left are not blank"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "mean of p(x|z)"] * (len(shown) // 2)


def test_draws_in_pictures_are_those_of_the_seed():
    vae = gaussian()
    with seeded(3):
        expected = vae.generate(4)
    shown = [cells(plots.samples(vae.generate, (1, 2), 4, 2, seed), (1, 2)).reshape(4, 2) for seed in (3, 3, 4)]
    torch.testing.assert_close(shown[0], expected)
    torch.testing.assert_close(shown[1], expected)
    assert not torch.equal(shown[2], expected)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            lambda: plots.traversals(gaussian(), torch.zeros(1), (1, 2)),
            TypeError,
            "`decode` must be .*got a VAE; .*vae.decode",
        ),
        (lambda: plots.traversals(decode, torch.zeros(1, 2), (3, 4)), ValueError, r"`z` must be .*got shape \(1, 2\)"),
        (lambda: plots.traversals(decode, [0.0, 1.0], (3, 4)), ValueError, "`z` must be .*got a list"),
        (
            lambda: plots.traversals(decode, torch.zeros(2), (3, 5)),
            ValueError,
            r"`decode` must be .*got .*\(14, 15\), of 3 by 5",
        ),
        (
            lambda: plots.traversals(decode, torch.zeros(2), (3, 4), []),
            ValueError,
            r"`values` must be .*got shape \(0,\)",
        ),
        (lambda: plots.traversals(decode, torch.zeros(2), (3, 4), "a"), TypeError, "`values` must be .*got 'a'"),
        (
            lambda: plots.traversals(decode, torch.zeros(2), (3, 4), coordinates=[0, 2]),
            ValueError,
            r"`coordinates` must be one or more integers from 0 to 1.*got \[0, 2\]",
        ),
        (lambda: plots.reconstructions(gaussian(), IMAGES, (3, 4)), TypeError, "reconstruct: .*vae.reconstruct"),
        (
            lambda: plots.reconstructions(lambda x: x, IMAGES, (4, 4)),
            ValueError,
            r"`x` must be .*got .*\(5, 12\); .* 4 by 4 pix",
        ),
        (lambda: plots.reconstructions(lambda x: x[:2], IMAGES, (3, 4)), ValueError, r"reconstruct: .*\(5, 12\), of"),
        (
            lambda: plots.reconstructions(lambda x: x, IMAGES, (3, 4), columns=0),
            ValueError,
            "`columns` must be .*got 0",
        ),
        (lambda: plots.samples(gaussian(), (3, 4)), TypeError, "generate: .*vae.generate"),
        (
            lambda: plots.samples(lambda count: IMAGES, (3, 4), count=4),
            ValueError,
            r"`generate` must be .*got .*\(5, 12\)",
        ),
        (lambda: plots.samples(lambda count: IMAGES, (3, 4), count=0), ValueError, "`count` must be .*got 0"),
        (lambda: plots.manifold(decode, (3, 5), size=2), ValueError, r"`decode` must be .*got shape \(4, 12\)"),
        (lambda: plots.image_grid(IMAGES, 3), ValueError, r"`images` must be .*got shape \(5, 12\)"),
    ],
)
def test_images_that_cannot_be_drawn_are_refused_by_name(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


# --- Posterior -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CONTINUOUS.values(), ids=CONTINUOUS.keys())
def test_curves_of_the_posterior_picture_are_densities(make):
    ax = posterior_of(make)
    (line,), (area,) = ax.lines, ax.collections
    assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=0.02)
    corners = area.get_paths()[0].vertices
    enclosed = abs(np.sum(corners[:-1, 0] * corners[1:, 1] - corners[1:, 0] * corners[:-1, 1])) / 2
    assert enclosed == pytest.approx(1, abs=0.02)


def test_the_guides_curve_is_the_guides_density():
    vae = gaussian()
    (line,) = plots.posterior(vae.model, vae.guide, DATUM).lines
    z = torch.as_tensor(line.get_xdata())[:, None, None]
    np.testing.assert_allclose(line.get_ydata(), vae.encode(DATUM).log_prob(z)[:, 0].exp().detach(), rtol=1e-4)


@pytest.mark.parametrize("make", DISCRETE.values(), ids=DISCRETE.keys())
def test_bars_of_the_posterior_picture_are_the_probabilities_of_each_state(make):
    vae = make()
    exact, guide = plots.posterior(vae.model, vae.guide, DATUM).containers
    truth = pv.exact.posterior(vae.model, DATUM)
    np.testing.assert_allclose([bar.get_height() for bar in exact], truth.probs[:, 0], rtol=1e-5)
    states = truth.enumerate_support()
    q = vae.encode(DATUM).log_prob(states)[:, 0].exp().detach()
    np.testing.assert_allclose([bar.get_height() for bar in guide], q, rtol=1e-5)
    assert sum(bar.get_height() for bar in guide) == pytest.approx(1, abs=1e-5)
    assert exact[0].get_hatch() != guide[0].get_hatch(), "the two differ in colour alone"


class Ring(nn.Module):
    """x ~ N(|z|^2, 0.5): a posterior without a mean worth the name."""

    def forward(self, z):
        return dist.Normal(z.square().sum(-1, keepdim=True), 0.5).to_event(1)


def levels_of(ax):
    filled, lines = ax.collections
    return filled, lines, list(filled.levels[:-1]), list(lines.levels)


def corners(contours):
    return torch.as_tensor(np.concatenate([path.vertices for path in contours.get_paths()]), dtype=torch.float32)


def test_regions_of_the_posterior_picture_hold_what_they_say():
    """Of a normal of two dimensions, mass m lies where the density is above 1 - m of the highest."""
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(2, 2, NET), likelihoods.Normal(2, 2, linear()))
    _, _, exact, guide = levels_of(plots.posterior(vae.model, vae.guide, DATUM))
    p, q = pv.exact.posterior(vae.model, DATUM), vae.encode(DATUM)
    for levels, of in ((exact, p), (guide, q)):
        outside = np.exp(np.array(levels) - of.log_prob(of.mean).item())
        errors = np.sqrt([0.01 * 0.99 / 4000, 0.1 * 0.9 / 4000, 0.5 * 0.5 / 4000])  # of shares of 4000 draws
        np.testing.assert_array_less(abs(outside - [0.01, 0.1, 0.5]), 5 * errors)


def test_contours_of_a_ring_lie_where_the_densities_are_these():
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(1, 2, NET), Ring())
    x = torch.tensor([[2.0]])
    filled, lines, exact, guide = levels_of(plots.posterior(vae.model, vae.guide, x))
    truth = pv.exact.posterior(vae.model, x)
    for contours, levels, of in ((lines, guide, vae.encode(x)), (filled, exact, truth)):
        found = of.log_prob(corners(contours)[:, None])
        nearest = (found - torch.tensor(levels).float()).abs().min(1).values
        assert nearest.max() < 0.15, "nats, of which a cell of the grid spans about one"
    assert [len(path.to_polygons()) for path in filled.get_paths()] == [4, 4, 2], "rings, each with the hole within"
    (inner, outer) = (corners(filled).norm(dim=1).min(), corners(filled).norm(dim=1).max())
    assert inner > 0.3
    assert outer < 2.5


@pytest.mark.parametrize("make", [gaussian, bernoulli, lambda: gaussian(2)], ids=["one", "discrete", "two"])
def test_the_gap_of_the_guide_is_said_in_nats(make):
    vae = make()
    legend = plots.posterior(vae.model, vae.guide, DATUM).get_legend()
    gap = float(pv.exact.kl(vae.model, vae.guide, DATUM))
    assert legend.get_title().get_text() == f"KL(q ‖ p) = {gap:.2g} nats"


def test_a_guide_whose_gap_is_not_to_be_had_is_drawn_without_it():
    """Its mean and tails are not known, so that quadrature does not know where to look."""

    class Heavy(nn.Module):
        def forward(self, x):
            base = dist.Normal(x[..., :1], 1.0)
            return dist.TransformedDistribution(base, dist.transforms.AffineTransform(0.0, 1.0)).to_event(1)

    vae = gaussian()
    heavy = Heavy()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", heavy(x))

    legend = plots.posterior(vae.model, guide, DATUM).get_legend()
    assert legend.get_title().get_text() in ("", "None")
    assert [text.get_text() for text in legend.get_texts()] == ["exact $p(z|x)$", "guide $q(z|x)$"]


def test_a_latent_of_three_variables_is_refused():
    with pytest.raises(ValueError, match=r"at most 2 dimensions for quadrature, got 3 at 'z'"):
        posterior_of(lambda: gaussian(3))


def test_a_posterior_of_two_data_is_refused():
    vae = gaussian()
    with pytest.raises(ValueError, match=r"`datum` must be one.*got 4 rows"):
        plots.posterior(vae.model, vae.guide, X)


def test_a_model_of_two_latent_sites_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) + pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"z.*w|w.*z"):
        plots.posterior(model, guide, torch.zeros(1))


# --- Plates ----------------------------------------------------------------------------------------------------------


def two_level(x):
    """Schools: a location for all, a spread for all, an effect for each school and its pupils."""
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", 2, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        with pyro.plate("pupils", 3, dim=-1):
            pyro.sample("x", dist.Normal(effect, 1.0), obs=x)


def global_scale(x):
    """A global latent at the depth of the local one."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def late_global(x):
    """The global latent runs after the local one, and lies between the local ones in depth."""
    root = pyro.sample("root", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    leaf = pyro.sample("leaf", dist.Normal(root, 1.0))
    with pyro.plate("data2", len(x)):
        w = pyro.sample("w", dist.Normal(z + leaf, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def drawn(ax):
    """Circles by site, boxes by plate, and the arrows, solid and dashed."""
    middles = {text.get_text(): text.get_position() for text in ax.texts}
    circles = {
        name: patch
        for patch in ax.patches
        if isinstance(patch, Ellipse)
        for name, middle in middles.items()
        if middle == tuple(patch.center)
    }
    boxes = {}
    for patch in ax.patches:
        if isinstance(patch, FancyBboxPatch):
            x, y, width, height = patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()
            names = [name for name, middle in middles.items() if np.allclose(middle, (x + width, y + 0.05))]
            assert len(names) == 1, f"plates are named on top of each other: {names}"
            boxes[names[0]] = (x, y, x + width, y + height)
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    solid = [arrow for arrow in arrows if arrow.get_linestyle() in ("-", "solid")]
    return circles, boxes, (len(solid), len(arrows) - len(solid))


def inside(box, circle):
    (x, y), (left, bottom, right, top) = circle.center, box
    return left <= x - 0.3 and x + 0.3 <= right and bottom <= y - 0.3 and y + 0.3 <= top


def outside(box, circle):
    (x, y), (left, bottom, right, top) = circle.center, box
    return x + 0.3 < left or x - 0.3 > right or y + 0.3 < bottom or y - 0.3 > top


def test_plates_of_a_gaussian_vae():
    circles, boxes, arrows = drawn(plates_of(gaussian))
    assert set(circles) == {"z", "x"}
    assert set(boxes) == {"data"}
    assert arrows == (1, 1), "the model's z to x, the guide's x to z"
    assert same_color(circles["x"].get_facecolor(), "0.8")
    assert same_color(circles["z"].get_facecolor(), "white")
    assert circles["z"].center[1] > circles["x"].center[1]


def test_plates_of_a_relaxed_vae_tell_what_the_decoder_reads():
    ax = plates_of(relaxed)
    circles, _, arrows = drawn(ax)
    assert set(circles) == {"z", "code", "x"}
    assert {name: circle.get_linestyle() in ("--", "dashed") for name, circle in circles.items()} == {
        "z": False,
        "code": True,
        "x": False,
    }
    assert same_color(circles["code"].get_facecolor(), "white"), "it is not observed"
    assert arrows[1] == 1
    assert "code = f(z)" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(
    ("model", "x", "members"),
    [
        (two_level, torch.zeros(2, 3), {"schools": {"effect", "x"}, "pupils": {"x"}}),
        (global_scale, torch.zeros(3), {"data": {"z", "x"}}),
        (late_global, torch.zeros(3), {"data": {"z"}, "data2": {"w", "x"}}),
    ],
)
def test_a_plate_holds_its_sites_and_no_other(model, x, members):
    circles, boxes, _ = drawn(plots.plate_diagram(model, x))
    assert set(boxes) == set(members)
    for plate, box in boxes.items():
        for name, circle in circles.items():
            assert inside(box, circle) if name in members[plate] else outside(box, circle), (plate, name)


def test_arrows_of_a_two_level_model_are_its_dependencies():
    circles, _, arrows = drawn(plots.plate_diagram(two_level, torch.zeros(2, 3)))
    assert set(circles) == {"spread", "mean", "effect", "x"}
    assert arrows == (3, 0)
    assert len({circle.center for circle in circles.values()}) == 4, "circles cover each other"


def test_more_than_can_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"accepted is \(N, 1\) or \(N, 2\)"):
        plots.latent_map(torch.zeros(4, 3), torch.zeros(4))
    vae = gaussian()
    with pytest.raises(ValueError, match="`datum` must be .*got 3 rows"):
        plots.posterior(vae.model, vae.guide, torch.zeros(3, 2))


def test_a_comparison_without_noise_has_nothing_to_draw_and_says_so():
    alone = Comparison({"enumerated": COMPARISON.measured["enumerated"]}, {"enumerated": 8})
    with pytest.raises(ValueError, match="comparison: has no estimator with noise"):
        plots.bias_variance(alone)
    with pytest.raises(ValueError, match="`group` must be 'all'.*got 'encodr'"):
        plots.bias_variance(COMPARISON, "encodr")
