"""Scorers: real texts against real answers, and what a task asks of a model."""

import doctest
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import RequestError
from layerskip.evaluate import Item, Task
from layerskip.evaluate.quality import check_scorer, score
from layerskip.evaluate.tasks import cnn_dm, gsm8k, lm, mbpp, spec_bench
from layerskip.evaluate.tasks.gsm8k import number

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared(path: str) -> Path:
    if not (SHARED / path).is_file():
        pytest.skip(f"needs {path}, and there is no {SHARED / path}")
    return SHARED / path


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(task: Task, text: str) -> dict[str, float]:
    assert task.scorer is not None
    return dict(task.scorer(text, task.items[0].answer))


# --- GSM8K


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 10 * 101 = 1010. Plus 8 is 1018.\n#### 1,018", 1),
        (" It is $1,018.00", 1),
        (" so 1018 dollars.", 1),
        ("#### 1018\n\nThen 7 more", 1),  # what follows the first answer is not it
        ("#### the answer is 1018", 1),
        ("1018 #### 7", 0),
        ("1018 ####", 0),  # the mark with nothing behind it is no answer
        ("It is 1018 or 1019", 0),
        ("-1018", 0),
        ("1 018", 0),
        ("10180", 0),
        ("1,0180", 0),
        ("1018.5", 0),
        ("", 0),
        ("one thousand and eighteen", 0),
    ],
)
def test_numbers_match_exactly(tmp_path: Path, text: str, right: int) -> None:
    task = gsm8k(write(tmp_path / "x.jsonl", {"question": "?", "answer": "<<1+1017=1018>> so 1018\n#### 1,018"}))
    assert task.items[0].answer == Decimal(1018)
    assert scored(task, text) == {"exact_match": right}


def test_gsm8k_as_published() -> None:
    task = gsm8k(shared("prompts/gsm8k_test.jsonl"))
    assert len(task.items) == 1319
    assert task.items[0].prompt.startswith("Question: Janet’s ducks lay 16 eggs per day.")
    assert task.items[0].prompt.endswith("at the farmers' market?\nAnswer:")
    assert score(task, [item.shown or "" for item in task.items])["all"]["exact_match"].mean == 1.0
    assert score(task, [""] * 1319)["all"]["exact_match"].mean == 0.0


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(sys.modules[number.__module__]) == doctest.TestResults(failed=0, attempted=2)


# --- summaries


def test_summaries_are_scored_by_rouge(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    task = cnn_dm(write(tmp_path / "x.jsonl", {"article": "a", "highlights": "the cat sat .\nit ran ."}))
    assert scored(task, " The cats sat. It ran!") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert scored(task, "") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    # 3 of 5 words and of 3; bigrams: 1 of 4 and of 2; the longest common run of words in order: 2
    found = scored(task, "ran the cat")
    assert found["rouge1"] == pytest.approx(2 * 3 / (5 + 3))
    assert found["rouge2"] == pytest.approx(2 * 1 / (4 + 2))
    assert found["rougeL"] == pytest.approx(2 * 2 / (5 + 3))


def test_cnn_dm_as_published() -> None:
    pytest.importorskip("rouge_score")
    task = cnn_dm(shared("cnn_dm/val_500.jsonl"))
    assert len(task.items) == 500
    few = task.limited(5)
    assert all(item.prompt.startswith("Article: ") and item.prompt.endswith("\nSummary:") for item in few.items)
    same = score(few, [item.shown or "" for item in few.items])["all"]
    assert {name: found.mean for name, found in same.items()} == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    article = score(few, [item.prompt for item in few.items])["all"]["rouge1"].mean
    assert 0 < article < 0.5


def test_without_rouge_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip.evaluate.tasks import summarisation

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    summarisation._rouge.cache_clear()
    task = cnn_dm(write(tmp_path / "x.jsonl", {"article": "a", "highlights": "b"}))
    with pytest.raises(RequestError, match=r"rouge-score package; pip install 'layerskip\[eval\]'"):
        check_scorer(task)


# --- programs


@pytest.mark.usefixtures("bubblewrap")
def test_programs_are_run(tmp_path: Path) -> None:
    rows = [
        {"text": "Add.", "code": "def add(a, b): return a + b", "test_list": ["assert add(1, 2) == 3"], "task_id": 1},
        {
            "prompt": "Take the root.",
            "test_imports": ["import math"],
            "test_list": ["assert math.isclose(root(N), 3)", "assert root(4) == 2"],
            "test_setup_code": "N = 9",
        },
    ]
    task = mbpp(write(tmp_path / "x.jsonl", *rows))
    assert task.items[0].prompt == (
        "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\n"
        "assert add(1, 2) == 3\n[BEGIN]"
    )
    assert (task.stop, task.executes) == (("[DONE]",), True)
    right = ["\ndef add(a, b):\n    return a + b\n", "\nimport math\nroot = math.sqrt\n"]
    assert score(task, right)["all"]["pass@1"].mean == 1.0
    # what reads like the reference but does something else, and what never comes to the tests
    wrong = ["\ndef add(a, b):\n    return a - b\n", "\nimport math\nroot = math.sqrt\nraise SystemExit(0)"]
    assert score(task, wrong)["all"]["pass@1"].mean == 0.0


def test_programs_are_not_run_unasked(tmp_path: Path) -> None:
    task = mbpp(write(tmp_path / "x.jsonl", {"text": "x", "test_list": ["assert x"]}))
    with pytest.raises(RequestError, match=r"^task mbpp runs programs .*; allow it with --allow-code-execution$"):
        check_scorer(task)


# --- without a scorer


def test_spec_bench_is_about_speed() -> None:
    task = spec_bench(shared("prompts/spec_bench.jsonl"))
    assert len(task.items) == 480
    assert len({item.groups for item in task.items}) == 13
    assert (task.scorer, task.items[0].answer) == (None, None)
    assert score(task, [""] * 480) == {}
    check_scorer(task)


def test_a_long_text_is_read_in_pieces(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long text\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    task = lm(tmp_path / "a.txt")
    assert "".join(item.prompt for item in task.items) == text.rstrip("\n")
    assert all(len(item.prompt) <= 16_384 for item in task.items)
    assert all(item.prompt.startswith("line ") for item in task.items)
    assert [item.prompt for item in lm(tmp_path).items[-2:]] == ["one", "two"]
    (tmp_path / "a.txt").write_text("x" * 40_000)
    assert [len(item.prompt) for item in lm(tmp_path / "a.txt").items] == [16_384, 16_384, 7_232]
    assert [item.prompt for item in lm(write(tmp_path / "c.jsonl", {"text": "a\n"}, {"text": "b"})).items] == [
        "a\n",
        "b",
    ]


def test_answers_are_asked_for_where_there_is_a_scorer() -> None:
    task = Task("sums", (Item("1 + 1", "2"), Item("1 + 2")), lambda text, answer: {}, 4)
    with pytest.raises(RequestError, match=r"^item 2 of 2 of sums has no answer to score a text against; give"):
        check_scorer(task)


@pytest.mark.parametrize("row", [{"question": "a"}, {"question": "a", "answer": None}])
def test_rows_without_answers_can_still_be_prompts(tmp_path: Path, row: dict[str, Any]) -> None:
    task = gsm8k(write(tmp_path / "x.jsonl", row))
    assert [item.answer for item in task.items] == [None]
    with pytest.raises(RequestError, match="item 1 of 1 of gsm8k has no answer"):
        check_scorer(task)
