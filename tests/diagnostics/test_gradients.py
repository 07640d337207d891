"""The bench that holds estimators against enumeration, itself held against autograd, differences and known answers."""

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.diagnostics.gradients import Estimator, Measured, compare, exact_gradient, measure
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage
from pyro_vae.objectives.modified_kl import DiscreteKL
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction

TANH = networks.mlp([4], activation=nn.Tanh)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()


def vae_of(kind, temperature=0.5):
    torch.manual_seed(0)
    prior, encoder, latent = {
        "bernoulli": lambda: (priors.Bernoulli(3, 0.3, learnable=True), guides.Bernoulli(2, 3, TANH), 3),
        "one-hot": lambda: (
            priors.OneHotCategorical((2, 3), torch.tensor([0.2, 0.3, 0.5]), learnable=True),
            guides.OneHotCategorical(2, (2, 3), TANH),
            (2, 3),
        ),
        "relaxed": lambda: (
            priors.RelaxedBernoulli(3, temperature, probs=0.3, learnable=True),
            guides.RelaxedBernoulli(2, 3, TANH, temperature),
            3,
        ),
    }[kind]()
    return pv.VAE(prior, encoder, likelihoods.Normal(latent, 2, TANH, scale="shared")).double()


def estimator(vae, elbo, **options):
    return Estimator(vae.model, vae.guide, elbo, **options)


def enumeration(vae):
    return Estimator(vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1))


def hand_bound(vae, num_draws):
    """The mean over data of the expected K-sample bound, all combinations of states written out."""
    states = vae.prior().enumerate_support()
    pieces = []
    for state in states:
        log_q = vae.encode(X).log_prob(state)
        z = state.expand(len(X), *state.shape)
        pieces.append((vae.prior().log_prob(state) + vae.decode(z).log_prob(X) - log_q, log_q))
    total = 0.0
    for chosen in itertools.product(pieces, repeat=num_draws):
        f, log_q = (torch.stack([piece[index] for piece in chosen]) for index in (0, 1))
        total = total + (log_q.sum(0).exp() * (f.logsumexp(0) - math.log(num_draws))).mean()
    return total


def differences(parameter, function, step=1e-5):
    result = torch.zeros_like(parameter)
    flat, out = parameter.data.view(-1), result.view(-1)
    for index in range(len(flat)):
        old = float(flat[index])
        flat[index] = old + step
        above = float(function())
        flat[index] = old - step
        out[index] = (above - float(function())) / (2 * step)
        flat[index] = old
    return result


# --- The exact gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_it_is_that_of_pyros_enumeration(kind):
    vae = vae_of(kind)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, config_enumerate(vae.guide), X)
    names, parameters = zip(*vae.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(-loss / len(X), parameters), strict=True))
    found = exact_gradient(vae.model, vae.guide, X)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_it_is_the_slope_of_the_exact_elbo(kind):
    vae = vae_of(kind)
    found = exact_gradient(vae.model, vae.guide, X)
    for name, parameter in vae.named_parameters():
        slope = differences(parameter, lambda: pv.exact.elbo(vae.model, vae.guide, X).mean())
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "num_draws"), [("bernoulli", 1), ("bernoulli", 2), ("bernoulli", 3), ("one-hot", 2)])
def test_it_is_that_of_a_bound_written_out(kind, num_draws):
    vae = vae_of(kind)
    names, parameters = zip(*vae.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(hand_bound(vae, num_draws), parameters), strict=True))
    found = exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def test_of_several_draws_it_is_the_slope_of_their_bound():
    vae = vae_of("bernoulli")
    found = exact_gradient(vae.model, vae.guide, X, num_draws=2)
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            slope = differences(parameter, lambda: hand_bound(vae, 2))
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)


def test_in_float32_it_is_nearly_the_same_and_of_that_type():
    vae = vae_of("bernoulli")
    exact = exact_gradient(vae.model, vae.guide, X)
    vae.float()
    pyro.clear_param_store()
    for name, value in exact_gradient(vae.model, vae.guide, X.float()).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name].float(), rtol=1e-4, atol=1e-5)


def test_of_a_users_own_pair_it_is_in_unconstrained_parameters():
    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0).double(), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.4).double()))
            second = pyro.sample("second", dist.Bernoulli(0.2 + 0.5 * first))
            pyro.sample("x", dist.Normal(first - 2 * second, scale), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5).double())
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Bernoulli(logits=slope * x))
            pyro.sample("second", dist.Bernoulli(logits=first - slope * x))

    x = X[:, 0]
    found = exact_gradient(model, guide, x, plate="rows")
    assert found.keys() == {"scale", "slope"}
    store = pyro.get_param_store()
    for name, value in found.items():
        parameter = store[name].unconstrained() if hasattr(store[name], "unconstrained") else store[name]
        slope = differences(parameter, lambda: pv.exact.elbo(model, guide, x, plate="rows").mean())
        torch.testing.assert_close(value, slope, rtol=1e-6, atol=1e-8)


def users_modules():
    """Two modules of a user's own, each registered by its name, with parameters of the same names inside."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pv.distributions.Product(dist.Bernoulli(torch.full((3,), 0.3).double()), 1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", pv.distributions.Product(dist.Bernoulli(logits=encoder(x)), 1))

    return model, guide


def test_modules_of_a_users_own_keep_apart():
    found = exact_gradient(*users_modules(), X)
    assert sorted(map(tuple, (value.shape for value in found.values()))) == [(2,), (2, 3), (3,), (3, 2)]
    assert set(found) == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


def test_modules_of_a_users_own_are_groups():
    model, guide = users_modules()
    found = compare({"pairs": Estimator(model, guide, DisARM())}, X, repeats=50).measured["pairs"]
    assert {name: row.num_parameters for name, row in found.items()} == {"all": 17, "encoder": 9, "decoder": 8}


def test_what_has_no_part_in_the_bound_has_no_gradient():
    """A parameter that neither density depends on."""
    vae = vae_of("bernoulli")

    def model(x):
        pyro.param("idle", torch.ones(2).double())
        vae.model(x)

    assert exact_gradient(model, vae.guide, X)["idle"].eq(0).all()


def test_frozen_parameters_are_left_out():
    vae = vae_of("bernoulli")
    for parameter in vae.decoder.parameters():
        parameter.requires_grad_(False)
    names = exact_gradient(vae.model, vae.guide, X).keys()
    assert names == {name for name, _ in vae.named_parameters() if not name.startswith("decoder")}


def test_continuous_latents_are_refused():
    vae = vae_of("relaxed")
    with pytest.raises(ValueError, match=r"model: its latents \['z'\] cannot be enumerated, each as one site; .*twin"):
        exact_gradient(vae.model, vae.guide, X)


def test_more_combinations_than_can_be_summed_over_are_refused_with_their_count():
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"num_draws: 8 states have 262144 combinations of 6; at most 65536 are"):
        exact_gradient(vae.model, vae.guide, X, num_draws=6)
    wide = pv.VAE(priors.Bernoulli(17), guides.Bernoulli(2, 17, TANH), likelihoods.Normal(17, 2, TANH))
    with pytest.raises(ValueError, match="131072 states"):
        exact_gradient(wide.model, wide.guide, X.float())


@pytest.mark.parametrize("num_draws", [0, -1, 1.5, True])
def test_no_number_of_draws_is_refused(num_draws):
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=rf"`num_draws` must be .*got {num_draws}"):
        exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)


def test_a_guide_of_other_latents_is_refused():
    vae = vae_of("bernoulli")

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("other", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"`guide` must have the latents of the model, \['z'\], got \['other'\]"):
        exact_gradient(vae.model, guide, X)


# --- Estimators against it -------------------------------------------------------------------------------------------


def test_enumeration_has_no_bias_and_no_variance():
    vae = vae_of("bernoulli")
    for row in compare({"exact": enumeration(vae)}, X, repeats=10).measured["exact"].values():
        assert row.bias == 0
        assert row.variance < 1e-24
        assert row.signal_to_noise > 1e10
        assert row.p_value > 0.5
        assert row.target_norm > 0.01


UNBIASED = {
    "Trace_ELBO": Trace_ELBO,
    "running average": lambda: ScoreFunction(RunningAverage()),
    "neural": lambda: ScoreFunction(NeuralBaseline(2, TANH).double()),
    "leave-one-out": lambda: LeaveOneOut(3),
    "pairs": DisARM,
    "VIMCO": VIMCO,
}


def test_what_is_unbiased_is_found_so():
    vae = vae_of("bernoulli")
    found = compare({name: estimator(vae, make()) for name, make in UNBIASED.items()}, X, repeats=400)
    for groups in found.measured.values():
        for row in groups.values():
            assert row.p_value > 1e-5
            assert row.bias <= 5 * row.bias_error
            assert row.variance > 0
            assert row.signal_to_noise == pytest.approx(row.target_norm / row.variance**0.5)


def test_the_bound_of_several_draws_is_held_against_its_own_gradient():
    vae = vae_of("bernoulli")
    rows = compare({"2": estimator(vae, VIMCO(2)), "3": estimator(vae, VIMCO(3))}, X, repeats=2).measured
    for count in (2, 3):
        gradient = exact_gradient(vae.model, vae.guide, X, num_draws=count)
        norm = sum(float(value.square().sum()) for value in gradient.values()) ** 0.5
        assert rows[str(count)]["all"].target_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("elbo", [Trace_ELBO, DiscreteKL])
def test_what_is_relaxed_is_biased_against_its_twin_by_as_much_as_a_long_run_tells(elbo):
    vae = vae_of("relaxed")
    twin = vae.discrete()
    found = compare({"relaxed": estimator(vae, elbo(), target=(twin.model, twin.guide))}, X, repeats=1000)
    row = found.measured["relaxed"]["all"]
    assert row.p_value < 1e-12
    assert row.bias > 10 * row.bias_error
    # Gradients of many copies of the data at once: 400,000 draws for each datum.
    parameters, copies = list(vae.parameters()), 20_000
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(20):
        loss = elbo().differentiable_loss(vae.model, vae.guide, X.repeat(copies, 1)) / (20 * copies * len(X))
        total = [sum_ - g for sum_, g in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
    target = exact_gradient(twin.model, twin.guide, X)
    squared = sum(
        float((one - target[name]).square().sum()) for (name, _), one in zip(vae.named_parameters(), total, strict=True)
    )
    assert abs(row.bias - squared**0.5) < 5 * row.bias_error


def bias_at(temperature, elbo):
    vae = vae_of("relaxed", temperature)  # of the same weights at every temperature
    twin = vae.discrete()
    found = compare({"relaxed": estimator(vae, elbo, target=(twin.model, twin.guide))}, X, repeats=500)
    return found.measured["relaxed"]["encoder"]


def test_the_bias_of_the_discrete_kl_falls_with_the_temperature_and_its_noise_grows():
    hot, warm, cold = (bias_at(temperature, DiscreteKL()) for temperature in (4.0, 1.0, 0.2))
    for hotter, colder in ((hot, warm), (warm, cold)):
        assert hotter.target_norm == colder.target_norm
        assert hotter.bias - colder.bias > 3 * (hotter.bias_error + colder.bias_error)
        assert hotter.variance < colder.variance
    assert cold.bias < 0.25 * hot.bias


def test_the_bias_of_the_relaxed_kl_stays_as_the_temperature_falls():
    """That KL is the one of two logistics, whose ratio of temperatures alone counts."""
    cold = bias_at(0.1, Trace_ELBO())
    assert cold.bias > 5 * cold.bias_error
    assert cold.bias > 0.1 * cold.target_norm


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["12 bits", "4 of 8 classes"])
def test_4096_states_and_all_estimators(kind):
    torch.manual_seed(0)
    x = pv.datasets.binarize(pv.datasets.digits("train").x)[:5]
    network, latent = networks.mlp([8]), (12 if kind == "12 bits" else (4, 8))
    bits = kind == "12 bits"
    vae = pv.VAE(
        priors.Bernoulli(12) if bits else priors.OneHotCategorical(latent),
        guides.Bernoulli(64, 12, network) if bits else guides.OneHotCategorical(64, latent, network),
        likelihoods.Bernoulli(latent, 64, network),
    )
    unbiased = {
        "Trace_ELBO": Trace_ELBO(),
        "running average": ScoreFunction(RunningAverage()),
        "neural": ScoreFunction(NeuralBaseline(64, network)),
        "leave-one-out": LeaveOneOut(4),
        **({"pairs": DisARM(4)} if bits else {}),
    }
    found = compare({name: estimator(vae, elbo) for name, elbo in unbiased.items()}, x, evaluations=4, repeats=1000)
    for name, groups in found.measured.items():
        assert groups.keys() == {"all", "encoder", "decoder"}
        for row in groups.values():
            assert row.p_value > 1e-5, name
    exact = compare({"exact": enumeration(vae)}, x, repeats=2)
    assert exact.evaluations == {"exact": 4096}
    assert exact.measured["exact"]["all"].bias < 1e-4 * exact.measured["exact"]["all"].target_norm
    relaxed = pv.VAE(
        priors.RelaxedBernoulli(12, 0.5) if bits else priors.GumbelSoftmax(latent, 0.5),
        guides.RelaxedBernoulli(64, 12, network, 0.5) if bits else guides.GumbelSoftmax(64, latent, network, 0.5),
        vae.decoder,
    )
    twin = relaxed.discrete()
    for elbo in (Trace_ELBO(), DiscreteKL()):
        biased = estimator(relaxed, elbo, target=(twin.model, twin.guide))
        row = compare({"relaxed": biased}, x, evaluations=4, repeats=1000).measured["relaxed"]["all"]
        assert row.p_value < 1e-5
        assert row.bias > 5 * row.bias_error


def test_the_squared_bias_is_zero_on_average_where_there_is_none():
    """Chance is taken off: of an unbiased estimator about half of the runs find no bias at all."""
    vae = vae_of("bernoulli")
    rows = [
        compare({"pairs": estimator(vae, DisARM())}, X, repeats=20, seed=seed).measured["pairs"]["all"]
        for seed in range(60)
    ]
    none = sum(row.bias == 0 for row in rows)
    assert 10 < none < 57  # squared lengths of few directions lean below their mean
    naive = [(row.variance / 20) ** 0.5 for row in rows]
    assert sum(row.bias for row in rows) < 0.7 * sum(naive)


def test_a_shifted_estimator_is_off_by_the_shift():
    vae = vae_of("bernoulli")

    class Shifted(LeaveOneOut):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            vae.encoder.network[0].bias.grad += 0.5 * len(X)
            return loss

    rows = compare({"shifted": estimator(vae, Shifted(4))}, X, repeats=500).measured["shifted"]
    for group in ("encoder", "all"):
        # 4 biases of the hidden layer, each off by a half.
        assert abs(rows[group].bias - 1) < 5 * rows[group].bias_error
        assert rows[group].p_value < 1e-12
    assert rows["decoder"].p_value > 1e-5


def test_averages_of_as_many_evaluations_are_quieter_by_as_many():
    vae = vae_of("bernoulli")
    estimators = {"pairs": estimator(vae, DisARM(2)), "one": estimator(vae, Trace_ELBO())}
    alone = compare(estimators, X, repeats=500)
    assert alone.evaluations == {"pairs": 2, "one": 1}
    equal = compare(estimators, X, evaluations=4, repeats=500, seed=1)
    assert equal.evaluations == {"pairs": 4, "one": 4}
    for name, factor in (("pairs", 2), ("one", 4)):
        ratio = alone.measured[name]["all"].variance / equal.measured[name]["all"].variance
        # The sum of 57 variances of 500 draws each, with heavy tails, is known to 7 % or better.
        assert ratio == pytest.approx(factor, rel=0.45)
        assert alone.measured[name]["all"].target_norm == equal.measured[name]["all"].target_norm
        assert equal.measured[name]["all"].p_value > 1e-5


def test_enumeration_costs_a_run_for_each_state():
    vae = vae_of("bernoulli")
    assert compare({"exact": enumeration(vae)}, X, repeats=2).evaluations == {"exact": 8}
    assert compare({"exact": enumeration(vae)}, X, evaluations=17, repeats=2).evaluations == {"exact": 16}
    with pytest.raises(ValueError, match=r"`evaluations` must be .*got 7; exact takes 8 for each estimate"):
        compare({"exact": enumeration(vae)}, X, evaluations=7, repeats=2)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("num_draws", [1, 2])
def test_it_is_the_same_in_chunks_of_any_size(monkeypatch, chunk, num_draws):
    vae = vae_of("one-hot")
    whole = exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    monkeypatch.setattr("pyro_vae.exact.model_density._BUDGET", chunk * 64 * len(X))
    monkeypatch.setattr("pyro_vae.diagnostics.gradients._BUDGET", chunk)  # and over data: one, or a few
    found = exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_variances_are_those_of_a_hand():
    """The same estimates, collected by hand under the same seed."""
    vae = vae_of("bernoulli")
    row = compare({"pairs": estimator(vae, DisARM())}, X, repeats=200, seed=7).measured["pairs"]["all"]
    pyro.set_rng_seed(7)
    estimates = []
    for _ in range(200):
        loss = DisARM().differentiable_loss(vae.model, vae.guide, X)
        gradients = torch.autograd.grad(-loss / len(X), list(vae.parameters()))
        estimates.append(torch.cat([gradient.flatten() for gradient in gradients]))
    target = torch.cat([value.flatten() for value in exact_gradient(vae.model, vae.guide, X).values()])
    estimates = torch.stack(estimates)
    assert row.variance == pytest.approx(estimates.var(0).sum().item(), rel=1e-9)
    squared = ((estimates.mean(0) - target) ** 2 - estimates.var(0) / 200).sum().item()
    assert row.bias == pytest.approx(max(squared, 0) ** 0.5, rel=1e-6)
    scores = (estimates.mean(0) - target).abs() / (estimates.std(0) / 200**0.5)
    centred = estimates - estimates.mean(0)
    usual = (centred**2).sum(0) ** 2 / (centred**4).sum(0) >= 20
    assert row.num_tested == usual.sum() > 20
    assert row.max_z == pytest.approx(scores[usual].max().item(), rel=1e-4)


def test_groups_part_the_parameters():
    vae = vae_of("bernoulli")
    rows = compare({"pairs": estimator(vae, DisARM())}, X, repeats=20).measured["pairs"]
    assert rows.keys() == {"all", "encoder", "decoder", "prior"}
    parts = [rows[name] for name in ("encoder", "decoder", "prior")]
    for name, row in zip(("encoder", "decoder", "prior"), parts, strict=True):
        assert row.num_parameters == sum(p.numel() for p in getattr(vae, name).parameters())
    assert rows["all"].num_parameters == sum(p.numel() for p in vae.parameters())
    assert rows["all"].variance == pytest.approx(sum(row.variance for row in parts))
    assert rows["all"].target_norm == pytest.approx(sum(row.target_norm**2 for row in parts) ** 0.5)
    assert rows["all"].max_z == pytest.approx(max(row.max_z for row in parts))


def test_p_values_are_bonferronis_of_students_t():
    row = Measured(1.0, 0.0, 0.1, 4.0, max_z=3.0, num_parameters=20, num_tested=10, repeats=10**9)
    assert row.p_value == pytest.approx(10 * 0.0026997960632601866, rel=1e-6)
    few = replace(row, repeats=5)
    assert few.p_value == pytest.approx(10 * 0.03994196807171, rel=1e-6)  # two-sided, 4 degrees of freedom
    assert replace(row, max_z=0.1).p_value == 1
    assert row.signal_to_noise == 0.5
    assert replace(row, variance=0.0).signal_to_noise == math.inf


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("length", [0.0, 5.0])
def test_the_error_of_the_bias_is_its_spread(correlated, length):
    """Gradients share one signal, so that their covariance counts, and not the variances alone."""
    torch.manual_seed(0)
    size, repeats, runs = 40, 100, 400
    factor = torch.randn(size, 2).double() if correlated else torch.eye(size).double()
    bias = length * nn.functional.normalize(torch.randn(size).double(), dim=0)
    rows = [
        measure(bias + torch.randn(repeats, factor.shape[1]).double() @ factor.T, torch.zeros(size).double())
        for _ in range(runs)
    ]
    found, errors = (torch.tensor([getattr(row, name) for row in rows]) for name in ("bias", "bias_error"))
    if length:  # so long that it is never cut off at zero
        assert found.mean() == pytest.approx(length, abs=0.05)
        assert 0.9 < errors.mean() / found.std() < 1.4  # on the safe side where few directions vary
    else:
        assert (found < 3 * errors).float().mean() > 0.9
        assert (torch.tensor([row.p_value for row in rows]) < 1e-3).sum() <= 4


@pytest.mark.parametrize("repeats", [2, 5, 20, 200])
def test_few_estimates_of_no_bias_are_not_found_biased(repeats):
    torch.manual_seed(0)
    values = [measure(torch.randn(repeats, 100).double(), torch.zeros(100).double()).p_value for _ in range(200)]
    assert sum(value < 1e-3 for value in values) <= 4


def test_what_rests_on_a_few_rare_estimates_is_not_tested():
    """A code that is drawn once in a thousand times: often not at all, and then its gradient is never seen."""
    torch.manual_seed(0)
    rare = (torch.rand(500, 1) < 1e-3).double() * 1e3  # of mean 1
    row = measure(torch.cat([rare, torch.randn(500, 1).double()], 1), torch.tensor([1.0, 0.0]).double())
    assert (row.num_parameters, row.num_tested) == (2, 1)
    assert row.p_value > 1e-3


def test_nearly_sure_codes_are_not_found_biased():
    vae = vae_of("bernoulli")
    with torch.no_grad():
        vae.encoder.network[-1].bias.copy_(torch.tensor([10.0, -10.0, 0.0]))
    for seed in range(5):
        for groups in compare({"pairs": estimator(vae, DisARM())}, X, repeats=300, seed=seed).measured.values():
            assert groups["encoder"].p_value > 1e-4
            assert groups["encoder"].num_tested < groups["encoder"].num_parameters


def test_one_seed_gives_the_same_numbers_and_another_other_ones():
    vae = vae_of("bernoulli")
    first, again, other = (
        compare({"pairs": estimator(vae, DisARM())}, X, repeats=5, seed=seed).measured["pairs"]["all"]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.variance != other.variance


def test_a_line_for_each_estimator():
    vae = vae_of("bernoulli")
    found = compare({name: estimator(vae, make()) for name, make in UNBIASED.items()}, X, repeats=5)
    for group in ("all", "encoder"):
        title, *lines = found.table(group).splitlines()
        assert title.startswith(group)
        for word in ("evaluations", "|gradient|", "bias", "error", "variance", "SNR", "max z", "p"):
            assert word in title
        assert [line.split("  ")[0].strip() for line in lines] == list(UNBIASED)
        assert len({len(line) for line in (title, *lines)}) == 1
        row = found.measured["pairs"][group]
        (line,) = (line for line in lines if line.startswith("pairs"))
        assert line.split()[1:] == [
            "2", f"{row.target_norm:.4g}", f"{row.bias:.4g}", f"{row.bias_error:.4g}", f"{row.variance:.4g}",
            f"{row.signal_to_noise:.4g}", f"{row.max_z:.1f}", f"{row.p_value:.1e}",
        ]  # fmt: skip
    assert found.table() == found.table("all")


# --- What it leaves behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*UNBIASED, "enumeration"])
def test_gradients_random_state_and_param_store_are_as_before(name, random_states):
    vae = vae_of("bernoulli")
    vae.register()
    parameters = list(vae.parameters())
    for index, parameter in enumerate(parameters):
        parameter.grad = None if index % 2 else torch.full_like(parameter, 7.0)
    kept = [parameter.grad for parameter in parameters]
    values = [parameter.detach().clone() for parameter in parameters]
    store = pyro.get_param_store()
    stored = dict(store.named_parameters())
    one = enumeration(vae) if name == "enumeration" else estimator(vae, UNBIASED[name]())
    states = random_states()
    compare({"one": one}, X, repeats=3)
    exact_gradient(vae.model, vae.guide, X)
    assert random_states() == states
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, kept, strict=True))
    assert all(grad is None or grad.eq(7.0).all() for grad in kept)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    assert dict(store.named_parameters()).keys() == stored.keys()
    assert all(dict(store.named_parameters())[key] is value for key, value in stored.items())


def test_a_baselines_gradients_are_left_as_they_were():
    """Its next step in training would else be that of all the repeats."""
    vae, elbo = vae_of("bernoulli"), UNBIASED["neural"]()
    compare({"neural": estimator(vae, elbo)}, X, repeats=3)
    assert all(parameter.grad is None for parameter in elbo.baseline.parameters())


@pytest.mark.parametrize("make", [RunningAverage, lambda: NeuralBaseline(2, TANH).double()], ids=["average", "neural"])
def test_what_a_baseline_has_learned_is_as_it_was(make):
    vae, elbo = vae_of("bernoulli"), ScoreFunction(make())
    elbo.loss_and_grads(vae.model, vae.guide, X)
    before = {name: value.clone() for name, value in elbo.baseline.state_dict().items()}
    compare({"one": estimator(vae, elbo)}, X, repeats=3)
    assert all(torch.equal(value, before[name]) for name, value in elbo.baseline.state_dict().items())
    elbo.loss_and_grads(vae.model, vae.guide, X)
    assert not all(torch.equal(value, before[name]) for name, value in elbo.baseline.state_dict().items())


def test_after_an_error_gradients_are_as_before():
    vae = vae_of("bernoulli")
    for parameter in vae.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = [parameter.grad for parameter in vae.parameters()]

    class Failing(LeaveOneOut):
        def loss_and_grads(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"failing": estimator(vae, Failing())}, X, repeats=3)
    assert all(parameter.grad is grad for parameter, grad in zip(vae.parameters(), kept, strict=True))


def test_outer_handlers_see_none_of_it():
    vae = vae_of("bernoulli")
    with poutine.trace() as tracer:
        exact_gradient(vae.model, vae.guide, X)
    assert not [name for name, node in tracer.trace.nodes.items() if node["type"] == "sample"]


# --- What is refused -------------------------------------------------------------------------------------------------


def test_fewer_evaluations_than_an_estimate_takes_are_refused():
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"`evaluations` must be .*got 3; four takes 4 for each estimate"):
        compare({"four": estimator(vae, LeaveOneOut(4))}, X, evaluations=3)


@pytest.mark.parametrize("repeats", [0, 1, -2, 1.5, True])
def test_no_number_of_repeats_is_refused(repeats):
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=rf"`repeats` must be .*got {repeats}"):
        compare({"pairs": estimator(vae, DisARM())}, X, repeats=repeats)


def test_a_relaxed_vae_needs_its_twin_as_the_target():
    vae = vae_of("relaxed")
    with pytest.raises(ValueError, match=r"cannot be enumerated.*target=\(twin.model, twin.guide\)"):
        compare({"relaxed": estimator(vae, Trace_ELBO())}, X, repeats=3)


def test_a_target_of_other_parameters_is_refused():
    vae = vae_of("relaxed")
    twin = deepcopy(vae).discrete()
    with pytest.raises(ValueError, match=r"target: relaxed has no parameters \['encoder.network.0.weight'"):
        compare({"relaxed": estimator(vae, Trace_ELBO(), target=(twin.model, twin.guide))}, X, repeats=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"elbo": Trace_ELBO}, TypeError, "`elbo` must be an instance.*got"),
        (
            {"elbo": RenyiELBO(alpha=0, num_particles=3)},
            ValueError,
            "`elbo` must be .*got a RenyiELBO, whose weights are not",
        ),
        ({"elbo": DisARM(), "target": vae_of}, TypeError, r"`target` must be a pair.*got"),
    ],
)
def test_what_is_no_estimator_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Estimator(print, print, **options)


@pytest.mark.parametrize(
    ("estimators", "options", "error", "message"),
    [
        ([], {}, TypeError, r"`estimators` must be a dict from names to Estimators.*got \[\]"),
        ({}, {}, TypeError, "`estimators` must be .*got {}"),
        ({"a": 1}, {}, TypeError, "`estimators` must be .*got {'a': 1}"),
        (None, {"evaluations": 2.5}, ValueError, "`evaluations` must be .*got 2.5"),
        (None, {"evaluations": True}, ValueError, "`evaluations` must be .*got True"),
    ],
)
def test_arguments_that_are_none_are_refused(estimators, options, error, message):
    vae = vae_of("bernoulli")
    with pytest.raises(error, match=message):
        compare({"pairs": estimator(vae, DisARM())} if estimators is None else estimators, X, repeats=3, **options)


def test_an_unknown_group_is_refused_with_those_that_are_known():
    found = compare({"pairs": estimator(vae_of("bernoulli"), DisARM())}, X, repeats=3)
    with pytest.raises(ValueError, match="`group` must be 'all', '.*got 'encodr'"):
        found.table("encodr")


def test_what_is_frozen_has_no_gradient_and_says_so():
    vae = vae_of("bernoulli").requires_grad_(False)
    with pytest.raises(ValueError, match="model, guide: have no parameters that are trained"):
        exact_gradient(vae.model, vae.guide, X)


def classes(logits_of_model, logits_of_guide):
    def model(x):
        weight = pyro.param("weight", torch.tensor([0.3, -0.2, 0.5, 0.1]).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=weight + logits_of_model))
            pyro.sample("x", dist.Normal(weight[z], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor([0.1, 0.2, -0.3, 0.0]).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=x[:, None] * slope + logits_of_guide))

    return model, guide


NEVER = torch.tensor([0.0, 0.0, 0.0, -math.inf]).double()


def test_classes_that_are_ruled_out_in_model_and_guide_are_left_out():
    pair, rows = classes(NEVER, NEVER), X[:, 0]
    found = exact_gradient(*pair, rows)
    three = {name: value[:3] for name, value in found.items()}
    assert all(value.isfinite().all() for value in found.values())
    assert found["slope"][3] == 0
    store = pyro.get_param_store()
    for name, value in three.items():
        slope = differences(store[name], lambda: pv.exact.elbo(*pair, rows).mean())[:3]
        torch.testing.assert_close(value, slope, rtol=1e-5, atol=1e-7)
    row = compare({"pairs": Estimator(*pair, LeaveOneOut(3))}, rows, repeats=400).measured["pairs"]["all"]
    assert row.p_value > 1e-5


def test_a_bound_of_minus_infinity_has_no_gradient_and_says_so():
    pair = classes(NEVER, torch.zeros(4).double())
    with pytest.raises(FloatingPointError, match="the bound is -inf: the guide draws states that the model"):
        exact_gradient(*pair, X[:, 0])


def test_dropout_and_scale_in_the_guide_are_refused():
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=r"`guide` must use all data.* got site 'z' with the scale"):
        exact_gradient(vae.model, poutine.scale(vae.guide, scale=5.0), X)
    noisy = guides.Bernoulli(2, 3, lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.Dropout(0.5)))
    other = pv.VAE(priors.Bernoulli(3), noisy, likelihoods.Normal(3, 2, TANH)).double()
    with pytest.raises(ValueError, match=r"`guide` must have one log q\(z \| x\) at each z.*vae.eval"):
        exact_gradient(other.model, other.guide, X)
    other.eval()
    exact_gradient(other.model, other.guide, X)


def test_data_along_another_dimension_are_counted_by_the_plate():
    def model(y):
        weight = pyro.param("weight", torch.tensor(0.4).double())
        with pyro.plate("data", y.shape[1]):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=y[0])

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.4).double())
        with pyro.plate("data", y.shape[1]):
            pyro.sample("z", dist.Bernoulli(logits=slope * y[1]))

    row = compare({"one": Estimator(model, guide, LeaveOneOut(2))}, X.T, repeats=300).measured["one"]["all"]
    assert row.p_value > 1e-5


def test_a_parameter_by_the_name_of_all_is_a_group_of_its_own():
    def model(x):
        both = pyro.param("all", torch.tensor(0.4).double()) + pyro.param("b", torch.tensor(0.1).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(both * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))

    found = compare({"one": Estimator(model, guide, Trace_ELBO())}, X[:, 0], repeats=3).measured["one"]
    assert {name: row.num_parameters for name, row in found.items()} == {"all": 2, "all (a parameter)": 1, "b": 1}
