"""The loop that drafters which run a model share: draw a token, run it, draw the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decode.controllers import Plan
from layerskip.decode.draft import Rows
from layerskip.decode.randomness import Purpose
from layerskip.decode.sampling import draw


@dataclass(frozen=True)
class Chain:
    """Drawn tokens (B, K), the law (B, V) each was drawn from (None where it was chosen), how many count (B,), and how
    sure the drafter was of each (None where the plan did not ask)."""

    tokens: Tensor
    proposals: list[Tensor] | None
    lengths: Tensor | None
    confidence: list[list[float]] | None = None


def draw_chain(
    rows: Rows, tokens: int, plan: Plan, *, step: Callable[[Tensor, int], Tensor], matched: bool = False
) -> Chain:
    """Draws up to `tokens` tokens for every row, under the row's own law applied to the drafter's logits.

    Args:
        rows: the rows to draft for.
        tokens: K at most.
        plan: how many to ask for, and where a row stops.
        step: (token (B, 1), its place in the draft, 0 for the last known token) -> the drafter's logits (B, 1, V).
        matched: draw by the very numbers that the target will draw by, and let the target's draws decide: text with a
            seed is then that of plain decoding, whatever is drafted. Fewer tokens are kept than by rejection.
    """
    count = min(tokens, plan.length)
    numbers = rows.uniform(Purpose.TOKEN if matched else Purpose.DRAFT, count)
    token, drafted, proposals = rows.last, rows.last[:, :0], []
    lengths, sure = [count] * len(rows.ids), list[list[float]]()
    for i in range(count):
        logits = step(token, i)
        known = torch.ones(1, i, dtype=torch.bool, device=token.device)
        law = rows.law(logits, drafted, known)  # (B, 1, V)
        token = draw(law, numbers[:, i : i + 1])
        drafted = torch.cat((drafted, token), 1)
        if isinstance(law, Tensor):
            proposals.append(law[:, 0])
        if plan.confident:
            sure.append(logits[:, 0].float().softmax(-1).amax(-1).tolist())
            lengths = [min(n, i + 1) if stop else n for n, stop in zip(lengths, plan.stop(sure[-1]), strict=True)]
            if max(lengths) <= i + 1:  # every row has stopped
                break
    # a one-hot law chooses rather than draws: sample-and-match needs no law
    chosen = matched or rows.law.greedy
    ragged = min(lengths) < drafted.shape[1]
    return Chain(
        drafted,
        None if chosen else proposals,
        torch.tensor(lengths, device=drafted.device) if ragged else None,
        sure if plan.confident else None,
    )
