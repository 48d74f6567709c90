"""Log-probabilities of tokens under the target's raw logits: before temperature, penalties and processors.

A drafter changes speed only, so these are the target's own for accepted and corrected tokens alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest alternatives in its place (token, log-probability), likeliest
    first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def rank(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Scores `tokens`, one for each row of `logits` (T, V), with `top` alternatives each."""
    if not tokens:
        return []
    table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    own = table.gather(-1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    values, indices = table.topk(min(top, table.shape[-1]), dim=-1)
    best = [list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*entry) for entry in zip(tokens, own, best, strict=True)]
