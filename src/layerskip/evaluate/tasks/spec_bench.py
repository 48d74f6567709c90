"""Spec-Bench: questions of many kinds, to measure speed by kind. Nothing is scored.

Source: Xia et al., "Unlocking Efficiency in Large Language Model Inference: A Comprehensive Survey of Speculative
Decoding", ACL 2024 Findings.
"""

from __future__ import annotations

from pathlib import Path

from layerskip.errors import RequestError
from layerskip.evaluate.tasks.files import records
from layerskip.evaluate.tasks.task import Item, Task


def spec_bench(files: str | Path) -> Task:
    """Rows with `turns`, of which the first is the prompt, as it is, and `category`, which is the group.

    Args:
        files: JSON lines (a file, a folder, a pattern), or hub:NAME.

    Raises:
        RequestError: the data are missing or malformed.
    """
    items = []
    for row in records(files):
        turns = row.texts("turns")
        if not turns or not turns[0].strip():
            raise RequestError(f"{row.where} has no 'turns'; give it a list of texts")
        items.append(Item(turns[0], groups=(row.text("category"),)))
    return Task("spec_bench", tuple(items), None, 512)
