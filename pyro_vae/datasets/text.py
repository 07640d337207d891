"""Sentences of a small grammar, whose probability is known, and pairs of sentences in two languages."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.validation import describe, positive_int, seed_number
from pyro_vae.datasets.base import Dataset, on_default_device

__all__ = ["SentencePairs", "Sentences", "sentence_pairs", "sentences"]

_TOPICS = {  # nouns, verbs and adjectives
    "farm": (["farmer", "cow", "tractor", "field"], ["graze", "chase", "plough"], ["muddy", "green"]),
    "sea": (["sailor", "boat", "island", "whale"], ["drift", "paint", "follow"], ["deep", "windy"]),
    "school": (["teacher", "pupil", "lesson", "book"], ["start", "explain", "repeat"], ["clever", "boring"]),
}
_LONGEST = 14  # words, with the end


@dataclass(frozen=True, repr=False)
class Sentences(Dataset):
    """N sentences as numbers of words, with their topic and tense.

    Attributes:
        x: ``(N, T)``, the number of each word in ``vocabulary``, 1 at the end and 0 after it.
        labels: ``(N,)``, the number of the kind of a sentence in ``kinds``.
        log_prob: ``(N,)``, the log-probability of each sentence under the grammar, in nats.
        vocabulary: the words. The first three are signs: nothing, the end, and the start or a hidden word.
        kinds: topic and tense, such as ``"sea, past"``.
    """

    log_prob: Tensor
    vocabulary: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def num_words(self) -> int:
        """The number of words to predict, with the end of each sentence."""
        return int((self.x > 0).sum())

    def to_text(self, x: Tensor) -> list[str]:
        """Return sentences ``(N, T)`` as text, up to their end.

        >>> data = sentences(2)
        >>> data.to_text(data.x[:1])
        ['...']
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or x.is_floating_point() or x.is_complex():
            raise ValueError(f"`x` must be numbers of words (N, T), integers, got {describe(x)}")
        if ((x < 0) | (x >= len(self.vocabulary))).any():
            raise ValueError(f"`x` must be numbers of words below {len(self.vocabulary)}, got others")
        rows = [row[: row.index(1)] if 1 in row else row for row in x.tolist()]
        return [" ".join(self.vocabulary[word] for word in row if word) for row in rows]


def sentences(num_sentences: int, seed: int = 0) -> Sentences:
    """Write sentences about a farm, the sea or a school, in the present or the past.

    One of them is "the boats that this sailor paints drift near some islands". A sentence has a subject, in half of the
    cases a clause about it, a verb and, in half of the cases, a place. All words are those of its topic and all verbs
    have its tense; in the present, verbs agree with their subjects, across the clause. All choices are uniform, and a
    sentence can be made in one way only, so that its probability is known.

    Args:
        num_sentences: N.
        seed: of the draws. Another seed gives an independent test set.

    >>> data = sentences(100)
    >>> data.x.shape, data.kinds[:2], len(data.vocabulary), bool((data.log_prob < -7).all())
    (torch.Size([100, 14]), ('farm, present', 'farm, past'), 65, True)
    """
    positive_int(num_sentences, "num_sentences")
    rng, words = np.random.default_rng(seed_number(seed)), _vocabulary()
    number = {word: index for index, word in enumerate(words)}
    x = torch.zeros(num_sentences, _LONGEST, dtype=torch.long, device="cpu")
    writers = list[_Writer]()
    for row in range(num_sentences):
        writer = _Writer(rng)
        x[row, : len(writer.words) + 1] = torch.tensor([*(number[word] for word in writer.words), 1], device="cpu")
        writers.append(writer)
    names = tuple(f"{topic}, {tense}" for topic in _TOPICS for tense in ("present", "past"))
    dtype = torch.get_default_dtype()
    labels = torch.tensor([writer.kind for writer in writers], device="cpu")
    log_prob = torch.tensor([writer.log_prob for writer in writers], dtype=dtype, device="cpu")
    x, labels, log_prob = on_default_device(x, labels, log_prob)
    return Sentences(x, labels, log_prob, words, names)


class _Writer:
    """Writes a sentence, and keeps the log-probability of its choices."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.words, self.log_prob = rng, list[str](), 0.0
        topic, self.past = self._choose(list(_TOPICS)), self._choose([False, True])
        self.kind = 2 * list(_TOPICS).index(topic) + int(self.past)
        self.nouns, self.verbs, self.adjectives = _TOPICS[topic]
        subject = self._add_noun()
        if self._choose([False, True]):
            self.words.append("that")
            self._add_verb(self._add_noun())
        self._add_verb(subject)
        if self._choose([False, True]):
            self.words.append("near")
            self._add_noun()

    def _choose(self, options: list[Any]) -> Any:
        self.log_prob -= math.log(len(options))
        return options[int(self.rng.integers(len(options)))]

    def _add_noun(self) -> bool:
        """Add a noun with what stands before it; return whether it is in the plural."""
        plural = self._choose([False, True])
        self.words.append(self._choose(["the", "some"] if plural else ["the", "this"]))
        if self._choose([False, True]):
            self.words.append(self._choose(self.adjectives))
        self.words.append(self._choose(self.nouns) + "s" * plural)
        return bool(plural)

    def _add_verb(self, plural: bool) -> None:
        self.words.append(_inflected(self._choose(self.verbs), plural, self.past))


def _inflected(verb: str, plural: bool, past: bool) -> str:
    return verb + (("d" if verb[-1] == "e" else "ed") if past else "" if plural else "s")


def _vocabulary() -> tuple[str, ...]:
    """All words, in a fixed order, after the signs for nothing, the end, and a hidden word."""
    found = ["", "<end>", "<hidden>", "the", "some", "this", "that", "near"]
    for nouns, verbs, adjectives in _TOPICS.values():
        found += [noun + end for noun in nouns for end in ("", "s")] + adjectives
        found += [
            form
            for verb in verbs
            for form in (_inflected(verb, False, False), _inflected(verb, True, False), _inflected(verb, False, True))
        ]
    return tuple(found)


_NOUNS = {"boat": "m", "river": "f", "house": "f", "tree": "m", "bird": "m", "road": "f", "dog": "m", "song": "f",
          "king": "m", "lamp": "f", "stone": "f", "hill": "m"}  # fmt: skip
_ADJECTIVES, _VERBS, _ARTICLES = ["old", "red", "small", "cold"], ["sees", "finds", "loves", "leaves"], ["the", "a"]
_BENT = [f"{word}-{gender}".upper() for word in [*_ARTICLES, *_ADJECTIVES, *_VERBS] for gender in "mf"]


@dataclass(frozen=True, repr=False)
class SentencePairs(Result):
    """N sentences with their translations, as numbers of words; 0 after the end.

    Attributes:
        x: ``(N, 8)``, sentences, by their numbers in ``source``.
        y: ``(N, 8)``, translations, by their numbers in ``target``.
        source, target: the words of the two languages; the first is the end.
    """

    x: Tensor
    y: Tensor
    source: tuple[str, ...]
    target: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.x)

    def _line(self) -> str:
        return f"{count_of(len(self), 'pair')} of sentences, from {len(self.source)} words to {len(self.target)}"

    def _table(self) -> Table:
        rows = [("pairs", f"{len(self):,}"), ("words of x and y", f"{len(self.source)} and {len(self.target)}")]
        return Table(("property", "value"), rows)


def sentence_pairs(num_pairs: int, seed: int = 0) -> SentencePairs:
    """Write sentences such as "the old boat sees a river", and their translations into a language of our own.

    The translation has as many words. Adjectives follow their noun; articles and adjectives have the gender of their
    noun, and verbs that of the subject, which no word of the source shows: "THE-M BOAT OLD-M SEES-M A-F RIVER".

    Args:
        num_pairs: N.
        seed: of the draws. Another seed gives an independent test set.

    >>> pairs = sentence_pairs(100)
    >>> pairs, pairs.x.shape, pairs.source[:4], pairs.target[1:3]
    (SentencePairs(100 pairs of sentences, from 23 words to 33),
     torch.Size([100, 8]), ('<end>', 'the', 'a', 'old'), ('THE-M', 'THE-F'))
    """
    positive_int(num_pairs, "num_pairs")
    rng = np.random.default_rng(seed_number(seed))
    source = ("<end>", *_ARTICLES, *_ADJECTIVES, *_VERBS, *_NOUNS)
    target = ("<end>", *_BENT, *(noun.upper() for noun in _NOUNS))
    x, y = torch.zeros(2, num_pairs, 8, dtype=torch.long, device="cpu")
    for row in range(num_pairs):
        words, others = _write_pair(rng)
        x[row, : len(words)] = torch.tensor([source.index(word) for word in words], device="cpu")
        y[row, : len(others)] = torch.tensor([target.index(word.upper()) for word in others], device="cpu")
    x, y = on_default_device(x, y)
    return SentencePairs(x, y, source, target)


def _write_pair(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Write a sentence and its translation."""
    words, others = list[str](), list[str]()
    for place in range(2):  # subject and object, with the verb between them
        noun, gender = list(_NOUNS.items())[int(rng.integers(len(_NOUNS)))]
        article = _ARTICLES[int(rng.integers(2))]
        adjectives = [_ADJECTIVES[int(rng.integers(4))]] if rng.random() < 0.5 else []
        words += [article, *adjectives, noun]
        others += [f"{article}-{gender}", noun, *(f"{adjective}-{gender}" for adjective in adjectives)]
        if place == 0:
            verb = _VERBS[int(rng.integers(4))]
            words.append(verb)
            others.append(f"{verb}-{gender}")
    return words, others
