"""What a controller is: it decides how long to draft.

A controller may look at past rounds and at the drafted prefix. It never throws away a token because of the token it
turned out to be: that would bias the law (a token it is unsure of is kept, and drafting then stops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from layerskip.decode.draft import Draft, Outcome
from layerskip.model.stop import Stop


@dataclass(frozen=True)
class Plan:
    """How long one round drafts.

    Args:
        length: tokens to draft, at most.
        stop: where drafts end before that, by the drafter's largest probability at each token; None nowhere.
    """

    length: int
    stop: Stop | None = None

    def eager(self, factor: float) -> Plan:
        """The same with tokens that cost so many times less."""
        stop = self.stop
        return self if stop is None else Plan(self.length, Stop(stop.edges, stop.factors, stop.least / factor))


class Controller(Protocol):
    """Decides how many tokens a round drafts. One may serve several batches and threads."""

    @property
    def tokens(self) -> int:
        """The most tokens it ever asks for."""
        ...

    def plan(self, rows: int) -> Plan:
        """For the next round of so many rows."""
        ...

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Sees what became of a draft."""
        ...
