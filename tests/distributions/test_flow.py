"""Flows: global switches are restored, draws are scored without an inversion, and a flow fits what no normal does."""

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gradient_estimates import gradient
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from sklearn.datasets import make_moons
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors
from pyro_vae.distributions import flow
from pyro_vae.exact import guide_density
from pyro_vae.parts.base import Unconditional
from pyro_vae.parts.families import multivariate

pytestmark = pytest.mark.skipif(find_spec("zuko") is None, reason="flows need zuko, `pip install 'pyro-vae[flows]'`")

SMALL = networks.mlp([6], nn.Tanh)


def nonlinear_net(module, std=0.3):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def guide(latent=3, kind="affine", dtype=torch.float64, **options):
    build = {"affine": guides.InverseAutoregressiveFlow, "spline": guides.SplineFlow}[kind]
    return nonlinear_net(build(2, latent, SMALL, **{"transforms": 2, "hidden": [8], "context": 3, **options})).to(dtype)


def small_vae(latent, kind, dtype=torch.float64, std=0.3):
    prior = nonlinear_net(priors.NormalizingFlow(latent, transforms=1, hidden=[6], kind=kind), std)
    encoder = nonlinear_net(guide(latent, kind, torch.float32, transforms=1, hidden=[6]), std)
    vae = pv.VAE(prior, encoder, likelihoods.Normal(latent, 2, SMALL, scale=1.0))
    return vae.to(dtype)


class Passes:
    """How often the masked networks of a part run."""

    def __init__(self, part):
        self.count = 0
        for step in part.family.steps.transforms:
            step.hyper.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def of(self, function, *args):
        before = self.count
        function(*args)
        return self.count - before


@pytest.mark.parametrize("validate", [True, False])
def test_validation_is_restored_and_zuko_is_imported_when_it_is_used(validate):
    program = f"""
import sys, torch
import pyro_vae
from pyro_vae import priors
assert torch.distributions.Distribution._validate_args
assert "zuko" not in sys.modules
torch.distributions.Distribution.set_default_validate_args({validate})
prior = priors.NormalizingFlow(2)
assert "zuko" in sys.modules
prior().log_prob(prior().sample((3,)))
assert torch.distributions.Distribution._validate_args is {validate}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_zuko_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"flows need zuko, .* not installed: `pip install 'pyro-vae\[flows\]'`"):
        priors.NormalizingFlow(2)
    assert torch.distributions.Distribution._validate_args


def test_an_error_inside_zuko_is_passed_on(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "zuko":
                raise ModuleNotFoundError("of zuko's own", name="another")

    monkeypatch.delitem(sys.modules, "zuko", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="of zuko's own"):
        flow.autoregressive(2, 0, "affine", 1, [4])


def test_its_text_draws_no_random_numbers(random_states):
    prior, before = priors.NormalizingFlow(2), random_states()
    text = "Flow(event_shape=(2,), kind='affine', transforms=3, hidden=(64, 64), context=0, inverse=False)"
    assert text in repr(prior)
    assert random_states() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cubic"}, "`kind` must be 'affine', 'spline'.*got 'cubic'"),
        ({"transforms": 0}, "`transforms` must be a positive integer.*got 0"),
        ({"hidden": [8, 0]}, r"`hidden` must be a positive integer or a tuple of them.*got \[8, 0\]"),
        ({"context": -1}, "`context` must be an integer, 0 or more.*got -1"),
        ({"context": 1.5}, "`context` must be an integer, 0 or more.*got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        multivariate.Flow(2, **options)


@pytest.mark.parametrize("kind", flow.KINDS)
@pytest.mark.parametrize("latent", [1, 3, (2, 2)])
def test_a_flow_starts_as_the_independent_normal_of_its_shift_and_scale(kind, latent):
    prior = priors.NormalizingFlow(latent, kind=kind).double()
    encoder = {"affine": guides.InverseAutoregressiveFlow, "spline": guides.SplineFlow}[kind](5, latent, SMALL).double()
    plain = guides.DiagonalNormal(5, latent, SMALL).double()
    plain.network[0] = encoder.network[0]
    for ours, theirs in zip(plain.network[2].parameters(), encoder.network[2].parameters(), strict=True):
        ours.data = theirs.data[: len(ours)]
    x = torch.randn(7, 5, dtype=torch.float64)
    z = torch.randn(7, *prior.event_shape, dtype=torch.float64)
    torch.testing.assert_close(encoder(x).log_prob(z), plain(x).log_prob(z))
    torch.testing.assert_close(prior().log_prob(z), priors.StandardNormal(latent).double()().log_prob(z))


def test_affine_steps_of_one_variable_are_a_normal_and_splines_are_not():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for kind, is_normal in (("affine", True), ("spline", False)):
        curvature = nonlinear_net(priors.NormalizingFlow(1, kind=kind), std=1.0)().log_prob(z).diff(n=3)
        assert (curvature.abs().max() < 1e-9) == is_normal


def test_a_guide_draws_and_scores_in_one_pass_a_prior_scores_any_value_in_one():
    part = guide(latent=5)
    passes = Passes(part)
    q = part(torch.randn(4, 2, dtype=torch.float64))
    z = q.rsample()
    assert passes.count == 2  # one for each step
    assert passes.of(q.log_prob, z) == 0
    assert passes.of(q.log_prob, z.detach()) == 2 * (5 + 1)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.detach()), rtol=0, atol=1e-9)
    prior = nonlinear_net(priors.NormalizingFlow(5, transforms=2, hidden=[8]))
    passes = Passes(prior)
    z = prior().rsample()
    assert passes.count == 2 * 5
    assert passes.of(prior().log_prob, z) == 2


@pytest.mark.parametrize("vectorized", [False, True])
def test_a_step_of_svi_inverts_no_guide(vectorized):
    vae = small_vae(4, "affine")
    passes = Passes(vae.encoder)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    elbo.loss_and_grads(vae.model, vae.guide, torch.randn(6, 2, dtype=torch.float64))
    assert passes.count == (1 if vectorized else 3)
    assert passes.of(elbo.loss, vae.model, vae.guide, torch.randn(6, 2, dtype=torch.float64)) == passes.count / 2


@pytest.mark.parametrize("kind", flow.KINDS)
def test_the_score_of_a_draw_has_the_gradient_of_the_inversion(kind):
    part = guide(kind=kind)
    q = part(torch.randn(4, 2, dtype=torch.float64))
    z = q.rsample()
    parameters = list(part.parameters())
    ours, theirs = (torch.autograd.grad(q.log_prob(value).sum(), parameters, retain_graph=True) for value in (z, z + 0))
    torch.testing.assert_close(ours, theirs)
    q = guide(4, kind, torch.float32)(torch.randn(50, 2))
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), rtol=1e-5, atol=2e-5)


def test_the_stored_score_of_a_draw_is_not_used_where_it_would_be_wrong():
    part = guide()
    q = part(torch.randn(4, 2, dtype=torch.float64))
    passes, parameters = Passes(part), list(part.parameters())
    fixed = q.sample()  # its score has the gradient at a fixed value: the score function
    score = torch.autograd.grad(q.log_prob(fixed).sum(), parameters, retain_graph=True)
    same = torch.autograd.grad(q.log_prob(fixed.clone()).sum(), parameters, retain_graph=True)
    torch.testing.assert_close(score, same)
    z = q.rsample()
    with torch.no_grad():
        assert passes.of(q.log_prob, fixed) == passes.of(q.log_prob, z) == 0
        assert not q.log_prob(z).requires_grad
        z.add_(1.0)
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    q = part.requires_grad_(False)(torch.randn(4, 2, dtype=torch.float64))
    leaf = q.rsample().requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)
    assert slope.abs().max() > 0
    with torch.inference_mode():
        q = part(torch.randn(4, 2, dtype=torch.float64))
        z = q.sample()
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_each_draw_keeps_its_own_score_and_is_forgotten_with_it():
    q = guide()(torch.randn(4, 2, dtype=torch.float64))
    draws = [q.rsample(), q.rsample((3,)), q.expand([2, 4]).rsample()]
    for z in draws:
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    known = [weakref.ref(score) for _, _, score in q._scored.values()]
    assert len(known) == 2
    del z, draws
    gc.collect()
    assert not len(q._scored)
    assert [score() for score in known] == [None, None]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_a_copy_of_the_distribution_has_no_stored_scores(copied):
    with torch.no_grad():
        q = guide()(torch.randn(4, 2, dtype=torch.float64))
        z = q.sample()
        twin = copied(q)
        assert len(q._scored) == 1
        assert not twin._scored
        torch.testing.assert_close(twin.log_prob(z), q.log_prob(z))


def test_any_transform_will_do_and_its_parameters_must_be_finite():
    each = torch.distributions.transforms.IndependentTransform(torch.distributions.ExpTransform(), 1)
    q, expected = flow.Flow(each, torch.zeros(3), torch.tensor(2.0)), dist.LogNormal(math.log(2), 1.0).expand([3])
    z = q.sample((9,))
    torch.testing.assert_close(q.log_prob(z), expected.to_event(1).log_prob(z))
    family = multivariate.Flow(2, hidden=[4])
    with pytest.raises(ValueError, match="`shift` must be a number or a tensor of them, got nan"):
        family(torch.full((family.num_raw,), math.nan))


@pytest.mark.parametrize(
    ("latent", "kind", "tolerance"),
    [
        (1, "affine", 1e-4),
        (1, "spline", 1e-4),
        (2, "affine", 1e-4),
        pytest.param(2, "spline", 3e-2, marks=pytest.mark.slow),
    ],
)
def test_the_three_exact_answers_add_up_with_flows(latent, kind, tolerance):
    vae, x = small_vae(latent, kind, std=0.2), torch.randn(3, 2, dtype=torch.float64)
    log_evidence = pv.exact.log_evidence(vae.model, x, tolerance=tolerance)
    elbo, kl = (answer(vae.model, vae.guide, x, tolerance=tolerance) for answer in (pv.exact.elbo, pv.exact.kl))
    assert (log_evidence - elbo - kl).abs().max() < 3 * tolerance
    estimate = pv.log_evidence(vae.model, vae.guide, x, num_samples=4000)
    assert (estimate.ess > 100).all()
    assert ((estimate.log_evidence - log_evidence).abs() < 6 * estimate.standard_error + tolerance).all()


@pytest.mark.parametrize(("latent", "kind"), [(1, "spline"), (2, "affine")])
def test_the_exact_elbo_of_a_flow_is_that_of_its_draws_and_inverts_no_flow(monkeypatch, latent, kind):
    vae, x = small_vae(latent, kind, std=0.3), torch.randn(3, 2, dtype=torch.float64)
    inverted, score = [], flow.Flow._score
    monkeypatch.setattr(flow.Flow, "_score", lambda q, z: inverted.append(z[..., 0].numel()) or score(q, z))
    exact = pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-3)
    assert sum(inverted) < 200, "a check, and none of the thousands of nodes"
    with torch.no_grad():
        q = vae.encode(x)
        z = q.sample((40_000,))
        terms = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - q.log_prob(z)
    assert ((exact - terms.mean(0)).abs() < 5 * terms.std(0) / math.sqrt(len(terms)) + 1e-3).all()
    some = pv.exact.elbo(vae.model, vae.guide, x[1:], tolerance=1e-3)
    torch.testing.assert_close(some, exact[1:], atol=2e-3, rtol=0)


def test_rows_that_a_coarse_lattice_answers_are_not_on_the_finer_ones(monkeypatch):
    vae, x, rows = small_vae(1, "affine"), torch.randn(3, 2, dtype=torch.float64), []
    expected, real = pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-5), guide_density.sum_on_lattice

    def one_is_precise(function, loc, *options):
        rows.append(len(loc))
        return real(function, loc, *options)[0], torch.arange(len(loc)) == 0

    monkeypatch.setattr(guide_density, "sum_on_lattice", one_is_precise)
    monkeypatch.delattr(guide_density.GuideDensity, "_on_cells")
    torch.testing.assert_close(pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-5), expected, atol=2e-5, rtol=0)
    assert rows == [3, 2, 1]


def exact_gradient(vae, x, size):
    """That of the ELBO, summed over x, by midpoints around the images of noise."""
    q, p = vae.encode(x), vae.prior()
    low, _, high = (corner.detach() for corner in q.extent()[:3])
    step = (high - low) / size
    axes = [low[:, axis] + step[:, axis] * (torch.arange(size)[:, None] + 0.5) for axis in range(low.shape[-1])]
    flat = torch.cartesian_prod(*[torch.arange(size)] * len(axes)).reshape(-1, len(axes))
    z = torch.stack([axis[flat[:, number]] for number, axis in enumerate(axes)], dim=-1)
    log_q = q.log_prob(z)
    mass = log_q.exp() * step.prod(-1)
    assert (mass.sum(0) - 1).abs().max() < 1e-4
    elbo = (mass * (p.log_prob(z) + vae.decode(z).log_prob(x) - log_q)).sum()
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(elbo, list(vae.parameters()))])


@pytest.mark.parametrize(("latent", "kind", "size"), [(1, "spline", 20_000), (2, "affine", 300)])
@pytest.mark.parametrize("estimator", ["Trace_ELBO", "pathwise", "sticking-the-landing", "doubly-reparameterized"])
def test_gradients_agree_with_those_of_quadrature(latent, kind, size, estimator):
    vae, x = small_vae(latent, kind), torch.randn(3, 2, dtype=torch.float64)
    elbo = Trace_ELBO() if estimator == "Trace_ELBO" else objectives.ImportanceWeighted(1, estimator)
    many, parameters = x.repeat(60, 1), list(vae.parameters())  # sixty copies of each datum are sixty draws
    estimates = torch.stack([gradient(elbo, vae.model, vae.guide, many, parameters) for _ in range(300)])
    target = exact_gradient(vae, x, size) / len(x)
    error = estimates.std(0) / math.sqrt(len(estimates))
    deviation = (estimates.mean(0) - target).abs()
    assert target.norm() > 10 * error.norm()
    assert (deviation <= 6 * error + 1e-4 * target.abs().max()).all()


def test_draws_for_arviz_have_the_shift_and_scale_of_the_guide():
    vae = small_vae(2, "affine", torch.float32)
    for parallel in (False, True):
        tree = pv.to_datatree(vae.model, vae.guide, torch.randn(7, 2), draws=20, parallel=parallel)
        assert dict(tree["posterior"]["z"].sizes) == {"chain": 1, "draw": 20, "obs": 7, "latent": 2}
        assert set(tree["guide"].data_vars) == {"z_shift", "z_scale"}


def noise_rule(count):
    """Nodes and weights of two standard normals, exact for polynomials of each to a degree below 2 count."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(count))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(-1)


def log_banana(z):
    """z2 around z1²: every cut along z2 is a normal, and the whole is none."""
    bend = dist.Normal(z[..., 0] ** 2, 0.4).log_prob(z[..., 1])
    return dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + bend


def best_normal_divergence():
    """The least KL(q ‖ banana) of a normal q of any covariance."""
    nodes, weights = noise_rule(8)  # the integrand is a polynomial of degree 4
    loc, raw = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    raw.requires_grad_()
    optimizer = torch.optim.LBFGS([loc, raw], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def divergence():
        optimizer.zero_grad()
        factor = torch.stack([torch.stack([raw[0].exp(), raw.new_zeros(())]), torch.stack([raw[2], raw[1].exp()])])
        log_q = dist.Normal(0.0, 1.0).log_prob(nodes).sum(-1) - raw[:2].sum()
        value = (weights * (log_q - log_banana(loc + nodes @ factor.T))).sum()
        value.backward()
        return value

    optimizer.step(divergence)
    return divergence().item()


@pytest.mark.parametrize("kind", flow.KINDS)
def test_a_flow_trained_by_svi_bends_to_a_target_that_no_normal_fits(kind):
    family = multivariate.Flow(2, kind, transforms=2, hidden=[32], inverse=True)
    part = Unconditional(family, nn.Parameter(torch.zeros(family.num_raw))).double()

    def target():
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).mask(False).to_event(1))
        pyro.factor("banana", log_banana(z))

    def q():
        pyro.module("flow", part)
        pyro.sample("z", part())

    elbo = Trace_ELBO(num_particles=128, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(target, q, Adam({"lr": 1e-2}), elbo)
    for _ in range(400):
        svi.step()
    nodes, weights = noise_rule(40)
    with torch.no_grad():
        flow = part()
        z = flow.shift + flow.scale * flow.transform(nodes)
        divergence = (weights * (flow.log_prob(z) - log_banana(z))).sum().item()
    assert 0 <= divergence < 0.1
    assert best_normal_divergence() > 0.5 > 5 * divergence


@pytest.mark.slow
def test_a_flow_prior_beats_a_normal_one_in_exact_held_out_evidence_of_two_moons():
    x, held_out = (
        torch.from_numpy(make_moons(count, noise=0.08, random_state=seed)[0]).float()
        for count, seed in ((500, 0), (60, 1))
    )
    evidence = []
    for prior in (priors.NormalizingFlow(2, transforms=1, hidden=[32], kind="spline"), priors.Normal(2)):
        encoder = guides.DiagonalNormal(2, 2, networks.linear())
        vae = pv.VAE(prior, encoder, likelihoods.Normal(2, 2, networks.linear(), scale=0.1))
        pv.fit(vae.model, vae.guide, x, epochs=120, batch_size=100, lr=1e-2)
        evidence.append(pv.exact.log_evidence(vae.model, held_out, tolerance=3e-2))
    gain = evidence[0] - evidence[1]
    assert gain.mean() > max(0.3, 4.3 * gain.std() / math.sqrt(len(gain)))
