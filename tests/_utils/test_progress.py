"""A bar shows how far a call is: on a terminal, in a notebook without widgets, and not at all elsewhere."""

import io
import sys
import warnings
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pairs import gaussian
from tqdm import tqdm

import pyro_vae as pv
from pyro_vae._utils import progress as module
from pyro_vae._utils.progress import progress_bar

FAST = {"num_samples": 20, "num_simulations": 20, "max_refined": 3}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal to which bars are written."""
    file = Terminal()
    monkeypatch.setattr(module, "tqdm", partial(tqdm, file=file))
    return file


@pytest.fixture
def notebook(monkeypatch):
    """What a cell shows, in the kernel of a notebook: one entry for each output, rewritten in place."""
    outputs = []

    class Handle:
        def __init__(self, line):
            outputs.append([line])
            self.states = outputs[-1]

        def update(self, line, raw):
            self.states.append(line)

    def display(line, raw, display_id):
        assert raw
        assert display_id
        return Handle(line)

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return outputs


def pair():
    vae, x = gaussian(1, 2), torch.randn(20, 2)
    return vae.model, vae.guide, x


CALLS = {
    "fit": lambda **o: pv.fit(*pair(), epochs=2, **o),
    "log_evidence": lambda **o: pv.log_evidence(*pair(), num_samples=5, **o),
    "annealed_log_evidence": lambda **o: pv.annealed_log_evidence(*pair(), num_chains=2, num_temperatures=2, **o),
    "decompose": lambda **o: pv.decompose(*pair(), num_samples=2, **o),
    "inference_gap": lambda **o: pv.inference_gap(*pair(), steps=2, num_samples=5, **o),
    "calibrate": lambda **o: pv.calibrate(*pair(), num_simulations=10, num_draws=10, **o),
    "inspect": lambda **o: pv.inspect(*pair(), **FAST, **o),
    "exact.log_evidence": lambda **o: pv.exact.log_evidence(pair()[0], torch.randn(20, 2), **o),
    "exact.posterior": lambda **o: pv.exact.posterior(pair()[0], torch.randn(20, 2), **o),
    "exact.elbo": lambda **o: pv.exact.elbo(*pair(), **o),
    "exact.kl": lambda **o: pv.exact.kl(*pair(), **o),
}


@pytest.mark.parametrize(("name", "call"), CALLS.items(), ids=CALLS.keys())
def test_a_long_call_shows_one_bar_that_is_full_at_the_end(name, call, terminal):
    call()
    lines = terminal.getvalue().split("\n")
    assert len(lines) == 2, "a second bar"
    last = lines[0].split("\r")[-1]
    assert last.startswith(name)
    assert "100" in last


@pytest.mark.parametrize(("name", "call"), CALLS.items(), ids=CALLS.keys())
def test_a_call_is_quiet_where_the_output_is_no_terminal(name, call, capsys):
    call()
    call(progress=False)
    assert capsys.readouterr().err == ""


def test_reports_and_exports_show_a_bar(terminal, tmp_path):
    pv.save_draws(tmp_path / "draws.nc", *pair(), draws=2)
    assert "save_draws: 100%" in terminal.getvalue()
    pv.report(tmp_path / "page.html", *pair(), **FAST)
    assert "report: inspection (gap), then pictures" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 2


def test_a_bar_can_be_turned_off_on_a_terminal_and_on_elsewhere(terminal, monkeypatch):
    CALLS["fit"](progress=False)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    CALLS["fit"]()
    assert terminal.getvalue() == ""
    CALLS["fit"](progress=True)
    assert "fit: 100%" in terminal.getvalue()


def test_an_inspection_names_its_stages_and_what_is_left(terminal):
    pv.inspect(*pair(), **FAST)
    for line in (
        "inspect: evidence, then decomposition, gap, calibration",
        "inspect: decomposition, then gap, calibration",
        "inspect: gap (refinement), then calibration",
        "inspect: calibration 100 %",
    ):
        assert line in terminal.getvalue()


def test_a_notebook_shows_one_line_in_place_without_widgets_and_without_warnings(notebook, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.inspect(*pair(), **FAST)
        CALLS["fit"]()
    inspected, fitted = notebook
    assert "inspect: calibration 100 %" in inspected[-1]["text/plain"]
    assert "fit: 100%" in fitted[-1]["text/plain"]
    assert "elbo=" in fitted[-1]["text/plain"]
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_hidden_in_a_notebook_on_request(notebook):
    CALLS["fit"](progress=False)
    assert notebook == []


def test_ipython_on_a_terminal_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not module._in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not module._in_notebook()


def test_a_call_inside_of_another_one_fills_its_stage():
    with progress_bar("outer", False, stages=("first", "second")) as outer:
        outer.begin("second")
        with progress_bar("inner", True, total=10) as inner:
            inner.advance(4)
            assert outer.done == pytest.approx(1.4)
            inner.advance_to(20)
            assert outer.done == pytest.approx(2.0)
    with progress_bar("outer", False, total=10) as outer:
        with progress_bar("inner", False, stages=("only",)) as inner:
            inner.begin("only")
        assert outer.done == 0.0, "its units are its own"


def test_a_bar_ends_with_its_call(terminal):
    with suppress(ZeroDivisionError), progress_bar("failed", None, total=2) as bar:
        bar.advance()
        raise ZeroDivisionError
    with progress_bar("next", None, total=2):
        pass
    assert terminal.getvalue().count("\n") == 2
    assert "failed:  50%" in terminal.getvalue()


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("exact")])
def test_a_bar_ends_with_a_call_whose_error_is_kept(name, terminal, monkeypatch):
    """A notebook keeps the last error, and with it what the call was at."""

    def fail(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr("pyro_vae.exact.inference._integrated_evidence", fail)
    monkeypatch.setattr("pyro_vae.exact.guide_density.GuideDensity.elbo", fail)
    with pytest.raises(ZeroDivisionError) as kept:
        CALLS[name]()
    with progress_bar("next", None, total=2):
        pass
    assert "next:" in terminal.getvalue()
    assert kept.traceback


@pytest.mark.parametrize("progress", ["no", 1, 0.0])
def test_what_is_no_flag_is_refused(progress):
    for call in CALLS.values():
        with pytest.raises(TypeError, match=f"`progress` must be True or False, got {progress!r}"):
            call(progress=progress)


KERNEL_CELL = """
import warnings
warnings.simplefilter("error")
import torch
import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
net = networks.linear()
vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
fitted = pv.fit(vae.model, vae.guide, torch.randn(20, 2), epochs=3)
fitted
"""


@pytest.mark.integration
def test_a_notebook_that_is_run_has_one_line_for_a_bar_and_a_table_for_a_result():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell(KERNEL_CELL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client, such as deprecations in zmq
        nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=120).execute()
    shown = [output["data"] for output in cell.outputs]
    assert len(shown) == 2, cell.outputs
    assert shown[0]["text/plain"].startswith("fit: 100%")
    assert "<table" in shown[1]["text/html"]
    assert "<svg" in shown[1]["text/html"]
    assert shown[1]["text/plain"].startswith("Fitted(ELBO ")
