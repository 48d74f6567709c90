"""TOPv2: utterances are parsed into frames.

Source: Chen et al., "Low-Resource Domain Adaptation for Compositional Task-Oriented Semantic Parsing", EMNLP 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from layerskip.errors import RequestError
from layerskip.evaluate.tasks.files import find_files, read_bytes
from layerskip.evaluate.tasks.task import Item, Task
from layerskip.frames import exact_match, table_rows, template, well_formed

UNSEEN = "unseen"


def topv2(files: str | Path, *, seen: str | Path | None = None, max_tokens: int = 256) -> Task:
    """The utterance is the prompt, its frame the answer.

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


def _pairs(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Utterances and frames."""
    for path in files:
        for number, found in table_rows(read_bytes(path), name=str(path)):
            if isinstance(found, RequestError):
                raise RequestError(f"{path}:{number} is malformed: {found}") from found
            yield found
