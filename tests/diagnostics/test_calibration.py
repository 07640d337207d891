"""Calibration: an exact guide passes with every seed, and the errors of a wrong one are found and named."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, guide_of, gumbel, model_of
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, priors
from pyro_vae.diagnostics.calibration import ALL
from pyro_vae.parts.networks import mlp

WEIGHT = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]])
NOISE = 0.6
PRECISION = torch.eye(2) + WEIGHT.T @ WEIGHT / NOISE**2
ROWS = torch.zeros(8, 3)
STANDARD_NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)
linear_model = model_of(STANDARD_NORMAL, lambda z: dist.Normal(z @ WEIGHT.T, NOISE).to_event(1))
prior_guide = guide_of(lambda x: STANDARD_NORMAL)
# p(z | x) is normal with mean x / 2 and variance 1 / 2.
scalar_model = model_of(dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z, 1.0).to_event(1))


def normal_guide(share=1.0, shift=0.0, only=None):
    """The exact posterior of the linear model with another variance and mean, of all coordinates or ``only`` one."""
    which = torch.ones(2) if only is None else torch.eye(2)[only]
    root = torch.linalg.cholesky(PRECISION.inverse()) * (1 + (share**0.5 - 1) * which)[:, None]
    moved, solve = shift * root.diagonal() * which, WEIGHT @ PRECISION.inverse() / NOISE**2
    return guide_of(lambda x: dist.MultivariateNormal(x @ solve + moved, scale_tril=root))


def discrete_pair(sharpness=1.0, as_class=False):
    """A mixture of three normals; its guide is exact at a sharpness of 1 and overconfident above."""
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
    probs, make = torch.tensor([0.5, 0.3, 0.2]), dist.Categorical if as_class else dist.OneHotCategorical

    def likelihood(z):
        return dist.Normal(centres[z] if as_class else z @ centres, 1.0).to_event(1)

    def q(x):
        return make(logits=sharpness * (probs.log() - ((x[..., None, :] - centres) ** 2).sum(-1) / 2))

    return model_of(make(probs=probs), likelihood), guide_of(q)


def calibrated(guide, seed=0, model=linear_model, data=ROWS, **options):
    return pv.calibrate(model, guide, data, seed=seed, **options)


@pytest.mark.parametrize(("model", "guide", "data"), [
    (linear_model, normal_guide(), ROWS),
    *((*discrete_pair(1.0, kind), torch.zeros(8, 2)) for kind in (False, True)),
], ids=["linear", "one-hot", "class"])  # fmt: skip
def test_the_exact_posterior_passes_with_every_seed(model, guide, data):
    for seed in range(20):
        result = calibrated(guide, seed, model, data, num_simulations=500, tolerance=1)
        assert result.is_exact, (seed, result.p_values)
        assert result.faults == {}
        assert result.verdict == "sound"
        assert "\n" not in str(result)
        assert abs(result.divergence) < 5 * result.divergence_error + 1e-4


def test_p_values_of_the_exact_posterior_are_uniform():
    p_values = torch.cat([calibrated(normal_guide(), seed, num_simulations=300).p_values for seed in range(40)])
    for level in (0.05, 0.2, 0.5):
        error = (level * (1 - level) / 40) ** 0.5  # the three quantities of a seed may be correlated
        assert abs((p_values <= level).double().mean() - level) < 5 * error


def test_the_exact_posterior_has_no_errors_and_nominal_coverage():
    result = calibrated(normal_guide(), num_simulations=4000)
    assert (result.errors.variance_ratio.log().abs() < 5 * result.errors.log_ratio_error).all()
    assert (result.errors.bias.abs() < 5 * result.errors.bias_error).all()
    assert (result.elbo_corrections.variance_ratio.log().abs() < 0.2).all()
    for level in (0.5, 0.9):
        share, error = result.coverage(level)
        assert ((share - level).abs() < 5 * error).all()
    error = (0.9 * 0.1 / 4000) ** 0.5
    assert (result.coverage(0.9)[1] < 1.1 * error).all()
    with pytest.raises(ValueError, match=r"`level` must be .*got 90"):
        result.coverage(90)


@pytest.mark.parametrize("seed", range(5))
def test_half_the_variance_is_a_fault(seed):
    result = calibrated(normal_guide(0.5), seed)
    assert not result.is_exact
    assert result.faults[ALL].startswith("too narrow, the variance of q is 0.")
    assert "too narrow" in str(result)
    assert float(result.errors.overall[0]) == pytest.approx(2, rel=0.2)
    assert float(result.elbo_corrections.overall[0]) == pytest.approx(2, rel=0.2)
    assert result.divergence == pytest.approx(2 * 0.25, rel=0.3)  # (2 + 1 / 2) / 2 - 1 for each of two dimensions
    share, error = result.coverage(0.9)
    assert ((share - 0.755).abs() < 5 * error)[:2].all()  # of a normal of twice the variance


def one_mode_pair(modes=2):
    """x = |z| + noise: p(z | x) has two equal modes, of which the guide finds one; its KL is log 2."""

    def q(x):
        side = 1.0 if modes == 1 else (torch.rand(x.shape) < 0.5) * 2.0 - 1
        return dist.Normal(side * x / 1.01, 0.0995).to_event(1)

    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    return model_of(prior, lambda z: dist.Normal(z.abs(), 0.1).to_event(1)), guide_of(q)


def test_a_guide_that_finds_one_of_two_modes_is_faulty_and_its_coverage_is_the_first_line():
    model, guide = one_mode_pair(modes=1)
    result = calibrated(guide, model=model, data=ROWS[:, :1])
    share, error = (float(column[0]) for column in result.coverage(0.9))
    assert abs(share - 0.45) < 5 * error + 0.06  # half of 90 %, and where x is small the modes overlap
    assert result.verdict == "faulty"
    assert f"its 90 % intervals cover {100 * share:.0f} % of the true values" in result.faults["z[0]"]
    assert str(result).startswith(
        f"faulty: 90 % intervals of q(z | x) cover {100 * share:.1f} ± {100 * error:.1f} % of"
    )


@pytest.mark.parametrize(("shift", "verdict"), [(8.0, "faulty"), (3.0, "approximate"), (0.0, "sound")])
def test_a_guide_that_is_wrong_in_one_datum_of_ten_is_seen(shift, verdict):
    """By a shift, in standard deviations of q, of either sign: neither the mean nor a common variance shows it."""

    def q(x):
        tenth = ((10 * x).floor() % 10 == 0) * (1 - 2 * ((100 * x).floor() % 2))
        return dist.Normal(x / 2 + shift * 0.5**0.5 * tenth, 0.5**0.5).to_event(1)

    for seed in range(3):
        result = calibrated(guide_of(q), seed, scalar_model, torch.linspace(-3, 3, 200)[:, None])
        share = float(result.coverage(0.9)[0][0])
        assert result.verdict == verdict, str(result)
        assert result.headline.startswith(f"{verdict}: 90 % intervals of q(z | x) cover {100 * share:.1f} ± ")
        assert share == pytest.approx(0.9 if shift == 0 else 0.82, abs=0.05)
    assert ("wrong for some data" in str(result)) == (verdict == "faulty")


def test_wide_intervals_are_faulty_and_heavy_tails_of_q_are_not():
    """Four times the variance; and a Student-t of the posterior's own scale, whose intervals are a little too wide."""
    wide = calibrated(guide_of(lambda x: dist.Normal(x / 2, 2**0.5).to_event(1)), model=scalar_model, data=ROWS[:, :1])
    assert "its 90 % intervals cover 100 % of the true values" in wide.faults["z[0]"]
    heavy = guide_of(lambda x: dist.StudentT(8.0, x / 2, 0.5**0.5).to_event(1))
    result = calibrated(heavy, model=scalar_model, data=ROWS[:, :1], num_simulations=4000)
    assert (result.verdict, result.faults) == ("approximate", {})


def test_few_simulations_raise_no_false_alarm():
    for seed in range(5):
        assert calibrated(normal_guide(0.9), seed, num_simulations=10, num_draws=10).verdict != "faulty"


def test_twice_the_variance_is_too_wide_a_shift_only_a_bias_and_a_fault_of_one_coordinate_has_its_name():
    assert calibrated(normal_guide(2.0)).faults[ALL].startswith("too wide, the variance of q is 2.")
    fault = calibrated(normal_guide(shift=1.0)).faults[ALL]
    assert fault.startswith("biased, the mean of q is off by")
    assert "narrow" not in fault
    assert calibrated(normal_guide(0.2, only=1)).faults.keys() & {"z[0]", "z[1]"} == {"z[1]"}


def test_a_guide_that_returns_the_prior_is_detected_by_the_joint_density_alone():
    """The ranks of each coordinate are uniform: on average over x the posterior is the prior."""
    for seed in range(5):
        result = calibrated(prior_guide, seed)
        level = result.alpha / len(result.names)
        assert (result.p_values[:-1] > level).all()
        assert result.p_values[-1] < 1e-12
        assert "too wide" in result.faults[ALL]


@pytest.mark.parametrize("as_class", [False, True])
def test_an_overconfident_discrete_guide_is_too_narrow(as_class):
    model, guide = discrete_pair(3.0, as_class)
    result = calibrated(guide, model=model, data=torch.zeros(8, 2))
    assert result.names == ("z[0]", "z[1]", "z[2]", "log p(x, z)")
    assert result.elbo_corrections is None
    assert "too narrow" in result.faults[ALL]


def test_an_error_below_the_tolerance_is_no_fault_but_not_exact():
    tolerant, strict = (calibrated(normal_guide(0.8), num_simulations=4000, tolerance=t) for t in (2**0.5, 1))
    assert not tolerant.is_exact
    assert tolerant.faults == {}
    assert any("too narrow" in fault for fault in strict.faults.values())


def test_a_few_wrong_data_are_hidden_in_the_average_but_not_in_the_exact_divergence_of_each():
    def q(x):
        mean = torch.where((x - 2.5).abs() < 0.05, -x / 2, x / 2)  # wrong sign for one datum in two hundred
        return dist.Normal(mean, 0.5**0.5).to_event(1)

    guide, x = guide_of(q), torch.linspace(-4, 4, 33)[:, None]
    result = calibrated(guide, model=scalar_model, data=x)
    assert result.is_exact
    assert result.faults == {}
    kl, wrong = pv.exact.kl(scalar_model, guide, x), (x[:, 0] - 2.5).abs() < 0.05
    torch.testing.assert_close(kl, torch.where(wrong, 2.5**2, 0.0), atol=1e-3, rtol=1e-3)


def test_errors_that_cancel_in_the_ranks_add_up_in_the_divergence():
    guide = guide_of(lambda x: dist.Normal(x / 2, (torch.where(x > 0, 0.7, 1.35) / 2).sqrt()).to_event(1))
    result = calibrated(guide, model=scalar_model, data=ROWS[:, :1])
    exact = sum((share + 1 / share) / 2 - 1 for share in (0.7, 1.35)) / 2
    assert result.errors.overall[0] == pytest.approx(1, abs=0.2)
    assert abs(result.divergence - exact) < 5 * result.divergence_error < exact
    assert result.verdict == "approximate"


def test_a_trained_encoder_is_not_exact_but_has_no_fault_until_its_variance_is_halved():
    net = mlp([32], nn.Tanh)
    vae = pv.VAE(priors.StandardNormal(5), guides.DiagonalNormal(64, 5, net), likelihoods.Bernoulli(5, 64, net))
    x = datasets.binarize(datasets.digits("train").x)
    pv.fit(vae.model, vae.guide, x, epochs=40, batch_size=100, lr=5e-3, seed=0)

    def narrowed(x):
        q = vae.encode(x).base_dist
        return dist.Normal(q.loc, q.scale * 0.5**0.5).to_event(1)

    for seed in range(5):
        trained = pv.calibrate(vae.model, vae.guide, x, num_draws=49, seed=seed)
        assert (trained.verdict, trained.faults) == ("approximate", {})
        assert not trained.is_exact
    assert "too narrow" in pv.calibrate(vae.model, guide_of(narrowed), x, num_draws=49).faults[ALL]


def test_relaxed_latents_are_compared_in_unconstrained_coordinates():
    vae = gumbel()
    result = pv.calibrate(vae.model, vae.guide, torch.zeros(5, 3), num_simulations=200)
    assert result.names == ("z[0, 0]", "z[0, 1]", "z[1, 0]", "z[1, 1]", "log p(x, z)")
    assert result.ranks.shape == (200, 5)
    assert result.elbo_corrections.variance_ratio.isfinite().all()


def test_covariates_stay_and_missing_entries_stay_missing():
    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", pv.missing.with_missing(dist.Normal(z[..., None], torch.ones(2)).to_event(1)), obs=x)

    def guide(x, c):
        seen = (~x.isnan()).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((c + x.nan_to_num(0.0).sum(-1)) / (1 + seen), (1 + seen) ** -0.5))

    x = torch.zeros(6, 2)
    x[::2, 0] = torch.nan
    x[3] = torch.nan
    assert pv.calibrate(model, guide, x, torch.linspace(-5, 5, 6), tolerance=1, seed=1).is_exact


def test_a_positive_latent_is_compared_by_its_logarithm():
    model = model_of(dist.Gamma(torch.tensor(3.0), 2.0), dist.Poisson)
    result = pv.calibrate(model, guide_of(lambda x: dist.Gamma(3 + x, 3.0)), torch.ones(7), tolerance=1)
    assert result.is_exact
    assert (result.elbo_corrections.variance_ratio.log().abs() < 0.5).all()


def test_a_seed_fixes_the_result_and_the_users_state_stays(random_states):
    vae = gaussian()
    vae.register()
    state, stored = random_states(), set(pyro.get_param_store().keys())
    first, again, other = (calibrated(vae.guide, seed, vae.model, num_simulations=50) for seed in (0, 0, 1))
    assert torch.equal(first.ranks, again.ranks)
    assert not torch.equal(first.ranks, other.ranks)
    assert (random_states(), set(pyro.get_param_store().keys())) == (state, stored)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in vae.parameters())


def observing(loc, value):
    """A model of one latent with a likelihood that may read the data, and its prior as a guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc(z, x), 1.0), obs=value(x))

    return model, guide_of(lambda x: dist.Normal(0.0, 1.0))


point_guide = guide_of(lambda x: dist.Delta(x[:, :2]).to_event(1))
REFINED = gaussian(encoder=guides.PerDatum.refining(gaussian().encoder, torch.randn(6, 3)))


@pytest.mark.parametrize(("model", "guide", "data", "message"), [
    (REFINED.model, REFINED.guide, torch.randn(6, 3), "`guide` must be amortized.*got a q.* more than that datum"),
    (linear_model, point_guide, ROWS, "`guide` must have a density for .*, got a point .* for 'z'"),
    (*observing(lambda z, x: z, lambda x: 2 * x), torch.ones(4),
     "`model` must observe one of its 1 data tensors.*at 'x'.*got values that are equal to none"),
    (*observing(lambda z, x: z + x.detach(), lambda x: x), torch.ones(4),
     "`model` must have a likelihood of 'x' that depends on latents.*got draws that have another density"),
], ids=["per datum", "point", "changed data", "data in the likelihood"])  # fmt: skip
def test_pairs_that_cannot_be_calibrated_raise(model, guide, data, message):
    with pytest.raises(ValueError, match=message):
        pv.calibrate(model, guide, data)


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("num_draws", 5, "10 or more"), ("tolerance", 0.5, "a factor of 1 or more"), ("alpha", 2, "a probability between"),
])  # fmt: skip
def test_invalid_arguments_raise(name, value, expected):
    with pytest.raises(ValueError, match=f"`{name}` must be {expected}.*got {value}"):
        calibrated(normal_guide(), **{name: value})


COUNT, PRIOR = 6, 2.0  # rows of a data set, and the standard deviation of its mean
PRECISION_OF_MEAN = PRIOR**-2 + COUNT


def mean_model(x):
    """A global mean; p(mean | x) is normal, of precision 1/4 + 6."""
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mean_guide(factor=1.0):
    """The exact posterior, with its standard deviation multiplied."""

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / PRECISION_OF_MEAN, factor * PRECISION_OF_MEAN**-0.5))

    return guide


@pytest.mark.parametrize("seed", range(2))
def test_an_exact_sampler_of_a_global_latent_has_uniform_ranks_and_half_its_scale_has_not(seed):
    x = torch.zeros(COUNT)
    sound = pv.calibrate(mean_model, mean_guide(), x, num_simulations=200, seed=seed, tolerance=1)
    assert (sound.verdict, sound.faults, sound.num_data_sets) == ("sound", {}, 200)
    assert sound.names == ("mean", "log p(x, z)")
    assert abs(sound.divergence) < 5 * sound.divergence_error + 1e-4
    assert "200 data sets drawn from the model" in str(sound)
    half = pv.calibrate(mean_model, mean_guide(0.5), x, num_simulations=200, seed=seed)
    assert half.verdict == "faulty"
    assert "too narrow" in half.faults["mean"]
    assert half.errors.variance_ratio.item() == pytest.approx(4, rel=0.4)
    assert abs(half.divergence - ((0.25 + 4) / 2 - 1)) < 5 * half.divergence_error < 2
    assert abs(float(half.coverage(0.9)[0][0]) - 0.589) < 5 * 0.035  # P(|z| < 1.645 / 2)


def scaled_auto_normal(scale):
    """A guide with a free mean, and the exact standard deviation multiplied: no fit makes up for that."""

    def guide(*data):
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("mean", dist.Normal(loc, scale * PRECISION_OF_MEAN**-0.5))

    return guide


REFIT = {"epochs": 80, "lr": pv.schedules.decayed(0.3, 80), "elbo": TraceMeanField_ELBO()}


def test_refits_of_a_guide_to_each_data_set_pass_if_its_family_is_right():
    options = {"refit": REFIT, "num_simulations": 30, "processes": 2}
    sound = pv.calibrate(mean_model, scaled_auto_normal(1.0), torch.zeros(COUNT), **options)
    assert (sound.is_exact, sound.faults) == (True, {})
    assert abs(sound.divergence) < 5 * sound.divergence_error + 0.05


@pytest.mark.slow
def test_refits_find_a_scale_of_half():
    options = {"refit": REFIT, "num_simulations": 60, "processes": 2}
    half = pv.calibrate(mean_model, scaled_auto_normal(0.5), torch.zeros(COUNT), **options)
    assert half.verdict == "faulty"
    assert "too narrow" in half.faults["mean"]


@pytest.mark.parametrize("closed", [False, True])
def test_refits_are_the_same_in_any_number_of_processes_and_leave_no_trace(closed, random_states):
    x = torch.zeros(COUNT)

    def closed_model():
        mean_model(x)

    model, data = (closed_model, ()) if closed else (mean_model, (x,))
    guide = scaled_auto_normal(1.0)
    pyro.param("loc", torch.tensor(3.0))
    before = random_states()
    options = {"refit": {"epochs": 3, "lr": 0.1}, "num_simulations": 10, "num_draws": 20}
    one, two = (pv.calibrate(model, guide, *data, processes=count, **options) for count in (1, 2))
    assert torch.equal(one.ranks, two.ranks)
    assert torch.equal(one.errors.bias, two.errors.bias)
    assert (random_states(), pyro.param("loc").item()) == (before, 3.0)
    assert list(pyro.get_param_store()) == ["loc"]


def test_the_parameters_of_the_model_are_not_refitted():
    seen = []

    def model(x):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        seen.append(scale.item())
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    def guide(x):
        pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)  # shared with the model
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    refit = {"epochs": 5, "lr": 0.5}
    pv.calibrate(model, guide, torch.zeros(3), refit=refit, num_simulations=10, num_draws=10, processes=1)
    assert set(seen) == {2.0}


def test_groups_that_share_no_latent_have_a_rank_each():
    def model(x):
        with pyro.plate("group", x.shape[1], dim=-1):
            mean = pyro.sample("mean", dist.Normal(0.0, PRIOR))
            with pyro.plate("data", len(x), dim=-2):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x, factor=1.0):
        with pyro.plate("group", x.shape[1], dim=-1):
            pyro.sample("mean", dist.Normal(x.sum(0) / PRECISION_OF_MEAN, factor * PRECISION_OF_MEAN**-0.5))

    def narrow(x):
        guide(x, 0.5)

    x = torch.zeros(COUNT, 5)
    sound = pv.calibrate(model, guide, x, num_simulations=248, tolerance=1)
    assert (sound.ranks.shape, sound.names) == ((250, 2), ("mean", "log p(x, z)"))
    assert sound.num_data_sets == 50
    assert sound.verdict == "sound"
    assert "too narrow" in pv.calibrate(model, narrow, x, num_simulations=250).faults["mean"]


def hierarchy(x):
    """A global mean, and a latent for each datum: the mean of each row is normal around it."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchy_guide(x):
    """The exact posterior: x_i given the mean has variance 2."""
    precision = 1 + len(x) / 2
    mean = pyro.sample("mean", dist.Normal(x.sum() / 2 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mean + x) / 2, 0.5**0.5))


def test_latents_outside_of_the_data_plate_are_ranked_unless_others_are_named():
    options = {"num_simulations": 100, "tolerance": 1}
    assert pv.calibrate(hierarchy, hierarchy_guide, torch.zeros(3), **options).names == ("mean", "log p(x, z)")
    every = pv.calibrate(hierarchy, hierarchy_guide, torch.zeros(3), latents=["mean", "z"], **options)
    assert every.names == ("mean", "z[0]", "z[1]", "z[2]", "log p(x, z)")
    assert every.verdict == "sound"


def test_a_guide_that_is_fitted_to_the_data_needs_refits_and_the_reason_names_its_latents():
    def half_amortized(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    for guide, names in ((half_amortized, r"\['mean'\]"), (AutoNormal(hierarchy), r"\['mean', 'z'\]")):
        with pytest.raises(ValueError, match=f"`refit` must be options of `pv.fit`.*a q of {names}, fitted to the"):
            pv.calibrate(hierarchy, guide, torch.randn(4))


def test_a_refit_that_diverges_names_its_data_set():
    refit = {"epochs": 50, "lr": 1e30}
    with pytest.raises(FloatingPointError, match=r"refit of simulation [0-9]+: step [0-9]+"):
        pv.calibrate(mean_model, AutoNormal(mean_model), torch.zeros(3), refit=refit, num_simulations=10, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_a_full_covariance_is_calibrated_and_a_mean_field_is_too_narrow_where_latents_are_correlated(make):
    """The posterior variance of the mean is 1 / (1 + 8 / 0.3125), and 1 / (1 + 8 / 0.0625) by a mean field."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            level = pyro.sample("level", dist.Normal(mean, 0.25))
            pyro.sample("y", dist.Normal(level, 0.5), obs=y)

    refit = {"epochs": 400, "lr": pv.schedules.decayed(0.1, 400)}
    found = pv.calibrate(model, make(model), torch.zeros(8), refit=refit, num_simulations=60, processes=2)
    if make is AutoMultivariateNormal:
        assert found.faults == {}
    else:
        assert "too narrow" in found.faults["mean"]
        assert found.errors.variance_ratio[0].item() == pytest.approx(129 / 26.6, rel=0.6)


def test_a_guide_that_leaves_all_latents_out_has_nothing_to_calibrate():
    def mixture(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"`guide` must draw latents.*got .* none.*\['c'\], are summed out"):
        pv.calibrate(mixture, lambda x: None, torch.zeros(4))


def test_a_chain_of_observations_and_discrete_latents_that_are_summed_out_are_simulated_with_the_rest():
    """An autoregression whose level is global, with a class for each series that the guide leaves out."""

    def model(x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x_0", dist.Normal(level, 1.0), obs=x[:, 0])
            pyro.sample("x_1", dist.Normal(x[:, 0] / 2 + level, 1.0 + c), obs=x[:, 1])

    def guide(x, factor=1.0):
        grid = torch.linspace(-5, 5, 2001)[:, None]
        steps = dist.Normal(x[:, 0] / 2 + grid, torch.tensor([1.0, 2.0])[:, None, None]).log_prob(x[:, 1])
        log_p = dist.Normal(grid, 1.0).log_prob(x[:, 0]) + steps.logsumexp(0)
        mass = (log_p.sum(1) - grid[:, 0] ** 2 / 2).softmax(0)
        mean = (mass * grid[:, 0]).sum()
        pyro.sample("level", dist.Normal(mean, factor * (mass * (grid[:, 0] - mean) ** 2).sum().sqrt()))

    def narrow(x):
        guide(x, 0.5)

    found = pv.calibrate(model, guide, torch.zeros(8, 2), num_simulations=100)
    assert (found.verdict, found.names) == ("sound", ("level", "log p(x, z)"))  # the posterior is nearly normal
    assert "too narrow" in pv.calibrate(model, narrow, torch.zeros(8, 2), num_simulations=100).faults["level"]
