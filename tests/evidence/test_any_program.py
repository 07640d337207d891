"""Evidence of programs of any form: global latents, groups, masks, discrete latents that are summed out.

Each estimate is compared with a closed form, a quadrature, or a sum by hand.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroParam

import pyro_vae as pv
from pyro_vae.exact.model_density import CellLayout

N = 20


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_model(x):
    """mu ~ N(0, 2²), x_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=x)


def mean_evidence(x):
    covariance = torch.eye(len(x), dtype=torch.double) + 4.0
    return dist.MultivariateNormal(torch.zeros(len(x), dtype=torch.double), covariance).log_prob(x.double()).item()


def mean_posterior(x):
    variance = 1 / (1 / 4 + len(x))
    return variance * x.sum(), variance**0.5


def mean_guide(x):
    """The posterior, a fifth wider."""
    mean, scale = mean_posterior(x)
    pyro.sample("mu", dist.Normal(mean, 1.2 * scale))


def exact_autoguide(autoguide, x):
    """An autoguide of the model whose density is the posterior, a fifth wider."""
    guide = autoguide(mean_model)
    guide(x)
    mean, scale = mean_posterior(x)
    if isinstance(guide, AutoNormal):
        guide.locs.mu, guide.scales.mu = PyroParam(mean), PyroParam(torch.tensor(1.2 * scale))
    else:
        guide.loc = PyroParam(mean.reshape(1))
        guide.scale = PyroParam(torch.full((1,), 1.2 * scale))
        if isinstance(guide, AutoMultivariateNormal):
            guide.scale_tril = PyroParam(torch.eye(1))
    return guide


@pytest.mark.parametrize("guide", [None, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_global_latent_has_one_evidence_for_all_data(guide):
    x = data(N) + 1
    guide = mean_guide if guide is None else exact_autoguide(guide, x)
    found = pv.log_evidence(mean_model, guide, x, num_samples=2000)
    assert found.log_evidence.shape == found.ess.shape == found.khat.shape == ()
    assert found.plates == ()
    assert not found.unreliable
    assert abs(found.log_evidence.item() - mean_evidence(x)) < 4 * found.standard_error.item()
    annealed = pv.annealed_log_evidence(mean_model, guide, x, num_chains=100, num_temperatures=10)
    assert annealed.log_evidence.shape == ()
    assert abs(annealed.log_evidence.item() - mean_evidence(x)) < 4 * annealed.standard_error.item()


def test_the_evidence_of_all_data_says_so():
    x = data(N) + 1
    found = pv.log_evidence(mean_model, mean_guide, x)
    assert str(found).startswith("log p(x) of all data, in expectation at least -")
    assert "nats of all data" in repr(found)
    assert "log p(x) of all data" in found._repr_html_()
    compiled = pv.log_evidence(mean_model, mean_guide, x, compile=True)
    assert abs(compiled.log_evidence - found.log_evidence) < 5 * found.standard_error


def grouped(y):
    """For each of G groups (m, s) ~ N(0, 1) LogNormal(0, 0.5), y ~ N(m, s)."""
    with pyro.plate("group", len(y), dim=-2):
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([1]))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5).expand([1]))
        with pyro.plate("data", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(m, s), obs=y)


def group_guide(y):
    with pyro.plate("group", len(y), dim=-2):
        pyro.sample("m", dist.StudentT(4.0, y.mean(1, True), 0.6))
        pyro.sample("s", dist.LogNormal(y.std(1, keepdim=True).log(), 0.5))


def grouped_evidence(y):
    m, log_s = torch.meshgrid(torch.linspace(-7, 7, 500).double(), torch.linspace(-4, 4, 400).double(), indexing="ij")
    log_p = dist.Normal(0.0, 1.0).log_prob(m) + dist.Normal(0.0, 0.5).log_prob(log_s)
    likelihood = dist.Normal(m[..., None], log_s.exp()[..., None]).log_prob(y.double()[:, None, None]).sum(-1)
    return (log_p + likelihood).flatten(1).logsumexp(1) + math.log(14 / 499 * 8 / 399)


def test_latents_of_groups_have_an_evidence_for_each_group():
    y = data(4, 6) + data(4, 1, seed=1)
    expected = grouped_evidence(y)
    found = pv.log_evidence(grouped, group_guide, y, num_samples=5000)
    assert found.plates == ("group",)
    assert found.log_evidence.shape == (4,)
    assert ((found.log_evidence - expected).abs() < 4 * found.standard_error + 1e-4).all()
    annealed = pv.annealed_log_evidence(grouped, group_guide, y, num_chains=200, num_temperatures=20)
    assert ((annealed.log_evidence - expected).abs() < 4 * annealed.standard_error + 1e-4).all()
    assert "nats per cell of 'group'" in str(found)


def crossed(y):
    """a_i + b_j + noise, with both effects over their own plate."""
    rows, columns = pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([1]))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 0.5))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def test_crossed_plates_have_one_evidence():
    y = data(3, 4)
    same_row, same_column = torch.eye(3).repeat_interleave(4, 0), torch.eye(4).repeat(3, 1)
    covariance = torch.eye(12) + same_row @ same_row.T + 0.25 * same_column @ same_column.T
    expected = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y.flatten())
    guide = AutoNormal(crossed, init_scale=0.4)
    guide(y)
    found = pv.annealed_log_evidence(crossed, guide, y, num_chains=200, num_temperatures=50)
    assert found.plates == ()
    assert abs(found.log_evidence - expected) < 4 * found.standard_error


LENGTHS = torch.tensor([3, 1, 2])


def ragged(x, lengths):
    """Chains z_t ~ N(z_{t-1}, 1), x_t ~ N(z_t, 1) of their own lengths; padded steps are masked."""
    with pyro.plate("sequences", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def ragged_guide(x, lengths):
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                pyro.sample(f"z_{t}", dist.Normal(0.7 * x[:, t], 0.9))


def test_masked_steps_of_sequences_do_not_count():
    x = data(3, 3)
    found = pv.log_evidence(ragged, ragged_guide, x, LENGTHS, plate="sequences", num_samples=20000)
    annealed = pv.annealed_log_evidence(
        ragged, ragged_guide, x, LENGTHS, plate="sequences", num_chains=200, num_temperatures=20
    )
    for row, length in enumerate(LENGTHS.tolist()):
        steps = torch.arange(1.0, length + 1)
        covariance = torch.minimum(steps[:, None], steps) + torch.eye(length)
        expected = dist.MultivariateNormal(torch.zeros(length), covariance).log_prob(x[row, :length])
        for estimate in (found, annealed):
            assert abs(estimate.log_evidence[row] - expected) < 4 * estimate.standard_error[row]


def mixture(x):
    """Two components at unknown places: the place is global, the component of each datum is discrete."""
    with pyro.plate("components", 2):
        place = pyro.sample("place", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(place[z], 0.5), obs=x)


def places_guide(x):
    with pyro.plate("components", 2):
        pyro.sample("place", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5))


def test_discrete_latents_that_the_guide_leaves_out_are_summed_out():
    x = torch.tensor([-2.2, -1.7, 1.6, 2.3, 2.6])
    a, b = torch.meshgrid(*[torch.linspace(-8, 8, 801).double()] * 2, indexing="ij")
    log_p = dist.Normal(-2.0, 1.0).log_prob(a) + dist.Normal(2.0, 1.0).log_prob(b)
    for value in x:
        parts = dist.Normal(a, 0.5).log_prob(value) + math.log(0.3), dist.Normal(b, 0.5).log_prob(value) + math.log(0.7)
        log_p = log_p + torch.logaddexp(*parts)
    expected = log_p.flatten().logsumexp(0) + 2 * math.log(16 / 800)
    found = pv.log_evidence(mixture, places_guide, x, num_samples=3000)
    assert abs(found.log_evidence - expected) < 4 * found.standard_error
    annealed = pv.annealed_log_evidence(mixture, places_guide, x, num_chains=100, num_temperatures=20)
    assert abs(annealed.log_evidence - expected) < 4 * annealed.standard_error


def full_guide(x):
    """The guide also draws the component of each datum, given the places."""
    with pyro.plate("components", 2):
        place = pyro.sample("place", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=-((x[:, None] - place) ** 2)))


def test_annealing_sums_discrete_latents_out_of_the_guide_too():
    x = torch.tensor([-2.2, -1.7, 1.6, 2.3, 2.6])
    without, together = (
        pv.annealed_log_evidence(mixture, guide, x, num_chains=100, num_temperatures=20)
        for guide in (places_guide, full_guide)
    )
    error = (without.standard_error**2 + together.standard_error**2) ** 0.5
    assert abs(together.log_evidence - without.log_evidence) < 4 * error
    draws = pv.log_evidence(mixture, full_guide, x, num_samples=5000)
    assert abs(draws.log_evidence - without.log_evidence) < 4 * draws.standard_error + 4 * without.standard_error


def singular(x):
    """A Gaussian process whose covariance is singular in float32 for long lengths."""
    length = pyro.sample("length", dist.LogNormal(1.0, 1.5))
    places = torch.arange(float(len(x)))
    covariance = (-0.5 * ((places[:, None] - places) / length) ** 2).exp() + 1e-7 * torch.eye(len(x))
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=x)


def test_moves_to_singular_matrices_are_rejected():
    x = torch.zeros(20)
    with pyro.validation_enabled(False), pytest.raises(torch.linalg.LinAlgError):
        poutine.trace(poutine.condition(singular, data={"length": torch.tensor(50.0)})).get_trace(x)
    found = pv.annealed_log_evidence(
        singular, lambda x: pyro.sample("length", dist.LogNormal(0.0, 0.3)), x, num_chains=20, num_temperatures=5
    )
    assert found.log_evidence.isfinite()


def local_mixture(x):
    """A local mixture: z discrete, y continuous, both of the datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        y = pyro.sample("y", dist.Normal(4 * z - 2, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def local_mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.6 * x, 1.2))


def test_latents_of_a_datum_are_summed_out_for_each_datum():
    x = data(6, seed=3)
    parts = [torch.tensor(p).log() + dist.Normal(m, 2**0.5).log_prob(x) for p, m in ((0.7, -2.0), (0.3, 2.0))]
    found = pv.log_evidence(local_mixture, local_mixture_guide, x, num_samples=5000)
    assert found.plates is None
    assert ((found.log_evidence - torch.logaddexp(*parts)).abs() < 4 * found.standard_error).all()


def no_latents_left(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_guide_without_latents_gives_the_exact_sum():
    x = data(6)
    parts = [torch.tensor(p).log() + dist.Normal(m, 1.0).log_prob(x) for p, m in ((0.7, 0.0), (0.3, 1.0))]
    found = pv.log_evidence(no_latents_left, lambda x: None, x, num_samples=30)
    torch.testing.assert_close(found.log_evidence, torch.logaddexp(*parts))
    assert (found.standard_error == 0).all()
    assert not found.unreliable.any()
    annealed = pv.annealed_log_evidence(no_latents_left, lambda x: None, x, num_chains=30)
    torch.testing.assert_close(annealed.log_evidence, found.log_evidence)


def dependent(y):
    """The rows of a plate depend on each other outside of its sites, by a sum over them."""
    with pyro.plate("group", len(y), dim=-2):
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([1]))
        with pyro.plate("data", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(m.cumsum(0), 1.0), obs=y)


def dependent_guide(y):
    with pyro.plate("group", len(y), dim=-2):
        pyro.sample("m", dist.Normal(0.0, 0.8).expand([len(y), 1]))


def test_cells_that_depend_on_each_other_have_one_evidence():
    y = data(3, 2)
    found = pv.log_evidence(dependent, dependent_guide, y, num_samples=20000)
    steps = torch.arange(1.0, 4).repeat_interleave(2)
    covariance = torch.minimum(steps[:, None], steps) + torch.eye(6)
    expected = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(y.flatten())
    assert found.plates == ()
    assert abs(found.log_evidence - expected) < 4 * found.standard_error


def test_cells_come_first_and_go_back():
    site = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # draws, two plates, event
    frames = [
        pyro.poutine.indep_messenger.CondIndepStackFrame(name, dim, size, 0)
        for name, dim, size in (("a", -2, 3), ("b", -1, 4))
    ]
    for plates, shape in (
        ([], (2, 1, 3, 4, 5)),
        (frames[:1], (2, 3, 4, 5)),
        (frames[1:], (2, 4, 3, 5)),
        (frames, (2, 12, 5)),
    ):
        layout = CellLayout(plates, num_batch=2)
        cells = layout.to_cells(site)
        assert cells.shape == shape
        assert torch.equal(layout.to_site(cells), site)
    assert torch.equal(CellLayout(frames[1:], 2).to_cells(site)[:, 1], site[:, :, 1])


def test_models_are_compared_by_one_evidence_for_all_data():
    x = data(N) + 1
    evidence = {"a": pv.log_evidence(mean_model, mean_guide, x), "b": torch.tensor(mean_evidence(x) - 1)}
    table = pv.compare_evidence(evidence)
    assert list(table.index) == ["a", "b"]
    assert abs(table.difference["b"] + 1) < 0.1


def test_one_scale_for_all_sites_changes_nothing():
    x = data(N) + 1
    expected = pv.log_evidence(mean_model, mean_guide, x)
    found = pv.log_evidence(poutine.scale(mean_model, scale=1 / N), poutine.scale(mean_guide, scale=1 / N), x)
    assert torch.equal(found.log_evidence, expected.log_evidence)
    for model, guide in ((mean_model, poutine.scale(mean_guide, scale=0.5)), (annealed_model, mean_guide)):
        with pytest.raises(ValueError, match=r"densities that are not scaled, got site 'mu' with the scale 0\.5"):
            pv.log_evidence(model, guide, x)


def annealed_model(x):
    with poutine.scale(scale=0.5):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=x)


def test_a_model_without_latents_has_its_own_density():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = data(5)
    found = pv.log_evidence(model, lambda x: None, x, num_samples=25)
    torch.testing.assert_close(found.log_evidence, dist.Normal(0.0, 1.0).log_prob(x))
    assert not found.unreliable.any()


def effects(x):
    """theta_i ~ N(mu, 1) and x_i ~ N(theta_i, 1), with mu ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def joint_guide(x):
    """The posterior of all effects together, a tenth wider, as one event."""
    count = len(x)
    mixing = torch.cat([torch.ones(count, 1), torch.eye(count)], 1)  # theta = mixing @ (mu, noise)
    covariance = (torch.eye(count + 1) + mixing.T @ mixing).inverse()
    mean = covariance @ mixing.T @ x
    mu = pyro.sample("mu", dist.Normal(mean[0], 1.1 * covariance[0, 0].sqrt()))
    slope = covariance[1:, 0] / covariance[0, 0]
    noise = mean[1:] + slope * (mu - mean[0])
    rest = covariance[1:, 1:] - slope[:, None] * covariance[None, 0, 1:]
    pyro.sample("theta", dist.MultivariateNormal(mu + noise, 1.21 * rest))


def test_a_guide_may_draw_the_values_of_a_plate_as_one_event():
    x = data(4)
    expected = dist.MultivariateNormal(torch.zeros(4), torch.ones(4, 4) + 2 * torch.eye(4)).log_prob(x)
    found = pv.log_evidence(effects, joint_guide, x, num_samples=2000)
    annealed = pv.annealed_log_evidence(effects, joint_guide, x, num_chains=100, num_temperatures=10)
    for estimate in (found, annealed):
        assert abs(estimate.log_evidence - expected) < 4 * estimate.standard_error


def partly_observed(x, seen):
    """x_i ~ N(mu, 1), of which some are not observed."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)


def test_an_autoguide_of_partly_observed_data_counts_the_unobserved_cells_alone():
    x, seen = data(N) + 1, torch.arange(N) % 3 > 0
    expected = mean_evidence(x[seen])
    guide = AutoNormal(partly_observed)
    guide(x, seen)
    mean, scale = mean_posterior(x[seen])
    guide.locs.mu, guide.scales.mu = PyroParam(mean), PyroParam(torch.tensor(1.2 * scale))
    guide.locs.x_unobserved, guide.scales.x_unobserved = PyroParam(mean + 0 * x), PyroParam(torch.ones(N))
    found = pv.log_evidence(partly_observed, guide, x, seen, num_samples=4000)
    annealed = pv.annealed_log_evidence(partly_observed, guide, x, seen, num_chains=100, num_temperatures=20)
    for estimate in (found, annealed):
        assert abs(estimate.log_evidence - expected) < 4 * estimate.standard_error
    assert found.standard_error < 0.1


def test_cells_that_do_not_count_must_not_change_the_guide_of_others():
    def guide(x, seen):
        mu = pyro.sample("mu", dist.Normal(1.0, 0.3))
        with pyro.plate("data", len(x)):
            first = pyro.sample("x_unobserved", dist.Normal(mu, 1.0))
        return first

    def chained(x, seen):
        with pyro.plate("data", len(x)):
            first = pyro.sample("x_unobserved", dist.Normal(1.0, 1.0))
        pyro.sample("mu", dist.Normal(first.mean(), 0.3))

    x, seen = data(N) + 1, torch.arange(N) % 3 > 0
    expected = mean_evidence(x[seen])
    found = pv.log_evidence(partly_observed, guide, x, seen, num_samples=4000)
    assert abs(found.log_evidence - expected) < 4 * found.standard_error
    with pytest.raises(ValueError, match="two different ones at the same z"):
        pv.log_evidence(partly_observed, chained, x, seen)
