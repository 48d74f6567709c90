"""What is shown of a record: a chapter with its head, and sections, each a figure with its tables.

Knows which figure belongs to which kind of record, and what a record's head says. Does not know HTML, nor how a figure
is drawn. Every look into a record is taken here: what a file lacks comes up before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from layerskip.errors import RequestError
from layerskip.evaluate.record import held_as
from layerskip.evaluate.report import charts, figures, tables
from layerskip.evaluate.report.charts import Lines, Record
from layerskip.evaluate.report.tables import NONE, Table, flat


@dataclass(frozen=True)
class Section:
    """A part of what a record says.

    Args:
        name: of files and anchors.
        title: what it shows.
        figure: None where there is nothing to draw.
        tables: with every number of the figure.
    """

    name: str
    title: str
    figure: Figure | None
    tables: Sequence[Table]


@dataclass(frozen=True)
class Chapter:
    """What is shown of a record.

    Args:
        file: its name.
        title: what it is about, in a line.
        place: the model and the machine, in a line.
        modes: exact, lossy, or both.
        reason: a sentence that it ends with; "" for none.
        head: where its numbers come from, as names and texts.
        sections: its parts.
    """

    file: str
    title: str
    place: str
    modes: Sequence[str]
    reason: str
    head: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    @property
    def name(self) -> str:
        """The file's name without its ending, as anchors, ids and names of pictures have it."""
        return "".join(
            c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in self.file.removesuffix(".json")
        )


def shows(content: object) -> bool:
    """Whether the content of a file is a record of a kind that is shown here."""
    return isinstance(content, dict) and isinstance(content.get("kind"), str) and content["kind"] in _KINDS


def chapter(file: str, record: Record) -> Chapter:
    """The chapter of a record.

    Args:
        file: its name.
        record: as read; one that `shows` says yes to.

    Raises:
        RequestError: it lacks what records of its kind hold.
    """
    kind = str(record["kind"])
    what, sections = _KINDS[kind]
    try:
        modes = {str(way["mode"]) for way in record.get("cells") or record.get("results") or ()}
        modes |= {"exact", "lossy"} if record.get("curves") else set()  # those of the exits
        about = record.get("task") or (record.get("settings") or {}).get("prompts")
        model = str(record["model"]["name"]).rstrip("/").split("/")[-1]
        return Chapter(
            file=file,
            title=f"{what} of {model}" + (f" on {about}" if about else ""),
            place=charts.place(record),
            modes=sorted(modes or {"exact"}),  # tuning decodes exactly
            reason=str(record.get("reason") or ""),
            head=[("record", file), *_head(record)],
            sections=[section for section in sections(record) if any(table.rows for table in section.tables)],
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # somebody else wrote it
        lack = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"it is not as layerskip {kind} writes it: {lack}") from error


def _head(record: Record) -> list[tuple[str, str]]:
    """Where the numbers come from: command, commit, versions, machine, model, settings."""
    model, machine = record["model"], record["machine"]
    gpus = "".join(f", {gpu}" for gpu in machine["gpus"])
    return [
        ("command", str(record["command"])),
        ("commit", str(record["commit"] or NONE)),
        ("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())),
        (
            "machine",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} of them used by torch, "
            f"{machine['memory'] / 2**30:.1f} GiB, {machine['system']}{gpus}",
        ),
        (
            "model",
            f"{model['name']}: {model['parameters']:,} parameters, {model['layers']} layers of {model['width']}, "
            f"vocabulary {model['vocabulary']:,}, context {model['context']:,}, {held_as(model)}, {model['device']}",
        ),
        *flat(record.get("settings") or {}),
        *(flat({"harness": record["harness"]}) if record.get("harness") else ()),
        *(("note", str(note)) for note in record.get("notes") or ()),
        *([("note", "unfinished: the same command goes on with it")] if record.get("unfinished") else ()),
    ]


def _bench(record: Record) -> list[Section]:
    found = [
        Section(
            "speedup-by-batch",
            "Speedup by batch size",
            figures.speedup_by_batch(record) if charts.speedups(record) else None,
            [tables.speedups(record)],
        )
    ]
    found += _lines(
        "acceptance-by-position", charts.acceptance_by_position(record), figures.acceptance_by_position, record
    )
    if table := tables.acceptance(record):
        found.append(Section("acceptance", "Acceptance", None, [table]))
    if charts.splits(record):
        found.append(Section("time-split", "Where the time goes", figures.time_split(record), [tables.splits(record)]))
    found.append(Section("latency", "Latency, bandwidth and memory", None, [tables.latencies(record)]))
    return found


def _tune(record: Record) -> list[Section]:
    tried = [tables.settings_tried(record), tables.heads_tried(record)]
    found = [
        Section("speedup-map", "Speedup over (E, K)", figures.speedup_map(record), [table for table in tried if table])
    ]
    found += _lines(
        "acceptance-by-position", charts.acceptance_by_position(record), figures.acceptance_by_position, record
    )
    found += _curves(record)
    if table := tables.costs(record):
        found.append(Section("costs", "Measured costs", None, [table]))
    return found


def _eval(record: Record) -> list[Section]:
    drawn = charts.scores_by_exit(record)
    found = [
        Section("scores", "Scores", figures.scores_by_exit(record) if drawn else None, tables.scores(record)),
        *_curves(record),
        Section("texts", "Texts", None, [tables.texts(record)]),
    ]
    if table := tables.acceptance(record):
        found.append(Section("acceptance", "Acceptance", None, [table]))
    return found


def _curves(record: Record) -> list[Section]:
    return [
        *_lines("loss-by-exit", charts.loss_by_exit(record), figures.loss_by_exit, record),
        *_lines("agreement-by-exit", charts.agreement_by_exit(record), figures.agreement_by_exit, record),
    ]


def _lines(name: str, chart: Lines | None, draw: figures.Draw, record: Record) -> list[Section]:
    return [] if chart is None else [Section(name, chart.title, draw(record), [tables.of_lines(chart)])]


_KINDS: dict[str, tuple[str, Callable[[Record], list[Section]]]] = {
    "bench": ("Speed", _bench),
    "tune": ("Tuning of early-exit drafts", _tune),
    "eval": ("Quality", _eval),
}
