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
from layerskip.model.decoder import largest_probability


@dataclass(frozen=True)
class Chain:
    """Drawn tokens (B, K), the law (B, V) each was drawn from (None where it was chosen), how many count (B,), and how
    sure the drafter was of each (None where the plan did not ask)."""

    tokens: Tensor
    proposals: list[Tensor] | None
    lengths: Tensor | None
    confidence: list[list[float]] | None = None


class Ends:
    """Where the rows' drafts end: a row that its plan stops stays stopped.

    Args:
        plan: of the round.
        rows: B.
        count: the most tokens.
    """

    def __init__(self, plan: Plan, *, rows: int, count: int) -> None:
        self._plan, self._lengths = plan, [count] * rows
        self.confidence: list[list[float]] | None = [] if plan.confident else None

    def __call__(self, confidence: list[float]) -> bool:
        """Takes up how sure the drafter was of a token of each row; whether every row has stopped."""
        assert self.confidence is not None
        self.confidence.append(confidence)
        drafted, stops = len(self.confidence), self._plan.stop(confidence)
        self._lengths = [min(n, drafted) if stop else n for n, stop in zip(self._lengths, stops, strict=True)]
        return max(self._lengths) <= drafted

    def lengths(self, drafted: Tensor) -> Tensor | None:
        """(B,) how many of the drafted tokens (B, K) count in each row; None where all do."""
        ragged = min(self._lengths) < drafted.shape[1]
        return torch.tensor(self._lengths, device=drafted.device) if ragged else None


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
    ends = Ends(plan, rows=len(rows.ids), count=count)
    for i in range(count):
        logits = step(token, i)
        known = torch.ones(1, i, dtype=torch.bool, device=token.device)
        law = rows.law(logits, drafted, known)  # (B, 1, V)
        token = draw(law, numbers[:, i : i + 1])
        drafted = torch.cat((drafted, token), 1)
        if isinstance(law, Tensor):
            proposals.append(law[:, 0])
        if plan.confident and ends(largest_probability(logits)):
            break
    # a one-hot law chooses rather than draws: sample-and-match needs no law
    chosen = matched or rows.law.greedy
    return Chain(drafted, None if chosen else proposals, ends.lengths(drafted), ends.confidence)
