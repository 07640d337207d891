"""Check a built wheel: it has the files that are no modules, and it alone can be imported and used."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DATA = (
    "py.typed",
    "__init__.pyi",
    "inspection/report.html.jinja",
    "datasets/penguins.csv",
    "datasets/pbmc.csv.gz",
    "datasets/SOURCES.md",
)
PROGRAM = """
import pyro_vae as pv
assert pv.__file__.startswith({folder!r}), pv.__file__
assert len(pv.datasets.penguins()) == 344
assert len(pv.datasets.pbmc()) == 700
vae = pv.VAE(
    pv.priors.StandardNormal(1), pv.guides.DiagonalNormal(2, 1, pv.networks.linear()),
    pv.likelihoods.Normal(1, 2, pv.networks.linear()),
)
assert pv.exact.log_evidence(vae.model, pv.datasets.two_gaussians(5).x).shape == (5,)
"""


def check(wheel: Path) -> None:
    """Raise if a file is missing, or the wheel cannot be used outside of the repository."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        missing = {f"pyro_vae/{name}" for name in DATA} - set(archive.namelist())
        assert not missing, f"{wheel.name} lacks {sorted(missing)}"
        archive.extractall(folder)
        program = f"import sys; sys.path.insert(0, {folder!r})" + PROGRAM.format(folder=folder)
        subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=folder, check=True)


if __name__ == "__main__":
    found = sorted(Path(sys.argv[1]).glob("*.whl"))
    assert len(found) == 1, f"one wheel expected, got {found}"
    check(found[0])
