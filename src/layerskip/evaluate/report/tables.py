"""The numbers of records as tables of text: all that the figures show, and what has no figure.

Knows units and digits. Does not know HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.evaluate.report import charts
from layerskip.evaluate.report.charts import Lines, Record, spread

NONE = "–"
"""Where there is no number."""


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of a row says what the row is about.

    Args:
        columns: headings.
        rows: as many cells each.
        caption: what it needs to be read; "" for nothing.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def of_lines(chart: Lines) -> Table:
    """A row for each place, a column for each line."""
    places = sorted({point.x for points in chart.lines.values() for point in points})
    found = {(name, point.x): point for name, points in chart.lines.items() for point in points}
    rows = []
    for place in places:
        cells = [str(place)]
        for name in chart.lines:
            point = found.get((name, place))
            cells.append(NONE if point is None else _figure(point.y, share=chart.share))
            if point is not None and chart.spread and point.high > point.y:
                cells[-1] += f" ± {_figure(point.high - point.y, share=chart.share)}"
        rows.append(cells)
    caption = f"{chart.y}; ± is {chart.spread}" if chart.spread else chart.y
    return Table((chart.x, *chart.lines), rows, caption)


def _figure(value: float, *, share: bool) -> str:
    return f"{value:.1%}" if share else f"{value:.4g}"


# --- bench


def speedups(record: Record) -> Table:
    """Every way at every batch size: how fast, and whether the texts are plain decoding's."""
    rows = []
    for cell in record["cells"]:
        rates, gains = cell["tokens_per_second"], cell.get("speedup") or {}
        same = {True: "yes", False: "no", None: NONE}[cell["identical"]]
        rows.append(
            [
                cell["name"],
                str(cell["batch"]),
                *(ranged(gains.get(name), "{:.2f}") for name in ("decode", "end_to_end")),
                *(ranged(rates.get(name), "{:,.0f}") for name in ("decode", "end_to_end")),
                cell["mode"],
                same,
            ]
        )
    columns = ("", "batch", "speedup, decode", "end to end", "tokens/s, decode", "end to end", "mode", "same texts")
    return Table(columns, rows, "median (lowest – highest of the repeats); speedup over plain decoding, paired")


def splits(record: Record) -> Table:
    """Seconds by part."""
    found = charts.splits(record)
    parts = list(dict.fromkeys(part for row in found for part in row.parts))
    rows = [
        [
            row.name,
            str(row.batch),
            *(f"{row.parts[part]:.3g}" if part in row.parts else NONE for part in parts),
            f"{sum(row.parts.values()):.3g}",
        ]
        for row in found
    ]
    return Table(("", "batch", *parts, "sum"), rows, "seconds for all prompts, median of the repeats")


def acceptance(record: Record) -> Table | None:
    """What became of the drafts of a bench or an eval record; None where nothing drafted."""
    rows = []
    for cell in record.get("cells") or record.get("results") or ():
        if counts := cell["acceptance"]:
            rows.append(
                [
                    cell["name"],
                    str(cell.get("batch", NONE)),
                    f"{counts['draft_acceptance_rate']:.1%}",
                    f"{counts['mean_acceptance_length']:.2f}",
                    f"{counts['emitted_per_round']:.2f}",
                    f"{counts['num_spec_steps']:,}",
                    f"{counts['num_draft_tokens']:,}",
                    f"{counts['num_accepted_draft_tokens']:,}",
                    f"{counts['num_emitted_tokens']:,}",
                ]
            )
    columns = ("", "batch", "accepted", "tokens/round", "emitted/round", "rounds", "drafted", "accepted", "emitted")
    return Table(columns, rows, "tokens/round is 1 + accepted / rounds") if rows else None


def latencies(record: Record) -> Table:
    """Times to tokens, memory, and how much of the memory's speed is reached."""
    rows = []
    for cell in record["cells"]:
        token, round_ = cell["token_latency"] or {}, cell["round_latency"] or {}
        rows.append(
            [
                cell["name"],
                str(cell["batch"]),
                ranged(cell["time_to_first_token"], "{:.3g}", times=1e3),
                *(ranged(token.get(name), "{:.3g}", times=1e3) for name in ("p50", "p95")),
                *(ranged(round_.get(name), "{:.3g}", times=1e3) for name in ("p50", "p95")),
                ranged(cell["weights_read_per_second"], "{:.2f}", times=1e-9),
                ranged(cell["bandwidth_share"], "{:.0%}"),
                NONE if cell["peak_memory"] is None else f"{cell['peak_memory'] / 2**20:,.0f}",
            ]
        )
    columns = (
        *("", "batch", "first token, ms", "token p50, ms", "p95, ms", "round p50, ms", "p95, ms"),
        *("weights, GB/s", "of the bandwidth", "peak memory, MiB"),
    )
    speed = record["bandwidth"]["bytes_per_second"] / 1e9
    return Table(columns, rows, f"median (lowest – highest); this machine reads {speed:.2f} GB/s")


# --- tune


def settings_tried(record: Record) -> Table:
    """Every setting of a drafter: predicted, and measured where it was."""
    rows = [
        [
            f"exit {cell.exit}, K={cell.draft_tokens}" + (" ★" if cell.recommended else ""),
            NONE if cell.confidence is None else f"{cell.confidence:g}",
            NONE if cell.predicted is None else f"{cell.predicted:.2f}",
            NONE if cell.measured is None else _range(cell.measured, "{:.2f}"),
            NONE if cell.tokens_per_round is None else f"{cell.tokens_per_round:.2f}",
        ]
        for cell in charts.settings(record)
    ]
    columns = ("", "confidence", "predicted", "measured", "tokens/round")
    return Table(columns, rows, "speedup over plain decoding; measured: median (lowest – highest); ★ recommended")


def heads_tried(record: Record) -> Table | None:
    """The best setting through other draft heads, as measured; None where none was tried."""
    recommended = record.get("recommended")
    chosen = charts.setting_of(recommended) if recommended and charts.has_head(recommended) else None
    rows = [
        [
            f"exit {each['exit']}, K={each['draft_tokens']}, "
            + (f"{each['vocabulary']:,} tokens" if each.get("vocabulary") else f"{each['head']} head")
            + (" ★" if charts.setting_of(each) == chosen else ""),
            *(_range(found, "{:.2f}") for name in ("speedup", "gain") if (found := spread(each[name]))),
            f"{each['tokens_per_round']:.2f}",
        ]
        for each in record.get("narrow") or ()
    ]
    columns = ("", "speedup", "of the whole head", "tokens/round")
    return Table(columns, rows, "median (lowest – highest); ★ recommended") if rows else None


def costs(record: Record) -> Table | None:
    """What the cost model was fed with; None where nothing is recorded."""
    rows = [[name, value] for name, value in flat(record.get("costs") or {})]
    return Table(("", "seconds, and counts"), rows) if rows else None


# --- eval


def scores(record: Record) -> list[Table]:
    """A table for each group of items, a row for each way of decoding."""
    groups = list(dict.fromkeys(group for result in record["results"] for group in result["scores"]))
    tables = []
    for group in groups:
        ways = [result for result in record["results"] if group in result["scores"]]
        metrics = list(dict.fromkeys(metric for result in ways for metric in result["scores"][group]))
        rows = [
            [result["name"], result["mode"], *(_score(result["scores"][group].get(metric)) for metric in metrics)]
            for result in ways
        ]
        counts = {score["count"] for result in ways for score in result["scores"][group].values()}
        caption = f"{group}: {max(counts, default=0):,} items; ± is one standard error"
        tables.append(Table(("", "mode", *metrics), rows, caption))
    return tables


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None or score["mean"] is None:
        return NONE
    error = score["error"]
    return f"{score['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def texts(record: Record) -> Table:
    """What the ways of an eval record cost, and how many of their texts are plain decoding's."""
    rows = [
        [
            result["name"],
            result["mode"],
            str(result["exit"]),
            f"{result['tokens']:,}",
            f"{result['seconds']:.1f}",
            NONE if result["identical"] is None else f"{result['identical']:,} of {record['items']:,}",
        ]
        for result in record["results"]
    ]
    return Table(("", "mode", "layers", "tokens", "seconds", "texts as plain"), rows, "prompts included")


# --- every kind


def flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of an object, with the path to each, lists on one line.

    Example:
        >>> list(flat({"a": {"b": 1}, "c": [1, 2]}))
        [('a b', '1'), ('c', '1, 2')]
    """
    for key, each in value.items():
        name = f"{before} {key}".strip()
        if isinstance(each, Mapping):
            yield from flat(each, name)
        elif isinstance(each, Sequence) and not isinstance(each, str):
            yield name, ", ".join(map(_leaf, each)) or NONE
        else:
            yield name, _leaf(each)


def _leaf(value: Any) -> str:
    if value is None:
        return NONE
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def ranged(value: Mapping[str, Any] | None, digits: str, *, times: float = 1.0) -> str:
    """A figure that was measured several times, as "1.52 (1.49 – 1.60)"."""
    found = charts.spread(value)
    return NONE if found is None else _range((found[0] * times, found[1] * times, found[2] * times), digits)


def _range(found: tuple[float, float, float], digits: str) -> str:
    median, low, high = (digits.format(number) for number in found)
    return median if low == high else f"{median} ({low} – {high})"
