"""
Scenes taken apart
==================

Which pixels of an image belong to the same object? Nobody marks the objects: a model has to find them. Each scene shows
2 to 4 shapes of two colours, which cover each other, on a plain background. The model has K = 4 slots, and decodes
place and appearance of a slot to the colours and the mask of an object in a box of the scene:

    background ~ N(0, I), where_k ~ N(0, I), what_k ~ N(0, I),
    p(x | z) = prod over pixels p of sum over slots k of m_kp N(x_p; rgb_kp, 0.1²).

The masks m are a softmax over slots and background at each pixel; the sum over the slot of a pixel is exact. The guide
finds one object after the other, as MONet does (Burgess et al. 2019): each slot reads what no earlier slot explains, in
a box. This pass is only the start: normals of the latents of each held-out scene are then trained on its own ELBO.

The figure is the adjusted Rand index of the segmentation, 1 for the true objects and 0 by chance, over the pixels of
the shapes, as in the papers. The baselines take the pixels that differ from the edge of the scene: k-means of colour
and place, given the true number of shapes, and connected regions.
"""

import argparse
from typing import Any

import common
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, networks, plots, schedules, spatial
from pyro_vae.distributions import SpatialMixture

PATCH = 10  # rows and columns of an object's picture
SIDES = 0.2, 0.6  # smallest and largest side of a box, in units of the scene; that of a first look is 0.55
EMPTY, BEHIND = -6.0, 2.0  # logit of a mask outside of its box (background: 0), and by how much each slot is lower


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "scenes", epochs=10)
    common.add_training(parser, batch_size=32, lr=3e-3)
    common.add_evaluation(parser, test_images=200, draws=50)
    parser.add_argument("--scenes", type=common.positive_int, default=20_000, help="scenes to train on")
    parser.add_argument("--slots", type=common.positive_int, default=4, help="K")
    parser.add_argument("--hidden", type=common.positive_int, default=256, help="hidden units of each network")
    parser.add_argument("--refine", type=common.positive_int, default=200, help="steps for each held-out scene")
    parser.add_argument("--samples", type=common.positive_int, default=50, help="draws for the log p(x) of each scene")
    return parser.parse_args()


class Slots(nn.Module):
    """Model and guide of scenes ``(N, 3 * size * size)`` with K slots."""

    places: Tensor  # row and column of each pixel, from 0 to 1

    def __init__(self, size: int, slots: int, hidden: int, latent: int = 8):
        super().__init__()
        self.size, self.slots, self.latent = size, slots, latent
        steps = (torch.arange(PATCH) + 0.5) / PATCH * 2 - 1
        blob = 6 - 10 * (steps[:, None] ** 2 + steps**2)  # the mask of every object before the training
        first = torch.cat([blob.flatten(), torch.zeros(3 * PATCH**2)])
        self.decoder = networks.starting_at(networks.mlp([hidden]), first)(latent, 4 * PATCH**2)
        self.where = networks.mlp([hidden])(4 * PATCH**2, 6)
        self.what = networks.mlp([hidden])(4 * PATCH**2, 2 * latent)
        self.background_scale = nn.Parameter(torch.tensor(-1.0))
        axis = (torch.arange(size) + 0.5) / size
        self.register_buffer("places", torch.cartesian_prod(axis, axis))

    def boxes(self, where: Tensor) -> Tensor:
        """Map standard normals to boxes, uniform in side, row and column."""
        side, centre = torch.special.ndtr(where).split([1, 2], -1)
        return self.size * torch.cat([SIDES[0] + (SIDES[1] - SIDES[0]) * side, centre], -1)

    def draw(self, where: Tensor, what: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Decode an object to logits ``(*, P)`` and colours ``(*, 3, P)``; a later slot starts behind earlier ones."""
        logits, colours = self.decoder(what).unflatten(-1, (4, PATCH, PATCH)).split([1, 3], -3)
        pictures = torch.cat([logits - EMPTY, colours.sigmoid()], -3)
        placed = spatial.place(pictures, self.boxes(where)[..., None, :], (self.size, self.size)).flatten(-2)
        return placed[..., 0, :] + EMPTY - BEHIND * index, placed[..., 1:, :]

    def compose(self, background: Tensor, objects: list[tuple[Tensor, Tensor]]) -> SpatialMixture:
        """p(x | z); the background is slot 0."""
        plain = (0.2 + 0.1 * background)[..., None].expand(*background.shape, self.size**2)
        logits = torch.stack([torch.zeros_like(plain[..., 0, :]), *(each for each, _ in objects)], -2)
        return SpatialMixture(logits, torch.stack([plain, *(each for _, each in objects)], -3), scale=0.1)

    def model(self, x: Tensor) -> None:
        """p(background) p(where) p(what) p(x | background, where, what)."""
        pyro.module("scenes", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            background = pyro.sample("background", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            objects = []
            for index in range(self.slots):
                where = pyro.sample(f"where_{index}", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                what = pyro.sample(f"what_{index}", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
                objects.append(self.draw(where, what, index))
            pyro.sample("x", self.compose(background, objects), obs=x.unflatten(-1, (3, -1)))

    def find(self, left: Tensor) -> Tensor:
        """Return the row and column of an object, from the contrast that is left at each pixel, ``(*, P)``."""
        smooth = functional.avg_pool2d(left.unflatten(-1, (1, self.size, self.size)), 3, 1, 1).flatten(-3)
        place = self.places[smooth.argmax(-1)]
        for _ in range(2):  # to the mean of what is near, as in mean shift
            near = left * torch.exp(-(self.places - place[..., None, :]).square().sum(-1) / (2 * 0.12**2))
            place = (near[..., None, :] @ self.places).squeeze(-2) / (near.sum(-1, keepdim=True) + 1e-4)
        return place.detach().clamp(0.02, 0.98)

    def look(self, network: nn.Module, views: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of a normal, from the part of the views, ``(*, 4, size, size)``, that is in the boxes."""
        loc, scale = network(spatial.crop(views, boxes[..., None, :], PATCH).flatten(-3)).chunk(2, -1)
        return loc, functional.softplus(scale - 1) + 1e-3

    def guide(self, x: Tensor) -> None:
        """q(background | x) and, slot by slot, q(where | x, scope) q(what | x, scope, where)."""
        pyro.module("scenes", self)
        with pyro.plate("data", len(x)):
            pixels = pyro.subsample(x, event_dim=1).unflatten(-1, (3, -1))
            grid = pixels.unflatten(-1, (self.size, self.size))
            edge = torch.cat([grid[..., 0, :], grid[..., -1, :], grid[..., 0], grid[..., -1]], -1).mean(-1)
            spread = functional.softplus(self.background_scale)
            pyro.sample("background", dist.Normal((edge - 0.2) / 0.1, spread).to_event(1))
            image = pixels - edge[..., None]
            contrast, scope = image.abs().amax(-2), torch.ones_like(image[..., 0, :])
            for index in range(self.slots):
                views = torch.cat([image, scope[..., None, :]], -2).unflatten(-1, (self.size, self.size))
                place = self.find(contrast * scope)
                around = self.size * torch.cat([torch.full_like(place[..., :1], 0.55), place], -1)
                step, scale = self.look(self.where, views, around)
                loc = torch.cat([step[..., :1], torch.special.ndtri(place) + 0.3 * step[..., 1:]], -1)
                scale = torch.cat([scale[..., :1], 0.3 * scale[..., 1:]], -1)
                where = pyro.sample(f"where_{index}", dist.Normal(loc, scale).to_event(1))
                what = dist.Normal(*self.look(self.what, views, self.boxes(where))).to_event(1)
                logits, _ = self.draw(where, pyro.sample(f"what_{index}", what), index)
                scope = scope * torch.sigmoid(-logits)


BEST = "k-means off the background"  # of the simple methods
PLACE_WEIGHT = 3  # of the place next to the colour in k-means, the best of 0.25, 1, 2, 3, 4 and 6 on other scenes


def baselines(data: datasets.ShapeScenes, seed: int) -> dict[str, list[Any]]:
    """Segment each scene by simple methods, which know how many shapes it has."""
    found: dict[str, list[Any]] = {BEST: [], "connected regions": []}
    axis = np.linspace(0, 1, data.size)
    places = PLACE_WEIGHT * np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for x, count in zip(data.x.unflatten(1, (3, -1)).mT.numpy(), data.labels.tolist(), strict=True):
        features, edge = np.concatenate([x, places], 1), x[(places.min(1) == 0) | (places.max(1) == PLACE_WEIGHT)]
        differs, inside = np.abs(x - np.median(edge, 0)).max(1) > 0.15, np.zeros(len(x), int)
        inside[differs] = 1 + KMeans(count, n_init=5, random_state=seed).fit_predict(features[differs])
        found[BEST].append(inside)
        found["connected regions"].append(ndimage.label(differs.reshape(data.size, data.size))[0].flatten())
    return found


def draw_scenes(data: datasets.ShapeScenes, found: SpatialMixture, labels: Tensor) -> Figure:
    """Draw a row for each scene: the image, its reconstruction, true and found objects, and what each slot shows."""
    rows, slots = min(8, len(data)), found.logits.shape[-2]
    tints = torch.tensor(plt.get_cmap("cividis")(np.linspace(0, 1, slots))[:, :3]).float()
    masks = found.masks[:rows, :, None]
    seen = [data.x.unflatten(1, (3, -1)), found.mean, tints[data.masks].mT, tints[labels].mT]
    pictures = torch.cat([torch.stack([each[:rows] for each in seen], 1), masks * found.loc[:rows] + 1 - masks], 1)
    names = ["scene", "recon-\nstruction", "true\nobjects", "found,\nany order", "back-\nground"]
    names += [f"slot\n{index}" for index in range(1, slots)]
    ax = plots.image_grid(
        pictures.flatten(0, 1).unflatten(-1, (data.size, data.size)), columns=len(names), column_names=names,
        row_names=[f"scene {index}" for index in range(1, rows + 1)],
    )  # fmt: skip
    return common.set_title(ax, "Objects that the model finds in new scenes, without labels")


COLUMNS = {"Rand, shapes": "{rand:.3f} ± {rand_error:.3f}", "Rand, all pixels": "{rand_all:.3f}"}
COLUMNS |= {"ELBO": "{elbo:.1f}", "log p(x)": "{log_p:.1f}"}
NOTES = """Rand: adjusted Rand index, ± the standard error over scenes; 1 for the true objects, 0 by chance
ELBO and log p(x), a lower bound, in nats per scene; k-means is given the number of shapes of each scene
model: q(z | x) is trained further for each scene, from one pass of the networks on; its masks alone do not see x"""
PUBLISHED = "0.913 slot attention, 0.904 MONet, 0.767 IODINE on Multi-dSprites (Locatello et al. 2020, table 1)"
DIFFERENCES = "64 × 64 pixels, 2 to 5 shapes of one colour; here 24 × 24, 2 to 4 of two, latents refined for each scene"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Draw scenes. The true objects only measure the segmentation.
    train, test = (datasets.shape_scenes(num, seed=seed) for num, seed in ((args.scenes, 0), (args.test_images, 1)))
    # 2. Train.
    slots = Slots(train.size, args.slots, args.hidden)
    options = common.training_options(args) | {"lr": schedules.decayed(args.lr)}
    fitted = pv.fit(slots.model, slots.guide, train.x, **options)
    # 3. Segment held-out scenes: the slot of each pixel with the largest posterior, at the means of q(z | x).
    slots.eval().requires_grad_(False)
    pairs = {"model, one pass": slots, "model": common.refine(slots, test.x, args)}
    rows: dict[str, Any] = {}
    for name, pair in pairs.items():
        found = common.at_means(pair, test.x, site="x")
        labels = found.responsibilities(test.x.unflatten(1, (3, -1))).argmax(1)
        rows[name] = common.rand_indices(labels, test.masks)
        rows[name] |= common.evaluate(pair, test.x, seed=args.seed, samples=args.samples)
    rows["model, masks alone"] = common.rand_indices(found.masks.argmax(1), test.masks)
    rows |= {name: common.rand_indices(each, test.masks) for name, each in baselines(test, args.seed).items()}
    print(text := common.table(f"{len(test)} held-out scenes", rows, COLUMNS, NOTES))
    # 4. Save the figure next to the best baseline, pictures and draws.
    headline = common.headline(
        "agreement with the true objects", "adjusted Rand index", rows["model"]["rand"], baseline=rows[BEST]["rand"],
        baseline_name=f"{BEST}, true number given", higher_is_better=True, published=PUBLISHED, differences=DIFFERENCES,
    )  # fmt: skip
    dims = {"x": ["channel", "pixel"], "background": ["channel"]}
    dims |= {f"{kind}_{index}": [kind] for index in range(args.slots) for kind in ("where", "what")}
    tree = common.make_tree(slots, test.x[:20], args, dims=dims, coords={"shapes": ("obs", test.labels[:20])})
    results = {"methods": rows, "history": fitted.history, "seconds": fitted.seconds}
    common.save(args, results, {"scenes": draw_scenes(test, found, labels)}, {"scenes": tree}, text, [headline])


if __name__ == "__main__":
    main(parse_args())
