"""One page for a folder of records: HTML with everything in it, read without a network, a script or a wide screen.

Knows HTML. Does not know records, nor what sections show.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from layerskip.evaluate.report.chapters import Chapter, Section
from layerskip.evaluate.report.pictures import svg
from layerskip.evaluate.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6066; --line: #d9dce0; --paper: #fff; --back: #f5f6f7;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a2a8b0; --line: #3a3f46; --paper: #1e2126;
  --back: #15171a; --link: #7db7f0; } }
* { box-sizing: border-box; }
body { margin: 0; padding: .5rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
main, header, footer { max-width: 76rem; margin: 0 auto; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
a { color: var(--link); }
p { margin: .25rem 0 .75rem; }
.soft, .caption, dt { color: var(--soft); }
.caption { font-size: .85rem; margin: 0 0 .25rem; }
nav ul { padding-left: 1.1rem; margin: .5rem 0 0; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem;
  margin: 1.25rem 0; }
section { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; display: grid; gap: .75rem 1.5rem;
  grid-template-columns: minmax(0, 1fr); }
section h3 { grid-column: 1 / -1; margin: 0; }
figure { margin: 0; background: #fff; border-radius: .4rem; padding: .25rem 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 31rem; margin: 0 auto; }
.tables { min-width: 0; }
.scroll { overflow: auto; max-width: 100%; max-height: 32rem; margin-bottom: .75rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem;
  position: sticky; top: 0; background: var(--paper); z-index: 1; }
tbody th, thead th:first-child { text-align: left; font-weight: 600; }
tbody th { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 7.5rem; }
dl { display: grid; grid-template-columns: fit-content(38%) minmax(0, 1fr); gap: .15rem .75rem; margin: .5rem 0 0;
  font-size: .85rem; }
dd { margin: 0; }
code { font: .8rem/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: 0 .6rem; font-size: .8rem; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
@media (min-width: 62rem) { body { padding: 1rem; } tbody th { white-space: nowrap; }
  section.wide { grid-template-columns: minmax(0, 31rem) minmax(0, 1fr); } }
"""

_LAWS = {
    "exact": "exact: the output has the law of plain decoding with the same weights",
    "lossy": "lossy: the output is that of a shallower model",
}


def page(chapters: Sequence[Chapter], *, others: Sequence[str] = ()) -> str:
    """The page.

    Args:
        chapters: at least one.
        others: files of the folder that are no records.
    """
    title = "layerskip report" if len(chapters) > 1 else chapters[0].title
    entries = "".join(
        f'<li><a href="#{each.name}">{escape(each.title)}</a> <span class="soft">{escape(each.file)}</span></li>\n'
        for each in chapters
    )
    left = f"<p>Not shown, as these are no records: {escape(', '.join(others))}.</p>" if others else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<nav><ul>{entries}</ul></nav></header>\n"
        f"<main>\n{''.join(map(_chapter, chapters))}</main>\n"
        '<footer class="soft"><p>Every number in a figure is in the table beside it. Speedups are over plain decoding '
        f"in the same process.</p>{left}</footer>\n</body>\n</html>\n"
    )


def _chapter(chapter: Chapter) -> str:
    tags = " ".join(f'<span class="tag">{escape(_LAWS.get(mode, mode))}</span>' for mode in chapter.modes)
    reason = f"<p>{escape(chapter.reason)}</p>\n" if chapter.reason else ""
    head = "".join(f"<dt>{escape(name)}</dt><dd>{_value(name, text)}</dd>" for name, text in chapter.head)
    sections = "".join(_section(each, of=chapter.name) for each in chapter.sections)
    return (
        f'<article id="{chapter.name}">\n<h2>{escape(chapter.title)}</h2>\n'
        f'<p class="soft">{escape(chapter.place)}</p>\n<p>{tags}</p>\n{reason}'
        f"<details open><summary>where these numbers come from</summary><dl>{head}</dl></details>\n"
        f"{sections}</article>\n"
    )


def _value(name: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if name in ("command", "commit") else escape(text)


def _section(section: Section, *, of: str) -> str:
    figure = ""
    if section.figure is not None:
        picture = svg(section.figure, name=f"{of}-{section.name}")
        label = f'role="img" aria-label="{escape(section.title)}"'
        figure = f"<figure>{picture.replace('<svg', f'<svg {label}', 1)}</figure>\n"
    tables = "".join(map(_table, section.tables))
    wide = ' class="wide"' if figure else ""
    return (
        f'<section{wide} id="{of}-{section.name}-section"><h3>{escape(section.title)}</h3>\n{figure}'
        f'<div class="tables">{tables}</div></section>\n'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in table.rows
    )
    caption = f'<p class="caption">{escape(table.caption)}</p>\n' if table.caption else ""
    return f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'
