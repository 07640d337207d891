"""
Translation with few pairs
==========================

Translations are rare, and sentences in one language are not. Here 5 % of the sentences y come with their source x, and
of the others only y is known. In a sequence autoencoder (Kočiský et al. 2016) the missing x is a latent sequence:

    x_t ~ Categorical(p_t),    y_t | x ~ Categorical(a network that reads all of x),    t = 1 ... 8

with a guide q(x_t | y) by a network that reads all of y; p_t counts the words of the pairs. The symbols of q are
relaxed (Gumbel-softmax), so that gradients reach q through the reconstruction of y. Both networks learn from the pairs
first, and then from all sentences: those without a pair teach how y is put together.

The languages are our own. In x, "the old boat sees a river". In y adjectives follow their noun, and articles,
adjectives and verbs have the gender of a noun, which no word of x shows. Judged is the share of held-out sentences that
are translated without a mistake. The baseline is a table: each word becomes the one that most often stands at its place
in the pairs. Kočiský et al. report that unpaired sentences help where pairs are few.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, objectives, plots, priors

SOURCE, TARGET, LENGTH = datasets.sentence_pairs(1).source, datasets.sentence_pairs(1).target, 8


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "translation", epochs=16)
    parser.add_argument("--batch-size", type=common.positive_int, default=100, help="rows in a mini-batch")
    parser.add_argument("--lr", type=common.positive_float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--sentences", type=common.positive_int, default=1000, help="sentences to train on")
    parser.add_argument("--pairs", type=common.positive_int, default=50, help="how many of them have their source")
    parser.add_argument("--repeat", type=common.positive_int, default=10, help="how often a pair is among the rows")
    parser.add_argument("--steps", type=common.positive_int, default=300, help="steps on the pairs alone, at first")
    parser.add_argument("--hidden", type=common.positive_int, default=48, help="units of each recurrent network")
    parser.add_argument("--test-sentences", type=common.positive_int, default=300, help="held-out pairs")
    parser.add_argument("--samples", type=common.positive_int, default=200, help="draws for log p(y) of a sentence")
    parser.add_argument("--draws", type=common.positive_int, default=50, help="draws in an ArviZ file")
    return parser.parse_args()


class Reader(nn.Module):
    """A network that reads a sentence in both directions, ``(*, T, words)``, and scores the words of another one."""

    def __init__(self, words: int, other_words: int, hidden: int):
        super().__init__()
        self.embedding = nn.Linear(words, hidden)
        self.network = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, other_words)

    def forward(self, sentence: Tensor) -> Tensor:
        return self.output(self.network(self.embedding(sentence))[0])


def one_hot(sentence: Tensor, words: Sequence[str]) -> Tensor:
    """Return symbols ``(*, words)`` of numbers of words."""
    return nn.functional.one_hot(sentence, len(words)).float()


class Translator(nn.Module):
    """p(x) p(y | x) and q(x | y), where x is observed in pairs, and else a latent sequence."""

    def __init__(self, name: str, hidden: int, probs: Tensor):
        super().__init__()
        self.name, shape = name, (LENGTH, len(SOURCE))
        self.translate = Reader(len(SOURCE), len(TARGET), hidden)
        self.translate_back = Reader(len(TARGET), len(SOURCE), hidden)
        self.soft_prior = priors.GumbelSoftmax(shape, temperature=0.5, probs=probs)
        self.soft_family = families.RelaxedOneHotCategorical(shape, 0.7)
        self.prior, self.family = priors.OneHotCategorical(shape, probs), families.OneHotCategorical(shape)

    def model(self, x: Tensor, y: Tensor, paired: Tensor, relaxed: bool = False) -> None:
        """p(x) p(y | x); the training with relaxed symbols also scores q(x | y) in pairs."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x, y, paired = subsampled(x, y, paired)
            symbols = self.sample_source(self.soft_prior() if relaxed else self.prior(), x, paired, relaxed)
            pyro.sample("y", dist.Categorical(logits=self.translate(symbols)).to_event(1), obs=y)
            if relaxed:
                back = dist.Categorical(logits=self.translate_back(one_hot(y, TARGET))).to_event(1)
                pyro.sample("source", back.mask(paired), obs=x)

    def guide(self, x: Tensor, y: Tensor, paired: Tensor, relaxed: bool = False) -> None:
        """q(x | y) of the sentences without a pair."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x, y, paired = subsampled(x, y, paired)
            scores = self.translate_back(one_hot(y, TARGET)).flatten(-2)
            self.sample_source((self.soft_family if relaxed else self.family)(scores), x, paired, relaxed)

    def sample_source(self, fn: dist.TorchDistribution, x: Tensor, paired: Any, relaxed: bool) -> Tensor:
        """Return the source as one-hot symbols, or a drawn one where it is not known."""
        with poutine.mask(mask=~paired):
            drawn = pyro.sample("x", fn)
        return torch.where(paired[:, None, None], one_hot(x, SOURCE), drawn.exp() if relaxed else drawn)

    def fit(self, *data: Tensor, **options: Any) -> pv.Fitted:
        """Train with relaxed symbols, and the KL of the discrete ones."""
        model, guide = partial(self.model, relaxed=True), partial(self.guide, relaxed=True)
        return pv.fit(model, guide, data, elbo=objectives.DiscreteKL(), **options)

    @torch.no_grad()
    def translated(self, x: Tensor) -> Tensor:
        """Return the most probable translation."""
        return self.translate(one_hot(x, SOURCE)).argmax(-1)


def subsampled(x: Tensor, y: Tensor, paired: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of a mini-batch."""
    return pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=1), pyro.subsample(paired, event_dim=0)


def by_table(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Translate each word by the one that most often stands at its place in the pairs."""
    return torch.einsum("ntv,ntw->vw", one_hot(x, SOURCE), one_hot(y, TARGET)).argmax(1)[new]


def draw_shares(rows: dict[str, dict[str, float]]) -> Figure:
    """Draw the share of sentences and of words that are right, two bars for each way."""
    _, ax = plt.subplots(figsize=(7.5, 1.4 + 0.8 * len(rows)), layout="constrained")
    kinds = ("exact", plots.colours.PALETTE[0], "whole sentences"), ("words", "0.75", "single words")
    for offset, (key, color, name) in zip((-0.2, 0.2), kinds, strict=True):
        places, values = [place + offset for place in range(len(rows))], [row[key] for row in rows.values()]
        ax.bar_label(ax.barh(places, values, 0.38, color=color, label=name), [f" {value:.0f} %" for value in values])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set(xlim=(0, 112), xlabel="held-out sentences and words translated without a mistake, %")
    plots.axes.legend_below(ax, grow=True)
    return common.set_title(ax, "Translation: what sentences without a pair add")


def draw_examples(lines: Sequence[tuple[str, Tensor, Tensor, Sequence[str]]]) -> Figure:
    """Draw sentences with their translations, the words that are not right between stars."""
    figure, ax = plt.subplots(figsize=(8.5, 0.6 + 0.25 * len(lines)), layout="constrained")
    for place, (name, sentence, right, words) in enumerate(lines):
        marked = [f"*{words[a]}*" if a != b else words[a] for a, b in zip(sentence, right, strict=True)]
        text = f"{name:14}" + " ".join(marked).replace(" <end>", "")
        ax.text(0.0, -place - place // 4, text, fontsize=9, va="center", family="monospace")
    title = "The first held-out sentences that the pairs alone get wrong (*wrong word*)"
    ax.set(ylim=(-1.25 * len(lines), 1), title=f"{title}\n-M, -F: masculine, feminine, the gender of a noun")
    ax.axis("off")
    return figure


COLUMNS = {"sentences": "{exact:.1f} %", "words": "{words:.1f} %", "log p(y)": "{log_p:.2f}", "steps": "{steps}"}
NOTES = """share of held-out sentences and words that are right; log p(y) of held-out y alone, in nats, with discrete
symbols of x, a lower bound by weighted draws"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Write sentences and translations; keep the source of a few.
    train = datasets.sentence_pairs(args.sentences, seed=2 * args.seed)
    new = datasets.sentence_pairs(args.test_sentences, seed=2 * args.seed + 1)
    x, y, new_x, new_y = train.x, train.y, new.x, new.y
    known = torch.ones(args.pairs, dtype=torch.bool)
    pairs = x[: args.pairs], y[: args.pairs], known
    counts = one_hot(pairs[0], SOURCE).sum(0) + 0.2
    # 2. Train on the pairs; go on with them alone, or with all sentences.
    alone, both = (Translator(name, args.hidden, counts / counts.sum(-1, keepdim=True)) for name in ("alone", "both"))
    options = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed")}
    first = alone.fit(*pairs, epochs=args.steps, lr=0.01, seed=args.seed)
    both.load_state_dict(alone.state_dict())
    rest = slice(args.pairs, None)
    more = x[rest] * 0, y[rest], torch.zeros(len(x) - args.pairs, dtype=torch.bool)  # their sources are not given
    everything = [torch.cat([*[pair] * args.repeat, other]) for pair, other in zip(pairs, more, strict=True)]
    fitted = both.fit(*everything, **options)
    longer = alone.fit(*pairs, epochs=fitted.steps, lr=args.lr, seed=args.seed)
    # 3. Compare on held-out sentences.
    found = {"table of words": by_table(*pairs[:2], new_x), "pairs alone": alone.translated(new_x)}
    found["all sentences"] = both.translated(new_x)
    rows: dict[str, dict[str, Any]] = {}
    for name, guess in found.items():
        right = (guess == new_y).double()
        rows[name] = {"exact": 100 * right.prod(1).mean().item(), "words": 100 * right[new_y > 0].mean().item()}
    nobody = torch.zeros(len(new_y), dtype=torch.bool)
    for name, pair, last in (("pairs alone", alone, longer), ("all sentences", both, fitted)):
        data = new_x, new_y, nobody
        evidence = pv.log_evidence(pair.model, pair.guide, *data, num_samples=args.samples, seed=args.seed)
        rows[name] |= {"log_p": evidence.log_evidence.mean().item(), "steps": first.steps + last.steps}
    print(text := common.table(f"{args.pairs} pairs of {len(x)}", rows, COLUMNS, NOTES))
    # 4. Draw pictures, and keep draws of the source for ArviZ.
    shown = (found["pairs alone"] != new_y).any(1).nonzero().flatten()[:4].tolist()
    lines = [line for row in shown for line in (
        ("source", new_x[row], new_x[row], SOURCE), ("right", new_y[row], new_y[row], TARGET),
        *((name, found[name][row], new_y[row], TARGET) for name in ("pairs alone", "all sentences")),
    )]  # fmt: skip
    figures = {"shares": draw_shares(rows), "examples": draw_examples(lines)}
    dims = {"x": ["place", "word"], "y": ["place"]}
    tree = common.make_tree(both, new_x[:20], args, new_y[:20], nobody[:20], dims=dims)
    published = "unpaired sentences help where 5 to 25 % are paired (Kočiský et al. 2016, on GeoQuery)"
    differences = "two languages of our own of some twenty words, networks without attention, and relaxed symbols"
    shared: dict[str, Any] = {"higher_is_better": True, "published": published, "differences": differences}
    headlines = [
        common.headline("sentences translated without a mistake", "%", rows["all sentences"]["exact"],
                        baseline=rows[name]["exact"], baseline_name=full, **shared)
        for name, full in (("table of words", "table of words"), ("pairs alone", "same networks on the pairs alone"))
    ]  # fmt: skip
    results = {"ways": rows, "histories": {"pairs": first.history, "all": fitted.history}}
    common.save(args, results, figures, {"translation": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
