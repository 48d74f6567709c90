"""Drafters by the words that name them: ``early-exit:3``, ``auto``, ``assistant:PATH``.

Knows the options that each of them takes and what a checkpoint recommends. Does not draft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Assistant, Auto, Cascade, EarlyExit, Lookup
from layerskip.errors import RequestError, suggest
from layerskip.llm.heads import head_settings
from layerskip.llm.recommended import Recommended
from layerskip.llm.tokenizer import load_tokenizer
from layerskip.model import checkpoint

if TYPE_CHECKING:
    from layerskip.llm.model import LLM

DRAFTERS = ("auto", "none", "early-exit", "lookup", "cascade", "assistant")

_WHY = {
    "lookup": "lookup copies",
    "auto": "auto finds by itself where to exit and how long to draft,",
    "assistant": "assistant has a head of its own",
}
_NARROW = ("draft vocabulary", "ranking of tokens", "choice of a draft head")
_UNASKED = {
    "lookup": ("confidence", "draft length", *_NARROW),
    "auto": ("confidence", "draft length"),
    "assistant": _NARROW,
}


def named(
    llm: LLM,
    words: str,
    *,
    tokens: int | None,
    confidence: float | None,
    length: str | None,
    vocabulary: int | str | None,
    ranked: Sequence[int] | None,
    head: str | None,
) -> Drafter | None:
    """`LLM.drafter`."""
    kind, colon, argument = words.partition(":")
    if kind not in DRAFTERS:
        raise RequestError(f"unknown drafter {kind!r}; use {', '.join(DRAFTERS)}{suggest(kind, DRAFTERS)}")
    if colon and kind in ("auto", "none", "lookup"):
        raise RequestError(f"{kind} takes nothing after it, not {argument!r}; write {kind}")
    if kind == "none":
        return None
    given = {
        "confidence": confidence,
        "draft length": length,
        "draft vocabulary": vocabulary or None,  # 0 is none
        "ranking of tokens": ranked,
        "choice of a draft head": None if head == "own" else head,
    }
    for name in _UNASKED.get(kind, ()):
        if given[name] is not None:
            raise RequestError(f"{_WHY[kind]} and has no {name}; leave it out")
    if kind == "lookup":
        return Lookup() if tokens is None else Lookup(tokens=tokens)
    length = length or "fixed"
    if kind == "assistant":
        if not argument:
            raise RequestError("assistant needs a checkpoint; write assistant:PATH")
        return assistant(llm, argument, tokens=tokens, confidence=confidence, length=length)
    through = head_settings(
        llm.decoder, llm.recommended, head=head, vocabulary=vocabulary, ranked=ranked, advised=not colon
    )
    if kind == "auto":
        return _auto(llm.recommended, tokens, through)
    if colon and not argument.isdecimal():
        raise RequestError(f"{kind} needs a number of layers, not {argument!r}; write {kind}:3, say")
    if not colon:
        advice = _advice(llm, kind)
        argument = str(advice.exit)
        if length == "fixed":
            tokens = advice.draft_tokens if tokens is None else tokens
            confidence = advice.confidence if confidence is None else confidence
    early = EarlyExit(int(argument), tokens=tokens, confidence=confidence, length=length, **through)
    return early if kind == "early-exit" else Cascade(Lookup(), early)


def assistant(
    llm: LLM, path_or_id: str | Path, *, tokens: int | None, confidence: float | None, length: str
) -> Assistant:
    """`LLM.assistant`."""
    folder = checkpoint.find(path_or_id)
    mine, theirs = llm.tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    if mine != theirs:
        differing = sum(theirs.get(token) != i for token, i in mine.items())
        raise RequestError(
            f"assistant {path_or_id} has another vocabulary: {differing} of {len(mine)} tokens differ from "
            f"{llm.name}'s; use a checkpoint with the same tokenizer"
        )
    here = llm.decoder
    decoder = checkpoint.load_decoder(folder, dtype=here.dtype, device=here.device, weights=here.layout)
    return Assistant(decoder, tokens=tokens, confidence=confidence, length=length)


def _advice(llm: LLM, kind: str) -> Recommended:
    if llm.recommended is None:
        raise RequestError(f"{llm.name} recommends no exit; write {kind}:3, say")
    return llm.recommended


def _auto(advice: Recommended | None, tokens: int | None, through: Mapping[str, Any]) -> Auto:
    settings: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
    if advice is not None:
        settings |= {"exit": advice.exit, "guesses": advice.acceptance}
    return Auto(**settings, **through)
