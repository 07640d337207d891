"""Values of sites in any plates, and their masks: an array has a dimension for each plate, and NaN for a mask."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from tree_checks import assert_file_holds, dims_of, drawn

import pyro_vae as pv
from pyro_vae.inference_data.layouts import SiteLayout, counted_cells

LENGTHS = torch.tensor([3, 1, 2])


def site_of(model, name):
    return poutine.trace(model).get_trace().nodes[name]


def test_plates_that_a_site_lacks_leave_no_dimension():
    def model():
        people, days = pyro.plate("people", 4, dim=-3), pyro.plate("days", 5, dim=-1)
        with people, days:
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    site = site_of(model, "z")
    layout = SiteLayout(site)
    assert (layout.plates, layout.event, layout.shape) == ({"people": 4, "days": 5}, (2,), (4, 5, 2))
    assert torch.equal(layout.values(site), site["value"][:, 0])


@pytest.mark.parametrize(("make", "expected"), [
    (lambda z: z.sum(), ()),  # the same for all cells
    (lambda z: z, (5,)),
    (lambda z: z[:, None] * torch.ones(3), (5, 3)),
], ids=["one", "each", "vector"])  # fmt: skip
def test_a_deterministic_site_in_a_plate_has_its_dimension_if_it_has_a_value_for_each_cell(make, expected):
    def model():
        with pyro.plate("data", 5):
            pyro.deterministic("f", make(pyro.sample("z", dist.Normal(0.0, 1.0))))

    layout = SiteLayout(site_of(model, "f"))
    assert layout.shape == expected
    assert layout.plates == ({"data": 5} if expected else {})


def test_a_batch_without_a_plate_is_an_event():
    layout = SiteLayout(site_of(lambda: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0)), "z"))
    assert (layout.plates, layout.event) == ({}, (3,))


@pytest.mark.parametrize("fn", [
    lambda m: dist.Normal(torch.zeros(2, 3), 1.0).mask(m),
    lambda m: dist.Normal(torch.zeros(2, 3), 1.0).mask(m).to_event(1),
    lambda m: dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1).mask(m).to_event(1),
])  # fmt: skip
def test_cells_that_count_are_those_whose_value_changes_the_density(fn):
    mask = torch.tensor([[True, False, True], [False, False, True]])
    site = site_of(lambda: pyro.sample("z", fn(mask)), "z")
    counted = counted_cells(site).expand(site["value"].shape)
    value = site["value"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(site["fn"].log_prob(value).sum(), value)
    assert torch.equal(counted, slope != 0)


def ragged_model(x, lengths):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        z = 0
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.stack([p, 1 - p])[torch.as_tensor(z).long()]))
                pyro.sample(f"x_{t}", dist.Poisson(1.0 + 3 * z), obs=x[:, t])


def ragged_guide(x, lengths):
    pyro.sample("p", dist.Beta(3.0, 3.0))
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            with poutine.mask(mask=t < lengths):
                pyro.sample(f"z_{t}", dist.Bernoulli(0.4))


@pytest.mark.parametrize("guide", [ragged_guide, lambda x, lengths: pyro.sample("p", dist.Beta(3.0, 3.0))],
                         ids=["drawn", "summed out"])  # fmt: skip
def test_padded_steps_of_sequences_are_nan_in_every_group(guide, parallel, tmp_path):
    x = torch.poisson(torch.full((3, 3), 2.0), generator=torch.Generator().manual_seed(0))
    tree = pv.to_datatree(ragged_model, guide, x, LENGTHS, draws=5, parallel=parallel)
    for t in range(3):
        counted = (t < LENGTHS).numpy()
        of_groups = {"posterior": "z", "prior": "z", "posterior_predictive": "x", "prior_predictive": "x"}
        for group, site in of_groups.items():
            values = tree[group][f"{site}_{t}"].values
            np.testing.assert_array_equal(~np.isnan(values), np.broadcast_to(counted, values.shape))
        np.testing.assert_array_equal(tree["observed_data"][f"x_{t}"], np.where(counted, x[:, t], np.nan))
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw")
    assert bool(tree["sample_stats"]["lp"].notnull().all())
    assert_file_holds(tmp_path / "run.nc", tree)


def test_masks_of_observations():
    """``obs_mask`` makes a latent for what is not observed; both have NaN where the other one has values."""
    x, seen = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=seen)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=~seen):
            pyro.sample("x_unobserved", dist.Normal(0.0, 1.0))

    tree = pv.to_datatree(model, guide, x, draws=4)
    np.testing.assert_array_equal(tree["observed_data"]["x_observed"], [1, np.nan, 3])
    drawn_again = drawn(tree, "x_observed", "posterior_predictive")
    assert torch.equal(drawn_again.isfinite(), seen.expand(4, 3))
    assert torch.equal(drawn(tree, "x_unobserved").isfinite(), ~seen.expand(4, 3))
    assert bool(drawn(tree, "x").isfinite().all())
    assert torch.equal(drawn(tree, "x")[:, seen], x[seen].expand(4, 2))


def test_plates_of_odd_and_equal_names_have_dimensions_of_their_own(tmp_path):
    def model(x):
        with pyro.plate("chain", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("obs", 3):
            pyro.sample("sample", dist.Normal(0.0, 1.0))
        with pyro.plate("a/b"):  # without a size, it has those of its sites
            pyro.sample("c", dist.Normal(torch.zeros(4), 1.0))
        with pyro.plate("a.b", 2):
            pyro.sample("d", dist.Normal(0.0, 1.0))
        for i in pyro.plate("loop", 2):
            pyro.sample(f"e_{i}", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    tree = pv.to_datatree(model, poutine.block(model, hide=["x"]), torch.zeros(5), draws=3)
    assert {name: dims[2:] for name, dims in dims_of(tree["posterior"]).items()} == {
        "a": ("chain_dim",), "sample_site": ("obs_dim",), "c": ("a.b",), "d": ("a.b_dim",), "e_0": (), "e_1": (),
    }  # fmt: skip
    assert tree["observed_data"]["x"].dims == ("obs",)
    assert_file_holds(tmp_path / "run.nc", tree)


def test_sites_that_only_some_runs_have_are_refused_with_what_to_do():
    def model(x):
        count = pyro.sample("count", dist.Bernoulli(0.5))
        if count > 0:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        if pyro.sample("count", dist.Bernoulli(0.5)) > 0:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for seed in range(4):  # the first run has the site, or it has not
        with pytest.raises(ValueError, match=r"must have the same sites in each run, got .* without \['z'\]"):
            pv.to_datatree(model, guide, torch.zeros(2), draws=20, seed=seed)


def test_programs_without_a_plate_and_without_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    tree = pv.to_datatree(model, lambda: pyro.sample("z", dist.Normal(1.0, 0.5**0.5)), draws=30)
    z = drawn(tree, "z")
    lp = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(2.0))
    torch.testing.assert_close(drawn(tree, "lp", "sample_stats"), lp.double(), rtol=1e-5, atol=1e-5)
    assert tree["sample_stats"]["khat"].item() < 0.5  # this guide is the posterior
