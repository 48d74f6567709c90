"""`layerskip eval`: scores in tables and JSON, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip import LLM
from layerskip.evaluate import evaluate, record, topv2

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
    assert (record["kind"], record["task"], record["items"]) == ("eval", "topv2", 3)
    assert (record["model"]["dtype"], record["settings"]["batch"], record["curves"]) == ("float64", 2, None)
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
        (
            ["--task", "topv", "--data", "."],
            "spec_bench, lm; did you mean 'topv2'?",
        ),
        (["--data", "."], "no task: give --task a name, such as topv2"),
        (["--task", "topv2"], "no data: give --data a file, a folder, a pattern or hub"),
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


# --- other tasks


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} + 1", "answer": f"#### {i + 1}"} for i in range(6)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "gsm8k.jsonl"


def test_shots_and_limits_are_recorded(run: Any, tiny_checkpoint: Path, questions: Path) -> None:
    arguments = ("--task", "gsm8k", "--data", questions, "--limit", 2, "--shots", 2, "--seed", 3, "--max-tokens", 4)
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["items"], found["results"][0]["scores"]["all"]["exact_match"]["count"]) == (2, 2)
    settings = found["settings"]
    assert (settings["limit"], settings["shots"], settings["seed"], settings["max_tokens"]) == (2, 2, 3, 4)
    assert found["results"][0]["tokens"] <= 8


def test_speed_alone_by_category(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"category": "qa" if i % 2 else "math", "turns": [f"turn {i}"]} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--task", "spec_bench", "--data", tmp_path / "x.jsonl", "--max-tokens", 6, "--dtype", "float64")
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--draft", "early-exit:1")
    assert (done.exit_code, done.stderr) == (0, "")
    words = [line.split() for line in done.stdout.splitlines()]
    assert "spec_bench: 5 items, nothing is scored" in done.stdout
    assert [row[:2] for row in words if row[:1] in (["math"], ["qa"])] == [["math", "3"], ["qa", "2"]]
    assert "exact_match" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("; 5 of 5 texts identical to plain ones")
    found = json.loads(run("eval", "-m", tiny_checkpoint, *arguments, "--json").stdout)["results"][0]
    assert found["scores"] == {}
    pace = found["pace"]
    assert list(pace) == ["all", "math", "qa"]
    assert pace["all"]["tokens"] == pace["math"]["tokens"] + pace["qa"]["tokens"] == found["tokens"] > 0
    assert all(each["seconds"]["end_to_end"] > each["seconds"]["decode"] > 0 for each in pace.values())
    each = pace["qa"]
    assert each["tokens_per_second"]["end_to_end"] == each["tokens"] / each["seconds"]["end_to_end"]


def test_language_modelling_has_a_row_for_each_exit(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    arguments = ("--task", "lm", "--data", tmp_path / "x.txt")
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--output", tmp_path / "out")
    assert (done.exit_code, done.stderr) == (0, "")
    words = [line.split() for line in done.stdout.splitlines()]
    assert ["exit", "loss", "perplexity", "accuracy", "agreement"] in words
    assert [row[0] for row in words if row and row[0].isdecimal()] == ["1", "2", "3"]
    assert words[-2][-1] == "100.00%" or words[-1][-1] == "100.00%"
    found = record.read(tmp_path / "out" / "eval-lm.json")
    assert (found["kind"], found["results"], [point["exit"] for point in found["curves"]]) == ("eval", [], [1, 2, 3])
    few = json.loads(run("eval", "-m", tiny_checkpoint, *arguments, "--exit", "2", "--json").stdout)["curves"]
    assert few == found["curves"][1:]


def test_programs_are_run_only_when_allowed(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    arguments = ("--task", "humaneval", "--data", tmp_path / "x.jsonl", "--max-tokens", 4)
    done = run("eval", "-m", "nowhere", *arguments)  # refused before a model is looked for
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "error: task humaneval runs programs that the model writes, in a sandbox; allow it with "
        "--allow-code-execution\n"
    )


@pytest.mark.usefixtures("bubblewrap")
def test_programs_that_fail_are_scored(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    arguments = ("--task", "humaneval", "--data", tmp_path / "x.jsonl", "--max-tokens", 4)
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--allow-code-execution", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["results"][0]["scores"]["all"]["pass@1"]["mean"] == 0.0


def test_prompts_that_do_not_fit_can_be_left_out(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"question": "q" * length, "answer": "#### 1"} for length in (3, 900, 4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--task", "gsm8k", "--data", tmp_path / "x.jsonl", "--max-tokens", 2, "--json")
    done = run("eval", "-m", tiny_checkpoint, *arguments)
    assert done.exit_code == 2
    assert "item 2 of 3 of gsm8k: the prompt has " in done.stderr
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--skip-long")
    assert done.stderr == "1 of 3 items do not fit the model's context and are left out\n"
    assert json.loads(done.stdout)["items"] == 2
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[1]))
    done = run("eval", "-m", tiny_checkpoint, *arguments, "--skip-long")
    assert "error: none of the 1 prompts of gsm8k fits the context of this model, 256 tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "7"], "7 shots need as many examples that are not asked, and there are 0; give --shots-data"),
        (["--limit", "4", "--shots", "3"], "3 shots need as many examples that are not asked, and there are 2;"),
        (["--shots-data", "x"], "--shots-data x needs --shots; say how many"),
        (["--shots", "1", "--shots-data", "nowhere"], "no file matches nowhere; give a file, a folder with *.jsonl"),
        (["--max-tokens", "0"], "--max-tokens 0 is not possible; use 1 or more"),
        (["--seen", "x"], "task gsm8k does not tell apart what was trained on; leave --seen out"),
    ],
)
def test_what_a_task_cannot_do_is_one_line(
    run: Any, tiny_checkpoint: Path, questions: Path, arguments: list[str], message: str
) -> None:
    done = run("eval", "-m", tiny_checkpoint, "--task", "gsm8k", "--data", questions, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert message in line


# --- records and interrupted runs


def test_an_interrupted_run_goes_on_where_it_was(
    run: Any, tiny_checkpoint: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LLM.stream
    ran: list[int | None] = []
    interrupted_at: int | None = 2

    def watched(self: LLM, prompts: Any, **settings: Any) -> Any:
        ran.append(settings["exit"])
        if settings["exit"] is not None and settings["exit"] == interrupted_at:
            raise KeyboardInterrupt
        return stream(self, prompts, **settings)

    monkeypatch.setattr(LLM, "stream", watched)
    output = tmp_path / "out"
    base = ("eval", "--task", "gsm8k", "--data", questions, "--max-tokens", 5, "--exit", "1,2")
    command = (*base, "-m", tiny_checkpoint, "--output", output)
    done = run(*command)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted; the same command goes on with what is unfinished\n"
    assert ran == [None, 1, 2]
    assert [path.name for path in output.iterdir()] == ["unfinished-eval-gsm8k.json"]

    interrupted_at = None
    ran.clear()
    done = run(*command, "--json")
    assert (done.exit_code, ran) == (0, [2])
    assert done.stderr == "going on where an interrupted run of the same ended\n"
    assert [path.name for path in output.iterdir()] == ["eval-gsm8k.json"]
    found = json.loads(done.stdout)
    assert found == record.read(output / "eval-gsm8k.json")
    ran.clear()
    whole = json.loads(run(*base, "-m", tiny_checkpoint, "--json").stdout)
    assert ran == [None, 1, 2]
    for one, other in zip(found["results"], whole["results"], strict=True):
        for name in ("name", "mode", "exit", "scores", "tokens", "identical"):
            assert one[name] == other[name]


def test_what_another_run_left_is_not_taken_up(
    run: Any, tiny_checkpoint: Path, copy: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    output = tmp_path / "out"
    command = ("eval", "--task", "gsm8k", "--data", questions, "--max-tokens", 3, "--output", output)
    stream = LLM.stream

    def interrupted(self: LLM, prompts: Any, **settings: Any) -> Any:
        if settings["exit"] == 1:
            raise KeyboardInterrupt
        return stream(self, prompts, **settings)

    same = copy("same")
    for change in ("weights", "items", "batch", "broken", "nothing"):
        with monkeypatch.context() as patched:
            patched.setattr(LLM, "stream", interrupted)
            assert run(*command, "-m", same, "--exit", 1).exit_code == 130
        changed: tuple[object, ...] = ()
        if change == "weights":
            tensors = load_file(same / "model.safetensors")
            tensors["model.norm.weight"] *= 0.5
            save_file(tensors, same / "model.safetensors", metadata={"format": "pt"})
        elif change == "items":
            changed = ("--limit", 3)
        elif change == "batch":
            changed = ("--batch", 2)
        elif change == "broken":
            (output / "unfinished-eval-gsm8k.json").write_text('{"kind": "unfin')
        left = output / "unfinished-eval-gsm8k.json"
        before = left.read_bytes()
        done = run(*command, "-m", same, "--exit", 1, *changed)
        if change == "nothing":
            assert (done.exit_code, done.stderr) == (0, "going on where an interrupted run of the same ended\n")
            continue
        refused = "is what is left of another model, task or setting; choose another --output, or delete it"
        assert (done.exit_code, done.stderr) == (2, f"error: {left} {refused}\n")
        assert left.read_bytes() == before
        left.unlink()


def test_a_folder_that_cannot_be_written_is_known_at_once(
    run: Any, tiny_checkpoint: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    base = ("eval", "-m", tiny_checkpoint, "--task", "gsm8k", "--data", questions)
    done = run(*base, "--output", tmp_path / "file")
    assert (done.exit_code, done.stdout) == (1, "")
    assert run(*base, "--output", tmp_path / "none", "--batch", 0).exit_code == 2
    assert list((tmp_path / "none").iterdir()) == []
    assert done.stderr.startswith(f"error: cannot write {tmp_path}/file/unfinished-eval-gsm8k.json: ")
    assert len(done.stderr.splitlines()) == 1


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
