"""Tasks: prompts with their answers, and how a text is scored against one.

Knows files and texts. Does not know models, nor how the texts come about.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from layerskip.errors import RequestError, check_whole, suggest
from layerskip.frames import exact_match, table_rows, template, well_formed

Scorer = Callable[[str, str], Mapping[str, float]]
"""(text, answer) -> metrics by name, the same names for every text; a share is 0 or 1."""

UNSEEN = "unseen"


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        prompt: what the model continues.
        answer: what it should continue with.
        groups: parts of the task it belongs to, which are also scored apart, such as "unseen".
    """

    prompt: str
    answer: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Questions, and how their answers are scored.

    Args:
        name: what reports call it.
        items: at least one.
        scorer: scores a text against an answer.
        max_tokens: tokens generated for each item at most.
        stop: strings that end a text.

    Raises:
        RequestError: there are no items.
    """

    name: str
    items: tuple[Item, ...]
    scorer: Scorer
    max_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise RequestError(f"task {self.name} has no items; give at least one")

    def limited(self, count: int) -> Task:
        """The task with so many of its items, spread evenly over all of them; all where it has no more.

        Raises:
            RequestError: fewer than one item.
        """
        check_whole("limit", count)
        if count < 1:
            raise RequestError(f"limit {count} is not possible; use 1 or more items")
        total = len(self.items)
        kept = min(count, total)
        return replace(self, items=tuple(self.items[i * total // kept] for i in range(kept)))


class Maker(Protocol):
    """Makes a task of files."""

    def __call__(self, files: str | Path, *, seen: str | Path | None = None) -> Task:
        """Reads the task. Raises RequestError where the files are missing or malformed."""
        ...


def find_task(name: str) -> Maker:
    """What makes the task of this name.

    Raises:
        RequestError: there is no such task.
    """
    if name not in _MAKERS:
        raise RequestError(f"unknown task {name!r}; use {', '.join(_MAKERS)}{suggest(name, _MAKERS)}")
    return _MAKERS[name]


# --- TOPv2


def topv2(files: str | Path, *, seen: str | Path | None = None, max_tokens: int = 256) -> Task:
    """TOPv2: the utterance is the prompt, its frame the answer.

    Args:
        files: a table (domain, utterance and semantic_parse parted by tabs, with a header), a folder, which means its
            ``*_eval.tsv``, or a pattern.
        seen: the tables that were trained on, a folder meaning its ``*_train.tsv``: pairs of utterance and frame that
            are not among them are the group "unseen".
        max_tokens: tokens generated for each item at most; the longest published frame has 55 words.

    Raises:
        RequestError: nothing is found, a file cannot be read, or a line is malformed; names file and line.
    """
    known = None if seen is None else set(_pairs(find_files(seen, inside="*_train.tsv")))
    items = []
    for utterance, frame in _pairs(find_files(files, inside="*_eval.tsv")):
        unseen = known is not None and (utterance, frame) not in known
        items.append(Item(utterance, frame, (UNSEEN,) if unseen else ()))
    if not items:
        raise RequestError(f"{files} holds no utterances; give tables with lines below their header")
    return Task("topv2", tuple(items), score_frame, max_tokens)


def score_frame(text: str, answer: str) -> dict[str, float]:
    """1 or 0 for each: the whole frame is right, its intents and slots are, it can be read at all."""
    readable = well_formed(text)
    return {
        "exact_match": float(exact_match(text, answer)),
        "template_match": float(readable and template(text) == template(answer)),
        "well_formed": float(readable),
    }


def find_files(files: str | Path, *, inside: str) -> list[Path]:
    """The files that a path, a folder or a pattern means, in sorted order.

    Args:
        files: what is looked for.
        inside: the pattern of a folder's files.

    Raises:
        RequestError: there are none.
    """
    path = Path(files).expanduser()
    if path.is_file():  # a name with brackets in it is a name before it is a pattern
        return [path]
    pattern = f"{glob.escape(str(path))}/{inside}" if path.is_dir() else str(path)
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        what = f"no {inside} in {path}" if path.is_dir() else f"no file matches {path}"
        raise RequestError(f"{what}; give a file, a folder with {inside}, or a pattern")
    return found


def _pairs(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Utterances and frames."""
    for path in files:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from error
        for number, found in table_rows(raw, name=str(path)):
            if isinstance(found, RequestError):
                raise RequestError(f"{path}:{number} is malformed: {found}") from found
            yield found


_MAKERS: dict[str, Maker] = {"topv2": topv2}
