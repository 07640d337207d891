"""Sentences of a grammar: their probability is that of all their choices, and their words agree."""

import math
from collections import Counter

import pytest
import torch

from pyro_vae import datasets


def test_the_probability_of_a_sentence_is_how_often_it_is_written():
    data = datasets.sentences(10_000, seed=1)
    texts = data.to_text(data.x)
    known = dict(zip(texts, data.log_prob.exp().tolist(), strict=True))
    for text, log_prob in zip(texts, data.log_prob.exp().tolist(), strict=True):
        assert known[text] == log_prob, "a sentence has one probability"
    short = {text: probability for text, probability in known.items() if len(text.split()) == 3}
    assert len(short) > 280
    counts = Counter(texts)
    expected, found = 10_000 * sum(short.values()), sum(counts[text] for text in short)
    assert abs(found - expected) < 5 * math.sqrt(expected)


def test_short_sentences_have_the_probability_of_their_form_in_all():
    """Three words: no adjective, clause or place, so 1/8 of all; there are 3 topics, 4 nouns, 3 verbs, 2 tenses ..."""
    data = datasets.sentences(20_000)
    three = (data.x > 0).sum(1) == 4
    every = {text: float(p) for text, p in zip(data.to_text(data.x[three]), data.log_prob[three].exp(), strict=True)}
    number = 3 * 2 * 2 * 2 * 4 * 3  # topics, tenses, numbers, determiners, nouns, verbs
    assert len(every) == number
    assert sum(every.values()) == pytest.approx(1 / 8, rel=1e-4)


def test_words_are_those_of_a_topic_and_verbs_agree_across_a_clause():
    data = datasets.sentences(500, seed=2)
    nouns = {"farmer", "cow", "tractor", "field", "sailor", "boat", "island", "whale", "teacher", "pupil", "lesson"}
    nouns.add("book")
    for text, label in zip(data.to_text(data.x), data.labels.tolist(), strict=True):
        words, past = text.split(), data.kinds[label].endswith("past")
        if past:
            continue
        plural = next(word.endswith("s") for word in words if word.removesuffix("s") in nouns)
        main = words[: words.index("near")] if "near" in words else words
        assert main[-1].endswith("s") != plural, text
    kinds = {data.kinds[label] for label in data.labels.tolist()}
    assert kinds == set(data.kinds)


def test_sentences_end_and_are_filled_with_zeros():
    data = datasets.sentences(200)
    for row in data.x.tolist():
        end = row.index(1)
        assert all(word > 2 for word in row[:end])
        assert not any(row[end + 1 :])
    assert data.num_words == sum(len(text.split()) + 1 for text in data.to_text(data.x))
    assert torch.equal(data.x, datasets.sentences(200).x)
    assert "200 data of shape (14,)" in repr(data)


def test_translations_keep_the_meaning_and_agree_in_gender():
    pairs = datasets.sentence_pairs(300)
    genders = {}  # of nouns, as their articles show
    for source, target in zip(pairs.x.tolist(), pairs.y.tolist(), strict=True):
        words, others = [pairs.source[word] for word in source], [pairs.target[word] for word in target]
        assert sorted(words) == sorted(word.lower().partition("-")[0] for word in others)
        subject = others[1]
        for at, word in enumerate(others):
            if word.startswith(("THE-", "A-")):
                assert genders.setdefault(others[at + 1], word[-1]) == word[-1]
            if word.startswith(("SEES-", "FINDS-", "LOVES-", "LEAVES-")):
                assert word[-1] == others[0][-1] == genders[subject]
            if word.startswith(("OLD-", "RED-", "SMALL-", "COLD-")):
                assert word[-1] == genders[others[at - 1]], "adjectives follow their noun"
    assert len(genders) == 12
    assert set(genders.values()) == {"M", "F"}
    assert "23 words to 33" in repr(pairs)
    assert "300" in pairs._repr_html_()


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(3).long(), torch.full((1, 2), 99), "the cow", None])
def test_numbers_that_are_no_words_are_refused(x):
    with pytest.raises(ValueError, match="`x` must be numbers of words"):
        datasets.sentences(1).to_text(x)
