"""Calibration bands, k̂ of each datum, the comparison of models, and the bias and noise of gradients."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from plots.plot_inputs import COMPARISON, EVIDENCE, evidence_table, narrow_calibration
from pyro_vae import plots
from pyro_vae.diagnostics.gradients import Comparison


def test_a_quantity_that_leaves_the_band_has_its_own_name_and_style():
    result = narrow_calibration()
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


@pytest.mark.parametrize("sort", [False, True])
def test_each_datum_is_at_its_khat_and_a_cross_if_that_is_unreliable(sort):
    ax = plots.khat(EVIDENCE, sort=sort)
    lines = {line.get_label(): line for line in ax.lines}
    good, bad = lines["reliable: 3 of 6 data"], lines["not reliable: 3 of 6 data (50.0 %)"]
    assert good.get_marker() != bad.get_marker()
    place = {4: 0, 1: 1, 5: 2, 3: 3, 0: 4, 2: 5} if sort else {number: number for number in range(6)}
    heights = {x: y for line in (good, bad) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    for number in (0, 1, 3, 5):
        assert heights[place[number]] == pytest.approx(EVIDENCE.khat[number].item())
    assert set(bad.get_xdata()) == {place[1], place[4], place[5]}
    assert heights[place[4]] == max(heights.values()), "unknown, at the top"
    assert heights[place[2]] == min(heights.values()), "no tail, at the bottom"
    assert [text.get_text().strip() for text in ax.texts] == ["no tail", "unknown"]
    assert list(lines["reliable up to 0.67 (1000 draws each)"].get_ydata()) == pytest.approx([2 / 3, 2 / 3])
    assert set(lines) >= {text.get_text() for text in ax.get_legend().get_texts()}
    bars = {int(segment[0, 0]): segment[:, 1] for segment in ax.collections[0].get_segments()}
    for number in (0, 1, 3):  # of 1000 draws each
        middle, error = EVIDENCE.khat[number].item(), EVIDENCE.khat_error[number].item()
        assert bars[place[number]] == pytest.approx([middle - error, middle + error])


def test_khat_of_one_draw_each_is_unknown():
    ax = plots.khat(pv.Evidence(torch.zeros(3), torch.ones(3), torch.full((3,), torch.nan), num_samples=1))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["reliable: 0 of 3 data", "not reliable: 3 of 3 data (100.0 %)"]
    ax.figure.canvas.draw()


def test_differences_in_the_picture_are_those_of_the_table():
    table = evidence_table()
    ax = plots.evidence_comparison(table)
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["exact", "good", "bad"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the best is not at the top"
    points = {int(line.get_ydata()[0]): line for line in ax.lines if len(line.get_xdata()) == 1}
    pairs = [line for line in ax.lines if len(line.get_xdata()) == 2]
    bars = {(line.get_ydata()[0], line.get_linewidth()): line.get_xdata() for line in pairs}
    for row, (_, entry) in enumerate(table.iterrows()):
        assert points[row].get_xdata()[0] == pytest.approx(entry["difference"])
        assert (points[row].get_markerfacecolor() == "white") == (entry["unreliable"] > 0)
        for column, width in (("difference_error", 1.5), ("difference_monte_carlo_error", 5.0)):
            assert ((row, width) in bars) == (row > 0)
            if row > 0:
                low, high = bars[row, width]
                assert (high - low) / 2 == pytest.approx(entry[column])
                assert (high + low) / 2 == pytest.approx(entry["difference"])
    assert (
        f"unreliable by $\\hat{{k}}$: {100 * table['unreliable'].iloc[2]:.2g} %" in ax.get_yticklabels()[2].get_text()
    )
    assert f"{table.loc['bad', 'log_evidence']:.3f} nats" in ax.get_yticklabels()[2].get_text()


@pytest.mark.parametrize(("shares", "hollow"), [((0.0, 0.0, 0.2), (False, False)), ((0.2, 0.1, 0.0), (True, False)),
                                                ((0.1, 0.1, 0.2), (True, True))])  # fmt: skip
def test_markers_in_the_legend_of_differences_are_hollow_where_all_in_the_picture_are(shares, hollow):
    ax = plots.evidence_comparison(evidence_table().assign(unreliable=shares))
    legend = ax.get_legend()
    faces = {
        text.get_text(): line.get_markerfacecolor()
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert tuple(faces[name] == "white" for name in ("the best", "difference to the best")) == hollow


NOISELESS = Comparison({"enumerated": COMPARISON.measured["enumerated"]}, {"enumerated": 8})


@pytest.mark.parametrize(("draw", "error", "message"), [
    (lambda: plots.khat(EVIDENCE, sort="no"), TypeError, "`sort` must be .*got 'no'"),
    (lambda: plots.evidence_comparison(evidence_table()[:0]), ValueError, "`table` must .*without rows"),
    (lambda: plots.evidence_comparison(evidence_table()[["difference"]]), ValueError, r"`table` must .*\['log_ev"),
    (lambda: plots.bias_variance(NOISELESS), ValueError, "`comparison` must have an .* noise.*got none in 'all'"),
    (lambda: plots.bias_variance(COMPARISON, group="encodr"), ValueError, "`group` must be 'all'.*got 'encodr'"),
])  # fmt: skip
def test_estimates_that_cannot_be_drawn_are_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw()
