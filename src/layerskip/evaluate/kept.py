"""The finished parts of an evaluation that may be interrupted: kept in a file, found again by the same command.

Knows files, and what makes two evaluations the same: model, task and settings. Does not know how to evaluate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerskip import __version__
from layerskip.errors import RequestError
from layerskip.evaluate import record
from layerskip.evaluate.tasks import Task
from layerskip.llm import LLM


class Kept:
    """Finished parts by name. They are written at once, so the folder has to be writable from the beginning.

    Args:
        path: the file; a folder that is missing is made.
        same: what has to be equal for a part to be taken up again, as JSON has it.

    Raises:
        RequestError: the file holds parts of something else.
        StorageError: the place cannot be written.

    Attributes:
        resumed: whether parts of an earlier run were found.
    """

    def __init__(self, path: Path, *, same: Mapping[str, Any]) -> None:
        self._path, self._same = path, json.loads(json.dumps(same))
        found = _read(path)
        if found is not None and found.get("same") != self._same:
            raise RequestError(
                f"{path} is what is left of another model, task or setting; choose another --output, or delete it"
            )
        self._parts: dict[str, Any] = {} if found is None else found["parts"]
        self.resumed = bool(self._parts)
        self._write()

    def get(self, name: str) -> Any | None:
        """A part; None where it is still to be done."""
        return self._parts.get(name)

    def put(self, name: str, part: Mapping[str, Any]) -> None:
        """Keeps a part. Raises StorageError where it cannot be written."""
        self._parts[name] = part
        self._write()

    def close(self) -> None:
        """Leaves no file behind that holds nothing."""
        if not self._parts:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        record.write(self._path, {"kind": "unfinished", "same": self._same, "parts": self._parts})


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = record.read(path)
    except RequestError:  # of something else, or cut short: there is nothing to take up
        return {"same": None, "parts": {}}
    return found if isinstance(found.get("parts"), dict) else {"same": None, "parts": {}}


def identity(llm: LLM, task: Task, **settings: Any) -> dict[str, Any]:
    """What two evaluations have in common where parts of one serve the other.

    Args:
        llm: the model; its weights are told apart by some numbers of every tensor.
        task: its items, all of them.
        settings: whatever else changes what is measured, as JSON has it.
    """
    return {
        "layerskip": __version__,
        "model": llm.name,
        "dtype": str(llm.decoder.dtype),
        "layout": llm.decoder.layout,
        "device": str(llm.decoder.device),
        "weights": record.weights_digest(llm.decoder),
        "task": task.name,
        "items": record.digest(asdict(item) for item in task.items),
        "max_tokens": task.max_tokens,
        "stop": list(task.stop),
        **settings,
    }
