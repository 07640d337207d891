"""
Sentences from a continuous space
=================================

A recurrent language model predicts each word from the words before. A sentence VAE (Bowman et al. 2016) also has one
code for the whole sentence:

    z ~ N(0, I),    x_t | x_1 ... x_{t-1}, z ~ Categorical(network)

with a guide q(z | x) that reads the sentence. So strong a decoder can do without z: then the rate KL(q || p) is zero,
and the VAE is a language model. Two remedies are compared: the weight of the KL rises from 0 to 1 in the first half of
the training, and some words that the decoder reads are hidden (word dropout), so that it needs the code.

The sentences come from a grammar of our own. Each has a topic and a tense, and verbs agree with subjects across a
clause: "the boats that this sailor paints drift". Its true perplexity is known. The baseline is a trigram model with
interpolated Kneser-Ney smoothing. Perplexity is exp(-log p(x) / words), from a lower bound on log p(x) by weighted
draws. Bowman et al. found that a VAE of sentences does not beat a language model without z in perplexity. Here two are
trained, with and without word dropout.
"""

import argparse
import math
from collections import Counter, defaultdict
from functools import partial
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, networks, plots, schedules
from pyro_vae.handlers import WeightKL

HIDDEN = 2  # the number of the word for the start, and for a hidden word


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "sentences", epochs=60)
    common.add_training(parser, batch_size=100, lr=5e-3)
    parser.add_argument("--sentences", type=common.positive_int, default=2000, help="sentences to train on")
    parser.add_argument("--test-sentences", type=common.positive_int, default=300, help="held-out sentences")
    parser.add_argument("--latent", type=common.positive_int, default=8, help="dimensions of z")
    parser.add_argument("--hidden", type=common.positive_int, default=64, help="units of the recurrent networks")
    parser.add_argument("--word-dropout", type=common.positive_float, default=0.4, help="share of hidden words")
    parser.add_argument("--samples", type=common.positive_int, default=200, help="draws for log p(x) of a sentence")
    parser.add_argument("--draws", type=common.positive_int, default=50, help="draws in an ArviZ file")
    return parser.parse_args()


class SentenceVAE(nn.Module):
    """A language model of words that also reads a code z; with latent 0 it is a language model alone."""

    def __init__(self, name: str, words: int, latent: int, hidden: int, word_dropout: float = 0.0):
        super().__init__()
        self.name, self.latent, self.word_dropout = name, latent, word_dropout
        self.embedding = nn.Embedding(words, hidden)
        self.decoder = nn.GRU(hidden + latent, hidden, batch_first=True)
        self.output = nn.Linear(hidden + latent, words)
        self.reader = nn.GRU(hidden, hidden, batch_first=True)
        self.encoder = guides.DiagonalNormal(hidden, max(1, latent), networks.linear())

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = torch.zeros(len(x), self.latent)
            if self.latent:
                z = pyro.sample("z", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=self.logits(x, z)).mask(x > 0).to_event(1), obs=x)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the scores of the words at each place, ``(N, T, words)``, from z and the words before."""
        before = torch.cat([torch.full_like(x[:, :1], HIDDEN), x[:, :-1]], 1)
        kept = nn.functional.dropout(torch.ones(x.shape), self.word_dropout, self.training) > 0
        code = z[:, None].expand(-1, x.shape[1], -1)
        state, _ = self.decoder(torch.cat([self.embedding(torch.where(kept, before, HIDDEN)), code], -1))
        return self.output(torch.cat([state, code], -1))

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            if self.latent:
                pyro.sample("z", self.encode(x))

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x), from the state of the reader at the end of the sentence."""
        states, _ = self.reader(self.embedding(x))
        end = ((x > 0).sum(1) - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        return self.encoder(states.gather(1, end)[:, 0])

    @torch.no_grad()
    def decode(self, z: Tensor, length: int) -> Tensor:
        """Return sentences of codes ``(N, D)``, ``(N, T)``, with the most probable word at each place."""
        x = torch.ones(len(z), length, dtype=torch.long)
        for place in range(length):
            x[:, place] = self.logits(x, z)[:, place].argmax(-1)
        return x


def trigrams(x: Tensor) -> list[list[tuple[int, int, int]]]:
    """Return the words of each sentence with the two before each of them, as numbers."""
    rows = [[HIDDEN, HIDDEN, *row[: row.index(1) + 1]] for row in x.tolist()]
    return [list(zip(row, row[1:], row[2:], strict=False)) for row in rows]


def trigram_log_prob(train: Tensor, test: Tensor, words: int, discount: float = 0.75) -> Tensor:
    """Return log p(x) of sentences under a trigram model with interpolated Kneser-Ney smoothing, ``(N,)``."""
    seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for a, b, word in (each for row in trigrams(train) for each in row):
        seen[a, b][word] += 1
    for length in (2, 1):  # a shorter context counts in how many longer ones a word was seen
        for context, counts in [each for each in seen.items() if len(each[0]) == length]:
            seen[context[1:]].update(counts.keys())

    def probability(word: int, *context: int) -> float:
        counts = seen.get(context, Counter())
        rest = probability(word, *context[1:]) if context else 1 / words
        kept = max(counts[word] - discount, 0) + discount * len(counts) * rest
        return kept / sum(counts.values()) if counts else rest

    return torch.tensor([sum(math.log(probability(c, a, b)) for a, b, c in row) for row in trigrams(test)])


def draw_perplexities(rows: dict[str, Any]) -> Figure:
    """Draw the perplexity of each row as a bar."""
    _, ax = plt.subplots(figsize=(7.5, 1.2 + 0.45 * len(rows)), layout="constrained")
    names, values = list(rows), [row["perplexity"] for row in rows.values()]
    bars = ax.barh(names, values, color=[("0.75" if "VAE" not in name else plots.colours.PALETTE[0]) for name in names])
    ax.bar_label(bars, [f" {value:.2f}" for value in values])
    ax.axvline(rows["the grammar itself"]["perplexity"], color="black", linestyle=":")
    ax.invert_yaxis()
    ax.set(xlabel="perplexity per held-out word (lower is better)", xlim=(0, 1.12 * max(values)))
    return common.set_title(ax, "Prediction of the next word\n(dotted line: the best that is possible)")


def draw_path(texts: list[str]) -> Figure:
    """Write sentences below each other."""
    _, ax = plt.subplots(figsize=(8.5, 0.7 + 0.36 * len(texts)), layout="constrained")
    for place, text in enumerate(texts):
        ax.text(0.01, -place, f"{place / (len(texts) - 1):.0%} of the way:    {text}", va="center")
    ax.set(ylim=(0.6 - len(texts), 0.6))
    ax.axis("off")
    return common.set_title(ax, "Sentences along a straight line between two codes z")


CODES = "Codes of held-out sentences, by topic and tense\n(which training never sees)"
COLUMNS = {"perplexity": "{perplexity:.2f}", "-log p(x)": "{nats:.2f}", "rate": "{rate:.2f}", "active": "{active}"}
COLUMNS |= {"seconds": "{seconds:.0f}"}
NOTES = """in nats per held-out sentence, perplexity per word; log p(x) of a VAE is a lower bound, by weighted draws
rate: KL(q(z|x) || p(z)); active: dimensions of z whose mean changes with the sentence"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Write sentences.
    train = datasets.sentences(args.sentences, seed=2 * args.seed)
    test = datasets.sentences(args.test_sentences, seed=2 * args.seed + 1)
    validation = datasets.sentences(args.test_sentences, seed=2 * args.seed + 1001)
    words, x = len(train.vocabulary), test.x
    make = partial(SentenceVAE, words=words, hidden=args.hidden)
    hidden_words: Any = {"word_dropout": args.word_dropout}
    pairs = {"language model, no z": make("language_model", latent=0), "VAE": make("plain_vae", latent=args.latent)}
    pairs["language model, no z, word dropout"] = make("gap_model", latent=0, **hidden_words)
    vae = make("sentence_vae", latent=args.latent, **hidden_words)
    # 2. Train language models without z, a VAE without remedies, and one with KL annealing and word dropout.
    options = common.training_options(args) | {"patience": max(10, args.epochs // 2)}
    fit: Any = partial(pv.fit, data=train.x, validation=validation.x, **options)
    fits = {name: (pair, fit(pair.model, pair.guide)) for name, pair in pairs.items()}
    beta = torch.tensor(0.0)
    weight, steps = WeightKL(beta), args.epochs * -(-len(train) // args.batch_size)
    annealed = {beta: schedules.linear(0.0, 1.0, steps=max(1, steps // 2))}
    remedied = "VAE, annealed, word dropout"
    fits[remedied] = (vae, fit(weight(vae.model), weight(vae.guide), schedules=annealed))
    # 3. Compare perplexities on held-out sentences, and how much the code says.
    log_p = {"trigram model": trigram_log_prob(train.x, x, words), "the grammar itself": test.log_prob}
    rows: dict[str, dict[str, Any]] = {"trigram model": {}}
    for name, (pair, fitted) in fits.items():
        pair.eval()
        rows[name] = {"seconds": fitted.seconds}
        if not pair.latent:
            log_p[name] = torch.full_like(test.log_prob, pv.evaluate(pair.model, pair.guide, x)["elbo"])
            continue
        log_p[name] = pv.log_evidence(pair.model, pair.guide, x, num_samples=args.samples, seed=args.seed).log_evidence
        found = pv.decompose(pair.model, pair.guide, x, seed=args.seed)
        rows[name] |= {"rate": found.rate.value, "active": int(found.units["z"].active.sum())}
    rows["the grammar itself"] = {}
    for name, row in rows.items():
        row |= {"nats": -float(log_p[name].mean()), "perplexity": math.exp(-float(log_p[name].sum()) / test.num_words)}
    print(text := common.table("", rows, COLUMNS, NOTES))
    # 4. Walk from one code to another, draw pictures, and keep draws of z for ArviZ.
    codes = vae.encode(x).mean.detach()
    first, last = (int((test.labels == label).nonzero()[0]) for label in (0, 3))
    path = torch.stack([codes[first].lerp(codes[last], share) for share in torch.linspace(0, 1, 6).tolist()])
    print("\n".join(texts := test.to_text(vae.decode(path, x.shape[1]))))
    kinds = [test.kinds[label] for label in test.labels]
    figures = {"perplexity": draw_perplexities(rows), "path": draw_path(texts)}
    figures["codes"] = common.set_title(plots.latent_map(codes, kinds, name="the mean of z"), CODES)
    headline = common.headline(
        f"perplexity of held-out sentences, {remedied}", "per word", rows[remedied]["perplexity"],
        baseline=rows["trigram model"]["perplexity"], baseline_name="trigram model (Kneser-Ney)",
        higher_is_better=False,
        published="a sentence VAE does not beat a language model (Bowman et al. 2016), nor here one with word dropout",
        differences="a grammar of 62 words whose true perplexity is known, not the Penn Treebank",
    )  # fmt: skip
    tree = common.make_tree(vae, x[:50], args)
    results = {"models": rows, "path": texts, "history": fits[remedied][1].history}
    common.save(args, results, figures, {"sentences": tree}, text, [headline])


if __name__ == "__main__":
    main(parse_args())
