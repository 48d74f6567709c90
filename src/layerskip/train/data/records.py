"""Rows of files and records of data sets, checked one by one.

Knows the three file formats and what makes a row malformed. Does not know which files there are, nor what becomes of a
row that is malformed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layerskip import frames
from layerskip.errors import RequestError
from layerskip.train.data.examples import Chat, Document, Example, Pair, Turn

# What a record may consist of: each tuple is a kind of example.
KINDS = (("messages",), ("prompt", "response"), ("text",))
FIELDS = [name for kind in KINDS for name in kind]
_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Bad:
    """A malformed row."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


Found = Example | Bad


def text_rows(path: Path, raw: bytes, *, separator: str | None) -> Iterator[Found]:
    """Documents, each ended by the separator; without one the file is a document."""
    line = 1
    pieces = raw.split(separator.encode()) if separator else [raw]
    for place, piece in enumerate(pieces):
        last_of_many = 0 < place == len(pieces) - 1
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            broken = line + piece.count(b"\n", 0, error.start)
            yield Bad(f"{path}:{broken}", _not_utf8(error))
        else:
            if text.strip():
                yield Document(text.strip("\r\n") if separator else text)
            elif not last_of_many:  # a separator may end the file
                yield Bad(f"{path}:{line}", "the document is empty")
        line += piece.count(b"\n")


def json_rows(path: Path, raw: bytes, *, columns: Mapping[str, str]) -> Iterator[Found]:
    """A record in each line."""
    return _line_rows(path, raw.split(b"\n"), partial(_json_example, columns=columns))


def table_rows(path: Path, raw: bytes) -> Iterator[Found]:
    """Pairs of a TOPv2 table. Raises RequestError where its header is another one."""
    for number, found in frames.table_rows(raw, name=str(path)):
        yield Bad(f"{path}:{number}", str(found)) if isinstance(found, RequestError) else Pair(*found)


def _line_rows(path: Path, lines: Sequence[bytes], example: Callable[[str], Example]) -> Iterator[Found]:
    """Rows of a file that has one in each line; what `example` raises is what is wrong with its line."""
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            return  # the end of the last line
        try:
            yield example(line.decode())
        except UnicodeDecodeError as error:
            yield Bad(f"{path}:{number}", _not_utf8(error))
        except RequestError as error:
            yield Bad(f"{path}:{number}", str(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8"


def _json_example(line: str, *, columns: Mapping[str, str]) -> Example:
    if not line.strip():
        raise RequestError("the line is empty")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RequestError(f"JSON beyond what Python reads: {error}") from error
    if not isinstance(record, dict):
        raise RequestError(f"a JSON {type(record).__name__} instead of an object")
    return record_example(record, columns)


def record_example(record: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """Makes an example of a record; RequestError says what is wrong with it."""
    if columns:
        names = dict(columns)
        if missing := [name for name in names.values() if name not in record]:
            raise RequestError(f"no field {missing[0]!r}")
    else:
        kinds = [kind for kind in KINDS if all(name in record for name in kind)]
        if len(kinds) > 1:
            raise RequestError(f"both {' + '.join(kinds[0])} and {' + '.join(kinds[1])}; choose with columns")
        if not kinds:
            has = ", ".join(map(repr, list(record)[:_SHOWN])) or "nothing"
            raise RequestError(f"neither text nor prompt + response nor messages; it has {has}")
        names = {name: name for name in kinds[0]}
    if "messages" in names:
        return _chat(record[names["messages"]])
    texts = [_text(record[column], what=column) for column in names.values()]
    if "text" in names:
        return Document(texts[0])
    by_name = dict(zip(names, texts, strict=True))
    return Pair(by_name["prompt"], by_name["response"])


def _chat(messages: object) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages")
    turns = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise RequestError(f"message {place} is not an object with role and content")
        role, content = (_text(message.get(name), what=f"{name} of message {place}") for name in ("role", "content"))
        turns.append(Turn(role, content))
    if all(turn.role != "assistant" for turn in turns):
        raise RequestError("no message is the assistant's, so there is nothing to learn")
    return Chat(tuple(turns))


def _text(value: object, *, what: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{what} is {'missing' if value is None else f'a {type(value).__name__}'} instead of text")
    if not value.strip():
        raise RequestError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} has half of a surrogate pair at letter {error.start + 1}") from error
    return value
