"""ELBO, distortion and rate from traces against the loss and sums by hand, for every way to run a pair."""

import itertools
import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import NET, gaussian, guide_of, model_of, record_traces
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae import guides, likelihoods, priors
from pyro_vae._utils.traces import log_density
from pyro_vae.handlers import SubsampleRows, WeightKL
from pyro_vae.objectives.elbo_terms import elbo_terms

N = 5
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([4, 1])
P_TOP, Q_TOP = torch.tensor([[0.3, 0.7], [0.4, 0.6]]).double()
P_KIND = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).double()
Q_KIND = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]).double()
VECTORIZED = {"num_particles": 3, "vectorize_particles": True}


def continuous():
    return gaussian().double()


def discrete():
    return gaussian(prior=priors.Bernoulli(2, probs=0.3), encoder=guides.Bernoulli(3, 2, NET)).double()


def run(elbo, model, guide, x=X):
    """The loss, and the (model, guide) traces of its runs."""
    models, guides_ = [], []
    loss = elbo.loss(record_traces(model, models), record_traces(guide, guides_), x)
    used = 1 if elbo.vectorize_particles else elbo.num_particles
    return loss, list(zip(models[-used:], guides_[-used:], strict=True))


def by_hand(vae, traces, x=X):
    """Distortion and rate of each datum of a VAE at the draws of z in the traces, ``(K, N)``."""
    z = torch.stack([guide_trace.nodes["z"]["value"].reshape(-1, len(x), 2) for _, guide_trace in traces])
    return -vae.decode(z).log_prob(x), vae.encode(x).log_prob(z) - vae.prior().log_prob(z)


def assert_terms(traces, distortion, rate, loss=None):
    """The terms per datum are these, and add up to the loss."""
    terms, (distortion, rate) = elbo_terms(traces, N), (distortion.mean().item(), rate.mean().item())
    assert not any(value.requires_grad for value in terms.values())
    expected = {"elbo": -distortion - rate, "distortion": distortion, "rate": rate}
    assert terms == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if loss is not None:
        assert terms["elbo"].item() == pytest.approx(-loss / N, rel=1e-9)


@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}, VECTORIZED, VECTORIZED | {"max_plate_nesting": 1}])
@pytest.mark.parametrize("make", [continuous, discrete])
def test_terms_are_those_of_the_parts_and_add_up_to_the_loss(make, particles):
    vae = make()
    loss, traces = run(Trace_ELBO(**particles), vae.model, vae.guide)
    assert_terms(traces, *by_hand(vae, traces), loss)
    single = [elbo_terms([pair], N) for pair in traces]
    for name, value in elbo_terms(traces, N).items():
        assert value.item() == pytest.approx(sum(terms[name].item() for terms in single) / len(traces), rel=1e-12)


def test_terms_of_a_mini_batch_estimate_those_of_all_data():
    vae = continuous()
    with SubsampleRows("data", ROWS):
        loss, traces = run(Trace_ELBO(), vae.model, vae.guide)
    assert_terms(traces, *by_hand(vae, traces, X[ROWS]), loss)


def test_a_global_latent_is_not_scaled_up_with_the_rows():
    q = dist.Normal(torch.tensor(0.4).double(), 0.5)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=pyro.subsample(x, event_dim=1))

    def guide(x):
        pyro.sample("mu", q)

    with SubsampleRows("data", ROWS):
        loss, traces = run(Trace_ELBO(), model, guide)
    mu = traces[0][1].nodes["mu"]["value"]
    distortion = -dist.Normal(mu, 1.0).log_prob(X[ROWS]).sum(-1)
    assert_terms(traces, distortion, (q.log_prob(mu) - dist.Normal(0.0, 1.0).log_prob(mu)) / N, loss)


@pytest.mark.parametrize("weigh", [WeightKL(4.0), WeightKL(0.0), poutine.scale(scale=3.0)], ids=["4", "0", "scale"])
def test_terms_are_those_at_weight_1_for_any_scale_of_the_objective(weigh):
    vae = continuous()
    loss, traces = run(Trace_ELBO(), weigh(vae.model), weigh(vae.guide))
    assert_terms(traces, *by_hand(vae, traces))
    assert elbo_terms(traces, N)["elbo"].item() != pytest.approx(-loss / N, rel=1e-3)


def test_masked_data_do_not_count():
    vae, mask = continuous(), torch.tensor([True, True, False, True, False])
    loss, traces = run(Trace_ELBO(), poutine.mask(mask=mask)(vae.model), poutine.mask(mask=mask)(vae.guide))
    assert_terms(traces, *(term * mask for term in by_hand(vae, traces)), loss)


def test_log_density_of_a_site_is_masked_and_not_scaled():
    mask = torch.tensor([True, False])
    with poutine.trace() as tracer, poutine.scale(scale=5.0), poutine.mask(mask=mask), pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor([0.5, 0.5]))
    value = log_density(tracer.trace.nodes["x"])
    torch.testing.assert_close(value, torch.stack([dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)), torch.zeros(())]))


@pytest.mark.parametrize("particles", [{}, VECTORIZED], ids=["one", "vectorized"])
@pytest.mark.parametrize("rows", [torch.arange(N), ROWS], ids=["all rows", "some rows"])
def test_enumerated_terms_are_sums_over_all_states(rows, particles):
    vae, x = discrete(), X[rows]
    with SubsampleRows("data", rows):
        loss, traces = run(TraceEnum_ELBO(max_plate_nesting=1, **particles), vae.model, config_enumerate(vae.guide))
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=x.dtype)[:, None]
    log_q = vae.encode(x).log_prob(states)
    distortion = -(log_q.exp() * vae.decode(states).log_prob(x)).sum(0)
    assert_terms(traces, distortion, (log_q.exp() * (log_q - vae.prior().log_prob(states))).sum(0), loss)


def chain_model(x):
    """A global cluster, a local one that depends on it, a continuous latent that depends on both."""
    top = pyro.sample("top", dist.Categorical(P_TOP))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(P_KIND[top]))
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        mean = (kind + 0.5 * top + w)[..., None].expand(*(kind + top + w).shape, 3)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def chain_guide(x):
    top = pyro.sample("top", dist.Categorical(Q_TOP))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(Q_KIND[top]))
        pyro.sample("w", dist.Normal(0.1 * x.sum(-1), 0.5))


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_terms_of_enumerated_sites_that_depend_on_each_other_add_up_to_the_loss(weight):
    elbo, weigh = TraceEnum_ELBO(max_plate_nesting=1), WeightKL(weight)
    loss, traces = run(elbo, weigh(chain_model), weigh(config_enumerate(chain_guide)))
    terms = elbo_terms(traces, N)
    # The sum by hand is a loop over the states of the global latent and those of the local one.
    w = traces[0][1].nodes["w"]["value"]
    distortion, rate = 0.0, (Q_TOP * (Q_TOP / P_TOP).log()).sum()
    for top, kind in itertools.product(range(2), range(3)):
        q = Q_TOP[top] * Q_KIND[top, kind]
        distortion -= q * dist.Normal((kind + 0.5 * top + w)[:, None], 1.0).log_prob(X).sum()
        rate = rate + N * q * (Q_KIND[top, kind] / P_KIND[top, kind]).log()
    rate = rate + (dist.Normal(0.1 * X.sum(-1), 0.5).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w)).sum()
    assert terms["distortion"].item() == pytest.approx(distortion.item() / N, rel=1e-5)
    assert terms["rate"].item() == pytest.approx(rate.item() / N, rel=1e-5)
    assert loss / N == pytest.approx((terms["distortion"] + weight * terms["rate"]).item(), rel=1e-6)


def test_a_state_of_probability_zero_adds_nothing_even_if_the_data_are_impossible_in_it():
    model = model_of(dist.Categorical(torch.tensor([0.5, 0.5])), lambda z: dist.Bernoulli(1.0 - z.float()))
    guide = config_enumerate(guide_of(lambda x: dist.Categorical(torch.tensor([1.0, 0.0]))))
    _, traces = run(TraceEnum_ELBO(max_plate_nesting=1), model, guide, torch.ones(4))
    terms = elbo_terms(traces, 4)
    expected = {"elbo": -math.log(2), "distortion": 0, "rate": math.log(2)}
    assert terms == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_latent_that_the_model_marginalises_has_no_terms():
    vae = discrete()
    _, traces = run(TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.model), lambda x: None)
    assert elbo_terms(traces, N) is None


def test_the_name_of_the_bound_depends_on_the_likelihood():
    vae = gaussian(decoder=likelihoods.Bernoulli(2, 3, NET, soft_targets=True)).double()
    x = X.sigmoid()
    pyro.set_rng_seed(0)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    terms = pv.evaluate(vae.model, vae.guide, x)
    assert set(terms) == {"surrogate", "distortion", "rate"}
    assert terms["surrogate"] == pytest.approx(-loss / N, rel=1e-9)


@pytest.mark.parametrize("inside", [False, True], ids=["poutine.mask", "masked distribution"])
def test_states_of_a_masked_site_keep_their_probabilities(inside):
    """As in Pyro's own sum: if obs_mask gives y, its latent twin is masked, and each row counts once."""
    y, known = torch.tensor([2.0, 0.0, 1.0, 0.0]), torch.tensor([True, False, True, False])
    x, logits = torch.randn(4), torch.randn(4, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            drawn = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(drawn, 1.0), obs=x)

    def guide(x):
        q = dist.Categorical(logits=logits)
        with pyro.plate("data", len(x)), nullcontext() if inside else poutine.mask(mask=~known):
            pyro.sample("y_unobserved", q.mask(~known) if inside else q)

    log_q = logits.log_softmax(-1)
    log_p = dist.Normal(torch.arange(3.0), 1.0).log_prob(x[:, None]) - torch.tensor(3.0).log()
    summed = (log_q.exp() * (log_p - log_q)).sum(-1)
    expected = torch.where(known, log_p.gather(1, y.long()[:, None])[:, 0], summed).mean().item()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert pv.evaluate(model, config_enumerate(guide), x, elbo=elbo)["elbo"] == pytest.approx(expected, rel=1e-5)
    assert -elbo.loss(model, config_enumerate(guide), x) / 4 == pytest.approx(expected, rel=1e-5)


def test_the_name_of_a_bound_with_a_factor_is_surrogate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("bonus", torch.full((len(x),), 100.0))

    x, guide = torch.randn(5), guide_of(lambda x: dist.Normal(x / 2, 0.7))
    assert set(pv.evaluate(model, guide, x)) == {"surrogate", "distortion", "rate"}
    for call in (lambda: pv.log_evidence(model, guide, x), lambda: pv.exact.log_evidence(model, x)):
        with pytest.raises(ValueError, match=r"`model` must have a normalised likelihood, got .* at \['bonus'\]"):
            call()


def test_a_chain_enumerated_in_few_dimensions_has_a_bound_but_no_terms():
    def chain(x, start, slope, observe):
        with pyro.plate("data", len(x), dim=-1):
            z = torch.zeros(len(x), dtype=x.dtype)
            for t in pyro.markov(range(3)):
                z = pyro.sample(f"z{t}", dist.Bernoulli(start + slope * z))
                if observe:
                    pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    model = partial(chain, start=0.3, slope=0.4, observe=True)
    guide = config_enumerate(partial(chain, start=0.2, slope=0.5, observe=False))
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=X.dtype)
    before = torch.cat([torch.zeros(8, 1, dtype=X.dtype), states[:, :2]], 1)
    log_q = dist.Bernoulli(0.2 + 0.5 * before).log_prob(states).sum(-1)
    log_prior = dist.Bernoulli(0.3 + 0.4 * before).log_prob(states).sum(-1)
    log_likelihood = dist.Normal(states[:, None], 1.0).log_prob(X[:, :3]).sum(-1).mean(1)
    expected = (log_q.exp() * (log_likelihood + log_prior - log_q)).sum().item()
    found = pv.evaluate(model, guide, X[:, :3], elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert found == {"elbo": pytest.approx(expected, rel=1e-6)}
