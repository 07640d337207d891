"""Counts of genes in single cells."""

from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from pyro_vae.datasets.base import Dataset, on_default_device
from pyro_vae.datasets.images import check_split

__all__ = ["CellCounts", "pbmc"]


@dataclass(frozen=True, repr=False)
class CellCounts(Dataset):
    """Counts of the molecules of G genes in N single cells.

    Attributes:
        x: ``(N, G)``, counts 0, 1, 2, ... as floats.
        labels: ``(N,)``, the type of each cell, an index of ``cell_types``.
        batches: ``(N,)``, integers from 0: the batch in which a cell was measured.
        genes: the G names.
        cell_types: the names of the types.
    """

    batches: Tensor
    genes: tuple[str, ...]
    cell_types: tuple[str, ...]

    def _line(self) -> str:
        return f"{super()._line()}, {len(self.batches.unique())} batches"


def pbmc(split: str = "all") -> CellCounts:
    r"""700 blood cells of one donor (PBMC): counts of 500 genes, ten cell types, and wells as batches.

    The file is a part of the package: no download. The types are those of Zheng et al., by correlation with sorted
    cells. The 500 genes are those of 765 highly variable ones whose counts vary most.

    Args:
        split: ``"train"`` (525 cells), ``"test"`` (the other 175) or ``"all"``. The split is always the same.

    Source: "Fresh 68k PBMCs (Donor A)", Single Cell Gene Expression Dataset by Cell Ranger 1.1.0, 10x Genomics, licence
    `CC BY 4.0 <https://creativecommons.org/licenses/by/4.0/>`__; Zheng et al. 2017, "Massively parallel digital
    transcriptional profiling of single cells". Changed: 700 of the cells, as ``scanpy.datasets.pbmc68k_reduced`` has
    them (Wolf et al. 2018, BSD-3), and 500 of its genes. The counts are found from its logarithms,
    :math:`x = \mathrm{round}((e^y - 1)\,n / 10^4)`, with n the count of all genes in the cell.

    >>> cells = pbmc("train")
    >>> cells.x.shape, cells.genes[:3], cells.cell_types[1], cells.x[0, :8].int().tolist()
    (torch.Size([525, 500]), ('HES4', 'SSU72', 'PARK7'), 'CD19+ B', [0, 0, 2, 0, 0, 0, 1, 0])
    """
    import pandas as pd

    splits = {"train": slice(0, 525), "test": slice(525, None), "all": slice(None)}
    check_split(split, splits)
    frame = pd.read_csv(files("pyro_vae.datasets") / "pbmc.csv.gz", compression="gzip")
    counts = frame.drop(columns=["cell_type", "well"])
    types = frame["cell_type"].astype("category").cat
    x = torch.tensor(counts.to_numpy(), dtype=torch.get_default_dtype(), device="cpu")
    integers = (types.codes, frame["well"] - 1)
    labels, wells = (torch.tensor(each.to_numpy(), dtype=torch.long, device="cpu") for each in integers)
    x, labels, wells = on_default_device(*(each[splits[split]] for each in (x, labels, wells)))
    return CellCounts(x, labels, wells, tuple(counts.columns), tuple(types.categories))
