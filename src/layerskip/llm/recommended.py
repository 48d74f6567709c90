"""What a checkpoint says about itself: `layerskip` in its config.json, written by training and tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import CheckpointError
from layerskip.model.checkpoint import read_config


@dataclass(frozen=True)
class Recommended:
    """The draft that was measured to be best for a checkpoint.

    Args:
        exit: E, layers that draft.
        draft_tokens: K.
    """

    exit: int
    draft_tokens: int


def recommended(folder: Path) -> Recommended | None:
    """Reads it; None where a checkpoint recommends nothing.

    Raises:
        CheckpointError: what is there is not an exit and a number of tokens.
    """
    settings = read_config(folder).get("layerskip")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}/config.json: layerskip is {settings!r}; it must be an object, or left out")
    if settings.get("exit") is None and settings.get("draft_tokens") is None:
        return None
    return Recommended(_count(settings, "exit", folder), _count(settings, "draft_tokens", folder))


def _count(settings: dict[str, Any], name: str, folder: Path) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{folder}/config.json: layerskip.{name} is {value!r}; it must be a whole number from 1 on"
        )
    return value
