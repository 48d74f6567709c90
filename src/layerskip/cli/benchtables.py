"""How a benchmark looks: what runs now, and the tables of its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.status import Status

from layerskip.cli.scores import accepted
from layerskip.cli.screen import Screen

if TYPE_CHECKING:
    from layerskip.evaluate.contest import Step

Record = Mapping[str, Any]
MISSING = "-"
PARTS = ("prompt", "draft", "verify", "rest", "text")


class Progress:
    """Says what runs: on a terminal in a line that goes away, elsewhere a line for each repeat.

    Args:
        screen: where to.
        repeat: runs of each way.
    """

    def __init__(self, screen: Screen, *, repeat: int) -> None:
        self._screen, self._repeat, self._said = screen, repeat, ""
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if self._screen.interactive:
            self._status = Status("", console=self._screen.err)
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, step: Step) -> None:
        """Takes note of what is about to run."""
        which = f"repeat {step.repeat} of {self._repeat}" if step.repeat else "warm-up"
        line = f"batch {step.batch}, {which}"
        if self._status is not None:
            self._status.update(f"{line}: {step.name}")
        elif line != self._said:
            self._said = line
            self._screen.note(line)


def show_record(record: Record, screen: Screen) -> None:
    """For each batch size: speed, how long one waits, where the time goes, and what became of the drafts."""
    from layerskip.evaluate.record import held_as

    settings, speed = record["settings"], record["bandwidth"]
    for batch in dict.fromkeys(cell["batch"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["batch"] == batch]
        ours = [cell for cell in cells if not cell["peer"]]
        title = (
            f"batch {batch}: {settings['items']} prompts ({settings['prompts']}), {settings['repeat']} repeats, "
            f"greedy, {held_as(record['model'])}; {modes(cells)}"
        )
        speeds = ("tokens/s", "decode", "end to end", "speedup", "same")
        screen.table([speed_row(cell) for cell in cells], columns=speeds, title=title)
        waits = ("ms", "first", "token p50", "p95", "round p50", "p95")
        screen.table([latency_row(cell) for cell in cells], columns=waits)
        parts = ("s", "prompt", "draft", "verify", "rest", "text")
        screen.table([parts_row(cell) for cell in ours], columns=parts)
        counts = ("", "tokens", "GB/s", "share", "peak MiB")
        screen.table([counts_row(cell) for cell in cells], columns=counts)
        for cell in ours:
            if cell["acceptance"] is not None:
                screen.line(accepted_line(cell))
    screen.line("speedup: of decode tokens/s, within each repeat; the median of these ratios, and their range")
    screen.line(f"this machine reads {speed['bytes_per_second'] / 1e9:.1f} GB/s with {_threads(speed['threads'])}")
    for note in record["notes"]:
        screen.line(note)


def modes(cells: Sequence[Record]) -> str:
    """Which of them are exact."""
    lossy = [cell["name"] for cell in cells if cell["mode"] == "lossy"]
    return f"{', '.join(lossy)} lossy, all others exact" if lossy else "all exact"


def speed_row(cell: Record) -> tuple[str, ...]:
    """Tokens/s in both meanings, the speedup of decoding with its range, and whether the texts are plain ones."""
    speeds, ratio = cell["tokens_per_second"], (cell.get("speedup") or {}).get("decode")
    return (
        cell["name"],
        median(speeds["decode"], ".1f"),
        median(speeds["end_to_end"], ".1f"),
        MISSING if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        same(cell),
    )


def latency_row(cell: Record) -> tuple[str, ...]:
    """Milliseconds to the first token, by token and by round."""
    tokens, rounds = cell["token_latency"] or {}, cell["round_latency"] or {}
    return (
        cell["name"],
        median(cell["time_to_first_token"], ".1f", 1e3),
        *(median(spreads.get(name), ".2f", 1e3) for spreads in (tokens, rounds) for name in ("p50", "p95")),
    )


def parts_row(cell: Record) -> tuple[str, ...]:
    """The seconds of each part."""
    return (cell["name"], *(median(cell["seconds"][part], ".3f") for part in PARTS))


def counts_row(cell: Record) -> tuple[str, ...]:
    """Tokens, how fast weights were read, and memory."""
    memory = cell["peak_memory"]
    return (
        cell["name"],
        f"{cell['tokens']:,}",
        median(cell["weights_read_per_second"], ".1f", 1e-9),
        median(cell["bandwidth_share"], ".0%"),
        MISSING if memory is None else f"{memory / 2**20:.1f}",
    )


def accepted_line(cell: Record) -> str:
    """What became of the drafts: in all, at each position, and in how many rounds how much."""
    counts = cell["acceptance"]
    pairs = zip(counts["accepted_by_position"], counts["drafted_by_position"], strict=True)
    positions = " ".join(f"{kept / drafted:.0%}" for kept, drafted in pairs)
    rounds = ", ".join(f"{size}: {count}" for size, count in counts["acceptance_histogram"].items())
    return f"{cell['name']}: {accepted(counts)}; by position {positions}; rounds by accepted tokens {rounds}"


def median(spread: Record | None, how: str, scale: float = 1.0) -> str:
    """The median of a spread in a unit of its own; a dash where there is none."""
    return MISSING if spread is None else format(spread["median"] * scale, how)


def same(cell: Record) -> str:
    """Whether the tokens are plain decoding's: "yes", or how many texts are, and where the first leaves it."""
    if cell["identical"] is None:
        return MISSING
    differing = [at for at in cell["differs_at"] if at is not None]
    if not differing:
        return "yes"
    texts: Sequence[int | None] = cell["differs_at"]
    return f"{len(texts) - len(differing)} of {len(texts)}, first at {min(differing)}"


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")
