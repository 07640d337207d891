"""The picture of a sweep has the numbers of its table."""

import numpy as np
import pytest

from plots.plot_inputs import sweep_of
from pyro_vae import plots
from pyro_vae.sweeps.result import Sweep
from pyro_vae.sweeps.run import Run, Task
from pyro_vae.sweeps.space import Space


def test_differences_in_the_picture_are_those_of_the_table_with_a_point_for_each_seed(tmp_path):
    elbos = np.array([[-3.0, -2.8, -3.1], [-2.0, -2.1, -2.2], [-2.5, -2.6, -2.4]])
    result = sweep_of(elbos, tmp_path, "failed")
    ax = plots.sweep(result)
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["latent 1", "latent 2", "latent 0"]
    assert ax.get_yticklabels()[0].get_text().split("\n")[1] == "-2.100 ± 0.058 nats"
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the best is not at the top"
    assert ax.get_title() == "not shown: 1 failed"
    bars = {
        line.get_ydata()[0]: line.get_xdata()
        for line in ax.lines
        if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    }
    points = {line.get_ydata()[0]: line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 3}
    for row, n in enumerate([1, 2, 0]):
        entry = result.table.iloc[row]
        (middle,) = [
            line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1 and line.get_ydata()[0] == row
        ]
        assert middle == pytest.approx(elbos[n].mean() - elbos[1].mean())
        if row:
            assert points[row] == pytest.approx(elbos[n] - elbos[1])
            assert (bars[row][1] - bars[row][0]) / 2 == pytest.approx(entry["difference_error"])
    assert 0 not in points
    assert 0 not in bars


def test_the_best_of_many_are_drawn_and_the_others_counted(tmp_path):
    ax = plots.sweep(sweep_of(-np.arange(6.0)[:, None], tmp_path, "stopped"), most=4)
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"latent {n}\n{-n:.3f} nats" for n in range(4)]
    assert sorted(ax.get_title().removeprefix("not shown: ").split(", ")) == ["1 stopped", "2 complete"]


def test_what_is_no_sweep_or_has_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"`result` must be a result of `pv\.sweep`, got a dict"):
        plots.sweep({})
    task = Task(len, Space({"latent": range(9)}), (), (), {}, 1, 1.0, tmp_path)
    stopped = Sweep.of([[Run({"latent": 1}, 0, "stopped")]], [0], task)
    with pytest.raises(ValueError, match="`result` must have settings that are complete, got none"):
        plots.sweep(stopped)
