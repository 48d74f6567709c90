"""The loop that drafters which run a model share: draw a token, run it, draw the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerskip.decode.controllers import Plan
from layerskip.decode.draft import Draft, Rows
from layerskip.decode.randomness import Purpose
from layerskip.decode.sampling import draw
from layerskip.model.decoder import largest_probability
from layerskip.model.stop import Ends


def ended(ends: Ends | None, drafted: Tensor) -> dict[str, Any]:
    """How many of the drafted tokens (B, K) count in each row, (B,) or None where all do, and how sure the drafter was
    of them, as a `Draft` has it."""
    if ends is None:
        return {}
    ragged = min(ends.lengths) < drafted.shape[1]
    lengths = torch.tensor(ends.lengths, device=drafted.device) if ragged else None
    return {"lengths": lengths, "confidence": ends.confidence}


def draw_chain(
    rows: Rows, tokens: int, plan: Plan, *, step: Callable[[Tensor, int], Tensor], matched: bool = False
) -> Draft:
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
    ends = None if plan.stop is None else Ends(plan.stop, rows=len(rows.ids), count=count)
    for i in range(count):
        logits = step(token, i)
        known = torch.ones(1, i, dtype=torch.bool, device=token.device)
        law = rows.law(logits, drafted, known)  # (B, 1, V)
        token = draw(law, numbers[:, i : i + 1])
        drafted = torch.cat((drafted, token), 1)
        if isinstance(law, Tensor):
            proposals.append(law[:, 0])
        if ends is not None and ends(largest_probability(logits)):
            break
    # a one-hot law chooses rather than draws: sample-and-match needs no law
    chosen = matched or rows.law.greedy
    return Draft(drafted, proposals=None if chosen else proposals, **ended(ends, drafted))
