"""Prompts from the command line, standard input and files. Knows bytes and text; knows no tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from layerskip.errors import RequestError

FIELDS = ("prompt", "text", "utterance", "question")
"""Where a line of a .jsonl may have its prompt."""

File = Annotated[Path | None, Option("--file", metavar="FILE", help="Read it from a file (UTF-8).", show_default=False)]


def text_argument(what: str) -> object:
    """The positional text of a command: `what`, or "-"."""
    return Argument(metavar=f"{what} | -", help="The text; - reads standard input.", show_default=False)


def read_text(text: str | None, file: Path | None, *, what: str = "prompt") -> str | None:
    """The text given, of standard input for "-", or of a file; None where there is none.

    One newline at the end of standard input or of a file ends its last line and is no part of the text.

    Raises:
        RequestError: both are given, the file cannot be read, or it is not UTF-8.
    """
    if text is not None and file is not None:
        raise RequestError(f"both a {what} and --file are given; use one of them")
    if text == "-":
        return without_newline(decode(sys.stdin.buffer.read(), "standard input"))
    return text if file is None else without_newline(read_file(file))


def read_file(file: Path) -> str:
    """A whole UTF-8 file. Raises RequestError where it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error
    return decode(data, str(file))


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file: in a .jsonl the first of `FIELDS` in each line, else each line that is not blank.

    Raises:
        RequestError: it cannot be read, a line of a .jsonl has no prompt, or there are none.
    """
    lines = [(number, line) for number, line in enumerate(read_file(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise RequestError(f"{file} holds no prompts; give one in each line")
    if file.suffix == ".jsonl":
        return [_field(line, f"{file}, line {number}") for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def _field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end, too
        raise RequestError(f"{where} is not JSON: {error}") from error
    found = [record[key] for key in FIELDS if key in record] if isinstance(record, dict) else []
    if not found or not isinstance(found[0], str):
        names = " or ".join(f'"{name}"' for name in FIELDS)
        raise RequestError(f"{where} has no prompt; it must be an object with a text under {names}")
    return found[0]


def decode(data: bytes, source: str) -> str:
    """UTF-8 bytes as text. Raises RequestError that names the byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start} "
            f"({error.reason}); convert it, with iconv, say"
        ) from error


def without_newline(text: str) -> str:
    """`text` without the one newline that ends its last line."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
