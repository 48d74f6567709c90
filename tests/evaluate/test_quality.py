"""Scores of real texts: plain, at exits and drafted, in the order of the items."""

import doctest
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import layerskip
from layerskip import LLM, Assistant, Cascade, EarlyExit, Lookup
from layerskip.errors import NumericalError, RequestError
from layerskip.evaluate import Item, Quality, Score, Task, evaluate, quality, topv2
from layerskip.evaluate.ways import Way, drafter_name
from layerskip.train.data import Pair, topv2_tokenizer

PROMPTS = ("the cat sat on the mat and the dog ran", "the", "the dog ran to the cat", "a", "the cat", "mat and dog")


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")


def same_text(text: str, answer: str) -> dict[str, float]:
    return {"same": float(text == answer), "length": float(len(text))}


@pytest.fixture(scope="module")
def task(llm: LLM) -> Task:
    """Half of the answers are what the model says."""
    items = []
    for i, prompt in enumerate(PROMPTS):
        said = llm.generate(prompt, max_tokens=20)
        assert not isinstance(said, list)
        items.append(Item(prompt, said.text if i % 2 else "nothing of the kind", ("odd",) if i % 2 else ("even",)))
    return Task("echo", tuple(items), same_text, 20)


def test_scores_are_means_with_their_errors(llm: LLM, task: Task) -> None:
    [plain] = evaluate(llm, task).results
    assert plain.scores["all"]["same"] == Score(0.5, math.sqrt(6 * 0.25 / 5) / math.sqrt(6), 6)
    assert plain.scores["odd"]["same"] == Score(1.0, 0.0, 3)
    assert plain.scores["even"]["same"] == Score(0.0, 0.0, 3)
    lengths = [len(completion.text) for completion in plain.completions]
    assert plain.scores["all"]["length"].mean == pytest.approx(sum(lengths) / 6)
    assert (plain.name, plain.exit, plain.mode, plain.acceptance, plain.identical) == ("plain", 4, "exact", None, None)
    assert plain.tokens == sum(len(completion.tokens) for completion in plain.completions) > 0
    assert plain.seconds > 0
    assert Score.of([3.0]) == Score(3.0, None, 1)


def test_results_are_in_the_order_of_the_items(llm: LLM, task: Task) -> None:
    [plain] = evaluate(llm, task, batch=2).results
    for item, completion in zip(task.items, plain.completions, strict=True):
        alone = llm.generate(item.prompt, max_tokens=20)
        assert not isinstance(alone, list)
        assert (completion.prompt, completion.tokens) == (llm.encode(item.prompt), alone.tokens)


def test_prompts_of_similar_length_share_a_batch(llm: LLM, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], int]] = []
    stream = LLM.stream

    def watched(self: LLM, prompts: Any, **settings: Any) -> Any:
        asked.append(([len(ids) for ids in prompts], self.max_batch))
        return stream(self, prompts, **settings)

    monkeypatch.setattr(LLM, "stream", watched)
    evaluate(llm, task, batch=3)
    [(lengths, rows)] = asked
    assert lengths == sorted(lengths, reverse=True)
    assert rows == 3


@pytest.mark.parametrize("drafter", [EarlyExit(1, tokens=3), EarlyExit(2, tokens=4, confidence=0.5), Lookup()])
def test_a_drafter_changes_no_text_and_no_score(llm: LLM, task: Task, drafter: Any) -> None:
    plain, drafted = evaluate(llm, task, draft=drafter).results
    assert [c.text for c in drafted.completions] == [c.text for c in plain.completions]
    assert drafted.identical == 6
    assert drafted.scores == plain.scores
    assert (drafted.mode, drafted.tokens) == ("exact", plain.tokens)
    counts = drafted.acceptance
    assert counts is not None
    assert counts.emitted == plain.tokens
    assert counts.rounds == sum(c.acceptance.rounds for c in drafted.completions)
    assert counts.accepted == sum(c.acceptance.accepted for c in drafted.completions) > 0
    # rows of a round share its seconds
    assert 0 < counts.draft_seconds + counts.verify_seconds + counts.rest_seconds < drafted.seconds
    record = drafted.record()["acceptance"]
    assert record["mean_acceptance_length"] == 1 + counts.accepted / counts.rounds
    assert record["emitted_per_round"] == counts.emitted / counts.rounds <= record["mean_acceptance_length"]


def test_exits_are_lossy_and_the_last_is_plain(llm: LLM, task: Task) -> None:
    found = evaluate(llm, task, exits=[1, 4])
    plain, first, last = found.results
    assert [result.name for result in found.results] == ["plain", "exit 1", "exit 4"]
    assert [result.exit for result in found.results] == [4, 1, 4]
    assert [result.mode for result in found.results] == ["exact", "lossy", "exact"]
    for item, completion in zip(task.items, first.completions, strict=True):
        alone = llm.generate(item.prompt, max_tokens=20, exit=1)
        assert not isinstance(alone, list)
        assert completion.tokens == alone.tokens
    assert first.identical is not None
    assert first.identical < 6
    assert first.scores["all"]["same"].mean < plain.scores["all"]["same"].mean
    assert (last.scores, last.identical) == (plain.scores, 6)


def test_plain_decoding_can_be_left_out(llm: LLM, task: Task) -> None:
    [first] = evaluate(llm, task, plain=False, exits=[2]).results
    assert (first.name, first.identical) == ("exit 2", None)
    with pytest.raises(RequestError, match="nothing to evaluate"):
        evaluate(llm, task, plain=False)


def test_a_stop_string_ends_the_texts(llm: LLM, task: Task) -> None:
    texts = [completion.text for completion in evaluate(llm, task).results[0].completions]
    stop = texts[0][2:4]
    stopped = evaluate(llm, replace(task, stop=(stop,))).results[0].completions
    assert [completion.text for completion in stopped] == [text.split(stop)[0] for text in texts]


def test_the_record_is_json(llm: LLM, task: Task) -> None:
    found: Quality = evaluate(llm, task, draft=EarlyExit(1))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert (record["task"], record["items"]) == ("echo", 6)
    plain, drafted = record["results"]
    assert plain["scores"]["odd"]["same"] == {"mean": 1.0, "error": 0.0, "count": 3}
    assert (plain["name"], plain["acceptance"], plain["identical"]) == ("plain", None, None)
    assert (drafted["name"], drafted["mode"], drafted["identical"]) == ("early-exit:1 K=4", "exact", 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": [1, 5]}, r"^exit 5 is not inside this 4-layer model; use 1\.\.4$"),
        ({"draft": EarlyExit(4)}, r"^draft exit 4 is not below the 4 layers the model decodes with; use 1\.\.3$"),
        ({"batch": 0}, r"^max_batch 0 is not possible; use 1 or more$"),
    ],
)
def test_what_cannot_be_done_is_refused(llm: LLM, task: Task, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        evaluate(llm, task, **settings)


def test_a_prompt_that_does_not_fit_is_named(llm: LLM) -> None:
    long = Task("long", (Item("the", ""), Item("q" * 300, "")), same_text, 4)
    with pytest.raises(RequestError, match=r"^item 2 of 2 of long: the prompt has 301 tokens; this model's context"):
        evaluate(llm, long)
    broken = Task("broken", (Item("\ud800", ""),), same_text, 4)
    with pytest.raises(RequestError, match=r"^item 1 of 1 of broken: the prompt is not valid text"):
        evaluate(llm, broken)


def test_a_model_of_nan_is_an_error(tiny_checkpoint: Path, task: Task) -> None:
    broken = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    broken.decoder.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError):
        evaluate(broken, task)


def test_a_parser_that_learnt_its_frames_by_heart_scores_them_all(tmp_path: Path) -> None:
    lines = [
        "alarm\tset an alarm for 7am\t[IN:CREATE_ALARM set an alarm [SL:DATE_TIME for 7 am ] ]",
        "weather\twhat’s it like in Zürich?\t[IN:GET_WEATHER what ’s it like [SL:LOCATION in Zürich ] ? ]",
        "timer\tstop it\t[IN:PAUSE_TIMER stop it ]",
    ]
    (tmp_path / "x_eval.tsv").write_text("\n".join(["domain\tutterance\tsemantic_parse", *lines, ""]))
    parser = topv2(tmp_path)
    pairs = [Pair(item.prompt, item.answer) for item in parser.items]
    tokenizer = topv2_tokenizer(pairs, vocab_size=320)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [tokenizer(pair.prompt, pair.response, return_tensors="pt").input_ids for pair in pairs]
    for _ in range(80):
        sum(model(input_ids=row, labels=row).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = evaluate(layerskip.load(tmp_path, device="cpu"), parser, exits=[1], draft=EarlyExit(1))
    plain, _, drafted = found.results
    assert [completion.text.split() for completion in plain.completions] == [pair.response.split() for pair in pairs]
    assert {name: score.mean for name, score in plain.scores["all"].items()} == {
        "exact_match": 1.0,
        "template_match": 1.0,
        "well_formed": 1.0,
    }
    assert (drafted.scores, drafted.identical) == (plain.scores, 3)


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(quality) == doctest.TestResults(failed=0, attempted=1)


def test_drafters_that_differ_in_anything_have_keys_of_their_own(llm: LLM, tiny_checkpoint: Path) -> None:
    other = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    with torch.no_grad():
        next(iter(other.decoder.state_dict().values())).flatten()[:1] += 1
    drafters = [
        Cascade(Lookup(), EarlyExit(1, tokens=2)),
        Cascade(Lookup(), EarlyExit(2, tokens=2)),
        Cascade(Lookup(), EarlyExit(2, tokens=4)),
        Cascade(Lookup(), EarlyExit(2, tokens=4, confidence=0.5)),
        EarlyExit(2, tokens=4),
        EarlyExit(2, tokens=4, length="thompson"),
        EarlyExit(2, tokens=4, vocabulary=9),
        EarlyExit(2, tokens=4, vocabulary=9, ranked=[5, 4]),
        Assistant(llm.decoder, tokens=4),
        Assistant(other.decoder, tokens=4),
    ]
    keys = [Way(drafter_name(drafter), drafter).key for drafter in drafters]
    assert len(set(keys)) == len(drafters)
    assert keys[0].startswith("cascade:1 K=2")
