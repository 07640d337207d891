"""Draws as a DataTree: every number has the law that its group says, and every dimension has its name."""

import json
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from scipy.stats import kstest
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.inference_data import sampler
from pyro_vae.parts.networks import linear, mlp

NET = mlp([4], nn.Tanh)
N = 6
DRAWS = {False: 500, True: 5000}  # one by one, and in parallel
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
DRAWN = ["posterior", "sample_stats", "prior", "posterior_predictive", "prior_predictive"]
GROUPS = [*DRAWN, "observed_data", "guide"]
SIGMAS = 5
UNLIKELY = 1e-6


def gaussian():
    return pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(3, 2, NET), likelihoods.Normal(2, 3, NET))


def gaussian_of_seed():
    torch.manual_seed(0)
    return gaussian()


def relaxed():
    return pv.VAE(
        priors.RelaxedBernoulli(2, temperature=0.5, probs=0.3),
        guides.RelaxedBernoulli(3, 2, NET, temperature=0.66),
        likelihoods.Normal(2, 3, NET),
    )


def gumbel():
    return pv.VAE(
        priors.GumbelSoftmax((1, 2), temperature=0.5, straight_through=True),
        guides.GumbelSoftmax(3, (1, 2), NET, temperature=0.66),
        likelihoods.Normal((1, 2), 3, NET),
    )


def discrete():
    return pv.VAE(priors.Bernoulli(2, probs=0.3), guides.Bernoulli(3, 2, NET), likelihoods.Normal(2, 3, NET))


VAES = {"gaussian": gaussian, "relaxed": relaxed, "gumbel": gumbel, "discrete": discrete}


def own_model(x):
    """A global latent mu and local ones, with nothing of ours in it."""
    mu = pyro.sample("mu", dist.Normal(1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def own_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("mean", torch.tensor(0.7)), 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.4))


OWN = (own_model, own_guide)


@pytest.fixture(params=VAES.values(), ids=VAES.keys())
def vae(request):
    return request.param()


@pytest.fixture(params=[False, True], ids=["one by one", "parallel"])
def parallel(request):
    return request.param


def tree_of(vae, **options):
    return pv.to_datatree(vae.model, vae.guide, X, **({"draws": 20} | options))


def own_tree(**options):
    return pv.to_datatree(*OWN, X[:, 0], **({"draws": 20} | options))


def drawn(tree, group, name):
    """The values of a variable, draws first."""
    return torch.from_numpy(tree[group][name].values[0])


def assert_moments(draws, mean, variance):
    """Draws on the left have this mean and variance, within their standard errors."""
    mean, variance = mean.detach(), variance.detach()
    for values, expected in ((draws, mean), ((draws - mean) ** 2, variance)):
        error = values.double().mean(0) - expected
        assert (error.abs() < SIGMAS * values.double().std(0) / len(draws) ** 0.5 + 1e-6).all()


def moments(distribution):
    """Mean and variance, of a relaxed distribution by very many draws of its own."""
    try:
        return distribution.mean, distribution.variance
    except NotImplementedError:
        draws = distribution.sample((400_000,))
        return draws.mean(0), draws.var(0)


# --- What is in the tree ---------------------------------------------------------------------------------------------


def test_groups_and_variables_of_a_vae(vae):
    tree = tree_of(vae)
    z = torch.ones(vae.prior().event_shape)
    code = set() if vae.code(z) is z else {"code"}  # the decoder of a relaxed latent reads it squashed
    assert list(tree.children) == GROUPS
    for group in ("posterior", "prior"):
        assert set(tree[group].data_vars) == {"z"} | code
    for group in GROUPS[3:6]:
        assert set(tree[group].data_vars) == {"x"}


def test_dimensions_of_a_vae(vae):
    tree = tree_of(vae)
    latent = ("latent", "category")[: len(vae.prior().event_shape)]
    for group in ("posterior", "prior"):
        for variable in tree[group].data_vars.values():
            assert variable.dims == ("chain", "draw", "obs", *latent)
            assert variable.shape == (1, 20, N, *vae.prior().event_shape)
    for group in ("posterior_predictive", "prior_predictive"):
        assert tree[group]["x"].dims == ("chain", "draw", "obs", "feature")
        assert tree[group]["x"].shape == (1, 20, N, 3)
    assert tree["observed_data"]["x"].dims == ("obs", "feature")
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)


def test_dimensions_of_a_global_and_a_local_latent(parallel):
    tree = own_tree(parallel=parallel)
    for group in ("posterior", "prior"):
        assert {name: variable.dims for name, variable in tree[group].data_vars.items()} == {
            "mu": ("chain", "draw"),
            "z": ("chain", "draw", "obs"),
            "twice": ("chain", "draw", "obs"),
        }
    assert tree["prior_predictive"]["x"].sizes == {"chain": 1, "draw": 20, "obs": N}
    assert tree["observed_data"]["x"].dims == ("obs",)


def test_images_have_rows_and_columns():
    vae = pv.VAE(
        priors.StandardNormal(2), guides.DiagonalNormal((2, 4), 2, linear()), likelihoods.Bernoulli(2, (2, 4), linear())
    )
    tree = pv.to_datatree(vae.model, vae.guide, torch.ones(5, 2, 4), draws=3)
    assert tree["posterior_predictive"]["x"].sizes == {"chain": 1, "draw": 3, "obs": 5, "row": 2, "column": 4}
    assert set(np.unique(tree["posterior_predictive"]["x"])) <= {0, 1}


@pytest.mark.parametrize("make", [lambda: tree_of(gumbel()), own_tree], ids=["vae", "own"])
def test_every_dimension_has_a_coordinate_counted_from_0(make):
    for node in make().children.values():
        assert node.dims
        for dim, size in node.sizes.items():
            np.testing.assert_array_equal(node.coords[dim], np.arange(size))


def test_attributes_are_plain_and_tell_how_the_tree_was_made():
    tree = own_tree(seed=3)
    for node in tree.subtree:
        assert all(type(value) in (int, float, str) for value in node.attrs.values())
        assert {"created_at", "inference_library"} <= set(node.attrs)
    assert (tree.attrs["draws"], tree.attrs["seed"]) == (20, 3)
    assert tree.attrs["creation_library_version"] == pv.__version__


# --- The laws --------------------------------------------------------------------------------------------------------


def test_posterior_draws_have_the_guides_law_and_prior_draws_the_priors(vae, parallel):
    tree = tree_of(vae, draws=DRAWS[parallel], parallel=parallel)
    assert_moments(drawn(tree, "posterior", "z"), *moments(vae.encode(X)))
    assert_moments(drawn(tree, "prior", "z"), *moments(vae.prior().expand([N])))


def test_data_are_drawn_anew_from_the_likelihood_of_the_draw_beside_it(vae, parallel):
    tree = tree_of(vae, draws=DRAWS[parallel], parallel=parallel)
    for group in ("posterior", "prior"):
        likelihood = vae.decode(drawn(tree, group, "z"))
        x = drawn(tree, f"{group}_predictive", "x")
        noise = ((x - likelihood.mean) / likelihood.stddev).detach()
        assert kstest(noise.flatten(), "norm").pvalue > UNLIKELY
        assert_moments(noise, torch.zeros(N, 3), torch.ones(N, 3))
        assert not (x == X).any(), "the observed data are repeated"
        assert (x.std(0) > 0).all(), "the draws are all the same"
        assert len(x.flatten().unique()) > 0.99 * x.numel(), "noise is shared"


def test_a_users_own_pair_has_the_law_that_a_pencil_gives(parallel):
    tree = own_tree(draws=DRAWS[parallel], parallel=parallel)
    x, one = X[:, 0], torch.ones(N)
    assert_moments(drawn(tree, "posterior", "mu"), torch.tensor(0.7), torch.tensor(0.3**2))
    assert_moments(drawn(tree, "posterior", "z"), 0.5 * x, 0.4**2 * one)
    assert_moments(drawn(tree, "posterior_predictive", "x"), 0.5 * x, (0.4**2 + 0.5**2) * one)
    assert_moments(drawn(tree, "prior", "mu"), torch.tensor(1.0), torch.tensor(0.5**2))
    assert_moments(drawn(tree, "prior", "z"), one, (0.5**2 + 1) * one)
    assert_moments(drawn(tree, "prior_predictive", "x"), one, (0.5**2 + 1 + 0.5**2) * one)
    # z given the mu of the same draw is N(mu, 1): the draws of the sites belong together.
    assert_moments(drawn(tree, "prior", "z") - drawn(tree, "prior", "mu")[:, None], 0 * one, one)
    assert not (drawn(tree, "posterior_predictive", "x") == x).any()


@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_what_is_deterministic_is_that_of_the_same_draw(group, parallel):
    for make in (relaxed, gumbel):
        vae = make()
        tree = tree_of(vae, parallel=parallel)
        torch.testing.assert_close(drawn(tree, group, "code"), vae.code(drawn(tree, group, "z")))
    own = own_tree(parallel=parallel)
    torch.testing.assert_close(drawn(own, group, "twice"), 2 * drawn(own, group, "z"))


def test_a_guide_marked_for_enumeration_is_drawn_from():
    vae = discrete()
    tree = pv.to_datatree(vae.model, config_enumerate(vae.guide), X, draws=DRAWS[False])
    assert set(np.unique(tree["posterior"]["z"])) == {0, 1}
    assert_moments(drawn(tree, "posterior", "z"), *moments(vae.encode(X)))


# --- Seeds and the user's process ------------------------------------------------------------------------------------


def test_one_seed_reproduces_the_draws_and_another_gives_others(parallel):
    first, again, other = (own_tree(seed=seed, parallel=parallel) for seed in (0, 0, 1))
    for group in GROUPS:
        assert first[group].to_dataset().equals(again[group].to_dataset())
    for group in DRAWN:
        for name in first[group].data_vars:
            assert not np.isclose(first[group][name], other[group][name]).any(), (group, name)


def test_random_streams_parameters_and_validation_are_as_before(random_states, parallel):
    vae = gaussian()
    vae.register()
    own_guide(X[:, 0])
    state = random_states()
    stored = {name: value.clone() for name, value in pyro.get_param_store().named_parameters()}
    with pyro.validation_enabled(False):
        tree_of(vae, parallel=parallel)
        own_tree(parallel=parallel)
        assert not torch.distributions.Distribution._validate_args
    assert random_states() == state
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_what_is_told_of_the_guide_draws_nothing_of_the_seed(parallel, monkeypatch):
    trees = []
    for asked in (True, False):
        if not asked:
            monkeypatch.setattr(sampler, "_given_data", lambda latents, *rest: latents)
        trees.append(tree_of(gaussian_of_seed(), parallel=parallel))
    for group in DRAWN:
        assert trees[0][group].to_dataset().equals(trees[1][group].to_dataset()), group


# --- The guide -------------------------------------------------------------------------------------------------------


def base(distribution):
    """Inside ``to_event``."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


def one_hot():
    return pv.VAE(
        priors.OneHotCategorical((2, 3)), guides.OneHotCategorical(3, (2, 3), NET), likelihoods.Normal((2, 3), 3, NET)
    )


@pytest.mark.parametrize("make", [*VAES.values(), one_hot], ids=[*VAES, "one_hot"])
def test_the_guide_group_holds_what_each_q_was_made_from(make):
    vae = make()
    expected = {"gaussian": ["loc", "scale"], "discrete": ["probs"], "one_hot": ["probs"]}
    names = expected.get(make.__name__, ["temperature", "logits"])
    group, q = tree_of(vae)["guide"], base(vae.encode(X))
    assert list(group.data_vars) == [f"z_{name}" for name in names]
    for name in names:
        value, told = getattr(q, name).detach(), group[f"z_{name}"]
        assert told.dims == ("obs", "latent", "category")[: told.ndim]
        np.testing.assert_allclose(told, value.expand(told.shape), rtol=1e-6)


def test_draws_have_the_parameters_that_the_guide_group_tells():
    tree = tree_of(gaussian(), draws=5000, parallel=True)
    draws = drawn(tree, "posterior", "z")
    loc, scale = (torch.from_numpy(tree["guide"][f"z_{name}"].values) for name in ("loc", "scale"))
    assert_moments(draws, loc, scale**2)


@pytest.mark.parametrize("known_by", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_a_covariance_has_its_columns_along_a_second_dimension(known_by):
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    matrix = {
        "covariance_matrix": covariance,
        "precision_matrix": covariance.inverse(),
        "scale_tril": torch.linalg.cholesky(covariance),
    }[known_by]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x, **{known_by: matrix}))

    tree = pv.to_datatree(model, guide, X[:, :2], draws=3, dims={"z": ["axis"]}, coords={"axis": ["width", "height"]})
    group = tree["guide"]
    assert {name: value.dims for name, value in group.data_vars.items()} == {
        "z_loc": ("obs", "axis"),
        "z_covariance_matrix": ("obs", "axis", "axis_bis"),
    }
    assert list(group.coords["axis_bis"].values) == ["width", "height"]
    np.testing.assert_allclose(group["z_loc"], X[:, :2])
    assert group["z_covariance_matrix"].sel(obs=4, axis="width", axis_bis="height").item() == pytest.approx(0.5)
    np.testing.assert_allclose(group["z_covariance_matrix"][3], covariance, rtol=1e-5)


def test_the_columns_of_a_latents_covariance_are_counted_where_nothing_is_named(tmp_path):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x, torch.eye(3)))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    tree = pv.to_datatree(model, guide, X, draws=3)
    assert tree["guide"]["z_covariance_matrix"].dims == ("obs", "latent", "latent_bis")
    np.testing.assert_array_equal(tree["guide"].coords["latent_bis"], [0, 1, 2])
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc") as loaded:
        xr.testing.assert_identical(loaded.load(), tree)


def test_global_and_local_parameters_of_a_users_own_guide():
    group = own_tree()["guide"]
    assert {name: value.dims for name, value in group.data_vars.items()} == {
        "mu_loc": (),
        "mu_scale": (),
        "z_loc": ("obs",),
        "z_scale": ("obs",),
    }
    assert group["mu_loc"].item() == pytest.approx(0.7)
    np.testing.assert_allclose(group["z_loc"], 0.5 * X[:, 0])
    np.testing.assert_allclose(group["z_scale"], np.full(N, 0.4), rtol=1e-6)


def test_parameters_in_two_plates():
    def model(x):
        with pyro.plate("people", 2, dim=-2), pyro.plate("data", N, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("people", 2, dim=-2), pyro.plate("data", N, dim=-1):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = X[:, :2].T
    group = pv.to_datatree(model, guide, x, draws=3)["guide"]
    assert group["z_loc"].dims == group["z_scale"].dims == ("people", "obs")
    np.testing.assert_array_equal(group["z_loc"], x)


def test_probabilities_of_a_categorical_have_a_dimension_of_their_own():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=torch.arange(4.0) * x[:, None]))

    group = pv.to_datatree(model, guide, X[:, 0], draws=3)["guide"]
    assert group["z_probs"].sizes == {"obs": N, "z_probs_1": 4}
    np.testing.assert_allclose(group["z_probs"].sum("z_probs_1"), np.ones(N), rtol=1e-6)


@pytest.mark.parametrize("kind", ["one class for each datum", "as many components as axes"])
def test_a_dimension_of_classes_is_numbered_though_its_size_is_that_of_another(kind):
    def q(count):
        if kind == "one class for each datum":
            return dist.Categorical(torch.ones(count))
        return dist.MixtureOfDiagNormals(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", q(len(x))).float()
            z = z[..., None] if z.shape[-1] == len(x) else z
            pyro.sample("x", dist.Normal(z, 1.0).expand([*z.shape[:-1], 2]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(len(x)))

    group = pv.to_datatree(model, guide, X[:, :2], draws=3, coords={"obs": list("abcdef")})["guide"]
    assert {name: value.dims for name, value in group.data_vars.items()} == {
        "one class for each datum": {"z_probs": ("obs", "z_probs_1")},
        "as many components as axes": {
            "z_locs": ("obs", "z_locs_1", "z_locs_2"),
            "z_coord_scale": ("obs", "z_coord_scale_1", "z_coord_scale_2"),
            "z_component_logits": ("obs", "z_component_logits_1"),
        },
    }[kind]
    for dim in set(group.dims) - {"obs"}:
        np.testing.assert_array_equal(group.coords[dim], np.arange(group.sizes[dim]))


def test_parameters_of_one_number_are_those_of_each_datum():
    """Pyro's AffineBeta keeps two of its parameters as they were given, without the plate."""

    def q():
        return dist.AffineBeta(*map(torch.tensor, (2.0, 3.0, -1.0, 4.0)))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", q()), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q())

    group = pv.to_datatree(model, guide, X[:, 0], draws=3)["guide"]
    expected = {"z_concentration1": 2.0, "z_concentration0": 3.0, "z_loc": -1.0, "z_scale": 4.0}
    assert set(group.data_vars) == set(expected)
    for name, value in expected.items():
        assert group[name].dims == ("obs",)
        np.testing.assert_array_equal(group[name], np.full(N, value))


@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize("first", [dist.Normal(0.0, 1.0), dist.Bernoulli(0.5)], ids=["continuous", "discrete"])
def test_a_latent_that_hangs_on_the_draw_of_another_has_no_parameters_of_its_own(first, count):
    """Its mean is another at each draw, and not that of q(z | x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("second", dist.Normal(pyro.sample("first", first), 1.0))
            pyro.sample("x", dist.Normal(z + pyro.sample("third", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("second", dist.Normal(pyro.sample("first", first.expand([len(x)])), 0.1))
            pyro.sample("third", dist.Normal(x, 1.0))

    for seed in range(5):
        tree = pv.to_datatree(model, guide, X[:count, 0], draws=3, seed=seed)
        told = {name.partition("_")[0] for name in tree["guide"].data_vars}
        assert told == {"first", "third"}
        assert set(tree["posterior"].data_vars) == {"first", "second", "third"}
        np.testing.assert_array_equal(tree["guide"]["third_loc"], X[:count, 0])


def test_an_autoguide_that_draws_on_the_way_has_no_guide_group():
    for autoguide in (AutoNormal, AutoDiagonalNormal):
        pyro.clear_param_store()
        guide = autoguide(own_model)
        assert list(pv.to_datatree(own_model, guide, X[:, 0], draws=3).children) == GROUPS[:-1]


def test_a_point_is_told_as_a_point():
    guide = AutoDelta(own_model)
    guide(X[:, 0])
    group = pv.to_datatree(own_model, guide, X[:, 0], draws=3)["guide"]
    assert {name: value.dims for name, value in group.data_vars.items()} == {"mu_v": (), "z_v": ("obs",)}
    np.testing.assert_array_equal(group["z_v"], guide.median()["z"].detach())


def test_a_transformed_distribution_has_no_parameters_of_its_own():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            normal = dist.Normal(x, torch.ones(len(x)))
            pyro.sample("z", dist.TransformedDistribution(normal, [dist.transforms.ExpTransform()]))

    assert list(pv.to_datatree(model, guide, X[:, 0], draws=3).children) == GROUPS[:-1]


# --- The user's own names --------------------------------------------------------------------------------------------


def test_names_and_coordinates_of_the_users():
    coords = {"obs": list("abcdef"), "axis": ["width", "height"], "pixel": [10, 20, 30]}
    tree = tree_of(gaussian(), dims={"z": ["axis"], "x": ["pixel"]}, coords=coords)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "axis")
    assert tree["posterior"]["z"].sel(obs="c", axis="height").shape == (1, 20)
    assert tree["observed_data"]["x"].sel(obs="b", pixel=20).item() == X[1, 1]
    assert list(tree["prior_predictive"]["x"].coords["pixel"]) == [10, 20, 30]


def test_a_dimension_may_have_the_name_of_columns():
    tree = tree_of(gaussian(), dims={"z": ["a_bis"]})
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "a_bis")
    assert tree["guide"]["z_scale"].dims == ("obs", "a_bis")
    np.testing.assert_array_equal(tree["guide"].coords["a_bis"], [0, 1])


def test_plates_of_another_name_are_dimensions():
    def model(x):
        with pyro.plate("people", 2, dim=-2), pyro.plate("days", N, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("people", 2, dim=-2), pyro.plate("days", N, dim=-1):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = X[:, :2].T
    for plate, expected in (("days", ("people", "obs")), ("people", ("obs", "days"))):
        tree = pv.to_datatree(model, guide, x, draws=3, plate=plate)
        assert tree["posterior"]["z"].dims == ("chain", "draw", *expected)
        np.testing.assert_array_equal(tree["observed_data"]["x"], x)


LABELS = [0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("labels", [torch.tensor(LABELS), LABELS, np.array(LABELS)], ids=["tensor", "list", "array"])
def test_data_are_selected_by_a_further_coordinate(labels):
    tree = tree_of(gaussian(), coords={"label": ("obs", labels)})
    for node in tree.children.values():
        assert node.coords["label"].dims == ("obs",)
        np.testing.assert_array_equal(node.coords["label"], LABELS)
        np.testing.assert_array_equal(node.coords["obs"], np.arange(N))
    zeros = tree["observed_data"]["x"].where(tree["observed_data"]["label"] == 0, drop=True)
    np.testing.assert_array_equal(zeros, X[[0, 2, 5]])
    means = tree["guide"]["z_loc"].groupby("label").mean()
    np.testing.assert_allclose(means.sel(label=1), tree["guide"]["z_loc"][[1, 4]].mean("obs"), rtol=1e-6)


def test_a_further_coordinate_may_be_words_and_stand_beside_names(tmp_path):
    words = ["a cat", "a dog", "a cat", "a fox", "a dog", "a cat"]
    coords = {"obs": list("abcdef"), "kind": ("obs", words), "unit": ("latent", ["mm", "s"])}
    tree = tree_of(gaussian(), coords=coords)
    assert tree["posterior"]["z"].sel(obs="d").coords["kind"].item() == "a fox"
    assert list(tree["prior"].coords["unit"].values) == ["mm", "s"]
    assert "unit" not in tree["observed_data"].coords
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc") as loaded:
        xr.testing.assert_identical(loaded.load(), tree)
        assert loaded["guide"]["z_loc"].groupby("kind").mean().sizes["kind"] == 3


@pytest.mark.parametrize("two", [("width", "height"), (10, 20), (0.5, 1.5)])
def test_two_values_in_a_tuple_are_the_coordinates_of_a_dimension(two):
    tree = tree_of(gaussian(), coords={"latent": two})
    assert tuple(tree["posterior"].coords["latent"].values) == two


def test_the_coordinates_of_a_dimension_may_be_told_as_those_along_it():
    tree = tree_of(gaussian(), coords={"obs": ("obs", list("abcdef"))})
    assert list(tree["posterior"].coords["obs"].values) == list("abcdef")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"y": ["pixel"]}}, r"dims: names the sites \['y'\]; the model has \['x', 'z'\]"),
        ({"dims": {"x": ["row", "column"]}}, r"dims: names \['row', 'column'\] for x, whose event shape is \(3,\)"),
        ({"dims": {"z": ["axis"], "x": ["axis"]}}, r"dims: 'axis' of x has size 3, and 2 elsewhere"),
        ({"dims": {"x": ["draw"]}}, r"dims: .*draw"),
        ({"coords": {"obs": [1, 2]}}, r"`coords` must be .*'obs': 6.*'obs' has 2 entries"),
        ({"coords": {"pixel": [1, 2, 3]}}, r"`coords` must be .*'feature': 3.*'pixel' has 3 entries"),
        (
            {"coords": {"label": ("obs", [1, 2])}},
            r"`coords` must be .*'obs': 6.*'label', along 'obs', has 2 entries",
        ),
        (
            {"coords": {"label": ("row", [1, 2])}},
            r"`coords` must be .*'obs': 6.*'label', along 'row', has 2 entries",
        ),
        ({"coords": {"label": ("obs", [[1] * 6])}}, r"coords: 'label', along 'obs',"),
        ({"coords": {"label": list(range(6))}}, r"`coords` must be .*'obs': 6.*'label' has 6 entries"),
        ({"coords": {"z": ("obs", list(range(6)))}}, "`coords` must be another.*'z' is the name of a site"),
        ({"coords": {"x": ("obs", list(range(6)))}}, "coords: 'x' is the name of a site"),
        ({"coords": {"z_loc": ("obs", list(range(6)))}}, "coords: 'z_loc'"),
        ({"coords": {"obs": ("latent", [1, 2])}}, "coords: 'obs' is a dimension, and .* cannot lie along 'latent'"),
        ({"coords": {"latent": 3}}, "coords: 'latent'"),
        ({"coords": {"label": ("obs", 3)}}, "coords: 'label'"),
        ({"draws": 0}, "`draws` must be a positive integer.*got 0"),
    ],
)
def test_names_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tree_of(gaussian(), **options)


def test_one_name_for_two_dimensions_of_a_site_is_refused():
    vae = gaussian()
    with pytest.raises(ValueError, match=r"dims: .*'obs'"):
        pv.to_datatree(vae.model, vae.guide, X[:3], draws=4, dims={"x": ["obs"]})


def test_more_than_four_gibibytes_are_refused_with_the_count_before_they_are_drawn():
    draws = 4 * 2**30 // (per_draw := 4 * N * (2 * (2 + 3) + 3)) + 1
    with pytest.raises(ValueError, match=rf"draws: {draws} draws of z, x .* take {draws * per_draw} bytes"):
        tree_of(gaussian(), draws=draws)


def test_a_guide_that_lacks_a_latent_of_the_model_is_refused():
    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"guide: the model's latents \['z'\] are not in it"):
        pv.to_datatree(own_model, guide, X[:, 0], draws=3)


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coords", [{}, {"obs": list("abcdef")}], ids=["counted", "named"])
def test_a_file_gives_back_the_same_tree(tmp_path, coords):
    tree = tree_of(gumbel(), coords=coords)
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc") as loaded:
        xr.testing.assert_identical(loaded.load(), tree)


def test_a_process_without_pyro_or_torch_reads_the_file(tmp_path):
    tree = own_tree()
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    program = (
        "import json, sys, xarray\n"
        "tree = xarray.open_datatree(sys.argv[1])\n"
        "heavy = [name for name in ('torch', 'pyro', 'pyro_vae', 'arviz') if name in sys.modules]\n"
        "mean = float(tree['posterior']['z'].mean())\n"
        "print(json.dumps([heavy, list(tree.children), list(tree['posterior']['z'].dims), mean]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path / "run.nc"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    heavy, groups, dims, mean = json.loads(done.stdout)
    assert (heavy, groups, dims) == ([], GROUPS, ["chain", "draw", "obs"])
    assert mean == pytest.approx(float(tree["posterior"]["z"].mean()))
