"""Clusters of images: found in the codes of a VAE, and how well they agree with labels that nobody was told."""

import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

import pyro_vae as pv


@torch.no_grad()
def of_codes(vae: pv.VAE, train: Tensor, x: Tensor, components: int, seed: int) -> Tensor:
    """Probabilities of clusters, ``(N, K)``, by a mixture of Gaussians that is fitted to the codes of training data."""
    codes, held_out = (vae.encode(each).mean.double().numpy() for each in (train, x))
    fitted = GaussianMixture(components, random_state=seed).fit(codes)
    return torch.as_tensor(fitted.predict_proba(held_out))


def agreement(posterior: Tensor, labels: Tensor) -> dict[str, float]:
    """Of clusters with the probabilities ``(N, K)``: their purity, and the Rand index, which is 0 by chance."""
    found = posterior.argmax(1)
    return {"same_label": same_label(posterior, labels), "adjusted_rand": float(adjusted_rand_score(labels, found))}


def same_label(posterior: Tensor, labels: Tensor) -> float:
    """The share of images whose label is the most frequent one in their class: 1 where classes are pure."""
    found = posterior.argmax(1)
    return sum(int(labels[found == index].bincount().max()) for index in found.unique()) / len(labels)
