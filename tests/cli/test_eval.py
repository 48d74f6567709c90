"""`layerskip eval`: scores in tables and JSON, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.evaluate import evaluate, topv2

HEADER = "domain\tutterance\tsemantic_parse\n"
LINES = [
    "alarm\tset an alarm\t[IN:CREATE_ALARM set an alarm ]\n",
    "timer\tstart a timer\t[IN:CREATE_TIMER start [SL:METHOD_TIMER a timer ] ]\n",
    "weather\twill it rain\t[IN:GET_WEATHER will it [SL:WEATHER_ATTRIBUTE rain ] ]\n",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "x_eval.tsv").write_text(HEADER + "".join(LINES))
    (folder / "x_train.tsv").write_text(HEADER + LINES[1])
    return folder


def test_a_drafter_in_json(run: Any, tiny_checkpoint: Path, data: Path) -> None:
    arguments = ("--task", "topv2", "--data", data, "--dtype", "float64", "--device", "cpu", "--batch", 2)
    drafting = ("--draft", "early-exit:2", "--draft-tokens", 3)
    done = run("eval", "-m", tiny_checkpoint, *arguments, *drafting, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert len(done.stdout.splitlines()) == 1
    assert (record["task"], record["items"], record["dtype"]) == ("topv2", 3, "float64")
    assert record["draft"] == {"drafter": "early-exit:2", "tokens": 3, "confidence": None}
    plain, drafted = record["results"]
    assert (plain["name"], drafted["name"]) == ("plain", "early-exit:2 K=3")
    assert (drafted["mode"], drafted["identical"], drafted["scores"]) == ("exact", 3, plain["scores"])
    llm = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    wanted = evaluate(llm, topv2(data), draft=layerskip.EarlyExit(2, tokens=3)).results[1]
    assert drafted["tokens"] == plain["tokens"] == wanted.tokens
    assert wanted.acceptance is not None
    counts = drafted["acceptance"]
    assert counts["num_accepted_draft_tokens"] == wanted.acceptance.accepted
    assert counts["draft_acceptance_rate"] == wanted.acceptance.rate
    assert counts["emitted_per_round"] == wanted.tokens / wanted.acceptance.rounds


def test_a_drafter_for_people(run: Any, tiny_checkpoint: Path, data: Path) -> None:
    arguments = ("--task", "topv2", "--data", data / "x_eval.tsv", "--limit", 1, "--dtype", "float64")
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--draft", "lookup")
    assert (done.exit_code, done.stderr) == (0, "")
    words = [line.split() for line in done.stdout.splitlines()]
    assert words[0] == ["topv2,", "all:", "1", "item"]
    assert ["exact_match", "template_match", "well_formed"] in words
    assert ["plain", "0.0%", "0.0%", "0.0%"] in words  # one item has no standard error
    last = done.stdout.splitlines()[-1]
    assert last.startswith("lookup K=8: acceptance ")
    assert last.endswith("; 1 of 1 texts identical to plain ones")


def test_exits_and_pairs_that_were_seen(run: Any, tiny_checkpoint: Path, data: Path) -> None:
    arguments = ("--task", "topv2", "--data", f"{data}/*_eval.tsv", "--seen", data)
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--exit", "all")
    assert done.exit_code == 0
    assert "topv2, all: 3 items" in done.stdout
    assert "topv2, unseen: 2 items" in done.stdout
    modes = [tuple(line.split()[:3]) for line in done.stdout.splitlines() if "lossy" in line]
    assert modes == [("exit", "1", "lossy"), ("exit", "2", "lossy")]
    record = json.loads(run("eval", "-m", tiny_checkpoint, *arguments, "--exit", "2,3,2", "--json").stdout)
    assert [(r["name"], r["mode"], r["exit"]) for r in record["results"]] == [
        ("plain", "exact", 3),
        ("exit 2", "lossy", 2),
    ]
    assert record["draft"] is None
    assert record["results"][1]["scores"]["unseen"]["well_formed"]["count"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "topv", "--data", "."], "unknown task 'topv'; use topv2; did you mean 'topv2'?"),
        (["--data", "."], "no task: give --task a name, such as topv2"),
        (["--task", "topv2"], "no data: give --data a file, a folder or a pattern"),
        (["--task", "topv2", "--data", "nowhere.tsv"], "no file matches nowhere.tsv; give a file, a folder with"),
        ([..., "--seen", "nowhere"], "no file matches nowhere; give a file, a folder with *_train.tsv, or a pattern"),
        ([..., "--limit", "0"], "limit 0 is not possible; use 1 or more items"),
        ([..., "--batch", "0"], "max_batch 0 is not possible; use 1 or more"),
        ([..., "--exit", "0"], "exit 0 is not inside this 3-layer model; use 1..3"),
        ([..., "--exit", "1,4"], "exit 4 is not inside this 3-layer model; use 1..3"),
        ([..., "--exit", "1,x"], "--exit 1,x is not possible; use all, or numbers of layers such as 2,4"),
        ([..., "--exit", ""], "--exit is not possible; use all, or numbers"),
        ([..., "--exit", "1", "--draft", "early-exit:1"], "--exit and --draft answer different questions"),
        ([..., "--draft", "early-exit:3"], "draft exit 3 is not below the 3 layers the model decodes with; use 1..2"),
        ([..., "--draft-tokens", "3"], "--draft-tokens 3 needs a drafter"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Any, tiny_checkpoint: Path, data: Path, arguments: list[Any], message: str
) -> None:
    if arguments[0] is ...:
        arguments = ["--task", "topv2", "--data", data, *arguments[1:]]
    done = run("eval", "-m", tiny_checkpoint, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_malformed_line(run: Any, tiny_checkpoint: Path, data: Path) -> None:
    (data / "x_eval.tsv").write_text(HEADER + LINES[0] + "alarm\tstop\t[IN:STOP\n")
    done = run("eval", "-m", tiny_checkpoint, "--task", "topv2", "--data", data)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {data}/x_eval.tsv:3 is malformed: 1 bracket(s) are never closed, the last one [IN:STOP\n"
    )


def test_every_option_has_help() -> None:
    from typer.main import get_command

    from layerskip.cli import app

    parameters = get_command(app).commands["eval"].params  # type: ignore[attr-defined]
    assert [p.name for p in parameters if not p.help] == []
    assert {"model", "task", "data", "seen", "limit", "batch", "exit", "debug"} <= {p.name for p in parameters}


def test_an_unknown_command_names_it(run: Any) -> None:
    assert "eval" in run("evaluate").stderr
