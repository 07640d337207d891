"""One run of a sweep: the ELBO of each row against closed forms, and what its folder has after it ended."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors
from pyro_vae.sweeps.run import Task, elbo_of_rows, run_settings
from pyro_vae.sweeps.space import Space

SCALE = 0.5
X = torch.randn(1500, generator=torch.Generator().manual_seed(0))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SCALE), obs=x)


def guide_of(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * x, scale))

    return guide


def test_with_the_exact_posterior_the_elbo_of_each_row_is_its_log_evidence():
    precision = 1 + 1 / SCALE**2
    guide = guide_of(1 / SCALE**2 / precision, precision**-0.5)
    exact = dist.Normal(0.0, (1 + SCALE**2) ** 0.5).log_prob(X)
    assert elbo_of_rows(model, guide, X, num_samples=3).numpy() == pytest.approx(exact.numpy(), abs=2e-5)


def test_with_another_guide_the_elbo_of_each_row_is_the_closed_form():
    loc, scale, draws = 0.5, 0.7, 4000
    squared = (X - loc * X) ** 2 + scale**2
    fit = -0.5 * math.log(2 * math.pi * SCALE**2) - squared / (2 * SCALE**2)
    kl = 0.5 * (scale**2 + (loc * X) ** 2 - 1 - 2 * math.log(scale))
    found = elbo_of_rows(model, guide_of(loc, scale), X, num_samples=draws)
    # log w is quadratic in the noise e: a e + b (e^2 - 1) + c, of variance a^2 + 2 b^2.
    a = scale * (X - loc * X) / SCALE**2 - scale * loc * X
    b = -(scale**2) / (2 * SCALE**2) - scale**2 / 2 + 0.5
    errors = ((a**2 + 2 * b**2) / draws).sqrt()
    assert ((found - (fit - kl)) / errors).abs().max() < 5.5
    assert ((found - (fit - kl)) / errors).std() == pytest.approx(1.0, abs=0.12)


def test_rows_have_an_elbo_for_latents_of_many_dimensions():
    vae = pv.VAE(
        priors.StandardNormal(5),
        guides.DiagonalNormal(2, 5, networks.linear()),
        likelihoods.Normal(5, 2, networks.linear()),
    )
    x = torch.randn(1100, 2)
    rows = elbo_of_rows(vae.model, vae.guide, x, num_samples=200)
    elbo = pv.evaluate(vae.model, vae.guide, x, num_samples=200)["elbo"]
    assert float(rows.mean()) == pytest.approx(elbo, abs=0.1)
    assert rows[1060:] != pytest.approx(rows[:40], abs=0.1)


def make(latent=1, lr=1e-2, **options):
    net = networks.mlp([4])
    vae = pv.VAE(
        priors.StandardNormal(latent), guides.DiagonalNormal(2, latent, net), likelihoods.Normal(latent, 2, net)
    )
    return vae, {"lr": lr, **options}


@pytest.fixture
def task(tmp_path):
    """A function that returns a task."""
    x = pv.datasets.two_gaussians(150, seed=0).x

    def new(make=make, space=None, folder="sweep", **options):
        options = {"epochs": 6, "batch_size": 25, "compile": False} | options
        task = Task(make, Space(space or {"latent": [1, 2]}), x[:100], x[100:], options, 10, 1e-9, tmp_path / folder)
        task.attempt = 1
        return task

    return new


def quiet(epoch, elbo):
    return False


def test_a_run_is_stored_with_the_numbers_of_fit_and_evaluate(task):
    task, reports = task(), []
    (run,) = run_settings(task, {"latent": 2}, [3], lambda *report: bool(reports.append(report)))
    torch.manual_seed(9)  # of no importance
    pyro.set_rng_seed(3)
    vae, options = make(latent=2)
    fitted = pv.fit(vae.model, vae.guide, task.data, **task.options, **options, validation=task.validation, seed=3)
    assert run == task.run({"latent": 2}, 3)
    assert (run.status, run.epochs, run.history) == ("complete", 6, dict(fitted.history))
    assert reports == list(enumerate(fitted.history["validation_elbo"], 1))
    terms = pv.evaluate(vae.model, vae.guide, task.validation, num_samples=10, seed=3)
    assert run.elbo == pytest.approx(run.rows.mean()) == pytest.approx(terms["elbo"], abs=0.1)
    assert run.rows.shape == (50,)


def test_a_run_depends_on_its_settings_and_seed_alone(task):
    first = run_settings(task(), {"latent": 1}, [0, 1], quiet)
    other = task(folder="other")
    run_settings(other, {"latent": 2}, [1], quiet)
    (second,) = run_settings(other, {"latent": 1}, [1], quiet)
    assert np.array_equal(second.rows, first[1].rows)
    assert not np.array_equal(second.rows, first[0].rows)


class Killed(BaseException):
    """What ends a thread of Ray, or a process."""


def test_a_run_that_was_killed_resumes_with_the_same_numbers(task):
    epochs = []

    def follow(epoch):
        epochs.append(epoch.number)
        if epochs == [1, 2, 3]:
            raise Killed

    task_ = task(lambda latent: make(latent, callbacks=[follow]))
    with pytest.raises(Killed):
        run_settings(task_, {"latent": 1}, [0], quiet)
    begun = task_.run({"latent": 1}, 0)
    assert (begun.status, len(begun.history["elbo"]), task_.is_ended(begun)) == ("unfinished", 2, False)
    with (begun.folder / "history.jsonl").open("a") as file:
        file.write('[3, {"elbo": -2.')  # the end of a line is lost
    (run,) = run_settings(task_, {"latent": 1}, [0], quiet)
    (whole,) = run_settings(task(folder="whole"), {"latent": 1}, [0], quiet)
    assert epochs in ([1, 2, 3, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert np.array_equal(run.rows, whole.rows)
    assert run.history["elbo"][3:] == whole.history["elbo"][3:]
    run_settings(task_, {"latent": 1}, [0], quiet)
    assert len(epochs) < 8  # and a finished one is not repeated


def test_a_run_that_diverges_has_failed_with_the_error_of_fit_and_ends_its_settings(task):
    task = task(lambda latent: make(latent, lr=1e30))
    runs = run_settings(task, {"latent": 1}, [0, 1], quiet)
    assert [run.status for run in runs] == ["failed"]
    assert runs[0].message.startswith("FloatingPointError: ")
    assert math.isnan(runs[0].elbo)
    assert "Traceback" in (runs[0].folder / "error.txt").read_text()
    assert task.is_ended(runs[0])
    task.attempt = 2  # the sweep is called again
    assert not task.is_ended(runs[0])


def test_a_run_that_the_engine_stops_ends_its_settings(task):
    task = task()
    runs = run_settings(task, {"latent": 1}, [0, 1], lambda epoch, elbo: epoch == 8)
    assert [(run.status, run.epochs) for run in runs] == [("complete", 6), ("stopped", 2)]
    assert math.isnan(runs[1].elbo)
    (runs[1].folder / "run.json").unlink()  # killed just before it was written
    assert run_settings(task, {"latent": 1}, [1], quiet)[0].status == "stopped"


def test_whatever_is_trained_the_elbo_at_the_end_is_that_of_one_draw(task):
    task_ = task(lambda latent: make(latent, elbo=objectives.ImportanceWeighted(20)))
    (run,) = run_settings(task_, {"latent": 2}, [0], quiet)
    fitted = task_.fit(*task_.make_pair({"latent": 2}, 0), run)
    terms = pv.evaluate(fitted.model, fitted.guide, task_.validation, elbo=Trace_ELBO(), num_samples=400)
    error = run.rows.std() / run.rows.size**0.5
    assert run.elbo == pytest.approx(terms["elbo"], abs=5 * error / 10**0.5 + 0.02)


def global_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=x)


def test_where_rows_have_no_elbo_of_their_own_that_of_all_is_used_with_the_reason(task):
    task = task(lambda latent: (global_model, AutoNormal(global_model), {"lr": 0.05}), epochs=30, batch_size=None)
    (run,) = run_settings(task, {"latent": 1}, [0], quiet)
    assert (run.status, run.rows) == ("complete", None), run.message
    assert "independent" in run.why_no_rows
    assert run.elbo == pytest.approx(run.history["validation_elbo"][-1], abs=0.3)


def test_a_surrogate_is_not_compared_while_it_trains(task):
    task = task(lambda latent: (global_model, AutoDelta(global_model)), epochs=2, batch_size=None)
    task.needs_elbo = True
    (run,) = run_settings(task, {"latent": 1}, [0], quiet)
    assert run.status == "failed"
    assert "`early_stopping` and `search` must be left out where the objective is no ELBO" in run.message


@pytest.mark.parametrize(("made", "message"), [
    (None, "`make` must return a VAE, .* got a NoneType"),
    ((model,), "`make` must return a VAE, .* got .a function."),
    ((model, model, {"epoch": 3}), "`options of make` must be keyword arguments of pv.fit, got 'epoch'"),
    ((model, model, {"seed": 3}), "without those that the sweep sets, got 'seed'"),
])  # fmt: skip
def test_what_make_returns_is_checked(task, made, message):
    (run,) = run_settings(task(lambda latent: made), {"latent": 1}, [0], quiet)
    assert run.status == "failed"
    assert re.search(message, run.message)
