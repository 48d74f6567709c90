"""`layerskip report`: from a record that `layerskip eval` wrote to a page."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")


def test_a_record_of_eval_becomes_a_page(run: Any, tiny_checkpoint: Path, local_tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    arguments = ("--harness", "choice", "--tasks-folder", local_tasks, "--exit", "all", "--output", tmp_path)
    assert run("eval", "-m", tiny_checkpoint, *arguments).exit_code == 0
    [record] = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    (tmp_path / "other.json").write_text("{}")
    done = run("report", tmp_path)
    assert done.exit_code == 0
    assert done.stdout == f"{tmp_path}/report.html: 1 record, 1 figure, also beside it as PNG\n"
    assert done.stderr == "no records: other.json\n"
    page = (tmp_path / "report.html").read_text()
    for result in record["results"]:
        score = result["scores"]["choice"]["acc"]
        assert f"{score['mean']:.4f} ± {score['error']:.4f}" in page
    assert f"Quality of {tiny_checkpoint.name} on choice" in page
    assert len(list(tmp_path.glob("*.png"))) == 1

    elsewhere = run("report", tmp_path, "--output", tmp_path / "new" / "page.html")
    assert elsewhere.exit_code == 0
    assert (tmp_path / "new" / "page.html").read_text() == page
    assert len(list((tmp_path / "new").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("file", "text", "arguments", "status", "message"),
    [
        ("x.txt", "", [], 2, "holds no record; bench, tune and eval write one with --output"),
        ("x.json", "{", [], 2, "x.json is not JSON"),
        ("x.json", '{"kind": "eval"}', [], 2, "x.json: it is not as layerskip eval writes it: 'model' is missing"),
        (None, "", [], 2, "no folder"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    run: Any, tmp_path: Path, file: str | None, text: str, arguments: list[str], status: int, message: str
) -> None:
    folder = tmp_path / "results"
    if file is not None:
        folder.mkdir()
        (folder / file).write_text(text)
    done = run("report", folder, *arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_place_that_cannot_be_written(run: Any, tmp_path: Path) -> None:
    records = Path(__file__).parents[1] / "evaluate" / "records"
    done = run("report", records, "--output", "/proc/none/report.html")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot write /proc/none/report.html: ")
    assert len(done.stderr.splitlines()) == 1
