"""
Two Gaussians, compared with enumeration
========================================

The cost of each way to train a latent-variable model, in nats, compared with the exact answer. The data are 1000
points, z ~ Bernoulli(1/2), x ~ N(±(1, 1), 0.1), where 0.1 is the standard deviation. They are fitted by maximum
likelihood, of one Gaussian and of the mixture with z summed out, and by VAEs: with the prior as the guide; with a
Gaussian latent; with a bit, by enumeration and by the score function; and with relaxed latents, at one temperature and
with a temperature that falls. Each is evaluated on new points by quadrature or enumeration, without Monte Carlo. Each
family has a picture: posterior, samples and loss of every method next to each other.
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
from pyro_vae import guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.handlers import WeightKL

NETWORK, LINEAR = networks.mlp([32], activation=nn.Tanh), networks.linear()
Function = Callable[..., Any]
Method = tuple[pv.VAE, Function, Function, ELBO]
LESSONS = {
    "one full Gaussian": "One Gaussian has to cover both clusters and the space between.",
    "exact mixture": "With z summed out, maximum likelihood is as good as it gets.",
    "enumerated Bernoulli": "A guide for z costs nothing if every step sums over its states.",
    "score function": "A drawn bit works as well: with one bit the noise of the score function does no harm.",
    "Jensen under the prior": "A guide that ignores x makes the best model ignore z.",
    "naive Monte Carlo": "Draws from the prior fit well, with points between the clusters; their ELBO is useless.",
    "Gaussian": "A continuous latent connects the clusters, and its posterior is no Gaussian.",
    "relaxed Bernoulli, relaxed": "Codes between 0 and 1 put points between the clusters.",
    "relaxed Bernoulli, twin": "The same decoder with a hard bit is better, but it was trained for soft bits.",
    "relaxed Bernoulli, annealed": "A falling temperature with the KL of the bit is as good as enumeration.",
    "relaxed Bernoulli, annealed, relaxed KL": "At any temperature the relaxed KL makes sure codes costly: no cure.",
}
LESSONS |= {
    name.replace("relaxed Bernoulli", "Gumbel-softmax"): lesson for name, lesson in LESSONS.items() if "," in name
}
COLDEST = 0.02


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "mixture", epochs=3000, unit="steps for each method, on all 1000 points")
    count = common.positive_int
    parser.add_argument("--lr", type=common.positive_float, default=1e-2, help="learning rate of Adam")
    parser.add_argument("--particles", type=count, default=32, help="draws of naive Monte Carlo")
    parser.add_argument("--kl-weight", type=float, default=1.0, help="weight of the VAEs' KL; at 0 codes drift apart")
    parser.add_argument("--test-points", type=count, default=5000, help="new points to evaluate on")
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


def make_methods(particles: int) -> dict[str, dict[str, Method]]:
    """Make untrained VAEs by family and method, with the model, guide and ELBO that train each."""
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    k_sample = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    mixture, summed, scored = (make_vae("Bernoulli") for _ in range(3))
    jensen, naive, normal = (make_vae("Gaussian") for _ in range(3))
    families: dict[str, dict[str, Method]] = {
        "bernoulli": {
            "exact mixture": (mixture, config_enumerate(mixture.model), no_guide, enum),
            "enumerated Bernoulli": (summed, summed.model, config_enumerate(summed.guide), enum),
            "score function": (scored, scored.model, scored.guide, Trace_ELBO()),
        },
        "relaxed_bernoulli": relaxed_methods("relaxed Bernoulli"),
        "gumbel_softmax": relaxed_methods("Gumbel-softmax"),
        "gaussian": {
            "Gaussian": (normal, normal.model, normal.guide, Trace_ELBO()),
            "Jensen under the prior": (jensen, jensen.model, common.prior_as_guide(jensen), Trace_ELBO()),
            "naive Monte Carlo": (naive, naive.model, common.prior_as_guide(naive), k_sample),
        },
    }
    return families


def relaxed_methods(latent: str) -> dict[str, Method]:
    """Make a VAE for one temperature, and two whose temperature falls."""
    elbos = {"": Trace_ELBO(), ", annealed": objectives.DiscreteKL(), ", annealed, relaxed KL": Trace_ELBO()}
    vaes = {latent + suffix: (make_vae(latent), elbo) for suffix, elbo in elbos.items()}
    return {name: (vae, vae.model, vae.guide, elbo) for name, (vae, elbo) in vaes.items()}


def falling_temperatures(vae: pv.VAE, steps: int) -> dict[Tensor, schedules.Schedule]:
    """Let the temperatures of prior and guide fall from 1 to 0.02 in the first 80 % of the steps."""
    falling = schedules.exponential(1.0, rate=-math.log(COLDEST) / (0.8 * steps), floor=COLDEST)
    return {part.get_buffer("family.temperature"): falling for part in (vae.prior, vae.encoder)}


@torch.no_grad()
def mean_code(vae: pv.VAE, guide: Function | None, x: Tensor) -> Tensor:
    """Compute the probability of z = 1, or the mean of a Gaussian z: of q(z | x), or of p(z | x) if q ignores x."""
    if guide != vae.guide:
        return pv.exact.posterior(vae.model, x).mean.flatten()
    q = vae.encode(x).base_dist
    if isinstance(vae.prior, priors.StandardNormal):
        return q.mean.flatten()
    logits = q.logits.flatten(1)
    return logits.softmax(1)[:, 1] if logits.shape[1] == 2 else logits.sigmoid().flatten()


class Losses:
    """A callback: the nats that models lose against the truth on 200 points, at 16 steps of their training."""

    def __init__(self, models: dict[str, pv.VAE], test: pv.datasets.TwoGaussians, epochs: int):
        self.models, self.every, self.x = models, max(1, epochs // 15), test.x[:200]
        self.truth = float(test.log_prob(self.x).mean())
        self.steps: list[int] = []
        self.lost: dict[str, list[float]] = {name: [] for name in models}
        self(0)

    def __call__(self, epoch: Any) -> None:
        number = epoch if epoch == 0 else epoch.number
        if number % self.every == 0:
            self.steps.append(number)
            for name, vae in self.models.items():
                self.lost[name].append(self.truth - float(pv.exact.log_evidence(vae.model, self.x).mean()))


def evaluate(vae: pv.VAE, guide: Function | None, test: pv.datasets.TwoGaussians, new: Tensor) -> dict[str, float]:
    """Compute exact log p(x) and ELBO for a row of the table; on the first 1000 points also the KL between them."""
    parts, first = test.x.split(1000), test.x[:1000]
    evidence = torch.cat([pv.exact.log_evidence(vae.model, x) for x in parts])
    row = {"log_p": float(evidence.mean())}
    if guide is not None:
        elbo = torch.cat([pv.exact.elbo(vae.model, guide, x) for x in parts])
        row |= {"elbo": float(elbo.mean()), "kl": float((evidence - elbo).mean())}
        gap = pv.exact.kl(vae.model, guide, first)
        row["residual"] = float(((evidence - elbo)[: len(first)] - gap).abs().max())
    found = mean_code(vae, guide, first) > (0 if isinstance(vae.prior, priors.StandardNormal) else 0.5)
    row["accuracy"] = common.cluster_accuracy(found, test.labels[:1000])
    return row | {"energy": common.energy_distance(vae.generate(len(new)), new)}


COLUMNS = {"log p(x)": "{log_p:.4f}", "lost": "{lost:.4f}", "ELBO": "{elbo:.4f}", "KL(q||p)": "{kl:.4f}"}
COLUMNS |= {"residual": "{residual:.0e}", "accuracy": "{accuracy:.4f}", "energy": "{energy:.4f}"}
NOTES = """energy: energy distance to new data; between two new samples it is {0:.4f} to {1:.4f} (90 %)
accuracy: of the more likely z, or of the sign of a continuous z's mean; residual: max |log p - ELBO - KL|;
both on the first 1000 points. What each row teaches:
"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train = pv.datasets.two_gaussians(1000, seed=args.seed)
    test = pv.datasets.two_gaussians(args.test_points, seed=args.seed + 1)
    new = pv.datasets.two_gaussians(min(2000, args.test_points), seed=args.seed + 2).x
    truth = float(test.log_prob(test.x).mean())
    expected = -math.log(2) - math.log(2 * math.pi * math.e * test.scale**2)  # the components do not overlap
    band = common.null_band(len(new), repeats=50)
    full = torch.distributions.MultivariateNormal(train.x.mean(0), train.x.T.cov(correction=0))
    log_p, energy = float(full.log_prob(test.x).mean()), common.energy_distance(full.sample((len(new),)), new)
    rows = {"one full Gaussian": {"log_p": log_p, "lost": truth - log_p, "energy": energy, "seconds": 0.0}}
    trees: dict[str, Any] = {}
    shown: dict[str, pv.VAE] = {}
    for family, methods in make_methods(args.particles).items():
        panels: dict[str, Any] = {}
        for name, (vae, model, guide, elbo) in methods.items():
            weighted = WeightKL(args.kl_weight if guide == vae.guide else 1.0)
            falling = falling_temperatures(vae, args.epochs) if "annealed" in name else {}
            q = {"exact mixture": None, "enumerated Bernoulli": vae.guide}.get(name, guide)
            cases = {name: (vae, q)}
            if isinstance(vae.prior, priors.RelaxedBernoulli | priors.GumbelSoftmax):
                twin = vae.discrete()
                cases = {f"{name}, relaxed": (vae, q), f"{name}, twin": (twin, twin.guide)}
                cases = {name: (twin, twin.guide)} if falling else cases
            record = Losses({title: evaluated for title, (evaluated, _) in cases.items()}, test, args.epochs)
            options = {"epochs": args.epochs, "lr": args.lr, "elbo": elbo, "seed": args.seed, "callbacks": [record]}
            fitted = pv.fit(weighted(model), weighted(guide), train.x, schedules=falling, **options)
            for title, (evaluated, q) in cases.items():
                rows[title] = row = evaluate(evaluated, q, test, new) | {"seconds": fitted.seconds}
                row["lost"] = truth - row["log_p"]
                lost = f"loses {row['lost']:.3f} nats per point"
                codes, steps = mean_code(evaluated, q, test.x[:500]), record.steps
                panels[f"{title}\n{lost}"] = codes, evaluated.generate(500), (steps, record.lost[title])
                print(f"{title}: {lost}, {fitted.seconds:.1f} s", flush=True)
                if q is not None:
                    shown.setdefault(family, evaluated)
        common.save_figure(args, family, common.draw_fits(test.x[:500], panels))
        trees[family] = common.make_tree(
            shown[family], test.x[:200], args, coords={"label": ("obs", test.labels[:200])}
        )
    notes = NOTES.format(*band) + "\n".join(f"  {name}: {LESSONS[name]}" for name in rows)
    text = common.table("nats per point on test data", {"truth": {"log_p": truth}} | rows, COLUMNS, notes)
    print(text)
    found = {"truth": {"log_p": truth, "expected_log_p": expected, "energy_null_band": band}, "methods": rows}
    common.save(args, found, {}, trees, text)


if __name__ == "__main__":
    main(parse_args())
