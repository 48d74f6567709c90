"""How long to draft: a fixed number of tokens, a threshold, or a choice made while decoding. All of them are exact."""

from __future__ import annotations

from layerskip.decode.controllers.controller import Controller, Plan
from layerskip.decode.controllers.fixed import Confidence, Fixed
from layerskip.decode.controllers.gain import Gain
from layerskip.decode.controllers.thompson import Thompson
from layerskip.errors import RequestError, suggest

__all__ = ["LENGTHS", "MOST", "Confidence", "Controller", "Fixed", "Gain", "Plan", "Thompson", "controller_for"]

LENGTHS = ("fixed", "thompson", "gain")
"""How a draft's length is found, as options name it."""

MOST = 16
"""Tokens that a rule which chooses may draft in a round, where nobody says."""


def controller_for(tokens: int | None, *, confidence: float | None, length: str = "fixed") -> Controller:
    """The controller that options mean.

    Args:
        tokens: the most in a round; None is 4 where it is fixed, else `MOST`.
        confidence: ends drafts at this threshold.
        length: one of `LENGTHS`.

    Raises:
        RequestError: no such rule, a value out of range, or a threshold for a rule that finds its own.
    """
    if length not in LENGTHS:
        raise RequestError(f"unknown draft length {length!r}; use {', '.join(LENGTHS)}{suggest(length, LENGTHS)}")
    if length == "fixed":
        count = 4 if tokens is None else tokens
        return Fixed(count) if confidence is None else Confidence(count, threshold=confidence)
    if confidence is not None:
        raise RequestError(
            f"draft length {length!r} finds where drafts end; leave confidence {confidence} out, or use 'fixed'"
        )
    count = MOST if tokens is None else tokens
    return Thompson(count) if length == "thompson" else Gain(count)
