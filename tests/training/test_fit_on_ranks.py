"""Training on several ranks compared with one process."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from given_noise import Noise
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from ranks import run_on_ranks
from torch import nn

import pyro_vae as pv
from pyro_vae._utils.rng import seeded

ROWS, SEED = 37, 0


class Pair(nn.Module):
    """A model with a local and a global latent, whose guide draws from the noise in the data."""

    def __init__(self):
        super().__init__()
        with seeded(1):
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
        self.shift = nn.Parameter(torch.tensor([0.1, -1.0]))

    def model(self, x, noise):
        pyro.module("pair", self)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]) + shift, 0.5).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("pair", self)
        pyro.sample("shift", Noise(self.shift[0], self.shift[1].exp(), torch.tensor(0.3)))
        with pyro.plate("data", ROWS):
            x, noise = pyro.subsample(x, event_dim=1), pyro.subsample(noise, event_dim=0)
            loc, scale = self.encoder(x).unbind(-1)
            pyro.sample("z", Noise(loc, scale.exp(), noise))


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, 2, generator=generator), torch.randn(ROWS, generator=generator)


def trained(compile, elbo, clip_norm):
    pyro.clear_param_store()
    pair = Pair()
    fitted = pv.fit(
        pair.model, pair.guide, data(), epochs=25, batch_size=10, lr=1e-2, compile=compile, elbo=elbo,
        clip_norm=clip_norm, seed=SEED,
    )  # fmt: skip
    return {name: tensor.detach() for name, tensor in pair.named_parameters()}, dict(fitted.history), fitted.steps


CASES = {
    "eager": (False, Trace_ELBO(), None),
    "replayed": (None, Trace_ELBO(), None),
    "clipped": (None, TraceGraph_ELBO(), 1.0),
}


def run_cases():
    return {name: trained(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def on_ranks():
    return {size: run_on_ranks(run_cases, size) for size in (2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_with_the_noise_of_one_process_parameters_are_those_of_one_process(on_ranks, size, case):
    parameters, history, steps = trained(*CASES[case])
    assert steps == 100
    for found in on_ranks[size]:
        theirs, their_history, their_steps = found[case]
        assert their_steps == steps
        for name, tensor in parameters.items():
            assert torch.allclose(theirs[name], tensor, atol=1e-5), name
        for name, values in history.items():
            assert their_history[name] == pytest.approx(values, abs=1e-4)


def running_averages(compile):
    pyro.clear_param_store()
    pair = Pair()
    with seeded(2):
        pair.decoder = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    pv.fit(pair.model, pair.guide, data(), epochs=1, batch_size=10, lr=1e-2, compile=compile, seed=SEED)
    norm = pair.decoder[1]
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("compile", [False, None])
def test_running_averages_of_batch_normalisation_are_alike_on_all_ranks(compile):
    (mean, variance, count), *others = run_on_ranks(running_averages, 3, compile)
    assert count == 4
    assert mean.abs().sum() > 0
    for found in others:
        assert all(map(torch.equal, found, (mean, variance, count)))
