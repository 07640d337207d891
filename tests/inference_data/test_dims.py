"""Names of variables and dimensions: those of the sites, whatever they are called, and the same numbers under each."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.contrib.autoname import scope

import pyro_vae as pv
from pyro_vae.distributions.relaxed import LogitRelaxedBernoulli
from pyro_vae.inference_data.dims import variable_names

N, DRAWS = 4, 3
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
DIMS = {"z": ("obs", "latent"), "x": ("obs", "feature")}

NAMES = {  # latent and observed site: their variables, and the dimensions that have another name
    ("z", "x"): ("z", "x", {}),
    ("latent", "obs"): ("latent", "obs", {"obs": "obs_dim", "latent": "latent_dim"}),
    ("obs", "obs_dim"): ("obs", "obs_dim", {"obs": "obs_dim_dim"}),
    ("feature", "y"): ("feature", "y", {"feature": "feature_dim"}),
    ("draw", "chain"): ("draw_site", "chain_site", {}),
    ("sample", "x"): ("sample_site", "x", {}),
    ("posterior", "observed_data"): ("posterior", "observed_data", {}),
    ("a/z", "a/x"): ("a.z", "a.x", {}),
    ("a/b//z", "a.b..z"): ("a.b..z_", "a.b..z", {}),
    ("/obs", "obs/"): ("_.obs", "obs.", {}),
    ("é", "ünïcode"): ("é", "ünïcode", {}),
    ("e\N{COMBINING ACUTE ACCENT}", "é"): ("é_", "é", {}),
    (" z", "x\n"): ("_.z", "x.", {}),
    ("z_loc", "lp"): ("z_loc", "lp", {}),
}  # fmt: skip


def pair_of(latent="z", observed="x"):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(latent, dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample(observed, dist.Normal(z.sum(-1, keepdim=True), x.new_ones(3)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(latent, dist.Normal(x[:, :2] / 2, 0.5).to_event(1))

    return model, guide


def renamed(tree, variables, dims):
    """The tree of the sites z and x, with these names for its variables and dimensions."""
    groups = {}
    for name, group in tree.children.items():
        found = {key: variables.get(key.partition("_")[0], key) + key[1:] for key in group.data_vars if key[0] in "zx"}
        groups[name] = group.to_dataset().rename({**found, **{d: new for d, new in dims.items() if d in group.dims}})
    return groups


@pytest.mark.parametrize("names", NAMES)
def test_a_tree_has_the_same_numbers_whatever_the_sites_are_called(names, tmp_path):
    latent, observed, dims = NAMES[names]
    tree = pv.to_datatree(*pair_of(*names), X, draws=DRAWS, history={"elbo": [1.0]})
    plain = pv.to_datatree(*pair_of(), X, draws=DRAWS, history={"elbo": [1.0]})
    for name, group in renamed(plain, {"z": latent, "x": observed}, dims).items():
        xr.testing.assert_equal(tree[name].to_dataset(), group)
    for name, site in ((latent, names[0]), (observed, names[1])):
        group = tree["posterior" if site == names[0] else "observed_data"]
        assert group[name].attrs == ({} if name == site else {"site": site})
    path = pv.save_draws(tmp_path / "draws.nc", *pair_of(*names), X, draws=DRAWS, chunk=2, history={"elbo": [1.0]})
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    for file in (path, tmp_path / "tree.nc"):
        with xr.open_datatree(file) as loaded:
            xr.testing.assert_equal(loaded.load(), tree)
            assert loaded["posterior"][latent].attrs == tree["posterior"][latent].attrs


@pytest.mark.parametrize("names", [("latent", "obs"), ("draw", "chain"), ("sample", "x"), ("a/z", "x"), ("é", "x")])
def test_arviz_0_summarises_a_tree_of_any_names_and_stacks_its_draws(names, az):
    tree = pv.to_datatree(*pair_of(*names), X, draws=DRAWS)
    data, variable = pv.to_arviz(tree), NAMES.get(names, (names[0],))[0].replace("/", ".")
    summary = az.summary(data, var_names=[variable], kind="stats")
    np.testing.assert_allclose(summary["mean"], tree["posterior"][variable].values[0].mean(0).ravel(), atol=1e-3)
    assert az.extract(data, var_names=[variable]).sizes["sample"] == DRAWS


@pytest.mark.parametrize("names", [("latent", "obs"), ("draw", "x"), ("a/z", "chain")])
def test_a_reference_has_the_names_of_the_guides_tree(names):
    model, guide = pair_of(*names)
    tree = pv.reference(model, X, draws=4, warmup=4, chains=2)
    ours = pv.to_datatree(model, guide, X, draws=4)
    for group in ("posterior", "observed_data"):
        theirs = {name: (values.dims, values.attrs) for name, values in tree[group].data_vars.items()}
        assert theirs == {name: (values.dims, values.attrs) for name, values in ours[group].data_vars.items()}


def test_the_names_that_autoname_scopes_make_are_exported():
    model, guide = (scope(run, prefix="outer") for run in pair_of("scoped/z", "x"))
    tree = pv.to_datatree(model, guide, X, draws=3)
    assert list(tree["posterior"].data_vars) == ["outer.scoped.z"]
    assert list(tree["guide"].data_vars) == ["outer.scoped.z_loc", "outer.scoped.z_scale"]


def test_keys_of_dims_are_the_names_of_sites():
    tree = pv.to_datatree(*pair_of("a/z", "obs"), X, draws=3, dims={"a/z": ["axis"], "obs": ["pixel"]})
    assert tree["posterior"]["a.z"].dims == ("chain", "draw", "obs_dim", "axis")
    assert tree["posterior_predictive"]["obs"].dims == ("chain", "draw", "obs_dim", "pixel")


@pytest.mark.parametrize("plate", ["obs", "latent", "draw", "a/b"])
def test_another_plate_may_have_the_name_of_a_dimension(plate):
    def model(x):
        with pyro.plate(plate, 2, dim=-2), pyro.plate("data", N, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))[..., 0], 1.0),
                        obs=x)  # fmt: skip

    def guide(x):
        with pyro.plate(plate, 2, dim=-2), pyro.plate("data", N, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    tree = pv.to_datatree(model, guide, X[:, :2].T, draws=3)
    other = {"latent": "latent", "a/b": "a.b"}.get(plate, f"{plate}_dim")
    assert tree["posterior"]["z"].dims == (
        "chain",
        "draw",
        other,
        "obs",
        "latent_dim" if plate == "latent" else "latent",
    )


def test_parameters_of_two_latents_never_share_a_variable():
    """The mixture of z has ``component_logits``, and a site called ``z_component`` has ``logits``."""

    def model(x):
        with pyro.plate("data", N):
            pyro.sample("z_component", LogitRelaxedBernoulli(0.5, torch.zeros(N)))
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z_component", LogitRelaxedBernoulli(0.5, x[:, 0]))
            pyro.sample("z", dist.MixtureOfDiagNormals(torch.zeros(N, 2, 1), torch.ones(N, 2, 1), x[:, :2]))

    found = pv.to_datatree(model, guide, X, draws=3)["guide"]
    np.testing.assert_array_equal(found["z_component_logits"], X[:, 0])
    np.testing.assert_allclose(found["z_component_logits_"], X[:, :2], rtol=1e-5)


@pytest.mark.parametrize(("names", "options", "message"), [
    (("z", "obs"), {"coords": {"label": ("obs", range(N))}},
     "`coords` must lie along a dimension.* got 'label' along 'obs', .* a site: the dimension is called 'obs_dim'"),
    (("latent", "x"), {"coords": {"latent": [0, 1]}}, "`coords` .* is a site: the dimension is called 'latent_dim'"),
    (("z", "label"), {"coords": {"label": ("obs", range(N))}}, "`coords` must have other names than .* got 'label'"),
    (("a/label", "x"), {"coords": {"a.label": ("obs", range(N))}}, "`coords` must have other names .* got 'a.label'"),
    (("z", "x"), {"coords": {"a/b": ("obs", range(N))}}, "`coords` must have names .* such as 'a.b', got 'a/b'"),
    (("z", "x"), {"dims": {"x": ["z"]}}, "`dims` must have other names than the sites, got 'z' for 'x'"),
    (("z", "x"), {"dims": {"x": ["a/b"]}}, "`dims` must have names .* such as 'a.b', got 'a/b'"),
    (("z", "x"), {"constant_data": {"a/b": 1.0}}, "`constant_data` must have names .*, got 'a/b'"),
    (("z", "x"), {"constant_data": {"obs": torch.zeros(N)}}, "`constant_data` .* other names than dim.*, got 'obs'"),
    (("a/z", "x"), {"constant_data": {"a.z": 1.0}}, "`constant_data` must have other names than the sites, got 'a.z'"),
    (("z", "x"), {"history": {"train/elbo": [1.0]}}, "`history` must have names .* got 'train/elbo'"),
    (("z", "x"), {"history": {"epoch": [1.0]}}, "`history` must have other names .* got 'epoch'"),
])  # fmt: skip
def test_names_of_the_user_that_are_taken_or_that_a_file_refuses_are_named_before_any_draw(names, options, message):
    model, guide = pair_of(*names)
    runs = []

    def counted(x):
        runs.append(1)
        guide(x)

    with pytest.raises(ValueError, match=message):
        pv.to_datatree(model, counted, X, draws=1000, **options)
    assert len(runs) <= 4


def test_different_sites_have_different_variables_and_a_name_that_is_allowed_stays():
    sites = ["a/b", "a.b", "a.b_", "a//b", "chain", "chain_site", "", "1", "z ", "z."]
    names = variable_names(sites)
    assert len(set(names.values())) == len(sites)
    assert all(names[site] == site for site in ("a.b", "a.b_", "chain_site", "1", "z."))
