"""Recurrent layers run for many draws at once, with the numbers and gradients of one draw after the other."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.draws import PerDraw

C, N, T = 4, 3, 5


def a_layer(kind, batch_first, **options):
    cls = {"GRU": nn.GRU, "LSTM": nn.LSTM}.get(kind, nn.RNN)
    options |= {"nonlinearity": kind} if cls is nn.RNN else {}
    return cls(2, 4, num_layers=2, batch_first=batch_first, **options)


def by_both_ways(run, values, of):
    """The results and gradients of PerDraw at once, and of a loop over the draws."""
    found = []
    for loops in (False, True):
        per_draw = PerDraw()
        per_draw.loops = loops
        results = per_draw(run, C, values)
        assert per_draw.loops == loops
        tensors = [results.each(key, C) for key in sorted(results.tensors)]
        found.append([*tensors, *torch.autograd.grad(sum(each.square().sum() for each in tensors), of)])
    return found


@pytest.mark.parametrize(
    ("kind", "batch_first", "bidirectional"), [*product(["GRU", "LSTM", "tanh", "relu"], [True, False], [True, False])]
)
def test_padded_sequences_of_all_draws_run_at_once(kind, batch_first, bidirectional):
    layer = a_layer(kind, batch_first, bidirectional=bidirectional)
    x = torch.randn(C, N, T, 2) if batch_first else torch.randn(C, T, N, 2)
    values = {"x": x.requires_grad_()}

    def run(values):
        output, states = layer(values["x"])
        states = states if isinstance(states, tuple) else (states,)
        return {"output": output, **{f"state {number}": state for number, state in enumerate(states)}}, None

    ours, theirs = by_both_ways(run, values, [x, *layer.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "tanh"])
def test_the_first_states_alone_may_depend_on_the_draw(kind):
    layer, x = a_layer(kind, True), torch.randn(N, T, 2, requires_grad=True)
    values = {"h": torch.randn(C, 2, N, 4, requires_grad=True)}

    def run(values):
        start = values["h"] if kind != "LSTM" else (values["h"], torch.zeros(2, N, 4))
        return {"output": layer(x, start)[0]}, None

    ours, theirs = by_both_ways(run, values, [x, values["h"], *layer.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_sequence_without_a_batch_and_other_operations_run_at_once():
    layer, values = nn.GRU(2, 4), {"x": torch.randn(C, T, 2, requires_grad=True)}

    def run(values):
        return {"output": layer(values["x"].cos())[0].cumsum(0)}, None

    ours, theirs = by_both_ways(run, values, [values["x"]])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_between_layers_differs_between_draws():
    layer = nn.GRU(2, 8, num_layers=2, dropout=0.5, batch_first=True)
    per_draw = PerDraw()
    x = torch.ones(N, T, 2)
    found = per_draw(lambda values: ({"output": layer(x + values["shift"])[0]}, None), C, {"shift": torch.zeros(C)})
    assert not per_draw.loops
    assert len(found.tensors["output"][:, 0, -1].unique(dim=0)) == C


def test_packed_sequences_and_weights_that_depend_on_the_draw_run_one_after_the_other():
    layer = nn.GRU(2, 4, batch_first=True)

    def packed(values):
        sequences = nn.utils.rnn.pack_padded_sequence(values["x"], torch.full((N,), T), batch_first=True)
        return {"state": layer(sequences)[1]}, None

    def weighted(values):
        weights = [values["x"].mean() * weight for weight in layer._flat_weights]
        _, state = torch.gru(values["x"], torch.zeros(1, N, 4), weights, True, 1, 0.0, True, False, True)
        return {"state": state}, None

    for run in (packed, weighted):
        per_draw, x = PerDraw(), torch.randn(C, N, T, 2)
        found = per_draw(run, C, {"x": x})
        assert per_draw.loops
        each = torch.stack([run({"x": one})[0]["state"] for one in x])
        torch.testing.assert_close(found.tensors["state"], each)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, self.output = nn.GRU(2, 6, batch_first=True), nn.Linear(6, 3)

    def model(self, x):
        pyro.module("sequences", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            states, _ = self.decoder(z[:, None].expand(-1, x.shape[1], -1))
            pyro.sample("x", dist.Categorical(logits=self.output(states)).to_event(1), obs=x)


def test_the_evidence_of_a_recurrent_decoder_is_the_sum_over_a_grid_by_hand():
    pair, x = Sequences(), torch.randint(3, (N, T))
    axis = torch.linspace(-6, 6, 121)
    with torch.no_grad():
        z = torch.cartesian_prod(axis, axis)
        states, _ = pair.decoder(z[:, None].expand(-1, T, -1))
        log_p = dist.Categorical(logits=pair.output(states)).to_event(1).log_prob(x[:, None].expand(-1, len(z), -1))
        log_p = log_p + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        truth = log_p.double().logsumexp(1) + 2 * torch.tensor(0.1).log()
    torch.testing.assert_close(pv.exact.log_evidence(pair.model, x).double(), truth, atol=1e-3, rtol=0)
