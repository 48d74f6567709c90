"""Results as files: one JSON object each, with everything that is needed to repeat its figures.

Knows the machine, the model and folders. Does not know what was measured: that is the `kind` of a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerskip import environment
from layerskip.errors import RequestError, StorageError
from layerskip.llm import LLM
from layerskip.model.decoder import Decoder
from layerskip.model.quantise import note

_LOOKED_AT = 64  # numbers of each tensor


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times.

    Args:
        median: of the runs.
        low: the least of them.
        high: the most of them.
        runs: as measured, in order.
    """

    median: float
    low: float
    high: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """The spread of at least one run.

        Example:
            >>> Spread.of([2.0, 4.0, 3.0])
            Spread(median=3.0, low=2.0, high=4.0, runs=(2.0, 4.0, 3.0))
        """
        return cls(statistics.median(runs), min(runs), max(runs), tuple(runs))

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def digest(values: Iterable[Any]) -> str:
    """What stands for values that a record does not hold: 16 hexadecimal digits."""
    return hashlib.sha256(repr(list(values)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def weights_digest(decoder: Decoder) -> str:
    """A few numbers of every weight, hashed: another training at the same place is another model."""
    found = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten()[:_LOOKED_AT].double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def about(kind: str, llm: LLM) -> dict[str, Any]:
    """What every record begins with: its kind, the command, the machine, the versions and the model.

    Args:
        kind: "bench", "tune" or "eval".
        llm: what is measured.
    """
    shape = llm.decoder.shape
    return {
        "kind": kind,
        "command": environment.command_line(),
        "commit": environment.revision(),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "model": {
            "name": llm.name,
            "parameters": shape.parameters()["total"],
            "layers": shape.layers,
            "width": shape.width,
            "vocabulary": shape.vocab,
            "context": shape.context,
            "dtype": str(llm.decoder.dtype).removeprefix("torch."),
            "layout": llm.decoder.layout,
            "compiled": None if llm.decoder.compiled is None else str(llm.decoder.compiled),
            "device": str(llm.decoder.device),
        },
    }


def held_as(model: Mapping[str, Any]) -> str:
    """How a record's model was held, for people: its dtype, and its weights where they are not the checkpoint's."""
    lossy = note(str(model.get("layout")))
    return f"{model['dtype']}, {model['layout']} weights{lossy}" if lossy else str(model["dtype"])


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record whole or not at all, making its folder.

    Raises:
        StorageError: the place cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def make_folder(folder: Path) -> None:
    """Makes a folder for records, and tries to write there: better now than after hours of measuring.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}; choose another place") from error


def read(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        RequestError: there is none, or it is not one.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "kind" not in content:
        raise RequestError(f"{path} is not a record of layerskip; give one that bench, tune or eval wrote")
    return content


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises RequestError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}; repair it, or move it away") from error
