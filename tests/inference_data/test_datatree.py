"""Draws as a DataTree: every number has the law of its group, and every dimension has its name."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from export_cases import SHARED, SIGMAS, TWO_PLATES, VAES, N, X, local_pair, on_data, shared_guide, shared_model
from pairs import NET, bernoulli, gaussian, gumbel
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from scipy.stats import kstest
from tree_checks import assert_file_holds, dims_of, drawn, run_program

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae.distributions.mixture import MixtureOfNormals
from pyro_vae.inference_data.sampler import JointSampler

DRAWS = {False: 500, True: 5000}  # one by one, and in parallel
DRAWN = ["posterior", "sample_stats", "prior", "posterior_predictive", "prior_predictive"]
GROUPS = [*DRAWN, "observed_data", "guide"]
WITH_LIKELIHOOD = [*DRAWN[:2], "log_likelihood", *GROUPS[2:]]
UNLIKELY = 1e-6
LABELS = [0, 1, 0, 2, 1, 0]
SKEWED = {
    "gaussian": gaussian,
    "relaxed": lambda: gaussian(prior=priors.RelaxedBernoulli(2, 0.5, probs=0.3),
                                encoder=guides.RelaxedBernoulli(3, 2, NET, 0.66)),
    "gumbel": lambda: gumbel((1, 2), straight_through=True),
    "bernoulli": lambda: gaussian(prior=priors.Bernoulli(2, probs=0.3), encoder=guides.Bernoulli(3, 2, NET)),
}  # fmt: skip


def tree_of(vae, **options):
    return pv.to_datatree(*on_data(vae), **({"draws": 20} | options))


def shared_tree(**options):
    return pv.to_datatree(*SHARED, **({"draws": 20} | options))


def assert_moments(draws, mean, variance):
    """Draws on the left have this mean and variance, within their standard errors."""
    mean, variance = mean.detach(), variance.detach()
    for values, expected in ((draws, mean), ((draws - mean) ** 2, variance)):
        error = values.double().mean(0) - expected
        assert (error.abs() < SIGMAS * values.double().std(0) / len(draws) ** 0.5 + 1e-6).all()


def moments(distribution):
    """Mean and variance; those of a relaxed distribution come from very many draws."""
    try:
        return distribution.mean, distribution.variance
    except NotImplementedError:
        draws = distribution.sample((400_000,))
        return draws.mean(0), draws.var(0)


@pytest.mark.parametrize("make", VAES.values(), ids=VAES)
def test_groups_variables_and_dimensions_of_a_vae_and_its_file(make, tmp_path):
    vae = make()
    tree, event = tree_of(vae), vae.prior().event_shape
    latent, z = ("chain", "draw", "obs", "latent", "category")[: 3 + len(event)], torch.ones(event)
    names = {"z"} if vae.code(z) is z else {"z", "code"}  # the decoder of a relaxed latent reads the code
    assert list(tree.children) == GROUPS
    for group in ("posterior", "prior"):
        assert (dims_of(tree[group]), tree[group]["z"].shape) == (dict.fromkeys(names, latent), (1, 20, N, *event))
    for group in ("posterior_predictive", "prior_predictive"):
        assert dims_of(tree[group]) == {"x": ("chain", "draw", "obs", "feature")}
        assert tree[group]["x"].shape == (1, 20, N, 3)
    assert dims_of(tree["observed_data"]) == {"x": ("obs", "feature")}
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    assert_file_holds(tmp_path / "run.nc", tree)


def test_dimensions_of_a_global_and_a_local_latent(parallel):
    tree, local = shared_tree(parallel=parallel), ("chain", "draw", "obs")
    for group in ("posterior", "prior"):
        assert dims_of(tree[group]) == {"mu": ("chain", "draw"), "z": local, "twice": local}
    assert tree["prior_predictive"]["x"].sizes == {"chain": 1, "draw": 20, "obs": N}
    assert tree["observed_data"]["x"].dims == ("obs",)


def test_images_have_rows_and_columns():
    vae = gaussian(2, (2, 4), decoder=likelihoods.Bernoulli(2, (2, 4), NET))
    tree = pv.to_datatree(vae.model, vae.guide, torch.ones(5, 2, 4), draws=3)
    assert tree["posterior_predictive"]["x"].sizes == {"chain": 1, "draw": 3, "obs": 5, "row": 2, "column": 4}
    assert set(np.unique(tree["posterior_predictive"]["x"])) <= {0, 1}


@pytest.mark.parametrize("make", [lambda: tree_of(gumbel()), shared_tree], ids=["vae", "own"])
def test_every_dimension_has_a_coordinate_counted_from_0(make):
    for node in make().children.values():
        assert node.dims
        for dim, size in node.sizes.items():
            np.testing.assert_array_equal(node.coords[dim], np.arange(size))


def test_attributes_are_plain_and_say_how_the_tree_was_made():
    tree = shared_tree(seed=3)
    for node in tree.subtree:
        assert all(type(value) in (int, float, str) for value in node.attrs.values())
        assert {"created_at", "inference_library"} <= set(node.attrs)
    assert (tree.attrs["draws"], tree.attrs["seed"]) == (20, 3)
    assert tree.attrs["creation_library_version"] == pv.__version__


@pytest.mark.parametrize("make", SKEWED.values(), ids=SKEWED)
def test_latents_have_the_law_of_guide_or_prior_and_data_that_of_the_likelihood_of_the_same_draw(make, parallel):
    vae = make()
    tree = tree_of(vae, draws=DRAWS[parallel], parallel=parallel)
    assert_moments(drawn(tree, "z"), *moments(vae.encode(X)))
    assert_moments(drawn(tree, "z", "prior"), *moments(vae.prior().expand([N])))
    for group in ("posterior", "prior"):
        likelihood, x = vae.decode(drawn(tree, "z", group)), drawn(tree, "x", f"{group}_predictive")
        noise = ((x - likelihood.mean) / likelihood.stddev).detach()
        assert kstest(noise.flatten(), "norm").pvalue > UNLIKELY
        assert_moments(noise, torch.zeros(N, 3), torch.ones(N, 3))
        assert not (x == X).any(), "the observed data are repeated"
        assert (x.std(0) > 0).all(), "the draws are all the same"
        assert len(x.flatten().unique()) > 0.99 * x.numel(), "noise is shared"


def test_draws_of_a_users_pair_have_the_law_computed_by_hand(parallel):
    tree = shared_tree(draws=DRAWS[parallel], parallel=parallel)
    x, one = X[:, 0], torch.ones(N)
    assert_moments(drawn(tree, "mu"), torch.tensor(0.7), torch.tensor(0.3**2))
    assert_moments(drawn(tree, "z"), 0.5 * x, 0.4**2 * one)
    assert_moments(drawn(tree, "x", "posterior_predictive"), 0.5 * x, (0.4**2 + 0.5**2) * one)
    assert_moments(drawn(tree, "mu", "prior"), torch.tensor(1.0), torch.tensor(0.5**2))
    assert_moments(drawn(tree, "z", "prior"), one, (0.5**2 + 1) * one)
    assert_moments(drawn(tree, "x", "prior_predictive"), one, (0.5**2 + 1 + 0.5**2) * one)
    # z given the mu of the same draw is N(mu, 1): the draws of the sites belong together.
    assert_moments(drawn(tree, "z", "prior") - drawn(tree, "mu", "prior")[:, None], 0 * one, one)
    assert not (drawn(tree, "x", "posterior_predictive") == x).any()


@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_deterministic_values_are_those_of_the_same_draw(group, parallel):
    for make in (SKEWED["relaxed"], SKEWED["gumbel"]):
        vae = make()
        tree = tree_of(vae, parallel=parallel)
        torch.testing.assert_close(drawn(tree, "code", group), vae.code(drawn(tree, "z", group)))
    shared = shared_tree(parallel=parallel)
    torch.testing.assert_close(drawn(shared, "twice", group), 2 * drawn(shared, "z", group))


def test_a_guide_marked_for_enumeration_is_sampled():
    vae = bernoulli()
    tree = pv.to_datatree(vae.model, config_enumerate(vae.guide), X, draws=DRAWS[False])
    assert set(np.unique(tree["posterior"]["z"])) == {0, 1}
    assert_moments(drawn(tree, "z"), *moments(vae.encode(X)))


def test_one_seed_reproduces_the_draws_and_another_gives_others(parallel):
    first, again, other = (shared_tree(seed=seed, parallel=parallel) for seed in (0, 0, 1))
    for group in GROUPS:
        assert first[group].to_dataset().equals(again[group].to_dataset())
    for group in DRAWN:
        for name in first[group].data_vars:
            assert not np.isclose(first[group][name], other[group][name]).any(), (group, name)


def test_random_streams_parameters_and_validation_are_unchanged(random_states, parallel, tmp_path):
    vae = gaussian()
    vae.register()
    shared_guide(X[:, 0])
    state = random_states()
    stored = {name: value.clone() for name, value in pyro.get_param_store().named_parameters()}
    with pyro.validation_enabled(False):
        tree_of(vae, parallel=parallel)
        shared_tree(parallel=parallel)
        pv.save_draws(tmp_path / "draws.nc", *SHARED, draws=20, parallel=parallel)
        assert not torch.distributions.Distribution._validate_args
    assert random_states() == state
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_the_guide_group_takes_no_random_numbers_of_the_seed(parallel, monkeypatch):
    vae = gaussian()
    with_check = tree_of(vae, parallel=parallel)
    monkeypatch.setattr(JointSampler, "parametric_latents", lambda self: self.latents)
    without = tree_of(vae, parallel=parallel)
    for group in DRAWN:
        assert with_check[group].to_dataset().equals(without[group].to_dataset()), group


@pytest.mark.parametrize("name", VAES)
def test_the_guide_group_holds_the_parameters_of_each_q(name):
    vae = VAES[name]()
    expected = {"gaussian": ["loc", "scale"], "bernoulli": ["probs"], "one_hot": ["probs"]}
    names = expected.get(name, ["temperature", "logits"])
    group, q = tree_of(vae)["guide"], vae.encode(X)
    while isinstance(q, dist.Independent):
        q = q.base_dist
    assert list(group.data_vars) == [f"z_{name}" for name in names]
    for name in names:
        value, found = getattr(q, name).detach(), group[f"z_{name}"]
        assert found.dims == ("obs", "latent", "category")[: found.ndim]
        np.testing.assert_allclose(found, value.expand(found.shape), rtol=1e-6)


@pytest.mark.parametrize("known_by", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_the_columns_of_a_covariance_have_a_dimension_of_their_own(known_by, tmp_path):
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    roots = {"precision_matrix": torch.linalg.inv, "scale_tril": torch.linalg.cholesky}
    matrix = {known_by: roots.get(known_by, torch.clone)(covariance)}
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    pair = local_pair(prior, lambda x: dist.MultivariateNormal(x, **matrix))
    names = {"dims": {"z": ["axis"]}, "coords": {"axis": ["width", "height"]}}
    group = pv.to_datatree(*pair, X[:, :2], draws=3, **names)["guide"]
    assert dims_of(group) == {"z_loc": ("obs", "axis"), "z_covariance_matrix": ("obs", "axis", "axis_bis")}
    assert list(group.coords["axis_bis"].values) == ["width", "height"]
    np.testing.assert_allclose(group["z_loc"], X[:, :2])
    assert group["z_covariance_matrix"].sel(obs=4, axis="width", axis_bis="height").item() == pytest.approx(0.5)
    np.testing.assert_allclose(group["z_covariance_matrix"][3], covariance, rtol=1e-5)
    plain = pv.to_datatree(*pair, X[:, :2], draws=3)
    assert plain["guide"]["z_covariance_matrix"].dims == ("obs", "latent", "latent_bis")
    np.testing.assert_array_equal(plain["guide"].coords["latent_bis"], [0, 1])
    assert_file_holds(tmp_path / "run.nc", plain)


def test_global_and_local_parameters_of_a_users_guide():
    group = shared_tree()["guide"]
    assert dims_of(group) == {"mu_loc": (), "mu_scale": (), "z_loc": ("obs",), "z_scale": ("obs",)}
    assert group["mu_loc"].item() == pytest.approx(0.7)
    np.testing.assert_allclose(group["z_loc"], 0.5 * X[:, 0])
    np.testing.assert_allclose(group["z_scale"], np.full(N, 0.4), rtol=1e-6)


@pytest.mark.parametrize("classes", [4, N])
def test_probabilities_of_classes_have_a_dimension_of_their_own(classes):
    logits = torch.arange(float(classes))
    pair = local_pair(dist.Categorical(torch.ones(classes)), lambda x: dist.Categorical(logits=logits * x[:, None]))
    group = pv.to_datatree(*pair, X[:, 0], draws=3, coords={"obs": list("abcdef")})["guide"]
    assert dims_of(group) == {"z_probs": ("obs", "z_probs_1")}
    np.testing.assert_array_equal(group.coords["z_probs_1"], np.arange(classes))
    np.testing.assert_allclose(group["z_probs"], (logits * X[:, :1]).softmax(-1), rtol=1e-6)


@pytest.mark.parametrize(("q", "axes"), [
    (dist.MixtureOfDiagNormals(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2)),
     {"locs": 2, "coord_scale": 2, "component_logits": 1}),
    (MixtureOfNormals(torch.zeros(2), torch.zeros(2, 2), torch.ones(2, 2)), {"logits": 1, "loc": 2, "scale": 2}),
])  # fmt: skip
def test_components_have_a_dimension_of_their_own_even_if_they_are_as_many_as_axes(q, axes):
    group = pv.to_datatree(*local_pair(q, lambda x: q), X[:, :2], draws=3, coords={"obs": list("abcdef")})["guide"]
    expected = {f"z_{name}": ("obs", *(f"z_{name}_{axis + 1}" for axis in range(axes[name]))) for name in axes}
    assert dims_of(group) == expected
    assert all((group.coords[dim] == [0, 1]).all() for dim in set(group.dims) - {"obs"})


def test_scalar_parameters_are_repeated_for_each_datum():
    """Pyro's AffineBeta keeps two of its parameters without the plate."""
    q = dist.AffineBeta(*map(torch.tensor, (2.0, 3.0, -1.0, 4.0)))
    group = pv.to_datatree(*local_pair(q, lambda x: q), X[:, 0], draws=3)["guide"]
    expected = {"z_concentration1": 2.0, "z_concentration0": 3.0, "z_loc": -1.0, "z_scale": 4.0}
    assert dims_of(group) == dict.fromkeys(expected, ("obs",))
    for name, value in expected.items():
        np.testing.assert_array_equal(group[name], np.full(N, value))


@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize("first", [dist.Normal(0.0, 1.0), dist.Bernoulli(0.5)], ids=["continuous", "discrete"])
def test_a_latent_that_depends_on_the_draw_of_another_has_no_parameters(first, count):
    """Its mean differs from draw to draw, and is not that of q(z | x)."""

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
        assert {name.partition("_")[0] for name in tree["guide"].data_vars} == {"first", "third"}
        assert set(tree["posterior"].data_vars) == {"first", "second", "third"}
        np.testing.assert_array_equal(tree["guide"]["third_loc"], X[:count, 0])


@pytest.mark.parametrize("pair", [
    lambda: (shared_model, AutoNormal(shared_model)), lambda: (shared_model, AutoDiagonalNormal(shared_model)),
    lambda: local_pair(dist.LogNormal(0.0, 1.0), lambda x: dist.TransformedDistribution(
        dist.Normal(x, torch.ones(N)), [dist.transforms.ExpTransform()])),
], ids=["AutoNormal", "AutoDiagonalNormal", "transformed"])  # fmt: skip
def test_a_transformed_draw_has_no_guide_group(pair):
    groups = list(pv.to_datatree(*pair(), X[:, 0], draws=3).children)
    assert [name for name in groups if name != "log_likelihood"] == GROUPS[:-1]


def test_the_guide_group_of_a_point_holds_the_point():
    guide = AutoDelta(shared_model)
    guide(X[:, 0])
    group = pv.to_datatree(shared_model, guide, X[:, 0], draws=3)["guide"]
    assert dims_of(group) == {"mu_v": (), "z_v": ("obs",)}
    np.testing.assert_array_equal(group["z_v"], guide.median()["z"].detach())


def test_the_users_names_and_coordinates():
    coords = {"obs": list("abcdef"), "axis": ["width", "height"], "pixel": [10, 20, 30]}
    tree = tree_of(gaussian(), dims={"z": ["axis"], "x": ["pixel"]}, coords=coords)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "axis")
    assert tree["posterior"]["z"].sel(obs="c", axis="height").shape == (1, 20)
    assert tree["observed_data"]["x"].sel(obs="b", pixel=20).item() == X[1, 1]
    assert list(tree["prior_predictive"]["x"].coords["pixel"]) == [10, 20, 30]
    # A dimension may have the name that columns of a covariance would have.
    tree = tree_of(gaussian(), dims={"z": ["a_bis"]})
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "a_bis")
    assert tree["guide"]["z_scale"].dims == ("obs", "a_bis")
    np.testing.assert_array_equal(tree["guide"].coords["a_bis"], [0, 1])


@pytest.mark.parametrize(("plate", "expected"), [("days", ("people", "obs")), ("people", ("obs", "days"))])
def test_other_plates_are_dimensions(plate, expected):
    tree = pv.to_datatree(*TWO_PLATES, draws=3, plate=plate)
    assert tree["posterior"]["z"].dims == ("chain", "draw", *expected)
    assert dims_of(tree["guide"]) == {"z_loc": expected, "z_scale": expected}
    for values in (tree["observed_data"]["x"], tree["guide"]["z_loc"]):
        np.testing.assert_array_equal(values, TWO_PLATES[2])


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


def test_further_coordinates_may_be_strings_and_stand_next_to_names(tmp_path):
    animals = ["a cat", "a dog", "a cat", "a fox", "a dog", "a cat"]
    coords = {"obs": ("obs", list("abcdef")), "kind": ("obs", animals), "unit": ("latent", ["mm", "s"])}
    tree = tree_of(gaussian(), coords=coords)
    assert tree["posterior"]["z"].sel(obs="d").coords["kind"].item() == "a fox"
    assert list(tree["prior"].coords["unit"].values) == ["mm", "s"]
    assert "unit" not in tree["observed_data"].coords
    assert tree["guide"]["z_loc"].groupby("kind").mean().sizes["kind"] == 3
    assert_file_holds(tmp_path / "run.nc", tree)


@pytest.mark.parametrize("two", [("width", "height"), (10, 20), (0.5, 1.5)])
def test_two_values_in_a_tuple_are_the_coordinates_of_a_dimension(two):
    tree = tree_of(gaussian(), coords={"latent": two})
    assert tuple(tree["posterior"].coords["latent"].values) == two


@pytest.mark.parametrize(("options", "message"), [
    ({"dims": {"x": ["row", "column"]}}, r"`dims` .*, got \['row', 'column'\] for 'x', whose event .* \(3,\)"),
    ({"dims": {"z": ["axis"], "x": ["axis"]}}, r"`dims` .*, got 'axis' of size 3 for 'x', and of size 2 elsewhere"),
    ({"dims": {"x": ["draw"]}}, r"`dims` must have different names .* 'x', got \['chain', 'draw', 'obs', 'draw'\]"),
    ({"dims": {"x": ["obs"]}}, r"`dims` must have different names .* 'x', got \['chain', 'draw', 'obs', 'obs'\]"),
    ({"coords": {"pixel": [1, 2, 3]}}, r"`coords` must .*'feature': 3.*, got 3 entries for 'pixel'$"),
    ({"coords": {"label": ("obs", [1, 2])}}, r"`coords` must .*'obs': 6.*, got 2 entries for 'label' along 'obs'"),
    ({"coords": {"label": ("row", [1, 2])}}, r"`coords` must .*'obs': 6.*, got 2 entries for 'label' along 'row'"),
    ({"coords": {"label": ("obs", [[1] * 6])}}, r"`coords` must .*, got shape \(1, 6\) for 'label' along 'obs'"),
    ({"coords": {"label": list(range(6))}}, r"`coords` must .*'obs': 6.*, got 6 entries for 'label'$"),
    ({"coords": {"z": ("obs", list(range(6)))}}, "`coords` must have other names than the variables, got 'z'"),
    ({"coords": {"x": ("obs", list(range(6)))}}, "`coords` must have other names than the variables, got 'x'"),
    ({"coords": {"z_loc": ("obs", list(range(6)))}}, "`coords` must .* parameters of the guide, got 'z_loc'"),
    ({"coords": {"obs": ("latent", [1, 2])}}, "`coords` must .* dimension 'obs' along it, got 'latent'"),
    ({"coords": {"latent": 3}}, r"`coords` must .*, got shape \(\) for 'latent'"),
    ({"coords": {"label": ("obs", 3)}}, r"`coords` must .*, got shape \(\) for 'label' along 'obs'"),
    ({"coords": {"lp": ("obs", range(N))}}, "`coords` must have other names than the variables, got 'lp'"),
    ({"history": {"elbo": 3.0}}, r"`history` must be .*one number per epoch, got 'elbo' of shape \(\)"),
    ({"history": {"elbo": ["a"]}}, "`history` must .*got 'elbo' of shape .* and dtype <U1"),
    ({"history": {"a": [1], "b": [1, 2]}}, "`dims` must .*got 'epoch' of size 2 for 'b', and of size 1 elsewhere"),
    ({"constant_data": {"z": [1.0]}}, "`constant_data` must have other names than the sites, got 'z'"),
    ({"constant_data": {"c": np.eye(N)}, "dims": {"c": ["obs", "a", "b"]}},
     r"`dims` must .* 'c' in `constant_data`, of shape \(6, 6\), got \['obs', 'a', 'b'\]"),
    ({"constant_data": {"c": [1]}, "dims": {"y": ["a"]}}, r"`dims` .* of \['c', 'x', 'z'\], got \['y'\]"),
    ({"max_bytes": 0}, "`max_bytes` must be a positive integer, got 0"),
    ({"max_bytes": 1000}, "at most 1000 bytes.*of 6240 bytes.*fewer draws.*fewer rows.*save_draws"),
])  # fmt: skip
def test_names_values_and_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tree_of(gaussian(), **options)


def test_more_than_four_gibibytes_are_refused_with_their_size_before_they_are_drawn():
    draws = 4 * 2**30 // (per_draw := 4 * N * (2 * (2 + 3) + 3)) + 1
    with pytest.raises(ValueError, match=rf"`draws` must .*, got {draws} draws of z, x .* of {draws * per_draw} bytes"):
        tree_of(gaussian(), draws=draws)


def test_a_guide_without_a_latent_of_the_model_is_refused():
    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"`guide` must draw the latents of the model, \['mu', 'z'\], got \['mu'\]"):
        pv.to_datatree(shared_model, guide, X[:, 0], draws=3)


def test_a_process_without_pyro_or_torch_reads_the_file(tmp_path):
    tree = shared_tree()
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    heavy, groups, dims, mean = run_program(
        "import json, sys, xarray\n"
        "tree = xarray.open_datatree(sys.argv[1])\n"
        "heavy = [name for name in ('torch', 'pyro', 'pyro_vae', 'arviz') if name in sys.modules]\n"
        "mean = float(tree['posterior']['z'].mean())\n"
        "print(json.dumps([heavy, list(tree.children), list(tree['posterior']['z'].dims), mean]))\n",
        tmp_path / "run.nc",
    )
    assert (heavy, groups, dims) == ([], WITH_LIKELIHOOD, ["chain", "draw", "obs"])
    assert mean == pytest.approx(float(tree["posterior"]["z"].mean()))


def test_exports_and_exact_answers_import_heavy_libraries_only_when_they_are_called():
    heavy = {"xarray", "pandas", "h5netcdf", "arviz", "matplotlib", "sklearn", "scipy"}
    modules = "pyro_vae.inference_data.datatree, pyro_vae.exact"
    assert run_program(f"import json, sys, {modules}; print(json.dumps(sorted({heavy} & sys.modules.keys())))") == []
