"""Figures and the page: every number in a table, nothing from elsewhere, readable in a browser as wide as a phone."""

import copy
import doctest
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from layerskip.errors import RequestError, StorageError
from layerskip.evaluate.report import Written, charts, figures, tables, write_report
from layerskip.evaluate.report.pictures import svg

RECORDS = Path(__file__).parent / "records"  # made up, in the form that bench, tune and eval write
FIGURES: list[tuple[str, Callable[[Any], Figure]]] = [
    ("bench", figures.acceptance_by_position),
    ("bench", figures.speedup_by_batch),
    ("bench", figures.time_split),
    ("tune", figures.speedup_map),
    ("tune", figures.acceptance_by_position),
    ("tune", figures.loss_by_exit),
    ("tune", figures.agreement_by_exit),
    ("eval", figures.scores_by_exit),
    ("eval", figures.loss_by_exit),
    ("eval", figures.agreement_by_exit),
]


def read(kind: str) -> Any:
    return json.loads((RECORDS / f"{kind}.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a record of each kind."""
    place = tmp_path / "results"
    shutil.copytree(RECORDS, place)
    return place


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The report of such a folder, with a file in it that is no record."""
    place = tmp_path_factory.mktemp("report") / "results"
    shutil.copytree(RECORDS, place)
    (place / "notes.json").write_text("[1, 2]")
    return write_report(place)


def write(folder: Path, name: str, record: Any) -> None:
    (folder / name).write_text(json.dumps(record))


def words(figure: Figure) -> list[str]:
    """All that is written in a figure."""
    from matplotlib.text import Text

    figure.canvas.draw()
    return [found.get_text() for found in figure.findobj(Text) if isinstance(found, Text) and found.get_text()]


class Page(HTMLParser):
    """Elements and attributes, and the text of cells, headings and figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.drawn: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._open in ("td", "th"):
            self.cells[-1] += data
        if self._open == "h3":
            self.headings.append(data)
        if self._open == "text":
            self.drawn.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def test_examples() -> None:
    assert doctest.testmod(tables).failed == 0


# -- figures


@pytest.mark.parametrize(("kind", "draw"), FIGURES, ids=lambda value: getattr(value, "__name__", value))
def test_a_figure_says_what_where_and_in_which_unit(kind: str, draw: Callable[[Any], Figure]) -> None:
    figure = draw(read(kind))
    assert figure.get_suptitle()
    assert "example-model, float32 · Intel Xeon Platinum 8481C, 1 thread" in words(figure)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or draw is figures.time_split  # there the labels stand above the bars
    assert figure.legends
    element = svg(figure, name="a")
    assert element.startswith("<svg")
    assert "http" not in element
    assert f">{figure.get_suptitle()}</text>" in element


def test_drawing_leaves_the_settings_of_others_alone() -> None:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        svg(figures.speedup_map(read("tune")), name="a")
        assert dict(matplotlib.rcParams) == before


def test_the_map_shows_what_was_measured_and_else_what_was_predicted() -> None:
    record = read("tune")
    written = words(figures.speedup_map(record))
    cells = {(cell.exit, cell.draft_tokens): cell for cell in charts.best_settings(record)}
    assert len(cells) == 30
    # measured with two confidences: the recommended one, or the faster; at exit 6, K=3 nothing was measured
    runs = {
        row["confidence"]: row["speedup"] for row in record["measured"] if (row["exit"], row["draft_tokens"]) == (2, 6)
    }
    assert runs[None]["median"] < runs[0.6]["median"]
    assert cells[2, 6].shown == runs[None]["median"]
    assert f"★{runs[None]['median']:.2f}" in written
    [other] = [
        cell
        for cell in charts.best_settings({**record, "recommended": None})
        if cell.exit == 2 and cell.draft_tokens == 6
    ]
    assert other.shown == runs[0.6]["median"]
    assert written.count("measured") + sum(word.startswith("meas. P=") for word in written) == 5
    guesses = [row["speedup"] for row in record["predicted"] if (row["exit"], row["draft_tokens"]) == (6, 3)]
    assert cells[6, 3].measured is None
    assert cells[6, 3].shown == max(guesses)
    assert f"{max(guesses):.2f}" in written
    listed = [cell for row in tables.settings_tried(record).rows for cell in row]
    for cell in cells.values():
        assert any(text.startswith(f"{cell.shown:.2f}") for text in listed)


def test_a_recommended_head_is_starred_where_it_was_measured() -> None:
    record = read("tune")
    record["recommended"] |= {"vocabulary": 512}
    each = {key: record["recommended"][key] for key in ("exit", "draft_tokens", "confidence", "vocabulary")}
    spread = {"median": 1.7, "low": 1.6, "high": 1.8, "runs": [1.6, 1.7, 1.8]}
    record["narrow"] = [{**each, "speedup": spread, "gain": spread, "tokens_per_round": 3.5, "identical": True}]
    assert not any("★" in row[0] for row in tables.settings_tried(record).rows)
    [row] = tables.heads_tried(record).rows  # type: ignore[union-attr]
    assert row[0] == f"exit {each['exit']}, K={each['draft_tokens']}, 512 tokens ★"
    assert row[1].startswith("1.70")


def test_a_slow_measurement_is_not_hidden_by_a_fast_prediction() -> None:
    record = read("tune")
    for row in record["measured"]:
        row["speedup"] = {"median": 0.8, "low": 0.7, "high": 0.9, "runs": [0.8, 0.7, 0.9]}
    cells = {(cell.exit, cell.draft_tokens): cell for cell in charts.best_settings(record)}
    assert cells[2, 6].shown == 0.8
    assert cells[2, 2].shown > 1


def test_every_figure_of_a_line_is_in_its_table() -> None:
    for kind in ("bench", "tune"):
        chart = charts.acceptance_by_position(read(kind))
        assert chart is not None
        listed = [cell for row in tables.of_lines(chart).rows for cell in row]
        for points in chart.lines.values():
            assert all(f"{point.y:.1%}" in listed for point in points)
    scores = charts.scores_by_exit(read("eval"))
    listed = [cell for table in tables.scores(read("eval")) for row in table.rows for cell in row]
    for points in scores[0].lines.values():
        assert all(f"{point.y:.4f} ± {point.high - point.y:.4f}" in listed for point in points)


def test_scores_that_are_no_shares_have_a_panel_of_their_own() -> None:
    record = read("eval")
    for result in record["results"]:
        result["scores"]["all"]["perplexity"] = {"mean": 10.0 + result["exit"], "error": None, "count": 300}
    shares, other = charts.scores_by_exit(record)
    assert shares.share
    assert not other.share
    assert list(other.lines) == ["perplexity"]
    assert [point.x for point in other.lines["perplexity"]] == [1, 2, 3, 4, 6, 8, 10, 12]
    assert len(figures.scores_by_exit(record).axes) == 2


def test_a_drafted_result_is_no_exit() -> None:
    record = read("eval")
    record["results"].append({**record["results"][0], "name": "early-exit:2 K=4"})
    assert charts.scores_by_exit(record) == charts.scores_by_exit(read("eval"))
    assert any(row[0] == "early-exit:2 K=4" for row in tables.texts(record).rows)


def test_more_lines_than_colours_still_differ() -> None:
    record = read("tune")
    record["exits"] = [{**record["exits"][0], "exit": exit} for exit in range(1, 13)]
    figure = figures.acceptance_by_position(record)
    lines = figure.legends[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == 12


def test_of_many_ways_the_fastest_are_drawn() -> None:
    record = read("bench")
    cell = next(cell for cell in record["cells"] if cell.get("speedup"))
    plain = [cell for cell in record["cells"] if not cell.get("speedup")]
    median = cell["speedup"]["decode"]["median"]
    many = []
    for number in range(30):
        faster = {"median": median + number, "low": median, "high": median + 30, "runs": [median + number]}
        many.append({**cell, "name": f"way {number}", "speedup": {"decode": faster, "end_to_end": faster}})
    record["cells"] = plain + many
    figure = figures.speedup_by_batch(record)
    assert figure.get_suptitle().endswith("the 12 fastest of 30")
    shown = {text.get_text() for text in figure.legends[0].get_texts()} - {"end to end", "plain decoding"}
    assert shown == {f"way {number}" for number in range(18, 30)}


def test_a_record_without_it_has_no_figure() -> None:
    record = read("eval")
    record["curves"] = None
    with pytest.raises(RequestError, match="nothing for the figure 'loss by exit'"):
        figures.loss_by_exit(record)


# -- the page


def test_a_page_with_all_of_it(written: Written) -> None:
    folder = written.page.parent
    assert written.page.name == "report.html"
    assert (written.records, written.others) == (["bench.json", "eval.json", "tune.json"], ["notes.json"])
    assert len(written.pictures) == 10
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written.pictures)
    assert (folder / "tune-speedup-map.png") in written.pictures
    text = written.page.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 10
    assert {"Speedup by batch size", "Where the time goes", "Speedup over (E, K)", "Scores"} <= set(page.headings)
    for needed in (read("bench")["command"], "Intel(R) Xeon(R)", "torch 2.13.0", "exact: ", "lossy: ", "notes.json"):
        assert needed in text
    assert read("tune")["reason"] in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_refers_to_nothing_outside(written: Written) -> None:
    page_text = written.page.read_text()
    page = Page(page_text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert "http:" not in page_text
    assert "https:" not in page_text
    assert "@import" not in page_text
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", page_text))
    ids = {value for name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links} <= ids


def test_what_records_say_stays_text(folder: Path) -> None:
    bad = '<script>alert(1)</script> & "$x_1$" \'<b>'
    bench, scored = read("bench"), read("eval")
    bench["cells"][1]["name"] = bench["command"] = bench["notes"][0] = bench["settings"]["prompts"] = bad
    bench["cells"][1]["mode"] = bench["model"]["name"] = scored["machine"]["processor"] = scored["task"] = scored[
        "reason"
    ] = bad
    scored["results"][0]["scores"][bad] = {bad: {"mean": 0.5, "error": None, "count": 2}}
    (folder / "tune.json").unlink()
    (folder / "eval.json").unlink()
    write(folder, "bench.json", bench)
    write(folder, "<b>&'.json", scored)
    page = Page(write_report(folder).page.read_text())
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.cells.count(bad) >= 2
    assert any("$x_1$" in words for words in page.drawn)  # and is no formula
    assert sum(name.startswith("on") for name, _ in page.attributes) == 0


def test_what_is_not_known_is_left_out(folder: Path) -> None:
    record = read("bench")
    for cell in record["cells"]:
        cell["acceptance"] = cell["seconds"] = cell["round_latency"] = cell["token_latency"] = None
        cell["peak_memory"] = cell["bandwidth_share"] = cell["weights_read_per_second"] = None
        if "speedup" in cell:
            cell["speedup"]["decode"] = None
    record["unfinished"] = [{"batch": 1}]
    write(folder, "bench.json", record)
    tune = read("tune")
    tune["recommended"], tune["measured"] = None, []
    write(folder, "tune.json", tune)
    written = write_report(folder)
    names = {path.name for path in written.pictures}
    assert "bench-speedup-by-batch.png" in names
    assert "bench-time-split.png" not in names
    assert "tune-speedup-map.png" in names
    assert "unfinished" in written.page.read_text()


def test_a_record_of_curves_alone(folder: Path) -> None:
    record = read("eval")
    record["results"], record["task"] = [], "lm"
    for name in ("bench", "tune"):
        (folder / f"{name}.json").unlink()
    write(folder, "eval.json", record)
    page = Page(write_report(folder).page.read_text())
    assert page.headings == ["Loss by exit", "Accuracy and agreement by exit"]
    assert "lossy: the output is that of a shallower model" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("bench", lambda r: r.pop("cells"), "bench.json: it is not as layerskip bench writes it: 'cells' is missing"),
        ("bench", lambda r: r["cells"][0].pop("mode"), "'mode' is missing"),
        ("tune", lambda r: r["measured"][0].update(speedup=3), "tune.json: it is not as layerskip tune writes it: "),
        ("eval", lambda r: r.pop("machine"), "'machine' is missing"),
        ("eval", lambda r: r["model"].update(parameters="many"), "it is not as layerskip eval writes it"),
    ],
)
def test_a_record_that_lacks_something_is_named(folder: Path, kind: str, spoil: Any, message: str) -> None:
    record = copy.deepcopy(read(kind))
    spoil(record)
    write(folder, f"{kind}.json", record)
    with pytest.raises(RequestError, match=re.escape(message)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_folders_and_files_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no folder .*none; give one with the records"):
        write_report(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RequestError, match="empty holds no record; bench, tune and eval write one"):
        write_report(empty)
    (empty / "x.json").write_text("3")
    with pytest.raises(RequestError, match=r"holds no record; .*; x\.json is none"):
        write_report(empty)
    (folder / "half.json").write_text('{"kind": "bench"')
    with pytest.raises(RequestError, match=r"half\.json is not JSON: .* repair it, or move it away"):
        write_report(folder)
    (folder / "half.json").unlink()
    with pytest.raises(StorageError, match=r"cannot write .*eval\.json/report\.html: "):
        write_report(folder, folder / "eval.json" / "report.html")


# -- in a browser


def browse(page: Path) -> str:
    """The page as Chromium has it after its scripts; skips where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a Chromium, and there is no chromium in the path")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.slow  # starts a browser
def test_a_browser_shows_titles_and_numbers(written: Written) -> None:
    dom = browse(written.page)
    page = Page(dom)
    assert "Speedup over (E, K)" in page.headings
    assert ">Speedup over plain decoding</text>" in dom  # a figure's own title
    [first] = [cell for cell in read("bench")["cells"] if cell["name"] == "early-exit:2 K=6" and cell["batch"] == 1]
    speed = first["speedup"]["decode"]
    assert f"{speed['median']:.2f} ({speed['low']:.2f} – {speed['high']:.2f})" in page.cells
    assert page.tags.count("svg") == 10


def test_the_page_does_not_scroll_sideways_on_a_phone(written: Written, tmp_path: Path) -> None:
    """In a frame of 390 pixels: a window of Chromium is not that narrow."""
    measure = (
        "onload = () => { const frame = document.querySelector('iframe').contentWindow, root = frame.document;"
        "const tables = [...root.querySelectorAll('.scroll')];"
        "document.body.dataset.found = [frame.innerWidth, root.documentElement.scrollWidth, tables.length,"
        "tables.filter(each => each.scrollWidth > each.clientWidth).length].join(' ') }"
    )
    frame = f'<iframe width="390" height="844" style="border:0" srcdoc="{escape(written.page.read_text())}"></iframe>'
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}<script>{measure}</script>')
    found = re.search(r'data-found="(\d+) (\d+) (\d+) (\d+)"', browse(wrapper))
    assert found is not None
    window, content, tables, wide = map(int, found.groups())
    assert window == 390
    assert content <= window
    assert 0 < wide <= tables  # wide tables scroll in their own boxes
