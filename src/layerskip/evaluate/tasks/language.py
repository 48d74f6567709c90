"""Language modelling: texts whose every token is predicted, at every exit. Nothing is generated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from layerskip.errors import RequestError
from layerskip.evaluate.tasks.files import Hub, find_files, hub_rows, named, on_hub, read_text, records
from layerskip.evaluate.tasks.task import Item, Task

_END = "<|endoftext|>"  # parts the documents of a text file where it occurs
_PIECE = 16_384  # letters of an item at most, so that a limit can spread over a long text


def lm(files: str | Path) -> Task:
    """Texts: each text file is one, or several that ``<|endoftext|>`` parts; so is each `text` of JSON lines.

    Args:
        files: text files or JSON lines (a file, a folder, which means its ``*.txt``, a pattern), or "hub" for
            Salesforce/wikitext wikitext-2-raw-v1, whose rows are read as one text.

    Raises:
        RequestError: the data are missing or malformed, or hold no text.
    """
    items = tuple(Item(piece) for text in _texts(files) for piece in _pieces(text) if piece.strip())
    if not items:
        raise RequestError(f"{files} holds no text; give at least two tokens of it")
    return Task("lm", items, None, 0, generates=False)


def _texts(files: str | Path) -> Iterator[str]:
    if on_hub(files):
        data = named(str(files), default=Hub("Salesforce/wikitext", "wikitext-2-raw-v1"))
        yield "".join(str(row.values.get("text") or "") for row in hub_rows(data))
        return
    for path in find_files(files, inside="*.txt"):
        if path.suffix == ".jsonl":
            yield from (row.text("text") for row in records(path))
        else:
            yield from (text.strip("\r\n") for text in read_text(path).split(_END))


def _pieces(text: str) -> Iterator[str]:
    """Parts of a text, cut behind the last line, or else letter, that fits."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.rfind("\n", begin, begin + _PIECE) + 1
        end = end if end > begin else begin + _PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]
