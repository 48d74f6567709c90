"""Always the same number of tokens, and the end of a draft at a threshold. Knows no past rounds."""

from __future__ import annotations

from layerskip.decode.controllers.controller import Plan
from layerskip.decode.draft import Draft, Outcome
from layerskip.errors import RequestError, check_number, check_whole
from layerskip.model.stop import Stop


class Fixed:
    """Always the same number of tokens.

    Raises:
        RequestError: fewer than one token.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = check_tokens(tokens)
        self._plan = Plan(self.tokens)

    def plan(self, rows: int) -> Plan:
        """Tokens to draft."""
        return self._plan

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Nothing to learn."""


class Confidence:
    """Stops a row's draft after the first token where the drafter's largest probability is below a threshold.

    The token it was unsure of is kept for verification, which is what keeps the rule exact (Kangaroo, Liu et al.,
    2024, stops alike).

    Raises:
        RequestError: fewer than one token, or a threshold outside (0, 1].
    """

    def __init__(self, tokens: int, *, threshold: float) -> None:
        self.tokens = check_tokens(tokens)
        check_number("confidence", threshold)
        if not 0 < threshold <= 1:
            raise RequestError(f"confidence {threshold} is not allowed; use more than 0 and at most 1")
        self._plan = Plan(self.tokens, Stop(edges=(threshold,), factors=(0.0, 1.0), least=0.5))

    def plan(self, rows: int) -> Plan:
        """The same every round."""
        return self._plan

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Nothing to learn."""


def check_tokens(tokens: int) -> int:
    """The number. Raises RequestError for fewer than one token."""
    check_whole("draft tokens", tokens)
    if tokens < 1:
        raise RequestError(f"drafting {tokens} tokens a round is not possible; use 1 or more, or no drafter")
    return tokens
