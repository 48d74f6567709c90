"""Writing to a terminal or a pipe: text as it comes, tables, one line of statistics, JSON.

Results go to standard output; statistics to standard error, so that what is piped is the text alone.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

ACCEPTED, OWN = Style(color="green"), Style(color="yellow")

# A model may produce control characters; a terminal would obey them.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")


class Screen:
    """Standard output and standard error of one command.

    Args:
        no_color: plain text everywhere; else rich decides (terminal, TERM, NO_COLOR, FORCE_COLOR).
    """

    def __init__(self, *, no_color: bool = False) -> None:
        self.out = Console(no_color=no_color or None, highlight=False)
        self.err = Console(no_color=no_color or None, highlight=False, stderr=True)
        self._colour = self.out.color_system is not None and not self.out.no_color
        self._open = False  # whether the last line written is without its end

    @property
    def interactive(self) -> bool:
        """Whether somebody watches what is written about results."""
        return self.err.is_terminal

    def write(self, text: str, style: Style | None = None) -> None:
        """Generated text, at once and unchanged; on a terminal control characters are shown, not obeyed."""
        if not text:
            return
        self._open = not text.endswith("\n")
        if self.out.is_terminal:
            text = text.translate(_VISIBLE)
        if style is not None and self._colour:
            text = style.render(text, color_system=ColorSystem.STANDARD)
        sys.stdout.write(text)
        sys.stdout.flush()

    def end_text(self) -> None:
        """The newline after a whole text."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._open = False

    def end_line(self) -> None:
        """The newline after a text that was cut short; none where nothing stands in the line."""
        if self._open:
            self.end_text()

    def line(self, text: str, style: str = "") -> None:
        """A line of a result."""
        self.out.print(Text(text, style), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line about the result, on standard error."""
        sys.stdout.flush()
        dim = self.err.color_system is not None and not self.err.no_color
        self.err.print(Text(text, "dim" if dim else ""), soft_wrap=True)

    def table(self, rows: list[tuple[str, ...]], *, columns: tuple[str, ...] = (), title: str = "") -> None:
        """A table; where it has headings all columns but the first are numbers."""
        table = Table(box=SIMPLE_HEAD, show_header=bool(columns), title=title or None, title_justify="left")
        for i in range(len(rows[0])):
            heading = columns[i] if columns else ""
            justify: Literal["left", "right"] = "right" if columns and i else "left"
            # in a narrow place headings and numbers give way before names do
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=bool(columns) and not i)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table)


def write_json(record: dict[str, Any]) -> None:
    """One JSON object, on one line; what JSON has no number for (nan, infinities) becomes null."""
    sys.stdout.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
