"""Programs whose latents are all discrete, and sums over all of their joint states."""

import itertools
import math
import random
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites

TRANSITION = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.0, 1.5], dtype=torch.float64)


def chain(x):
    """A hidden Markov model of one sequence."""
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5), obs=x[t])


def forward_algorithm(x, transition=TRANSITION):
    """log p(x) of the chain."""
    reached = transition[0].log()
    for t, value in enumerate(x):
        if t:
            reached = (reached[:, None] + transition.log()).logsumexp(0)
        reached = reached + dist.Normal(MEANS, 0.5).log_prob(value)
    return reached.logsumexp(0)


def ragged_chains(x, lengths):
    """Hidden Markov models of sequences with lengths of their own."""
    with pyro.plate("data", len(x)):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
                pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5), obs=x[:, t])


def chains_masked_by_their_distributions(x, lengths):
    with pyro.plate("data", len(x)):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]).mask(t < lengths))
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5).mask(t < lengths), obs=x[:, t])


def factorial_chain(x):
    a = b = torch.zeros((), dtype=torch.long)
    for t in pyro.markov(range(len(x))):
        a = pyro.sample(f"a_{t}", dist.Categorical(TRANSITION[a]))
        b = pyro.sample(f"b_{t}", dist.Bernoulli(0.2 + 0.5 * b.double())).long()
        pyro.sample(f"x_{t}", dist.Normal(MEANS[a] - 2 * b, 0.5), obs=x[t])


def tree(x):
    root = pyro.sample("root", dist.Categorical(TRANSITION[1]))
    for side in ("left", "right"):
        z = pyro.sample(side, dist.Categorical(TRANSITION[root]))
        for leaf in range(1):
            y = pyro.sample(f"{side}_{leaf}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"x_{side}_{leaf}", dist.Normal(MEANS[y], 0.3), obs=x[leaf])


def nested_plates(x):
    """A global latent, a latent for each group, and one for each datum."""
    c = pyro.sample("c", dist.Bernoulli(0.3)).long()
    with pyro.plate("groups", x.shape[1], dim=-1):
        g = pyro.sample("g", dist.Categorical(TRANSITION[c]))
        with pyro.plate("data", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(TRANSITION[g]))
            pyro.sample("x", dist.Normal(MEANS[z] + c, 0.4), obs=x)


def sequential_plate(x):
    c = pyro.sample("c", dist.Categorical(TRANSITION[1]))
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Categorical(TRANSITION[c]))
        pyro.sample(f"x_{i}", dist.Normal(MEANS[z], 0.4), obs=x[i])


def one_state(x):
    a = pyro.sample("a", dist.Categorical(torch.ones(1, dtype=torch.float64)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(TRANSITION[a]))
        pyro.sample("x", dist.Normal(MEANS[z], 0.4), obs=x)


def one_hot(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(TRANSITION[2]))
        pyro.sample("x", dist.Normal(z @ MEANS, 0.4), obs=x)


def groups_of_sequences(x):
    """A latent for each group, and a chain in each of its cells."""
    with pyro.plate("groups", x.shape[0], dim=-1):
        g = pyro.sample("g", dist.Bernoulli(0.4)).long()
        z = g
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"x_{t}", dist.Normal(MEANS[z] + g, 0.4), obs=x[:, t])


def plate_without_a_size(x):
    with pyro.plate("data"):
        a = pyro.sample("a", dist.Categorical(TRANSITION[0]).expand([len(x)]))
        b = pyro.sample("b", dist.Categorical(TRANSITION[a]))
        pyro.sample("x", dist.Normal(MEANS[b], 0.4), obs=x)


def expanded_states(x):
    """Code that needs the states to have as many rows as the data."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(TRANSITION[0]), infer={"enumerate": "parallel", "expand": True})
        b = pyro.sample("b", dist.Categorical(TRANSITION[a]), infer={"enumerate": "parallel", "expand": True})
        pyro.sample("x", dist.Normal(MEANS[b], 0.4), obs=x)


def second_order(x):
    first = second = torch.tensor(0)
    for t in pyro.markov(range(len(x)), history=2):
        probs = (TRANSITION[first] + TRANSITION[second]) / 2
        second, first = first, pyro.sample(f"z_{t}", dist.Categorical(probs))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[first], 0.5), obs=x[t])


def noisy_or(x):
    """Symptoms that each depend on all causes (Pearl 1988)."""
    with pyro.plate("causes", 4):
        cause = pyro.sample("cause", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
    weights = torch.linspace(0.1, 0.8, 4 * len(x), dtype=torch.float64).reshape(len(x), 4)
    with pyro.plate("symptoms", len(x)):
        absent = 0.95 * (1 - weights * cause).prod(-1)
        pyro.sample("symptom", dist.Bernoulli(1 - absent), obs=(x > 0).double())


def votes(x):
    """Latents of a plate that are counted, in each of some groups."""
    with pyro.plate("groups", len(x), dim=-2):
        with pyro.plate("votes", 3, dim=-1):
            vote = pyro.sample("vote", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        count = vote.sum(-1, keepdim=True)
        rounded = pyro.sample("rounded", dist.Bernoulli(0.1 + 0.25 * count))
        pyro.sample("x", dist.Normal(count + rounded, 0.5), obs=x[:, None])


def crossed_plates(x):
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", len(x), dim=-1)
    with rows:
        a = pyro.sample("a", dist.Categorical(TRANSITION[1]))
    with columns:
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
    with rows, columns:
        pyro.sample("x", dist.Normal(MEANS[a] + b, 0.5), obs=x.expand(2, len(x)))


def components(x):
    """Each datum picks one of the components, whose latents are discrete."""
    with pyro.plate("components", 3):
        kind = pyro.sample("kind", dist.Categorical(TRANSITION[2]))
    with pyro.plate("data", len(x)):
        pick = pyro.sample("pick", dist.Categorical(TRANSITION[1]))
        pyro.sample("x", dist.Normal(MEANS[kind[pick]], 0.5), obs=x)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LENGTHS = torch.tensor([2, 1])
PROGRAMS = {
    "chain": (chain, (numbers(4),)),
    "ragged chains": (ragged_chains, (numbers(2, 2), LENGTHS)),
    "ragged chains, masks of distributions": (chains_masked_by_their_distributions, (numbers(2, 2), LENGTHS)),
    "factorial chain": (factorial_chain, (numbers(2),)),
    "tree": (tree, (numbers(2),)),
    "nested plates": (nested_plates, (numbers(1, 2),)),
    "sequential plate": (sequential_plate, (numbers(4),)),
    "one state": (one_state, (numbers(3),)),
    "one-hot": (one_hot, (numbers(4),)),
    "plate without a size": (plate_without_a_size, (numbers(2),)),
    "expanded states": (expanded_states, (numbers(2),)),
    "second order": (second_order, (numbers(4),)),
    "groups of sequences": (groups_of_sequences, (numbers(2, 2),)),
}


COUPLED = {
    "noisy or": (noisy_or, (numbers(3),)),
    "votes": (votes, (numbers(2),)),
    "crossed plates": (crossed_plates, (numbers(3),)),
    "components": (components, (numbers(3),)),
}


def random_program(seed):
    """Latents and observations with random parents, each in no plate, in columns, or in rows and columns."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    latents, observed = [], []
    for _ in range(choose.randint(3, 5)):
        level = choose.choice([0, 0, 1, 1, 2])
        parents = [j for j, (other, *_) in enumerate(latents) if other <= level and choose.random() < 0.6][-3:]
        sizes = [latents[j][2].shape[-1] for j in parents]
        table = 0.05 + torch.rand(*sizes, choose.randint(1, 3), generator=generator, dtype=torch.float64)
        latents.append((level, parents, table / table.sum(-1, keepdim=True)))
    for _ in range(2):
        level = choose.choice([0, 1, 2])
        parents = [j for j, (other, *_) in enumerate(latents) if other <= level and choose.random() < 0.7][-3:]
        sizes = [latents[j][2].shape[-1] for j in parents]
        observed.append((level, parents, torch.randn(sizes, generator=generator, dtype=torch.float64)))

    def model(x):
        plates, z = [pyro.plate("columns", 2, dim=-1), pyro.plate("rows", len(x), dim=-2)], []
        for number, (level, parents, table) in enumerate(latents):
            with ExitStack() as stack:
                for plate in plates[:level]:
                    stack.enter_context(plate)
                probs = Vindex(table)[(*(z[j] for j in parents), slice(None))]
                z.append(pyro.sample(f"z_{number}", dist.Categorical(probs)))
        for number, (level, parents, loc) in enumerate(observed):
            with ExitStack() as stack:
                for plate in plates[:level]:
                    stack.enter_context(plate)
                loc = Vindex(loc)[tuple(z[j] for j in parents)] if parents else loc
                pyro.sample(f"x_{number}", dist.Normal(loc, 1.0), obs=(x[0, 0], x[0], x)[level])

    cells = [1, 2, 6]  # of three rows
    return model, math.prod(table.shape[-1] ** cells[level] for level, _, table in latents)


def all_states(fn):
    """All joint values of a site, of which each cell has its own."""
    states, cells = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape), fn.batch_shape.numel()
    for choice in itertools.product(range(len(states)), repeat=cells):
        yield states[list(choice)].reshape(fn.batch_shape + fn.event_shape)


def by_hand(model, data):
    """The latents, all of their joint values, and log p(x, z) at each of them, with all data together.

    The prior of masked cells counts: it sums to one.
    """
    trace = poutine.trace(model).get_trace(*data)
    latents = latent_sites(trace)
    values, log_joint = [], []
    for choice in itertools.product(*(all_states(site["fn"]) for site in latents.values())):
        at = dict(zip(latents, choice, strict=True))
        run = poutine.trace(poutine.condition(model, data=at)).get_trace(*data)
        fns = [run.nodes[name]["fn"] for name in latents]
        fns = [fn.base_dist if isinstance(fn, dist.MaskedDistribution) else fn for fn in fns]
        prior = sum(fn.log_prob(value).sum() for fn, value in zip(fns, choice, strict=True))
        observed = [site for name, site in observed_sites(run).items() if name not in latents]
        values.append(at)
        log_joint.append(prior + sum(log_density(site).sum() for site in observed))
    return list(latents), values, torch.stack(log_joint)


def posterior_by_hand(model, data):
    """Joint values of all latents, stacked by site, and their posterior masses."""
    names, values, log_joint = by_hand(model, data)
    return {name: torch.stack([at[name] for at in values]) for name in names}, log_joint.softmax(0)
