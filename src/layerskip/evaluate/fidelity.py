"""How close a quantised model is to its checkpoint: what both make of the same texts.

Knows two models of one vocabulary, and texts as token ids. Does not know how weights are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip.decode.scoring import perplexity
from layerskip.errors import RequestError
from layerskip.llm import LLM
from layerskip.model.decoder import Decoder

PART = 64
"""Places whose laws are compared at a time: each has as many numbers as the vocabulary."""


@dataclass(frozen=True)
class Fidelity:
    """What quantising costs, over places of texts with a token behind them.

    Args:
        tokens: such places.
        loss: mean negative log-likelihood of the token behind, in nats, by the quantised model.
        checkpoint_loss: the same by the checkpoint.
        agreement: share of places where both find the same token the likeliest.
        divergence: mean of KL(checkpoint || quantised) of the laws of the next token, in nats.
    """

    tokens: int
    loss: float
    checkpoint_loss: float
    agreement: float
    divergence: float

    @property
    def perplexity(self) -> float:
        """The quantised model's perplexity as a multiple of the checkpoint's."""
        return perplexity(self.loss - self.checkpoint_loss)

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "perplexity": self.perplexity}


def fidelity(llm: LLM, checkpoint: LLM, texts: Iterable[Sequence[int]]) -> Fidelity:
    """Compares the last layers' laws of two models.

    Args:
        llm: the quantised model.
        checkpoint: the same with the checkpoint's numbers.
        texts: token ids, each within the context.

    Raises:
        RequestError: no text has two tokens.
        CapacityError: a cache does not fit in memory.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for ids in texts:
        laws = zip(_parts(ids), _laws(llm.decoder, ids), _laws(checkpoint.decoder, ids), strict=True)
        for following, law, wanted in laws:
            behind = torch.tensor(following)[:, None]
            likelihoods = [-each.gather(-1, behind).sum() for each in (law, wanted)]
            same = (law.argmax(-1) == wanted.argmax(-1)).sum()
            sums += torch.stack([*likelihoods, same, torch.sum(wanted.exp() * (wanted - law))])
            tokens += len(following)
    if not tokens:
        raise RequestError("the texts have nothing to predict; give at least two tokens")
    return Fidelity(tokens, *(sums / tokens).tolist())


def _parts(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """The tokens behind those of each part that is read at once."""
    return [ids[start + 1 : start + 1 + PART] for start in range(0, len(ids) - 1, PART)]


@torch.inference_mode()
def _laws(decoder: Decoder, ids: Sequence[int]) -> Iterable[Tensor]:
    """Log-probabilities (n, V), float64, after every token but the last, part by part."""
    cache, start = decoder.cache(rows=1, slots=len(ids)), 0
    tokens = torch.tensor([list(ids)], device=decoder.device)
    for part in _parts(ids):
        at = torch.arange(start, start + len(part), device=decoder.device)[None]
        hidden = decoder.run(decoder.embed(tokens[:, start : start + len(part)]), at, cache, limit=start + len(part))
        yield torch.log_softmax(decoder.logits(hidden)[0].double(), -1).cpu()
        start += len(part)
