"""Variable elimination against sums over all joint states, and the forward algorithm."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import chi2

from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae.draws import PerDraw
from pyro_vae.exact.elimination import FactorGraph, enumerated, log_marginal, read_factors, sample_eliminated
from pyro_vae.model_guide import ModelGuide

TRANSITION = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.0, 1.5], dtype=torch.float64)


def chain(x):
    """A hidden Markov model of one sequence."""
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5), obs=x[t])


def forward_algorithm(x):
    """log p(x) of the chain."""
    reached = TRANSITION[0].log()
    for t, value in enumerate(x):
        if t:
            reached = (reached[:, None] + TRANSITION.log()).logsumexp(0)
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
    "groups of sequences": (groups_of_sequences, (numbers(2, 2),)),
}


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


def marginal(model, data, **options):
    units = ModelGuide(model, None, data).units
    return log_marginal(enumerated_trace(model, data), options.get("plates", units))


def enumerated_trace(model, data):
    pair = ModelGuide(model, None, data)
    return poutine.trace(enumerated(model, pair.latents, -1 - pair.max_plate_nesting)).get_trace(*data)


def posterior_by_hand(model, data):
    """Joint values of all latents, stacked by site, and their posterior masses."""
    names, values, log_joint = by_hand(model, data)
    return {name: torch.stack([at[name] for at in values]) for name in names}, log_joint.softmax(0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_marginals_and_mode_are_those_of_the_posterior_by_hand(program):
    model, data = PROGRAMS[program]
    values, mass = posterior_by_hand(model, data)
    graph = FactorGraph(read_factors(enumerated_trace(model, data)), [])
    mode, best = graph.values(graph.mode()), mass.argmax()
    for name, marginal_mass in graph.marginals().items():
        states = graph.latents[name].states
        for state, found in zip(states, marginal_mass, strict=True):
            same = values[name] == state
            same = same.all(-1) if state.dim() else same
            expected = (mass.reshape(-1, *[1] * (same.dim() - 1)) * same).sum(0)
            assert torch.allclose(found, expected)
        assert torch.equal(mode[name][0], values[name][best])
    log_joint = graph.log_prob(graph.mode())[0]
    assert torch.allclose(log_joint - graph.log_sum(), mass.max().log())


@pytest.mark.parametrize("program", PROGRAMS)
def test_draws_have_the_posterior_masses_of_all_joint_states(program):
    model, data = PROGRAMS[program]
    values, mass = posterior_by_hand(model, data)
    count = 20_000
    drawn = sample_eliminated(enumerated_trace(model, data), count)
    joint = torch.cat([values[name].double().reshape(len(mass), -1) for name in values], 1)
    draws = torch.cat([drawn[name].double().reshape(count, -1) for name in values], 1)
    places = {tuple(state.tolist()): place for place, state in enumerate(joint)}
    counts = torch.zeros(len(mass))
    for state, number in zip(*draws.unique(dim=0, return_counts=True), strict=True):
        counts[places[tuple(state.tolist())]] = number
    assert counts[mass == 0].sum() == 0
    common = mass * count >= 5
    expected = torch.cat([mass[common] * count, mass[~common].sum()[None] * count])
    found = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    statistic = ((found - expected) ** 2 / expected.clamp(min=1e-12))[expected > 0].sum()
    assert chi2.sf(float(statistic), max(1, int((expected > 0).sum()) - 1)) > 1e-5


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_marginal_is_the_sum_over_all_joint_states(program):
    model, data = PROGRAMS[program]
    *_, log_joint = by_hand(model, data)
    assert torch.allclose(marginal(model, data, plates=()), log_joint.logsumexp(0))
    assert torch.allclose(marginal(model, data).sum(), log_joint.logsumexp(0))


@pytest.mark.parametrize("steps", [5, 50, 1000])
def test_the_marginal_of_a_chain_is_that_of_the_forward_algorithm(steps):
    x = numbers(steps)
    assert torch.allclose(marginal(chain, (x,)), forward_algorithm(x))


@pytest.mark.parametrize(
    ("program", "shape"), [("chain", ()), ("ragged chains", (2,)), ("nested plates", ()), ("groups of sequences", (2,))]
)
def test_the_marginal_has_a_value_for_each_cell_of_the_shared_plates(program, shape):
    model, data = PROGRAMS[program]
    assert marginal(model, data).shape == shape


def test_cells_of_the_shared_plates_are_those_of_each_sequence_alone():
    x = numbers(2, 3)
    found = marginal(ragged_chains, (x, LENGTHS))
    alone = torch.stack([forward_algorithm(row[:length]) for row, length in zip(x, LENGTHS, strict=True)])
    assert torch.allclose(found, alone)


def test_a_marginal_of_many_draws_of_the_other_latents_is_that_of_each():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(TRANSITION[1]))
            pyro.sample("x", dist.Normal(MEANS[z] + shift, 0.5), obs=x)

    x, shifts, calls = numbers(6), numbers(8), []

    def run(values):
        calls.append(1)
        at = poutine.condition(enumerated(model, {"z"}, -2), data=values)
        return {"log p": log_marginal(poutine.trace(at).get_trace(x), ())}, None

    found = PerDraw()(run, 8, {"shift": shifts}).each("log p", 8)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(TRANSITION[1]), dist.Normal(MEANS + shifts[:, None, None], torch.tensor(0.5))
    )
    assert torch.allclose(found, dist.Normal(0.0, 1.0).log_prob(shifts) + mixture.log_prob(x).sum(1))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "marks", [{"enumerate": "sequential"}, {"enumerate": "parallel", "num_samples": 2}, {"expand": True}]
)
def test_marks_of_the_user_do_not_change_the_sum(marks):
    def marked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(TRANSITION[1]), infer=marks)
            pyro.sample("x", dist.Normal(MEANS[z], 0.5), obs=x)

    x = numbers(4)
    fn = dist.MixtureSameFamily(dist.Categorical(TRANSITION[1]), dist.Normal(MEANS, torch.tensor(0.5).double()))
    assert torch.allclose(marginal(marked, (x,)), fn.log_prob(x))


def test_a_site_outside_of_the_plate_of_a_latent_on_which_it_depends_is_refused():
    def count(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).squeeze(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x'"):
        marginal(count, (numbers(1),))


def test_latents_of_crossed_plates_that_depend_on_each_other_are_refused():
    def crossed(x):
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    with pytest.raises(ValueError, match="across plates"):
        marginal(crossed, (numbers(3, 4),))
