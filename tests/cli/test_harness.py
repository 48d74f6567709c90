"""`layerskip eval --harness`: local tasks, offline, at exits and drafted."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from layerskip.cli import harness
from layerskip.evaluate import record
from tests.cli.outcome import refused


def test_examples() -> None:
    assert doctest.testmod(harness).failed == 0


def test_exits_in_a_table_and_a_record(run: Any, tiny_checkpoint: Path, local_tasks: Path, tmp_path: Path) -> None:
    arguments = ("--harness", "choice,writing", "--tasks-folder", local_tasks, "--exit", "1,3", "--limit", 20)
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--batch", 4, "--output", tmp_path / "new")
    assert (done.exit_code, done.stderr) == (0, "")
    words = [line.split() for line in done.stdout.splitlines()]
    assert ["metric", "exit", "1", "plain"] in words
    row = next(line for line in words if line[:3] == ["choice,", "0-shot", "acc"])
    assert row[4] == row[7] == "±"
    assert any(line[:3] == ["exit", "1", "lossy"] for line in words)
    assert any(line[:2] == ["plain", "exact"] for line in words)

    [file] = (tmp_path / "new").iterdir()
    assert file.name == "eval-choice-writing-exit-1-plain.json"
    found = record.read(file)
    assert (found["kind"], found["task"], found["items"], found["curves"]) == ("eval", "choice,writing", 28, None)
    assert found["harness"]["shots"] == {"choice": 0, "writing": 0}
    assert found["harness"]["limit"] == 20
    assert found["harness"]["version"]
    early, plain = found["results"]
    assert [(r["name"], r["mode"], r["exit"]) for r in (early, plain)] == [
        ("exit 1", "lossy", 1),
        ("plain", "exact", 3),
    ]
    assert f"{early['scores']['choice']['acc']['mean']:.4f}" == row[3]
    assert f"{plain['scores']['choice']['acc']['mean']:.4f}" == row[6]
    assert early["scores"]["choice"] != plain["scores"]["choice"]
    assert {"command", "machine", "versions", "model"} <= set(found)


def test_a_drafter_in_json(run: Any, tiny_checkpoint: Path, local_tasks: Path) -> None:
    arguments = ("--harness", "choice,writing", "--tasks-folder", local_tasks, "--limit", 6, "--json")
    plain = json.loads(run("eval", "-m", tiny_checkpoint, *arguments).stdout)
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--draft", "early-exit:2", "--draft-tokens", 3)
    assert (done.exit_code, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    drafted = json.loads(done.stdout)
    [[one], [other]] = plain["results"], drafted["results"]
    assert (one["name"], one["mode"], other["name"], other["mode"]) == ("plain", "exact", "early-exit:2 K=3", "exact")
    assert other["scores"] == one["scores"]
    assert other["tokens"] == one["tokens"]
    assert one["acceptance"] is None
    assert other["acceptance"]["num_emitted_tokens"] == other["tokens"]
    assert drafted["draft"] == {"drafter": "early-exit:2", "tokens": 3, "confidence": None}
    shown = run("eval", "-m", tiny_checkpoint, *arguments[:-1], "--draft", "lookup").stdout.splitlines()[-1]
    assert shown.startswith("lookup K=8: acceptance ")
    assert shown.endswith("exact: a drafter changes speed only")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "early-exit:1"], "choice only compares log-likelihoods: nothing is generated, so a drafter"),
        (["--exit", "1", "--draft", "early-exit:1"], "--exit and --draft answer different questions"),
        (["--exit", "4"], "exit 4 is not inside this 3-layer model; use 1..3"),
        (["--exit", "x"], "--exit x is not possible; use all, or numbers of layers such as 2,4"),
        (["--task", "topv2"], "--harness choice and --task topv2 are two questions; use one of them"),
        (["--limit", "0"], "limit 0 is not possible; use 1 or more"),
        (["--shots", "-1"], "shots -1 is not possible; use 0 or more"),
        (["--batch", "0"], "max_batch 0 is not possible; use 1 or more"),
        (["--tasks-folder", "nowhere"], "no folder nowhere; give one with YAML files of tasks"),
        (["--output", "/proc/none"], "cannot write to /proc/none: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_is_one_line(
    run: Any, tiny_checkpoint: Path, local_tasks: Path, arguments: list[str], message: str
) -> None:
    done = run("eval", "-m", tiny_checkpoint, "--harness", "choice", "--tasks-folder", local_tasks, *arguments)
    assert (done.exit_code, done.stdout) == (1 if "--output" in arguments else 2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_exits_are_checked_before_any_of_them_runs(
    run: Any, tiny_checkpoint: Path, local_tasks: Path, tmp_path: Path
) -> None:
    arguments = ("--harness", "choice", "--tasks-folder", local_tasks, "--exit", "2,40", "--output", tmp_path / "new")
    refused(run("eval", "-m", tiny_checkpoint, *arguments), "exit 40 is not inside this 3-layer model; use 1..3")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [
        ("--data", "x"),
        ("--seen", "x"),
        ("--shots-data", "x"),
        ("--seed", 1),
        ("--skip-long",),
        ("--max-tokens", 0),
        ("--allow-code-execution",),
    ],
    ids=lambda option: option[0],
)
def test_options_of_a_task_are_not_for_the_harness(run: Any, option: tuple[object, ...]) -> None:
    refused(run("eval", "--harness", "choice", *option), f"{option[0]} is for --task; leave it out with --harness")


def test_options_of_the_harness_need_it(run: Any) -> None:
    done = run("eval", "--task", "topv2", "--tasks-folder", ".")
    assert done.exit_code == 2
    assert done.stderr == "error: --tasks-folder is for tasks of lm-evaluation-harness; add --harness NAME\n"
    assert "no task of lm-evaluation-harness is named" in run("eval", "--harness", ",").stderr
