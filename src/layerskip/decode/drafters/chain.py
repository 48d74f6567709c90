"""The loop that drafters which run a model share: draw a token, run it, draw the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decode.controller import Controller
from layerskip.decode.draft import Rows
from layerskip.decode.randomness import Purpose
from layerskip.decode.sampling import draw


@dataclass(frozen=True)
class Chain:
    """Drawn tokens (B, K), the law (B, V) each was drawn from (None where it was chosen), and how many count (B,)."""

    tokens: Tensor
    proposals: list[Tensor] | None
    lengths: Tensor | None


def draw_chain(rows: Rows, tokens: int, controller: Controller, *, step: Callable[[Tensor, int], Tensor]) -> Chain:
    """Draws up to `tokens` tokens for every row, under the row's own law applied to the drafter's logits.

    Args:
        rows: the rows to draft for.
        tokens: K at most.
        controller: how many to ask for, and where a row stops.
        step: (token (B, 1), its place in the draft, 0 for the last known token) -> the drafter's logits (B, 1, V).
    """
    count = min(tokens, controller.length())
    numbers = rows.uniform(Purpose.DRAFT, count)
    token, drafted, proposals = rows.last, rows.last[:, :0], []
    lengths = torch.full_like(rows.last[:, 0], count) if controller.confident else None
    for i in range(count):
        logits = step(token, i)
        known = torch.ones(1, i, dtype=torch.bool, device=token.device)
        law = rows.law(logits, drafted, known)  # (B, 1, V)
        token = draw(law, numbers[:, i : i + 1])
        drafted = torch.cat((drafted, token), 1)
        if isinstance(law, Tensor):
            proposals.append(law[:, 0])
        if lengths is not None:
            unsure = controller.stop(logits[:, 0].float().softmax(-1).amax(-1))
            lengths = torch.where(unsure, lengths.clamp(max=i + 1), lengths)
            if bool((lengths <= i + 1).all()):  # every row has stopped
                break
    # a one-hot law chooses rather than draws: sample-and-match needs no law
    return Chain(drafted, None if rows.law.greedy else proposals, lengths)
