"""Results show themselves in words and numbers: short, escaped, in well-formed tables, and never as tensors."""

import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bernoulli, gaussian, guide_of

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors
from pyro_vae._utils.display import Result, Table, spark_line
from pyro_vae.training.fit import Fitted

VOID = {"br", "polyline"}
FAST = {"num_samples": 20, "num_simulations": 20, "max_refined": 3, "progress": False}


class Parsed(HTMLParser):
    """The elements of a piece of HTML; an error if one is not closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.lines = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@cache
def inspected():
    vae = gaussian(2, 2)
    return pv.inspect(vae.model, vae.guide, torch.randn(30, 2), **FAST)


def two_latents(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(a[..., None] + b, 1.0).to_event(1), obs=x)


def two_latents_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(x.mean(-1) / 2, 0.7))
        pyro.sample("b", dist.Normal(x / 2, 0.7).to_event(1))


def several_sites():
    return pv.inspect(two_latents, two_latents_guide, torch.randn(20, 2), **FAST)


def skipped_parts():
    own_means = guide_of(lambda x: dist.Normal(pyro.param("mean", lambda: x[:, :2].clone()), 0.3).to_event(1))
    return pv.inspect(gaussian(2, 2).model, own_means, torch.randn(20, 2), **FAST)


def one_datum():
    vae = gaussian(2, 2)
    return pv.inspect(vae.model, vae.guide, torch.randn(1, 2), **FAST)


def in_float64():
    vae = gaussian(2, 2).double()
    return pv.inspect(vae.model, vae.guide, torch.randn(20, 2).double(), **FAST)


def fitted(**options):
    vae = gaussian(1, 2)
    x = torch.randn(20, 2)
    return pv.fit(vae.model, vae.guide, x, epochs=5, **options)


def surrogate():
    decoder = likelihoods.Bernoulli(1, 2, networks.linear(), soft_targets=True)
    vae = gaussian(1, 2, decoder=decoder)
    return pv.fit(vae.model, vae.guide, torch.rand(10, 2), epochs=2)


def posterior_of(vae, **options):
    return pv.exact.posterior(vae.model, torch.randn(4, 2), **options)


RESULTS = {
    "Fitted": fitted,
    "Fitted, validated": lambda: fitted(validation=torch.randn(5, 2), patience=1),
    "Fitted, a surrogate": surrogate,
    "Evidence": lambda: inspected().evidence,
    "Evidence of one draw": lambda: pv.Evidence(torch.zeros(3), torch.ones(3), torch.full((3,), math.nan), 1),
    "Decomposition": lambda: inspected().nats,
    "Units": lambda: inspected().nats.units["z"],
    "Units without a rate": lambda: replace(inspected().nats.units["z"], rate=None, information=None),
    "Estimate": lambda: inspected().nats.elbo,
    "InferenceGap": lambda: inspected().gap,
    "InferenceGap, estimated": lambda: replace(inspected().gap, is_exact=False, steps=0),
    "Calibration": lambda: inspected().calibration,
    "CalibrationErrors": lambda: inspected().calibration.errors,
    "Inspection": inspected,
    "Inspection of several sites": several_sites,
    "Inspection with skipped parts": skipped_parts,
    "Inspection of one datum": one_datum,
    "Inspection in float64": in_float64,
    "Posterior, discrete": lambda: posterior_of(bernoulli(2, 2)),
    "Posterior by quadrature": lambda: posterior_of(
        pv.VAE(priors.Laplace(1), guides.DiagonalNormal(2, 1, networks.linear()),
               likelihoods.Normal(1, 2, networks.linear()))),
    "Dataset": lambda: datasets.digits("test"),
    "Dataset of missing values": lambda: datasets.Dataset(torch.tensor([[math.nan], [1.0]]), torch.arange(2)),
    "Dataset without rows": lambda: datasets.Dataset(torch.zeros(0, 2), torch.zeros(0).long()),
    "TwoGaussians": lambda: datasets.two_gaussians(50),
    "VAE": lambda: gaussian(2, 3),
    "VAE of images": lambda: pv.VAE(priors.RelaxedBernoulli((2, 3), 0.5),
                                    guides.RelaxedBernoulli((1, 4, 4), (2, 3), networks.linear(), 0.5),
                                    likelihoods.Bernoulli((2, 3), (1, 4, 4), networks.linear())),
}  # fmt: skip


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS.keys())
def test_a_result_shows_itself_without_tensors(make):
    result = make()
    text = repr(result)
    assert text.startswith(f"{type(result).__name__}(")
    assert text.endswith(")")
    assert not re.search(r"tensor\(|array\(|<function|<bound|object at 0x", text)
    assert len(text.splitlines()) <= 7
    assert len(text) <= 400
    assert "nan" not in text.lower()
    if isinstance(result, tuple):
        return
    html = Parsed(result._repr_html_())
    assert type(result).__name__ in html.text
    assert len(html.text) < 4000
    tags = [tag for tag, _ in html.tags]
    assert tags.count("table") == 1
    assert "tensor(" not in html.text
    assert not {"script", "link", "img", "iframe"} & {*tags}
    assert not [name for _, attributes in html.tags for name in attributes if name in ("src", "href", "onclick")]
    cells = {tag: tags.count(tag) for tag in ("tr", "td", "th")}
    assert (cells["td"] + cells["th"]) % cells["tr"] == 0, "rows of different lengths"


def test_a_table_of_columns_shows_itself_in_the_same_way():
    table = pv.tables.Table.from_frame(datasets.penguins())
    html = Parsed(table._repr_html_())
    assert [tag for tag, _ in html.tags].count("tr") == 9
    assert "Table of 344 rows, 8 columns" in html.text
    assert "Adelie, Chinstrap, Gentoo" in html.text


def test_a_fit_names_its_bounds_in_nats():
    found = Fitted(None, None, {"elbo": [-9.0, 0.4712], "validation_elbo": [-8.0, 0.25]}, 0, 1000, 1.94)
    assert repr(found) == "Fitted(ELBO 0.471, validation 0.250 nats per datum after 2 epochs, 1,000 steps, 1.94 s)"
    found = replace(found, history={"surrogate": [-1.0]}, stopped="patience", skipped=1)
    assert "surrogate -1.000 nats per datum after 1 epoch" in repr(found)
    assert "1 step skipped" in repr(found)
    assert "ended by patience" in repr(found)


def test_the_best_epoch_is_named_where_it_is_not_the_last():
    found = Fitted(None, None, {"elbo": [-3.0, -2.0, -1.0], "validation_elbo": [-3.0, -2.5, -2.75]}, 0, 3, 1.0)
    assert "best validation was -2.500, in epoch 2" in found._repr_html_()
    assert "best validation" not in replace(found, history={"elbo": [-3.0]})._repr_html_()


def test_a_vae_counts_the_parameters_of_its_parts():
    vae = pv.VAE(priors.Normal(2), guides.DiagonalNormal(3, 2, networks.linear()),
                 likelihoods.Bernoulli(2, 3, networks.linear()))  # fmt: skip
    total = sum(parameter.numel() for parameter in vae.parameters())
    assert f"encoder: DiagonalNormal(3 → 2), {3 * 4 + 4} parameters" in repr(vae)
    assert f"{total} parameters in all, float32 on cpu" in repr(vae)
    assert "float64 on cpu" in repr(vae.double())


def test_parts_of_your_own_have_no_shape_but_a_name():
    class Prior(torch.nn.Module):
        def forward(self, context=None):
            return dist.Normal(torch.zeros(1), 1.0).to_event(1)

    vae = gaussian(1, 2)
    assert "prior: Prior(), 0 parameters" in repr(pv.VAE(Prior(), vae.encoder, vae.decoder))


@pytest.mark.parametrize(
    "odd",
    [
        Fitted(None, None, {}, 0, 0, 0.0),
        Fitted(None, None, None, None, None, None),
        datasets.Dataset("x", None),
        pv.Evidence(None, None, None, None),
        pv.VAE.__new__(pv.VAE),
        pv.Inspection.__new__(pv.Inspection),
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_an_odd_object_can_be_shown(odd):
    assert type(odd).__name__ in repr(odd)


class Named(Result):
    def __init__(self, table):
        self.table = table

    def _line(self):
        return self.table.note

    def _table(self):
        return self.table


def test_names_are_escaped_and_cut():
    evil = '<script>alert("x")</script>&'
    html = Named(Table((evil, "b"), [(evil, "x" * 10_000)], evil))._repr_html_()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;") == 3
    assert len(html) < 2000
    assert len(repr(Named(Table((), [], "word " * 1000)))) < 400


def test_a_long_table_keeps_its_last_row():
    rows = [(index, "value") for index in range(100)]
    html = Parsed(Named(Table(("", ""), rows))._repr_html_())
    assert "99" in html.text
    assert "The first 19 and the last of 100 rows." in html.text


def points_of(svg):
    return [[tuple(map(float, point.split(","))) for point in line.split()]
            for line in re.findall(r'points="([^"]*)"', svg)]  # fmt: skip


def test_a_spark_line_rises_with_the_history():
    (line,) = points_of(spark_line({"elbo": [float(value) for value in range(1000)]}))
    assert len(line) <= 121
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True), "the vertical axis points downwards"
    assert line[-1][1] == 2.0
    assert line[0][1] == 30.0


def test_a_spark_line_of_odd_histories():
    assert spark_line({"elbo": []}) == ""
    assert spark_line({"elbo": [math.nan, math.inf]}) == ""
    Parsed(spark_line({"elbo": [1.0]}))
    Parsed(spark_line({"a<b": [1.0, math.nan, 2.0], "c": [0.5] * 3}))
    (line,) = points_of(spark_line({"elbo": [-1e30, *range(20)]}))
    assert len({y for _, y in line}) > 10, "the jump of the first epoch does not flatten the rest"
