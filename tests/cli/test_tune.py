"""`layerskip tune`: tables, a last line that the schema describes, --save, runs that go on, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.cli import tune
from layerskip.cli.bench import WayFlags
from layerskip.evaluate import tune as tuning
from layerskip.evaluate.contest import Contest
from layerskip.llm import Recommended, recommend
from layerskip.model.checkpoint import read_config
from tests.cli.outcome import last_line, refused

LINES = ["the dog", "Once upon a time", "the quick brown fox jumps over"]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """The one that comes with the package."""
    text = (files("layerskip.evaluate") / "schemas" / "tune.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    """A small tuning; the model comes last."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n")
    grid = ("--draft-tokens", "1..3", "--confidence", "0.3", "--repeat", 2, "--measure", 3, "--max-tokens", 8)
    return ("tune", "--prompts", file, *grid, "--dtype", "float64", "--device", "cpu", "-m")


def test_tables_then_one_line(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, tmp_path: Path, schema: jsonschema.Draft202012Validator
) -> None:
    done = run(*base, tiny_checkpoint, "--output", tmp_path / "results")
    record = last_line(done)
    schema.validate(record)
    assert json.loads((tmp_path / "results" / "tune.json").read_text()) == record
    assert (tmp_path / "results" / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert [each["exit"] for each in record["exits"]] == [1, 2]
    assert len(record["predicted"]) == 2 * 3 * 2
    settings = [(e["exit"], e["draft_tokens"], e["confidence"]) for e in record["predicted"]]
    assert all((e["exit"], e["draft_tokens"], e["confidence"]) in settings for e in record["measured"])
    llm = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    for each in record["measured"]:  # what was counted before is what was decoded
        [told] = [
            p for p in record["predicted"] if all(p[k] == each[k] for k in ("exit", "draft_tokens", "confidence"))
        ]
        assert told["tokens_per_round"] == pytest.approx(each["tokens_per_round"])
        assert told["speedup"] == each["predicted"]
        assert each["identical"]
        drafter = layerskip.EarlyExit(each["exit"], tokens=each["draft_tokens"], confidence=each["confidence"])
        decoded = llm.generate(llm.encode_all(LINES), draft=drafter, max_tokens=8)
        rounds = sum(completion.acceptance.rounds for completion in decoded)  # type: ignore[union-attr]
        accepted = sum(completion.acceptance.accepted for completion in decoded)  # type: ignore[union-attr]
        assert each["tokens_per_round"] == pytest.approx(1 + accepted / rounds)
    words = done.stdout
    assert record["reason"] in words
    assert "acceptance along 3 greedy texts" in words
    assert "2 paired runs" in words


def test_json_and_nothing_else(run: Any, base: tuple[Any, ...], tiny_checkpoint: Path) -> None:
    done = run(*base, tiny_checkpoint, "--json", "--exits", "2", "--confidence", "none", "--batch", 2)
    record = json.loads(done.stdout)
    assert {each["exit"] for each in record["predicted"]} == {2}
    assert {each["confidence"] for each in record["predicted"]} == {None}
    assert record["settings"]["batch"] == 2


def found(exit: int | None, *, confidence: float | None = None) -> dict[str, Any]:
    """The part of a record that --save reads."""
    draft = {"exit": exit, "draft_tokens": 3, "confidence": confidence, "speedup": 1.5}
    exits = [{"exit": 1, "agreement": 0.5, "rate_by_position": [0.5, 0.25], "loss": None}]
    return {"recommended": None if exit is None else draft, "exits": exits}


def test_what_is_saved_is_what_generate_takes(run: Any, copy: Any) -> None:
    folder = copy(layerskip={"recipe": {"name": "mine"}, "exit": 2, "draft_tokens": 9, "quality": {"loss/1": 3.5}})
    before = read_config(folder)
    tune.save(found(1, confidence=0.25), folder, tune.Screen())
    after = read_config(folder)
    assert after["layerskip"] == {
        "recipe": {"name": "mine"},
        "exit": 1,
        "draft_tokens": 3,
        "confidence": 0.25,
        "quality": {"loss/1": 3.5, "own_agreement/1": 0.5, "own_rate_by_position/1": [0.5, 0.25]},
    }
    assert {k: v for k, v in after.items() if k != "layerskip"} == {k: v for k, v in before.items() if k != "layerskip"}
    assert [path.name for path in folder.iterdir() if "unfinished" in path.name] == []
    advice = layerskip.load(folder).recommended
    assert advice is not None
    assert replace(advice, acceptance={}) == Recommended(1, 3, 0.25)
    record = json.loads(run("generate", "the", "-m", folder, "--draft", "early-exit", "--json").stdout)
    assert record["draft"] == {"drafter": "early-exit:1", "tokens": 3, "confidence": 0.25}
    own = ("--draft", "early-exit", "--confidence", "0.75", "--draft-tokens", 2)
    record = json.loads(run("generate", "the", "-m", folder, *own, "--json").stdout)
    assert record["draft"] == {"drafter": "early-exit:1", "tokens": 2, "confidence": 0.75}
    ways = WayFlags().ways(layerskip.load(folder))
    assert [way.name for way in ways] == ["plain", "early-exit:1 K=3 P=0.25"]
    # and back again
    tune.save(found(None), folder, tune.Screen())
    assert set(read_config(folder)["layerskip"]) == {"recipe", "quality"}
    assert layerskip.load(folder).recommended is None


def test_predictions_are_what_is_measured_where_nothing_disturbs(
    run: Any, base: tuple[Any, ...], copy: Any, work: None, lucky: Any
) -> None:
    """Exit 1 always agrees. A round of three is 4 layers and 3 heads, 2 layers and a head: 22 for 4 tokens. A step of
    plain decoding is 7. With a threshold a few drafts end sooner."""
    folder = lucky(copy())
    done = run(*base, folder, "--measure", 6, "--max-tokens", 16, "--save")
    record = last_line(done)
    assert record["exits"][0]["agreement"] == 1
    assert record["exits"][0]["rate_by_position"] == [1.0, 1.0, 1.0]
    assert len(record["measured"]) == 6
    for each in record["measured"]:
        assert each["predicted"] == pytest.approx(each["speedup"]["median"], rel=1e-3)
    speedup = {(e["exit"], e["draft_tokens"], e["confidence"]): e["speedup"] for e in record["predicted"]}
    assert speedup[1, 3, None] == pytest.approx(28 / 22, rel=1e-3)
    assert speedup[1, 1, None] == pytest.approx(14 / 12, rel=1e-3)
    assert speedup[2, 1, None] == pytest.approx(14 / 13, rel=1e-3)
    assert record["recommended"] == {
        "exit": 1,
        "draft_tokens": 3,
        "confidence": None,
        "speedup": pytest.approx(28 / 22, rel=1e-3),
    }
    assert "recommended: --draft early-exit:1 --draft-tokens 3" in done.stdout
    assert "config.json now recommends early-exit:1 K=3" in done.stderr
    advice = layerskip.load(folder).recommended
    assert advice is not None
    assert replace(advice, acceptance={}) == Recommended(1, 3)


def test_a_model_whose_exits_never_agree_is_told_to_decode_plainly(
    run: Any, base: tuple[Any, ...], copy: Any, work: None
) -> None:
    """The last layer adds far more than all before it: alpha is near 0, and what was recommended is taken back."""
    folder = copy(layerskip={"exit": 1, "draft_tokens": 2, "confidence": 0.5})
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    weights["model.layers.2.mlp.down_proj.weight"] = 40 * torch.randn(32, 48)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(*base, folder, "--save", "--exits", "1", "--draft-tokens", "1,2", "--measure", 2, "--max-tokens", 24)
    record = last_line(done)
    assert max(each["agreement"] for each in record["exits"]) < 0.1
    assert record["recommended"] is None
    assert record["reason"].startswith("plain is faster here: early-exit:1 K=1, the fastest measured, reaches 0.")
    assert "it has to exceed 0.71 by the clock" in record["reason"]  # a layer and a head, of three and a head
    assert "config.json now recommends no draft any more" in done.stderr
    assert set(read_config(folder)["layerskip"]) == {"quality"}
    assert layerskip.load(folder).recommended is None


def test_an_interrupted_run_goes_on(
    run: Any,
    base: tuple[Any, ...],
    tiny_checkpoint: Path,
    tmp_path: Path,
    schema: jsonschema.Draft202012Validator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = (*base, tiny_checkpoint, "--exits", "1", "--output", tmp_path, "--json")
    whole, repeats = Contest.repeat, []

    def interrupted(self: Contest, number: int) -> Any:
        repeats.append(number)
        if repeats == [0, 1]:
            raise KeyboardInterrupt
        return whole(self, number)

    monkeypatch.setattr(Contest, "repeat", interrupted)
    assert run(*words).exit_code == 130
    assert [path.name for path in tmp_path.glob("*tune*")] == ["tune.unfinished"]
    kept = json.loads((tmp_path / "tune.unfinished").read_text())["parts"]
    assert len(kept["repeats"]) == 1

    def never(*given: Any, **settings: Any) -> Any:
        raise AssertionError("this part is finished")

    monkeypatch.setattr(tuning, "measure_costs", never)
    monkeypatch.setattr(tuning, "continuations", never)
    done = run(*words)
    record = last_line(done)
    schema.validate(record)
    assert repeats == [0, 1, 1]
    assert record["costs"] == kept["costs"]
    assert sorted(path.name for path in tmp_path.glob("*tune*")) == ["tune.json", "tune.png"]
    assert "going on with what is measured" in done.stderr
    # once more: nothing is measured
    done = run(*words)
    assert last_line(done) == record
    assert repeats == [0, 1, 1]
    assert "is finished: nothing is measured" in done.stderr


def test_a_record_of_something_else_is_not_gone_on_with(
    run: Any, base: tuple[Any, ...], copy: Any, tmp_path: Path, lucky: Any
) -> None:
    folder = copy()
    words = (*base, folder, "--output", tmp_path, "--json", "--exits", "1", "--draft-tokens", "1", "--measure", 1)
    last_line(run(*words))
    refused(
        run(*words, "--repeat", 1),
        f"{tmp_path}/tune.json has other settings, prompts or weights; choose another --output, or delete it",
    )
    lucky(folder)  # trained further, in the same place
    refused(run(*words), "tune.json has other settings, prompts or weights")
    (tmp_path / "tune.json").write_text("{")
    refused(run(*words), "tune.json is not JSON")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exits", "3"], "draft exit 3 is not below the 3 layers the model decodes with; use 1..2"),
        (["--exits", "0"], "draft exit 0 is not possible; use 1 or more layers"),
        (["--exits", "some"], "--exits some is not possible; use whole numbers such as 2,4,6 or 1..12"),
        (["--exits", "2..1"], "--exits 2..1 is not possible"),
        (["--draft-tokens", "1..x"], "--draft-tokens 1..x is not possible; use whole numbers such as 2,4,6 or 1..12"),
        (["--draft-tokens", "1,,2"], "--draft-tokens 1,,2 is not possible"),
        (["--draft-tokens", "8"], "texts of 8 tokens never draft 8; use at most 7 draft tokens, or more --max-tokens"),
        (["--confidence", "high"], "--confidence high is not possible; use none, or numbers such as 0.5,0.8"),
        (["--confidence", "0"], "confidence 0.0 is not allowed; use more than 0 and at most 1"),
        (["--batch", "4"], "batch 4 needs as many prompts"),
        (["--batch", "0"], "batch 0 is not possible; use 1 or more"),
        (["--repeat", "0"], "repeat 0 is not possible; use 1 or more"),
        (["--measure", "0"], "measure 0 is not possible; use 1 or more"),
        (["--max-tokens", "0"], "max_tokens 0 is not possible; use 1 or more"),
        (["--task", "topv2"], "both --prompts and --task are given"),
        (["-m", "nobody/nothing", "--save"], "--save writes into a checkpoint folder, and nobody/nothing is none"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, arguments: list[str], message: str
) -> None:
    refused(run(*base, tiny_checkpoint, *arguments), message)


def test_no_prompts(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(run("tune", "-m", tiny_checkpoint), "no prompts: give --prompts FILE, or --task NAME")
    (tmp_path / "empty.txt").write_text("\n")
    refused(run("tune", "-m", tiny_checkpoint, "--prompts", tmp_path / "empty.txt"), "empty.txt holds no prompts")
    refused(run("tune", "--save"), "--save writes into a checkpoint folder, not into the package; name a copy with -m")


def test_a_model_of_one_layer(run: Any, base: tuple[Any, ...], copy: Any) -> None:
    folder = copy(num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers." not in name or "layers.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(run(*base, folder), "a model that decodes with 1 layer has no earlier exit to draft from")


def test_places_that_cannot_be_written(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    refused(run(*base, tiny_checkpoint, "--output", taken), f"cannot write {taken}/tune.unfinished", status=1)
    folder = copy()
    monkeypatch.setattr(os, "access", lambda path, mode, **how: mode != os.W_OK)  # root may write anywhere
    refused(run(*base, folder, "--save"), f"--save cannot write into {folder}; copy the checkpoint to a place")


def test_a_config_is_written_whole_or_not_at_all(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy()
    before = (folder / "config.json").read_bytes()
    (folder / "config.json.unfinished").mkdir()  # where it is written first
    with pytest.raises(layerskip.LayerSkipError, match=r"cannot write .*config\.json: .*; it is as it was"):
        recommend(folder, Recommended(1, 2), quality={})
    assert (folder / "config.json").read_bytes() == before
    shutil.rmtree(folder / "config.json.unfinished")
    recommend(folder, Recommended(1, 2), quality={})
    assert layerskip.load(folder).recommended == Recommended(1, 2)


@pytest.mark.parametrize("confidence", [0, 2, "high", True])
def test_a_confidence_that_is_none_is_refused(copy: Any, confidence: Any) -> None:
    folder = copy(layerskip={"exit": 1, "draft_tokens": 2, "confidence": confidence})
    with pytest.raises(layerskip.CheckpointError, match=r"layerskip.confidence is .*; it must be a number above 0"):
        layerskip.load(folder)
