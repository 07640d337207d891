"""Variable elimination against sums over all joint states, and the forward algorithm."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_cases import (
    LENGTHS,
    MEANS,
    PROGRAMS,
    TRANSITION,
    by_hand,
    chain,
    forward_algorithm,
    numbers,
    posterior_by_hand,
    ragged_chains,
)
from pyro import poutine
from scipy.stats import chi2

import pyro_vae as pv
from pyro_vae.draws import PerDraw
from pyro_vae.exact.elimination import FactorGraph, enumerated, log_marginal, read_factors, sample_eliminated
from pyro_vae.model_guide import ModelGuide


def enumerated_trace(model, data):
    pair = ModelGuide(model, None, data)
    return poutine.trace(enumerated(model, pair.latents, -1 - pair.max_plate_nesting)).get_trace(*data)


def marginal(model, data, **options):
    units = ModelGuide(model, None, data).units
    return log_marginal(enumerated_trace(model, data), options.get("plates", units))


@pytest.mark.parametrize("program", PROGRAMS)
def test_marginals_and_mode_are_those_of_the_posterior_by_hand(program):
    model, data = PROGRAMS[program]
    values, mass = posterior_by_hand(model, data)
    graph = FactorGraph(read_factors(enumerated_trace(model, data)), [])
    mode, best = graph.values(graph.mode()), mass.argmax()
    for name, marginal_mass in graph.marginals().items():
        states = graph.latents[name].support
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


def shifted(likelihood):
    """A model of a continuous latent, and of discrete ones that its guide leaves out."""

    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        likelihood(x, shift)

    def guide(x):
        pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 0.5))

    return model, guide


def too_short_history(x, shift):
    first = second = torch.tensor(0)
    for t in pyro.markov(range(len(x)), history=1):
        probs = (TRANSITION[first] + TRANSITION[second]) / 2
        second, first = first, pyro.sample(f"z_{t}", dist.Categorical(probs))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[first] + shift, 0.5), obs=x[t])


def compared_cells(x, shift):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(TRANSITION[1]))
        pyro.sample("x", dist.Normal(MEANS[z] - MEANS[z].roll(1, -1) + shift, 0.5), obs=x)


def concatenated(x, shift):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(TRANSITION[1]))
        loc = torch.cat([MEANS[z][:, None], x[:, None]], 1).sum(1)
        pyro.sample("x", dist.Normal(loc + shift, 0.5), obs=x)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            too_short_history,
            r"with a `pyro.markov\(history=\)` of all steps that it needs",
        ),
        (compared_cells, r"functions of its latents and data, got others: that of site 'x'"),
        (concatenated, r"take all states of the discrete latents \['z'\] at once"),
    ],
)
def test_estimates_that_sum_out_latents_of_which_the_code_has_other_densities_are_refused(likelihood, message):
    model, guide = shifted(likelihood)
    with pytest.raises(ValueError, match="`model` must.*" + message):
        pv.log_evidence(model, guide, numbers(5))
