"""The penguins by their latent variables, and known body masses that were hidden and imputed."""

import matplotlib.pyplot as plt
import numpy as np
import torch

import pyro_vae as pv

frame = pv.datasets.penguins()
known = np.flatnonzero(frame["body_mass_g"].notna())
hidden = np.random.default_rng(0).choice(known, 40, replace=False)
holes = frame.copy()
holes.loc[hidden, "body_mass_g"] = np.nan

torch.manual_seed(0)
table = pv.tables.Table.from_frame(holes)
vae = table.vae(latent=2, hidden=[32])
pv.fit(vae.model, vae.guide, table, epochs=100, batch_size=64, lr=1e-2, seed=0)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
codes = vae.encode(table.x).mean.detach()
pv.plots.latent_map(codes, frame["species"].to_list(), name="mean of q(z | x), z", ax=left)

cells = table.imputed_cells(vae, quantiles=(0.05, 0.95))
cells = cells[(cells["column"] == "body_mass_g") & cells["row"].isin(hidden)].sort_values("value")
truth, low, high = frame.loc[cells["row"], "body_mass_g"].to_numpy(), cells["5%"], cells["95%"]
place = np.arange(len(cells))
right.vlines(place, low.astype(float), high.astype(float), color="0.6", label="90 % interval")
right.plot(place, truth, "k.", label="the hidden value")
inside = np.mean((low.to_numpy() <= truth) & (truth <= high.to_numpy()))
right.set(xlabel="hidden entry, by its imputed median", ylabel="body mass in g", title=f"{inside:.0%} are inside")
right.legend()
