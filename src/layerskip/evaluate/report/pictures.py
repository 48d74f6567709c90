"""A figure as a file, and as an element of a page. Knows PNG and SVG; not what is drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from layerskip.errors import StorageError
from layerskip.evaluate.report.drawing import STYLE


def write_png(figure: Figure, path: Path) -> None:
    """Writes a figure. Raises StorageError where the place cannot be written."""
    try:
        figure.savefig(path, format="png", dpi=200)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def svg(figure: Figure, *, name: str) -> str:
    """A figure as an element of a page, which refers to nothing outside itself.

    Args:
        figure: the figure.
        name: makes its ids its own; figures of one page need different ones.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", element)  # a page knows what svg is
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', element)
    element = re.sub(r'(url\(|href=")#', rf"\1#{name}-", element)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*"', "<svg", element, count=1)
