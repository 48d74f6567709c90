"""What a controller is: it decides how long to draft.

A controller may look at past rounds and at the drafted prefix. It never throws away a token because of the token it
turned out to be: that would bias the law (a token it is unsure of is kept, and drafting then stops).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from layerskip.decode.draft import Draft, Outcome


class Plan(Protocol):
    """How long one round drafts."""

    @property
    def length(self) -> int:
        """Tokens to draft, at most."""
        ...

    @property
    def confident(self) -> bool:
        """Whether `stop` wants the drafter's confidence."""
        ...

    def stop(self, confidence: Sequence[float]) -> list[bool]:
        """Which rows stop after the token just drafted; for each row, the drafter's largest probability there."""
        ...


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
