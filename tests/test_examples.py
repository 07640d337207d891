"""Each example runs in a short form, and its results, pictures and ArviZ files are right."""

import copy
import json
import math
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
import xarray as xr
from pairs import record_traces
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv
from pyro_vae.compilation.graph import Graph
from pyro_vae.handlers import WeightKL

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "common"]
ANNEALED = ("relaxed", "twin", "annealed", "annealed, relaxed KL")
RELAXED = [f"{name}, {row}" for name in ("relaxed Bernoulli", "Gumbel-softmax") for row in ANNEALED]
METHODS = ["one full Gaussian", "exact mixture", "enumerated Bernoulli", "score function", *RELAXED]
METHODS += ["Gaussian", "Jensen under the prior", "naive Monte Carlo"]
SHORT = ("--epochs", "1", "--test-images", "20", "--draws", "5", "--samples", "50")
PICTURES = {"training", "latent_map", "reconstructions", "samples"}
DISCRETE = ("--data", "digits", "--epochs", "1", "--test-images", "30", "--draws", "5", "--samples", "20")
SMALL = (*DISCRETE, "--hidden", "16")
APPLIED = ("--data", "digits", "--samples", "10", "--hidden", "16", "--latent", "4", "--draws", "5")
SEVERAL, ODD = (*APPLIED, "--test-images", "100"), (*APPLIED, "--test-images", "90", "--refined", "8")
SAMPLED = ["score-function", "running-average", "neural-baseline", "leave-one-out", "vimco"]
ESTIMATORS = ["discrete-kl", "relaxed", "straight-through-discrete-kl", "straight-through-relaxed", *SAMPLED]
WORLD_TRAINING = ("--epochs", "1", "--sequences", "50", "--frames", "9", "--hidden", "16", "--draws", "5")
WORLD = (*WORLD_TRAINING, "--horizon", "14", "--test-sequences", "12")
ACTING = ("--runs", "10", "--steps", "40")


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    """Let examples import their neighbours, as a script does, and remove these modules afterwards."""
    loaded = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    yield
    for name in set(sys.modules) - loaded:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs an example as a script, and returns its folder, its results and what it printed."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr().out
        if (tmp_path / "table.txt").exists():
            assert (tmp_path / "table.txt").read_text() in printed
        return tmp_path, json.loads((tmp_path / "results.json").read_text()), printed

    return run


def functions_of(name):
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def assert_pictures(folder, names):
    assert {path.stem for path in folder.glob("*.png")} == names
    for path in folder.glob("*.png"):
        pixels = plt.imread(path)[..., :3]
        height, width, _ = pixels.shape
        assert min(height, width) > 200, path.name
        assert (pixels.min(-1) < 0.5).mean() > 1e-3, f"{path.name} is blank"


def assert_trees(folder, names, draws, rows, masked=()):
    """Check the files of draws; what a program masks, in the variables ``masked``, is NaN."""
    assert {path.stem for path in folder.glob("*.nc")} == names
    for path in folder.glob("*.nc"):
        with xr.open_datatree(path) as tree:
            assert tree["posterior"]["z"].sizes["draw"] == draws
            assert tree["posterior_predictive"]["x"].sizes["obs"] == rows
            for node in tree.children.values():
                gaps = {name for name, variable in node.data_vars.items() if not bool(variable.notnull().all())}
                assert gaps <= {*masked}


def assert_settings(results, **expected):
    assert {name: results["settings"][name] for name in expected} == expected


def assert_mixture(folder, results, rows, draws):
    assert list(results["methods"]) == METHODS
    assert results["truth"]["expected_log_p"] == pytest.approx(1.0741, abs=1e-4)
    table = (folder / "table.txt").read_text()
    for name, row in results["methods"].items():
        assert table.count(f"  {name}:") == 1, "the lesson of each row"
        assert {"log_p", "lost", "energy", "seconds"} <= set(row)
        # Models trained on 1000 points are below the truth, up to a few thousandths on new points.
        assert row["log_p"] < results["truth"]["log_p"] + 0.01, name
        if name in ("one full Gaussian", "exact mixture"):
            continue
        assert row["residual"] < 1e-3, name
        assert row["log_p"] == pytest.approx(row["elbo"] + row["kl"], abs=1e-3), name
        assert row["kl"] > -1e-3, name
        assert 0.5 <= row["accuracy"] <= 1, name
    families = {"bernoulli", "relaxed_bernoulli", "gumbel_softmax", "gaussian"}
    assert_pictures(folder, families)
    assert_trees(folder, families, draws, rows)


def test_mixture_in_a_short_form(run):
    options = ("--epochs", "15", "--test-points", "300", "--particles", "4", "--draws", "20")
    folder, results, printed = run("mixture.py", *options)
    assert_mixture(folder, results, rows=200, draws=20)
    assert_settings(results, epochs=15, test_points=300, particles=4, draws=20, seed=0, kl_weight=1.0)
    assert "log p(x)" in printed
    shown = [line for line in printed.splitlines() if line.startswith(("Picture: ", "naive Monte Carlo: "))]
    assert shown[0].startswith("Picture: "), "pictures come during the run"


def fitted_gaussian(mixture, weight, epochs):
    pyro.set_rng_seed(0)
    vae, weigh = mixture["make_vae"]("Gaussian"), WeightKL(weight)
    train = pv.datasets.two_gaussians(1000, seed=0).x
    fitted = pv.fit(weigh(vae.model), weigh(vae.guide), train, epochs=epochs, lr=1e-2)
    with torch.no_grad():
        return vae.encode(train).mean.std().item(), fitted.history["rate"][-1]


def test_without_the_weight_of_the_kl_codes_drift_apart():
    mixture = functions_of("mixture.py")
    (spread, rate), (spread_without, rate_without) = (fitted_gaussian(mixture, kl, epochs=300) for kl in (1.0, 0.0))
    assert spread_without > 1.5 * spread
    assert rate_without > 2 * rate


@pytest.mark.parametrize("name", ["enumerated Bernoulli", "exact mixture"])
def test_methods_that_enumerate_take_any_weight(name):
    mixture = functions_of("mixture.py")
    _, model, guide, elbo = mixture["make_methods"](2)["bernoulli"][name]
    weigh = WeightKL(0.0 if guide is not mixture["no_guide"] else 1.0)
    x = pv.datasets.two_gaussians(50, seed=0).x
    fitted = pv.fit(weigh(model), weigh(guide), x, epochs=20, lr=1e-2, elbo=elbo)
    # A model that sums its latent out has no distortion; its loss is minus the evidence.
    fit = [-nats for nats in fitted.history.get("distortion", [])] or fitted.history["elbo"]
    assert fit[-1] > fit[0]


def test_enumerating_in_the_model_fits_the_evidence_itself():
    mixture = functions_of("mixture.py")
    vae, x = mixture["make_vae"]("Bernoulli"), pv.datasets.two_gaussians(50, seed=0).x
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(config_enumerate(vae.model), mixture["no_guide"], x)
    assert -loss == pytest.approx(pv.exact.log_evidence(vae.model, x).sum().item(), rel=1e-5)


def test_energy_distance_is_zero_for_equal_samples_and_grows_with_distance():
    energy_distance, x = functions_of("common.py")["energy_distance"], torch.randn(200, 2)
    distances = [energy_distance(x, x + shift) for shift in (0.0, 0.5, 1.0)]
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[0] < distances[1] < distances[2]


def test_the_null_band_holds_samples_of_the_truth_and_no_others():
    common = functions_of("common.py")
    low, high = common["null_band"](500, repeats=20)
    first, second = (pv.datasets.two_gaussians(500, seed=seed).x for seed in (0, 1))
    assert 0 <= low < high
    assert common["energy_distance"](first, second) < 5 * high
    assert common["energy_distance"](first, second + 0.3) > high


def test_accuracy_is_the_same_whichever_cluster_is_called_1_and_pure_classes_have_one_label_each():
    common = functions_of("common.py")
    accuracy, purity = common["cluster_accuracy"], common["purity"]
    found, labels = torch.tensor([True, True, False, True]), torch.tensor([1, 1, 0, 0])
    assert accuracy(found, labels) == accuracy(~found, labels) == 0.75
    labels = torch.tensor([0, 0, 1, 1])
    assert purity(torch.eye(2)[labels], labels) == 1
    assert purity(torch.eye(2)[torch.tensor([0, 1, 0, 1])], labels) == 0.5


def test_monte_carlo_in_a_short_form(run):
    folder, found, _ = run("monte_carlo.py", "--epochs", "30", "--test-points", "100", "--largest", "1024")
    for errors in found["errors"].values():
        assert errors[-1] < errors[0], "more draws, a better estimate"
    assert_pictures(folder, {"monte_carlo"})


@pytest.mark.slow
def test_the_full_mixture_reaches_the_known_numbers(run):
    folder, results, _ = run("mixture.py")
    assert_mixture(folder, results, rows=200, draws=500)
    truth, rows = results["truth"]["log_p"], results["methods"]
    # 5000 test points have a standard error of 0.014 about the expectation.
    assert truth == pytest.approx(1.0741, abs=0.065)
    annealed = [f"{latent}, annealed" for latent in ("relaxed Bernoulli", "Gumbel-softmax")]
    for name in ("exact mixture", "enumerated Bernoulli", *annealed):
        assert (rows[name]["log_p"], rows[name]["accuracy"]) == (pytest.approx(truth, abs=0.03), 1)
    for name in annealed:
        assert rows[name]["lost"] < 0.02 < 0.3 < rows[name.replace("annealed", "twin")]["lost"]
        assert rows[f"{name}, relaxed KL"]["lost"] > 0.3, "the relaxed KL is no KL of two bits at any temperature"
    assert rows["one full Gaussian"]["log_p"] == pytest.approx(-0.884, abs=0.02)
    assert rows["Jensen under the prior"]["log_p"] == pytest.approx(-2.848, abs=0.02)
    assert rows["Jensen under the prior"]["kl"] < 0.02, "the optimum ignores z: a tight bound and a useless model"
    low, high = results["truth"]["energy_null_band"]
    assert low < high < rows["one full Gaussian"]["energy"] < rows["Jensen under the prior"]["energy"]


def assert_images(folder, found, name, epochs, pixels):
    assert found["log_p"] > found.get("elbo_of_test_images", found["elbo"])
    # After an epoch or two the model is better than fair coins, and no image is certain.
    assert -pixels * torch.tensor(2.0).log() < found["elbo"] < 0
    assert {len(values) for values in found["history"].values()} == {epochs}
    terms = {of + term for of in ("", "validation_") for term in ("elbo", "distortion", "rate")}
    assert set(found["history"]) == terms
    with xr.open_datatree(folder / f"{name}.nc") as tree:
        for group in ("posterior", "posterior_predictive", "observed_data", "guide"):
            assert tree[group]["label"].dims == ("obs",)


@pytest.fixture
def enlarged(monkeypatch):
    """Replace MNIST by scikit-learn's digits as bytes, enlarged to 28 × 28 pixels, without a network."""

    def mnist(split, folder):
        data = pv.datasets.digits(split)
        large = torch.nn.functional.interpolate(data.x.reshape(-1, 1, 8, 8), size=(28, 28), mode="bilinear")
        return pv.datasets.Dataset((255 * large).flatten(1).to(torch.uint8), data.labels)

    monkeypatch.setattr(pv.datasets, "mnist", mnist)


def test_digits_in_a_short_form(run):
    folder, found, _ = run("digits.py", "--epochs", "2", "--test-images", "5", "--draws", "20")
    assert_images(folder, found, "digits", epochs=2, pixels=64)
    assert_settings(found, epochs=2, test_images=5, draws=20)
    assert found["log_p"] == pytest.approx(found["elbo"] + found["kl"], abs=1e-3)
    # The Monte Carlo estimate of the last epoch, one draw a digit, is near the quadrature.
    assert found["history"]["validation_elbo"][-1] == pytest.approx(found["elbo"], abs=3)
    assert_pictures(folder, {*PICTURES, "manifold"})
    assert_trees(folder, {"digits"}, draws=20, rows=5)


def test_watch_training_writes_the_history_to_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, found, _ = run("watch_training.py", "--epochs", "4", "--every", "2")
    events = EventAccumulator(str(folder)).Reload()
    history = {name: values[1::2] for name, values in found["history"].items()}
    assert {name: [event.value for event in events.Scalars(name)] for name in history} == {
        name: pytest.approx(values) for name, values in history.items()
    }
    assert [event.step for event in events.Scalars("elbo")] == [30, 60]
    assert events.Tags()["images"] == ["samples"]


def test_sweep_ends_trials_and_sorts_the_others(run):
    folder, found, printed = run("sweep.py", "--epochs", "3", "--settings", "4")
    rows = list(found["rows"].values())
    statuses = [row["status"] for row in rows]
    assert statuses == sorted(statuses)
    assert {"complete"} <= set(statuses) <= {"complete", "stopped"}
    elbos = [row["elbo"] for row in rows if row["status"] == "complete"]
    assert elbos == sorted(elbos, reverse=True)
    assert -64 * 0.7 < elbos[0] < 0
    assert ("stopped" in statuses) == ("stopped" in printed)
    assert_pictures(folder, {"sweep"})
    with xr.open_datatree(folder / "sweep.nc", engine="h5netcdf") as tree:
        assert tree["rows"]["elbo"].sizes == {"setting": 4, "seed": 2, "obs": 297}


def test_export_encoder_gives_the_codes_of_the_vae(run):
    folder, found, printed = run("export_encoder.py", "--epochs", "1")
    assert (found["rows"], found["error"] < 1e-6) == (297, True)
    assert "codes of 297 digits" in next(line for line in printed.splitlines() if str(folder) not in line)
    mean, scale = torch.export.load(folder / "encoder.pt2").module()(torch.zeros(1, 64))
    assert (mean.shape, bool((scale > 0).all())) == ((1, 2), True)


@pytest.mark.parametrize("options", [(), ("--network", "convolutional", "--channels", "4", "8")], ids=["mlp", "conv"])
def test_mnist_in_a_short_form(run, enlarged, options):
    folder, found, printed = run("mnist.py", *SHORT, "--hidden", "32", *options)
    assert_images(folder, found, "mnist", epochs=1, pixels=784)
    assert_settings(found, data="mnist", latent=2, binarization="resample")
    assert_pictures(folder, {*PICTURES, "manifold"})
    assert_trees(folder, {"mnist"}, draws=5, rows=20)
    assert f"{found['elbo']:.2f}" in printed
    assert "-86.8" in printed


@pytest.mark.parametrize("options", [
    ("--prior", "normal", "--binarization", "threshold"),
    ("--likelihood", "continuous-bernoulli"),
    ("--likelihood", "normal", "--latent", "3"),
    ("--guide", "relaxed-bernoulli", "--prior", "normal", "--latent", "1"),
    ("--prior", "relaxed-bernoulli", "--guide", "relaxed-bernoulli", "--latent", "4"),
    ("--prior", "relaxed-bernoulli", "--latent", "1"),
], ids=lambda options: " ".join(options))  # fmt: skip
def test_mnist_with_other_parts(run, options):
    folder, found, _ = run("mnist.py", "--data", "digits", *SHORT, "--hidden", "16", *options)
    assert found["log_p"] > found["elbo_of_test_images"]
    assert_pictures(folder, PICTURES | ({"manifold"} if "continuous-bernoulli" in options else set()))


def test_without_mnist_the_ways_out_are_named(run, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)nowhere.*--folder.*--data digits"):
        run("mnist.py", *SHORT, "--folder", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_categorical_in_a_short_form(run, enlarged, data):
    options = ("--epochs", "2", "--test-images", "30", "--draws", "5", "--classes", "5", "--hidden", "16")
    folder, found, _ = run("categorical.py", "--data", data, *options)
    assert_images(folder, found, "categorical", epochs=2, pixels=64 if data == "digits" else 784)
    assert 0.1 < found["same_label"] <= 1
    assert_pictures(folder, {*PICTURES, "classes", "labels"})
    assert_trees(folder, {"categorical"}, draws=5, rows=30)


def test_categorical_with_more_states_than_can_be_summed_over(run):
    options = ("--epochs", "1", "--test-images", "30", "--draws", "5", "--hidden", "16")
    *_, printed = run("categorical.py", *options, "--variables", "6", "--classes", "10")
    assert all(f"with {count} draws" in printed for count in (20, 1000))


def test_classes_of_a_known_decoder_are_drawn_as_they_are():
    categorical = functions_of("categorical.py")
    vae = pv.VAE(
        pv.priors.OneHotCategorical((2, 3)),
        pv.guides.OneHotCategorical(6, (2, 3), pv.networks.linear()),
        pv.likelihoods.Normal((2, 3), 6, lambda *sizes: torch.nn.Identity(), scale=1.0),
    )
    means = categorical["prototypes"](vae, num_others=20_000)  # the decoder's mean is the code itself
    for variable in range(2):
        own, other = (means[variable].reshape(3, 2, 3)[:, index] for index in (variable, 1 - variable))
        assert torch.equal(own, torch.eye(3))
        assert torch.allclose(other, torch.full((3, 3), 1 / 3), atol=0.02)


def test_gaussian_mixture_vae_in_a_short_form(run):
    options = ("--epochs", "3", "--test-images", "60", "--draws", "5", "--hidden", "32")
    folder, found, _ = run("gaussian_mixture_vae.py", *options)
    assert list(found["models"]) == ["one standard normal", "mixture, y summed over"]
    for row in found["models"].values():
        assert -64 * torch.tensor(2.0).log() < row["elbo"] < row["log_p"] < 0
        assert 0.1 < row["same_label"] <= 1
    assert_pictures(folder, {"latent", "samples", "clusters"})
    assert_trees(folder, {"gaussian_mixture_vae"}, draws=5, rows=60)
    with xr.open_datatree(folder / "gaussian_mixture_vae.nc") as tree:
        assert tree["posterior"]["y"].dims == ("chain", "draw", "obs", "variable", "component")
        assert tree["observed_data"]["label"].dims == ("obs",)


def test_a_mixture_of_gaussians_is_one_model_with_its_component_drawn_or_summed_over():
    pyro.set_rng_seed(0)
    mixture = functions_of("gaussian_mixture_vae.py")["GaussianMixtureVAE"](6, components=3, latent=2, hidden=8)
    x = torch.bernoulli(torch.full((20, 6), 0.5))
    exact = pv.exact.log_evidence(mixture.marginal_model, x)
    drawn = pv.log_evidence(mixture.model, mixture.guide, x, num_samples=4000)
    assert ((drawn.log_evidence - exact).abs() < 6 * drawn.standard_error + 1e-3).all()


def test_semi_supervised_in_a_short_form(run):
    options = ("--epochs", "5", "--test-images", "200", "--draws", "5", "--hidden", "64")
    folder, found, _ = run("semi_supervised.py", *options)
    assert list(found["methods"]) == ["enumerated", "relaxed", "alone"]
    assert len({row["steps"] for row in found["methods"].values()}) == 1
    for name, row in found["methods"].items():
        assert row["accuracy"] > 0.5, name
        assert name == "alone" or -64 * torch.tensor(2.0).log() < row["elbo"] < row["log_p"] < 0
    for history in found["histories"].values():
        assert "surrogate" in history, "with the second observation of the labels, the objective is no bound"
        assert "elbo" not in history
    assert_pictures(folder, {"classes"})
    assert_trees(folder, {"semi_supervised"}, draws=5, rows=100, masked={"y", "label"})
    with xr.open_datatree(folder / "semi_supervised.nc") as tree:
        assert tree["posterior"]["y"].dims == ("chain", "draw", "obs", "variable", "class")
        assert bool(tree["posterior_predictive"]["label"].isnull().all())  # masked: no label was observed
        assert tree["observed_data"]["truth"].dims == ("obs",)


DIGIT_SCENES = ("--data", "digits", "--batch-size", "50", "--test-images", "60", "--draws", "5", "--hidden", "32")


def test_attend_infer_repeat_in_a_short_form(run):
    folder, found, printed = run("attend_infer_repeat.py", *COUNTED)
    ours, one_pass = found["methods"]["attend, infer, repeat"], found["methods"]["the same, one pass"]
    highest = -400 * 0.5 * math.log(2 * math.pi * 0.3**2)
    assert one_pass["elbo"] < ours["log_p"] < highest, "no scene has a higher density"
    assert one_pass["elbo"] < one_pass["log_p"] < highest
    assert 0 < ours["overlap"] <= 1
    assert found["methods"]["ink, with labels"]["accuracy"] > found["methods"]["most frequent count"]["accuracy"] > 20
    headline, regions = found["headlines"][0], found["methods"]["connected regions"]
    assert (headline["value"], headline["baseline"]) == (ours["accuracy"], regions["accuracy"])
    assert "right counts of 0 to 2 digits" in printed
    assert_pictures(folder, {"scenes", "confusion"})
    with xr.open_datatree(folder / "attend_infer_repeat.nc") as tree:
        draws = tree["posterior"]
        for t in (1, 2):  # a latent of an object that is not there is masked
            assert bool((draws[f"where_{t}"].isnull() == (draws["n"] < t)).all())


def test_attend_infer_repeat_gradients_in_a_short_form(run):
    options = ("--scenes", "200", "--epochs", "2", "--samples", "20", "--what", "6", "--batch-size", "20")
    folder, found, _ = run("attend_infer_repeat_gradients.py", *DIGIT_SCENES, *options)
    exact, learned, plain, two = found["estimators"].values()
    for row in (two, plain, learned):
        assert row["p_value"] > 1e-5
        assert row["bias"] <= 5 * row["bias_error"]
    assert exact["variance"] < two["variance"] < plain["variance"]
    assert found["headlines"][0]["value"] == exact["variance"]
    assert all(len(history) == 2 for history in found["histories"].values())
    assert_pictures(folder, {"gradients", "learning"})


def test_objects_beyond_the_count_are_not_drawn():
    example = functions_of("attend_infer_repeat.py")
    air = example["AttendInferRepeat"]("air", size=20, what=3, hidden=8)
    x = torch.rand(4, 400)
    latents = {f"{kind}_{t}": torch.randn(4, size) for t in (1, 2) for kind, size in (("where", 3), ("what", 3))}
    objects = [air.place(latents[f"what_{t}"], latents[f"where_{t}"]).flatten(1) for t in (1, 2)]
    for count in range(3):
        values = {"n": torch.full((4,), count)} | latents
        trace = pyro.poutine.trace(pyro.poutine.condition(air.model, data=values)).get_trace(x)
        trace.compute_log_prob()
        drawn = sum(objects[:count], torch.zeros(4, 400))
        assert torch.allclose(trace.nodes["x"]["fn"].base_dist.loc, drawn, atol=1e-6)
        for t in (1, 2):
            prior = torch.distributions.Normal(0.0, 1.0).log_prob(latents[f"what_{t}"]).sum(1)
            assert torch.allclose(trace.nodes[f"what_{t}"]["log_prob"], prior * (t <= count), atol=1e-6)


def settings(refine):
    return SimpleNamespace(refine=refine, epochs=1, batch_size=1, lr=1.0, seed=0, compile=None)


def test_scenes_are_taken_apart_for_each_number_of_objects():
    """The density of a scene and a number of objects is exact without objects, and found objects have boxes."""
    example = functions_of("attend_infer_repeat.py")
    torch.manual_seed(0)
    air = example["AttendInferRepeat"]("air", size=20, what=3, hidden=8)
    x = torch.rand(6, 400)
    x[:3] = 0  # empty scenes
    log_p, boxes, objects = example["take_apart"](air, x, settings(refine=30))
    empty = torch.distributions.Normal(0.0, 0.3).log_prob(x).sum(1) - math.log(3)
    assert torch.allclose(log_p[:, 0], empty, rtol=1e-5)
    n = log_p.argmax(1)
    assert n[:3].tolist() == [0, 0, 0]
    assert (n[3:] > 0).all(), "something is there"
    assert torch.equal(boxes.isfinite().all(-1), torch.arange(2) < n[:, None])
    assert torch.equal(objects.flatten(2).any(-1), torch.arange(2) < n[:, None])
    # The model of one object has no latents of a second one.
    trace = pyro.poutine.trace(lambda: air.model(x, count=1)).get_trace()
    assert set(trace.stochastic_nodes) - {"data"} == {"where_1", "what_1"}
    assert trace.nodes["n"]["value"].tolist() == [1] * 6


def test_simple_counts_and_overlaps_of_boxes():
    sys.path.insert(0, str(EXAMPLES))
    import common

    scenes = pv.datasets.digit_scenes(pv.datasets.digits("train"), 400, size=40, sides=(8, 11), seed=0)
    others = pv.datasets.digit_scenes(pv.datasets.digits("test"), 200, size=40, sides=(8, 11), seed=1)
    found = common.count_regions(scenes, others.x)
    assert common.accuracy(found, others.labels) > 95, "in large scenes hardly any digits touch"
    assert common.accuracy(common.count_by_ink(scenes, others.x), others.labels) > 80
    boxes = others.boxes[others.labels > 0]
    assert common.box_overlap(boxes, boxes) == pytest.approx(1)
    assert common.box_overlap(boxes.flip(1), boxes) == pytest.approx(1), "objects have no order"
    # Boxes of twice the side have four times the area.
    assert common.box_overlap(boxes * torch.tensor([2.0, 1.0, 1.0]), boxes) == pytest.approx(0.25)


@pytest.fixture
def m2():
    """An untrained M2 of six pixels, and eight rows, four of them with a label."""
    pyro.set_rng_seed(0)
    example, x = functions_of("semi_supervised.py"), torch.bernoulli(torch.full((8, 6), 0.5))
    labels = torch.tensor([3, -1, 0, -1, 9, 9, -1, -1])
    return example["M2"]("m2", pixels=6, latent=2, hidden=8), x, labels


def by_hand(model, x, labels, z, alpha):
    """The bound summed over classes row by row, z given of each class, ``(10, N, D)``, and the surrogate with alpha."""
    total = torch.zeros(())
    for row, label in enumerate(labels.tolist()):
        log_q, each = model.classifier(x[row]).base_dist.logits[0], []
        for digit in range(10):
            y, here = torch.eye(10)[digit], z[digit, row]
            q, p = model.encoder(torch.cat([x[row], y])), model.decoder(torch.cat([here, y]))
            terms = p.log_prob(x[row]) + model.style_prior().log_prob(here) - q.log_prob(here)
            each.append(terms - torch.tensor(10.0).log())
        if label < 0:
            total = total + sum(log_q[digit].exp() * (each[digit] - log_q[digit]) for digit in range(10))
        else:
            total = total + each[label] + alpha * log_q[label]
    return total


@pytest.mark.parametrize("alpha", [0.0, 7.0])
def test_the_enumerated_loss_is_the_sum_over_classes_by_hand_and_so_is_its_gradient(m2, alpha):
    model, x, labels = m2
    traces = []
    guide = record_traces(config_enumerate(model.guide), traces)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(partial(model.model, alpha=alpha), guide, x, labels)
    total = by_hand(model, x, labels, traces[-1].nodes["z"]["value"], alpha)
    assert -loss.item() == pytest.approx(total.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, total))
    for enumerated, summed in zip(ours, theirs, strict=True):
        assert torch.allclose(-enumerated, summed, rtol=1e-4, atol=1e-5)


def test_a_label_that_is_read_is_the_same_relaxed_or_summed_over(m2):
    model, x, _ = m2
    labels = torch.arange(8)
    found = [
        pv.evaluate(first, second, (x, labels), elbo=elbo, num_samples=2000)["elbo"]
        for first, second, elbo in (
            (model.model, config_enumerate(model.guide), TraceEnum_ELBO(max_plate_nesting=1)),
            (partial(model.model, relaxed=True), partial(model.guide, relaxed=True), None),
        )
    ]
    assert found[0] == pytest.approx(found[1], abs=0.05)
    assert pv.log_evidence(model.model, model.guide, x, labels).log_evidence.mean().item() > found[0]


def test_gumbel_max_in_a_short_form(run):
    folder, found, _ = run("gumbel_max.py", "--epochs", "20")
    p_values = found["categorical"]["p_value"]
    assert p_values["argmax, Gumbel"] > 1e-6
    assert p_values["argmax, Gaussian"] < 1e-6, "another noise gives another law, and the test of fit sees it"
    assert_pictures(folder, {"categorical", "simplex"})
    with xr.open_datatree(folder / "simplex.nc") as tree:
        y = tree["prior"]["y"]
        assert y.sizes["temperature"] == 4
        assert abs(y.sum("category") - 1).max() < 1e-5


def test_gradient_estimators_in_a_short_form(run):
    folder, found, _ = run("gradient_estimators.py", "--epochs", "20")
    gradients = found["gradients"]
    assert gradients["thresholded noise"]["mean"] == gradients["thresholded noise"]["sd"] == 0
    for name, row in gradients.items():
        if name.startswith("score"):
            assert abs(row["mean"] - found["exact"]) < 5 * row["error"], name
    assert_pictures(folder, {"gradients"})


def test_explosion_in_a_short_form(run):
    options = ("--epochs", "1", "--largest", "4", "--samples", "20", "--test-images", "20")
    folder, found, _ = run("explosion.py", *options)
    assert [row["states"] for row in found["evidence"]] == [2, 4, 16]
    assert_pictures(folder, {"cost", "errors"})
    assert_trees(folder, {"explosion"}, draws=200, rows=20)


def test_explosion_gradients_in_a_short_form(run):
    folder, found, _ = run("explosion_gradients.py", "--epochs", "1", "--largest", "4")
    assert len(found["steps"]) == 5
    for rows in found["steps"].values():
        assert [row["n"] for row in rows] == [1, 2, 4]
    assert_pictures(folder, {"seconds", "bytes"})


def test_extrapolation_doubles_with_each_latent():
    extrapolate = functions_of("explosion.py")["extrapolate"]
    rows = [{"n": 1, "seconds": 1.0}, {"n": 4, "seconds": 3.0}, {"n": 8}]
    assert (extrapolate(rows, 6, "seconds"), extrapolate([], 6, "seconds")) == (12.0, 0.0)


@pytest.mark.parametrize(("latent", "names"), [("categorical", ESTIMATORS), ("bernoulli", [*ESTIMATORS, "disarm"])])
def test_discrete_mnist_puts_all_estimators_side_by_side_in_a_short_form(run, latent, names):
    folder, found, _ = run("discrete_mnist.py", *SMALL, "--latent", latent, "--estimator", "all")
    assert list(found["runs"]) == names
    for row in found["runs"].values():
        assert row["log_p"] > row["elbo"]
        assert -64 * torch.tensor(2.0).log() < row["elbo"] < 0
        assert row["steps"] == 12
    assert len({row["log_p"] for row in found["runs"].values()}) == len(names)
    assert found["runs"][found["best"]]["log_p"] == max(row["log_p"] for row in found["runs"].values())
    assert_pictures(folder, {*PICTURES, "comparison"})
    assert_trees(folder, {"discrete_mnist"}, draws=5, rows=20)
    table = (folder / "table.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()[1:-2]] == names


def test_discrete_mnist_of_one_estimator_in_a_short_form(run):
    _, found, _ = run("discrete_mnist.py", *SMALL, "--estimator", "vimco", "--particles", "3")
    assert (list(found["runs"]), found["settings"]["particles"]) == (["vimco"], 3)


def test_imputation_in_a_short_form(run):
    folder, found, _ = run("imputation.py", "--epochs", "20", "--draws", "20", "--latent", "3", "--hidden", "16")
    regressions = ["column means", "IterativeImputer"]
    assert list(found["methods"]) == [*regressions, "VAE, nothing more hidden", "VAE, Normal", "VAE, Student-t"]
    for name, row in found["methods"].items():
        assert 0 < row["inside_50"] < row["inside_90"] <= 1, name
        assert row["rmse"] > row["absolute_error"] > 0
        assert (row["rmse"] < found["methods"]["column means"]["rmse"]) == (name != "column means")
        assert found["coverage"][name] == sorted(found["coverage"][name])
    assert_settings(found, percent=25, latent=3)
    assert_pictures(folder, {"calibration"})
    with xr.open_datatree(folder / "imputation.nc") as tree:
        seen = tree["observed_data"]["x"]
        assert (float(seen.isnull().mean()), seen.sizes["measurement"]) == (pytest.approx(0.25, abs=0.05), 30)
        assert bool(tree["imputed"]["x"].notnull().all())
        assert bool(tree["posterior_predictive"]["x"].notnull().all())
        assert float(abs(tree["imputed"]["x"] - seen).max()) == 0, "what was observed stays"


def test_coverage_is_the_share_inside_central_intervals():
    levels = torch.linspace(0.05, 0.95, 19)
    shares = functions_of("common.py")["coverage"](torch.randn(2000, 3000), torch.randn(3000), levels)
    assert ((shares - levels).abs() < 5 * (levels * (1 - levels) / 3000).sqrt() + 1e-3).all()


def test_masking_more_keeps_missing_entries_missing():
    mask_more = functions_of("imputation.py")["mask_more"]
    x = torch.randn(500, 30).masked_fill(torch.rand(500, 30) < 0.25, torch.nan)
    more = mask_more(x)
    assert (more.isnan() | (more == x)).all()
    assert more.isnan().float().mean() - x.isnan().float().mean() == pytest.approx(0.25 * 0.75, abs=0.03)


CELLS = ("--epochs", "5", "--genes", "30", "--hidden", "16", "--latent", "2", "--samples", "50", "--draws", "5")


def test_single_cells_in_a_short_form(run):
    folder, found, printed = run("single_cells.py", *CELLS)
    rows, cells = found["models"], found["log_p_of_cells"]
    assert rows.keys() == cells.keys()
    assert len(rows) == 8
    for name, row in rows.items():
        assert row["log_p"] == pytest.approx(sum(cells[name]) / 175, rel=1e-4)
        if "elbo" in row:  # the others have no latent
            assert row["gap"] == pytest.approx(row["log_p"] - row["elbo"], abs=1e-3)
            assert row["gap"] > row["amortization"] - 0.05
            assert row["amortization"] > 0
    best = max(rows, key=lambda name: rows[name]["log_p"])
    assert rows[best]["difference"] == 0
    worst = min(rows, key=lambda name: rows[name]["log_p"])
    differences = torch.tensor(cells[worst], dtype=torch.double) - torch.tensor(cells[best], dtype=torch.double)
    assert rows[worst]["difference_error"] == pytest.approx(float(differences.std() / 175**0.5), rel=1e-3)
    headline, other = found["headlines"]
    assert (other["value"], other["baseline"]) == (rows["network"]["log_p"], rows["linear state"]["log_p"])
    assert headline["value"] == rows["network, zero-inflated, batches"]["log_p"]
    assert headline["baseline"] == rows["no state, library size only"]["log_p"]
    assert "log p(x) of held-out cells" in printed
    assert_pictures(folder, {"states", "worth", "zeros"})
    with xr.open_datatree(folder / "single_cells.nc") as tree:
        assert (tree["posterior"]["z"].sizes["draw"], tree["posterior"]["z"].sizes["state"]) == (5, 2)
        seen, names = tree["observed_data"]["x"], pv.datasets.pbmc("test")
        assert seen["gene"].values.tolist() == list(names.genes[:30])
        assert seen.values.tolist() == names.x[:30, :30].tolist()


def test_masses_of_the_baselines_of_single_cells_sum_to_one():
    example = functions_of("single_cells.py")
    torch.manual_seed(0)
    x, counts = torch.poisson(torch.full((300, 1), 2.0)), torch.arange(80.0)[:, None]
    independent = example["independent_genes"](x, counts, epochs=20)
    assert independent.exp().sum() == pytest.approx(1, abs=1e-4)
    assert float((independent.exp() * counts[:, 0]).sum()) == pytest.approx(float(x.mean()), abs=0.02)
    # The draws of u differ between counts, and the mass of each is an average over them: an error of about one percent.
    factors = example["factor_analysis"](x, counts, latent=1, draws=400, seed=0)
    assert factors.exp().sum() == pytest.approx(1, abs=0.05)


def test_the_library_size_of_single_cells_is_the_expected_number_of_molecules():
    load, cells = (functions_of("single_cells.py")[name] for name in ("load", "Cells"))
    (x, batch), *_ = load(20)
    pair = cells("cells", x, batch, latent=2, hidden=8, zeros=False, batches=True)
    size, z = torch.tensor([[2.0], [3.0]]), torch.randn(2, 2)
    assert torch.allclose(pair.read(z, size, batch[:2]).mean.sum(-1), size[:, 0].exp(), rtol=1e-4)
    inside = batch[:, 3] == 1
    sizes = x[inside].sum(1).log()
    assert pair.size_prior[3].tolist() == pytest.approx([sizes.mean().item(), sizes.std().item()])


def test_published_in_a_short_form(run):
    folder, found, printed = run("published.py", *SMALL, "--latent", "3", "--pseudo-data", "5", "--method", "all")
    assert list(found["runs"]) == ["vae", "iwae", "vampprior", "flow"]
    for row in found["runs"].values():
        assert row["log_p"] > row["elbo"]
        assert -64 * torch.tensor(2.0).log() < row["elbo"] < 0
    assert_pictures(folder, {*PICTURES, "comparison"})
    assert_trees(folder, {"published"}, draws=5, rows=20)
    assert "86.76" in printed


MUSIC = ("--epochs", "2", "--pieces", "40", "--particles", "3", "--draws", "5", "--latent", "3", "--hidden", "8")


def test_music_in_a_short_form(run):
    folder, found, printed = run("music.py", *MUSIC)
    rows = {name: row["nats"] for name, row in found["rows"].items()}
    every = [*rows.values()]
    assert all(0 < nats < 88 * math.log(2) for nats in every)
    # More draws give a higher bound, one of a filter with one particle is that of one weighted draw.
    drawn, guided, prior = found["bounds"].values()
    assert list(drawn) == ["1", "3"]
    assert drawn["1"] > drawn["3"]
    assert prior["1"] > prior["3"]
    assert guided["1"] == pytest.approx(drawn["1"], rel=0.05)
    assert drawn["3"] < rows["deep Markov model, ELBO"] + 0.05
    assert found["headlines"][0]["value"] == min(each["3"] for each in found["bounds"].values())
    assert "6.39 on the JSB chorales" in printed
    assert_pictures(folder, {"bounds", "pieces"})
    with xr.open_datatree(folder / "music.nc") as tree:
        assert tree["posterior"]["z_0"].sizes == {"chain": 1, "draw": 5, "obs": 10, "latent": 3}
        missing = tree["posterior"]["z_15"].isnull().all(("chain", "draw", "latent")).values
    ended = (pv.datasets.chord_progressions(100, seed=1).lengths[:10] <= 15).numpy()
    assert 0 < ended.sum() < 10
    assert (missing == ended).all(), "states after the end of a piece are missing"


def test_music_from_a_file_and_pieces_without_rows_after_their_end(run, tmp_path):
    pieces = [[[60, 64, 67], [62, 65, 69], [60, 64]], [[60, 64, 67], [-1]], [[59, 62], [60, 64], [48, 67]]] * 4
    (tmp_path / "music.json").write_text(json.dumps({"train": pieces, "test": pieces[:3]}))
    _, found, _ = run("music.py", "--file", str(tmp_path / "music.json"), *MUSIC)
    # The logarithm of how often each key sounds, by hand.
    rolls = pv.datasets.piano_rolls(tmp_path / "music.json", "train")
    often = (rolls.x.sum((0, 1)) + 0.5) / (32 + 1)
    by_hand = [
        torch.distributions.Bernoulli(often).log_prob(rolls.x[row, step]).sum()
        for row in range(3)
        for step in range(rolls.lengths[row])
    ]
    assert found["rows"]["how often each key sounds"]["nats"] == pytest.approx(-float(sum(by_hand)) / 8, rel=1e-4)


SENTENCES = ("--epochs", "3", "--sentences", "200", "--test-sentences", "40", "--latent", "2", "--hidden", "16",
             "--samples", "20", "--draws", "5")  # fmt: skip


def test_sentences_in_a_short_form(run):
    folder, found, printed = run("sentences.py", *SENTENCES)
    rows = found["models"]
    assert next(iter(rows)) == "trigram model"
    assert sum(name.startswith("language model") for name in rows) == 2, "with and without word dropout"
    best = rows["the grammar itself"]["perplexity"]
    words = 40 * rows["trigram model"]["nats"] / math.log(rows["trigram model"]["perplexity"])
    assert words == pytest.approx(round(words), abs=1e-2), "-log p(x) of all sentences is words times log perplexity"
    assert all(best <= row["perplexity"] < 66 for row in rows.values())
    assert all(row["rate"] > 0 and 0 <= row["active"] <= 2 for name, row in rows.items() if "VAE" in name)
    assert f"{best:.2f}" in printed
    assert len(found["path"]) == 6
    assert_pictures(folder, {"codes", "path", "perplexity"})
    with xr.open_datatree(folder / "sentences.nc") as tree:
        assert tree["posterior"]["z"].sizes["draw"] == 5


def test_the_trigram_model_is_right_by_hand_and_sums_to_one():
    """After two starts (2 2) came 3 twice and 4 once; after one 3 and 4; 3 and 4 came after two words each."""
    trigram = functions_of("sentences.py")["trigram_log_prob"]
    train = torch.tensor([[3, 4, 1, 0], [3, 3, 4, 1], [4, 1, 0, 0]])
    lowest = {word: (max({3: 2, 4: 2, 1: 1}.get(word, 0) - 0.75, 0) + 0.75 * 3 / 6) / 5 for word in range(6)}
    middle = {word: ({3: 0.25, 4: 0.25}.get(word, 0) + 0.75 * 2 * lowest[word]) / 2 for word in range(6)}
    top = {word: ({3: 1.25, 4: 0.25}.get(word, 0) + 0.75 * 2 * middle[word]) / 3 for word in range(6)}
    assert sum(top.values()) == pytest.approx(1)
    found = trigram(train, torch.tensor([[1, 0, 0], [4, 1, 0]]), words=6).exp()
    assert found[0] == pytest.approx(top[1], rel=1e-5)
    # After "2 4" came 1 once; after 4 came 1 in two contexts.
    after = (0.25 + 0.75 * (2 - 0.75 + 0.75 * lowest[1]) / 2) / 1
    assert found[1] == pytest.approx(top[4] * after, rel=1e-5)


TRANSLATION = ("--epochs", "1", "--steps", "20", "--sentences", "120", "--pairs", "20", "--repeat", "2",
               "--hidden", "8", "--test-sentences", "30", "--samples", "10", "--draws", "5")  # fmt: skip


def test_translation_in_a_short_form(run):
    folder, found, printed = run("translation.py", *TRANSLATION)
    ways = found["ways"]
    assert list(ways) == ["table of words", "pairs alone", "all sentences"]
    assert all(0 <= row["exact"] <= row["words"] <= 100 for row in ways.values())
    assert ways["pairs alone"]["steps"] == ways["all sentences"]["steps"] == 20 + 2
    # A sentence has at least the probability of a guess among all words of y, and less than 1.
    assert all(-8 * math.log(34) * 1.2 < ways[name]["log_p"] < 0 for name in ("pairs alone", "all sentences"))
    assert [headline["baseline"] for headline in found["headlines"]] == [
        ways["table of words"]["exact"], ways["pairs alone"]["exact"]
    ]  # fmt: skip
    assert "20 pairs of 120" in printed
    assert_pictures(folder, {"examples", "shares"})
    with xr.open_datatree(folder / "translation.nc") as tree:
        assert (tree["posterior"]["x"].sum("word") == 1).all(), "the symbols of x are one-hot"


def test_two_layers_in_a_short_form(run):
    options = ("--epochs", "3", "--warm-up", "1", "--test-images", "50", "--hidden", "16", "--samples", "200")
    folder, found, _ = run("two_layers.py", *options, "--draws", "5")
    deep = ["bottom-up", "bottom-up, warm-up", "top-down", "top-down, warm-up"]
    assert list(found["models"]) == ["one layer", *deep]
    for name, row in found["models"].items():
        assert -64 * torch.tensor(2.0).log() < row["elbo"] < row["log_p"] < 0, name
        assert row["rate_z1"] + row.get("rate_z2", 0) > 0, name
    for name in deep:
        assert found["models"][name]["rate_z2"] > -0.05, "a KL, by 50 draws for each image"
    assert found["best_of_two_layers"] in deep
    assert_pictures(folder, {"samples_by_layer"})
    with xr.open_datatree(folder / "two_layers.nc") as tree:
        assert tree["posterior"]["z1"].dims == ("chain", "draw", "obs", "code")
        assert (tree["posterior"]["z2"].sizes["top"], tree["posterior"]["label"].dims) == (2, ("obs",))


IAF = ("--train-images", "300", "--test-images", "30", "--annealed-images", "6", "--temperatures", "15")
IAF += ("--steps", "40", "--latent", "4", "--channels", "4", "--hidden", "16", "--width", "8")
IAF += ("--samples", "100", "--draws", "5")


def test_inverse_autoregressive_in_a_short_form(run):
    folder, found, _ = run("inverse_autoregressive.py", "--data", "digits", "--epochs", "2", *IAF)
    rows = found["guides"]
    assert list(rows) == ["diagonal", "low-rank", "full covariance", "autoregressive", "spline"]
    for name, row in rows.items():
        assert -64 * math.log(2) < row["elbo"] < row["log_p"] < 0, name
        assert row["annealed_gap"] == pytest.approx(row["approximation"] + row["amortization"], abs=1e-5)
        assert row["amortization"] > -0.05, "each image has its own q, which begins at that of the network"
        assert abs(row["annealing_adds"]) < 0.5, "two estimates of the same log p(x)"
        assert len(row["history"]["elbo"]) == len(row["history"]["seconds"]) == 2
    assert rows["diagonal"]["gain_elbo"] == rows["diagonal"]["gain_log_p"] == 0
    for name, headline in zip(("autoregressive", "full covariance"), found["headlines"], strict=True):
        assert (headline["value"], headline["baseline"]) == (rows[name]["elbo"], rows["diagonal"]["elbo"])
    train, test = pv.datasets.digits("train").x[:300], pv.datasets.digits("test").x
    torch.manual_seed(0)
    x, coin = pv.datasets.resample(test)[:30], pv.datasets.grey(train).mean(0).clamp(1e-3, 1 - 1e-3)
    by_hand = (x * coin.log() + (1 - x) * (1 - coin).log()).sum(1).mean().item()
    assert found["independent"] == pytest.approx(by_hand, rel=1e-5)
    assert_pictures(folder, {"time", "comparison", "parts"})
    assert_trees(folder, {"inverse_autoregressive"}, draws=5, rows=30)


def test_annealing_begins_at_the_moments_of_the_guide():
    pyro.set_rng_seed(0)
    vae = pv.VAE(
        pv.priors.StandardNormal(2),
        pv.guides.FullRankNormal(3, 2, pv.networks.linear()),
        pv.likelihoods.Normal(2, 3, pv.networks.linear()),
    )
    x = torch.randn(4, 3)
    guide = functions_of("inverse_autoregressive.py")["normal_of"](vae, x)
    found, q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"], vae.encode(x)
    # 500 draws: errors of 5 standard errors, that of a variance being its size times sqrt(2 / 500).
    assert ((found.mean - q.mean).abs() < 5 * q.stddev / 500**0.5).all()
    scale = q.stddev[:, :, None] * q.stddev[:, None]
    assert ((found.covariance_matrix - q.covariance_matrix).abs() < 5 * scale * (2 / 500) ** 0.5).all()


def test_two_layers_on_images_of_another_size(run, enlarged):
    options = ("--epochs", "1", "--warm-up", "1", "--test-images", "20", "--hidden", "8", "--samples", "10")
    folder, *_ = run("two_layers.py", "--data", "mnist", "--latent", "4", "3", *options, "--draws", "2")
    assert_pictures(folder, {"samples_by_layer"})


def test_a_product_of_normals_is_proportional_to_both():
    product = functions_of("two_layers.py")["product"]
    first, second = (torch.distributions.Normal(torch.tensor([m]), torch.tensor([s])) for m, s in ((1, 0.5), (-2, 2.0)))
    z = torch.linspace(-3, 3, 7)[:, None]
    log_ratio = product(first, second).log_prob(z) - (first.log_prob(z) + second.log_prob(z)).sum(-1)
    assert torch.allclose(log_ratio, log_ratio[0].expand_as(log_ratio), atol=1e-5)


def test_conditional_in_a_short_form(run):
    options = ("--epochs", "15", "--test-images", "40", "--hidden", "32", "--draws", "5")
    folder, found, _ = run("conditional.py", *options, "--given", "all")
    assert found["label"]["accuracy"] > 0.5, "chance is 0.1"
    # log p(x) = log sum p(y) p(x|y) is more than its term of the true label.
    assert found["label"]["log_p_by_sum"] < found["label"]["log_p_given_context"]
    for row in (found["label"], found["upper-half"]):
        assert row["elbo"] < row["log_p_given_context"] < 0
        assert row["log_p_without_context"] < row["log_p_given_context"], "a context says something"
    assert_pictures(folder, {"samples_by_label", "bayes_rule", "completions"})
    assert_trees(folder, {"given_label", "given_upper-half"}, draws=5, rows=40)
    with xr.open_datatree(folder / "given_label.nc") as tree:
        assert tree["posterior"]["label"].dims == ("obs",)


def test_the_sum_over_labels_is_the_evidence_of_the_mixture():
    example = functions_of("conditional.py")
    cvae = example["conditional_vae"](64, 10, hidden=8)
    x = pv.datasets.binarize(pv.datasets.digits("test").x[:5])
    labels = pv.priors.OneHotCategorical((1, 10))  # uniform, in model and guide

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", labels())[..., 0, :]
            z = pyro.sample("z", cvae.prior(y))
            pyro.sample("x", cvae.decode(z, y), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", labels())[..., 0, :]
            pyro.sample("z", cvae.encode(x, y))

    by_sum = example["evidence_by_label"](cvae, x).logsumexp(1) - torch.tensor(10.0).log()
    sampled = pv.log_evidence(model, guide, x, num_samples=5000)
    assert ((sampled.log_evidence - by_sum).abs() < 5 * sampled.standard_error + 1e-2).all()


def test_a_context_of_one_row_is_that_of_all_images():
    example = functions_of("conditional.py")
    cvae = example["conditional_vae"](64, 10, hidden=8)
    x, context = pv.datasets.binarize(pv.datasets.digits("test").x[:4]), torch.eye(10)[3:4]
    slow = pv.exact.log_evidence(cvae.model, x, context.expand(4, -1))
    assert torch.allclose(example["evidence_by_label"](cvae, x)[:, 3], slow, atol=2e-2)


def test_swap_in_a_short_form(run):
    folder, found, printed = run("swap.py", "--epochs", "2", "--test-images", "5", "--draws", "4", "--hidden", "8")
    names = [(row["prior"], row["guide"]) for row in found["pairs"]]
    assert len(set(names)) >= 8
    assert sum(prior.startswith("  twin of ") for prior, _ in names) == 2
    assert len(found["refused"]) == 36 - sum("seconds" in row for row in found["pairs"])
    for row in found["pairs"]:
        assert row["gap"] == pytest.approx(row["log_p"] - row["elbo"], abs=1e-4)
        assert row["gap"] > (-1e-2 if row["exact"] else -0.3), row
        assert row["exact"] or row["prior"].startswith(("Relaxed", "Gumbel"))
    assert_pictures(folder, {"swap"})
    assert "29 pairs do not fit" in printed
    assert max(map(len, (folder / "table.txt").read_text().splitlines())) <= 110, "one screen"


def test_a_table_shows_the_numbers_that_a_row_has():
    table = functions_of("common.py")["table"]
    rows = {"short": {"a": 1.0}, "a longer name": {"a": 20.25, "b": 3}}
    expected = ["corner             A  plus", "short           1.00", "a longer name  20.25    +3", "a note"]
    assert table("corner", rows, {"A": "{a:.2f}", "plus": "{b:+d}"}, "a note").splitlines() == expected


FEW = ("--epochs", "1", "--test-images", "20", "--draws", "5")
SCENES = ("--scenes", "96", "--epochs", "2", "--test-images", "12", "--draws", "3", "--samples", "5", "--hidden", "16")
SCENES += ("--refine", "20")
COUNTED = (*DIGIT_SCENES, "--refine", "20", "--scenes", "500", "--epochs", "5", "--samples", "10", "--what", "6")
COLOURS = ("--epochs", "1", "--images", "64", "--channels", "8", "--latent", "2", "--test-images", "20", "--draws", "3")
FACTORS = ("--epochs", "1", "--images", "150", "--test-images", "200", "--latent", "4", "--draws", "3")
CAPTURED = [
    ("digits.py", FEW), ("mnist.py", ("--data", "digits", *SHORT, "--hidden", "16")),
    ("mnist.py", ("--data", "digits", *SHORT, "--prior", "relaxed-bernoulli", "--guide", "relaxed-bernoulli")),
    ("mnist.py", ("--data", "digits", *SHORT, "--likelihood", "continuous-bernoulli", "--binarization", "none")),
    ("categorical.py", (*FEW, "--hidden", "16")),
    ("categorical.py", (*FEW, "--hidden", "16", "--variables", "6", "--classes", "10")),
    ("gaussian_mixture_vae.py", (*FEW, "--hidden", "16")), ("semi_supervised.py", (*FEW, "--hidden", "16")),
    ("explosion.py", ("--epochs", "1", "--largest", "4", "--samples", "20", "--test-images", "20")),
    ("explosion_gradients.py", ("--epochs", "1", "--largest", "2")),
    ("discrete_mnist.py", (*SMALL, "--latent", "categorical", "--estimator", "all")),
    ("discrete_mnist.py", (*SMALL, "--latent", "bernoulli", "--estimator", "all")),
    ("imputation.py", ("--epochs", "5", "--draws", "5", "--latent", "3", "--hidden", "16")),
    ("published.py", (*SMALL, "--latent", "3", "--pseudo-data", "5", "--method", "all")), ("single_cells.py", CELLS),
    ("two_layers.py", ("--epochs", "1", "--warm-up", "1", "--test-images", "30", "--hidden", "16", "--samples", "20")),
    ("inverse_autoregressive.py", ("--data", "digits", "--epochs", "1", *IAF)),
    ("conditional.py", (*FEW, "--hidden", "16", "--given", "all")), ("swap.py", (*FEW, "--hidden", "8")),
    ("world_model.py", WORLD), ("dream_control.py", (*WORLD_TRAINING, "--horizon", "4", "--practice", "1", *ACTING)),
    ("inspect_posterior.py", ("--epochs", "1", "--data", "digits", "--test-images", "40", "--draws", "5")),
    ("modalities.py", ("--epochs", "2", *SEVERAL)), ("anomalies.py", ("--epochs", "2", *ODD)),
    ("music.py", MUSIC), ("sentences.py", SENTENCES),
    # Rounding errors of the training grow in the large steps of the refinement: few steps of both.
    ("scenes.py", (*SCENES, "--refine", "5")), ("attend_infer_repeat.py", (*COUNTED, "--epochs", "1", "--refine", "5")),
    ("colour_images.py", COLOURS),
    ("disentangling.py", FACTORS),
]  # fmt: skip
QUICK = ("digits.py", "semi_supervised.py")


def histories_of(run, monkeypatch, name, options):
    found, fit = [], pv.fit

    def watched(*args, **kwargs):
        found.append(fit(*args, **kwargs))
        return found[-1]

    pyro.clear_param_store()
    with monkeypatch.context() as context:
        context.setattr(pv, "fit", watched)
        run(name, *options)
    return [fitted.history for fitted in found]


@pytest.mark.parametrize(("name", "options"), [
    pytest.param(*case, marks=[] if case[0] in QUICK else pytest.mark.slow) for case in CAPTURED
], ids=lambda value: value if isinstance(value, str) else value[-1])  # fmt: skip
def test_captured_an_example_learns_the_same(run, monkeypatch, name, options):
    graphs = []
    monkeypatch.setattr(Graph, "compile", lambda self, *_: graphs.append(self))
    eager = histories_of(run, monkeypatch, name, options)
    assert not graphs
    captured = histories_of(run, monkeypatch, name, (*options, "--compile"))
    assert len(graphs) >= len(captured) == len(eager) > 0
    for ours, theirs in zip(captured, eager, strict=True):
        assert ours.keys() == theirs.keys()
        for term, values in theirs.items():
            assert ours[term] == pytest.approx(values, rel=1e-4, abs=1e-4), term


def test_a_script_has_the_same_results_on_several_ranks(run, tmp_path):
    options = ("--epochs", "20", "--draws", "20")
    _, alone, printed = run("several_ranks.py", *options)
    assert "1 rank(s), 300 steps" in printed
    script = str(EXAMPLES / "several_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*torchrun, "--nproc-per-node=2", script, "--out", str(tmp_path / "two"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 rank(s), 300 steps") == 1, "one rank prints"
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (two["ranks"], two["steps"]) == (2, alone["steps"])
    # Other random numbers of the same training: ELBOs differ by what seeds differ by, about 0.2 nats.
    assert two["elbo"] == pytest.approx(alone["elbo"], abs=1.0)
    assert two["log_p"] > two["elbo"]


def test_every_example_is_run_in_this_file_and_captured_if_it_takes_the_option():
    source = Path(__file__).read_text()
    assert len(SCRIPTS) >= 5
    assert [path.name for path in SCRIPTS if not re.search(rf'run\(\s*"{path.name}"', source)] == []
    assert {name for name, _ in CAPTURED} == {path.name for path in SCRIPTS if "add_training(" in path.read_text()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_fits_a_few_screens_and_has_help(script, tmp_path, monkeypatch, capsys):
    assert len(script.read_text().splitlines()) <= 220
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert {"--out", "--seed", "--epochs"} <= set(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_world_model_in_a_short_form(run):
    folder, found, printed = run("world_model.py", *WORLD)
    rows = found["methods"]
    assert list(rows) == ["world model", "linear autoregression", "last image", "mean image", "the truth"]
    # No prediction is likelier than the image that the camera draws from, and all of them cost pixels.
    assert all(
        row["log_p"] < rows["the truth"]["log_p"]
        for name, row in rows.items()
        if "log_p" in row and name != "the truth"
    )
    for name, steps in found["steps"].items():
        assert len(steps["pixel"]) == len(steps["angle"]) == 14, name
        assert all(0 < error < 1 for error in steps["pixel"])
        assert all(0 <= error <= 180 for error in steps["angle"])
        assert all(shares == sorted(shares) for shares in steps["coverage"]), "larger intervals hold more"
    # Images that do not change are worse the longer they stand; the mean image is as good at any time.
    still, mean = (found["steps"][name]["pixel"] for name in ("last image", "mean image"))
    assert still[0] < min(still[3:])
    assert max(mean) - min(mean) < 0.02
    for line, key in zip(found["headlines"], ("pixel", "angle"), strict=True):
        assert line["value"] == rows["world model"][key]
        assert line["baseline"] == min(row[key] for name, row in rows.items() if key in row and name != "world model")
    assert "no figure found" in printed
    assert_pictures(folder, {"dreams", "pixel_error", "angle_error", "calibration"})
    with xr.open_datatree(folder / "world_model.nc") as tree:
        assert tree["posterior"]["z_9"].shape == (1, 5, 5, 4)
        assert tree["observed_data"]["x"].shape == (5, 9, 1024)


def test_the_score_of_angles_is_the_error_of_one_draw_and_least_for_the_true_distribution():
    crps = functions_of("common.py")["angle_crps"]
    assert crps(torch.tensor([[3.1]]), torch.tensor([-3.1])) == pytest.approx(2 * math.pi - 6.2, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    truth = 3.0 + 0.3 * torch.randn(4000, generator=generator)
    scores = [
        crps(3.0 + scale * torch.randn(100, 4000, generator=generator), truth).mean() for scale in (0.1, 0.3, 0.9)
    ]
    # Of a normal far from the other side of the circle, the expected score is scale / sqrt(pi).
    assert scores[1] == pytest.approx(0.3 / math.sqrt(math.pi), rel=0.05)
    assert scores[1] < min(scores[0], scores[2])


def test_a_linear_forecast_knows_a_linear_world_and_its_noise():
    generator = torch.Generator().manual_seed(0)
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    state, actions, path = torch.randn(400, 2, generator=generator), torch.randn(400, 11, generator=generator), []
    for t in range(12):
        path.append(state)
        if t < 11:
            state = state @ turn + 0.3 * actions[:, t, None]
    images = 0.5 + 0.05 * torch.stack(path, 1) @ torch.randn(2, 30, generator=generator)
    predict = functions_of("common.py")["linear_forecast"](images[:300], actions[:300], components=2, order=1)
    predictions = torch.stack([*predict(images[300:, :4], actions[300:, :3], actions[300:, 3:], 50)], 2)
    assert predictions.shape == (50, 100, 8, 30)
    assert (predictions.mean(0) - images[300:, 4:].clamp(0, 1)).abs().max() < 0.01
    noisy = images + 0.02 * torch.randn(400, 12, 1, generator=generator)  # the same error in all pixels
    predict = functions_of("common.py")["linear_forecast"](noisy[:300], actions[:300], components=3, order=1)
    (first, *_) = predict(noisy[300:, :4], actions[300:, :3], actions[300:, 3:], 2000)
    inside = (noisy[300:, 4] - first.mean(0)).abs() < 1.645 * first.std(0)
    assert inside.double().mean() == pytest.approx(0.9, abs=0.08)  # 100 errors: 0.03 is one standard error


def test_dream_control_in_a_short_form(run):
    options = ("--horizon", "4", "--practice", "1", *ACTING)
    folder, found, printed = run("dream_control.py", *WORLD_TRAINING, *options)
    rows = found["controllers"]
    assert list(rows) == ["trained in dreams", "classical, knows equations", "random torques", "no torque"]
    assert all(-1 <= row["height"] <= 1 and 0 <= row["stands"] <= 100 for row in rows.values())
    # Without a torque the rod hangs. The one that knows the equations is up after four seconds.
    assert rows["no torque"]["height"] < -0.95
    assert rows["classical, knows equations"]["stands"] > 50
    assert rows["random torques"]["height"] > rows["no torque"]["height"]
    assert -1.2 < found["dreamed_height"] < 1.2
    height, share = found["headlines"]
    assert (height["value"], height["baseline"]) == (
        rows["trained in dreams"]["height"],
        rows["random torques"]["height"],
    )
    low, high = (rows[name]["height"] for name in ("random torques", "classical, knows equations"))
    assert height["value"] == pytest.approx(low + share["value"] / 100 * (high - low))
    assert f"mean height of the rod (1 standing, -1 hanging): {height['value']:.4g}" in printed
    assert_pictures(folder, {"swing_up", "heights"})
    assert {path.name for path in folder.glob("*.nc")} == {"dream_control.nc"}


def test_the_dreams_of_a_controller_are_the_expected_return_and_train_nothing_else():
    example = functions_of("dream_control.py")
    pyro.set_rng_seed(0)
    world = sys.modules["world_model"].WorldModel(torch.full((64,), 0.1), 3, 8)
    controller = example["Controller"](world, example["Reward"](3, 8), 3, 8, horizon=5)
    before = {name: value.clone() for name, value in world.state_dict().items()}
    start = torch.randn(200, 3)

    def returns(count):
        with torch.no_grad(), pyro.plate("draws", count, dim=-2), pyro.plate("data", 200):
            return controller.dream(start)

    first = returns(100).mean().item()
    fitted = pv.fit(controller.model, controller.guide, start, epochs=60, lr=1e-2)
    # The objective of the first step is the mean return, over 200 starts, of the controller as it was.
    assert fitted.history["surrogate"][0] == pytest.approx(first, abs=0.1)
    assert returns(100).mean() > first + 0.01
    assert all(torch.equal(value, before[name]) for name, value in world.state_dict().items())
    assert all(name.startswith("controller") for name in pyro.get_param_store())


@pytest.mark.parametrize(("command", "message"), [
    ("digits --epochs 0", "argument --epochs: must be a positive integer, got '0'"),
    ("digits --lr -1", "argument --lr: must be a positive number, got '-1'"),
    ("digits --out file/results", "cannot make the folder"),
    ("mnist --binarization none", "--binarization must be resample or threshold with --likelihood bernoulli, got none"),
    ("mnist --likelihood normal --binarization resample", "must be none with --likelihood normal, got resample"),
    ("discrete_mnist --estimator disarm vimco", "--estimator disarm requires --latent bernoulli, got categorical"),
    ("discrete_mnist --latent bernoulli --estimator disarm --particles 3", "must be even for disarm, .*, got 3"),
    ("discrete_mnist --estimator leave-one-out --particles 1", "--particles must be 2 or more for .*, got 1"),
    ("discrete_mnist --estimator vimco --particles 1", "--particles must be 2 or more for .*, got 1"),
    ("categorical --floor 2", "--floor must be at most --temperature, 1.0, got 2.0"),
    ("gaussian_mixture_vae --components 1", "--components must be 2 or more, got 1"),
    ("anomalies --test-images 30", "--test-images must be 60 or more, got 30"),
    ("semi_supervised --labels 15", "--labels must be a multiple of ten, got 15"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_before_any_work(run, tmp_path, monkeypatch, capsys, command, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    with pytest.raises(SystemExit):
        run(f"{name}.py", *options)
    assert re.search(message, capsys.readouterr().err)


def test_no_example_runs_when_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in EXAMPLES.glob("*.py"):
        functions_of(path.name)
    assert not list(tmp_path.iterdir())


def test_inspect_posterior_in_a_short_form(run):
    options = ("--data", "digits", "--epochs", "150", "--latent", "8", "--hidden", "128", "--draws", "10")
    folder, results, printed = run("inspect_posterior.py", *options, "--test-images", "100", "--batch-size", "100")
    found = results["guides"]
    assert found["as trained"]["faults"] == []
    assert any("too narrow" in fault for fault in found["variance times 0.5"]["faults"])
    assert "no fault found" in printed.split("VARIANCE TIMES 0.5")[0]
    assert "FAULT: " in printed.split("VARIANCE TIMES 0.5")[1]
    assert_pictures(folder, {"forest"})
    assert {page.name for page in folder.glob("*.html")} == {"as_trained.html", "variance_times_0.5.html"}
    for name in ("as_trained", "variance_times_0.5"):
        with xr.open_datatree(folder / f"{name}.nc") as tree:
            assert (tree["posterior"]["z"].sizes["draw"], tree["training"].sizes["epoch"]) == (10, 150)
            assert tree["constant_data"]["label"].sizes["obs"] == 20


def test_colour_images_in_a_short_form(run):
    folder, found, _ = run("colour_images.py", *COLOURS)
    names = ["PCA", "VAE, one level", "ladder, 3 levels"]
    for kind in ("photographs", "shapes"):
        rows = found[kind]["models"]
        assert list(rows) == names
        for name, row in rows.items():
            assert 0 < row["bits"] < 20, name
            assert row["bits"] < row.get("elbo", 20) + 0.02, f"the ELBO of {name} is below log p(x)"
        assert found[kind]["gain"]["bits"] == pytest.approx(rows[names[1]]["bits"] - rows[names[2]]["bits"], abs=1e-5)
        with xr.open_datatree(folder / f"{kind}.nc") as tree:
            sizes = [dict(tree["posterior"][f"z{i}"].sizes) for i in (1, 2, 3)]
            assert [tuple(each.values()) for each in sizes] == [(1, 3, 10, 2, size, size) for size in (8, 4, 2)]
            assert tree["posterior"]["z3"].dims[2:] == ("obs", "channel_3", "row_3", "column_3")
            assert float(tree["posterior_predictive"]["x"].max()) <= 255
    assert [each["baseline"] for each in found["headlines"]] == [
        found[kind]["models"]["PCA"]["bits"] for kind in ("photographs", "shapes")
    ]
    assert_pictures(folder, {f"{kind}{end}" for kind in ("photographs", "shapes") for end in ("", "_moved")})


def test_a_ladder_whose_guide_moves_nothing_has_no_rate():
    pyro.set_rng_seed(0)
    pair = functions_of("colour_images.py")["Ladder"]("ladder", levels=3, channels=4, latent=2)
    x = torch.randint(256, (5, 3, 32, 32)).float()
    assert pv.evaluate(pair.model, pair.guide, x, num_samples=1, seed=0)["rate"] != 0
    for parameter in pair.guides.parameters():
        torch.nn.init.zeros_(parameter)
    assert pv.evaluate(pair.model, pair.guide, x, num_samples=1, seed=0)["rate"] == pytest.approx(0, abs=1e-4)


def test_the_scales_of_a_ladder_are_bounded_however_far_an_image_is_from_all_others():
    pyro.set_rng_seed(0)
    pair = functions_of("colour_images.py")["Ladder"]("ladder", levels=3, channels=4, latent=2)
    with torch.no_grad():
        for parameter in (*pair.priors.parameters(), *pair.guides.parameters()):
            parameter.mul_(1e3)
    trace = pyro.poutine.trace(pair.guide).get_trace(1e6 * torch.randn(5, 3, 32, 32))
    scales = torch.cat([trace.nodes[name]["fn"].stddev.flatten() for name in ("z1", "z2", "z3")]).log()
    assert -6.001 < scales.min() < -5 < 5 < scales.max() < 6.001


def test_the_baseline_of_colour_images_is_its_density():
    functions, size = functions_of("colour_images.py"), (3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator)
    images = (128 + 8 * torch.randn(209, 48, generator=generator) @ mix).round().reshape(-1, *size)
    train, x = images[:200], images[200:]
    torch.manual_seed(0)
    found = functions["principal_components"](train, x, seed=0)
    torch.manual_seed(0)
    noisy, noisy_x = ((each + torch.rand_like(each) - 0.5).flatten(1).double() for each in (train, x))
    values, vectors = torch.linalg.eigh(noisy.T.cov())
    values = torch.where(torch.arange(48) < 32, values[:32].mean(), values)
    gaussian = torch.distributions.MultivariateNormal(noisy.mean(0), vectors @ values.diag() @ vectors.T)
    torch.testing.assert_close(found, gaussian.log_prob(noisy_x), rtol=1e-2, atol=0)


def test_disentangling_in_a_short_form(run):
    folder, found, _ = run("disentangling.py", *FACTORS)
    rows = found["models"]
    assert list(rows) == ["PCA", "ELBO", "β-VAE, β = 30", "independent, β = 20", "free bits, 2 nats"]
    for name, row in rows.items():
        assert all(0 <= row[key] <= 1 for key in ("mig", "disentanglement", "completeness", "informativeness")), name
        assert row["informativeness"] == pytest.approx(sum(row["accuracy"].values()) / 7)
        assert row.get("rate", 0) >= 0
    assert found["headlines"][0]["baseline"] == rows["PCA"]["mig"]
    assert found["headlines"][0]["value"] == rows["β-VAE, β = 30"]["mig"]
    assert_pictures(folder, {"information", "traversals"})
    assert_trees(folder, {"disentangling"}, draws=3, rows=20)


def test_the_true_factors_are_disentangled():
    data = pv.datasets.shapes(1000)
    codes = torch.stack(list(data.factors.values()), 1)
    row, _ = functions_of("disentangling.py")["measured"](codes, data, 0)
    assert row["mig"] > 0.95
    assert row["disentanglement"] == pytest.approx(1, abs=1e-6)
    assert row["informativeness"] == 1


def test_modalities_in_a_short_form(run):
    folder, found, printed = run("modalities.py", "--epochs", "5", *SEVERAL)
    product, mixture, alone, regressions, means = found["models"].values()
    for row in (product, mixture):
        # All is less probable than the image: a label is a mass, below 1, and the noise of a table is wide.
        assert row["log_p"] < row["log_p_image"] < 0
        assert all(0 <= row[name] <= 100 for name in ("image", "table", "image and table", "coherence"))
    assert alone["log_p"] < alone["log_p_image"] - torch.tensor(9.0).log(), "a label costs about log 10"
    assert regressions["image"] > 70, "labels of digits are nearly linear in their pixels"
    assert 0.2 < regressions["rmse"] < 1, "better than the mean, and not better than the noise of the measurements"
    assert means["coherence"] > 70, "means of digits with pixel noise still look like them"
    assert [headline["higher_is_better"] for headline in found["headlines"]] == [True, False]
    assert "trade-off" in printed
    assert_pictures(folder, {"images_from_labels"})
    with xr.open_datatree(folder / "modalities.nc") as tree:
        assert tree["posterior"]["z"].sizes["obs"] == 50
        assert tree["posterior_predictive"]["table"].dims == ("chain", "draw", "obs", "measurement")
        missing = tree["observed_data"].to_dataset().isnull()
        hidden = [missing[name].any(missing[name].dims[1:]) for name in ("image", "label", "table")]
        assert not (hidden[0] & hidden[1] & hidden[2]).any(), "one modality of each row is kept"
        assert all(one.any() for one in hidden)


def test_a_modality_that_is_missing_leaves_log_p_of_the_others():
    example = functions_of("modalities.py")
    torch.manual_seed(0)
    pair = example["Modalities"]("three", pv.guides.ProductOfExperts, 6, 2, 4)
    rows = (torch.rand(3, 6).round(), torch.tensor([[0.0], [3.0], [9.0]]), torch.randn(3, 4).abs().round().clamp(max=2))
    z = torch.cartesian_prod(*[torch.linspace(-6, 6, 121)] * 2)
    terms = {"image": pair.image, "label": pair.label, "table": pair.table}
    with torch.no_grad():
        log_volume, prior = 2 * torch.tensor(0.1).log(), pair.prior().log_prob(z)
        each = [part(z[:, None]).log_prob(x) for part, x in zip(terms.values(), rows, strict=True)]
    for seen in ((0,), (1,), (0, 2), (0, 1, 2)):
        exact = pv.exact.log_evidence(pair.model, *example["only"](seen, rows))
        by_hand = (prior[:, None] + sum(each[m] for m in seen)).logsumexp(0) + log_volume
        torch.testing.assert_close(exact, by_hand, atol=1e-3, rtol=1e-4)


def test_anomalies_in_a_short_form(run):
    folder, found, printed = run("anomalies.py", "--epochs", "10", *ODD)
    scores = found["scores"]
    for row in scores.values():
        areas = [row[kind] for kind in row["standard_errors"]]
        assert len(areas) == 6
        assert all(0 <= area <= 1 for area in areas)
        assert row["mean"] == pytest.approx(sum(areas) / 6)
    assert all(row["black"] > 0.9 for row in scores.values()), "a black image is an anomaly for every score"
    # Shuffling moves ink to where no digit has any.
    assert min(scores[name]["shuffled pixels"] for name in ("-log p(x)", "reconstruction error", "PCA error")) > 0.9
    assert "AUROC, with standard errors" in printed
    assert_pictures(folder, {"kinds", "ink", "auroc"})
    assert_trees(folder, {"anomalies"}, draws=5, rows=56)


def test_anomalies_are_made_of_the_pixels_of_digits():
    images = (torch.rand(30, 64) < 0.3).float()
    kinds = functions_of("anomalies.py")["make_anomalies"](images, (8, 8))
    for kind in ("mirrored", "turned by 90°", "shuffled pixels"):
        assert torch.equal(kinds[kind].sum(1), images.sum(1)), kind
    grid = images.reshape(-1, 8, 8)
    assert torch.equal(kinds["mirrored"].reshape(-1, 8, 8)[:, 2, 1], grid[:, 2, 6])
    assert torch.equal(kinds["turned by 90°"].reshape(-1, 8, 8)[:, 7, 2], grid[:, 2, 0])
    assert kinds["white"].max() == 0 < kinds["black"].min() == 1


def test_scenes_in_a_short_form(run):
    folder, found, printed = run("scenes.py", *SCENES)
    rows = found["methods"]
    baselines = ["k-means off the background", "connected regions"]
    assert list(rows) == ["model, one pass", "model", "model, masks alone", *baselines]
    for name, row in rows.items():
        assert all(-1 <= value <= 1 for value in row["scenes"]), name
        assert row["rand"] == pytest.approx(sum(row["scenes"]) / 12, abs=1e-6)
    assert rows["model, one pass"]["elbo"] < rows["model"]["elbo"] < rows["model"]["log_p"]
    assert rows["model"]["rand_all"] > 0.6, "the background is right from the first step on"
    headline = found["headlines"][0]
    best = max(baselines, key=lambda name: rows[name]["rand"])
    assert (headline["value"], headline["baseline"]) == (rows["model"]["rand"], rows[best]["rand"])
    assert "MONet" in printed
    assert_pictures(folder, {"scenes"})
    with xr.open_datatree(folder / "scenes.nc") as tree:
        assert tree["posterior"]["where_3"].dims == ("chain", "draw", "obs", "where")
        assert tree["posterior_predictive"]["x"].shape == (1, 3, 12, 3, 576)


def test_refined_latents_start_where_one_pass_ends_and_explain_more():
    """Each scene has normals of its own, first at the means of the networks; the networks stay as they are."""
    example = functions_of("scenes.py")
    torch.manual_seed(0)
    slots = example["Slots"](24, 2, hidden=3, latent=3)
    before = copy.deepcopy(slots.state_dict())
    x = pv.datasets.shape_scenes(4, seed=0).x
    sys.path.insert(0, str(EXAMPLES))
    import common

    slots.eval().requires_grad_(False)

    def log_p_at_means(pair):
        return common.at_means(pair, x, site="x").log_prob(x.unflatten(1, (3, -1)))

    first = log_p_at_means(slots)
    for steps, check in ((1, lambda found: (found - first).abs().max() < 0.2 * first.abs().max()),
                         (100, lambda found: (found > first).all())):  # fmt: skip
        pyro.clear_param_store()
        assert check(log_p_at_means(common.refine(slots, x, settings(steps)))), steps
    for name, value in slots.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_slots_explain_what_is_left():
    """An object goes to its box, and nothing else changes; the next slot starts where the scope is not explained."""
    example = functions_of("scenes.py")
    torch.manual_seed(0)
    slots = example["Slots"](24, 2, hidden=3, latent=3)
    where = torch.tensor([[0.0, -0.5, 0.5]])
    side, row, column = slots.boxes(where)[0].tolist()
    normal = torch.distributions.Normal(0.0, 1.0)
    assert side == pytest.approx(24 * 0.4)
    assert row == pytest.approx(24 * normal.cdf(torch.tensor(-0.5)).item())
    assert column == pytest.approx(24 * normal.cdf(torch.tensor(0.5)).item())
    logits, _ = slots.draw(where, torch.randn(1, 3), 1)
    pixels = torch.arange(24) + 0.5
    reach = side / 2 + side / 10 / 2  # bilinear interpolation reaches half a pixel of the picture further
    outside = ((pixels - row).abs() > reach)[:, None] | ((pixels - column).abs() > reach)
    empty = example["EMPTY"] - example["BEHIND"]
    torch.testing.assert_close(logits.reshape(24, 24)[outside], torch.full((int(outside.sum()),), empty))
    assert logits.max() > 0
    contrast = torch.zeros(1, 24, 24)
    contrast[0, 3:8, 3:8], contrast[0, 15:20, 10:15] = 1.0, 0.5
    found = slots.find(contrast.flatten(1))[0] * 24
    torch.testing.assert_close(found, torch.tensor([5.5, 5.5]), atol=0.3, rtol=0)
    contrast[0, 3:8, 3:8] = 0
    torch.testing.assert_close(slots.find(contrast.flatten(1))[0] * 24, torch.tensor([17.5, 12.5]), atol=0.3, rtol=0)


def test_rand_indices_are_one_for_the_true_objects_under_any_names():
    sys.path.insert(0, str(EXAMPLES))
    import common

    data = pv.datasets.shape_scenes(5, seed=0)
    renamed = torch.tensor([4, 2, 0, 1, 3])[data.masks]
    assert common.rand_indices(renamed, data.masks)["scenes"] == [1.0] * 5
    together = common.rand_indices((data.masks > 0).long(), data.masks)
    assert together["rand"] == 0  # all objects in one cluster
    assert 0 < together["rand_all"] < 1
