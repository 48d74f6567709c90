"""Examples: what one row of data says, before any tokenizer has seen it.

Knows the three kinds of rows, when two of them are equal, and how to part and fingerprint a list of them. Does not know
files or tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from layerskip.errors import RequestError


@dataclass(frozen=True, slots=True)
class Document:
    """A text, all of which is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and the response that is learnt."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; what the assistant says in it is learnt."""

    turns: tuple[Turn, ...]


Example = Document | Pair | Chat
Kind = TypeVar("Kind", bound=Example)


def digest(examples: Iterable[Example]) -> str:
    """The sha256 of examples in their order, for the provenance of a model.

    Args:
        examples: what a model was trained on.

    Returns:
        64 hexadecimal digits.
    """
    whole = hashlib.sha256()
    for example in examples:
        whole.update(_fingerprint(example))
    return whole.hexdigest()


def hold_out(examples: Iterable[Kind], *, share: float, seed: int = 0) -> tuple[list[Kind], list[Kind]]:
    """Parts examples in two by their content alone.

    Equal examples stay together, and an example stays where it is when others come or go, or their order changes.

    Args:
        examples: what to part.
        share: how much is held out, from 0 to 1, on average over distinct examples.
        seed: another one holds out others.

    Returns:
        Those that remain and those that are held out, each in the given order.

    Raises:
        RequestError: the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise RequestError(f"share {share} cannot be held out; use a number from 0 to 1")
    parts: tuple[list[Kind], list[Kind]] = ([], [])
    for example in examples:
        draw = hashlib.sha256(f"{seed}:".encode() + _fingerprint(example)).digest()
        parts[int.from_bytes(draw[:7]) < share * 2**56].append(example)
    return parts


def _fingerprint(example: Example) -> bytes:
    match example:
        case Document(text):
            fields = [text]
        case Pair(prompt, response):
            fields = [prompt, response]
        case Chat(turns):
            fields = [field for turn in turns for field in (turn.role, turn.content)]
    # As JSON, so that moving a letter from one field to the next makes another example.
    return hashlib.sha256(json.dumps([type(example).__name__, *fields]).encode()).digest()
