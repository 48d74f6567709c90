"""Lines, bars and maps on matplotlib axes, in one style.

Knows colours, marks and legends. Does not know records. Draws without pyplot: no window, no global figure. Colours are
those of Okabe and Ito, "Color Universal Design" (2008); lines and bars are told apart by marks and hatches as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerskip.evaluate.report.charts import Bar, Cell, Lines, Split

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKS = "osD^vPX*"
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
LINES = 3 * len(COLOURS)
"""So many lines look different."""
GREY = "#555555"
PARTS = ("verify", "draft", "rest", "prompt", "text")  # by colour
WIDTH = 4.5  # inches: about as wide as a phone shows, so that its letters are read there too
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # letters stay letters: small, sharp, and found by a search
}


def canvas(title: str, subtitle: str, *, height: float, panels: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """An empty figure with its panels below one another.

    Args:
        title: what is shown.
        subtitle: of what and where.
        height: inches.
        panels: their relative heights.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes = list(figure.subplots(len(panels), 1, squeeze=False, height_ratios=list(panels))[:, 0])
    axes[0].set_title(subtitle, fontsize=7.5, fontweight="normal", color=GREY)
    return figure, axes


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """What marks and colours mean, below the panels, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), 58 // (longest + 6)))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=8)


def line(index: int, *, label: str = "") -> Line2D:
    """The look of a line."""
    colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
    dash: Any = ("-", "--", ":")[index // len(COLOURS) % 3]
    return Line2D([], [], color=colour, marker=mark, linestyle=dash, markersize=5, linewidth=1.6, label=label)


def patch(index: int, *, label: str = "") -> Patch:
    """The look of a bar."""
    colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
    return Patch(facecolor=colour, edgecolor="white", hatch=hatch, linewidth=0.4, label=label)


def draw_lines(axes: Axes, chart: Lines, names: Sequence[str]) -> None:
    """Draws the lines that are among `names`, in the looks of their places there."""
    for name in (name for name in names if name in chart.lines):
        points, look = chart.lines[name], line(names.index(name))
        axes.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=[[p.y - p.low for p in points], [p.high - p.y for p in points]] if chart.spread else None,
            color=look.get_color(),
            marker=look.get_marker(),
            linestyle=look.get_linestyle(),
            markersize=5,
            linewidth=1.6,
            capsize=2,
        )
    if chart.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)


def draw_bar(axes: Axes, bar: Bar, *, at: float, width: float, index: int) -> None:
    """Draws the decode speedup with the range of its runs, and a diamond for the end-to-end one."""
    if bar.decode is not None:
        median, low, high = bar.decode
        look = patch(index)
        axes.bar(
            at,
            median,
            width * 0.92,
            color=look.get_facecolor(),
            edgecolor="white",
            hatch=look.get_hatch(),
            linewidth=0.4,
        )
        axes.errorbar(at, median, yerr=[[median - low], [high - median]], color="black", linewidth=1, capsize=2)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.annotate(
            f"{median:.2f}",
            (at, 0),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            rotation=0 if width > 0.16 else 90,
            bbox=box,
        )
    if bar.end_to_end is not None:
        axes.plot(at, bar.end_to_end[0], marker="D", color="black", markersize=5, markeredgecolor="white")


def draw_stack(axes: Axes, row: Split, parts: Sequence[str], *, y: int, label: str) -> None:
    """Draws the parts of a way's seconds behind one another, their sum at the end and the label above: beside the bars
    it would take the room of a narrow screen."""
    left = 0.0
    for part in parts:
        seconds, look = row.parts.get(part, 0.0), patch(part_index(part))
        axes.barh(
            y,
            seconds,
            0.45,
            left=left,
            color=look.get_facecolor(),
            edgecolor="white",
            hatch=look.get_hatch(),
            linewidth=0.4,
        )
        left += seconds
    axes.annotate(f"{left:.3g} s", (left, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.annotate(label, (0, y - 0.28), (2, 1), textcoords="offset points", va="bottom", fontsize=8)


def part_index(part: str) -> int:
    """The look of a part of the seconds: the same in every figure."""
    return PARTS.index(part) if part in PARTS else len(PARTS)


def draw_map(axes: Axes, cells: Sequence[Cell], norm: TwoSlopeNorm) -> None:
    """Draws a square for every cell: outlined and labelled where it was measured, else as predicted."""
    exits = sorted({cell.exit for cell in cells})
    lengths = sorted({cell.draft_tokens for cell in cells})
    colours = matplotlib.colormaps["PuOr"]
    for cell in cells:
        x, y = lengths.index(cell.draft_tokens), exits.index(cell.exit)
        colour = colours(norm(cell.shown))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
        words: Any = {"ha": "center", "va": "center", "color": "white" if dark else "black", "zorder": 4}
        measured = cell.measured is not None
        edge, width, order = ("black", 2.0, 3) if measured else ("white", 1.0, 2)
        axes.add_patch(_square(x, y, facecolor=colour, edgecolor=edge, linewidth=width, zorder=order))
        below = "measured" if measured else ""
        if cell.confidence is not None:
            below = f"{'meas. ' if measured else ''}P={cell.confidence:g}".replace("=0.", "=.")
        text = f"{'★' if cell.recommended else ''}{cell.shown:.2f}"
        axes.text(x, y - (0.14 if below else 0), text, fontsize=8, fontweight="bold" if measured else "normal", **words)
        axes.text(x, y + 0.26, below, fontsize=5.5, **words)
    axes.set_xlim(-0.55, len(lengths) - 0.45)
    axes.set_ylim(len(exits) - 0.45, -0.55)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(exits)), [str(exit) for exit in exits])
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _square(x: int, y: int, **look: Any) -> Rectangle:
    return Rectangle((x - 0.5, y - 0.5), 1, 1, **look)
