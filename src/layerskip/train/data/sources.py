"""Where examples come from: text files, jsonl, TOPv2 tables, data sets of the hub.

Knows file formats, what makes a row malformed, and how to say where it is. Does not know tokens.

A malformed row is an error that names file and line; with `skip_bad` it is left out and counted. A file that cannot be
read at all is always an error.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerskip.errors import RequestError, suggest
from layerskip.train.data.examples import Example, digest
from layerskip.train.data.records import FIELDS, KINDS, Bad, Found, json_rows, record_example, table_rows, text_rows

Format = Literal["text", "jsonl", "topv2"]

_FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".tsv": "topv2"}
_SHOWN = 5  # malformed rows in a message


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to read. Either `files` or `hub`.

    Args:
        files: paths or patterns (``**`` for any depth), one or several; a pattern gives its files in sorted order.
        format: of the files; None goes by their names: .txt, .jsonl, .tsv (TOPv2).
        separator: ends a document of a text file; None makes each file one document.
        columns: the record's own names for `text`, for `prompt` and `response`, or for `messages` (jsonl and hub).
        hub: a data set of the hub, or a folder in its layout.
        subset: the configuration of the data set.
        split: the part of the data set.
        revision: the version of the data set.
        streaming: read the data set while training goes on; for `iterate`.

    Raises:
        RequestError: what is given does not go together, or a value is unknown.
    """

    files: str | Sequence[str] = ()
    format: Format | None = None
    separator: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.hub):
            raise RequestError(f"a source has either files or hub, not {'both' if self.hub else 'neither'}; give one")
        if self.files and self.streaming:
            raise RequestError("streaming is for data sets of the hub; leave it out for files")
        if self.hub and (self.format or self.separator):
            raise RequestError("format and separator are for files; name the columns of a data set with columns")
        if self.format is not None and self.format not in _FORMATS.values():
            allowed = ", ".join(_FORMATS.values())
            near = suggest(self.format, _FORMATS.values())
            raise RequestError(f"format {self.format!r} is not one of {allowed}; use one of them{near}")
        if self.separator == "":
            raise RequestError("an empty separator would part every letter; leave it out for one document per file")
        for name in self.columns:
            if name not in FIELDS:
                near = suggest(name, FIELDS)
                raise RequestError(f"columns maps {name!r}; it can map {', '.join(FIELDS)}{near}")
        if self.columns and set(self.columns) not in map(set, KINDS):
            raise RequestError(f"columns maps {', '.join(self.columns)}; map text, or prompt and response, or messages")


@dataclass(frozen=True)
class Reading:
    """What was read.

    Args:
        examples: in the order of the files and of their rows.
        sha256: of each file's bytes, by its path inside the folder that all files share, so that it says nothing about
            the machine; of the examples for a data set of the hub.
        skipped: malformed rows left out.
        complaints: file, line and reason of the first of them.
    """

    examples: list[Example]
    sha256: dict[str, str]
    skipped: int
    complaints: tuple[str, ...]


def read(source: Source, *, skip_bad: bool = False, folder: Path | None = None) -> Reading:
    """Reads all of a source.

    Args:
        source: what to read; not a streaming one.
        skip_bad: leave malformed rows out and count them.
        folder: where relative paths begin; None for the working directory.

    Raises:
        RequestError: a file or data set is missing, of an unknown kind or not readable; rows are malformed and not
            skipped; no examples are left.
    """
    if source.streaming:
        raise RequestError(f"{source.hub} is streamed, so it has no end to wait for; use iterate, or streaming=False")
    examples: list[Example] = []
    bad: list[Bad] = []
    sha256: dict[str, str] = {}
    if source.hub:
        found = _hub_rows(_load(source), source)
    else:
        files = _named(find_files(source, folder=folder))
        found = (row for path, name in files.items() for row in _file_rows(path, source, sha256=sha256, name=name))
    for row in found:
        if isinstance(row, Bad):
            bad.append(row)
        else:
            examples.append(row)
    if bad and not skip_bad:
        raise _malformed(bad, rows=len(bad) + len(examples))
    if not examples:
        raise RequestError(f"there are no examples in {_name(source)}; give files with rows that are not malformed")
    if source.hub:
        sha256[_name(source)] = digest(examples)
    return Reading(examples, sha256, skipped=len(bad), complaints=tuple(map(str, bad[:_SHOWN])))


def iterate(
    source: Source, *, skip_bad: bool = False, seed: int | None = None, buffer: int = 10_000
) -> Iterator[Example]:
    """Reads a data set of the hub row by row, for `StreamedRows`.

    Args:
        source: with `hub`.
        skip_bad: leave malformed rows out.
        seed: shuffles rows within a buffer; None keeps their order. Add the epoch to it.
        buffer: rows of the buffer.

    Raises:
        RequestError: the source has files; the data set is missing; a row is malformed and not skipped.
    """
    if not source.hub:
        raise RequestError("only a data set of the hub can be iterated; use read for files")
    data = _load(source)
    if seed is not None:
        data = data.shuffle(seed=seed, buffer_size=buffer) if source.streaming else data.shuffle(seed=seed)
    for row in _hub_rows(data, source):
        if not isinstance(row, Bad):
            yield row
        elif not skip_bad:
            raise _malformed([row], rows=None)


def find_files(source: Source, *, folder: Path | None = None) -> list[Path]:
    """The files of a source, each once.

    Args:
        source: with `files`.
        folder: where relative paths begin; None for the working directory.

    Raises:
        RequestError: a path or pattern finds nothing.
    """
    found: dict[Path, None] = {}
    for pattern in [source.files] if isinstance(source.files, str) else source.files:
        whole = str((folder or Path()) / Path(pattern).expanduser())
        # A name with brackets in it is a name before it is a pattern.
        paths = [whole] if Path(whole).is_file() else sorted(glob.glob(whole, recursive=True))
        files = [Path(path) for path in paths if Path(path).is_file()]
        if not files:
            raise RequestError(f"no file matches {pattern!r} in {(folder or Path()).resolve()}; check the path")
        found |= dict.fromkeys(files)
    return list(found)


def _malformed(bad: Sequence[Bad], *, rows: int | None) -> RequestError:
    shown = "; ".join(map(str, bad[:_SHOWN])) + ("; ..." if len(bad) > _SHOWN else "")
    count = "a row is malformed" if rows is None else f"{len(bad):,} of {rows:,} rows are malformed"
    return RequestError(f"{count}: {shown}; mend them, or leave them out with --skip-bad (skip_bad=True)")


def _name(source: Source) -> str:
    if not source.hub:
        return source.files if isinstance(source.files, str) else ", ".join(source.files)
    parts = [source.hub, *([source.subset] if source.subset else []), source.split]
    return ":".join(parts) + (f"@{source.revision}" if source.revision else "")


def _named(files: Sequence[Path]) -> dict[Path, str]:
    """Each file's path inside the folder that they share."""
    whole = [os.path.abspath(path) for path in files]
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return {path: Path(os.path.relpath(each, shared)).as_posix() for path, each in zip(files, whole, strict=True)}


def _file_rows(path: Path, source: Source, *, sha256: dict[str, str], name: str) -> Iterator[Found]:
    kind = source.format or _FORMATS.get(path.suffix.lower())
    if kind is None:
        endings, kinds = ", ".join(_FORMATS), ", ".join(_FORMATS.values())
        raise RequestError(f"{path} has none of the endings {endings}; give its format, one of {kinds}")
    if (source.separator and kind != "text") or (source.columns and kind != "jsonl"):
        raise RequestError(f"{path} is read as {kind}; separator is for text files, columns for jsonl")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    sha256[name] = hashlib.sha256(raw).hexdigest()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if kind == "text":
        yield from text_rows(path, raw, separator=source.separator)
    elif kind == "jsonl":
        yield from json_rows(path, raw, columns=source.columns)
    else:
        yield from table_rows(path, raw)


def _load(source: Source) -> Any:  # a Dataset, or an IterableDataset; datasets has no annotations
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise RequestError("reading a data set needs the datasets package; pip install 'layerskip[train]'") from error
    unavailable = (OSError, ValueError, datasets.exceptions.DatasetsError)
    try:
        return datasets.load_dataset(
            source.hub, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except unavailable as error:
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise RequestError(f"the data set {_name(source)} cannot be loaded: {reason}; check its name") from error


def _hub_rows(data: Any, source: Source) -> Iterator[Found]:
    for number, record in enumerate(data, start=1):
        try:
            yield record_example(record, source.columns)
        except RequestError as error:
            yield Bad(f"{_name(source)} row {number}", str(error))
