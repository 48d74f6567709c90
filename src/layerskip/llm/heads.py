"""What a draft predicts through: what options ask for, else what the checkpoint recommends.

Knows options and recommendations. Does not know drafters: one that has no such head refuses the options elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerskip.decode.drafters.coarse import has_coarse
from layerskip.decode.drafters.early_exit import HEADS
from layerskip.decode.drafters.shortlist import fitting
from layerskip.errors import RequestError, suggest
from layerskip.llm.recommended import Recommended
from layerskip.model.decoder import Decoder

CHOICES = (*HEADS, "auto")


def head_settings(
    decoder: Decoder,
    advice: Recommended | None,
    *,
    head: str | None,
    vocabulary: int | str | None,
    ranked: Sequence[int] | None,
    advised: bool,
) -> dict[str, Any]:
    """The arguments `head`, `vocabulary` and `ranked` of `EarlyExit`.

    A draft goes through a head of 8 bits or a narrow one: where one is asked for, a recommended other steps back.

    Args:
        decoder: whose head.
        advice: what its checkpoint recommends.
        head: as in `LLM.drafter`, and so are the next two.
        vocabulary: likewise.
        ranked: likewise.
        advised: whether None is what is recommended.

    Raises:
        RequestError: no such head or size.
    """
    if head is not None and head not in CHOICES:
        raise RequestError(f"unknown draft head {head!r}; use {', '.join(CHOICES)}{suggest(head, CHOICES)}")
    if isinstance(vocabulary, str) and vocabulary != "auto":
        raise RequestError(f"draft vocabulary {vocabulary!r} is not possible; use 'auto', or a number of tokens")
    if head == "auto" or (head is None and advised):
        # it was measured elsewhere: where these weights have none, the own head is no surprise
        coarse = advice is not None and advice.head == "int8" and has_coarse(decoder)
        head = "int8" if coarse and not vocabulary else "own"
    known = None if advice is None else advice.vocabulary
    if vocabulary == "auto":
        fits = fitting(decoder.shape)
        vocabulary = known or (fits if 0 < fits < decoder.shape.vocab / 2 else None)
        ranked = ranked if vocabulary else ()
    elif vocabulary is None and advised and head != "int8":
        vocabulary = known
    if vocabulary and ranked is None and advice is not None:
        ranked = advice.ranked
    return {"head": head or "own", "vocabulary": vocabulary or None, "ranked": ranked or ()}
