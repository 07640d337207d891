"""A sentence VAE (Bowman et al. 2016): a recurrent decoder that reads the words before each word, and one code."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from programs.by_hand import normal
from programs.program import Program

WORDS, LENGTH, HIDDEN = 5, 5, 8  # word 0 fills up the sentences


class SentenceVAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.decoder = nn.GRU(HIDDEN + 1, HIDDEN, batch_first=True)
        self.output = nn.Linear(HIDDEN + 1, WORDS)
        self.encoder = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.code = nn.Linear(HIDDEN, 2)

    def logits(self, sentences, z):
        before = nn.functional.pad(sentences[:, :-1], (1, 0))
        code = z[:, None, None].expand(-1, LENGTH, -1)
        state, _ = self.decoder(torch.cat([self.embedding(before), code], -1))
        return self.output(torch.cat([state, code], -1))

    def model(self, sentences):
        pyro.module("sentence_vae", self)
        with pyro.plate("sentences", len(sentences)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(sentences)), 1.0))
            words = dist.Categorical(logits=self.logits(sentences, z)).mask(sentences > 0)
            pyro.sample("words", words.to_event(1), obs=sentences)

    def guide(self, sentences):
        pyro.module("sentence_vae", self)
        with pyro.plate("sentences", len(sentences)):
            _, state = self.encoder(self.embedding(sentences))
            loc, log_scale = self.code(state[0]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def make():
    topic = torch.where(torch.rand(40, 1) < 0.5, 1, 2)
    sentences = torch.where(torch.rand(40, LENGTH) < 0.8, topic, torch.randint(3, WORDS, (40, LENGTH)))
    lengths = torch.randint(2, LENGTH + 1, (40, 1))
    sentences = torch.where(torch.arange(LENGTH) < lengths, sentences, 0)
    vae = SentenceVAE()

    z = torch.linspace(-7, 7, 281)

    @torch.no_grad()
    def joint():
        """Log p(x, z) of each point of a grid and each sentence."""
        terms = []
        for value in z:
            scores = vae.logits(sentences, value.expand(len(sentences))).log_softmax(-1)
            log_p = scores.gather(-1, sentences[..., None])[..., 0]
            terms.append(torch.where(sentences > 0, log_p, 0.0).sum(-1) + normal(value, 0.0, 1.0))
        return torch.stack(terms)

    return Program(
        vae.model,
        vae.guide,
        (sentences,),
        how="quadrature",
        by_hand=lambda: joint().logsumexp(0) + (z[1] - z[0]).log(),
        means=lambda: {"z": z @ joint().softmax(0)},
    )
