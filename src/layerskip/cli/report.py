"""`layerskip report`: the figures and the page of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from layerskip.cli.flags import ShowFlags
from layerskip.cli.screen import Screen


def report(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Where bench, tune and eval wrote their records.")],
    *,
    output: Annotated[
        Path | None,
        Option(metavar="PATH", help="The page; report.html in the folder. Pictures go beside it.", show_default=False),
    ] = None,
    show: ShowFlags,
) -> None:
    """Draw every record of a folder, on one page that needs no network."""
    from layerskip.evaluate.report import write_report

    written = write_report(folder, output)
    screen = Screen(no_color=show.no_color)
    screen.line(
        f"{written.page}: {_count(len(written.records), 'record')}, {_count(len(written.pictures), 'figure')}, "
        "also beside it as PNG"
    )
    if written.others:
        screen.note(f"no records: {', '.join(written.others)}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
