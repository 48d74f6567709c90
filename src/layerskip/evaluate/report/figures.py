"""Figures of records: one function for each, record in, matplotlib `Figure` out.

Knows which figure shows what. Does not know how lines, bars and maps are painted, nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from layerskip.errors import RequestError
from layerskip.evaluate.report import charts, drawing
from layerskip.evaluate.report.charts import Lines, Record

Draw = Callable[[Record], Figure]


def _styled(draw: Draw) -> Draw:
    @wraps(draw)
    def styled(record: Record) -> Figure:
        with matplotlib.rc_context(drawing.STYLE):
            return draw(record)

    return styled


@_styled
def scores_by_exit(record: Record) -> Figure:
    """The scores of an eval record at every exit that was asked for, plain decoding being the last.

    Raises:
        RequestError: the record holds none; so do the functions below.
    """
    return _over(record, charts.scores_by_exit(record), "scores by exit")


@_styled
def loss_by_exit(record: Record) -> Figure:
    """The loss on text at every exit, of an eval or a tune record."""
    return _over(record, [charts.loss_by_exit(record)], "loss by exit")


@_styled
def agreement_by_exit(record: Record) -> Figure:
    """How often every exit is right, and agrees with the last layer, of an eval or a tune record."""
    return _over(record, [charts.agreement_by_exit(record)], "agreement by exit")


@_styled
def acceptance_by_position(record: Record) -> Figure:
    """Accepted of those drafted at each position, of a bench or a tune record."""
    return _over(record, [charts.acceptance_by_position(record)], "acceptance by position")


_BARS = 12  # ways of decoding that a figure has room for; the table beside it has all


@_styled
def speedup_by_batch(record: Record) -> Figure:
    """The speedup of each way over plain decoding at each batch size, of a bench record."""
    bars = charts.speedups(record)
    if not bars:
        raise _nothing("speedup by batch size")
    names, shown = list(dict.fromkeys(bar.name for bar in bars)), charts.fastest(bars, _BARS)
    which = "" if len(shown) == len(names) else f", the {len(shown)} fastest of {len(names)}"
    title = f"Speedup over plain decoding, by batch size{which}"
    figure, [axes] = drawing.canvas(title, charts.place(record), height=3.6)
    names, bars = shown, [bar for bar in bars if bar.name in shown]
    batches = sorted({bar.batch for bar in bars})
    width = 0.8 / len(names)
    for bar in bars:
        index = names.index(bar.name)
        middle = batches.index(bar.batch) + (index - (len(names) - 1) / 2) * width
        drawing.draw_bar(axes, bar, at=middle, width=width, index=index)
    axes.axhline(1, color=drawing.GREY, linewidth=1.2, linestyle="--")
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.6, len(batches) - 0.4)
    axes.grid(False, axis="x")
    axes.set_xlabel("batch size (rows side by side)")
    axes.set_ylabel("times as fast as plain\n(bars: decode)")
    handles: list[Any] = [drawing.patch(i, label=name) for i, name in enumerate(names)]
    handles.append(Line2D([], [], color="black", marker="D", linestyle="", markersize=5, label="end to end"))
    handles.append(Line2D([], [], color=drawing.GREY, linestyle="--", label="plain decoding"))
    drawing.legend(figure, handles)
    return figure


@_styled
def time_split(record: Record) -> Figure:
    """Seconds in prompt, draft, verify and rest of each way, of a bench record."""
    rows = charts.splits(record)
    if not rows:
        raise _nothing("time split")
    figure, [axes] = drawing.canvas("Where the time goes", charts.place(record), height=1.4 + 0.4 * len(rows))
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    several = len({row.batch for row in rows}) > 1
    for y, row in enumerate(rows):
        label = f"{row.name}, batch {row.batch}" if several else row.name
        drawing.draw_stack(axes, row, parts, y=y, label=label)
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.6, -0.8)
    axes.margins(x=0.14)
    axes.grid(False, axis="y")
    axes.set_xlabel("seconds for all prompts (median of the repeats)")
    drawing.legend(figure, [drawing.patch(drawing.part_index(part), label=part) for part in parts])
    return figure


@_styled
def speedup_map(record: Record) -> Figure:
    """The speedup over plain decoding of every exit E and draft length K of a tune record.

    A cell is drawn as measured where it was measured, with an outline and the word, and as predicted elsewhere; nothing
    is interpolated, and a pair that was neither stays empty. Of several confidences a cell shows one, and says which:
    the recommended one, else the fastest that was measured, where none was the fastest as predicted.
    """
    cells = charts.best_settings(record)
    if not cells:
        raise _nothing("speedup map")
    height = 1.7 + 0.36 * len({cell.exit for cell in cells})
    figure, [axes] = drawing.canvas("Speedup over plain decoding", charts.place(record), height=height)
    # as far up as down, so that white is plain decoding; and further, as figures are not read on the darkest colours
    reach = 1.25 * max(0.05, *(abs(cell.shown - 1) for cell in cells))
    drawing.draw_map(axes, cells, TwoSlopeNorm(vcenter=1, vmin=1 - reach, vmax=1 + reach))
    axes.set_xlabel("tokens drafted in a round, K")
    axes.set_ylabel("exit that drafts, E (layers)")
    handles = [
        Patch(facecolor="white", edgecolor="black", linewidth=2, label="measured (median)"),
        Patch(facecolor="white", edgecolor="#BBBBBB", label="predicted"),
    ]
    if any(cell.recommended for cell in cells):
        handles.append(Patch(facecolor="none", edgecolor="none", label="★ recommended"))
    if any(cell.confidence is not None for cell in cells):
        handles.append(Patch(facecolor="none", edgecolor="none", label="P: confidence that ends a draft"))
    drawing.legend(figure, handles)
    return figure


def _over(record: Record, found: Sequence[Lines | None], what: str) -> Figure:
    """Lines over exits or positions: one panel for each chart, below one another."""
    known = [chart for chart in found if chart is not None]
    if not known:
        raise _nothing(what)
    figure, panels = drawing.canvas(
        known[0].title, charts.place(record), height=0.9 + 2.5 * len(known), panels=[1] * len(known)
    )
    # further lines than there are looks are in the table only
    names = list(dict.fromkeys(name for chart in known for name in chart.lines))[: drawing.LINES]
    for axes, chart in zip(panels, known, strict=True):
        drawing.draw_lines(axes, chart, names)
        if chart is not known[0]:
            axes.set_title(chart.title, fontsize=9)
    drawing.legend(figure, [drawing.line(i, label=name) for i, name in enumerate(names)])
    return figure


def _nothing(what: str) -> RequestError:
    return RequestError(f"this record has nothing for the figure {what!r}")
