"""What a checkpoint says about itself: `layerskip` in its config.json, written by training and tuning."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerskip.decode.drafters.early_exit import HEADS
from layerskip.errors import CheckpointError, StorageError
from layerskip.model.checkpoint import read_config, read_json

RANKED = "draft_vocabulary.json"
"""A file beside config.json, {"ranked": token ids, the most frequent first}."""

_OURS = ("exit", "draft_tokens", "confidence", "draft_vocabulary", "draft_head")


@dataclass(frozen=True)
class Recommended:
    """The draft that was measured to be best for a checkpoint.

    Args:
        exit: E, layers that draft.
        draft_tokens: K.
        confidence: a draft ends after the first token that the exit is less sure of; None never ends it.
        acceptance: by exit, the share of drafted tokens that were kept, as far as somebody measured it: what
            `--draft auto` begins with.
        vocabulary: N, propose only so many tokens; None is all.
        ranked: tokens by frequency for that, the likeliest first.
        head: "own", or "int8": draft through a copy of the head at 8 bits, where weights are native.
    """

    exit: int
    draft_tokens: int
    confidence: float | None = None
    acceptance: Mapping[int, float] = field(default_factory=dict)
    vocabulary: int | None = None
    ranked: Sequence[int] = ()
    head: str = "own"


def recommended(folder: Path) -> Recommended | None:
    """Reads it; None where a checkpoint recommends nothing.

    Raises:
        CheckpointError: what is there is not an exit, a number of tokens and, where there are such, a probability and a
            number of tokens to propose or a head; or `RANKED` holds no token ids.
    """
    settings = read_config(folder).get("layerskip")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}/config.json: layerskip is {settings!r}; it must be an object, or left out")
    if settings.get("exit") is None and settings.get("draft_tokens") is None:
        return None
    return Recommended(
        _count(settings, "exit", folder),
        _count(settings, "draft_tokens", folder),
        _confidence(settings, folder),
        _acceptance(settings),
        None if settings.get("draft_vocabulary") is None else _count(settings, "draft_vocabulary", folder),
        _ranked(folder),
        _head(settings, folder),
    )


def recommend(folder: Path, draft: Recommended | None, *, quality: Mapping[str, Any]) -> None:
    """Writes what a checkpoint recommends into its config.json, whole or not at all; all else there stays.

    Args:
        folder: the checkpoint.
        draft: what it recommends from now on; None takes back what it recommended before.
        quality: figures by exit, added to those that are there.

    Raises:
        CheckpointError: there is no config.json, or its `layerskip` is not an object.
        StorageError: it cannot be written; it is as it was.
    """
    config = read_config(folder)
    settings = config.get("layerskip") or {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}/config.json: layerskip is {settings!r}; it must be an object, or left out")
    kept = {key: value for key, value in settings.items() if key not in _OURS}
    if draft is not None:
        head = None if draft.head == "own" else draft.head
        ours = (draft.exit, draft.draft_tokens, draft.confidence, draft.vocabulary, head)
        kept |= {key: value for key, value in zip(_OURS, ours, strict=True) if value is not None}
    kept["quality"] = {**(settings.get("quality") or {}), **quality}
    if draft is not None and draft.ranked:
        _write(folder / RANKED, json.dumps({"ranked": list(draft.ranked)}))
    _write(folder / "config.json", json.dumps({**config, "layerskip": kept}, indent=2))
    if draft is None or not draft.ranked:
        (folder / RANKED).unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; it is as it was: copy the checkpoint to another place"
        ) from error


def _ranked(folder: Path) -> tuple[int, ...]:
    path = folder / RANKED
    if not path.exists():
        return ()
    ids = read_json(path).get("ranked")
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(
            f"{path} has no list of token ids under ranked; write it anew with layerskip tune --save, or delete it"
        )
    return tuple(ids)


def _count(settings: dict[str, Any], name: str, folder: Path) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{folder}/config.json: layerskip.{name} is {value!r}; it must be a whole number from 1 on"
        )
    return value


def _confidence(settings: dict[str, Any], folder: Path) -> float | None:
    value = settings.get("confidence")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise CheckpointError(
            f"{folder}/config.json: layerskip.confidence is {value!r}; it must be a number above 0 and at most 1"
        )
    return float(value)


def _head(settings: dict[str, Any], folder: Path) -> str:
    value = settings.get("draft_head")
    if value is None:
        return "own"
    if value not in HEADS:
        raise CheckpointError(
            f"{folder}/config.json: layerskip.draft_head is {value!r}; it must be {' or '.join(HEADS)}, or left out"
        )
    if value == "int8" and settings.get("draft_vocabulary") is not None:
        raise CheckpointError(
            f"{folder}/config.json: layerskip has both a draft_vocabulary and a draft_head of 8 bits; leave one out"
        )
    return str(value)


def _acceptance(settings: dict[str, Any]) -> dict[int, float]:
    """Rates by exit: along the model's own texts where it was tuned, else along the data it was trained on. They only
    hint, so what is no rate is passed over."""
    quality = settings.get("quality")
    found: dict[int, float] = {}
    for kind in ("agreement", "own_agreement"):  # the second is what counts
        for name, value in quality.items() if isinstance(quality, dict) else ():
            what, _, exit = str(name).partition("/")
            if what == kind and exit.isdecimal() and isinstance(value, int | float) and 0 <= value <= 1:
                found[int(exit)] = float(value)
    return found
