"""Frames of TOPv2: how they are written, how its tables hold them, and how two of them compare.

Knows how a frame is written (``[IN:CREATE_ALARM Set an alarm [SL:DATE_TIME for 7 am ] ]``: an intent holds words and
slots, a slot holds words and intents, each closed by a token `` ]``). Training and evaluation both read frames here.
Does not know tokenizers or models, nor which files there are.

Source: Chen et al., "Low-Resource Domain Adaptation for Compositional Task-Oriented Semantic Parsing", EMNLP 2020.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerskip.errors import RequestError

_OPENING = re.compile(r"\[(IN|SL):([A-Z][A-Z_]*)")
_INSIDE = {"IN": "SL", "SL": "IN"}  # what may open inside what
_HEADER = ["domain", "utterance", "semantic_parse"]


@dataclass(frozen=True)
class Tree:
    """A frame or a part of it.

    Args:
        label: with its kind, such as ``IN:CREATE_ALARM`` or ``SL:DATE_TIME``.
        children: words and parts, in order.
    """

    label: str
    children: tuple[Tree | str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"[{self.label}", *map(str, self.children), "]"))


def parse_tree(text: str) -> Tree:
    """Reads a frame.

    Args:
        text: a frame; any white space separates its tokens.

    Returns:
        Its root, an intent; `str` of it is the frame with single spaces.

    Raises:
        RequestError: the brackets do not balance, a label is not one, or there is not exactly one root intent.

    Example:
        >>> parse_tree("[IN:GET_WEATHER weather [SL:DATE_TIME today ] ]").children
        ('weather', Tree(label='SL:DATE_TIME', children=('today',)))
    """
    open_parts: list[tuple[str, list[Tree | str]]] = []
    root: Tree | None = None
    for place, token in enumerate(text.split(), start=1):
        if root is not None:
            raise RequestError(f"token {place}, {token!r}, comes after the frame has ended; a frame is one intent")
        if token == "]":
            if not open_parts:
                raise RequestError(f"token {place} closes a bracket that nothing opened; a frame begins with [IN:")
            label, children = open_parts.pop()
            part = Tree(label, tuple(children))
            if open_parts:
                open_parts[-1][1].append(part)
            else:
                root = part
        elif token.startswith("["):
            _check_opening(token, place=place, inside=open_parts[-1][0] if open_parts else None)
            open_parts.append((token[1:], []))
        elif open_parts:
            open_parts[-1][1].append(token)
        else:
            raise RequestError(f"token {place}, {token!r}, is outside of any bracket; a frame begins with [IN:")
    if root is None:
        if open_parts:
            raise RequestError(f"{len(open_parts)} bracket(s) are never closed, the last one [{open_parts[-1][0]}")
        raise RequestError("there is no frame in an empty text; a frame begins with [IN:")
    return root


def well_formed(text: str) -> bool:
    """Whether `parse_tree` can read the text."""
    try:
        parse_tree(text)
    except RequestError:
        return False
    return True


def template(text: str) -> str:
    """The frame without its words: which intents and slots there are, and how they are nested.

    Args:
        text: a frame.

    Raises:
        RequestError: it is not well formed.

    Example:
        >>> template("[IN:GET_WEATHER weather [SL:DATE_TIME today ] ]")
        '[IN:GET_WEATHER [SL:DATE_TIME ] ]'
    """
    return str(_without_words(parse_tree(text)))


def exact_match(given: str, wanted: str) -> bool:
    """Whether two frames are the same text, white space aside: the measure of the TOPv2 papers."""
    return given.split() == wanted.split()


def is_opening(token: str) -> bool:
    """Whether a token opens an intent or a slot, such as ``[SL:DATE_TIME``."""
    return _OPENING.fullmatch(token) is not None


def frame_words(frame: Sequence[str]) -> list[str]:
    """The tokens of a frame that are its utterance's: neither openings nor closing brackets."""
    return [token for token in frame if token != "]" and not token.startswith("[")]


def word_slots(frame: Sequence[str]) -> Iterator[tuple[tuple[str, str], int, int]]:
    """Every slot that holds words and nothing else, in the order in which they close.

    Args:
        frame: tokens of a well-formed frame.

    Yields:
        The intent that the slot stands in and the slot, as their openings; where its words begin and end.

    Example:
        >>> list(word_slots("[IN:GET_WEATHER weather [SL:DATE_TIME on Monday ] ]".split()))
        [(('[IN:GET_WEATHER', '[SL:DATE_TIME'), 3, 5)]
    """
    opened: list[int] = []
    for place, token in enumerate(frame):
        if token.startswith("["):
            opened.append(place)
        elif token == "]":
            begin = opened.pop()
            words_only = not any(inner.startswith("[") for inner in frame[begin + 1 : place])
            if frame[begin].startswith("[SL:") and words_only and place > begin + 1 and opened:
                yield (frame[opened[-1]], frame[begin]), begin + 1, place


# --- tables


def table_rows(raw: bytes, *, name: str) -> Iterator[tuple[int, tuple[str, str] | RequestError]]:
    """The rows of a TOPv2 table: a header, then domain, utterance and frame in each line, parted by tabs.

    Args:
        raw: the bytes of the file.
        name: what messages call it.

    Yields:
        The number of a line, and its utterance and frame, the frame with single spaces; or what is wrong with it.

    Raises:
        RequestError: the header is another one.
    """
    header, *lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if header.rstrip(b"\r").decode(errors="replace").split("\t") != _HEADER:
        raise RequestError(f"{name}:1 is not the header of a TOPv2 table; its columns have to be {', '.join(_HEADER)}")
    for number, line in enumerate(lines, start=2):
        if line or number < len(lines) + 1:  # the last newline ends its line
            try:
                yield number, _pair(line)
            except RequestError as error:
                yield number, error


def _pair(line: bytes) -> tuple[str, str]:
    try:
        columns = line.decode().split("\t")
    except UnicodeDecodeError as error:
        raise RequestError(f"byte 0x{line[error.start]:02x} is not UTF-8; convert it, with iconv, say") from error
    if len(columns) != len(_HEADER):
        raise RequestError(f"{len(columns)} columns instead of {len(_HEADER)}; part {', '.join(_HEADER)} by tabs")
    _, utterance, frame = columns
    if not utterance.strip():
        raise RequestError("the utterance is empty; leave the line out")
    parse_tree(frame)
    return utterance, " ".join(frame.split())


def _check_opening(token: str, *, place: int, inside: str | None) -> None:
    match = _OPENING.fullmatch(token)
    if match is None:
        raise RequestError(f"token {place}, {token!r}, opens neither an intent, [IN:NAME, nor a slot, [SL:NAME")
    allowed = "IN" if inside is None else _INSIDE[inside[:2]]
    if match[1] != allowed:
        where = "at the root" if inside is None else f"inside {inside}"
        raise RequestError(f"token {place}, {token!r}, stands {where}, where only [{allowed}: may open")


def _without_words(tree: Tree) -> Tree:
    return Tree(tree.label, tuple(_without_words(child) for child in tree.children if isinstance(child, Tree)))
