"""Curves of exits: every token of a text predicted once, as transformers and `score_exits` have it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerskip
from layerskip import LLM, EarlyExit
from layerskip.errors import RequestError
from layerskip.evaluate import Item, Task, evaluate, exit_curves
from layerskip.evaluate.curves import windows

TEXTS = ["the cat sat on the mat and the dog ran to the cat", "a dog", "the mat and the cat " * 12]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")


@torch.no_grad()
def test_the_last_exit_is_the_model_of_transformers(llm: LLM, tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    loss, right, count = 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([llm.encode(text)])
        logits = model(input_ids=ids).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    *_, last = exit_curves(llm, TEXTS)
    assert (last.exit, last.tokens, last.agreement) == (4, count, 1.0)
    assert last.loss == pytest.approx(loss / count, abs=1e-5)
    assert last.accuracy == right / count
    assert last.perplexity == pytest.approx(2.718281828 ** (loss / count), rel=1e-4)


def test_every_exit_is_scored_on_the_same_tokens(llm: LLM) -> None:
    found = exit_curves(llm, TEXTS[:1])
    scores = llm.score_exits(TEXTS[0])
    for point, score in zip(found, scores, strict=True):
        assert (point.exit, point.tokens) == (score.exit, len(score.predictions))
        assert point.loss == pytest.approx(score.loss)
        assert point.agreement == score.agreement(scores[-1])
    assert [point.exit for point in exit_curves(llm, TEXTS[:1], exits=[2])] == [2, 4]
    assert exit_curves(llm, TEXTS[:1], exits=[2, 2]) == [found[1], found[3]]


@pytest.mark.parametrize("length", [2, 7, 256])
def test_windows_predict_every_token_once(llm: LLM, length: int) -> None:
    ids = llm.encode(TEXTS[0])
    found = list(windows(llm, TEXTS[0], length=length))
    assert [token for window in found for token in window[1:]] == ids[1:]
    assert all(window[0] == ids[0] and 2 <= len(window) <= length for window in found)  # each begins with BOS
    assert list(windows(llm, "", length=length)) == []


def test_without_bos_a_window_begins_where_the_last_ended(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "encode", lambda self, text: list(range(5, 15)))
    assert list(windows(llm, "x", length=4)) == [[5, 6, 7, 8], [8, 9, 10, 11], [11, 12, 13, 14]]


def test_short_windows_know_less(llm: LLM) -> None:
    whole, cut = (exit_curves(llm, TEXTS, window=window)[-1] for window in (256, 2))
    assert whole.tokens == cut.tokens
    assert whole.loss != cut.loss


def test_a_long_text_is_not_longer_than_the_context(llm: LLM) -> None:
    [*_, last] = exit_curves(llm, ["the cat " * 500])
    assert last.tokens == len(llm.encode("the cat " * 500)) - 1 > 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": [0]}, r"^exit 0 is not inside this 4-layer model; use 1\.\.4$"),
        ({"exits": [2, 5]}, r"^exit 5 is not inside this 4-layer model; use 1\.\.4$"),
        ({"window": 1}, "^a window of 1 tokens predicts nothing; use 2 or more$"),
        ({"texts": [""]}, "^the texts have nothing to predict; give at least two tokens$"),
    ],
)
def test_what_cannot_be_predicted_is_refused(llm: LLM, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        exit_curves(llm, **{"texts": TEXTS, **settings})  # type: ignore[arg-type]


def test_a_task_that_generates_nothing_has_curves(llm: LLM) -> None:
    task = Task("lm", tuple(map(Item, TEXTS)), None, 0, generates=False)
    found = evaluate(llm, task, exits=[1])
    assert found.results == ()
    assert found.curves == exit_curves(llm, TEXTS, exits=[1])
    record = found.record()
    assert [point["exit"] for point in record["curves"]] == [1, 4]
    assert set(record["curves"][0]) == {"exit", "loss", "accuracy", "agreement", "tokens"}
    with pytest.raises(RequestError, match=r"^task lm generates nothing, so a drafter changes nothing; leave --d"):
        evaluate(llm, task, draft=EarlyExit(1))
