"""
Two Gaussians, against enumeration
==================================

What each way to train a latent-variable model costs, in nats, against the exact answer. The data are 1000 points,
z ~ Bernoulli(1/2), x ~ N(±(1, 1), 0.1), with 0.1 the standard deviation. A model of them is fitted in nine ways: one
Gaussian by maximum likelihood, the mixture by enumerating z, the Jensen bound and naive Monte Carlo under the prior,
and VAEs with a Gaussian, a relaxed Bernoulli, a Gumbel-softmax, an enumerated and a score-function Bernoulli latent.
Each is judged on 10,000 fresh points by quadrature or enumeration, without Monte Carlo.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "mixture", epochs=3000, unit="steps of SVI for each method, on all 1000 points")
    parser.add_argument("--lr", type=options.positive, default=1e-2, help="learning rate of Adam")
    parser.add_argument("--particles", type=options.count, default=32, help="samples of naive Monte Carlo")
    weight = "weight of the VAEs' KL; at 0 codes drift apart"
    parser.add_argument("--kl-weight", type=float, default=1.0, help=weight)
    parser.add_argument("--test-points", type=options.count, default=10_000, help="fresh points to judge on")
    parser.add_argument("--draws", type=options.count, default=500, help="draws in the ArviZ files")
    args = parser.parse_args()

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mixture_pictures as pictures
import pyro
import results
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors
from pyro_vae.handlers import WeightKL

NETWORK = networks.mlp([32], activation=nn.Tanh)


Judged = dict[str, tuple[pv.VAE, Callable[..., Any] | None]]


@dataclass
class Method:
    """One way to train: a VAE, the pair that SVI is given, and the pairs that the result is judged as."""

    vae: pv.VAE
    model: Callable[..., Any]
    guide: Callable[..., Any]
    elbo: ELBO = field(default_factory=Trace_ELBO)
    judged: Judged = field(default_factory=dict)


def enumerated() -> ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def bernoulli_vae() -> pv.VAE:
    return pv.VAE(
        prior=priors.Bernoulli(1),
        encoder=guides.Bernoulli(in_features=2, latent=1, network=NETWORK),
        decoder=likelihoods.Normal(latent=1, out_features=2, network=networks.linear()),
    )


def gaussian_vae() -> pv.VAE:
    return pv.VAE(
        prior=priors.StandardNormal(1),
        encoder=guides.DiagonalNormal(in_features=2, latent=1, network=NETWORK),
        decoder=likelihoods.Normal(latent=1, out_features=2, network=NETWORK),
    )


def relaxed_bernoulli_vae() -> pv.VAE:
    return pv.VAE(
        prior=priors.RelaxedBernoulli(1, temperature=0.3),
        encoder=guides.RelaxedBernoulli(in_features=2, latent=1, network=NETWORK, temperature=0.4),
        decoder=likelihoods.Normal(latent=1, out_features=2, network=networks.linear()),
    )


def gumbel_softmax_vae() -> pv.VAE:
    return pv.VAE(
        prior=priors.GumbelSoftmax((1, 2), temperature=0.3),
        encoder=guides.GumbelSoftmax(in_features=2, latent=(1, 2), network=NETWORK, temperature=0.4),
        decoder=likelihoods.Normal(latent=(1, 2), out_features=2, network=networks.linear()),
    )


def prior_as_guide(vae: pv.VAE) -> Callable[[Tensor], None]:
    """q(z | x) = p(z): the ELBO is then Jensen's bound under the prior."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.prior())

    return guide


def no_guide(x: Tensor) -> None:
    """Nothing to infer: the model sums its latent out."""


def methods(particles: int) -> dict[str, Method]:
    """Every latent-variable method, by name, untrained."""
    made: dict[str, Method] = {}
    vae = bernoulli_vae()
    made["exact mixture"] = Method(
        vae, config_enumerate(vae.model), no_guide, enumerated(), {"exact mixture": (vae, None)}
    )
    vae = gaussian_vae()
    guide = prior_as_guide(vae)
    made["Jensen under the prior"] = Method(vae, vae.model, guide, judged={"Jensen under the prior": (vae, guide)})
    vae = gaussian_vae()
    guide = prior_as_guide(vae)
    k_sample = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    made["naive Monte Carlo"] = Method(vae, vae.model, guide, k_sample, {"naive Monte Carlo": (vae, guide)})
    vae = gaussian_vae()
    made["Gaussian"] = Method(vae, vae.model, vae.guide, judged={"Gaussian": (vae, vae.guide)})
    for name, vae in {"relaxed Bernoulli": relaxed_bernoulli_vae(), "Gumbel-softmax": gumbel_softmax_vae()}.items():
        twin = vae.discrete()
        rows: Judged = {f"{name}, relaxed": (vae, vae.guide), f"{name}, twin": (twin, twin.guide)}
        made[name] = Method(vae, vae.model, vae.guide, judged=rows)
    vae = bernoulli_vae()
    name = "enumerated Bernoulli"
    made[name] = Method(vae, vae.model, config_enumerate(vae.guide), enumerated(), {name: (vae, vae.guide)})
    vae = bernoulli_vae()
    made["score function"] = Method(vae, vae.model, vae.guide, judged={"score function": (vae, vae.guide)})
    return made


def clusters(vae: pv.VAE, guide: Callable[..., Any] | None, x: Tensor) -> Tensor:
    """The cluster of each point: the likelier state of q(z | x), or for a continuous z the sign of its mean or logit.

    A guide that knows nothing of x has none; then the exact posterior takes its place.
    """
    if guide != vae.guide:
        mean = pv.exact.posterior(vae.model, x).mean
        return (mean > (0.5 if isinstance(vae.prior, priors.Bernoulli) else 0)).flatten()
    q = vae.encode(x).base_dist
    if hasattr(q, "logits"):
        logits = q.logits.flatten(1)
        return logits[:, -1] > (logits[:, 0] if logits.shape[1] == 2 else 0)
    return (q.mean > 0).flatten()


def accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of right clusters, whichever of the two is called 1."""
    right = (found == (labels == 1)).double().mean().item()
    return max(right, 1 - right)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, zero for equal laws (Székely and Rizzo 2013)."""
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def null_band(num_points: int, repeats: int) -> tuple[float, float]:
    """5th and 95th percentile of the energy distance between two fresh samples of the truth."""
    fresh = [pv.datasets.two_gaussians(num_points, seed=1000 + index).x for index in range(2 * repeats)]
    distances = torch.tensor([energy_distance(*pair) for pair in zip(fresh[::2], fresh[1::2], strict=True)])
    low, high = distances.quantile(torch.tensor([0.05, 0.95])).tolist()
    return low, high


def evaluate(vae: pv.VAE, guide: Callable[..., Any] | None, test: pv.datasets.TwoGaussians, fresh: Tensor) -> dict:
    """A row of the table: exact log p(x), ELBO and KL, each from a sum or quadrature of its own."""
    evidence = pv.exact.log_evidence(vae.model, test.x)
    row = {"log_p": float(evidence.mean())}
    if guide is not None:
        elbo, gap = pv.exact.elbo(vae.model, guide, test.x), pv.exact.kl(vae.model, guide, test.x)
        residual = float((evidence - elbo - gap).abs().max())
        row |= {"elbo": float(elbo.mean()), "kl": float(gap.mean()), "residual": residual}
    row["accuracy"] = accuracy(clusters(vae, guide, test.x), test.labels)
    row["energy"] = energy_distance(vae.generate(len(fresh)), fresh)
    return row


def full_gaussian(train: Tensor, test: Tensor, fresh: Tensor) -> tuple[dict, Tensor]:
    """One Gaussian by maximum likelihood: the mean and covariance of the data."""
    started = time.perf_counter()
    q = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov(correction=0))
    seconds = time.perf_counter() - started
    drawn = q.sample(torch.Size([len(fresh)]))
    return {"log_p": float(q.log_prob(test).mean()), "energy": energy_distance(drawn, fresh), "seconds": seconds}, drawn


@torch.no_grad()
def monte_carlo_errors(vae: pv.VAE, x: Tensor, sizes: list[int], repeats: int = 20) -> dict[str, Tensor]:
    """Mean |log p̂(x) - log p(x)| of K-sample estimates with proposals from the prior and from q, for each K."""
    exact = pv.exact.log_evidence(vae.model, x)
    errors: dict[str, list[float]] = {"prior": [], "q": []}
    for size in sizes:
        for name, proposal in {"prior": vae.prior().expand([len(x)]), "q": vae.encode(x)}.items():
            z = proposal.sample(torch.Size([repeats, size]))
            log_weight = vae.decode(z).log_prob(x) + vae.prior().log_prob(z) - proposal.log_prob(z)
            estimate = log_weight.logsumexp(1) - torch.tensor(size).log()
            errors[name].append(float((estimate - exact).abs().mean()))
    return {name: torch.tensor(values) for name, values in errors.items()}


def table(rows: dict[str, dict], truth: float, expected: float, band: tuple[float, float]) -> str:
    columns = {
        "log_p": "log p(x)",
        "lost": "lost",
        "elbo": "ELBO",
        "kl": "KL(q||p)",
        "residual": "residual",
        "accuracy": "accuracy",
        "energy": "energy",
        "seconds": "seconds",
    }
    formats = {"residual": ".0e", "accuracy": ".4f", "energy": ".4f", "seconds": ".1f"}
    lines = [f"{'nats per point on test data':28s}" + "".join(f"{title:>10s}" for title in columns.values())]
    for name, row in {"truth": {"log_p": truth}, **rows}.items():
        cells = row | {"lost": truth - row["log_p"]}
        shown = [f"{cells[key]:{formats.get(key, '.4f')}}" if key in cells else "" for key in columns]
        lines.append(f"{name:28s}" + "".join(f"{cell:>10s}" for cell in shown))
    lines += [
        f"truth: its log p(x) on these test points; {expected:.4f} in expectation",
        f"energy: energy distance to fresh data; of fresh data to each other {band[0]:.4f} to {band[1]:.4f} (90 %)",
        "accuracy: of the likelier z, or of the sign of a continuous z's mean; residual: max |log p - ELBO - KL|",
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train = pv.datasets.two_gaussians(1000, seed=args.seed)
    test = pv.datasets.two_gaussians(args.test_points, seed=args.seed + 1)
    fresh = pv.datasets.two_gaussians(min(2000, args.test_points), seed=args.seed + 2).x
    truth = float(test.log_prob(test.x).mean())
    # The entropy of the mixture, whose components do not overlap: log 2 + log(2 pi e scale^2).
    expected = -math.log(2) - math.log(2 * math.pi * math.e * test.scale**2)
    band = null_band(len(fresh), repeats=50)
    row, drawn = full_gaussian(train.x, test.x, fresh)
    rows, generated = {"one full Gaussian": row}, {"one full Gaussian": drawn}

    histories: dict[str, dict[str, list[float]]] = {}
    judged: Judged = {}
    for name, method in methods(args.particles).items():
        weight = WeightKL(args.kl_weight) if method.guide == method.vae.guide else WeightKL(1.0)
        fitted = pv.fit(
            weight(method.model),
            weight(method.guide),
            train.x,
            epochs=args.epochs,
            lr=args.lr,
            elbo=method.elbo,
            seed=args.seed,
        )
        histories[name] = fitted.history
        for title, (vae, guide) in method.judged.items():
            rows[title] = evaluate(vae, guide, test, fresh) | {"seconds": fitted.seconds}
            judged[title] = (vae, guide)
            generated[title] = vae.generate(1000)
            print(f"{title}: log p(x) = {rows[title]['log_p']:.4f} nats per point", flush=True)

    report = table(rows, truth, expected, band)
    print(f"\n{report}\n")
    sizes = [2**power for power in range(0, 13, 2)]
    errors = monte_carlo_errors(judged["Gaussian"][0], test.x[:200], sizes)
    found = {
        "truth": {"log_p": truth, "expected_log_p": expected, "energy_null_band": band},
        "methods": rows,
        "naive_monte_carlo": {"samples": sizes} | {name: values.tolist() for name, values in errors.items()},
    }
    trees = {}
    for title in ("Gaussian", "relaxed Bernoulli, relaxed", "Gumbel-softmax, relaxed", "enumerated Bernoulli"):
        vae = judged[title][0]
        file = title.partition(",")[0].lower().replace(" ", "_").replace("-", "_")
        coords = {"label": ("obs", test.labels[:200])}
        trees[file] = pv.to_datatree(
            vae.model, vae.guide, test.x[:200], draws=args.draws, seed=args.seed, coords=coords, parallel=True
        )
    drawings = {
        "data": pictures.data(train),
        "training": pictures.training(histories, float(train.log_prob(train.x).mean())),
        "generated": pictures.generated(test.x[:1000], generated, rows, truth),
        "latent": pictures.latent({title: judged[title][0] for title in pictures.VAES}, test),
        "posterior": pictures.posteriors({title: judged[title][0] for title in pictures.VAES}),
        "naive_monte_carlo": pictures.monte_carlo(sizes, errors),
        "plates": pictures.plates({title: judged[title][0] for title in pictures.VAES[:2]}, train.x),
    }
    results.save(args, found, drawings, trees, report)


if __name__ == "__main__":
    main(args)
