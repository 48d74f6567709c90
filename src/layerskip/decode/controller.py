"""How long to draft.

A controller may look at past rounds and at the drafted prefix. It never throws away a token because of the token it
turned out to be: that would bias the law (a token it is unsure of is kept, and drafting then stops). B rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from layerskip.errors import RequestError, check_number, check_whole


class Controller(Protocol):
    """Decides how many tokens a round drafts."""

    tokens: int
    """The most tokens it ever asks for."""

    def length(self) -> int:
        """Tokens to draft in the next round, at most."""
        ...

    @property
    def confident(self) -> bool:
        """Whether `stop` wants the drafter's confidence."""
        ...

    def stop(self, confidence: Tensor) -> Tensor:
        """Which rows stop after the token just drafted; confidence (B,) is the drafter's largest probability there."""
        ...

    def update(self, drafted: int, accepted: int) -> None:
        """Learns what became of one row's draft."""
        ...


class Fixed:
    """Always the same number of tokens.

    Raises:
        RequestError: fewer than one token.
    """

    confident = False

    def __init__(self, tokens: int) -> None:
        check_whole("draft tokens", tokens)
        if tokens < 1:
            raise RequestError(f"drafting {tokens} tokens a round is not possible; use 1 or more, or no drafter")
        self.tokens = tokens

    def length(self) -> int:
        """Tokens to draft."""
        return self.tokens

    def stop(self, confidence: Tensor) -> Tensor:
        """Nobody stops early."""
        return confidence < 0

    def update(self, drafted: int, accepted: int) -> None:
        """Nothing to learn."""


class Confidence(Fixed):
    """Stops a row's draft after the first token where the drafter's largest probability is below a threshold.

    The token it was unsure of is kept for verification, which is what keeps the rule exact (Kangaroo, Liu et al.,
    2024, stops alike).

    Raises:
        RequestError: fewer than one token, or a threshold outside (0, 1].
    """

    confident = True

    def __init__(self, tokens: int, *, threshold: float) -> None:
        super().__init__(tokens)
        check_number("confidence", threshold)
        if not 0 < threshold <= 1:
            raise RequestError(f"confidence {threshold} is not allowed; use more than 0 and at most 1")
        self.threshold = threshold

    def stop(self, confidence: Tensor) -> Tensor:
        """(B,) whether the drafter was less sure than the threshold."""
        return confidence < self.threshold


def controller_for(tokens: int, *, confidence: float | None) -> Controller:
    """`Fixed`, or `Confidence` where a threshold is given. Raises RequestError for values out of range."""
    return Fixed(tokens) if confidence is None else Confidence(tokens, threshold=confidence)
