"""What a record says, in the shape in which it is drawn and tabled: lines, bars, splits and maps.

Knows the records of bench, tune and eval. Does not know how a figure or a page looks: both are made of what is here, so
no number is in a figure that is not in its table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.evaluate.record import held_as

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A figure at a place, with what it may as well be: a standard error around it, or the runs' range."""

    x: int
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Lines:
    """Figures over a whole number.

    Args:
        title: what is shown.
        x: what the whole numbers are.
        y: what the figures are, with their unit.
        lines: points by name, in the order of x.
        share: whether figures are shares, to be written in percent.
        spread: what low and high mean; "" where they are the figure itself.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]
    share: bool
    spread: str = ""


@dataclass(frozen=True)
class Bar:
    """A way of decoding at a batch size."""

    name: str
    batch: int
    peer: bool
    decode: tuple[float, float, float] | None
    end_to_end: tuple[float, float, float] | None


def fastest(bars: Sequence[Bar], count: int) -> list[str]:
    """The names of the ways with the best medians at any batch size, as many as asked for, in the bars' order."""
    best: dict[str, float] = {}
    for bar in bars:
        for spread in (bar.decode, bar.end_to_end):
            if spread is not None:
                best[bar.name] = max(best.get(bar.name, 0.0), spread[0])
    kept = sorted(best, key=lambda name: -best[name])[:count]
    return [name for name in best if name in kept]


@dataclass(frozen=True)
class Split:
    """Where the seconds of a way of decoding went."""

    name: str
    batch: int
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """A setting of a drafter, and what it gains.

    Args:
        exit: E.
        draft_tokens: K.
        confidence: below it a draft ends; None never ends one.
        predicted: speedup of the cost model; None where it was only measured.
        measured: median, low and high of the measured speedup; None where it was only predicted.
        tokens_per_round: as measured, else as predicted.
        recommended: whether it is the one that is recommended.
    """

    exit: int
    draft_tokens: int
    confidence: float | None
    predicted: float | None
    measured: tuple[float, float, float] | None
    tokens_per_round: float | None
    recommended: bool

    @property
    def shown(self) -> float:
        """What it is drawn as: measured where it was measured."""
        value = self.predicted if self.measured is None else self.measured[0]
        assert value is not None  # it was one of the two
        return value


def place(record: Record) -> str:
    """The model and the machine, in the few words of a figure's title."""
    model, machine = record["model"], record["machine"]
    device = str(model["device"])
    if device.startswith("cuda") and machine["gpus"]:
        where = str(machine["gpus"][0])
    else:
        short = re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", str(machine["processor"]))
        threads = machine["threads"]
        where = f"{' '.join(short.split())}, {threads} thread{'' if threads == 1 else 's'}"
    name = str(model["name"]).rstrip("/").split("/")[-1]
    return f"{name}, {held_as(model)} · {where}"


# --- by exit


def scores_by_exit(record: Record) -> list[Lines]:
    """The scores of plain decoding and of exits: first those that are shares, then each other metric on its own."""
    found: dict[tuple[str, str], list[Point]] = {}
    for result in record["results"]:
        if result["name"] != "plain" and not str(result["name"]).startswith("exit "):
            continue
        for group, scores in result["scores"].items():
            for metric, score in scores.items():
                if score["mean"] is None:
                    continue
                mean, error = float(score["mean"]), float(score["error"] or 0.0)
                point = Point(result["exit"], mean, mean - error, mean + error)
                found.setdefault((group, metric), []).append(point)
    shares = {key: points for key, points in found.items() if all(0 <= point.y <= 1 for point in points)}
    charts = [_scores(record, "Scores by exit", "share of the items", shares, share=True)] if shares else []
    for metric in dict.fromkeys(metric for key in found if key not in shares for metric in key[1:]):
        lines = {key: points for key, points in found.items() if key[1] == metric and key not in shares}
        charts.append(_scores(record, f"{metric} by exit", metric, lines, share=False))
    return charts


def _scores(record: Record, title: str, y: str, found: Mapping[tuple[str, str], list[Point]], *, share: bool) -> Lines:
    groups = {group for group, _ in found}
    lines = {
        metric if group == "all" or len(groups) == 1 else f"{group}: {metric}": sorted(points, key=lambda p: p.x)
        for (group, metric), points in found.items()
    }
    title = f"{title}: {record['task']}" if record.get("task") else title
    return Lines(title, "exit (layers used)", y, lines, share=share, spread="one standard error")


def loss_by_exit(record: Record) -> Lines | None:
    """The loss of every exit on text; None where none was measured."""
    points = _curve(record, "loss")
    if not points:
        return None
    return Lines("Loss by exit", "exit (layers used)", "nats per token", {"loss": points}, share=False)


def agreement_by_exit(record: Record) -> Lines | None:
    """How often every exit is right, and how often it predicts what the last layer does; None where not measured."""
    lines = {name: points for name in ("accuracy", "agreement") if (points := _curve(record, name))}
    if not lines:
        return None
    title = f"{' and '.join(lines).capitalize()} by exit"
    return Lines(title, "exit (layers used)", "share of the tokens", lines, share=True)


def _curve(record: Record, name: str) -> list[Point]:
    rows = record.get("curves") or record.get("exits") or ()
    known = [(row["exit"], float(row[name])) for row in rows if row.get(name) is not None]
    return [Point(exit, value, value, value) for exit, value in sorted(known)]


# --- acceptance


def acceptance_by_position(record: Record) -> Lines | None:
    """The share of drafted tokens that is accepted, at each position of the draft; None where nothing was drafted.

    Of bench the ways of its smallest batch, of tune every exit.
    """
    lines: dict[str, list[Point]] = {}
    for row in record.get("exits") or ():
        lines[f"exit {row['exit']}"] = _positions(row["rate_by_position"])
    cells = record.get("cells") or ()
    smallest = min((cell["batch"] for cell in cells), default=None)
    for cell in cells:
        counts = cell["acceptance"]
        if counts is not None and cell["batch"] == smallest:
            pairs = zip(counts["accepted_by_position"], counts["drafted_by_position"], strict=True)
            lines[cell["name"]] = _positions([accepted / drafted for accepted, drafted in pairs if drafted])
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    title = "Acceptance by position" + (f", batch {smallest}" if smallest is not None else "")
    return Lines(title, "position in the draft", "accepted of those drafted there", lines, share=True)


def _positions(rates: Iterable[float]) -> list[Point]:
    return [Point(place, rate, rate, rate) for place, rate in enumerate(rates, 1)]


# --- speed


def speedups(record: Record) -> list[Bar]:
    """The speedup of every way but plain decoding, at each batch size."""
    bars = []
    for cell in record["cells"]:
        if speedup := cell.get("speedup"):
            decode, whole = (spread(speedup.get(name)) for name in ("decode", "end_to_end"))
            bars.append(Bar(cell["name"], cell["batch"], bool(cell.get("peer")), decode, whole))
    return bars


def splits(record: Record) -> list[Split]:
    """Where the seconds went, for every way of which that is known."""
    return [
        Split(cell["name"], cell["batch"], {part: float(each["median"]) for part, each in cell["seconds"].items()})
        for cell in record["cells"]
        if cell["seconds"]
    ]


def settings(record: Record) -> list[Cell]:
    """The settings of a tuning, by exit, draft length and confidence."""
    predicted, measured = ({_key(row): row for row in record[name]} for name in ("predicted", "measured"))
    recommended = record.get("recommended")
    chosen = _key(recommended) if recommended and not has_head(recommended) else None
    cells = []
    for key in sorted(predicted.keys() | measured.keys(), key=lambda key: (key[0], key[1], key[2] or 0.0)):
        guess, run = predicted.get(key), measured.get(key)
        expected = guess["speedup"] if guess else run["predicted"] if run else None
        cells.append(
            Cell(
                *key,
                predicted=None if expected is None else float(expected),
                measured=spread(run["speedup"]) if run else None,
                tokens_per_round=(run or guess or {}).get("tokens_per_round"),
                recommended=key == chosen,
            )
        )
    return cells


def setting_of(record: Record) -> tuple[Any, ...]:
    """What makes a setting of a tuning another one."""
    return (*_key(record), record.get("vocabulary"), record.get("head"))


def has_head(setting: Record) -> bool:
    """Whether a setting drafts through fewer tokens, or through a head of 8 bits."""
    return bool(setting.get("vocabulary")) or setting.get("head", "own") != "own"


def best_settings(record: Record) -> list[Cell]:
    """Of the settings of each exit and draft length, which differ in confidence, one: the recommended one, else the
    fastest of those that were measured, and where none was, the fastest as predicted."""
    best: dict[tuple[int, int], Cell] = {}
    for cell in settings(record):
        place = cell.exit, cell.draft_tokens
        if place not in best or _rank(cell) > _rank(best[place]):
            best[place] = cell
    return list(best.values())


def _rank(cell: Cell) -> tuple[bool, bool, float]:
    return cell.recommended, cell.measured is not None, cell.shown


def _key(row: Mapping[str, Any]) -> tuple[int, int, float | None]:
    return row["exit"], row["draft_tokens"], row.get("confidence")


def spread(value: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    """Median, low and high of a figure that was measured several times."""
    return None if value is None else (float(value["median"]), float(value["low"]), float(value["high"]))
