"""Models of discrete latents against sums by hand, the forward-backward algorithm and Viterbi's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_cases import (
    COUPLED,
    MEANS,
    PROGRAMS,
    TRANSITION,
    by_hand,
    chain,
    forward_algorithm,
    numbers,
    posterior_by_hand,
    ragged_chains,
    random_program,
)
from pyro import poutine
from torch import nn

from pyro_vae import exact
from pyro_vae.exact import discrete
from pyro_vae.model_guide import ModelGuide

STRUCTURED = [name for name in PROGRAMS if name != "one-hot"]
ALL = PROGRAMS | COUPLED  # those with cells of a plate that depend on each other


@pytest.mark.parametrize("program", [*STRUCTURED, *COUPLED])
def test_evidence_is_the_sum_over_all_joint_states(program):
    model, data = ALL[program]
    *_, log_joint = by_hand(model, data)
    found = exact.log_evidence(model, *data)
    assert found.dtype == torch.float64
    assert torch.allclose(found.sum(), log_joint.logsumexp(0))


@pytest.mark.parametrize("program", STRUCTURED)
def test_each_way_to_read_factors_gives_the_same_sum(program):
    model, data = PROGRAMS[program]
    reader = discrete._FactorReader(ModelGuide(model, None, data), "model")
    ways = [reader._enumerated(), reader._by_digits(reader._origins), reader._by_digits(reader._all_latents())]
    graphs = [discrete.FactorGraph(factors, []) for factors in ways]
    for graph in graphs:
        graph.check_densities("model", reader._drawn(), reader._factors)
        assert torch.allclose(graph.log_sum(), graphs[0].log_sum())
    assert graphs[0].width == graphs[1].width


def chain_without_markov(x):
    z = 0
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5), obs=x[t])


@pytest.mark.parametrize(("model", "steps"), [(chain, 1000), (chain_without_markov, 10), (chain_without_markov, 90)])
def test_evidence_of_a_chain_is_that_of_the_forward_algorithm(model, steps):
    x = numbers(steps)
    assert torch.allclose(exact.log_evidence(model, x), forward_algorithm(x))


def test_evidence_in_single_precision_is_as_right_as_its_densities():
    x = numbers(300)

    def single(x):
        z = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION.float()[z]))
            pyro.sample(f"x_{t}", dist.Normal(MEANS.float()[z], 0.5), obs=x[t])

    found = exact.log_evidence(single, x.float())
    assert found.dtype == torch.float32
    transition = TRANSITION.clamp(min=torch.finfo(torch.float32).eps)  # as Categorical clamps
    assert torch.allclose(found.double(), forward_algorithm(x, transition), rtol=1e-6)


def second_order_of_first(x):
    """A chain whose states depend on two states before, more than its ``pyro.markov`` allows."""
    before, z = torch.tensor(0), torch.tensor(0)
    for t in pyro.markov(range(len(x)), history=1):
        before, z = z, pyro.sample(f"z_{t}", dist.Categorical((TRANSITION[z] + TRANSITION[before]) / 2))
        pyro.sample(f"x_{t}", dist.Normal(MEANS[z], 0.5), obs=x[t])


class Concatenating(nn.Module):
    """Code that needs the latent to have as many rows as the data."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            mean = torch.cat([a[:, None], b[:, None]], 1).sum(1)
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)


def branching(x):
    a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
    p = 0.3 if a.item() else 0.6
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(p, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(2 * z, 0.5), obs=x)


@pytest.mark.parametrize("model", [second_order_of_first, Concatenating(), branching])
def test_code_that_cannot_be_enumerated_at_once_has_the_sum_by_hand(model):
    x = numbers(4)
    *_, log_joint = by_hand(model, (x,))
    assert torch.allclose(exact.log_evidence(model, x).sum(), log_joint.logsumexp(0))


def test_points_are_functions_of_the_latents_that_are_summed_out():
    def model(x):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        mean = pyro.sample("mean", dist.Delta(2 * a))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.3 * mean))
        pyro.sample("x", dist.Normal(mean + b, 1.0), obs=x[0])

    x, (a, b) = numbers(1), torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
    prior = torch.tensor([0.6, 0.4], dtype=torch.float64).log()[a] + dist.Bernoulli(0.2 + 0.6 * a.double()).log_prob(
        b.double()
    )
    expected = (prior + dist.Normal(2.0 * a + b, 1.0).log_prob(x)).logsumexp((0, 1))
    assert torch.allclose(exact.log_evidence(model, x), expected)
    reader = discrete._FactorReader(ModelGuide(model, None, (x,)), "model")
    assert torch.allclose(discrete.FactorGraph(reader._by_digits(reader._origins), []).log_sum(), expected)
    assert exact.posterior(model, x).marginals.keys() == {"a", "b"}


def test_latents_of_which_cells_have_other_states_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Binomial(torch.arange(1.0, 4.0), 0.3))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.1 * a))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    with pytest.raises(ValueError, match="of which every cell has the same states, got 'a'"):
        exact.log_evidence(model, torch.zeros(3))


def test_code_that_compares_the_cells_of_a_plate_is_refused():
    def model(x):
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        with pyro.plate("steps", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * a))
            pyro.sample("x", dist.Normal(z - z.roll(1, -1), 0.5), obs=x)

    with pytest.raises(ValueError, match="functions of its latents and data, got others: that of site 'x'"):
        exact.log_evidence(model, numbers(5))


@pytest.mark.parametrize("program", [*STRUCTURED, *COUPLED])
def test_the_posterior_is_that_by_hand(program):
    model, data = ALL[program]
    values, mass = posterior_by_hand(model, data)
    posterior = exact.posterior(model, *data)
    log_prob = posterior.log_prob(values)
    assert log_prob.shape == (len(mass), *posterior.log_evidence.shape)
    assert torch.allclose(log_prob.reshape(len(mass), -1).sum(1).exp(), mass)
    drawn = posterior.sample((3, 2))
    for name, value in drawn.items():
        assert value.shape == (3, 2, *values[name].shape[1:])
        assert torch.equal(posterior.mode[name], values[name][mass.argmax()])
        for state, found in zip(posterior.support[name], posterior.marginals[name], strict=True):
            weights = mass.reshape(-1, *[1] * (values[name].dim() - 1))
            assert torch.allclose(found, (weights * (values[name] == state)).sum(0))
    assert posterior.log_prob(drawn).shape == (3, 2, *posterior.log_evidence.shape)
    assert posterior.log_prob(posterior.mode).shape == posterior.log_evidence.shape


@pytest.mark.slow
def test_answers_of_random_programs_are_those_by_hand():
    x, compared = numbers(3, 2), 0
    for seed in range(60):
        model, num_states = random_program(seed)
        if num_states > 2000:
            continue
        values, mass = posterior_by_hand(model, (x,))
        *_, log_joint = by_hand(model, (x,))
        posterior = exact.posterior(model, x)
        assert torch.allclose(exact.log_evidence(model, x).sum(), log_joint.logsumexp(0))
        assert torch.allclose(posterior.log_prob(values).reshape(len(mass), -1).sum(1).exp(), mass)
        for name, value in values.items():
            weights = mass.reshape(-1, *[1] * (value.dim() - 1))
            expected = torch.stack([(weights * (value == state)).sum(0) for state in posterior.support[name]])
            assert torch.allclose(posterior.marginals[name], expected)
        compared += 1
    assert compared > 25


def test_marginals_of_a_chain_are_those_of_the_forward_backward_algorithm():
    x = numbers(50)
    emitted = dist.Normal(MEANS, 0.5).log_prob(x[:, None])
    forward, backward = [TRANSITION[0].log() + emitted[0]], [torch.zeros(3, dtype=torch.float64)]
    for t in range(1, len(x)):
        forward.append((forward[-1][:, None] + TRANSITION.log()).logsumexp(0) + emitted[t])
        backward.append((TRANSITION.log() + emitted[-t] + backward[-1]).logsumexp(1))
    expected = (torch.stack(forward) + torch.stack(backward[::-1])).softmax(1)
    marginals = exact.posterior(chain, x).marginals
    assert torch.allclose(torch.stack([marginals[f"z_{t}"] for t in range(len(x))]), expected)


def test_the_mode_of_a_chain_is_that_of_viterbi():
    x = numbers(50)
    emitted = dist.Normal(MEANS, 0.5).log_prob(x[:, None])
    best, pointers = TRANSITION[0].log() + emitted[0], []
    for t in range(1, len(x)):
        top = (best[:, None] + TRANSITION.log()).max(0)
        best, pointers = top.values + emitted[t], [*pointers, top.indices]
    path = [best.argmax()]
    for pointer in reversed(pointers):
        path.append(pointer[path[-1]])
    mode = exact.posterior(chain, x).mode
    assert [int(mode[f"z_{t}"]) for t in range(len(x))] == [int(state) for state in reversed(path)]


def test_draws_of_a_long_chain_have_its_marginals():
    posterior = exact.posterior(chain, numbers(200))
    draws = posterior.sample((2000,))
    found = torch.stack([(draws[name][None] == posterior.support[name][:, None]).double().mean(1) for name in draws])
    expected = torch.stack([posterior.marginals[name] for name in draws])
    assert ((found - expected).abs() < 5.5 * (expected * (1 - expected) / 2000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("noise", [lambda z: z + torch.randn(()), lambda z: nn.functional.dropout(z, 0.5)])
def test_random_numbers_outside_of_sites_are_refused(noise):
    def model(x):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        pyro.sample("x", dist.Normal(noise(a + b + 1.0), 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"`model` must have .*outside of its sites"):
        exact.log_evidence(model, torch.zeros(3))


def test_values_that_are_no_states_have_no_log_prob():
    posterior = exact.posterior(chain, numbers(3))
    mode = posterior.mode
    for values, message in [
        (mode | {"z_1": torch.tensor(7)}, "`values` must have states of 'z_1' alone"),
        ({"z_0": mode["z_0"]}, r"`values` must have the latents \['z_0', 'z_1', 'z_2'\], got \['z_0'\]"),
        (mode | {"z_1": torch.zeros(2)}, r"`values` must end in the shape \(\) at 'z_1'|same sample shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            posterior.log_prob(values)


def test_a_posterior_shows_its_width_and_its_latents():
    posterior = exact.posterior(ragged_chains, *PROGRAMS["ragged chains"][1])
    assert "2 latent sites, exact by variable elimination of width 9 states" in repr(posterior)
    assert "z_1" in posterior._repr_html_()


def test_data_that_are_impossible_have_no_posterior():
    def model(x):
        logits = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
        a = pyro.sample("a", dist.Categorical(logits=logits[0]))
        b = pyro.sample("b", dist.Categorical(logits=logits[a]))
        pyro.sample("x", dist.Categorical(logits=logits[b]), obs=x[0])

    assert exact.log_evidence(model, torch.ones(1).long()).isneginf()
    with pytest.raises(ValueError, match="positive density under the model"):
        exact.posterior(model, torch.ones(1).long())


def test_sums_that_are_too_wide_are_refused_with_their_width():
    def coupled(x):
        z = [pyro.sample(f"z_{i}", dist.Bernoulli(0.5)) for i in range(20)]
        pyro.sample("x", dist.Normal(sum(z), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"at most 65536 states together in one sum, got 1048576 states of \['z_0'"):
        exact.log_evidence(coupled, torch.zeros(1))


def test_cells_that_depend_on_each_other_are_refused_if_their_joint_states_are_too_many():
    def model(x):
        with pyro.plate("causes", 20):
            cause = pyro.sample("cause", dist.Bernoulli(0.2))
        pyro.sample("x", dist.Normal(cause.sum(-1), 1.0), obs=x[0])

    with pytest.raises(ValueError, match=r"'cause'.*joint states are too many to be summed over"):
        exact.log_evidence(model, torch.zeros(1))


def test_continuous_latents_next_to_discrete_ones_are_refused_with_advice():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"use pv.log_evidence with a guide of \['mean'\]"):
        exact.log_evidence(model, torch.zeros(3))


def mean_field_of_chains(x, lengths):
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            logits = torch.stack([x[:, t], -x[:, t], 0.5 * x[:, t]], 1)
            with poutine.mask(mask=t < lengths):
                pyro.sample(f"z_{t}", dist.Categorical(logits=logits))


def tree_from_the_root(x):
    root = pyro.sample("root", dist.Categorical(TRANSITION[2]))
    for side in ("left", "right"):
        z = pyro.sample(side, dist.Categorical(TRANSITION[2 - root]))
        pyro.sample(f"{side}_0", dist.Categorical((TRANSITION[z] + TRANSITION[root]) / 2))


def symptoms_to_causes(x):
    with pyro.plate("causes", 4):
        pyro.sample("cause", dist.Bernoulli(torch.linspace(0.2, 0.6, 4, dtype=torch.float64)))


def local_and_global(x):
    pyro.sample("c", dist.Bernoulli(torch.tensor(0.6, dtype=torch.float64)))
    with pyro.plate("groups", x.shape[1], dim=-1):
        g = pyro.sample("g", dist.Categorical(TRANSITION[1]))
        with pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("z", dist.Categorical((TRANSITION[g] + 0.1) / 1.3))


GUIDES = {
    "ragged chains": mean_field_of_chains,
    "tree": tree_from_the_root,
    "nested plates": local_and_global,
    "noisy or": symptoms_to_causes,
}


@pytest.mark.parametrize("program", GUIDES)
def test_elbo_and_kl_are_the_sums_by_hand(program):
    (model, data), guide = ALL[program], GUIDES[program]
    values, mass = posterior_by_hand(model, data)
    *_, log_joint = by_hand(model, data)
    q = by_hand(guide, data)[2].exp()
    assert torch.allclose(q.sum(), torch.ones((), dtype=torch.float64))
    order = by_hand(guide, data)[1]
    places = {tuple(torch.cat([at[name].flatten() for name in values]).tolist()): k for k, at in enumerate(order)}
    joint = torch.cat([value.reshape(len(mass), -1) for value in values.values()], 1)
    q = q[[places[tuple(state.tolist())] for state in joint]]
    kept = q > 0
    kl = (q * (q.log() - mass.log()))[kept].sum()
    if program == "ragged chains":  # terms of masked latents do not count; by hand both priors do
        padded = values["z_1"][:, 1]
        log_prior = dist.Categorical(TRANSITION[values["z_0"][:, 1]]).log_prob(padded)
        kl = kl - (q * (mean_field_at(data, padded).log() - log_prior))[kept].sum()
    found = exact.kl(model, guide, *data)
    assert torch.allclose(found.sum(), kl)
    assert (found > 0).all()
    total = exact.elbo(model, guide, *data) + found
    assert torch.allclose(total.sum(), log_joint.logsumexp(0))


@pytest.mark.parametrize("program", ["ragged chains", "factorial chain"])
def test_a_guide_that_leaves_out_all_latents_has_no_gap(program):
    model, data = PROGRAMS[program]
    evidence = exact.log_evidence(model, *data)
    assert torch.equal(exact.elbo(model, lambda *_: None, *data), evidence)
    assert torch.equal(exact.kl(model, lambda *_: None, *data), torch.zeros_like(evidence))


@pytest.mark.parametrize("guide", [lambda x: pyro.sample("z_0", dist.Categorical(TRANSITION[0])), chain_without_markov])
def test_guides_of_other_latents_are_refused(guide):
    with pytest.raises(ValueError, match=r"`guide` must (draw the latents of the model|have latent sites alone)"):
        exact.elbo(chain, guide, numbers(3))


def mean_field_at(data, states):
    """The mass of the guide at the padded step of the second sequence."""
    x = data[0][1, 1]
    return torch.stack([x, -x, 0.5 * x]).softmax(0)[states]
