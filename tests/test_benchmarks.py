"""Checkpoints of a chosen agreement, and the harness that measures engines beside each other."""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    ablation,
    agreement,
    contest,
    growth,
    memory,
    rounds,
    side_by_side,
    table,
    texts,
    vocabulary,
    weights,
    zipf,
)
from benchmarks.agreement import Found, Wanted
from benchmarks.peers import PEERS, PeerRun
from benchmarks.questions import Question
from benchmarks.worker import PeerFailed, Worker
from layerskip import EarlyExit, RequestError, load
from layerskip.decode.acceptance import Acceptance
from layerskip.model.checkpoint import read_config
from layerskip.model.decoder import Decoder
from layerskip.model.shape import Shape

TINY = weights.SIZES["tiny"]
RESULTS = Path(table.__file__).parent / "results"
SETTINGS = side_by_side.Settings(
    "float32", threads=1, pairs=2, prompts=2, new_tokens=8, exit=2, draft_tokens=(2, 4), peers=PEERS, until_end=False
)


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    agreement.make(folder, Wanted("tiny"), say=quiet)
    return folder


def test_the_checkpoint_yields_what_it_was_made_for(made: Path) -> None:
    record = json.loads((made / "controlled.json").read_text())
    llm = load(made, dtype="float32")
    lines = (made / "prompts.txt").read_text().splitlines()[:8]
    counts = Acceptance()
    for completion in llm.generate(lines, draft=EarlyExit(TINY.exit, tokens=4), max_tokens=128, ignore_eos=True):
        counts.merge(completion.acceptance)
    assert abs(counts.length - 3.7) <= 0.1
    assert counts.length == pytest.approx(record["tokens_per_round"], abs=0.05)
    assert llm.recommended is not None
    assert (llm.recommended.exit, llm.recommended.draft_tokens) == (2, 4)


def test_the_checkpoint_is_an_ordinary_one(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    ids = torch.tensor([tokenizer((made / "prompts.txt").read_text().splitlines()[0])["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer) == TINY.vocabulary
    decoder = load(made, dtype="float32").decoder
    with torch.inference_mode():
        theirs = model(ids).logits
        at = torch.arange(ids.shape[1])[None]
        ours = decoder.logits(decoder.run(decoder.embed(ids), at, decoder.cache(rows=1, slots=ids.shape[1])))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_prompts_are_words_of_one_token_each(made: Path) -> None:
    tokenizer = load(made).tokenizer
    lines = (made / "prompts.txt").read_text().splitlines()
    assert len(lines) == 64
    for line in lines:
        ids = tokenizer(line)["input_ids"]
        assert len(ids) == 128
        assert ids[0] == vocabulary.BOS
        assert min(ids[1:]) >= vocabulary.FIRST_WORD
        assert tokenizer.decode(ids[1:]).strip() == line


def test_text_is_used_as_the_law_says(made: Path) -> None:
    text = json.loads((made / "controlled.json").read_text())["text"]
    assert text["least_distinct"] >= texts.DISTINCT_FLOOR
    assert text["common"] == pytest.approx(text["common_by_law"], abs=0.15)
    uniform = torch.arange(1024).remainder(TINY.vocabulary).view(8, 128).tolist()
    assert texts.described(uniform, TINY, seed=0)["common"] == pytest.approx(0.25, abs=0.01)


def test_text_that_goes_in_circles_is_refused() -> None:
    circles = [[300, 301, 302, 303] * 32, list(range(300, 428))]
    with pytest.raises(RequestError, match="goes in circles"):
        texts.check_text(texts.described(circles, TINY, seed=0))


def test_the_largest_logit_follows_the_law() -> None:
    probabilities = zipf.law(512)
    logits = torch.randn(20_000, 512, generator=torch.Generator().manual_seed(0)) * zipf.deviations(probabilities)
    found = torch.bincount(logits.argmax(-1), minlength=512) / 20_000
    for ranks in (1, 10, 100):
        assert float(found[:ranks].sum()) == pytest.approx(zipf.expected_share(probabilities, ranks=ranks), rel=0.15)
    assert zipf.expected_distinct(torch.tensor([0.5, 0.5]), draws=2) == pytest.approx(1.5)


def test_weights_come_from_the_seed() -> None:
    one, same, other = (weights.random_weights(TINY, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    name = "model.embed_tokens.weight"
    assert not torch.equal(one[name], other[name])
    assert texts.prompts(TINY, count=2, tokens=9, seed=3) == texts.prompts(TINY, count=2, tokens=9, seed=3)


def test_only_what_the_upper_layers_add_is_turned_down() -> None:
    whole = weights.random_weights(TINY, seed=0)
    down = weights.turned_down(whole, TINY, scale=0.5)
    changed = {name for name, tensor in down.items() if not torch.equal(tensor, whole[name])}
    ends = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert changed == {f"model.layers.{layer}.{end}" for layer in range(2, 8) for end in ends}
    for tensor in down.values():
        assert torch.equal(tensor, tensor.bfloat16().float())


def test_the_scale_is_found_by_halving() -> None:
    def count(scale: float) -> Found:
        return Found(scale, 5 - 4 * scale, [])

    found, tried = agreement.settle(count, Wanted("tiny", tokens_per_round=4.5, tolerance=0.01))
    assert found.scale == pytest.approx(0.125, abs=0.003)
    assert 1 < len(tried) < agreement.TRIES
    with pytest.raises(RequestError, match=r"no scale gives 3.7 \+- 0.1 tokens per round in 20 tries; the last gave 1"):
        agreement.settle(lambda scale: Found(scale, 1.0, []), Wanted("tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "2m"}, "unknown size '2m'; use tiny, 15m, 110m, 1.2b"),
        ({"tokens_per_round": 5.0}, "5.0 tokens per round are not possible with drafts of 4"),
        ({"dtype": "float16"}, "dtype float16 cannot hold the weights"),
        ({"prompt_tokens": 1}, "a prompt needs 2 tokens"),
    ],
)
def test_a_checkpoint_that_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace(Wanted("tiny"), **changes)


def test_a_checkpoint_that_is_there_is_kept(made: Path) -> None:
    before = (made / "model.safetensors").stat().st_mtime_ns
    agreement.make(made, Wanted("tiny"), say=quiet)
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RequestError, match="made otherwise"):
        agreement.make(made, Wanted("tiny", seed=1), say=quiet)
    with pytest.raises(RequestError, match="not made by this program"):
        agreement.make(made.parent, Wanted("tiny"), say=quiet)


@pytest.fixture(scope="module")
def measured(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder of records, record) of the engines that are here."""
    folder = tmp_path_factory.mktemp("results")
    return folder, compare(made, folder)


def compare(made: Path, folder: Path, settings: side_by_side.Settings = SETTINGS) -> dict[str, Any]:
    """Measures the tiny checkpoint."""
    work = folder / "work"
    return side_by_side.compare("tiny", made, settings, file=None, output=folder, work=work, say=quiet)


@pytest.mark.slow  # starts transformers and our own engine in processes of their own
def test_every_engine_is_measured_or_skipped_by_name(measured: tuple[Path, dict[str, Any]]) -> None:
    _, record = measured
    there = {result["peer"] for result in record["results"]}
    assert there >= {"layerskip", "transformers"}
    assert there | set(record["skipped"]) == set(PEERS)
    modules = {
        "llama.cpp": "llama_cpp",
        "openvino-genai": "openvino_genai",
        "onnxruntime-genai": "onnxruntime_genai",
    }
    for peer, module in modules.items():
        if find_spec(module) is None:
            assert record["skipped"][peer].startswith("not installed; pip install")


@pytest.mark.slow  # starts transformers and our own engine in processes of their own
def test_every_way_generates_the_same_number_of_tokens(measured: tuple[Path, dict[str, Any]]) -> None:
    _, record = measured
    results = {result["name"]: result for result in record["results"]}
    assert all(result["tokens"] == 2 * 8 for result in results.values())
    drafted = [result for result in results.values() if result["exit"] is not None]
    assert {result["peer"] for result in drafted} == {"layerskip", "transformers"}
    assert all(result["draft_tokens"] in (2, 4) for result in drafted)
    assert all(result["exit"] == 2 for result in drafted if result["kind"] == "auto" or result["peer"] != "layerskip")
    tried = [trial["draft"] for trial in record["trials"]["layerskip"]]
    grid = {(exit, count) for exit in (1, 2, 3, 4) for count in (2, 4)}
    assert {(draft["exit"], draft["tokens"]) for draft in tried if draft["head"] == "int8"} == grid
    assert {draft["exit"] for draft in tried if draft["head"] == "own"} == {2}  # beside shortlists
    assert results["layerskip plain"]["tokens_per_round"] == 1
    assert results["transformers plain"]["tokens_per_round"] == 1
    assert all(result["tokens_per_round"] > 1 for result in drafted)
    assert results.pop("layerskip plain")["identical"] is None
    assert all(result["identical"] for result in results.values())


@pytest.mark.slow  # starts transformers and our own engine in processes of their own
def test_ratios_are_of_the_same_round(measured: tuple[Path, dict[str, Any]]) -> None:
    _, record = measured
    assert [len(record["rounds"]), record["kind"]] == [2, "side-by-side"]
    first = record["ratios"][0]
    for i, each in enumerate(record["rounds"]):
        ours, theirs = each["ways"][first["of"]], each["ways"][first["against"]]
        rate = (ours["tokens"] / ours["seconds"]) / (theirs["tokens"] / theirs["seconds"])
        assert first["end_to_end"]["runs"][i] == pytest.approx(rate)
        assert each["bandwidth"] > 0
    assert len(record["bandwidth_share"]["runs"]) == 2


def test_an_engine_without_such_weights_is_skipped(made: Path, tmp_path: Path) -> None:
    found = contest.start(["transformers"], made, dtype="int8", threads=1, work=tmp_path, say=quiet)
    assert found == ({}, {"transformers": "not measured with weights of int8"}, {})


@pytest.mark.slow  # starts transformers and our own engine in processes of their own
def test_a_run_goes_on_after_its_last_round(made: Path, measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, record = measured
    name = "side-by-side-tiny-float32.json"
    assert compare(made, folder)["rounds"] == record["rounds"]  # complete: nothing is measured
    stopped = json.loads((folder / name).read_text())
    first = stopped["rounds"][0]
    stopped["rounds"] = [first]
    stopped["skipped"]["transformers"] = "it had failed"
    (tmp_path / name).write_text(json.dumps(stopped))
    resumed = compare(made, tmp_path)
    assert [resumed["rounds"][0], len(resumed["rounds"])] == [first, 2]
    assert resumed["trials"] == stopped["trials"]
    assert {result["peer"] for result in resumed["results"]}.isdisjoint({"transformers"})
    (tmp_path / name).write_text(json.dumps(stopped | {"commit": "another"}))
    with pytest.raises(RequestError, match="begun with another commit"):
        compare(made, tmp_path)
    with pytest.raises(RequestError, match="was measured with other settings"):
        compare(made, tmp_path, replace(SETTINGS, new_tokens=9))
    digests = stopped["digests"] | {"weights": "of another training"}
    (tmp_path / name).write_text(json.dumps(stopped | {"digests": digests}))
    with pytest.raises(RequestError, match="was measured with other digests"):
        compare(made, tmp_path)


def test_the_page_has_targets_and_what_was_skipped(tmp_path: Path) -> None:
    record = json.loads((RESULTS / "side-by-side-110m-bfloat16.json").read_text())
    record["skipped"] = {"llama.cpp": "not installed"}
    for ratio in record["ratios"]:
        ratio["decode"]["median"] = 1.61
    (tmp_path / "side-by-side-110m-bfloat16.json").write_text(json.dumps(record))
    page = table.write_table(tmp_path).read_text()
    assert "| self-speculative / own plain |" in page
    assert "(1.6 / 1.85) met" in page
    assert "(3 / 4.2) **below**" in page
    assert "- llama.cpp skipped: not installed" in page


def test_decoding_begins_with_the_first_tokens() -> None:
    runs = [
        PeerRun(tokens=[5, 6, 7, 8], first=0.5, first_tokens=2, total=1.5, rounds=2),
        PeerRun(tokens=[5, 6, 7], first=0.25, first_tokens=1, total=0.75, rounds=3),
    ]
    found = contest.measured(runs)
    assert (found["tokens"], found["seconds"], found["rounds"]) == (7, 2.25, 5)
    assert (found["decode_tokens"], found["decode_seconds"], found["first_seconds"]) == (4, 1.5, 0.375)
    assert contest.differs(runs[0], replace(runs[0], tokens=[5, 6, 9, 8])) == 2
    assert contest.differs(runs[0], runs[0]) is None


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    worker = Worker("transformers", threads=1, log=tmp_path / "log")
    with pytest.raises(PeerFailed, match=r"OSError.*nowhere.*see .*log"):
        worker.ask("load", folder=str(tmp_path / "nowhere"), dtype="float32", threads=1, work=str(tmp_path))
    with pytest.raises(PeerFailed, match="nowhere"):
        worker.ask("memory")
    worker.close()


@pytest.mark.slow  # starts our own engine in a process of its own
def test_an_engine_that_gives_fewer_tokens_fails(made: Path, tmp_path: Path) -> None:
    worker = Worker("layerskip", threads=1, log=tmp_path / "log")
    worker.ask("load", folder=str(made), dtype="float32", threads=1, work=str(tmp_path))
    context = json.loads((made / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(PeerFailed, match="layerskip gave 4 of 8 tokens"):
        worker.run([300] * (context - 4), new_tokens=8, draft=None)
    worker.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["side_by_side", "2m"], "2m is no folder and no size; use tiny, 15m, 110m, 1.2b, shipped or a folder"),
        (["agreement", "2m"], "unknown size '2m'; use tiny, 15m, 110m, 1.2b"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {"side_by_side": side_by_side, "agreement": agreement}[words[0]]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert (ended.value.code, capsys.readouterr().err.strip()) == (2, message)


def test_prompts_have_to_be_there(tmp_path: Path, made: Path) -> None:
    with pytest.raises(RequestError, match="no prompts in"):
        side_by_side.questions(made, file=tmp_path / "none.txt", count=1, new_tokens=1)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="holds no prompts"):
        side_by_side.questions(made, file=tmp_path / "empty.txt", count=1, new_tokens=1)


def test_the_shipped_model_stops_where_its_text_ends() -> None:
    name, folder, file = side_by_side.checkpoint("shipped", Path("unused"))
    found = side_by_side.questions(folder, file=file, count=2, new_tokens=128, until_end=True)
    assert name == "shipped"
    assert len(found) == 2
    assert all(1 < question.new_tokens < 128 for question in found)


# -- rounds and growth


def test_the_parts_of_a_round_are_all_of_it(made: Path) -> None:
    llm = load(made, dtype="float32")
    asked = [Question(list(range(3, 20)), 16)]
    found = rounds.measure(llm, asked, exit=TINY.exit, count=3, pairs=2)
    assert set(found["round"]) == set(rounds.PARTS)
    assert all(found["round"][part]["low"] >= 0 for part in rounds.PARTS if part != "Python")
    assert 1 <= found["tokens_per_round"] <= 4
    turn = {
        "seconds": 12.0,
        "rounds": 10,
        "tokens": 30,
        "parts": {"run": 4.0, "logits": 1.0, "draft": 3.0, "__call__": 1.0},
    }
    alone = dict.fromkeys(("plain layers", "draft layers", "verify layers", "head", "verify head"), 0.1)
    alone |= {"draft layers, no slots": 0.075, "verify layers, no slots": 0.05}
    parts = rounds.split(turn, alone, count=2)  # of 5 equal parts of a draft, 3 are layers
    assert parts["draft head"] == pytest.approx(0.12)
    assert parts["attention"] == pytest.approx(0.18 / 4 + 0.4 / 2)
    assert sum(parts.values()) == pytest.approx(1.2)
    assert "exit" in rounds.lines(found | {"model": {"name": "x", "dtype": "float32", "weights": "plain"}})[0]


def test_the_watch_leaves_nothing_behind() -> None:
    before = Decoder.run, Decoder.logits, Decoder.draft
    with rounds.Watch():
        assert before[0] is not Decoder.run
    assert before == (Decoder.run, Decoder.logits, Decoder.draft)


def test_nothing_grows_with_requests(made: Path) -> None:
    found = growth.serve(load(made, dtype="float32", max_batch=4), draft=EarlyExit(TINY.exit), requests=75)
    assert found[-1].bytes - found[1].bytes < 2**22
    assert found[-1].graphs == found[0].graphs


@pytest.mark.slow  # ten processes that import torch
def test_memory_is_that_of_every_way(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", str(made), "--repeat", "2", "--new-tokens", "8"]
    done = subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / f"memory-{made.name}-bfloat16.json").read_text())
    assert list(found["ways"]) == list(memory.WAYS)
    assert found["weights"] > 2 * found["model"]["parameters"]  # bytes, as they are stored
    assert found["cache"] >= Shape.from_config(read_config(made)).cache_bytes(1, 128 + 8, 2)
    for steps in found["ways"].values():
        assert found["weights"] < steps["loaded"] < steps["generated"]
    assert all(f"| {way} | " in done.stdout for way in memory.WAYS)


def test_the_table_of_the_ablation_is_of_what_was_run() -> None:
    folder = Path(__file__).parents[1] / "docs" / "results"
    whole = json.loads((folder / "topv2-ablation.json").read_text())
    page = ablation.text(whole)
    assert page == (folder / "topv2-ablation.md").read_text()
    assert "| both | 54.4% ± 3.3% | -0.9% ± 0.9% |" in page
    lasts = {(run["arm"], run["seed"]): run["exact_match"]["all"] for run in whole["runs"]}
    lost = statistics.fmean(lasts["nothing", seed] - lasts["both + anchor", seed] for seed in (1, 2, 3))
    says = page.split("## What that says")[1].split("## Speed")[0]
    [verdict] = [line for line in says.splitlines() if line.startswith("| both + anchor")]
    assert f"| {-lost:+.2%} ± " in verdict
    assert verdict.endswith("| equal |")
    some = [run for run in whole["runs"] if run["arm"] == "both" or (run["seed"] == 1 and run["arm"] == "dropout only")]
    page = ablation.text({**whole, "runs": some})
    assert "| both | 54.4% ± 3.3% |  |" in page  # nothing to compare with
    [one] = [line for line in page.splitlines() if line.startswith("| dropout only | ")][:1]
    assert "±" not in one  # the scatter of a single run is not known
    assert "| nothing |" not in page.split("## Speed")[0]
    page = ablation.text({**whole, "runs": [run for run in whole["runs"] if run["seed"] == 1]})
    assert "nan" not in page
    assert not re.search(r"\| (equal|lower|higher) \|", page)  # one seed says nothing about another
