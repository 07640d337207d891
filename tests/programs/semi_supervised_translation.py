"""Semi-supervised translation (Kočiský et al. 2016): the source of most sentences is a latent sequence, summed out."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import nn

from programs.program import Program

WORDS = 3  # of each language; a sentence has two


class Translator(nn.Module):
    """p(x_1) p(x_2 | x_1), p(y | x) by a table for each pair of words, and q(x_1 | y) q(x_2 | x_1, y)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(WORDS))
        self.second = nn.Parameter(0.1 * torch.randn(WORDS, WORDS))
        self.translation = nn.Parameter(0.1 * torch.randn(WORDS, WORDS, 2, WORDS))
        self.guess = nn.Parameter(0.1 * torch.randn(WORDS, WORDS, WORDS))
        self.guess_next = nn.Parameter(0.1 * torch.randn(WORDS, WORDS, WORDS, WORDS))

    def model(self, sources, sentences, paired):
        pyro.module("translator", self)
        with pyro.plate("sentences", len(sentences)):
            with poutine.mask(mask=~paired):
                drawn = pyro.sample("x_1", dist.Categorical(logits=self.first))
            x_1 = torch.where(paired, sources[:, 0], drawn)
            with poutine.mask(mask=~paired):
                drawn = pyro.sample("x_2", dist.Categorical(logits=self.second[x_1]))
            x_2 = torch.where(paired, sources[:, 1], drawn)
            with poutine.mask(mask=paired):
                pyro.sample("source_1", dist.Categorical(logits=self.first), obs=sources[:, 0])
                pyro.sample("source_2", dist.Categorical(logits=self.second[sources[:, 0]]), obs=sources[:, 1])
            words = dist.Categorical(logits=Vindex(self.translation)[x_1, x_2])
            pyro.sample("sentence", words.to_event(1), obs=sentences)

    def guide(self, sources, sentences, paired):
        pyro.module("translator", self)
        with pyro.plate("sentences", len(sentences)), poutine.mask(mask=~paired):
            y_1, y_2 = sentences.unbind(-1)
            x_1 = pyro.sample("x_1", dist.Categorical(logits=self.guess[y_1, y_2]))
            pyro.sample("x_2", dist.Categorical(logits=Vindex(self.guess_next)[y_1, y_2, x_1]))


def make():
    sources = torch.randint(WORDS, (40, 2))
    sentences = (sources.flip(1) + 1) % WORDS  # the words change their places
    sentences = torch.where(torch.rand(40, 2) < 0.1, torch.randint(WORDS, (40, 2)), sentences)
    paired = torch.arange(40) < 10
    translator = Translator()

    @torch.no_grad()
    def by_hand():
        first, second = translator.first.log_softmax(-1), translator.second.log_softmax(-1)
        emission = translator.translation.log_softmax(-1)
        found = []
        for source, (y_1, y_2), known in zip(sources.tolist(), sentences.tolist(), paired.tolist(), strict=True):
            joint = first[:, None] + second + emission[:, :, 0, y_1] + emission[:, :, 1, y_2]
            found.append(joint[source[0], source[1]] if known else joint.flatten().logsumexp(0))
        return torch.stack(found)

    return Program(
        translator.model,
        config_enumerate(translator.guide),
        (sources, sentences, paired),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        how="enumeration",
        by_hand=by_hand,
    )
