"""Many draws at once: the code of model and guide sees the shapes of one draw, and gets the numbers of one draw."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

import pyro_vae as pv
from pyro_vae import exact, guides, likelihoods, networks, objectives, priors
from pyro_vae.compilation import torch_private
from pyro_vae.draws import PerDraw

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


class Topics(nn.Module):
    """Right on (N, D) alone: the classes are in dimension 1."""

    def forward(self, z, _):
        return nn.functional.softmax(z, dim=1) @ torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 1.0]])


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.norm.running_mean.add_(0.5)
        self.linear = nn.Linear(2, 3)

    def forward(self, z, _):
        return self.linear(self.norm(z))


class WithData(nn.Module):
    """``torch.cat`` does not broadcast: it needs z for each row of x."""

    def forward(self, z, x):
        return torch.cat([z, 1 + 0 * x[:, :1]], 1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.linear = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, z, _):
        packed = nn.utils.rnn.pack_padded_sequence(z[..., None], torch.full((len(z),), 2), batch_first=True)
        return self.linear(self.gru(packed)[1][0])


class Masked(nn.Module):
    """Boolean indices, which torch.vmap refuses."""

    def forward(self, z, _):
        z = z.clone()
        z[z < 0] = 0.1 * z[z < 0]
        return torch.cat([z, z[:, :1]], 1)


class Branching(nn.Module):
    def forward(self, z, _):
        return torch.cat([z, z[:, :1].tanh() if z.sum().item() > -1e9 else z], 1)


class Images(nn.Module):
    """A convolution of one image for each row."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, (1, 2))

    def forward(self, z, _):
        return self.conv(z.reshape(len(z), 1, 1, 2)).reshape(len(z), 3)


DECODERS = [Topics, Normalized, WithData, Recurrent, Masked, Branching, Images]


def pair_of(decoder):
    torch.manual_seed(0)
    network = decoder().eval()

    def model(x):
        pyro.module("decoder", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(network(z, x), 0.7).to_event(1), obs=x)

    scale = torch.tensor([0.9, 1.1])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x[:, :2], scale).to_event(1))

    return model, guide, network


def log_p_on_grid(network):
    """Sum over a grid, one plain run of the network for each point: all it sees is (N, 2)."""
    axis = torch.linspace(-5, 5, 51)
    terms = []
    with torch.no_grad():
        for z in torch.cartesian_prod(axis, axis):
            x_given_z = dist.Normal(network(z.expand(len(X), 2), X), 0.7).log_prob(X).sum(1)
            terms.append(x_given_z + dist.Normal(0.0, 1.0).log_prob(z).sum())
    return torch.stack(terms).double().logsumexp(0) + 2 * math.log(10 / 50)


@pytest.mark.parametrize("decoder", DECODERS)
def test_evidence_is_that_of_plain_runs_whatever_the_decoder_does_with_its_shapes(decoder):
    model, guide, network = pair_of(decoder)
    truth = log_p_on_grid(network)
    estimate = pv.log_evidence(model, guide, X, num_samples=600)
    assert ((estimate.log_evidence - truth).abs() < 5 * estimate.standard_error + 1e-3).all()
    objective = objectives.ImportanceWeighted(300)
    torch.manual_seed(0)
    assert -objective.loss(model, guide, X) / len(X) == pytest.approx(float(truth.mean()), abs=0.15)


@pytest.mark.parametrize("decoder", [Normalized, WithData, Images, pytest.param(Masked, marks=pytest.mark.slow)])
def test_exact_evidence_is_that_of_plain_runs(decoder):
    model, _, network = pair_of(decoder)
    torch.testing.assert_close(exact.log_evidence(model, X).double(), log_p_on_grid(network), atol=0.02, rtol=0)


class FixedNoise(poutine.messenger.Messenger):
    """Draw z from the noise of each draw, ``(K, N, 2)``, all at once or one after the other."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.draws = noise, iter(noise)

    def _pyro_sample(self, msg):
        if msg["name"] == "z" and msg["value"] is None:
            with torch_private.outside_vmap() as level:
                noise = next(self.draws) if level is None else torch_private.batched(self.noise, level)
            msg["value"], msg["done"] = msg["fn"].mean + msg["fn"].stddev * noise, True


@pytest.mark.parametrize("gradient", ["pathwise", "sticking-the-landing", "doubly-reparameterized"])
def test_gradients_at_the_same_draws_do_not_depend_on_how_draws_are_run(gradient):
    model, _, network = pair_of(Normalized)
    encoder, noise = guides.DiagonalNormal(3, 2, networks.linear()), torch.randn(5, len(X), 2)

    def guide(x):
        pyro.module("guide", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x))

    def gradients(loops):
        objective = objectives.ImportanceWeighted(5, gradient)
        objective._per_draw.loops = loops
        parameters = [*network.parameters(), *encoder.parameters()]
        with FixedNoise(noise):
            loss = objective.differentiable_loss(model, guide, X)
        assert objective._per_draw.loops == loops
        return [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    torch.testing.assert_close(gradients(False), gradients(True), rtol=1e-4, atol=1e-4)


def test_what_does_not_depend_on_the_draw_is_computed_once():
    calls = []

    def encoder(x):
        calls.append(x.shape)
        return 2 * x

    def run(values):
        return {"sum": encoder(X).sum() + pyro.sample("z", dist.Exponential(torch.ones(3)))}, None

    per_draw = PerDraw()
    found = per_draw(run, 5)
    assert calls == [X.shape]
    assert not per_draw.loops
    assert found.tensors["sum"].shape == (5, 3)
    assert found.tensors["sum"].unique().numel() == 15  # draws differ


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace, lambda loc, scale: dist.Exponential(scale + loc**2)])
def test_a_latent_that_depends_on_another_is_drawn_for_all_draws_at_once(family):
    def run(values):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        return {"y": pyro.sample("y", family(z, torch.ones(4)))}, None

    per_draw = PerDraw()
    assert per_draw(run, 50).tensors["y"].unique().numel() == 200
    assert not per_draw.loops


def test_an_invalid_parameter_of_one_draw_is_an_error_that_names_it():
    def run(values):
        pyro.sample("x", dist.Normal(0.0, values["scale"]))
        return {}, None

    with pytest.raises(ValueError, match=r"Expected parameter scale .*GreaterThan"):
        PerDraw()(run, 3, {"scale": torch.tensor([1.0, 2.0, -1.0])})


def test_a_value_outside_of_the_support_is_an_error_unless_the_distribution_allows_it():
    def run(values, **options):
        fn = dist.Bernoulli(values["p"], **options).expand([2]).to_event(1)
        pyro.sample("x", fn, obs=torch.full((2,), 0.5))
        return {}, None

    p = {"p": torch.tensor([0.2, 0.3])}
    with pytest.raises(ValueError, match=r"site 'x'.*within the support"):
        PerDraw()(run, 2, p)
    PerDraw()(lambda values: run(values, validate_args=False), 2, p)


def test_an_error_of_the_code_itself_is_raised_as_it_is():
    def run(values):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        PerDraw()(run, 3)


def test_failed_tries_do_not_use_up_random_numbers():
    def run(values):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
        return {"z": z + (z.sum().item() > 100)}, None

    torch.manual_seed(0)
    found = PerDraw()(run, 3).tensors["z"]
    torch.manual_seed(0)
    assert torch.equal(found, torch.randn(3, 2))


def test_failed_tries_do_not_change_buffers():
    norm = nn.BatchNorm1d(2)

    def run(values):
        z = pyro.sample("z", dist.Normal(norm(torch.randn(5, 2)), 1.0))
        return {"z": z + (z.sum().item() > 100)}, None

    PerDraw()(run, 3)
    assert norm.num_batches_tracked == 3  # those of three plain runs


def test_a_subsample_is_the_same_for_all_draws():
    def run(values):
        with pyro.plate("data", 100, subsample_size=3) as rows:
            return {"rows": rows.clone()}, None

    rows = PerDraw()(run, 4).tensors["rows"]
    assert (rows == rows[0]).all()


def positive(x):
    with pyro.plate("data", len(x)):
        x = pyro.subsample(x, event_dim=0)
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        share = pyro.sample("share", dist.Uniform(-1.0, 3.0))
        pyro.sample("x", dist.Normal(rate + share, 0.5), obs=x)


def one_positive(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_autoguides_of_positive_latents_have_the_density_of_the_change_of_variables():
    """Gamma and Poisson: p(x) is negative binomial, and KL + ELBO is log p(x)."""
    x = torch.tensor([0.0, 1.0, 2.0, 5.0])
    guide = AutoNormal(one_positive, init_scale=0.5)
    guide(x)
    truth = dist.NegativeBinomial(3.0, probs=torch.tensor(1 / 3)).log_prob(x)
    elbo, kl = exact.elbo(one_positive, guide, x), exact.kl(one_positive, guide, x)
    torch.testing.assert_close(elbo + kl, truth, atol=1e-3, rtol=0)
    assert (kl > 0).all()
    estimate = pv.log_evidence(one_positive, guide, x, num_samples=20_000)
    assert ((estimate.log_evidence - truth).abs() < 5 * estimate.standard_error + 1e-3).all()
    annealed = pv.annealed_log_evidence(one_positive, guide, x, num_chains=200, num_temperatures=30)
    assert ((annealed.log_evidence - truth).abs() < 5 * annealed.standard_error + 1e-3).all()
    nats = pv.decompose(one_positive, guide, x, num_samples=200)
    assert abs(nats.elbo.value - float(elbo.mean())) < 5 * nats.elbo.standard_error + 1e-3
    gap = pv.inference_gap(one_positive, guide, x, steps=200)
    torch.testing.assert_close(gap.log_evidence, truth, atol=1e-3, rtol=0)
    assert (gap.refined_elbo >= gap.elbo - 0.01).all()


def test_autoguides_of_two_constrained_latents_agree_with_the_pathwise_elbo():
    x = torch.tensor([0.5, 2.0, 4.0])
    guide = AutoNormal(positive)
    guide(x)
    estimate = pv.log_evidence(positive, guide, x, num_samples=4000)
    torch.manual_seed(0)
    bound = -objectives.ImportanceWeighted(4000).loss(positive, guide, x) / len(x)
    assert float(estimate.log_evidence.mean()) == pytest.approx(bound, abs=0.05)


def test_an_autoguide_of_all_rows_together_has_the_evidence_of_all_data():
    x = torch.tensor([1.0, 2.0])
    guide = AutoDiagonalNormal(one_positive, init_scale=0.4)
    guide(x)
    estimate = pv.log_evidence(one_positive, guide, x, num_samples=20_000)
    assert estimate.log_evidence.shape == ()
    truth = pv.exact.log_evidence(one_positive, x).sum()
    assert abs(estimate.log_evidence - truth) < 5 * estimate.standard_error + 0.01


def test_a_vae_with_a_decoder_of_positional_dimensions_trains_as_its_twin():
    """Softmax over dim=1 and over dim=-1 are the same on (N, D): so are their importance-weighted losses."""
    losses = []
    for dim in (1, -1):
        torch.manual_seed(0)
        vae = pv.VAE(
            priors.StandardNormal(2),
            guides.DiagonalNormal(3, 2, networks.linear()),
            likelihoods.Normal(2, 3, lambda i, o, dim=dim: nn.Sequential(nn.Softmax(dim=dim), nn.Linear(i, o))),
        )
        fitted = pv.fit(vae.model, vae.guide, X, epochs=3, elbo=objectives.ImportanceWeighted(5), progress=False)
        losses.append(fitted.history["elbo"])
    assert losses[0] == pytest.approx(losses[1])
