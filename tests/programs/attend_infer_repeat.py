"""Attend, infer, repeat (Eslami et al. 2016): the number of objects is enumerated, absent ones are masked."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

from programs.by_hand import grid, normal
from programs.program import Program

PIXELS, OBJECTS = 12, 2
LEFT_AND_RIGHT = torch.tensor([-1.2, 1.2])  # the mean place of each object, so that the two are not exchangeable


class AIR(nn.Module):
    """Signals of up to two bumps: each has a place, and the objects have one shape."""

    def __init__(self, hidden=16):
        super().__init__()
        self.log_width, self.height = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(1.5))
        self.attend = nn.Sequential(nn.Linear(PIXELS, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.counter = nn.Sequential(nn.Linear(OBJECTS + 1, hidden), nn.Tanh(), nn.Linear(hidden, OBJECTS + 1))

    def draw(self, where):
        places = torch.arange(PIXELS) - (PIXELS - 1) / 2
        return self.height * torch.exp(-(((places - 2 * where[..., None]) / self.log_width.exp()) ** 2))

    def model(self, signals):
        pyro.module("air", self)
        with pyro.plate("signals", len(signals)):
            n = pyro.sample("n", dist.Categorical(torch.tensor([0.3, 0.4, 0.3])))
            signal = torch.zeros(())
            for t in range(OBJECTS):
                with poutine.mask(mask=n > t):
                    where = pyro.sample(f"z_where_{t}", dist.Normal(LEFT_AND_RIGHT[t], 0.7))
                signal = signal + (n > t)[..., None] * self.draw(where)
            pyro.sample("obs", dist.Normal(signal, 0.5).to_event(1), obs=signals)

    def guide(self, signals):
        pyro.module("air", self)
        rest, steps, left = signals, [], []
        for mean in LEFT_AND_RIGHT:
            loc, log_scale = (self.attend(rest) + torch.stack([mean, torch.tensor(-1.0)])).unbind(-1)
            steps.append((loc, log_scale.exp()))
            left.append(rest.square().mean(-1))
            rest = rest - self.draw(loc)
        left.append(rest.square().mean(-1))
        with pyro.plate("signals", len(signals)):
            n = pyro.sample("n", dist.Categorical(logits=self.counter(torch.stack(left, -1))))
            for t, (loc, scale) in enumerate(steps):
                with poutine.mask(mask=n > t):
                    pyro.sample(f"z_where_{t}", dist.Normal(loc, scale))


def make():
    n, places = torch.randint(3, (40,)), torch.arange(PIXELS) - (PIXELS - 1) / 2
    where = LEFT_AND_RIGHT + 0.4 * torch.randn(40, OBJECTS)
    bumps = 2 * torch.exp(-((places - 2 * where[..., None]) ** 2)) * (torch.arange(OBJECTS) < n[:, None])[..., None]
    signals = bumps.sum(1) + 0.5 * torch.randn(40, PIXELS)
    air = AIR()

    @torch.no_grad()
    def by_hand():
        axis = torch.linspace(-6, 6, 161)
        one = air.draw(axis)
        (first, second), volume = grid(axis, axis)
        two = (one[:, None] + one).flatten(0, 1)  # the sum of two objects at the points of the grid
        zero = normal(signals, 0.0, 0.5).sum(-1)
        single = normal(axis, LEFT_AND_RIGHT[0], 0.7)[:, None] + normal(signals, one[:, None], 0.5).sum(-1)
        double = (normal(first, LEFT_AND_RIGHT[0], 0.7) + normal(second, LEFT_AND_RIGHT[1], 0.7))[:, None]
        double = double + torch.cat([normal(signals, part[:, None], 0.5).sum(-1) for part in two.split(2000)])
        terms = [zero, single.logsumexp(0) + (axis[1] - axis[0]).log(), double.logsumexp(0) + volume]
        return (torch.stack(terms) + torch.tensor([0.3, 0.4, 0.3]).log()[:, None]).logsumexp(0)

    return Program(
        air.model,
        config_enumerate(air.guide),
        (signals,),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        steps=600,
        how="sum over the number of objects, quadrature over their places",
        by_hand=by_hand,
    )
