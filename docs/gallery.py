"""The gallery: it runs each example in a short form, and makes a short page of its steps, output and pictures.

A step is a numbered comment in the code of an example, ``# 2. Train it ...``: its sentence, and the code up to the next
one. All other code of the example is folded away. An application shows the full run that is kept of it instead of a
short one.
"""

import ast
import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import applications

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
PACKAGE = DOCS.parent / "pyro_vae"
RESULTS = DOCS / "_build" / "examples"
PAGES = DOCS / "examples"

SHORT_FORMS = {
    "mixture": "--epochs 300 --test-points 1000 --particles 8 --draws 50",
    "digits": "--epochs 60 --test-images 30 --draws 50",
    "mnist": "--data digits --epochs 60 --test-images 50 --samples 200 --draws 50",
    "categorical": "--epochs 60 --test-images 200 --draws 50",
    "monte_carlo": "--epochs 500 --test-points 100",
    "gumbel_max": "--epochs 50",
    "gradient_estimators": "--epochs 50",
    "explosion": "--epochs 10 --largest 10 --test-images 50",
    "explosion_gradients": "--epochs 5 --largest 8",
    "discrete_mnist": "--data digits --latent bernoulli --estimator disarm --epochs 60 --hidden 64 --samples 100",
    "imputation": "--epochs 200 --draws 50",
    "published": "--data digits --method vae iwae --epochs 30 --latent 8 --hidden 64 --samples 200 --test-images 200",
    "two_layers": "--epochs 30 --warm-up 15 --test-images 50 --samples 100 --draws 20",
    "conditional": "--given label --epochs 20 --test-images 30 --draws 20",
    "gaussian_mixture_vae": "--epochs 20 --test-images 40 --draws 20",
    "semi_supervised": "--epochs 10 --draws 20",
    "inspect_posterior": "--data digits --epochs 100 --latent 8 --hidden 128 --test-images 100 --draws 20",
    "swap": "--epochs 30 --test-images 10 --draws 20",
    "watch_training": "--epochs 20",
    "sweep": "--epochs 8 --settings 6",
    "export_encoder": "--epochs 20",
    "several_ranks": "--epochs 20",
}
"""The options of each example on these pages."""

THEMES = {
    "Start here": ["mixture", "digits", "swap"],
    "Images": ["mnist", "discrete_mnist", "published", "conditional"],
    "Discrete latents and their gradients": [
        "categorical",
        "gumbel_max",
        "gradient_estimators",
        "explosion",
        "explosion_gradients",
    ],
    "Estimates, and how to check them": ["monte_carlo", "inspect_posterior"],
    "Tables, clusters and more structure": ["imputation", "gaussian_mixture_vae", "semi_supervised", "two_layers"],
}
"""The examples by theme; applications have one of their own, and one that no theme names stands under ``OTHERS``."""

APPLICATIONS = "Applications"
OTHERS = "Around the training"

CAPTIONS = {
    "bayes_rule": "How probable each digit is by Bayes' rule, for held-out images of each label.",
    "bytes": "The largest tensor of a step grows with the number of states only where they are summed over.",
    "calibration": "How often intervals contain the true value: on the line as often as claimed, above it too often.",
    "categorical": "Shares of the classes: Gumbel noise gives the softmax of the logits, Gaussian noise does not.",
    "classes": "What the classes stand for.",
    "clusters": "Which components hold the held-out images of each label.",
    "comparison": "The ELBO and log p(x) of each model; the line is the part of the gap that draws of q find.",
    "completions": "Several ways to complete the same half of an image.",
    "cost": "The time of the exact sum grows with the number of states; that of an estimate does not.",
    "errors": "The error of the estimates, where the exact sum is known.",
    "scenes": "Held-out scenes, what the model finds in them and draws, and each object alone.",
    "confusion": "How often scenes with each number of digits are counted as each number.",
    "learning": "Right counts of held-out scenes while the models train.",
    "forest": "Means and intervals of the posterior, and what ArviZ draws from the files.",
    "bernoulli": "A bit, summed out or drawn: the posterior of each point, samples, and the nats lost in training.",
    "relaxed_bernoulli": "A relaxed bit: at one temperature, and with a temperature that falls.",
    "gumbel_softmax": "The same with two relaxed classes.",
    "gaussian": "A continuous latent, and the prior in place of a guide.",
    "gradients": "Each estimator of the derivative, compared with the exact one.",
    "labels": "Which classes hold the held-out images of each label.",
    "latent": "The codes of held-out images, and the components of the prior.",
    "latent_map": "Where the encoder puts held-out images in the latent space, by label.",
    "manifold": "The decoder's image at each place of the latent space.",
    "monte_carlo": "The error of both estimates, as the number of draws grows.",
    "reconstructions": "Held-out images, and below each its reconstruction.",
    "parts": "What the ELBO of each guide lacks to log p(x): the part of its family, and the part of its network.",
    "samples": "Images that the model generates.",
    "samples_by_label": "One row for each label; in a column all images have the same noise.",
    "samples_by_layer": "Images that the model generates, by layer.",
    "seconds": "The time of a step grows with the number of states only where they are summed over.",
    "simplex": "Relaxed draws on the simplex: a lower temperature moves them to the corners.",
    "swap": "The ELBO and log p(x) of each pair of prior and guide.",
    "dreams": "What the camera saw, the true images that follow, and three futures that the model draws.",
    "pixel_error": "How far predicted images are from the true ones, by the time that is predicted.",
    "angle_error": "How far predicted angles are from the true ones, by the time that is predicted.",
    "swing_up": "A run of each controller. The one that was trained in dreams has never touched the rod.",
    "heights": "How high each controller lifts the rod, by time: the mean over all runs.",
    "images_from_labels": "Real digits, and images that each guide draws from a label alone, or with a table.",
    "kinds": "Digits and six kinds of anomalies, sorted by their density: empty images have the highest.",
    "ink": "log p(x) falls with the number of black pixels, in each kind of image.",
    "auroc": "Which score finds which anomalies; below 0.5, they look more normal than digits.",
    "pieces": "The keys that sound in each step, in a held-out piece and in one that the model draws.",
    "bounds": "Upper bounds on -log p(x) of held-out music, as the number of draws or particles grows.",
    "codes": "The codes of held-out sentences: topics separate, tenses only in part; training sees neither.",
    "perplexity": "How well each model predicts the next word, and the best that is possible.",
    "path": "Sentences on a straight line between the codes of two held-out ones.",
    "shares": "The share of right translations, with and without the sentences that have no pair.",
    "examples": "Held-out sentences that the pairs alone do not suffice for, and their translations.",
    "time": "The held-out ELBO of each guide against the seconds of its training, and log p(x) at the end.",
    "training": "The ELBO in training and on held-out data.",
    "photographs": "Held-out patches of photographs, their reconstructions, and new patches from each model.",
    "photographs_moved": "What the latents of the ladder's top level do to a patch of a photograph.",
    "shapes": "Held-out drawn shapes, their reconstructions, and new shapes from each model.",
    "shapes_moved": "What the latents of the ladder's top level do to the background of a drawn shape.",
    "information": "What each code knows about each factor of the shapes, for each objective.",
    "states": "Held-out cells by their states, which are found from counts alone, and their types.",
    "worth": "What each part of the model is worth on held-out cells, compared cell by cell; hollow: a lower bound.",
    "zeros": "The share of cells with count 0, for each gene: held-out cells, and cells that each model generates.",
    "traversals": "What each latent does to an image, and the factor that it knows most about.",
}
"""A sentence for each picture, by the name of its file."""

FIRST = (
    "dreams",
    "swing_up",
    "images_from_labels",
    "kinds",
    "photographs",
    "pieces",
    "shares",
    "codes",
    "states",
    "relaxed_bernoulli",
    "manifold",
    "latent",
    "samples_by_label",
    "simplex",
    "completions",
    "scenes",
    "comparison",
    "latent_map",
)
"""The pictures that stand at the top of a page and in the gallery, where an example has them, the best one first."""

STEP = re.compile(r"^( *)# (\d+)\. (.*)$")
INDEX = """# Examples

Each example is a script in the folder `examples`. `python examples/digits.py --help` lists its options; all have
`--out`, `--epochs` and `--seed`. The pages here were made with fewer steps than a script takes without options, so that
these pages build in minutes: the pictures show what you get, not how good it can be. Those of the
[applications](../applications.md) are from full runs.
"""


class Step(NamedTuple):
    """A step of an example."""

    sentence: str
    code: str


class Example(NamedTuple):
    """An example: what its file says, and the folder of its results."""

    name: str
    title: str
    introduction: str
    steps: list[Step]
    folder: Path

    @classmethod
    def read(cls, name: str) -> "Example":
        """Read the docstring and the steps of an example."""
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        doc = source.split('"""')[1].strip()
        title, _, *lines = doc.splitlines()
        folder = RESULTS / name if name in SHORT_FORMS else applications.KEPT / name
        return cls(name, title, "\n".join(lines).strip(), steps(source), folder)

    @property
    def command(self) -> str:
        """The command that makes the pictures of the page."""
        return f"python examples/{self.name}.py {SHORT_FORMS.get(self.name, '')}".strip()

    @property
    def pictures(self) -> list[Path]:
        """The pictures, the best one first."""

        def place(path: Path) -> tuple[int, str]:
            return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)

        return sorted(self.folder.glob("*.png"), key=place)

    @property
    def teaser(self) -> str:
        """The first sentence of the introduction."""
        return re.split(r"(?<=[^.]{3}[.?])\s", " ".join(self.introduction.split()))[0]


def steps(source: str) -> list[Step]:
    """Return the numbered comments of a program, each with the code below it.

    Outside of functions the code of a step is the next statement. Inside it ends where the next step begins or the
    block ends.
    """
    lines = source.splitlines()
    statements = [(_first_line(node), node.end_lineno) for node in ast.parse(source).body]
    found = []
    for start, line in enumerate(lines):
        if not (match := STEP.match(line)):
            continue
        indent, _, sentence = match.groups()
        start += 1
        while lines[start].startswith(f"{indent}# ") and not STEP.match(lines[start]):
            sentence += " " + lines[start].strip().removeprefix("# ")
            start += 1
        if indent:
            ends = (n for n, each in enumerate(lines[start:], start) if STEP.match(each) or _outside(each, indent))
            code = lines[start : next(ends, len(lines))]
        else:
            code = next(lines[first - 1 : last] for first, last in statements if first > start)
        found.append(Step(sentence, textwrap.dedent("\n".join(code)).strip()))
    return found


def _first_line(node: ast.stmt) -> int:
    """Return the first line of a statement, its decorators included."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def _outside(line: str, indent: str) -> bool:
    return bool(line.strip()) and not line.startswith(indent)


# --- Running the examples --------------------------------------------------------------------------------------------


def run_all(names: list[str]) -> None:
    """Run the examples whose code or options changed since the last time, on all processors."""
    stale = [name for name in names if _digest(name) != _last_digest(name)]
    if not stale:
        return
    workers = min(len(stale), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(sys.path,)) as pool:
        for _ in pool.map(run, stale):
            pass


def run(name: str) -> None:
    """Run an example in its short form, and keep its results and what it prints in ``RESULTS``."""
    import matplotlib.pyplot as plt
    import pyro

    folder = RESULTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    printed = io.StringIO()
    argv = sys.argv
    sys.argv = [f"{name}.py", "--out", str(folder), *shlex.split(SHORT_FORMS[name])]
    try:
        with pyro.get_param_store().scope(), contextlib.redirect_stdout(printed), plt.rc_context():
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except BaseException as error:
        raise RuntimeError(f"examples/{name}.py {SHORT_FORMS[name]}: {error!r}") from error
    finally:
        sys.argv = argv
    kept = [line for line in printed.getvalue().splitlines() if str(folder) not in line]
    (folder / "printed.txt").write_text("\n".join(kept).strip() + "\n", encoding="utf-8")
    (folder / "digest").write_text(_digest(name), encoding="utf-8")


def _prepare(path: list[str]) -> None:
    """Prepare a process: it imports what its parent does, has one thread, and draws into files."""
    import matplotlib as mpl
    import torch

    sys.path[:] = path
    mpl.use("agg")
    torch.set_num_threads(1)


def _digest(name: str) -> str:
    """Return a hash of all that the results of an example depend on."""
    files = [EXAMPLES / f"{name}.py", EXAMPLES / "common.py", *sorted(PACKAGE.rglob("*.py"))]
    parts = [SHORT_FORMS[name].encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _last_digest(name: str) -> str | None:
    file = RESULTS / name / "digest"
    return file.read_text(encoding="utf-8") if file.exists() else None


# --- Writing the pages -----------------------------------------------------------------------------------------------


def generate(app: Any = None) -> None:
    """Run the examples, and write the page of each and the gallery to ``docs/examples``."""
    run_all(list(SHORT_FORMS))
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir()
    examples = {name: Example.read(name) for name in [*SHORT_FORMS, *applications.kept_names()]}
    for name, example in examples.items():
        for picture in example.pictures:
            shutil.copyfile(picture, PAGES / f"{name}_{picture.name}")
        (PAGES / f"{name}.md").write_text(page(example), encoding="utf-8")
    (PAGES / "index.md").write_text(index(examples), encoding="utf-8")


def page(example: Example) -> str:
    """Make the page of an example."""
    name = example.name
    figures = [_figure(name, picture.stem) for picture in example.pictures]
    parts = [f"# {example.title}", example.introduction, *figures[:1]]
    if example.steps:
        parts.append("## Step by step")
        for number, step in enumerate(example.steps, 1):
            parts += [f"**{number}.** {step.sentence}", f"```{{code-block}} python\n{step.code}\n```"]
    printed = (example.folder / "printed.txt").read_text(encoding="utf-8").strip()
    parts += ["## What it prints", f"```{{code-block}} sh\n:class: command\n$ {example.command}\n```"]
    if printed:
        parts.append(f"```{{code-block}} text\n:class: printed\n{printed}\n```")
    if figures[1:]:
        parts += ["## Its other pictures", *figures[1:]]
    parts += [
        "## The whole script",
        f"{{download}}`{name}.py <../../examples/{name}.py>` reads functions that the examples share from "
        "{download}`common.py <../../examples/common.py>`.",
        f":::{{dropdown}} Show the code\n```{{literalinclude}} ../../examples/{name}.py\n:language: python\n```\n:::",
    ]
    return "\n\n".join(parts) + "\n"


def index(examples: dict[str, Example]) -> str:
    """Make the gallery: cards by theme, and the table of contents."""
    kept = [name for name in examples if name not in SHORT_FORMS]
    themes = THEMES | ({APPLICATIONS: kept} if kept else {})
    if others := [name for name in examples if not any(name in names for names in themes.values())]:
        themes[OTHERS] = others
    parts = [INDEX]
    for theme, names in themes.items():
        parts += [f"## {theme}", "::::{grid} 1 2 2 3\n:gutter: 3"]
        parts += [_card(examples[name]) for name in names]
        parts += ["::::"]
    contents = "\n".join(name for names in themes.values() for name in names)
    parts.append(f"```{{toctree}}\n:hidden:\n\n{contents}\n```")
    return "\n\n".join(parts) + "\n"


def _card(example: Example) -> str:
    lines = [f":::{{grid-item-card}} {example.title}", f":link: {example.name}", ":link-type: doc"]
    if example.pictures:
        lines += [f":img-top: {example.name}_{example.pictures[0].name}", ":class-img-top: thumbnail"]
    return "\n".join([*lines, "", example.teaser, ":::"])


def _figure(name: str, stem: str) -> str:
    caption = CAPTIONS.get(stem, f"{stem.replace('_', ' ').capitalize()}.")
    return f":::{{figure}} {name}_{stem}.png\n:alt: {caption}\n\n{caption}\n:::"
