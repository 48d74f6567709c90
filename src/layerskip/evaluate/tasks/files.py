"""Where items come from: files, folders and patterns of this machine, data sets of the hub.

Knows rows and their fields. Does not know what a task makes of them.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import RequestError

HUB = "hub"


@dataclass(frozen=True)
class Hub:
    """A data set of the hub, or a folder in its layout.

    Args:
        name: its id.
        subset: its configuration.
        split: the part of it.
    """

    name: str
    subset: str | None = None
    split: str = "test"

    def __str__(self) -> str:
        return ":".join(part for part in (HUB, self.name, self.subset, self.split) if part)


@dataclass(frozen=True)
class Record:
    """A row.

    Args:
        where: its file and line, or its data set and number.
        values: its fields.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The text under the first of these names that the row has. Raises RequestError where there is none."""
        found = self.optional(*names)
        if found is None:
            raise RequestError(f"{self.where} has no {' or '.join(map(repr, names))}; give it a text under that name")
        return found

    def optional(self, *names: str) -> str | None:
        """The same; None where the row has none of these names."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{self.where}: {name!r} is {value!r}; give it a text")
            return value
        return None

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a list; none where the row has no such list. Raises RequestError where it is something else."""
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise RequestError(f"{self.where}: {name!r} is {value!r}; give it a list of texts")
        return tuple(value)


def records(data: str | Path, *, hub: Hub | None = None) -> Iterator[Record]:
    """The rows of some data.

    Args:
        data: a file, a folder or a pattern of JSON lines, or "hub", "hub:NAME", "hub:NAME:SPLIT",
            "hub:NAME:SUBSET:SPLIT".
        hub: what "hub" alone means, and the split of "hub:NAME".

    Raises:
        RequestError: nothing is found, a file cannot be read, a line is no JSON object, or there are no rows.
    """
    found = hub_rows(named(str(data), default=hub)) if on_hub(data) else _lines(find_files(data, inside="*.jsonl"))
    empty = True
    for record in found:
        yield record
        empty = False
    if empty:
        raise RequestError(f"{data} holds no rows; give at least one")


def on_hub(data: str | Path) -> bool:
    """Whether it names a data set of the hub."""
    return isinstance(data, str) and data.partition(":")[0] == HUB


def named(words: str, *, default: Hub | None) -> Hub:
    """The data set that "hub" or "hub:NAME:SUBSET:SPLIT" names; "hub:NAME:SPLIT" has no subset.

    Raises:
        RequestError: it names none, and there is no default.
    """
    _, *parts = words.split(":")
    if not any(parts):
        if default is None:
            raise RequestError("this task has no data set on the hub; give a file, or hub:NAME")
        return default
    if len(parts) > 3 or not all(parts):
        raise RequestError(f"{words} is not possible; use hub:NAME, hub:NAME:SPLIT or hub:NAME:SUBSET:SPLIT")
    if len(parts) == 1:
        return Hub(parts[0], default.subset if default and default.name == parts[0] else None)
    return Hub(parts[0], parts[1] if len(parts) == 3 else None, parts[-1])


def hub_rows(data: Hub) -> Iterator[Record]:
    """The rows of a data set. Raises RequestError where it cannot be loaded."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise RequestError("reading a data set needs the datasets package; pip install 'layerskip[eval]'") from error
    try:
        rows = datasets.load_dataset(data.name, data.subset, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise RequestError(f"the data set {data} cannot be loaded: {reason}; check its name, or give a file") from error
    for number, row in enumerate(rows, start=1):
        yield Record(f"{data} row {number}", row)


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


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises RequestError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """A whole UTF-8 file. Raises RequestError where it cannot be read, or is something else."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert it") from error


def _lines(files: list[Path]) -> Iterator[Record]:
    for path in files:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise RequestError(f"{path}:{number} is a JSON {type(values).__name__}; give an object in each line")
            yield Record(f"{path}:{number}", values)
