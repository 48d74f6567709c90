"""Always the same number of tokens, and the end of a draft at a threshold. Knows no past rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.decode.draft import Draft, Outcome
from layerskip.errors import RequestError, check_number, check_whole


@dataclass(frozen=True)
class Length:
    """The plan of a round that drafts so many tokens, whatever they are."""

    length: int
    confident: bool = False

    def stop(self, confidence: Sequence[float]) -> list[bool]:
        """Nobody stops early."""
        return [False] * len(confidence)


class Fixed:
    """Always the same number of tokens.

    Raises:
        RequestError: fewer than one token.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = check_tokens(tokens)

    def plan(self, rows: int) -> Length:
        """Tokens to draft."""
        return Length(self.tokens)

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Nothing to learn."""


class Confidence:
    """Stops a row's draft after the first token where the drafter's largest probability is below a threshold.

    The token it was unsure of is kept for verification, which is what keeps the rule exact (Kangaroo, Liu et al.,
    2024, stops alike).

    Raises:
        RequestError: fewer than one token, or a threshold outside (0, 1].
    """

    confident = True

    def __init__(self, tokens: int, *, threshold: float) -> None:
        self.tokens = self.length = check_tokens(tokens)
        check_number("confidence", threshold)
        if not 0 < threshold <= 1:
            raise RequestError(f"confidence {threshold} is not allowed; use more than 0 and at most 1")
        self.threshold = threshold

    def plan(self, rows: int) -> Confidence:
        """The same every round."""
        return self

    def stop(self, confidence: Sequence[float]) -> list[bool]:
        """Whether the drafter was less sure than the threshold, for each row."""
        return [sure < self.threshold for sure in confidence]

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Nothing to learn."""


def check_tokens(tokens: int) -> int:
    """The number. Raises RequestError for fewer than one token."""
    check_whole("draft tokens", tokens)
    if tokens < 1:
        raise RequestError(f"drafting {tokens} tokens a round is not possible; use 1 or more, or no drafter")
    return tokens
