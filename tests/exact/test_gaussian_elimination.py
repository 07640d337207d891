"""Linear Gaussian programs of any form: equal to Kalman filters and to the dense normal of all latents and data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_vae as pv
from pyro_vae import exact
from pyro_vae._utils.traces import latent_sites, log_density, observed_sites
from pyro_vae.distributions.missing import with_missing

DOUBLE = {"dtype": torch.float64}
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], **DOUBLE)
C = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]], **DOUBLE)
GROUP = torch.tensor([0, 0, 1, 2, 2, 2, 3])


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def chain(x):
    """A state space model without a plate."""
    z = pyro.sample("z_0", dist.Normal(torch.zeros(2).to(x), 1.5).to_event(1))
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t + 1}", dist.Normal(z @ A.to(x) + 0.1, 0.5).to_event(1))
        pyro.sample(f"x_{t}", dist.Normal(z @ C.to(x) - 0.2, 0.3).to_event(1), obs=x[t])


def filtered(x):
    """log p(x) of :func:`chain` by Pyro's Kalman filter."""
    initial = dist.Normal(torch.zeros(2).to(x), 1.5).to_event(1)
    step = dist.Normal(torch.full((2,), 0.1).to(x), 0.5).to_event(1)
    noise = dist.Normal(torch.full((3,), -0.2).to(x), 0.3).to_event(1)
    return dist.GaussianHMM(initial, A.to(x), step, C.to(x), noise).log_prob(x)


@pytest.mark.parametrize("steps", [1, 30, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_state_space_model_has_the_evidence_of_a_kalman_filter(steps, dtype, tolerance):
    x = data(steps, 3).to(dtype)
    evidence = exact.log_evidence(chain, x)
    assert (evidence.shape, evidence.dtype) == ((), dtype)
    torch.testing.assert_close(evidence, filtered(x), rtol=tolerance, atol=0)


def sequences(x, lengths):
    """A plate of sequences of several lengths, with masks."""
    with pyro.plate("sequences", len(x)):
        z = pyro.sample("z_0", dist.Normal(torch.zeros(2, **DOUBLE), 1.5).to_event(1))
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(z @ A + 0.1, 0.5).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z @ C - 0.2, 0.3).to_event(1), obs=x[:, t])


def test_sequences_have_an_evidence_each_and_padded_steps_count_nowhere():
    x, lengths = data(3, 5, 3), torch.tensor([5, 2, 4])
    expected = torch.stack([filtered(x[row, :length]) for row, length in enumerate(lengths)])
    torch.testing.assert_close(exact.log_evidence(sequences, x, lengths, plate="sequences"), expected)
    posterior = exact.posterior(sequences, x, lengths, plate="sequences")
    assert posterior.mean["z_5"].isnan().all(-1).tolist() == [False, True, True]
    alone = exact.posterior(chain, x[1, :2])
    torch.testing.assert_close(posterior.mean["z_2"][1], alone.mean["z_2"])
    torch.testing.assert_close(posterior.marginals["z_2"].scale_tril[1], alone.marginals["z_2"].scale_tril)
    assert posterior.sample((4,))["z_5"].isnan()[:, 1:].all()


def partly_observed(x):
    """A local level with missing observations."""
    with pyro.plate("data", len(x)):
        level = torch.zeros(len(x), **DOUBLE)
        for t in range(x.shape[1]):
            level = pyro.sample(f"level_{t}", dist.Normal(level, 0.7))
            pyro.sample(f"x_{t}", with_missing(dist.Normal(level, 0.4)), obs=x[:, t])


def hierarchy(x):
    """A global mean, group means in a plate, and observations in it."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), **DOUBLE), 2.0))
    with pyro.plate("groups", x.shape[1]):
        group = pyro.sample("group", dist.Normal(mean, 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(group, 0.5), obs=x)


def regression(x, y):
    weight = pyro.sample("weight", dist.MultivariateNormal(torch.zeros(3, **DOUBLE), torch.eye(3, **DOUBLE) + 0.3))
    bias = pyro.sample("bias", dist.Normal(torch.ones((), **DOUBLE), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + bias, 0.6), obs=y)


def crossed(y):
    """Random effects of rows and of columns, at indexed cells."""
    with pyro.plate("rows", 4):
        a = pyro.sample("a", dist.Normal(torch.zeros(4, **DOUBLE), 1.0))
    with pyro.plate("columns", 2):
        b = pyro.sample("b", dist.Normal(torch.zeros(2, **DOUBLE), 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(1.0 + a[GROUP] + b[torch.arange(len(y)) % 2], 0.4), obs=y)


def tree(x):
    """A latent with two children, one of them with a full covariance, and an offset that is a point."""
    root = pyro.sample("root", dist.Normal(torch.ones(2, **DOUBLE), 1.0).to_event(1))
    shifted = pyro.sample("shifted", dist.Delta(root + 2.0, event_dim=1))
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]], **DOUBLE)
    left = pyro.sample("left", dist.MultivariateNormal(shifted.flip(-1), covariance))
    right = pyro.sample("right", dist.Normal(torch.where(torch.tensor([True, False]), root, -root), 0.5).to_event(1))
    pyro.deterministic("sum", left + right)
    pyro.sample("x", dist.LowRankMultivariateNormal(left + right, covariance[:, :1], 0 * root.new_ones(2) + 0.3), obs=x)


def partly_masked(x):
    """A mask inside of ``to_event``, and an observation that fills the gaps of a latent."""
    keep = torch.tensor([True, False, True])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, **DOUBLE), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.cumsum(-1), 0.3).mask(keep).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(z.mean(-1), 0.5), obs=x[:, 0], obs_mask=x[:, 1] > 0)


def process(x):
    """A Gaussian process with noise."""
    place = torch.linspace(0, 1, len(x), **DOUBLE)
    kernel = torch.exp(-((place[:, None] - place) ** 2) / 0.1) + 1e-4 * torch.eye(len(x), **DOUBLE)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x), **DOUBLE), kernel))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(f, 0.3), obs=x)


GAPS = data(4, 3).masked_fill(torch.tensor([[False, True, False]] * 2 + [[True] * 3, [False] * 3]), torch.nan)
PROGRAMS = {
    "a chain": (chain, (data(6, 3),)),
    "missing observations": (partly_observed, (GAPS,)),
    "a hierarchy": (hierarchy, (data(5, 3) + 1,)),
    "a regression": (regression, (data(8, 3), data(8, seed=1))),
    "crossed effects": (crossed, (data(7),)),
    "a tree": (tree, (data(2),)),
    "masks": (partly_masked, (data(4, 3),)),
    "a Gaussian process": (process, (data(9),)),
}


def sites_of(run, args, values=None):
    trace = poutine.trace(poutine.condition(run, values or {})).get_trace(*args)
    sites = latent_sites(trace) | observed_sites(trace)
    return {name: site for name, site in sites.items() if not isinstance(site["fn"], dist.Delta)}


class Dense:
    """The normal density of all latents of a run, masked ones left out, from the Hessian of its own log-density."""

    def __init__(self, run, args, names=None):
        latents = {name: site for name, site in sites_of(run, args).items() if not site["is_observed"]}
        self.names = list(names or latents)
        self.shapes = {name: latents[name]["value"].shape for name in self.names}
        sizes = [shape.numel() for shape in self.shapes.values()]

        def log_joint(z):
            parts = zip(self.names, z.split(sizes), strict=True)
            sites = sites_of(run, args, {name: part.reshape(self.shapes[name]) for name, part in parts})
            return sum(log_density(site).sum() for site in sites.values())

        zero = torch.zeros(sum(sizes), **DOUBLE)
        precision = -torch.autograd.functional.hessian(log_joint, zero)
        self.kept = precision.diagonal() != 0
        self.precision = precision[self.kept][:, self.kept]
        slope = torch.autograd.functional.jacobian(log_joint, zero)[self.kept]
        self.mean = torch.linalg.solve(self.precision, slope)
        self.normal = MultivariateNormal(self.mean, precision_matrix=self.precision)
        zero[self.kept] = self.mean
        self.log_evidence = log_joint(zero) - self.normal.log_prob(self.mean)

    def flat(self, values):
        """Values by site, with draws on the left, as vectors of the variables that count."""
        values = {name: values[name].unsqueeze(-1) for name in self.names}
        parts = [values[name].flatten(values[name].dim() - 1 - len(self.shapes[name])) for name in self.names]
        return torch.cat(parts, -1)[..., self.kept]


@pytest.fixture(params=PROGRAMS)
def program(request):
    return PROGRAMS[request.param]


def test_evidence_and_posterior_are_those_of_the_dense_normal(program):
    model, args = program
    dense = Dense(model, args)
    torch.testing.assert_close(exact.log_evidence(model, *args).sum(), dense.log_evidence, rtol=1e-9, atol=1e-8)
    posterior = exact.posterior(model, *args)
    if isinstance(posterior, torch.distributions.Distribution):  # of a single latent
        covariance = posterior.covariance_matrix
        torch.testing.assert_close(posterior.mean.reshape(-1), dense.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(
            torch.block_diag(*covariance.reshape(-1, *covariance.shape[-2:])), dense.normal.covariance_matrix
        )
        return
    torch.testing.assert_close(posterior.log_evidence.sum(), dense.log_evidence)
    torch.testing.assert_close(dense.flat(posterior.mean), dense.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(dense.flat(posterior.stddev), dense.normal.stddev, rtol=1e-7, atol=1e-7)
    draws = posterior.sample((3, 2))
    expected = dense.normal.log_prob(dense.flat(draws))
    found = posterior.log_prob(draws)
    torch.testing.assert_close(found.reshape(3, 2, -1).sum(-1), expected, rtol=1e-7, atol=1e-7)


def test_draws_have_the_mean_and_the_covariance_of_the_posterior(program):
    model, args = program
    posterior, dense, count = exact.posterior(model, *args), Dense(model, args), 20_000
    if isinstance(posterior, torch.distributions.Distribution):
        return
    torch.manual_seed(0)
    draws = dense.flat(posterior.sample((count,)))
    standard = (draws - dense.mean) @ torch.linalg.cholesky(dense.precision)
    assert (standard.mean(0).abs() < 5.5 / count**0.5).all()
    spread = standard.T @ standard / count - torch.eye(len(dense.mean), **DOUBLE)
    assert (spread.abs() < 5.5 * 2**0.5 / count**0.5).all()


def test_marginals_and_covariances_are_blocks_of_the_dense_covariance():
    model, args = PROGRAMS["a tree"]
    posterior, dense = exact.posterior(model, *args), Dense(model, args)
    names, covariance = dense.names, dense.normal.covariance_matrix
    for place, name in enumerate(names):
        block = slice(2 * place, 2 * place + 2)
        torch.testing.assert_close(posterior.marginals[name].covariance_matrix, covariance[block, block])
        torch.testing.assert_close(posterior.covariance(name), covariance[block, block])
    torch.testing.assert_close(posterior.covariance(names[0], names[2]), covariance[:2, 4:])


GUIDES = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal, "low rank": AutoLowRankMultivariateNormal}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize(
    "name", sorted(PROGRAMS.keys() - {"a tree", "masks"})
)  # an autoguide has no points and no masks
def test_the_gap_of_an_autoguide_is_the_kl_of_two_dense_normals(guide, name):
    model, args = PROGRAMS[name]
    torch.manual_seed(0)
    q = guide(model)
    q(*args)
    with torch.no_grad():
        for parameter in q.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    dense = Dense(model, args)
    with torch.no_grad():
        if guide is AutoNormal:
            locs, scales = (
                dense.flat({name: getattr(part, name) for name in dense.names}) for part in (q.locs, q.scales)
            )
            normal = MultivariateNormal(locs, torch.diag(scales**2))
        else:
            found = q.get_posterior()
            normal = MultivariateNormal(found.mean, found.covariance_matrix)
    gap, bound = exact.kl(model, q, *args), exact.elbo(model, q, *args)
    torch.testing.assert_close(gap.sum(), kl_divergence(normal, dense.normal), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bound.sum() + gap.sum(), dense.log_evidence, rtol=1e-6, atol=1e-6)


def test_the_gap_of_a_guide_along_the_chain_is_zero_at_the_posterior_and_the_kl_elsewhere():
    """q(z_2 | z_1) q(z_1) has a joint normal distribution that no single site of it shows."""
    x = data(2, 1)

    def model(x):
        z = pyro.sample("z_1", dist.Normal(torch.zeros((), **DOUBLE), 1.0))
        pyro.sample("x_1", dist.Normal(z, 0.5), obs=x[0, 0])
        z = pyro.sample("z_2", dist.Normal(0.7 * z, 0.6))
        pyro.sample("x_2", dist.Normal(z, 0.5), obs=x[1, 0])

    dense = Dense(model, (x,))
    covariance = dense.normal.covariance_matrix
    slope = covariance[0, 1] / covariance[0, 0]
    rest = (covariance[1, 1] - slope * covariance[0, 1]).sqrt()

    def guide(x, shift=0.0):
        z = pyro.sample("z_1", dist.Normal(dense.mean[0], covariance[0, 0].sqrt()))
        pyro.sample("z_2", dist.Normal(dense.mean[1] + slope * (z - dense.mean[0]) + shift, rest))

    assert exact.kl(model, guide, x).abs() < 1e-9
    gap = exact.kl(model, lambda x: guide(x, shift=0.3), x)
    torch.testing.assert_close(gap, 0.5 * (torch.tensor(0.3, **DOUBLE) / rest) ** 2)


def test_groups_have_an_evidence_and_a_posterior_each():
    x = data(5, 3) + 1

    def model(x):
        with pyro.plate("groups", x.shape[1]):
            group = pyro.sample("group", dist.Normal(torch.zeros(3, **DOUBLE), 0.8))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(group, 0.5), obs=x)

    joint = MultivariateNormal(torch.zeros(5, **DOUBLE), 0.64 + 0.25 * torch.eye(5, **DOUBLE))
    torch.testing.assert_close(exact.log_evidence(model, x), joint.log_prob(x.T))
    variance = 1 / (1 / 0.64 + 5 / 0.25)
    posterior = exact.posterior(model, x)
    torch.testing.assert_close(posterior.mean, variance * x.sum(0) / 0.25)
    torch.testing.assert_close(posterior.stddev, torch.full((3,), variance, **DOUBLE).sqrt())


def test_many_groups_cost_little():
    """A Jacobian without zeros would have 2 * 10^9 entries."""
    group, x = torch.arange(40_000) % 8000, data(40_000)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), **DOUBLE), 2.0))
        with pyro.plate("groups", 8000):
            effect = pyro.sample("effect", dist.Normal(mean, 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(effect[group], 0.5), obs=x)

    within = MultivariateNormal(torch.zeros(5, **DOUBLE), 0.64 + 0.25 * torch.eye(5, **DOUBLE))
    each = x.reshape(5, 8000).T  # given the mean, groups are independent: integrate the mean by its own normal density
    precision = torch.linalg.inv(within.covariance_matrix)
    total = 0.25 + 8000 * precision.sum()
    mean = (each @ precision).sum() / total
    log_joint = within.log_prob(each - mean).sum() + dist.Normal(0.0, 2.0).log_prob(mean)
    expected = log_joint - dist.Normal(mean, total**-0.5).log_prob(mean)
    torch.testing.assert_close(exact.log_evidence(model, x), expected)


HMM = dist.GaussianHMM(
    dist.Normal(torch.zeros(2, **DOUBLE), 1.5).to_event(1), A, dist.Normal(torch.zeros(2, **DOUBLE), 0.5).to_event(1),
    C, dist.Normal(torch.zeros(3, **DOUBLE), 0.3).to_event(1), duration=6,
)  # fmt: skip


def test_a_model_without_latents_has_the_density_of_its_data():
    x = data(4, 6, 3)

    def sequences(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", HMM.expand([len(x)]), obs=x)

    torch.testing.assert_close(exact.log_evidence(sequences, x), HMM.log_prob(x))

    def one(x):
        pyro.sample("x", HMM, obs=x[0])
        pyro.sample("y", HMM, obs=x[1])

    torch.testing.assert_close(exact.log_evidence(one, x), HMM.log_prob(x[:2]).sum())


def bent(x, mean=torch.tanh, scale=lambda z: 0.5):
    z = pyro.sample("z", dist.Normal(torch.zeros(3, **DOUBLE), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean(z), scale(z)).to_event(1), obs=x)


@pytest.mark.parametrize(
    "model",
    [
        bent,
        lambda x: bent(x, lambda z: z, lambda z: z.exp()),
        lambda x: bent(x, lambda z: z + (z.abs() > 9.0)),
        lambda x: bent(x, lambda z: z if z[0] > 9 else 2 * z),
        lambda x: bent(x, lambda z: z.float().half().to(x)),
    ],
    ids=["tanh", "a scale that depends on it", "a jump", "a branch", "rounding"],
)
def test_what_is_not_proved_to_be_linear_has_no_closed_form(model):
    with pytest.raises(ValueError, match="`model` must"):
        exact.log_evidence(model, data(4, 3))


def test_random_numbers_outside_of_the_sites_are_refused():
    with pytest.raises(ValueError, match="`model` must have one log p"):
        exact.log_evidence(lambda x: bent(x, lambda z: z * torch.randn(3)), data(4, 3))
    unused = exact.log_evidence(lambda x: bent(x, lambda z: z + 0 * torch.randn(3)), data(4, 3))
    torch.testing.assert_close(unused, exact.log_evidence(lambda x: bent(x, lambda z: z), data(4, 3)))


def test_data_that_depend_on_masked_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, **DOUBLE), 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"must mask the data that depend on masked latents, got .* \['z'\]"):
        exact.log_evidence(model, data(2))


def test_a_posterior_shows_its_latents_and_refuses_others():
    posterior = exact.posterior(chain, data(3, 3))
    assert "8 variables at z_0, z_1, z_2 and 1 more, normal" in repr(posterior)
    assert "<table" in posterior._repr_html_()
    with pytest.raises(ValueError, match=r"`values` must have the latents \['z_0', 'z_1', 'z_2', 'z_3'\], got \['z'\]"):
        posterior.log_prob({"z": torch.zeros(2)})


def test_the_gap_of_a_factor_analysis_of_many_dimensions_is_that_of_its_normals():
    torch.manual_seed(0)
    vae = pv.VAE(
        pv.priors.StandardNormal(5), pv.guides.FullRankNormal(7, 5, pv.networks.mlp([6])),
        pv.likelihoods.Normal(5, 7, pv.networks.linear(), scale=0.5),
    ).double()  # fmt: skip
    x = data(9, 7)
    posterior = exact.posterior(vae.model, x)
    torch.testing.assert_close(exact.kl(vae.model, vae.guide, x), kl_divergence(vae.encode(x), posterior))
