"""`layerskip bench`: tables, a last line that the schema describes, runs that go on, and what is refused."""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import layerskip
from layerskip.cli.benchtables import same
from layerskip.evaluate.contest import Contest
from tests.cli.outcome import last_line, refused

LINES = ["the dog", "Once upon a time", "a", "the quick brown fox jumps over"]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """The one that comes with the package."""
    text = (files("layerskip.evaluate") / "schemas" / "bench.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


@pytest.fixture
def base(tiny_checkpoint: Path, prompts: Path) -> tuple[Any, ...]:
    """A small benchmark on the tiny checkpoint."""
    common = ("--max-tokens", 8, "--repeat", 2, "--dtype", "float64", "--device", "cpu", "--ignore-eos")
    return ("bench", "-m", tiny_checkpoint, "--prompts", prompts, *common)


def test_tables_then_one_line(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, schema: jsonschema.Draft202012Validator
) -> None:
    drafts = ("--draft", "early-exit:1", "--draft", "lookup", "--draft-tokens", "2,3", "--batch", "1,2")
    done = run(*base, *drafts, "--peer", "transformers", "--peer", "transformers-early-exit")
    record = last_line(done)
    schema.validate(record)
    names = ["plain", "early-exit:1 K=2", "early-exit:1 K=3", "lookup K=2", "lookup K=3"]
    peers = ["transformers", "transformers-early-exit:1 K=2"]
    assert [(cell["batch"], cell["name"]) for cell in record["cells"]] == [
        *((1, name) for name in names + peers),
        *((2, name) for name in [*names, "transformers"]),
    ]
    for cell in record["cells"]:
        assert cell["tokens"] == 4 * 8
        assert cell["identical"] is (None if cell["name"] == "plain" else True)
        assert cell["peer"] == cell["name"].startswith("transformers")
        assert len(cell["tokens_per_second"]["decode"]["runs"]) == 2
        assert (cell["bandwidth_share"] is None) == cell["peer"]
    [note] = record["notes"]
    assert note == (
        "batch 2, without transformers-early-exit:1 K=2: transformers drafts for one row only, not for a batch of 2"
    )
    assert note in done.stderr
    llm = layerskip.load(tiny_checkpoint)
    settings = record["settings"]
    assert (settings["items"], settings["batch"], settings["repeat"]) == (4, [1, 2], 2)
    assert settings["prompt_tokens"] == sum(len(llm.encode(line)) for line in LINES)
    assert record["model"]["parameters"] == llm.decoder.shape.parameters()["total"]
    drafted = record["cells"][1]
    read = drafted["weights_read_per_second"]["median"]
    assert drafted["bandwidth_share"]["median"] == pytest.approx(read / record["bandwidth"]["bytes_per_second"])
    # for people
    words = [line.split() for line in done.stdout.splitlines()[:-1]]
    assert ["tokens/s", "decode", "end", "to", "end", "speedup", "same"] in words
    [speed, *_] = [line for line in words if line[:2] == ["early-exit:1", "K=3"]]
    assert (len(speed), speed[-1]) == (6, "yes")
    assert sum(line.startswith("early-exit:1 K=2: acceptance ") for line in done.stdout.splitlines()) == 2
    assert "repeat 2 of 2" in done.stderr


def test_early_exits_are_measured_as_lossy(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, schema: jsonschema.Draft202012Validator
) -> None:
    done = run(*base, "--exit", "1,2,3", "--draft", "early-exit:1", "--limit", 2)
    record = last_line(done)
    schema.validate(record)
    cells = {cell["name"]: cell for cell in record["cells"]}
    assert {name: (cell["mode"], cell["exit"]) for name, cell in cells.items()} == {
        "plain": ("exact", None),
        "exit 1": ("lossy", 1),
        "exit 2": ("lossy", 2),
        "early-exit:1 K=4": ("exact", 1),
    }
    llm = layerskip.load(tiny_checkpoint, dtype="float64")
    texts = [llm.generate(line, max_tokens=8, exit=1, ignore_eos=True).tokens for line in LINES[:2]]
    plain = [llm.generate(line, max_tokens=8, ignore_eos=True).tokens for line in LINES[:2]]
    assert cells["exit 1"]["identical"] == (texts == plain)
    assert cells["exit 1"]["acceptance"] is None
    assert "exit 1, exit 2 lossy, all others exact" in done.stdout


def test_without_a_model_and_flags_it_measures_the_parser(run: Any, schema: jsonschema.Draft202012Validator) -> None:
    done = run("bench", "--limit", 2, "--repeat", 1, "--max-tokens", 6, "--dtype", "float32", "--device", "cpu")
    record = last_line(done)
    schema.validate(record)
    recommended = layerskip.load().recommended
    assert recommended is not None
    plain, drafted = record["cells"]
    assert (drafted["exit"], drafted["draft_tokens"]) == (recommended.exit, recommended.draft_tokens)
    assert (plain["tokens"], drafted["identical"], record["settings"]["prompts"]) == (12, True, "built in")


def test_prompts_of_a_task(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = ["domain\tutterance\tsemantic_parse", *(f"alarm\tset {i}\t[IN:SET set {i} ]" for i in range(5)), ""]
    (tmp_path / "x_eval.tsv").write_text("\n".join(lines))
    task = ("--task", "topv2", "--data", tmp_path, "--limit", 2, "--repeat", 1, "--max-tokens", 4)
    record = last_line(run("bench", "-m", tiny_checkpoint, *task, "--draft", "none", "--batch", 2, "--threads", 1))
    settings = record["settings"]
    assert (settings["prompts"], settings["items"], settings["batch"]) == ("topv2", 2, [2])
    assert [cell["name"] for cell in record["cells"]] == ["plain"]
    assert record["machine"]["threads"] == record["bandwidth"]["threads"] == 1


def test_a_run_that_was_interrupted_goes_on(
    run: Any,
    base: tuple[Any, ...],
    tmp_path: Path,
    schema: jsonschema.Draft202012Validator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = (*base, "--draft", "early-exit:2", "--batch", 1, "--batch", 2, "--output", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["layerskip", *map(str, command)])
    repeat, measured = Contest.repeat, []

    def counted(self: Contest, number: int) -> Any:
        if len(measured) == 3 and left:
            raise KeyboardInterrupt
        measured.append((self.settings.batch, number))
        return repeat(self, number)

    left = True
    with monkeypatch.context() as patch:
        patch.setattr(Contest, "repeat", counted)
        done = run(*command)
        assert done.exit_code == 130
        assert "the same command goes on with it" in done.stderr
        kept = json.loads((tmp_path / "out" / "bench.json").read_text())
        schema.validate(kept)
        assert [(c["batch"], len(c["time_to_first_token"]["runs"])) for c in kept["cells"]] == [(1, 2)] * 2 + [
            (2, 1)
        ] * 2
        left = False
        record = last_line(run(*command))
    assert measured == [(1, 0), (1, 1), (2, 0), (2, 1)]
    schema.validate(record)
    assert "unfinished" not in record
    assert record == json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["bandwidth"] == kept["bandwidth"]
    # what was measured before is in it as it was
    assert record["cells"][:2] == kept["cells"][:2]
    for before, after in zip(kept["cells"][2:], record["cells"][2:], strict=True):
        assert len(after["time_to_first_token"]["runs"]) == 2
        assert after["time_to_first_token"]["runs"][:1] == before["time_to_first_token"]["runs"]
    # and once it is finished there is nothing to measure
    with monkeypatch.context() as patch:
        patch.setattr(Contest, "repeat", None)
        again = run(*command)
    assert last_line(again) == record
    assert "is finished: nothing is measured" in again.stderr


def test_another_run_is_not_gone_on_with(run: Any, base: tuple[Any, ...], tmp_path: Path) -> None:
    command = (*base, "--draft", "lookup", "--output", tmp_path)
    record = last_line(run(*command))
    assert len(record["settings"]["weights_digest"]) == 16
    others: dict[str, Any] = {
        "command": "layerskip bench",
        "model": {"name": "x"},
        "commit": "0" * 40,
        "machine or number of threads": {},
        "settings": {**record["settings"], "weights_digest": "0" * 16},  # trained on since
    }
    for key, change in others.items():
        (tmp_path / "bench.json").write_text(json.dumps({**record, key.split()[0]: change}))
        refused(
            run(*command),
            f"{tmp_path}/bench.json was measured with another {key}; choose another --output, or delete it to measure",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "transformer"], "unknown peer 'transformer'; use transformers or transformers-early-exit; did you"),
        (["--batch", "5"], "batch 5 needs as many prompts, and there are 4; use a batch of at most 4, or more prompts"),
        (["--batch", "0"], "batch 0 is not possible; use 1 or more"),
        (["--batch", "1 4"], "--batch 1 4 is not possible; use whole numbers such as 1,4,16"),
        (["--repeat", "0"], "repeat 0 is not possible; use 1 or more"),
        (["--max-tokens", "0"], "max_tokens 0 is not possible; use 1 or more"),
        (["--threads", "0"], "threads 0 is not possible; use 1 or more"),
        (["--limit", "0"], "limit 0 is not possible; use 1 or more prompts"),
        (["--draft", "early-exit"], "recommends no exit; write early-exit:3, say"),
        ([], "recommends no exit; write early-exit:3, say"),
        (["--draft", "early-exit:3"], "draft exit 3 is not below the 3 layers the model decodes with; use 1..2"),
        (["--draft", "early"], "unknown drafter 'early'; use auto, none, early-exit"),
        (["--draft", "lookup", "--draft-tokens", "2;3"], "--draft-tokens 2;3 is not possible; use whole numbers such"),
        (["--draft", "lookup", "--draft-tokens", "0"], "drafting 0 tokens a round is not possible"),
        (["--draft", "none", "--draft-tokens", "2"], "--draft-tokens 2 needs a drafter; add --draft early-exit:E, say"),
        (["--draft", "lookup", "--draft", "lookup"], "lookup K=8 is asked for twice; leave one of them out"),
        (
            ["--draft", "lookup", "--peer", "transformers-early-exit"],
            "transformers-early-exit takes exit and K of ours",
        ),
        (["--task", "topv2"], "both --prompts and --task are given; use one of them"),
        (["--data", "x"], "--data belongs to a task; add --task, or use --prompts FILE"),
    ],
)
def test_what_cannot_be_asked_is_one_line(run: Any, base: tuple[Any, ...], arguments: list[str], message: str) -> None:
    if arguments[:1] in (["--data"], ["--batch"], ["--peer"], ["--limit"]):
        arguments = [*arguments, "--draft", "lookup"]
    done = run(*base, *arguments)
    refused(done, message)


def test_prompts_that_are_not_there(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(run("bench", "-m", tiny_checkpoint, "--draft", "lookup"), "no prompts: give --prompts FILE, or --task")
    (tmp_path / "empty.txt").write_text("\n \n")
    empty = run("bench", "-m", tiny_checkpoint, "--draft", "lookup", "--prompts", tmp_path / "empty.txt")
    refused(empty, f"{tmp_path}/empty.txt holds no prompts; give one in each line")


def test_prompts_of_json_lines(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"utterance": "the dog"}\n{"question": "why?", "answer": "so"}\n')
    settings = ("--prompts", tmp_path / "p.jsonl", "--max-tokens", 2, "--repeat", 1, "--draft", "none")
    assert last_line(run("bench", "-m", tiny_checkpoint, *settings))["settings"]["items"] == 2


def test_a_folder_that_cannot_be_written(run: Any, base: tuple[Any, ...], prompts: Path) -> None:
    done = run(*base, "--draft", "lookup", "--output", prompts / "results")
    refused(done, f"cannot write {prompts}/results/bench.json: ", status=1)
    assert "repeat" not in done.stderr  # nothing was measured in vain


def test_a_batch_beyond_memory(run: Any, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip.model import cache

    monkeypatch.setattr(cache, "free_bytes", lambda device: 70_000)
    done = run(*base, "--draft", "lookup", "--batch", 4)
    assert (done.exit_code, done.stdout) == (1, "")
    *_, line = done.stderr.splitlines()  # behind those of progress
    assert line.startswith("error: batch 4 does not fit in memory: ")
    assert "decoded side by side; use --batch " in line


def test_texts_that_differ_are_told() -> None:
    assert same({"identical": False, "differs_at": [None, 7, 3]}) == "1 of 3, first at 3"
    assert same({"identical": True, "differs_at": [None]}) == "yes"
    assert same({"identical": None, "differs_at": None}) == "-"
