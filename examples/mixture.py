"""
Two Gaussians, compared with enumeration
========================================

The cost of each way to train a latent-variable model, in nats, compared with the exact answer. The data are 1000
points, z ~ Bernoulli(1/2), x ~ N(±(1, 1), 0.1), where 0.1 is the standard deviation. They are fitted in nine ways:
one Gaussian by maximum likelihood, the mixture by enumerating z, the Jensen bound and naive Monte Carlo with the
prior, and VAEs with a Gaussian, a relaxed Bernoulli, a Gumbel-softmax, an enumerated and a score-function Bernoulli
latent. Each is evaluated on 10,000 new points by quadrature or enumeration, without Monte Carlo.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import common
import pyro
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.handlers import WeightKL

NETWORK, LINEAR = networks.mlp([32], activation=nn.Tanh), networks.linear()
Function = Callable[..., Any]


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "mixture", epochs=3000, unit="steps for each method, on all 1000 points")
    count = common.positive_int
    parser.add_argument("--lr", type=common.positive_float, default=1e-2, help="learning rate of Adam")
    parser.add_argument("--particles", type=count, default=32, help="draws of naive Monte Carlo")
    parser.add_argument("--kl-weight", type=float, default=1.0, help="weight of the VAEs' KL; at 0 codes drift apart")
    parser.add_argument("--test-points", type=count, default=10_000, help="new points to evaluate on")
    parser.add_argument("--draws", type=count, default=500, help="draws in the ArviZ files")
    return parser.parse_args()


def make_vae(latent: str) -> pv.VAE:
    """Make a VAE of points with one latent."""
    match latent:
        case "Gaussian":
            return pv.VAE(
                priors.StandardNormal(1), guides.DiagonalNormal(2, 1, NETWORK), likelihoods.Normal(1, 2, NETWORK)
            )
        case "Bernoulli":
            return pv.VAE(priors.Bernoulli(1), guides.Bernoulli(2, 1, NETWORK), likelihoods.Normal(1, 2, LINEAR))
        case "relaxed Bernoulli":
            encoder: nn.Module = guides.RelaxedBernoulli(2, 1, NETWORK, temperature=0.4)
            return pv.VAE(priors.RelaxedBernoulli(1, temperature=0.3), encoder, likelihoods.Normal(1, 2, LINEAR))
    encoder = guides.GumbelSoftmax(2, (1, 2), NETWORK, temperature=0.4)
    return pv.VAE(priors.GumbelSoftmax((1, 2), temperature=0.3), encoder, likelihoods.Normal((1, 2), 2, LINEAR))


def no_guide(x: Tensor) -> None:
    """The guide of a model that sums over its latent."""


def make_methods(particles: int) -> dict[str, tuple[pv.VAE, Function, Function, ELBO]]:
    """Make an untrained VAE for every method, and the model, guide and ELBO that train it."""
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    k_sample = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    mixture, jensen, naive, normal = map(make_vae, ["Bernoulli", "Gaussian", "Gaussian", "Gaussian"])
    relaxed, gumbel, summed, scored = map(make_vae, ["relaxed Bernoulli", "Gumbel-softmax", "Bernoulli", "Bernoulli"])
    return {
        "exact mixture": (mixture, config_enumerate(mixture.model), no_guide, enum),
        "Jensen under the prior": (jensen, jensen.model, common.prior_as_guide(jensen), Trace_ELBO()),
        "naive Monte Carlo": (naive, naive.model, common.prior_as_guide(naive), k_sample),
        "Gaussian": (normal, normal.model, normal.guide, Trace_ELBO()),
        "relaxed Bernoulli": (relaxed, relaxed.model, relaxed.guide, Trace_ELBO()),
        "Gumbel-softmax": (gumbel, gumbel.model, gumbel.guide, Trace_ELBO()),
        "enumerated Bernoulli": (summed, summed.model, config_enumerate(summed.guide), enum),
        "score function": (scored, scored.model, scored.guide, Trace_ELBO()),
    }


def evaluate(vae: pv.VAE, guide: Function | None, test: pv.datasets.TwoGaussians, new: Tensor) -> dict[str, float]:
    """Compute exact log p(x), ELBO and KL, each by its own sum or quadrature, for a row of the table."""
    evidence = pv.exact.log_evidence(vae.model, test.x)
    row = {"log_p": float(evidence.mean())}
    if guide is not None:
        elbo, gap = pv.exact.elbo(vae.model, guide, test.x), pv.exact.kl(vae.model, guide, test.x)
        residual = float((evidence - elbo - gap).abs().max())
        row |= {"elbo": float(elbo.mean()), "kl": float(gap.mean()), "residual": residual}
    if guide == vae.guide:
        q = vae.encode(test.x).base_dist
        code = q.logits.flatten(1) if hasattr(q, "logits") else q.mean
        found = code[:, -1] > (code[:, 0] if code.shape[1] == 2 else 0)
    else:  # the guide does not depend on x: use the exact posterior
        mean = pv.exact.posterior(vae.model, test.x).mean.flatten()
        found = mean > (0.5 if isinstance(vae.prior, priors.Bernoulli) else 0)
    row["accuracy"] = common.cluster_accuracy(found, test.labels)
    return row | {"energy": common.energy_distance(vae.generate(len(new)), new)}


COLUMNS = {"log p(x)": "{log_p:.4f}", "lost": "{lost:.4f}", "ELBO": "{elbo:.4f}", "KL(q||p)": "{kl:.4f}"}
COLUMNS |= {"residual": "{residual:.0e}", "accuracy": "{accuracy:.4f}", "energy": "{energy:.4f}"}
NOTES = """energy: energy distance to new data; between two new samples it is {0:.4f} to {1:.4f} (90 %)
accuracy: of the more likely z, or of the sign of a continuous z's mean; residual: max |log p - ELBO - KL|"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train = pv.datasets.two_gaussians(1000, seed=args.seed)
    test = pv.datasets.two_gaussians(args.test_points, seed=args.seed + 1)
    new = pv.datasets.two_gaussians(min(2000, args.test_points), seed=args.seed + 2).x
    truth = float(test.log_prob(test.x).mean())
    expected = -math.log(2) - math.log(2 * math.pi * math.e * test.scale**2)  # the components do not overlap
    band = common.null_band(len(new), repeats=50)
    full = torch.distributions.MultivariateNormal(train.x.mean(0), train.x.T.cov(correction=0))
    samples = {"new data": test.x, "one full Gaussian": full.sample(torch.Size([len(new)]))}
    energy = common.energy_distance(samples["one full Gaussian"], new)
    rows = {"one full Gaussian": {"log_p": float(full.log_prob(test.x).mean()), "energy": energy, "seconds": 0.0}}
    trees = {}
    for name, (vae, model, guide, elbo) in make_methods(args.particles).items():
        weighted = WeightKL(args.kl_weight if guide == vae.guide else 1.0)
        options = {"epochs": args.epochs, "lr": args.lr, "elbo": elbo, "seed": args.seed}
        seconds = pv.fit(weighted(model), weighted(guide), train.x, **options).seconds
        q = {"exact mixture": None, "enumerated Bernoulli": vae.guide}.get(name, guide)
        cases = {name: (vae, q)}
        if name in ("relaxed Bernoulli", "Gumbel-softmax"):
            twin = vae.discrete()
            cases = {f"{name}, relaxed": (vae, q), f"{name}, twin": (twin, twin.guide)}
        for title, (evaluated, q) in cases.items():
            rows[title] = evaluate(evaluated, q, test, new) | {"seconds": seconds}
            samples[title] = evaluated.generate(1000)
        if name in ("Gaussian", "relaxed Bernoulli", "Gumbel-softmax", "enumerated Bernoulli"):
            file = name.lower().replace(" ", "_").replace("-", "_")
            trees[file] = common.make_tree(vae, test.x[:200], args, coords={"label": ("obs", test.labels[:200])})
        print(f"{name}: {seconds:.1f} s", flush=True)
    for row in rows.values():
        row["lost"] = truth - row["log_p"]
    text = common.table("nats per point on test data", {"truth": {"log_p": truth}} | rows, COLUMNS, NOTES.format(*band))
    print(text)
    found = {"truth": {"log_p": truth, "expected_log_p": expected, "energy_null_band": band}, "methods": rows}
    titled = {f"{name}\nloses {rows[name]['lost']:.3f}" if name in rows else name: x for name, x in samples.items()}
    common.save(args, found, {"generated": common.draw_points(titled)}, trees, text)


if __name__ == "__main__":
    main(parse_args())
