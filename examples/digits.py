"""A first VAE on real handwritten digits: two latent dimensions, 8 × 8 binary pixels, everything exact by quadrature.

The 1797 digits come with scikit-learn. A 2-D Gaussian latent and a Bernoulli likelihood are fitted to 1500 of them; on
the other 297 the held-out ELBO stands beside the exact log p(x).
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, plots, priors

SHAPE = (8, 8)


def digits_vae(hidden: int) -> pv.VAE:
    network = networks.mlp([hidden], activation=nn.Tanh)
    return pv.VAE(
        prior=priors.StandardNormal(2),
        encoder=guides.DiagonalNormal(in_features=64, latent=2, network=network),
        decoder=likelihoods.Bernoulli(latent=2, out_features=64, network=network),
    )


def pictures(vae: pv.VAE, fitted: pv.Fitted, test: pv.datasets.Dataset) -> dict[str, plt.Figure]:
    """Training curves, latent map, reconstructions, samples and the decoder's manifold."""
    figures = {}

    def canvas(name: str, title: str, size: tuple[float, float] = (6, 5)) -> plt.Axes:
        figures[name], ax = plt.subplots(figsize=size, layout="constrained")
        ax.set_title(title)
        return ax

    plots.training_curves(fitted.history, canvas("training", "ELBO = -distortion - rate"))
    with torch.no_grad():
        means = vae.encode(test.x).mean
    ax = canvas("latent_map", "Means of q(z|x) of held-out digits, by label", (6.5, 5.5))
    plots.latent_map(means, test.labels, ax)
    shown = torch.stack([test.x[:12], vae.reconstruct(test.x[:12])]).reshape(-1, *SHAPE)
    ax = canvas("reconstructions", "Held-out digits, above their reconstructions from two numbers each", (8, 1.9))
    plots.image_grid(shown, 12, ax)
    ax = canvas("samples", "Samples: z from the prior, mean of p(x|z)", (6, 3.4))
    plots.image_grid(vae.generate(50, mean=True).reshape(-1, *SHAPE), 10, ax)
    ax = canvas("manifold", "What each place in the latent space decodes to", (6, 6.2))
    with torch.no_grad():
        plots.manifold(lambda z: vae.decode(z).mean, SHAPE, ax=ax)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/digits"), help="folder for results")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=128, help="units of the hidden layer, each way")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of Adam")
    parser.add_argument("--test-digits", type=int, default=297, help="how many held-out digits to judge on")
    parser.add_argument("--draws", type=int, default=500, help="draws in the ArviZ file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)

    train, test = pv.datasets.digits("train", threshold=0.5), pv.datasets.digits("test", threshold=0.5)
    test = pv.datasets.Dataset(test.x[: args.test_digits], test.labels[: args.test_digits])
    vae = digits_vae(args.hidden)
    fitted = pv.fit(
        vae.model, vae.guide, train.x, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, validation=test.x,
        seed=args.seed,
    )  # fmt: skip
    evidence = pv.exact.log_evidence(vae.model, test.x, tolerance=1e-3)
    elbo = pv.exact.elbo(vae.model, vae.guide, test.x, tolerance=1e-3)
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "log_p": float(evidence.mean()),
        "log_p_standard_error": float(evidence.std() / len(evidence) ** 0.5),
        "elbo": float(elbo.mean()),
        "kl": float((evidence - elbo).mean()),
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    print(f"On {len(test)} held-out digits, nats per image, 64 binary pixels; both by quadrature over the 2-D latent:")
    print(f"  exact log p(x)  {results['log_p']:.3f} ± {results['log_p_standard_error']:.3f} (standard error)")
    print(f"  ELBO            {results['elbo']:.3f}")
    print(f"  gap, KL(q || p) {results['kl']:.3f}")
    tree = pv.to_datatree(
        vae.model, vae.guide, test.x, draws=args.draws, seed=args.seed, parallel=True, dims={"x": ["pixel"]}
    )
    tree.to_netcdf(args.out / "digits.nc", engine="h5netcdf")
    figures = pictures(vae, fitted, test)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=130)
        plt.close(figure)
    print(f"results.json, {len(figures)} pictures and digits.nc are in {args.out}")


if __name__ == "__main__":
    main()
