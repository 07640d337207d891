"""A neural network whose last layer has random weights, as a PyroModule; the hidden layer is learned."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from programs.by_hand import normal_leave_one_out
from programs.program import Program


class Network(PyroModule):
    def __init__(self, hidden=5):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, hidden)
        self.out = PyroModule[nn.Linear](hidden, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, hidden]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)
        return mean


def make():
    x = torch.linspace(-2, 2, 30)[:, None]
    y = torch.sin(2 * x[:, 0]) + 0.3 * torch.randn(30)
    network = Network()

    @torch.no_grad()
    def features():
        return torch.cat([torch.tanh(network.hidden(x)), torch.ones(30, 1)], 1)

    def by_hand():
        basis = features()
        return dist.MultivariateNormal(torch.zeros(30), basis @ basis.T + 0.09 * torch.eye(30)).log_prob(y)

    def loo():
        basis = features()
        return normal_leave_one_out(torch.zeros(30), basis @ basis.T + 0.09 * torch.eye(30), y)

    def means():
        basis = features()
        weights = torch.linalg.solve(basis.T @ basis / 0.09 + torch.eye(6), basis.T @ y / 0.09)
        return {"out.weight": weights[None, :5], "out.bias": weights[5:]}

    return Program(
        network,
        AutoMultivariateNormal(network),
        (x, y),
        how="closed form",
        steps=1500,
        by_hand=by_hand,
        means=means,
        loo=loo,
    )
