"""The exact gradient and the comparison of estimators, tested by autograd, finite differences and known answers."""

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import NET, gaussian, guide_of, model_of
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.diagnostics.gradients import Estimator, Measured, compare, exact_gradient, measure
from pyro_vae.objectives.baselines import NeuralBaseline, RunningAverage
from pyro_vae.objectives.modified_kl import DiscreteKL
from pyro_vae.objectives.score_function import VIMCO, DisARM, LeaveOneOut, ScoreFunction

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
NEVER = torch.tensor([0.0, 0.0, 0.0, -math.inf]).double()


def vae_of(kind, temperature=0.5):
    """A VAE in double precision with the same weights at every temperature."""
    torch.manual_seed(0)
    if kind == "bernoulli":
        latent, prior, encoder = 3, priors.Bernoulli(3, 0.3, learnable=True), guides.Bernoulli(2, 3, NET)
    elif kind == "one-hot":
        latent, probs = (2, 3), torch.tensor([0.2, 0.3, 0.5])
        prior, encoder = priors.OneHotCategorical(latent, probs, True), guides.OneHotCategorical(2, latent, NET)
    else:
        latent, encoder = 3, guides.RelaxedBernoulli(2, 3, NET, temperature)
        prior = priors.RelaxedBernoulli(3, temperature, probs=0.3, learnable=True)
    return gaussian(latent, 2, prior=prior, encoder=encoder).double()


def estimator(vae, elbo, **options):
    return Estimator(vae.model, vae.guide, elbo, **options)


def enumeration(vae):
    return Estimator(vae.model, config_enumerate(vae.guide), TraceEnum_ELBO(max_plate_nesting=1))


def hand_bound(vae, num_draws):
    """The mean over data of the expected K-sample bound, as a sum over all combinations of states."""
    states, pieces = vae.prior().enumerate_support(), []
    for state in states:
        log_q = vae.encode(X).log_prob(state)
        log_likelihood = vae.decode(state.expand(len(X), *state.shape)).log_prob(X)
        pieces.append((vae.prior().log_prob(state) + log_likelihood - log_q, log_q))
    total = 0.0
    for chosen in itertools.product(pieces, repeat=num_draws):
        f, log_q = (torch.stack([piece[index] for piece in chosen]) for index in (0, 1))
        total = total + (log_q.sum(0).exp() * (f.logsumexp(0) - math.log(num_draws))).mean()
    return total


def differences(parameter, function, step=1e-5):
    """Central finite differences of a function of a parameter."""
    slopes = torch.zeros_like(parameter)
    flat, out = parameter.data.view(-1), slopes.view(-1)
    for index, old in enumerate(flat.tolist()):
        flat[index] = old + step
        above = float(function())
        flat[index] = old - step
        out[index] = (above - float(function())) / (2 * step)
        flat[index] = old
    return slopes


def slopes_of_elbo(names, model, guide, data, plate="data"):
    """Finite differences of the exact ELBO in the unconstrained parameters of the store."""
    stored = dict(pyro.get_param_store().named_parameters())
    return {
        name: differences(stored[name], lambda: pv.exact.elbo(model, guide, data, plate=plate).mean()) for name in names
    }


def autograd(vae, value):
    names, parameters = zip(*vae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def measured(one, data=X, **options):
    """The results of a single estimator, by group."""
    return compare({"one": one}, data, **options).measured["one"]


@pytest.mark.parametrize("kind", ["bernoulli", "one-hot"])
def test_it_agrees_with_pyros_enumeration_and_finite_differences_of_the_exact_elbo(kind):
    vae = vae_of(kind)
    found = exact_gradient(vae.model, vae.guide, X)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, config_enumerate(vae.guide), X)
    assert_close(found, autograd(vae, -loss / len(X)), 1e-10)
    for name, parameter in vae.named_parameters():
        slope = differences(parameter, lambda: pv.exact.elbo(vae.model, vae.guide, X).mean())
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "num_draws"), [("bernoulli", 1), ("bernoulli", 2), ("bernoulli", 3), ("one-hot", 2)])
def test_it_agrees_with_autograd_through_all_combinations_of_states(kind, num_draws):
    vae = vae_of(kind)
    found = exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    assert_close(found, autograd(vae, hand_bound(vae, num_draws)), 1e-10)


def test_float32_parameters_have_float32_gradients_that_agree():
    vae = vae_of("bernoulli")
    exact = exact_gradient(vae.model, vae.guide, X)
    vae.float()
    pyro.clear_param_store()
    for name, value in exact_gradient(vae.model, vae.guide, X.float()).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name].float(), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_plain_pyro_pair_are_in_unconstrained_parameters():
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
    for name, slope in slopes_of_elbo(found, model, guide, x, plate="rows").items():
        torch.testing.assert_close(found[name], slope, rtol=1e-6, atol=1e-8)


def test_two_modules_with_equal_parameter_names_are_two_groups():
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def bits(**parameters):
        return pv.distributions.Product(dist.Bernoulli(**parameters), 1)

    prior = bits(probs=torch.full((3,), 0.3).double())
    model = model_of(prior, lambda z: dist.Normal(pyro.module("decoder", decoder)(z), 1.0).to_event(1))
    guide = guide_of(lambda x: bits(logits=pyro.module("encoder", encoder)(x)))
    shapes = {name: tuple(value.shape) for name, value in exact_gradient(model, guide, X).items()}
    expected = {"encoder.weight": (3, 2), "encoder.bias": (3,), "decoder.weight": (2, 3), "decoder.bias": (2,)}
    assert shapes == expected
    groups = measured(Estimator(model, guide, DisARM()), repeats=50)
    assert {name: row.num_parameters for name, row in groups.items()} == {"all": 17, "encoder": 9, "decoder": 8}


def test_an_unused_parameter_has_gradient_zero_and_a_frozen_one_has_none():
    vae = vae_of("bernoulli")
    vae.decoder.requires_grad_(False)

    def model(x):
        pyro.param("idle", torch.ones(2).double())
        vae.model(x)

    found = exact_gradient(model, vae.guide, X)
    assert found["idle"].eq(0).all()
    names = {name for name, _ in vae.named_parameters() if not name.startswith("decoder")}
    assert exact_gradient(vae.model, vae.guide, X).keys() == names


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("num_draws", [1, 2])
def test_it_does_not_depend_on_the_size_of_chunks(monkeypatch, chunk, num_draws):
    vae = vae_of("one-hot")
    whole = exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    monkeypatch.setattr("pyro_vae.exact.model_density._BUDGET", chunk * 64 * len(X))
    monkeypatch.setattr("pyro_vae.diagnostics.gradients._BUDGET", chunk)  # also over data: one, or a few
    assert_close(exact_gradient(vae.model, vae.guide, X, num_draws=num_draws), whole, 1e-12)


def classes(logits_of_model, logits_of_guide):
    def model(x):
        weight = pyro.param("weight", torch.tensor([0.3, -0.2, 0.5, 0.1]).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=weight + logits_of_model))
            pyro.sample("x", dist.Normal(weight[z], 1.0), obs=x)

    def q(x):
        slope = pyro.param("slope", torch.tensor([0.1, 0.2, -0.3, 0.0]).double())
        return dist.Categorical(logits=x[:, None] * slope + logits_of_guide)

    return model, guide_of(q)


def test_a_class_without_mass_in_model_and_guide_does_not_count():
    pair, rows = classes(NEVER, NEVER), X[:, 0]
    found = exact_gradient(*pair, rows)
    assert all(value.isfinite().all() for value in found.values())
    assert found["slope"][3] == 0
    for name, slope in slopes_of_elbo(found, *pair, rows).items():
        torch.testing.assert_close(found[name][:3], slope[:3], rtol=1e-5, atol=1e-7)
    assert measured(Estimator(*pair, LeaveOneOut(3)), rows, repeats=400)["all"].p_value > 1e-5


def test_an_infinite_bound_raises():
    with pytest.raises(FloatingPointError, match="the bound is -inf: the guide draws states that have no mass"):
        exact_gradient(*classes(NEVER, torch.zeros(4).double()), X[:, 0])


def test_wrong_calls_of_exact_gradient_raise():
    vae, relaxed = vae_of("bernoulli"), vae_of("relaxed")
    for num_draws in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"`num_draws` must be .*got {num_draws}"):
            exact_gradient(vae.model, vae.guide, X, num_draws=num_draws)
    wide = gaussian(17, 2, prior=priors.Bernoulli(17), encoder=guides.Bernoulli(2, 17, NET)).double()
    scaled, frozen = poutine.scale(vae.guide, scale=5.0), deepcopy(vae).requires_grad_(False)
    for model, guide, num_draws, message in (
        (vae.model, vae.guide, 6, "`num_draws` must give at most 65536 combinations.*got 6: 8 states have 262144"),
        (wide.model, wide.guide, 1, "131072 states"),
        (relaxed.model, relaxed.guide, 1, r"`model` must have latents that can be enumerated.*got \['z'\].*twin"),
        (frozen.model, frozen.guide, 1, "`model` and `guide` must have parameters that require gradients, got none"),
        (vae.model, scaled, 1, "`guide` must use all data.* not scaled, got site 'z' with the scale 5.0"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_gradient(model, guide, X, num_draws=num_draws)


def test_a_guide_with_dropout_has_the_gradient_of_evaluation_mode():
    noisy = guides.Bernoulli(2, 3, lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.Dropout(0.5)))
    other = gaussian(3, 2, prior=priors.Bernoulli(3), encoder=noisy).double()
    gradients = exact_gradient(other.model, other.guide, X)
    assert gradients.keys() == dict(other.named_parameters()).keys()
    other.eval()
    torch.testing.assert_close(exact_gradient(other.model, other.guide, X), gradients)


def test_enumeration_has_no_bias_and_no_variance_and_costs_a_run_for_each_state():
    vae = vae_of("bernoulli")
    assert compare({"exact": enumeration(vae)}, X, repeats=2).evaluations == {"exact": 8}
    assert compare({"exact": enumeration(vae)}, X, evaluations=17, repeats=2).evaluations == {"exact": 16}
    for row in measured(enumeration(vae), repeats=10).values():
        assert row.bias == 0
        assert row.variance < 1e-24
        assert row.signal_to_noise > 1e10
        assert row.p_value > 0.5
        assert row.target_norm > 0.01


UNBIASED = {
    "Trace_ELBO": Trace_ELBO, "running average": lambda: ScoreFunction(RunningAverage()),
    "neural": lambda: ScoreFunction(NeuralBaseline(2, NET).double()), "leave-one-out": lambda: LeaveOneOut(3),
    "pairs": DisARM, "VIMCO": VIMCO,
}  # fmt: skip


def test_unbiased_estimators_are_found_unbiased():
    vae = vae_of("bernoulli")
    found = compare({name: estimator(vae, make()) for name, make in UNBIASED.items()}, X, repeats=400)
    for groups in found.measured.values():
        for row in groups.values():
            assert row.p_value > 1e-5
            assert row.bias <= 5 * row.bias_error
            assert row.variance > 0
            assert row.signal_to_noise == pytest.approx(row.target_norm / row.variance**0.5)


def test_the_bound_of_several_draws_is_compared_with_its_own_gradient():
    vae = vae_of("bernoulli")
    rows = compare({"2": estimator(vae, VIMCO(2)), "3": estimator(vae, VIMCO(3))}, X, repeats=2).measured
    for count in (2, 3):
        gradient = exact_gradient(vae.model, vae.guide, X, num_draws=count)
        norm = sum(float(value.square().sum()) for value in gradient.values()) ** 0.5
        assert rows[str(count)]["all"].target_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("elbo", [Trace_ELBO, DiscreteKL])
def test_the_bias_of_a_relaxed_estimator_agrees_with_a_long_run(elbo):
    vae = vae_of("relaxed")
    twin = vae.discrete()
    row = measured(estimator(vae, elbo(), target=(twin.model, twin.guide)), repeats=1000)["all"]
    assert row.p_value < 1e-12
    assert row.bias > 10 * row.bias_error
    # Gradients of many copies of the data at once: 400,000 draws for each datum.
    copies, target = 20_000, exact_gradient(twin.model, twin.guide, X)
    error = torch.cat([target[name].flatten() for name, _ in vae.named_parameters()])
    for _ in range(20):
        loss = elbo().differentiable_loss(vae.model, vae.guide, X.repeat(copies, 1)) / (20 * copies * len(X))
        error += torch.cat([slope.flatten() for slope in autograd(vae, loss).values()])
    assert abs(row.bias - float(error.norm())) < 5 * row.bias_error


def bias_at(temperature, elbo):
    vae = vae_of("relaxed", temperature)
    twin = vae.discrete()
    return measured(estimator(vae, elbo, target=(twin.model, twin.guide)), repeats=500)["encoder"]


def test_the_bias_of_the_discrete_kl_falls_with_the_temperature_and_its_noise_grows():
    hot, warm, cold = (bias_at(temperature, DiscreteKL()) for temperature in (4.0, 1.0, 0.2))
    for hotter, colder in ((hot, warm), (warm, cold)):
        assert hotter.target_norm == colder.target_norm
        assert hotter.bias - colder.bias > 3 * (hotter.bias_error + colder.bias_error)
        assert hotter.variance < colder.variance
    assert cold.bias < 0.25 * hot.bias


def test_the_bias_of_the_relaxed_kl_stays_as_the_temperature_falls():
    """It is the KL of two logistics, which depends only on the ratio of their temperatures."""
    cold = bias_at(0.1, Trace_ELBO())
    assert cold.bias > 5 * cold.bias_error
    assert cold.bias > 0.1 * cold.target_norm


@pytest.mark.slow
@pytest.mark.parametrize(("latent", "kind", "relaxed_kind"), [
    (12, "Bernoulli", "RelaxedBernoulli"), ((4, 8), "OneHotCategorical", "GumbelSoftmax"),
])  # fmt: skip
def test_4096_states_and_all_estimators(latent, kind, relaxed_kind):
    torch.manual_seed(0)
    x, network = pv.datasets.binarize(pv.datasets.digits("train").x)[:5], networks.mlp([8])
    prior, encoder = getattr(priors, kind)(latent), getattr(guides, kind)(64, latent, network)
    vae = pv.VAE(prior, encoder, likelihoods.Bernoulli(latent, 64, network))
    unbiased = {
        "Trace_ELBO": Trace_ELBO(),
        "running average": ScoreFunction(RunningAverage()),
        "neural": ScoreFunction(NeuralBaseline(64, network)),
        "leave-one-out": LeaveOneOut(4),
        **({"pairs": DisARM(4)} if kind == "Bernoulli" else {}),
    }
    found = compare({name: estimator(vae, elbo) for name, elbo in unbiased.items()}, x, evaluations=4, repeats=1000)
    for name, groups in found.measured.items():
        assert groups.keys() == {"all", "encoder", "decoder"}
        for row in groups.values():
            assert row.p_value > 1e-5, name
    exact = compare({"exact": enumeration(vae)}, x, repeats=2)
    assert exact.evaluations == {"exact": 4096}
    assert exact.measured["exact"]["all"].bias < 1e-4 * exact.measured["exact"]["all"].target_norm
    prior, encoder = getattr(priors, relaxed_kind)(latent, 0.5), getattr(guides, relaxed_kind)(64, latent, network, 0.5)
    relaxed = pv.VAE(prior, encoder, vae.decoder)
    twin = relaxed.discrete()
    for elbo in (Trace_ELBO(), DiscreteKL()):
        biased = estimator(relaxed, elbo, target=(twin.model, twin.guide))
        row = measured(biased, x, evaluations=4, repeats=1000)["all"]
        assert row.p_value < 1e-5
        assert row.bias > 5 * row.bias_error


def test_the_bias_of_a_shifted_estimator_is_the_shift():
    vae = vae_of("bernoulli")

    class Shifted(LeaveOneOut):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            vae.encoder.network[0].bias.grad += 0.5 * len(X)
            return loss

    rows = measured(estimator(vae, Shifted(4)), repeats=500)
    for group in ("encoder", "all"):  # the shift has 4 elements of a half
        assert abs(rows[group].bias - 1) < 5 * rows[group].bias_error
        assert rows[group].p_value < 1e-12
    assert rows["decoder"].p_value > 1e-5


class Mixed(nn.Module):
    """A model with a discrete and a continuous latent, and its guide."""

    def __init__(self):
        super().__init__()
        self.loc, self.logits = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor([0.2, -0.1, 0.4]))

    def model(self, x):
        pyro.module("mixed", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3) / 3))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y.to(x), 1.0), obs=x)

    def guide(self, x):
        pyro.module("mixed", self)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=self.logits))
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    def gradients(self, x):
        """Of the ELBO in closed form: given y, z has the mean loc and x the squared error (x - y - loc)^2 + 1."""
        probs, y = self.logits.softmax(0), torch.arange(3.0)
        fits = -((x[:, None] - y - self.loc) ** 2 + 1) / 2
        elbo = (probs * (fits - probs.log())).sum(1).mean() - self.loc**2 / 2
        return torch.autograd.grad(elbo, [self.loc, self.logits])


MIXED = torch.tensor([0.5, 2.0, -0.3])


def mixed_estimators(pair, **elbos):
    enum = Estimator(pair.model, config_enumerate(pair.guide), TraceEnum_ELBO(max_plate_nesting=1))
    return {"enumerated": enum} | {name: Estimator(pair.model, pair.guide, elbo) for name, elbo in elbos.items()}


def test_estimators_are_compared_with_a_reference_where_a_latent_is_continuous():
    pair = Mixed()

    class Shifted(LeaveOneOut):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            pair.logits.grad -= 0.5 * len(MIXED)
            return loss

    sampled = {"score": Trace_ELBO(), "two draws": LeaveOneOut(2), "shifted": Shifted(2)}
    estimators = mixed_estimators(pair, **sampled)
    found = compare(estimators, MIXED, repeats=800, reference="enumerated")
    assert found.evaluations == {"enumerated": 3, "score": 1, "two draws": 2, "shifted": 2}
    for group, exact in zip(("loc", "logits"), pair.gradients(MIXED), strict=True):
        rows = found.of(group)
        for name in ("score", "two draws", "enumerated"):
            assert rows[name].p_value > 1e-5
            assert rows[name].bias <= 5 * rows[name].bias_error
            error = (rows["enumerated"].variance / 800) ** 0.5
            assert abs(rows[name].target_norm - exact.norm()) < 5 * error + 1e-6
    logits = found.of("logits")
    assert logits["enumerated"].variance < logits["two draws"].variance < logits["score"].variance
    assert abs(logits["shifted"].bias - 0.75**0.5) < 5 * logits["shifted"].bias_error  # a half in each of three
    assert logits["shifted"].p_value < 1e-12
    assert found.of("loc")["shifted"].p_value > 1e-5


def test_a_reference_without_noise_is_the_exact_gradient():
    vae = vae_of("bernoulli")
    estimators = {"exact": enumeration(vae), "two draws": estimator(vae, LeaveOneOut(2))}
    with_reference, exact = (compare(estimators, X, repeats=40, **one) for one in ({"reference": "exact"}, {}))
    for group, row in with_reference.measured["two draws"].items():
        expected = exact.measured["two draws"][group]
        for name in ("bias", "bias_error", "variance", "target_norm", "max_z"):
            assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("reference", "message"), [
    ("mine", "`reference` must be one of 'exact', 'bound', got 'mine'"),
    (3, "`reference` must be one of .*got 3"),
    ("exact", "`reference` must be left out for bounds of several draws.*got 'exact' with the draws {'bound': 2}"),
])  # fmt: skip
def test_wrong_references_raise(reference, message):
    vae = vae_of("bernoulli")
    with pytest.raises(ValueError, match=message):
        compare({"exact": enumeration(vae), "bound": estimator(vae, VIMCO(2))}, X, repeats=2, reference=reference)


def test_a_reference_with_other_parameters_is_refused():
    estimators = {name: estimator(vae_of("bernoulli"), LeaveOneOut(2)) for name in ("one", "other")}
    with pytest.raises(ValueError, match=r"`reference` must have only parameters of its.* in that of 'other'"):
        compare(estimators, X, repeats=2, reference="one")


@pytest.mark.slow
def test_the_variance_of_an_average_falls_with_the_number_of_evaluations():
    vae = vae_of("bernoulli")
    estimators = {"pairs": estimator(vae, DisARM(2)), "one": estimator(vae, Trace_ELBO())}
    single = compare(estimators, X, repeats=500)
    equal = compare(estimators, X, evaluations=4, repeats=500, seed=1)
    assert (single.evaluations, equal.evaluations) == ({"pairs": 2, "one": 1}, {"pairs": 4, "one": 4})
    for name, factor in (("pairs", 2), ("one", 4)):
        ratio = single.measured[name]["all"].variance / equal.measured[name]["all"].variance
        # The sum of 57 variances of 500 draws each, with heavy tails, is known to 7 % or better.
        assert ratio == pytest.approx(factor, rel=0.45)
        assert single.measured[name]["all"].target_norm == equal.measured[name]["all"].target_norm
        assert equal.measured[name]["all"].p_value > 1e-5


def test_all_numbers_agree_with_estimates_collected_by_hand():
    vae = vae_of("bernoulli")
    row = measured(estimator(vae, DisARM()), repeats=200, seed=7)["all"]
    pyro.set_rng_seed(7)
    losses = (DisARM().differentiable_loss(vae.model, vae.guide, X) for _ in range(200))
    gradients = [autograd(vae, -loss / len(X)).values() for loss in losses]
    estimates = torch.stack([torch.cat([value.flatten() for value in values]) for values in gradients])
    target = torch.cat([value.flatten() for value in exact_gradient(vae.model, vae.guide, X).values()])
    assert row.variance == pytest.approx(estimates.var(0).sum().item(), rel=1e-9)
    squared = ((estimates.mean(0) - target) ** 2 - estimates.var(0) / 200).sum().item()
    assert row.bias == pytest.approx(max(squared, 0) ** 0.5, rel=1e-6)
    scores = (estimates.mean(0) - target).abs() / (estimates.std(0) / 200**0.5)
    centred = estimates - estimates.mean(0)
    usual = (centred**2).sum(0) ** 2 / (centred**4).sum(0) >= 20
    assert row.num_tested == usual.sum() > 20
    assert row.max_z == pytest.approx(scores[usual].max().item(), rel=1e-4)


def test_groups_partition_the_parameters():
    vae = vae_of("bernoulli")
    rows = measured(estimator(vae, DisARM()), repeats=20)
    modules = {"all": vae, "encoder": vae.encoder, "decoder": vae.decoder, "prior": vae.prior}
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}
    assert {name: row.num_parameters for name, row in rows.items()} == sizes
    whole, *parts = (rows[name] for name in modules)
    assert whole.variance == pytest.approx(sum(row.variance for row in parts))
    assert whole.target_norm == pytest.approx(sum(row.target_norm**2 for row in parts) ** 0.5)
    assert whole.max_z == pytest.approx(max(row.max_z for row in parts))


def test_p_values_are_students_t_with_bonferronis_correction():
    row = Measured(1.0, 0.0, 0.1, 4.0, max_z=3.0, num_parameters=20, num_tested=10, repeats=10**9)
    assert row.p_value == pytest.approx(10 * 0.0026997960632601866, rel=1e-6)
    few = replace(row, repeats=5)
    assert few.p_value == pytest.approx(10 * 0.03994196807171, rel=1e-6)  # two-sided, 4 degrees of freedom
    assert (replace(row, max_z=0.1).p_value, row.signal_to_noise) == (1, 0.5)
    assert replace(row, variance=0.0).signal_to_noise == math.inf


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("length", [0.0, 5.0])
def test_the_error_of_the_bias_is_its_standard_deviation(correlated, length):
    """The errors of gradients are correlated, so that their covariance counts, not only the variances."""
    torch.manual_seed(0)
    size, repeats, runs = 40, 100, 400
    factor = torch.randn(size, 2).double() if correlated else torch.eye(size).double()
    bias = length * nn.functional.normalize(torch.randn(size).double(), dim=0)
    noises = (torch.randn(repeats, factor.shape[1]).double() @ factor.T for _ in range(runs))
    rows = [measure(bias + noise, torch.zeros(size).double()) for noise in noises]
    found, errors = (torch.tensor([getattr(row, name) for row in rows]) for name in ("bias", "bias_error"))
    if length:  # so long that it is never cut off at zero
        assert found.mean() == pytest.approx(length, abs=0.05)
        assert 0.9 < errors.mean() / found.std() < 1.4  # on the safe side where few directions vary
    else:
        assert (found < 3 * errors).float().mean() > 0.9
        assert (torch.tensor([row.p_value for row in rows]) < 1e-3).sum() <= 4


@pytest.mark.parametrize("repeats", [2, 5, 20, 200])
def test_few_unbiased_estimates_are_not_found_biased(repeats):
    torch.manual_seed(0)
    values = [measure(torch.randn(repeats, 100).double(), torch.zeros(100).double()).p_value for _ in range(200)]
    assert sum(value < 1e-3 for value in values) <= 4


def test_a_parameter_with_rare_estimates_is_not_tested():
    """A state that is drawn once in a thousand times, often never, and then its gradient is never seen."""
    torch.manual_seed(0)
    rare = (torch.rand(500, 1) < 1e-3).double() * 1e3  # of mean 1
    row = measure(torch.cat([rare, torch.randn(500, 1).double()], 1), torch.tensor([1.0, 0.0]).double())
    assert (row.num_parameters, row.num_tested) == (2, 1)
    assert row.p_value > 1e-3


def test_a_seed_fixes_the_numbers():
    vae = vae_of("bernoulli")
    first, again, other = (measured(estimator(vae, DisARM()), repeats=5, seed=seed)["all"] for seed in (0, 0, 1))
    assert first == again
    assert first.variance != other.variance


def test_the_table_has_a_line_for_each_estimator():
    vae = vae_of("bernoulli")
    found = compare({name: estimator(vae, make()) for name, make in UNBIASED.items()}, X, repeats=5)
    for group in ("all", "encoder"):
        title, *lines = found.table(group).splitlines()
        assert title.split() == f"{group} evaluations |gradient| bias error variance SNR max z p".split()
        assert [line.split("  ")[0].strip() for line in lines] == list(UNBIASED)
        assert len({len(line) for line in (title, *lines)}) == 1
        row = found.measured["pairs"][group]
        numbers = row.target_norm, row.bias, row.bias_error, row.variance, row.signal_to_noise
        cells = ["2", *(f"{number:.4g}" for number in numbers), f"{row.max_z:.1f}", f"{row.p_value:.1e}"]
        assert lines[list(UNBIASED).index("pairs")].split()[1:] == cells
    assert found.table() == found.table("all")
    with pytest.raises(ValueError, match=r"`group` must be 'all', '.*got 'encodr'"):
        found.table("encodr")


@pytest.mark.parametrize("name", [*UNBIASED, "enumeration"])
def test_gradients_random_state_and_param_store_are_restored(name, random_states):
    vae, store = vae_of("bernoulli"), pyro.get_param_store()
    vae.register()
    parameters, stored = list(vae.parameters()), dict(store.named_parameters())
    for index, parameter in enumerate(parameters):
        parameter.grad = None if index % 2 else torch.full_like(parameter, 7.0)
    gradients, values = zip(*((parameter.grad, parameter.detach().clone()) for parameter in parameters), strict=True)
    one = enumeration(vae) if name == "enumeration" else estimator(vae, UNBIASED[name]())
    states = random_states()
    compare({"one": one}, X, repeats=3)
    exact_gradient(vae.model, vae.guide, X)
    assert random_states() == states
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, gradients, strict=True))
    assert all(grad is None or grad.eq(7.0).all() for grad in gradients)
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, values, strict=True))
    assert dict(store.named_parameters()).keys() == stored.keys()
    assert all(dict(store.named_parameters())[key] is value for key, value in stored.items())


@pytest.mark.parametrize("make", [RunningAverage, lambda: NeuralBaseline(2, NET).double()], ids=["average", "neural"])
def test_the_state_and_gradients_of_a_baseline_are_restored(make):
    vae, elbo = vae_of("bernoulli"), ScoreFunction(make())
    elbo.loss_and_grads(vae.model, vae.guide, X)
    before = {name: value.clone() for name, value in elbo.baseline.state_dict().items()}
    gradients = [parameter.grad for parameter in elbo.baseline.parameters()]
    compare({"one": estimator(vae, elbo)}, X, repeats=3)
    assert all(torch.equal(value, before[name]) for name, value in elbo.baseline.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(elbo.baseline.parameters(), gradients, strict=True))
    elbo.loss_and_grads(vae.model, vae.guide, X)
    assert not all(torch.equal(value, before[name]) for name, value in elbo.baseline.state_dict().items())


def test_gradients_are_restored_after_an_error():
    vae = vae_of("bernoulli")
    vae.encoder.network[0].bias.grad = gradient = torch.ones(4).double()

    class Failing(LeaveOneOut):
        def loss_and_grads(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"failing": estimator(vae, Failing())}, X, repeats=3)
    assert vae.encoder.network[0].bias.grad is gradient
    assert sum(parameter.grad is not None for parameter in vae.parameters()) == 1


def test_a_relaxed_vae_needs_a_target_with_its_own_parameters():
    vae = vae_of("relaxed")
    with pytest.raises(ValueError, match=r"can be enumerated.*target=\(twin.model, twin.guide\)"):
        measured(estimator(vae, Trace_ELBO()), repeats=3)
    twin = deepcopy(vae).discrete()
    message = r"`target` must have only parameters of its estimator.*got \['encoder.network.0.weight'.*in that of 'one'"
    with pytest.raises(ValueError, match=message):
        measured(estimator(vae, Trace_ELBO(), target=(twin.model, twin.guide)), repeats=3)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"elbo": Trace_ELBO}, TypeError, "`elbo` must be an instance.*got"),
    ({"elbo": RenyiELBO(alpha=0, num_particles=3)}, ValueError, "`elbo` must be .*got a RenyiELBO, whose weights"),
    ({"elbo": DisARM(), "target": vae_of}, TypeError, r"`target` must be a pair.*got"),
])  # fmt: skip
def test_invalid_estimators_raise(options, error, message):
    with pytest.raises(error, match=message):
        Estimator(print, print, **options)


@pytest.mark.parametrize(("estimators", "options", "error", "message"), [
    ([], {}, TypeError, r"`estimators` must be a dict from names to Estimators.*got \[\]"),
    ({}, {}, TypeError, "`estimators` must be .*got {}"),
    ({"a": 1}, {}, TypeError, "`estimators` must be .*got {'a': 1}"),
    (None, {"evaluations": 2.5}, ValueError, "`evaluations` must be .*got 2.5"),
    (None, {"evaluations": True}, ValueError, "`evaluations` must be .*got True"),
    (None, {"evaluations": 3}, ValueError, "`evaluations` must be 4 or more, which 'four' takes .*got 3"),
    *((None, {"repeats": n}, ValueError, f"`repeats` must be .*got {n}") for n in (0, 1, -2, 1.5, True)),
])  # fmt: skip
def test_invalid_arguments_of_compare_raise(estimators, options, error, message):
    estimators = {"four": estimator(vae_of("bernoulli"), LeaveOneOut(4))} if estimators is None else estimators
    with pytest.raises(error, match=message):
        compare(estimators, X, **{"repeats": 3, **options})


def test_the_plate_counts_data_along_another_dimension():
    def model(y):
        weight = pyro.param("weight", torch.tensor(0.4).double())
        with pyro.plate("data", y.shape[1]):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=y[0])

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.4).double())
        with pyro.plate("data", y.shape[1]):
            pyro.sample("z", dist.Bernoulli(logits=slope * y[1]))

    assert measured(Estimator(model, guide, LeaveOneOut(2)), X.T, repeats=300)["all"].p_value > 1e-5


def test_a_parameter_named_all_is_a_group_of_its_own():
    def likelihood(z):
        both = pyro.param("all", torch.tensor(0.4).double()) + pyro.param("b", torch.tensor(0.1).double())
        return dist.Normal(both * z, 1.0)

    prior = dist.Bernoulli(torch.tensor(0.3).double())
    one = Estimator(model_of(prior, likelihood), guide_of(lambda x: prior), Trace_ELBO())
    found = measured(one, X[:, 0], repeats=3)
    assert {name: row.num_parameters for name, row in found.items()} == {"all": 2, "all (a parameter)": 1, "b": 1}
