"""Any arguments of a program give the numbers of the same program on tensors of rows alone."""

import functools
import math
from argparse import Namespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.arguments import Bound, bind, unbound
from pyro_vae.model_guide import ModelGuide

X = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 1.0
SCALE = 2.0


def plain(x):
    """z ~ N(0, 1) and x ~ N(z, 2) for each datum: x ~ N(0, sqrt(5))."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, SCALE), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.2 * x, 0.9))


LOG_P = dist.Normal(0.0, math.sqrt(5.0)).log_prob(X)


def with_arguments(read):
    """The same program, called with other arguments, from which ``read`` takes x and the scale."""

    @functools.wraps(read)
    def model(*args, **kwargs):
        x, scale = read(*args, **kwargs)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    return model, lambda *args, **kwargs: plain_guide(read(*args, **kwargs)[0])


FORMS = {  # how x and the scale are read, and the arguments
    "a number": (lambda x, scale: (x, scale), (X, SCALE)),
    "None": (lambda x, scale: (x, scale or SCALE), (X, None)),
    "rows alone": (lambda x: (x, SCALE), pv.Arguments(X)),
    "a keyword": (lambda x, *, scale: (x, scale), pv.Arguments(X, scale=SCALE)),
    "keywords alone": (lambda x, scale: (x, scale), pv.Arguments(x=X, scale=SCALE)),
    "a dictionary": (lambda data: (data["x"], data["scale"]), {"x": X, "scale": SCALE}),
    "nested": (lambda data: (data["x"][0], data["x"][1]), {"x": (X, SCALE)}),
    "a list": (lambda items: (items[0], items[1]), pv.Arguments([X, torch.tensor(SCALE)])),
    "a list for one argument": (lambda items: (torch.stack(items), SCALE), list(X)),
    "a list of numbers": (lambda items: (torch.tensor(items), SCALE), X.tolist()),
    "a string": (lambda x, name: (x, {"two": SCALE}[name]), (X, "two")),
    "a namespace": (lambda x, args: (x, args.scale), (X, Namespace(scale=SCALE))),
    "other tensors": (lambda x, w: (x, w.mean()), (X, torch.full((3, 3), SCALE))),
    "a scalar tensor": (lambda x, scale: (x, scale), (X, torch.tensor(SCALE))),
    "an array in a dictionary": (lambda data: (data["x"], SCALE), {"x": X.numpy(), "names": np.array(["a"])}),
    "no arguments": (lambda: (X, SCALE), ()),
}


@pytest.fixture(params=FORMS, ids=list(FORMS))
def program(request):
    read, data = FORMS[request.param]
    return *with_arguments(read), data


def test_log_evidence_is_that_of_the_closed_form(program):
    model, _, data = program
    given = [data] if data != () else []
    torch.testing.assert_close(pv.exact.log_evidence(model, *given), LOG_P, atol=1e-3, rtol=0)


def test_every_number_is_that_of_the_plain_program(program):
    model, guide, data = program
    given = [data] if data != () else []
    pairs = (model, guide, *given), (plain, plain_guide, X)
    assert pv.evaluate(model, guide, data) == pytest.approx(pv.evaluate(plain, plain_guide, X), abs=1e-5)
    found, expected = (pv.log_evidence(*pair, num_samples=50) for pair in pairs)
    torch.testing.assert_close(found.log_evidence, expected.log_evidence)
    torch.testing.assert_close(pv.exact.elbo(model, guide, *given), pv.exact.elbo(plain, plain_guide, X))
    trees = [pv.to_datatree(*pair, draws=3) for pair in pairs]
    assert trees[0]["posterior"]["z"].equals(trees[1]["posterior"]["z"])


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("form", [name for name, (_, data) in FORMS.items() if data != () and type(data) is not list])
def test_training_takes_the_same_steps(form, batch_size):
    read, data = FORMS[form]
    model, _ = with_arguments(read)

    def encoder(x):
        loc = pyro.param("slope", torch.tensor(0.0)) * x
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.9))

    histories = []
    for pair in ((plain, encoder, X), (model, lambda *a, **k: encoder(read(*a, **k)[0]), data)):
        pyro.clear_param_store()
        fitted = pv.fit(*pair, epochs=3, batch_size=batch_size, lr=0.1)
        assert (fitted.model, fitted.guide) == pair[:2]
        histories.append(fitted.history)
    assert histories[0] == histories[1]


def test_an_autoguide_is_called_with_the_arguments():
    model, _ = with_arguments(lambda x, scale: (x, scale))
    losses = []
    for pair in ((model, AutoNormal(model), pv.Arguments(X, scale=SCALE)), (plain, AutoNormal(plain), X)):
        pyro.clear_param_store()
        fitted = pv.fit(*pair, epochs=30, lr=0.1)
        losses.append(fitted.history["elbo"])
        assert isinstance(fitted.guide, AutoNormal)
    assert losses[0] == losses[1]


def test_validation_has_arguments_of_its_own():
    def model(x, count):
        with pyro.plate("data", count):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    fitted = pv.fit(model, lambda x, count: None, (X, 30), epochs=2, validation=(X[:7], 7))
    loc = pyro.param("loc").detach()
    expected = dist.Normal(loc, 1.0).log_prob(X[:7]).mean().item()
    assert fitted.history["validation_elbo"][-1] == pytest.approx(expected, abs=1e-5)


def test_a_run_resumes_with_the_same_arguments_alone(tmp_path):
    def model(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale), obs=x)

    def run(epochs, scale, **options):
        pyro.clear_param_store()
        return pv.fit(model, lambda x, scale: None, (X, scale), epochs=epochs, **options).history

    run(2, 1.0, checkpoints=tmp_path)
    assert run(4, 1.0, checkpoints=tmp_path) == run(4, 1.0)
    with pytest.raises(ValueError, match=r"`arguments` must be \['1.0'\], as in the run of .* got \['2.0'\]"):
        run(6, 2.0, checkpoints=tmp_path)


def test_a_plot_of_one_datum_takes_any_arguments():
    model, guide = with_arguments(lambda x, scale: (x, scale))
    ax = pv.plots.posterior(model, guide, pv.Arguments(X[:1], scale=SCALE))
    assert ax.get_legend() is not None or ax.get_xlabel()


def test_rows_are_the_tensors_of_the_size_of_the_data_plate():
    def model(table, x, lengths):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(table.mean() + lengths, 1.0), obs=x)

    data = torch.zeros(40, 2), X, torch.ones(30)
    found = bind(model, None, data)
    assert [len(rows) for rows in found.data] == [30, 30]
    assert unbound(found.model) is model
    assert ModelGuide(model, None, data).plate == "rows"


def test_rows_alone_are_left_as_they_are():
    for data in (X, (X, X), [X.numpy()], X[:, None].numpy()):
        assert bind(plain, plain_guide, data).data is data
        assert not isinstance(bind(plain, plain_guide, data).model, Bound)


def test_a_program_without_rows_and_plates_has_nats_of_all_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([30]).to_event(1), obs=X)

    pair = ModelGuide(model, None, ())
    assert (pair.num_data, pair.plate, pair.units) == (1, "data", ())


def test_global_state_is_as_before():
    model, guide = with_arguments(lambda x, scale: (x, scale + 0 * pyro.param("w", torch.rand(()))))
    random = torch.get_rng_state()
    bind(model, guide, (X, SCALE))
    assert torch.equal(torch.get_rng_state(), random)
    assert not list(pyro.get_param_store())
