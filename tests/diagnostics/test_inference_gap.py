"""The inference gap, compared with known posteriors of linear Gaussian and discrete models."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import gaussian, guide_of

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.diagnostics import inference_gap
from pyro_vae.parts.guides import PerDatum

SURE = 4.5  # standard errors
WEIGHT = torch.tensor([[1.0, 0.8], [0.2, -0.9], [0.7, 0.6], [-0.4, 0.5]]).double()
NOISE = 0.75  # a number that float32 holds
PRECISION = WEIGHT.T @ WEIGHT / NOISE**2 + torch.eye(2).double()
SOLVE = torch.linalg.solve(PRECISION, WEIGHT.T) / NOISE**2  # maps x to the posterior mean
MEAN_FIELD = (0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet())).item()


def data(num_data, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_data, 2, generator=generator, dtype=torch.float64)
    return z @ WEIGHT.T + NOISE * torch.randn(num_data, 4, generator=generator, dtype=torch.float64)


def linear_vae(part, shift=0.0, factor=1.0):
    """The best encoder of its family, except for a shift of its mean and a factor of its scale."""
    decoder = likelihoods.Normal(2, 4, networks.linear(), scale=NOISE)
    vae = gaussian(2, 4, encoder=part(4, 2, networks.linear()), decoder=decoder).double()
    covariance_root = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    with torch.no_grad():
        vae.decoder.network.weight.copy_(WEIGHT)
        network = vae.encoder.network
        network.weight.zero_()
        network.weight[:2], network.bias[:2], vae.decoder.network.bias[:] = SOLVE, shift, 0.0
        if part is guides.DiagonalNormal:
            network.bias[2:] = torch.log(factor / PRECISION.diagonal().sqrt())
        else:
            network.bias[2:4] = torch.log(factor * covariance_root.diagonal())
            network.bias[4] = covariance_root[1, 0] / covariance_root[1, 1]
    return vae


def test_the_best_diagonal_guide_has_the_mean_field_gap_and_nothing_to_amortize():
    vae = linear_vae(guides.DiagonalNormal)
    found = pv.inference_gap(vae.model, vae.guide, data(20), steps=100)
    assert found.is_exact
    torch.testing.assert_close(found.gap, torch.full((20,), MEAN_FIELD).double(), rtol=0, atol=1e-6)
    assert MEAN_FIELD > 0.03
    assert found.amortization.abs().max() < 5e-3  # the gradient is noisy since q is not the posterior
    assert (found.approximation + found.amortization - found.gap).abs().max() < 1e-9


def test_an_exact_guide_has_no_gap_and_is_not_changed_by_refinement():
    vae = linear_vae(guides.FullRankNormal)
    found = pv.inference_gap(vae.model, vae.guide, data(20), steps=50)
    for part in (found.gap, found.approximation, found.amortization):
        assert part.abs().max() < 1e-4  # rounding alone, times the learning rate


@pytest.mark.parametrize("part", [guides.DiagonalNormal, guides.FullRankNormal])
def test_the_loss_of_a_perturbed_encoder_is_amortization(part):
    shift, factor = torch.tensor([0.3, -0.2]).double(), 1.5
    vae = linear_vae(part, shift, factor)
    found = pv.inference_gap(vae.model, vae.guide, data(20), steps=500)
    scale_kl = factor**2 - 1 - 2 * torch.tensor(factor).log()
    expected = (0.5 * shift @ PRECISION @ shift + scale_kl).item()  # two dimensions, half of it each
    assert expected > 0.5
    torch.testing.assert_close(found.amortization, torch.full((20,), expected).double(), rtol=0, atol=0.01)
    left = MEAN_FIELD if part is guides.DiagonalNormal else 0.0
    torch.testing.assert_close(found.approximation, torch.full((20,), left).double(), rtol=0, atol=0.01)


def test_the_refined_guide_is_a_pyro_guide_of_these_data():
    vae, x = linear_vae(guides.FullRankNormal, shift=0.5), data(20)
    found = pv.inference_gap(vae.model, vae.guide, x, steps=400)
    with pyro.plate("draws", 4000, dim=-2):
        z = pyro.poutine.trace(found.refined).get_trace(x).nodes["z"]["value"]
    assert (z.mean(0) - x @ SOLVE.T).abs().max() < 0.06


def test_a_guide_that_is_refined_already_can_be_passed():
    vae, x = linear_vae(guides.DiagonalNormal, shift=0.5), data(20)
    vae.decoder.requires_grad_(False)
    refined = pv.VAE(vae.prior, PerDatum.refining(vae.encoder, x), vae.decoder)
    pv.fit(refined.model, refined.guide, x, epochs=400, lr=pv.schedules.decayed(2e-2, 400))
    theirs = pv.inference_gap(vae.model, vae.guide, x, refined=refined.guide)
    ours = pv.inference_gap(vae.model, vae.guide, x, steps=400)
    assert theirs.refined == refined.guide
    torch.testing.assert_close(theirs.elbo, ours.elbo)
    assert abs(theirs.amortization.mean().item() - ours.amortization.mean().item()) < 0.02


def test_a_plain_guide_is_refined_in_the_parameters_of_its_distributions():
    vae, x = linear_vae(guides.DiagonalNormal, shift=0.3), data(20)
    found = pv.inference_gap(vae.model, lambda x: vae.guide(x), x, steps=400)
    same = pv.inference_gap(vae.model, vae.guide, x, steps=400)
    torch.testing.assert_close(found.amortization, same.amortization, rtol=0, atol=0.01)


def bits(num):
    torch.manual_seed(0)
    decoder = likelihoods.Normal(num, 2, networks.linear(), scale=0.8)
    encoder = guides.Bernoulli(2, num, networks.linear())
    return gaussian(num, 2, prior=priors.Bernoulli(num), encoder=encoder, decoder=decoder)


def test_one_bit_has_a_gap_of_amortization_alone():
    vae, x = bits(1), pv.datasets.two_gaussians(30, seed=0).x
    found = pv.inference_gap(vae.model, vae.guide, x)
    torch.testing.assert_close(found.gap, pv.exact.kl(vae.model, vae.guide, x), rtol=0, atol=1e-5)
    assert found.approximation.max() < 1e-3
    assert found.amortization.mean() > 0.01


def test_the_approximation_of_a_product_of_bits_agrees_with_a_grid_search():
    vae = bits(2)
    with torch.no_grad():
        vae.decoder.network.weight.fill_(1.5)  # given x, the bits are dependent
    x = torch.tensor([[0.7, 0.9]])
    found, grid = pv.inference_gap(vae.model, vae.guide, x, steps=1000, lr=5e-2), torch.linspace(-9, 9, 181)
    logits = torch.cartesian_prod(grid, grid)
    states = vae.prior().enumerate_support(expand=False).reshape(4, 1, 2)
    with torch.no_grad():
        log_joint = vae.decode(states[:, 0]).log_prob(x) + vae.prior().log_prob(states[:, 0])
        log_q = dist.Bernoulli(logits=logits).log_prob(states).sum(-1)
        best = (log_q.exp() * (log_joint[:, None] - log_q)).sum(0).max()
        expected = (log_joint.logsumexp(0) - best).item()
    assert found.approximation.item() == pytest.approx(expected, abs=2e-3)
    assert expected > 0.02


def test_one_dimension_is_exact_by_quadrature():
    vae, x = gaussian(1, 2), pv.datasets.two_gaussians(30, seed=0).x
    found = pv.inference_gap(vae.model, vae.guide, x, steps=300)
    torch.testing.assert_close(found.gap, pv.exact.kl(vae.model, vae.guide, x), rtol=0, atol=1e-3)
    assert found.is_exact
    assert found.approximation.min() > -1e-3
    assert found.amortization.min() > -1e-3


def test_without_an_exact_answer_log_evidence_is_a_lower_bound():
    vae, x = gaussian(3, 4), data(30).float()
    found = pv.inference_gap(vae.model, vae.guide, x, steps=300)
    assert not found.is_exact
    assert "in expectation a lower bound" in str(found)
    assert "at least" in str(found)
    error = (found.log_evidence_error**2 + found.amortization_error**2 + found.elbo_error**2).sqrt()
    assert (found.approximation > -SURE * error).all()
    assert (found.amortization > -SURE * found.amortization_error).all()
    assert found.amortization.mean() > 0.1
    sharper = pv.log_evidence(vae.model, found.refined, x, num_samples=20000, seed=1)
    assert (sharper.log_evidence - found.log_evidence).abs().mean() < 0.05


def mixed_model(x):
    with pyro.plate("data", len(x)):
        z, kind = pyro.sample("z", dist.Normal(0.0, 1.0)), pyro.sample("kind", dist.Bernoulli(0.4))
        loc = torch.stack([z + 2 * kind, z.expand_as(z + kind)], -1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def mixed_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Bernoulli(logits=x[:, 0] - 1))
        pyro.sample("z", dist.Normal(x[:, 1], 0.6))


def mixed_evidence(x):
    """A sum over the bit; given the bit, x is normal."""
    both = torch.full((2, 2), 1.0) + 0.25 * torch.eye(2)
    kinds = [dist.MultivariateNormal(torch.tensor([2.0 * kind, 0.0]), both).log_prob(x) for kind in (0, 1)]
    return torch.logaddexp(kinds[0] + torch.tensor(0.6).log(), kinds[1] + torch.tensor(0.4).log())


def test_a_pair_of_a_bit_and_a_number():
    x = torch.tensor([[0.1, 0.3], [2.4, 0.2], [1.2, 0.4], [-1.0, -0.8]])
    found = pv.inference_gap(mixed_model, mixed_guide, x, num_samples=5000)
    error = found.log_evidence_error
    assert ((found.log_evidence - mixed_evidence(x)).abs() < SURE * error + 1e-3).all()
    assert (found.amortization > 0.01).all()
    assert (found.approximation > -SURE * (error**2 + found.elbo_error**2 + found.amortization_error**2).sqrt()).all()
    assert found.approximation.max() < 0.6  # the bit and the number are dependent


@pytest.mark.parametrize("argument", [{"steps": 0}, {"lr": -1.0}, {"num_particles": 0}, {"num_samples": 1}])
def test_invalid_arguments_raise(argument):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
        pv.inference_gap(mixed_model, mixed_guide, torch.randn(5, 2), **argument)


def test_a_seed_fixes_the_numbers_and_the_users_state_stays(random_states):
    vae = gaussian(3, 4)
    vae.decoder.requires_grad_(False)
    x, before = data(10).float(), random_states()
    values = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    first = pv.inference_gap(vae.model, vae.guide, x, steps=20, num_samples=20)
    assert random_states() == before
    assert not list(pyro.get_param_store().keys())
    for name, parameter in vae.named_parameters():
        assert (parameter.grad, parameter.requires_grad) == (None, name.startswith("encoder"))
        assert torch.equal(parameter, values[name])
    again, other = (pv.inference_gap(vae.model, vae.guide, x, steps=20, num_samples=20, seed=seed) for seed in (0, 1))
    assert torch.equal(first.refined_elbo, again.refined_elbo)
    assert not torch.equal(first.refined_elbo, other.refined_elbo)
    assert first.log_evidence.shape == (10,)
    assert not any(tensor.requires_grad for tensor in (first.gap, first.approximation, first.amortization))


def test_parameters_in_the_store_are_read_and_not_changed():
    pyro.param("weight", torch.tensor(0.7))

    def q(x):
        return dist.Normal(pyro.param("weight") * x[:, :1], pyro.param("new", torch.tensor(0.5))).to_event(1)

    model, guide, x = gaussian(1, 2).model, guide_of(q), torch.randn(5, 2)
    found = pv.inference_gap(model, guide, x, steps=20)
    torch.testing.assert_close(found.elbo, pv.exact.elbo(model, guide, x), rtol=1e-3, atol=1e-3)
    assert (pyro.param("weight").item(), pyro.param("weight").grad) == (pytest.approx(0.7), None)


def test_the_importance_weighted_log_evidence_agrees_with_the_exact_one(monkeypatch):
    vae, x = linear_vae(guides.DiagonalNormal), data(10)
    monkeypatch.setattr(inference_gap, "_exact_log_evidence", lambda p, tolerance: None)
    estimate = pv.inference_gap(vae.model, vae.guide, x, steps=20)
    exactly = pv.exact.log_evidence(vae.model, x)
    assert not estimate.is_exact
    assert ((estimate.log_evidence - exactly).abs() < SURE * estimate.log_evidence_error).all()


def test_the_default_refinement_agrees_with_a_longer_one_of_more_draws():
    vae = gaussian(2, 3)
    x = torch.randn(10, 3)
    short = pv.inference_gap(vae.model, vae.guide, x, tolerance=1e-3)
    long = pv.inference_gap(vae.model, vae.guide, x, steps=1000, lr=1e-2, num_particles=32, seed=1)
    assert (short.steps, long.steps) == (50, 1000)
    assert short.amortization.mean() > 0.05, "there is something to refine"
    for part in ("log_evidence", "elbo"):
        torch.testing.assert_close(getattr(short, part), getattr(long, part), rtol=0, atol=1.5e-3)
    assert (short.refined_elbo - long.refined_elbo).abs().mean() < 2e-3
    assert (short.refined_elbo - long.refined_elbo).abs().max() < 0.02


def test_without_quadrature_log_p_is_an_estimate_with_its_error():
    vae, x = gaussian(2, 3), torch.randn(10, 3)
    exact = pv.inference_gap(vae.model, vae.guide, x)
    found = pv.inference_gap(vae.model, vae.guide, x, tolerance=None)
    assert (exact.is_exact, found.is_exact) == (True, False)
    for value, error in (("log_evidence", "log_evidence_error"), ("elbo", "elbo_error")):
        assert (getattr(found, error) > 0).all()
        distance = (getattr(found, value) - getattr(exact, value)) / getattr(found, error)
        assert distance.abs().max() < SURE + 0.5


def test_sums_and_closed_forms_need_no_quadrature():
    linear, x = linear_vae(guides.DiagonalNormal), data(5)
    for vae, rows in ((linear, x), (bits(2), x[:, :2].float())):
        assert pv.inference_gap(vae.model, vae.guide, rows, steps=5, tolerance=None).is_exact


def mean_model(x):
    """A global mean; p(mean | x) is normal, of precision 1/4 + N."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mean_guide(x):
    pyro.sample("mean", dist.Normal(x.sum() / (0.25 + len(x)) + 0.2, 0.5))


X = torch.linspace(-1, 2, 6)
EVIDENCE = dist.MultivariateNormal(torch.zeros(6), torch.eye(6) + 4.0).log_prob(X)
GAP = torch.distributions.kl_divergence(dist.Normal(0.2, 0.5), dist.Normal(0.0, 6.25**-0.5))


def test_a_global_latent_has_one_exact_gap_of_all_data_and_no_split():
    found = pv.inference_gap(mean_model, mean_guide, X)
    torch.testing.assert_close(found.log_evidence, EVIDENCE[None], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.gap, GAP[None], rtol=0, atol=1e-4)
    assert (found.is_exact, found.plates, found.evidence) == (True, (), None)
    assert (found.approximation, found.amortization, found.refined, found.steps) == (None, None, None, 0)
    assert found.why_no_split == "q of ['mean'], latents of many data, is fitted to them together"
    assert f"log p(x) {EVIDENCE:.3f} ± 0.000 nats of all data, exact" in str(found)
    assert str(found).endswith(f"no split into approximation and amortization: {found.why_no_split}")
    assert repr(found) == f"InferenceGap(the ELBO is {GAP:.3f} nats of all data below log p(x))"
    assert "There is no split" in found._repr_html_()


def test_without_an_exact_answer_the_gap_of_all_data_is_importance_weighted_with_its_reliability(monkeypatch):
    monkeypatch.setattr(inference_gap, "_exact_log_evidence", lambda p, tolerance: None)
    monkeypatch.setattr(inference_gap, "_exact_elbo", lambda *_: None)
    found = pv.inference_gap(mean_model, mean_guide, X, num_samples=4000)
    assert abs(found.gap - GAP) < SURE * (found.log_evidence_error**2 + found.elbo_error**2) ** 0.5
    assert not found.is_exact
    assert float(found.evidence.khat) < 0.5
    assert "importance-weighted from q, in expectation a lower bound" in str(found)
    assert "k̂" not in str(found)

    def far(x):
        pyro.sample("mean", dist.Normal(4.0, 0.05))

    found = pv.inference_gap(mean_model, far, X)
    assert found.evidence.unreliable.all()
    assert f"k̂ is {float(found.evidence.khat):.2f}, plus its error above" in str(found)
    assert "log p(x) may be higher, by an unknown amount" in found._repr_html_()


def test_groups_have_a_gap_each():
    def model(x):
        with pyro.plate("group", x.shape[1], dim=-1):
            mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(x), dim=-2):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        with pyro.plate("group", x.shape[1], dim=-1):
            pyro.sample("mean", dist.Normal(x.sum(0) / 6.25 + torch.tensor([0.0, 0.1, 0.4]), 0.4))

    found = pv.inference_gap(model, guide, X[:, None] + torch.arange(3))
    shifts = torch.tensor([0.0, 0.1, 0.4])
    torch.testing.assert_close(found.gap, 6.25 * shifts**2 / 2, rtol=0, atol=1e-4)
    assert (found.plates, found.worst[1]) == (("group",), 2)
    assert "nats per cell of 'group'" in str(found)
    assert "of cell 2" in repr(found)


def test_a_latent_that_is_summed_out_is_exact_or_estimated_like_others():
    """A mixture of two normals of a global mean of each: its exact number is a quadrature over both by hand."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 0.3).to_event(1))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(torch.tensor([-0.9, 1.1]), 0.27).to_event(1))

    grid, step = torch.linspace(-3, 3, 301).double(), 6 / 300
    loc = torch.cartesian_prod(grid, grid)
    mixture = dist.Normal(loc[:, None], 1.0).log_prob(X[:, None]) + torch.tensor([0.4, 0.6]).log()
    log_joint = mixture.logsumexp(-1).sum(-1) + dist.Normal(torch.tensor([-1.0, 1.0]), 0.3).log_prob(loc).sum(-1)
    expected = (log_joint.logsumexp(0) + 2 * torch.tensor(step).log()).item()
    found = pv.inference_gap(model, guide, X, num_samples=4000)
    assert abs(found.log_evidence.item() - expected) < SURE * found.log_evidence_error.item() + 1e-3
    assert found.why_no_split == "the guide leaves out ['c'], which are summed out"


def test_a_guide_that_cannot_be_refined_has_the_gap_without_a_split_and_the_reason():
    def dependent(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(logits=x[:, 0] - 1))
            pyro.sample("z", dist.Normal(x[:, 1] - kind / 4, 0.6))

    x = torch.tensor([[0.1, 0.3], [2.4, 0.2], [1.2, 0.4], [-1.0, -0.8]])
    found = pv.inference_gap(mixed_model, dependent, x, num_samples=5000)
    assert ((found.log_evidence - mixed_evidence(x)).abs() < SURE * found.log_evidence_error + 1e-3).all()
    assert found.why_no_split.startswith("`guide` must have latents that are independent given x")
    assert (found.plates, found.gap.shape, found.approximation) == (None, (4,), None)


def test_a_refined_guide_needs_a_split():
    with pytest.raises(ValueError, match="`refined` must be left out where there is no split: q of "):
        pv.inference_gap(mean_model, mean_guide, X, refined=mean_guide)
