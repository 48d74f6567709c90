"""The record of a training: what was run, on what, with which versions.

Written when a run begins, completed when it ends; lies beside the weights as `provenance.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerskip.errors import RequestError
from layerskip.train.saving import replace_text

NAME = "provenance.json"


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / NAME, json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> dict[str, Any] | None:
    """What is written there; None where nothing is.

    Raises:
        RequestError: it is not what `write` writes.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}; remove it, or choose another output_dir") from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise RequestError(f"{path} was not written by layerskip train; choose another output_dir")
    return content
