"""The gallery: it runs each example in a short form and shows the pictures that the example saves."""

import shlex
import shutil
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = Path(__file__).parent / "_build" / "examples"

SHORT_FORMS = {
    "mixture": "--epochs 500 --test-points 1000 --particles 8 --draws 50",
    "digits": "--epochs 60 --test-images 30 --draws 50",
    "mnist": "--data digits --epochs 60 --test-images 50 --samples 200 --draws 50",
    "categorical": "--epochs 60 --test-images 200 --draws 50",
    "monte_carlo": "--epochs 500 --test-points 100",
    "gumbel_max": "--epochs 50",
    "gradient_estimators": "--epochs 50",
    "explosion": "--epochs 10 --largest 10 --test-images 50",
    "explosion_gradients": "--epochs 5 --largest 8",
    "discrete_mnist": "--data digits --latent bernoulli --estimator disarm --epochs 60 --hidden 64 --samples 100",
    "imputation": "--epochs 400 --draws 50",
    "published": "--data digits --method vae iwae --epochs 30 --latent 8 --hidden 64 --samples 200 --test-images 200",
    "two_layers": "--epochs 30 --warm-up 15 --test-images 50 --samples 100 --draws 20",
    "conditional": "--given label --epochs 20 --test-images 30 --draws 20",
    "gaussian_mixture_vae": "--epochs 20 --test-images 40 --draws 20",
    "semi_supervised": "--epochs 10 --draws 20",
    "inspect_posterior": "--data digits --epochs 100 --latent 8 --hidden 128 --test-images 100 --draws 20",
    "swap": "--epochs 30 --test-images 10 --draws 20",
}
"""The options of each example, in the order of the gallery."""


class ShortForm:
    """The options of an example, for ``sphinx_gallery_conf["reset_argv"]``."""

    def __call__(self, gallery_conf: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
        """Return options that write where :class:`SavedPictures` reads, and remove the files of an earlier run."""
        name = Path(script_vars["src_file"]).stem
        shutil.rmtree(RESULTS / name, ignore_errors=True)
        return ["--out", str(Path("../docs/_build/examples") / name), *shlex.split(SHORT_FORMS[name])]

    def __repr__(self) -> str:
        return "ShortForm()"


class SavedPictures:
    """The PNG files of an example, for ``sphinx_gallery_conf["image_scrapers"]``."""

    def __call__(self, block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
        """Return the command and the pictures as reStructuredText."""
        name = Path(block_vars["src_file"]).stem
        pictures = sorted((RESULTS / name).glob("*.png"), key=lambda path: (path.stem != "manifold", path.stem))
        if not pictures:
            return ""
        copies = []
        for picture, copy in zip(pictures, block_vars["image_path_iterator"], strict=False):
            shutil.move(picture, copy)
            copies.append(copy)
        command = f"python examples/{name}.py {SHORT_FORMS[name]}"
        smaller = "on the 8 × 8 digits of scikit-learn instead of MNIST" if "mnist" in name else "with fewer steps"
        figures = "".join(figure_rst([copy], gallery_conf["src_dir"]) for copy in copies)
        return f"\nRun here in a short form, {smaller}:\n\n.. code-block:: sh\n\n    {command}\n\n{figures}"

    def __repr__(self) -> str:
        return "SavedPictures()"


class Order:
    """The place of an example in the gallery, for ``sphinx_gallery_conf["within_subsection_order"]``."""

    def __init__(self, src_dir: str):
        self.names = list(SHORT_FORMS)

    def __call__(self, filename: str) -> int:
        """Return the position of an example."""
        return self.names.index(Path(filename).stem)
