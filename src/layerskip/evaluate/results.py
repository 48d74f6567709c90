"""The record of a benchmark as it grows: kept after every repeat, gone on with by the same command.

Knows the record and its file. Does not know how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerskip.errors import RequestError
from layerskip.evaluate.bandwidth import Bandwidth
from layerskip.evaluate.bench import cells
from layerskip.evaluate.cell import Cell, Contender, Measured
from layerskip.evaluate.record import read, write

FILE = "bench.json"
"""Its name in the folder of results."""


@dataclass
class Round:
    """What is finished of a batch size.

    Args:
        batch: rows side by side.
        who: takes part.
        repeats: runs by name.
    """

    batch: int
    who: list[Contender]
    repeats: list[dict[str, Measured]] = field(default_factory=list)


class Results:
    """A benchmark, finished or not.

    Args:
        head: what it was run on and how: `record.about` and "settings", with "batch" and "repeat" in it.
        bandwidth: of this machine.
        path: where it is kept; None keeps it nowhere.
    """

    def __init__(self, head: Mapping[str, Any], bandwidth: Bandwidth, path: Path | None = None) -> None:
        self.head, self.bandwidth, self.path = head, bandwidth, path
        self.notes: list[str] = []
        self.rounds: dict[int, Round] = {}

    @property
    def finished(self) -> bool:
        """Whether every batch size has all its repeats."""
        settings = self.head["settings"]
        return all(self.repeats(batch) == settings["repeat"] for batch in settings["batch"])

    def repeats(self, batch: int) -> int:
        """Repeats of a batch size that are there."""
        return len(self.rounds[batch].repeats) if batch in self.rounds else 0

    def add(self, batch: int, who: Sequence[Contender], runs: dict[str, Measured]) -> None:
        """Takes a finished repeat in, and keeps it. Raises StorageError where it cannot be written."""
        self.rounds.setdefault(batch, Round(batch, list(who))).repeats.append(runs)
        self.keep()

    def note(self, text: str) -> bool:
        """Notes what was left out and why; False where that is known already."""
        if text in self.notes:
            return False
        self.notes.append(text)
        return True

    def cells(self) -> list[Cell]:
        """The figures so far, of all batch sizes."""
        speed = self.bandwidth.bytes_per_second
        return [
            cell
            for round in self.rounds.values()
            for cell in cells(round.who, round.repeats, batch=round.batch, bandwidth=speed)
        ]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON; "unfinished" holds single runs as long as some are to come."""
        whole = {
            **self.head,
            "bandwidth": self.bandwidth.record(),
            "notes": self.notes,
            "cells": [cell.record() for cell in self.cells()],
        }
        return whole if self.finished else {**whole, "unfinished": [asdict(round) for round in self.rounds.values()]}

    def keep(self) -> None:
        """Writes it. Raises StorageError where that cannot be done."""
        if self.path is not None:
            write(self.path, self.record())


@dataclass(frozen=True)
class Found:
    """A record that lies in the folder of results.

    Args:
        record: as it was written.
        path: where.
    """

    record: dict[str, Any]
    path: Path

    @property
    def finished(self) -> bool:
        """Whether nothing is left to measure."""
        return "unfinished" not in self.record

    def results(self) -> Results:
        """An unfinished one, to go on with: the bandwidth is the one it began with."""
        head = {key: self.record[key] for key in HEAD if key in self.record}
        results = Results(head, Bandwidth(**self.record["bandwidth"]), self.path)
        results.notes = list(self.record["notes"])
        for round in self.record["unfinished"]:
            repeats = [{name: Measured(**run) for name, run in runs.items()} for runs in round["repeats"]]
            results.rounds[round["batch"]] = Round(round["batch"], [Contender(**who) for who in round["who"]], repeats)
        return results


HEAD = ("kind", "command", "commit", "versions", "machine", "model", "settings")
"""What two runs must have in common to be one: figures of two machines or two states of the code do not mix."""


def find(folder: Path, head: Mapping[str, Any]) -> Found | None:
    """What an earlier run of the same command left in a folder; None where there is nothing.

    Args:
        folder: of results.
        head: of the run that is asked for.

    Raises:
        RequestError: the record there is of another run, or none that can be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    record = read(path)
    for key in HEAD:
        if record.get(key) != head[key]:
            what = "kind of record" if key == "kind" else {"machine": "machine or number of threads"}.get(key, key)
            raise RequestError(
                f"{path} was measured with another {what}; choose another --output, or delete it to measure anew"
            )
    return Found(record, path)
