"""The house stands as it was drawn: rooms import only from the floors beneath, and none is too big."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_vae"
MAX_LINES = 400

FLOORS = [
    {"bernoulli", "checks", "recipes"},
    {
        *{"randomness", "quadrature", "bias_variance", "idx", "handlers", "networks"},
        *{"distributions", "mixtures", "flows", "tabular", "dimension_names", "uniformity"},
        *{"draw_files", "module_tensors", "substitutes", "tensor_files"},
    },
    {
        *{"datasets", "descriptions", "families", "decomposition", "schedules", "missing", "pareto", "ranks"},
        *{"capturable_adam", "capture", "checkpoints"},
    },
    {"parts", "multivariate", "joint_density", "minibatches", "draws", "drawing", "elbo_runs"},
    {
        "priors",
        "guides",
        "likelihoods",
        "linear_gaussian",
        "baselines",
        "per_datum",
        "aggregate",
        "steps",
        "pair_checks",
    },
    {"model_files", "pair_checks"},
    {
        *{"vae", "exact", "evidence", "score_functions", "importance_weighting", "rates", "information"},
        *{"captured_steps", "run_state"},
    },
    {"loops", "gradients", "objectives", "annealing", "comparison", "refinement", "calibration"},
    {"training", "gaps", "svi"},
    {"inference_data", "inspection"},
    {"mcmc", "plot_axes"},
    {"plot_nats", "plot_estimates", "plot_latents", "plot_images", "plot_plates"},
    {"plots"},
    {"report"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports_of(source: str) -> set[str]:
    """The modules of the package that some code imports, wherever the statement stands; "" is the package itself."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # `from .room import word`
                module = f"pyro_vae.{module}".rstrip(".")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "pyro_vae" else [module]
        else:
            continue
        rooms |= {name.removeprefix("pyro_vae").lstrip(".") for name in names if name.split(".")[0] == "pyro_vae"}
    return rooms


def test_imports_are_found_in_every_form():
    source = "import pyro_vae.vae\nfrom pyro_vae import exact\nfrom pyro_vae.parts import Part\nfrom . import plots\n"
    assert imports_of(source + "import pyro\nfrom pyro.poutine import trace") == {"vae", "exact", "parts", "plots"}
    assert imports_of("def late():\n    import pyro_vae as pv") == {""}


def test_every_room_has_a_floor_and_every_floor_its_rooms():
    assert set(ROOMS) == set(FLOOR_OF)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_the_floors_beneath_it(room):
    # Floors are in order, so that no circle of imports is left where this holds for every room.
    too_high = {
        other
        for other in imports_of((PACKAGE / f"{room}.py").read_text())
        if FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]
    }
    assert not too_high, f"{room} imports {sorted(too_high)}, which do not lie beneath it"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_room_is_too_big(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: past {MAX_LINES} it is two rooms"


def test_every_example_has_a_test():
    tests = (ROOT / "tests" / "test_examples.py").read_text()
    untested = [path.name for path in (ROOT / "examples").glob("*.py") if path.name not in tests]
    assert not untested, f"tests/test_examples.py names none of {untested}"
