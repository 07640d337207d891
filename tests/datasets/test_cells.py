"""The cells are those of one donor: genes that mark a type are frequent there, and each well holds cells of all."""

import pytest
import torch

from pyro_vae import datasets


@pytest.fixture(scope="module")
def cells():
    return datasets.pbmc()


def test_counts_are_whole_numbers_with_a_type_and_a_well_for_each_cell(cells, random_states):
    before = random_states()
    again = datasets.pbmc()
    assert random_states() == before
    assert torch.equal(again.x, cells.x)
    assert (cells.x.shape, cells.x.dtype) == ((700, 500), torch.get_default_dtype())
    assert torch.equal(cells.x, cells.x.round())
    assert (cells.x.min(), cells.x.max(), len(set(cells.genes))) == (0, 259, 500)
    assert cells.batches.bincount().tolist() == [95, 74, 100, 81, 86, 83, 91, 90]
    counts = dict(zip(cells.cell_types, cells.labels.bincount().tolist(), strict=True))
    assert (counts["Dendritic"], counts["CD14+ Monocyte"], counts["CD56+ NK"], len(counts)) == (240, 129, 31, 10)
    assert "8 batches" in repr(cells)


def test_the_split_is_complete_with_all_types_and_wells_in_both_parts(cells):
    train, test = datasets.pbmc("train"), datasets.pbmc("test")
    assert (len(train), len(test)) == (525, 175)
    for name in ("x", "labels", "batches"):
        assert torch.equal(torch.cat([getattr(train, name), getattr(test, name)]), getattr(cells, name))
    for part in (train, test):
        assert len(part.labels.unique()) == 10
        assert len(part.batches.unique()) == 8


@pytest.mark.parametrize(("gene", "cell_type"), [
    ("CD79A", "CD19+ B"), ("GNLY", "CD56+ NK"), ("FCGR3A", "CD14+ Monocyte"), ("FCER1A", "Dendritic"),
    ("CD3D", "CD4+/CD25 T Reg"),
])  # fmt: skip
def test_a_gene_that_marks_a_type_has_most_of_its_share_there(cells, gene, cell_type):
    share = cells.x[:, cells.genes.index(gene)] / cells.x.sum(1)
    inside = cells.labels == cells.cell_types.index(cell_type)
    error = (share[inside].var() / inside.sum() + share[~inside].var() / (~inside).sum()).sqrt()
    assert share[inside].mean() - share[~inside].mean() > 4 * error
