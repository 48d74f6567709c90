"""A folder of records read, and its page and pictures written. Knows files; not what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerskip.errors import RequestError, StorageError
from layerskip.evaluate.record import read_json
from layerskip.evaluate.report.chapters import Chapter, chapter, shows
from layerskip.evaluate.report.page import page
from layerskip.evaluate.report.pictures import write_png


@dataclass(frozen=True)
class Written:
    """What a report consists of.

    Args:
        page: the HTML file.
        pictures: the PNG files.
        records: files that are shown.
        others: JSON files that are no records of bench, tune or eval.
    """

    page: Path
    pictures: Sequence[Path]
    records: Sequence[str]
    others: Sequence[str]


def write_report(folder: Path, output: Path | None = None) -> Written:
    """Writes the page of a folder, and beside it every figure as RECORD-FIGURE.png.

    Args:
        folder: its ``*.json`` files are read, those of folders inside it are not.
        output: the page; None is ``report.html`` in the folder.

    Raises:
        RequestError: there is no folder, it holds no record, or a file of it is broken.
        StorageError: the page or a picture cannot be written.
    """
    target = folder / "report.html" if output is None else output
    chapters, others = read_folder(folder)
    text = page(chapters, others=others)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    pictures = []
    for each in chapters:
        for section in each.sections:
            if section.figure is not None:
                pictures.append(target.parent / f"{each.name}-{section.name}.png")
                write_png(section.figure, pictures[-1])
    return Written(target, pictures, [each.file for each in chapters], others)


def read_folder(folder: Path) -> tuple[list[Chapter], list[str]]:
    """The records of a folder, in the order of their names, and the JSON files that are none.

    Raises:
        RequestError: there is no folder, it holds no record, or a file of it is broken.
    """
    if not folder.is_dir():
        raise RequestError(f"no folder {folder}; give one with the records of bench, tune and eval")
    chapters: list[Chapter] = []
    others: list[str] = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if not shows(content):
            others.append(path.name)
            continue
        try:
            chapters.append(chapter(path.name, content))
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error
    if not chapters:
        named = f"; {', '.join(others)} is none" if others else ""
        raise RequestError(f"{folder} holds no record; bench, tune and eval write one with --output{named}")
    return chapters, others
