"""How well each exit predicts a known text: one pass over the layers, every exit read on the way.

Token ids in, numbers out. Sizes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerskip.decode.numerics import diagnose
from layerskip.decode.prefill import CHUNK
from layerskip.errors import RequestError
from layerskip.model.decoder import Decoder


@dataclass(frozen=True)
class ExitScore:
    """What one exit makes of a text.

    Args:
        exit: layers used.
        logprobs: natural log-probability of every token but the first, given those before it.
        predictions: the exit's likeliest token in each of these places.
    """

    exit: int
    logprobs: list[float]
    predictions: list[int]

    @property
    def total(self) -> float:
        """Log-likelihood of the text, in nats."""
        return math.fsum(self.logprobs)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -self.total / len(self.logprobs)

    def agreement(self, other: ExitScore) -> float:
        """Share of places in which both exits predict the same token."""
        same = sum(a == b for a, b in zip(self.predictions, other.predictions, strict=True))
        return same / len(self.predictions)


@torch.inference_mode()
def score(decoder: Decoder, ids: Sequence[int], *, exits: Sequence[int]) -> list[ExitScore]:
    """Scores `ids` at every one of `exits`.

    Raises:
        RequestError: fewer than two tokens, more than the context, or an exit outside the model.
        NumericalError: an exit's logits are not finite; says where that begins.
        CapacityError: no memory for the cache of this text.
    """
    layers, context = decoder.shape.layers, decoder.shape.context
    for exit in exits:
        if not 1 <= exit <= layers:
            raise RequestError(f"exit {exit} is not inside this {layers}-layer model; use 1..{layers}")
    if not 2 <= len(ids) <= context:
        raise RequestError(f"the text has {len(ids)} tokens; to be scored it needs 2..{context}")
    cache = decoder.cache(rows=1, slots=len(ids))
    tokens = torch.tensor([list(ids)], device=decoder.device)
    logprobs: dict[int, list[float]] = {exit: [] for exit in exits}
    predictions: dict[int, list[int]] = {exit: [] for exit in exits}
    for start in range(0, len(ids) - 1, CHUNK):
        end = min(start + CHUNK, len(ids) - 1)
        at = torch.arange(start, end, device=decoder.device)[None]
        hidden, depth = decoder.embed(tokens[:, start:end]), 0
        following = tokens[0, start + 1 : end + 1, None]
        for exit in sorted(set(exits)):
            hidden = decoder.run(hidden, at, cache, depth, exit, limit=end)
            depth = exit
            logits = decoder.logits(hidden)[0]
            table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            if bool(table.isnan().any()):
                raise diagnose(decoder, ids, depth=exit)
            logprobs[exit] += table.gather(-1, following)[:, 0].tolist()
            predictions[exit] += table.argmax(-1).tolist()
    return [ExitScore(exit, logprobs[exit], predictions[exit]) for exit in exits]
