"""Simulated data: where observed values come from, and that drawn ones take their place for model and guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae._utils.rng import seeded
from pyro_vae.diagnostics.simulation import Simulator

X = torch.arange(12.0).reshape(4, 3)
SCALE = 1e-4  # of the noise: drawn values are those of the latents


def simulated(model, guide, *data, seed=0):
    with seeded(seed):
        return Simulator(model, guide, data).draw(check=True)


def nothing(*data):
    """A guide that reads no data."""


def level():
    return pyro.sample("level", dist.Normal(0.0, 100.0))


def whole(x):
    loc = level()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, SCALE * torch.ones(4, 3)).to_event(1), obs=x)


def columns(x):
    loc = level()
    for t in range(x.shape[1]):
        with pyro.plate(f"rows_{t}", len(x)):
            pyro.sample(f"x_{t}", dist.Normal(loc + t, SCALE), obs=x[:, t])


def rows_by_number(x):
    loc = level()
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("x", dist.Normal(loc, SCALE * torch.ones(4, 3)).to_event(1), obs=x[rows])


def turned(x):
    loc = level()
    with pyro.plate("columns", 3):
        pyro.sample("x", dist.Normal(loc, SCALE * torch.ones(3, 4)).to_event(1), obs=x.t())


@pytest.mark.parametrize("model", [whole, columns, rows_by_number, turned])
def test_drawn_values_take_the_place_of_the_data_tensor_or_of_a_view_of_it(model):
    simulation = simulated(model, nothing, X)
    steps = torch.arange(3.0) if model is columns else torch.zeros(3)
    torch.testing.assert_close(simulation.data[0], (simulation.truth["level"] + steps).expand(4, 3), atol=0.01, rtol=0)
    assert simulation.values == {}
    assert torch.equal(X, torch.arange(12.0).reshape(4, 3)), "the data themselves are changed"


def test_data_that_the_model_closes_over_are_replaced_at_the_site():
    def closed():
        loc = level()
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(loc, SCALE * torch.ones(4, 3)).to_event(1), obs=X)

    simulation = simulated(closed, nothing)
    again = simulation.values["x"]
    torch.testing.assert_close(again, simulation.truth["level"].expand(4, 3), atol=0.01, rtol=0)
    assert simulation.data == ()


def test_a_function_of_a_data_tensor_is_replaced_at_the_site_unless_the_guide_reads_that_tensor():
    def logarithms(x, c):
        loc = level()
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(loc + c, SCALE), obs=x[:, 0].log1p())

    def reads(x, c):
        pyro.sample("level", dist.Normal(x.mean(), 1.0))

    def reads_covariates(x, c):
        pyro.sample("level", dist.Normal(c.mean(), 1.0))

    assert simulated(logarithms, nothing, X, torch.zeros(4)).values["x"].shape == (4,)
    assert simulated(logarithms, reads_covariates, X, torch.zeros(4)).values["x"].shape == (4,)
    with pytest.raises(ValueError, match=r"`model` must observe one of its 2 data tensors.*would not reach the guide"):
        simulated(logarithms, reads, X, torch.zeros(4))


def test_covariates_stay_and_missing_entries_stay_missing():
    x = X.clone()
    x[1] = torch.nan

    def model(x, c):
        loc = level()
        with pyro.plate("data", len(x)), poutine.mask(mask=~x[:, 0].isnan()):
            pyro.sample("x", dist.Normal(loc + c, SCALE, validate_args=False), obs=x[:, 0])

    with pyro.validation_enabled(False):
        data, _, truth = simulated(model, nothing, x, torch.arange(4.0))
    expected = truth["level"] + torch.arange(4.0)
    expected[1] = torch.nan
    torch.testing.assert_close(data[0][:, 0], expected, equal_nan=True, atol=0.01, rtol=0)
    assert torch.equal(data[0][:, 1:].nan_to_num(), x[:, 1:].nan_to_num())
    assert torch.equal(data[1], torch.arange(4.0))


def test_a_tensor_at_two_sites_and_integers_with_fractions_are_refused():
    def twice(x):
        for name in "ab":
            with pyro.plate(name, 4):
                pyro.sample(f"x_{name}", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"each data tensor at one site, got one tensor at \['x_a', 'x_b'\]"):
        simulated(twice, nothing, X)
    with pytest.raises(ValueError, match="`data` must have a dtype that holds the draws of 'x'"):
        simulated(whole, nothing, X.long())


def test_a_chain_of_observations_is_drawn_step_by_step():
    def walk(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x_0", dist.Normal(0.0, 100.0), obs=x[:, 0])
            for t in (1, 2):
                pyro.sample(f"x_{t}", dist.Normal(2 * x[:, t - 1], SCALE), obs=x[:, t])

    (x,), _, _ = simulated(walk, nothing, X)
    torch.testing.assert_close(x[:, 1:], 2 * x[:, :2], atol=0.01, rtol=0)
    assert x[:, 0].std() > 10


def test_a_likelihood_that_reads_the_observed_values_themselves_is_refused():
    def circular(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x[:, 0].detach().clone(), 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="`model` must have a likelihood of 'x' that depends on latents"):
        simulated(circular, nothing, X)


def test_what_is_masked_stays_as_it_is_given():
    """A time of death is drawn, and a time of censoring is a covariate, in one data tensor."""
    died = torch.tensor([True, False, True, False])

    def survival(time):
        loc = level()
        with pyro.plate("data", 4):
            with poutine.mask(mask=died):
                pyro.sample("time", dist.Normal(loc, SCALE), obs=time)
            with poutine.mask(mask=~died):
                pyro.sample("censored", dist.Bernoulli(logits=100.0 * (time - 5)), obs=torch.ones(4))

    (time,), values, truth = simulated(survival, nothing, torch.tensor([1.0, 2.0, 3.0, 9.0]))
    torch.testing.assert_close(time[died], truth["level"].expand(2), atol=0.01, rtol=0)
    assert time[~died].tolist() == [2.0, 9.0]
    assert values["censored"].tolist() == [1.0, 0.0, 1.0, 1.0]
