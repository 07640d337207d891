"""Training curves and the gap at their end; models in the plane of rate and distortion."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyro_vae as pv
from plots.plot_inputs import HISTORY, VALIDATED
from pyro_vae import plots
from pyro_vae.diagnostics.decomposition import Estimate

SURROGATE = {"surrogate" if name == "elbo" else name: values for name, values in HISTORY.items()}
MODELS = {
    "pair": (1.0, 2.5),
    "evaluated": {"elbo": -2.8, "rate": 0.8, "distortion": 2.0},
    "tensors": (torch.tensor(0.0), torch.tensor(4.0)),
    "decomposed": SimpleNamespace(rate=Estimate(2.0, 0.1), distortion=Estimate(1.0, 0.2)),
}
ESTIMATE = pv.Evidence(torch.tensor([-1.5, -0.5]), torch.full((2,), 50.0), torch.tensor([0.2, 0.3]), 100)


def test_the_curves_are_the_elbo_and_its_negated_terms():
    curves = {line.get_label(): line for line in plots.training_curves(VALIDATED).lines}
    assert set(curves) == {name + end for name in ("ELBO", "-distortion", "-rate") for end in ("", ", validation")}
    for end, prefix in (("", ""), (", validation", "validation_")):
        assert list(curves["ELBO" + end].get_xdata()) == [1, 2, 3]
        assert list(curves["ELBO" + end].get_ydata()) == VALIDATED[prefix + "elbo"]
        for term in ("distortion", "rate"):
            np.testing.assert_allclose(curves[f"-{term}{end}"].get_ydata(), -np.array(VALIDATED[prefix + term]))


def test_a_surrogate_is_not_called_an_elbo():
    labels = [line.get_label() for line in plots.training_curves(SURROGATE).lines]
    assert labels == ["surrogate, no bound", "-distortion", "-rate"]


@pytest.mark.parametrize("terms", [["rate"], ["elbo", "distortion"]])
def test_only_the_chosen_terms_are_drawn(terms):
    labels = [line.get_label() for line in plots.training_curves(HISTORY, terms=terms).lines]
    assert labels == [{"elbo": "ELBO", "distortion": "-distortion", "rate": "-rate"}[term] for term in terms]


@pytest.mark.parametrize("history", [HISTORY, VALIDATED], ids=["training", "validated"])
def test_a_single_epoch_is_a_visible_point(history):
    lines = plots.training_curves({name: values[:1] for name, values in history.items()}).lines
    assert [line.get_marker() not in ("", "None") for line in lines] == [True] * len(history)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7, 40, 1000])
def test_epochs_are_counted_in_whole_numbers(epochs):
    ticks = plots.training_curves({name: values[:1] * epochs for name, values in HISTORY.items()}).get_xticks()
    assert len(ticks)
    np.testing.assert_array_equal(ticks, np.round(ticks))


def test_curves_differ_in_more_than_colour():
    lines = plots.training_curves(VALIDATED, log_evidence=-1.0, validation_log_evidence=-0.9).lines
    assert len({(line.get_marker(), line.get_linestyle(), line.get_linewidth()) for line in lines}) == len(lines) == 8


@pytest.mark.parametrize(("given", "label"), [
    (-1.0, "log p(x)"), (ESTIMATE.log_evidence, "log p(x)"), (ESTIMATE, "log p(x), estimated"),
], ids=["number", "tensor", "evidence"])  # fmt: skip
def test_the_gap_is_between_the_last_elbo_and_log_evidence(given, label):
    ax = plots.training_curves(VALIDATED, log_evidence=given, validation_log_evidence=-0.9)
    lines = {line.get_label(): line for line in ax.lines}
    for text, level, end in ((label, -1.0, -1.5), ("log p(x), validation", -0.9, -1.4)):
        assert list(lines[f"{text}: a gap of 0.500 nats"].get_ydata()) == pytest.approx([level, level])
        assert (level, end) in [(arrow.xy[1], pytest.approx(arrow.xyann[1])) for arrow in ax.texts]


@pytest.mark.parametrize(("history", "options", "message"), [
    (HISTORY, {"terms": []}, r"`terms` must be one or more of \['elbo', 'distortion', 'rate'\], got \[\]"),
    (HISTORY, {"validation_log_evidence": -1.0}, "`validation_log_evidence` must .* has 'validation_elbo'"),
    (HISTORY, {"log_evidence": -1.0, "terms": ["rate"]}, r"`log_evidence` must .* the terms \['rate'\]"),
    (SURROGATE, {"log_evidence": -1.0}, r"`log_evidence` must .* got \['surrogate'\] in the history"),
    (HISTORY, {"log_evidence": float("nan")}, "`log_evidence` must be a finite number.*got nan"),
    (HISTORY, {"log_evidence": "-1"}, "`log_evidence` must be .*got '-1'"),
])  # fmt: skip
def test_curves_that_cannot_be_drawn_are_refused(history, options, message):
    with pytest.raises(ValueError, match=message):
        plots.training_curves(history, **options)


def test_models_lie_at_their_rate_and_distortion():
    ax = plots.rate_distortion(MODELS)
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines}
    expected = {"pair": (1.0, 2.5), "evaluated": (0.8, 2.0), "tensors": (0.0, 4.0), "decomposed": (2.0, 1.0)}
    assert {name: points[name] for name in MODELS} == expected
    assert len({line.get_marker() for line in ax.lines if line.get_label() in MODELS}) == len(MODELS)
    bars = [bar.get_segments()[0] for bar in ax.collections]
    np.testing.assert_allclose(sorted(np.ptp(bar, axis=0).max() for bar in bars), [0.2, 0.4])


@pytest.mark.parametrize("models", [MODELS, {"one": (0.0, 0.0)}, {"far": (1000.0, 2.0), "near": (0.0, -1000.0)}])
def test_every_point_of_a_line_has_the_elbo_on_its_label(models):
    ax = plots.rate_distortion(models)
    lines = [line for line in ax.lines if line.get_linestyle() == "-"]
    elbos = [-(line.get_xdata() + line.get_ydata()) for line in lines]
    for elbo in elbos:
        np.testing.assert_allclose(elbo, elbo[0], atol=1e-9 + 1e-9 * abs(elbo[0]))
    labels = [float(text.get_text().removesuffix(" nats")) for text in ax.texts]
    assert len(labels) >= 2
    for label, text in zip(labels, ax.texts, strict=True):
        assert -sum(text.get_position()) == pytest.approx(label, rel=1e-5, abs=1e-9)
        assert np.isclose(label, [elbo[0] for elbo in elbos], rtol=1e-5).any()


@pytest.mark.parametrize(("models", "error", "message"), [
    ({}, ValueError, "`models` must be .*got none"),
    ([(1.0, 2.0)], TypeError, "`models` must be .*got a list"),
    ({"a": 3.0}, TypeError, "`models` must .*got 3.0 for 'a'"),
    ({"a": "ab"}, TypeError, "`models` must .*got 'ab' for 'a'"),
    ({"a": (1.0, 2.0, 3.0)}, TypeError, r"`models` must .*got \(1.0, 2.0, 3.0\) for 'a'"),
    ({"a": (1.0, float("inf"))}, ValueError, r"`distortion of models\['a'\]` must be a finite .*got inf"),
    ({"a": {"surrogate": 1.0, "rate": 1.0, "distortion": 2.0}}, ValueError, "`models` must .*surrogate.*'a'"),
])  # fmt: skip
def test_models_without_rate_and_distortion_are_refused(models, error, message):
    with pytest.raises(error, match=message):
        plots.rate_distortion(models)
