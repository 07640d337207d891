"""A call inside of another context is right, or refused before any work with the name of the context."""

import threading

import pairs
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv

X = pv.datasets.two_gaussians(40, seed=0).x


def vae_of():
    torch.manual_seed(0)
    return pairs.gaussian(1, 2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(context):
    vae = vae_of()
    svi = pv.SVI(vae.model, vae.guide, Adam({"lr": 0.1}), Trace_ELBO())
    with context():
        for name, call in (
            ("fit", lambda: pv.fit(vae.model, vae.guide, X, epochs=2)),
            ("SVI.step", lambda: svi.step(X)),
        ):
            with pytest.raises(
                ValueError, match=rf"`{name}` must be called where gradients.*torch\.{context.__name__}"
            ):
                call()
        assert pv.evaluate(vae.model, vae.guide, X)["rate"] > 0


def plate():
    return pyro.plate("outer", 3)


HANDLERS = {
    "the plate 'outer'": plate,
    "`poutine.condition`": lambda: poutine.condition(data={"z": torch.zeros(40, 1)}),
    "`poutine.scale`": lambda: poutine.scale(scale=2.0),
    "`poutine.mask`": lambda: poutine.mask(mask=False),
}


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    "call",
    [
        lambda vae: pv.fit(vae.model, vae.guide, X, epochs=1),
        lambda vae: pv.fit(vae.model, vae.guide, X, epochs=1, batch_size=10),
        lambda vae: pv.evaluate(vae.model, vae.guide, X),
        lambda vae: pv.log_evidence(vae.model, vae.guide, X, num_samples=2),
        lambda vae: pv.exact.log_evidence(vae.model, X),
    ],
    ids=["fit", "batches", "evaluate", "log_evidence", "exact"],
)
def test_an_outer_handler_is_named(name, call):
    vae = vae_of()
    with (
        HANDLERS[name](),
        pytest.raises(ValueError, match=f"run outside of Pyro's handlers, got a call inside of {name}"),
    ):
        call(vae)


@pytest.mark.parametrize("handler", [lambda: poutine.seed(rng_seed=3), poutine.block])
def test_a_handler_without_effect_on_sites_changes_nothing(handler):
    found = [pv.evaluate((vae := vae_of()).model, vae.guide, X)["elbo"]]
    with handler():
        found.append(pv.evaluate((vae := vae_of()).model, vae.guide, X)["elbo"])
    assert found[0] == found[1]


def test_each_step_in_autocast_casts_the_weights_again():
    """torch keeps the copies that it has cast until its block ends, unless it is told not to."""
    found = []
    for options in ({}, {"cache_enabled": False}):
        pyro.clear_param_store()
        vae = vae_of()
        with torch.autocast("cpu", dtype=torch.bfloat16, **options):
            pv.evaluate(vae.model, vae.guide, X)  # makes copies without gradients
            found.append(pv.fit(vae.model, vae.guide, X, epochs=20, lr=1e-2).history["elbo"])
    assert found[0] == found[1]
    assert found[0][-1] > found[0][0]


def test_a_graph_of_autocast_is_refused():
    vae = vae_of()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="`compile` must be False inside of"),
    ):
        pv.fit(vae.model, vae.guide, X, epochs=3, compile=True)


def test_a_second_thread_is_refused_at_once_and_the_first_run_is_right():
    vaes = [vae_of() for _ in range(3)]
    alone = pv.fit(vaes[0].model, vaes[0].guide, X, epochs=5).history
    begun, answered, errors = threading.Event(), threading.Event(), []

    def intrude():
        begun.wait(60)
        svi = pv.SVI(vaes[1].model, vaes[1].guide, Adam({"lr": 0.1}), Trace_ELBO())
        for call in (
            lambda: pv.fit(vaes[1].model, vaes[1].guide, X, epochs=1),
            lambda: pv.evaluate(vaes[1].model, vaes[1].guide, X),
            lambda: svi.step(X),
        ):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        answered.set()

    def wait(epoch):
        begun.set()
        answered.wait(60)
        pv.evaluate(vaes[2].model, vaes[2].guide, X)  # the same thread may enter again

    thread = threading.Thread(target=intrude)
    thread.start()
    together = pv.fit(vaes[2].model, vaes[2].guide, X, epochs=5, callbacks=[wait]).history
    thread.join()
    assert together == alone
    assert ["must not run while another thread" in error for error in errors] == [True] * 3
