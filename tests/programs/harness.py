"""What the package does with each program: a status for each capability, compared with an independent number."""

import importlib
import signal
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor

import pyro_vae as pv
from programs.by_hand import guide_trace, log_joint
from programs.program import Program

HERE = Path(__file__).parent
NO_PROGRAM = {"__init__", "__main__", "program", "by_hand", "harness", "table"}
NAMES = sorted(
    file.stem for file in HERE.glob("*.py") if file.stem not in NO_PROGRAM and not file.stem.startswith("test_")
)
SECONDS = 150.0  # for one cell


@dataclass(frozen=True)
class Cell:
    """What was found: "right", "runs", "refused" or "bug", with the reason or the number in ``note``."""

    status: str
    note: str = ""
    seconds: float = 0.0


class NoNumberError(Exception):
    """The call ran, and there is no independent number to compare with."""


class LeftOutError(Exception):
    """The result states why it leaves this out."""


def assert_close(what: str, found: float, expected: float, tolerance: float) -> str:
    """Raise if two numbers differ by more than ``tolerance``; return both as text."""
    text = f"{what} {found:.3f}, by hand {expected:.3f}"
    if not abs(found - expected) <= tolerance:
        raise AssertionError(f"{text}, tolerance {tolerance:.3f}")
    return text


def mean_loss(program: Program, num: int = 100) -> tuple[float, float]:
    """The loss of the program's ELBO, by Pyro: a mean and its standard error."""
    keywords = {**program.kwargs, **program.all_rows}
    losses = [program.elbo.loss(program.model, program.guide, *program.args, **keywords) for _ in range(num)]
    return statistics.fmean(losses), statistics.stdev(losses) / num**0.5


@torch.no_grad()
def elbo_by_hand(program: Program, num: int = 200) -> tuple[float, float]:
    """The ELBO of all data, with all latents of the guide drawn: a mean and its standard error."""
    terms = []
    for _ in range(num):
        q = guide_trace(program)
        values = {name: site["value"] for name, site in q.iter_stochastic_nodes()}
        terms.append(float(log_joint(program, values) - q.log_prob_sum()))
    return statistics.fmean(terms), statistics.stdev(terms) / num**0.5


class Trained:
    """A program, trained by Pyro, with its param store; and what several checks use."""

    def __init__(self, name: str):
        self.name = name
        self._module = importlib.import_module(f"programs.{name}")
        self.program = self.fresh()
        svi = SVI(self.program.model, self.program.guide, Adam({"lr": self.program.lr}), self.program.elbo)
        for _ in range(self.program.steps):
            svi.step(*self.program.args, **self.program.kwargs)
        self._store = pyro.get_param_store().get_state()
        self.log_evidence = float(self.program.by_hand().sum()) if self.program.by_hand else None

    def fresh(self) -> Program:
        """Make the program again, with an empty param store."""
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return self._module.make()

    def trained(self) -> Program:
        pyro.get_param_store().set_state(self._store)
        pyro.set_rng_seed(1)
        return self.program


# One function for each capability. It returns a note, and raises if something is wrong.


def fits(trained: Trained) -> str:
    """The parameters that ``fit`` finds are as good as those of ``pyro.infer.SVI``, by Pyro's own loss."""
    trained.trained()
    expected, error = mean_loss(trained.program)
    program = trained.fresh()
    start, _ = mean_loss(program, 20)
    data = program.data[0] if len(program.data) == 1 else program.data
    arguments = [data] if program.data else []
    fitted = pv.fit(
        program.model, program.guide, *arguments, epochs=program.steps, lr=program.lr, elbo=program.elbo, progress=False
    )
    assert len(fitted.history["elbo"]) == program.steps
    found, other = mean_loss(program)
    tolerance = 5 * (error**2 + other**2) ** 0.5 + 0.05 * abs(start - expected)
    return assert_close("-ELBO", found, min(expected, found), tolerance)


def losses_of(trained: Trained, svi_class: Any, steps: int, **options: Any) -> list[float]:
    program = trained.fresh()
    svi = svi_class(program.model, program.guide, Adam({"lr": program.lr}), program.elbo, **options)
    pyro.set_rng_seed(2)
    return [svi.step(*program.args, **program.kwargs) for _ in range(steps)]


def assert_same(found: list[float], expected: list[float], tolerance: float) -> str:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        assert_close(f"loss of step {step}", one, other, tolerance * (1 + abs(other)))
    return f"{len(found)} losses equal"


def steps_plainly(trained: Trained) -> str:
    return assert_same(losses_of(trained, pv.SVI, 10), losses_of(trained, SVI, 10), 1e-4)


def steps_captured(trained: Trained) -> str:
    """Losses are those of ``pyro.infer.SVI``; the note has the ratio of their times and the seconds until captured."""
    expected = losses_of(trained, SVI, 10)
    times = {}
    for svi_class, options in ((SVI, {}), (pv.SVI, {"compile": True})):
        program = trained.fresh()
        svi = svi_class(program.model, program.guide, Adam({"lr": program.lr}), program.elbo, **options)
        pyro.set_rng_seed(2)
        start = time.perf_counter()
        found = [svi.step(*program.args, **program.kwargs) for _ in range(10)]
        first = time.perf_counter() - start
        laps = []
        for _ in range(50):
            start = time.process_time()  # which other processes do not lengthen
            svi.step(*program.args, **program.kwargs)
            laps.append(time.process_time() - start)
        times[svi_class] = first, statistics.median(laps)
    assert_same(found, expected, 1e-3)
    (_, plain), (first, captured) = times[SVI], times[pv.SVI]
    return f"{plain / captured:.1f}×, {max(first - 10 * captured, 0.0):.0f} s"


def tree_of(program: Program, draws: int = 100) -> Any:
    return pv.to_datatree(program.model, program.guide, *program.data, draws=draws)


def exports(trained: Trained) -> str:
    """``lp`` of draws is log p(x, z) at their values by Pyro's trace."""
    import arviz as az

    program = trained.trained()
    tree = tree_of(program)
    summary = az.summary(pv.to_arviz(tree), kind="stats")
    assert len(summary)
    if "lp" not in tree["sample_stats"]:
        raise NoNumberError
    note = ""
    for draw in (0, 99):
        values = {}
        for name, site in guide_trace(program).iter_stochastic_nodes():
            if name in tree["posterior"]:
                array = torch.as_tensor(tree["posterior"][name].values[0, draw].copy()).nan_to_num()
                values[name] = array.reshape(site["value"].shape).to(site["value"].dtype)
        expected = float(log_joint(program, values))
        note = assert_close(
            "lp", float(tree["sample_stats"]["lp"][0, draw].sum()), expected, 1e-3 * (1 + abs(expected))
        )
    return note


def compares(trained: Trained) -> str:
    """LOO by ArviZ where log p(x) is one number for all data; else log p(x) of each datum by ``compare_evidence``."""
    import arviz as az

    program = trained.trained()
    evidence = pv.log_evidence(program.model, program.guide, *program.data, num_samples=200)
    tree = tree_of(program, 300)
    if evidence.log_evidence.numel() > 1 and "log_likelihood" not in tree.children:
        table = pv.compare_evidence({"one": evidence, "other": evidence.log_evidence - 1})
        assert list(table.index) == ["one", "other"]
        return "held-out log p(x)"
    if "log_likelihood" not in tree.children:
        raise LeftOutError(tree.attrs["why_no_log_likelihood"])
    result = az.loo(pv.to_arviz(tree), pointwise=True)
    assert torch.isfinite(torch.tensor(float(result.elpd_loo)))
    if program.loo is None:
        raise NoNumberError
    flagged = int((result.pareto_k.values > 0.6).sum())  # ArviZ warns of these
    tolerance = 0.1 * float(result.se) + 0.2 + 0.2 * flagged
    return assert_close("LOO", float(result.elpd_loo), float(program.loo().sum()), tolerance)


def assert_evidence(trained: Trained, evidence: Any) -> str:
    total = float(evidence.log_evidence.sum())
    if trained.log_evidence is None:
        raise NoNumberError
    error = float(evidence.standard_error.double().square().sum().sqrt())
    tolerance = 5 * error + 1e-4 * abs(trained.log_evidence) + 0.02
    if bool(evidence.unreliable.any()):
        tolerance += 0.5 * int(evidence.unreliable.sum())
    return assert_close("log p(x)", total, trained.log_evidence, tolerance)


def estimates(trained: Trained) -> str:
    program = trained.trained()
    return assert_evidence(trained, pv.log_evidence(program.model, program.guide, *program.data))


def anneals(trained: Trained) -> str:
    program = trained.trained()
    options = {"num_chains": 20, "num_temperatures": 40}
    return assert_evidence(trained, pv.annealed_log_evidence(program.model, program.guide, *program.data, **options))


def integrates(trained: Trained) -> str:
    program = trained.trained()
    total = float(pv.exact.log_evidence(program.model, *program.data).sum())
    if trained.log_evidence is None:
        raise NoNumberError
    return assert_close("log p(x)", total, trained.log_evidence, 1e-3 * (1 + abs(trained.log_evidence)))


ROWS = 3  # of local latents that NUTS samples


def few_rows(program: Program) -> tuple[tuple[Any, ...], int | None]:
    """The first rows of the data, where log p(x) is a sum over them; else all data."""
    parts = pv.log_evidence(program.model, program.guide, *program.data, num_samples=2).log_evidence.numel()
    if parts == 1:
        return program.data, None
    assert not program.kwargs
    rows = [value[:ROWS] if isinstance(value, Tensor) and len(value) == parts else value for value in program.args]
    return tuple(rows), ROWS


def references(trained: Trained) -> str:
    """Posterior means by NUTS are those by hand."""
    import arviz as az

    program = trained.trained()
    data, rows = few_rows(program)
    tree = pv.reference(program.model, *data, draws=150, chains=1, warmup=100)
    summary = az.summary(pv.to_arviz(tree), round_to="none")
    if program.means is None:
        raise NoNumberError
    note = ""
    for name, expected in program.means().items():
        expected = expected if rows is None else expected[:rows]
        for row, value in zip(
            summary.filter(regex=rf"^{name}(\[|$)", axis=0).itertuples(), expected.flatten(), strict=True
        ):
            note = assert_close(row.Index, row.mean, float(value), 5 * row.mcse_mean + 0.02 * row.sd + 1e-3)
    return note


def decomposes(trained: Trained) -> str:
    program = trained.trained()
    found = pv.decompose(program.model, program.guide, *program.data, num_samples=50)
    assert str(found)
    expected, error = elbo_by_hand(program)
    scale = found.num_data
    tolerance = 5 * (error**2 + (scale * found.elbo.standard_error) ** 2) ** 0.5 + 0.02
    return assert_close("ELBO", scale * found.elbo.value, expected, tolerance)


def finds_gap(trained: Trained) -> str:
    program = trained.trained()
    found = pv.inference_gap(program.model, program.guide, *program.data, steps=50)
    assert str(found)
    if trained.log_evidence is None:
        raise NoNumberError
    elbo, error = elbo_by_hand(program)
    own = float(torch.cat([found.elbo_error.reshape(-1), found.log_evidence_error.reshape(-1)]).norm())
    tolerance = 5 * (error**2 + own**2) ** 0.5 + 0.05
    return assert_close("gap", float(found.gap.sum()), trained.log_evidence - elbo, tolerance)


AMORTIZED = {
    "attend_infer_repeat",
    "cevae",
    "cvae",
    "deep_markov",
    "factor_analysis",
    "iaf",
    "missing_labels",
    "prod_lda",
    "scenes",
    "semi_supervised_translation",
    "sentence_vae",
    "single_cell",
    "ss_vae",
    "vae",
}


def calibrates(trained: Trained) -> str:
    program = trained.trained()
    refit = {} if trained.name in AMORTIZED else {"refit": {"epochs": 150, "lr": 0.05, "elbo": program.elbo}}
    found = pv.calibrate(program.model, program.guide, *program.data, num_simulations=10, num_draws=19, **refit)
    assert str(found)
    raise NoNumberError


def inspects(trained: Trained) -> str:
    program = trained.trained()
    found = pv.inspect(program.model, program.guide, *program.data, num_samples=500, num_simulations=20)
    assert found.verdict
    assert str(found)
    return assert_evidence(trained, found.evidence)


def resumes(trained: Trained) -> str:
    """A run that is interrupted and resumed from its checkpoints gives the parameters of one that is not."""
    stores = []
    with tempfile.TemporaryDirectory() as folder:
        for runs in ([6], [3, 6]):
            program = trained.fresh()
            data = program.data[0] if len(program.data) == 1 else program.data
            arguments = [data] if program.data else []
            for epochs in runs:
                pv.fit(
                    program.model,
                    program.guide,
                    *arguments,
                    epochs=epochs,
                    lr=program.lr,
                    elbo=program.elbo,
                    progress=False,
                    checkpoints=f"{folder}/{len(runs)}",
                )
            stores.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
    one, other = stores
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "the parameters differ"
    return "equal parameters"


CAPABILITIES: dict[str, Callable[[Trained], str]] = {
    "fit": fits,
    "checkpoints": resumes,
    "SVI": steps_plainly,
    "compile": steps_captured,
    "to_datatree": exports,
    "LOO": compares,
    "log_evidence": estimates,
    "annealed": anneals,
    "exact": integrates,
    "reference": references,
    "decompose": decomposes,
    "inference_gap": finds_gap,
    "calibrate": calibrates,
    "inspect": inspects,
}


class TooSlowError(BaseException):
    """A cell took longer than ``SECONDS``.

    It is no ``Exception``: what tries a fast way and falls back, such as ``torch.vmap`` on the user's code, would take
    it for a reason to fall back, and go on without a limit.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlowError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and each second after that: in a destructor an error is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(check: Callable[[Trained], str], trained: Trained) -> Cell:
    """Run one check and classify what it does."""
    start = time.perf_counter()

    def cell(status: str, note: str) -> Cell:
        return Cell(status, " ".join(note.split()), time.perf_counter() - start)

    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cell("right", check(trained))
    except NoNumberError:
        return cell("runs", "")
    except LeftOutError as reason:
        return cell("refused", str(reason))
    except (Exception, TooSlowError) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/pyro_vae/" in frame.filename]
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(last.filename).name}:{last.lineno})"
        if frames:
            where += f" via {frames[-1].filename.partition('/pyro_vae/')[2]}:{frames[-1].lineno}"
        refused = isinstance(error, TypeError | ValueError | NotImplementedError) and str(error).startswith("`")
        if refused and "/pyro_vae/" in last.filename:
            return cell("refused", str(error))
        return cell("bug", f"{type(error).__name__}: {str(error)[:300]}{where}")


def examine(name: str, capabilities: Mapping[str, Callable[[Trained], str]] = CAPABILITIES) -> dict[str, Cell]:
    """Train one program and run the checks."""
    pyro.enable_validation(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained = Trained(name)
        return {capability: run(check, trained) for capability, check in capabilities.items()}
    finally:
        pyro.clear_param_store()
