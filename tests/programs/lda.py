"""Latent Dirichlet allocation (Blei et al. 2003): nested plates, the topic of each word enumerated in the model."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO

from programs.by_hand import importance_sampling
from programs.program import Program

VOCABULARY, TOPICS, DOCUMENTS, WORDS = 6, 2, 8, 16


def model(words):
    with pyro.plate("topics", TOPICS):
        topic_words = pyro.sample(
            "topic_words", dist.Dirichlet(torch.tensor([[5.0] * 3 + [1.0] * 3, [1.0] * 3 + [5.0] * 3]))
        )
    with pyro.plate("documents", words.shape[1]):
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(TOPICS)))
        with pyro.plate("words", words.shape[0]):
            topic = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(topic_words[topic]), obs=words)


def guide(words):
    start = torch.tensor([[2.0] * 3 + [1.0] * 3, [1.0] * 3 + [2.0] * 3])
    concentration = pyro.param("topic_words_posterior", start, constraint=constraints.positive)
    with pyro.plate("topics", TOPICS):
        pyro.sample("topic_words", dist.Dirichlet(concentration))
    doc_topics = pyro.param("doc_topics_posterior", torch.ones(words.shape[1], TOPICS), constraint=constraints.positive)
    with pyro.plate("documents", words.shape[1]):
        pyro.sample("doc_topics", dist.Dirichlet(doc_topics))


def make():
    topics = torch.tensor([[0.3, 0.3, 0.25, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.25, 0.3, 0.3]])
    share = dist.Dirichlet(torch.ones(TOPICS)).sample((DOCUMENTS,))
    words = dist.Categorical(share @ topics).sample((WORDS,))
    program = Program(
        model,
        guide,
        (words,),
        elbo=TraceEnum_ELBO(max_plate_nesting=2),
        lr=0.05,
        how="importance sampling by hand",
        by_hand=lambda: importance_sampling(program, 1500),
    )
    return program
