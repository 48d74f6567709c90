"""Data of tasks: rows of files and of the hub, examples before a question, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from layerskip.errors import RequestError
from layerskip.evaluate import Item, Task, topv2
from layerskip.evaluate.tasks import cnn_dm, gsm8k, humaneval, lm, mbpp, spec_bench, xsum
from layerskip.evaluate.tasks.files import Hub, named

ROWS: dict[Any, list[dict[str, Any]]] = {
    cnn_dm: [{"article": f"news {i}", "highlights": f"short {i} .\nmore ."} for i in range(6)],
    xsum: [{"document": f"news {i}", "summary": f"short {i}"} for i in range(6)],
    gsm8k: [{"question": f"what is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)],
    humaneval: [
        {
            "prompt": f"def f{i}():\n",
            "canonical_solution": f"    return {i}\n",
            "test": f"def check(f):\n    assert f() == {i}\n",
            "entry_point": f"f{i}",
        }
        for i in range(6)
    ],
    mbpp: [
        {"text": f"Return {i}.", "code": f"def f{i}():\r\n    return {i}\r\n", "test_list": [f"assert f{i}() == {i}"]}
        for i in range(6)
    ],
    spec_bench: [{"category": "qa" if i % 2 else "math", "turns": [f"turn {i}", "more"]} for i in range(6)],
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_files_folders_and_patterns(make: Any, tmp_path: Path) -> None:
    rows = ROWS[make]
    write(tmp_path / "a.jsonl", rows[:3])
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(rows[3]) + "\n\n" + json.dumps(rows[4]))
    task = make(tmp_path)
    assert task.name == make.__name__
    assert len(task.items) == 5
    assert make(f"{tmp_path}/a*").items == task.items[:3]
    assert make(tmp_path / "b.jsonl").items == task.items[3:]


@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_data_sets_of_the_hub(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "test.jsonl", ROWS[make][:4])
    write(folder / "train.jsonl", ROWS[make][4:])
    assert make(f"hub:{folder}").items == make(folder / "test.jsonl").items
    assert make(f"hub:{folder}:train").items == make(folder / "train.jsonl").items
    with pytest.raises(RequestError, match=r"^the data set hub:.*:other cannot be loaded: .*; check its name, or give"):
        make(f"hub:{folder}:other")
    with pytest.raises(RequestError, match=r"^the data set hub:.*nowhere.* cannot be loaded: "):
        make(f"hub:{tmp_path}/nowhere")


def test_names_on_the_hub() -> None:
    own = Hub("openai/gsm8k", "main")
    assert named("hub", default=own) == named("hub:", default=own) == named("hub:openai/gsm8k", default=own) == own
    assert named("hub:a/b", default=own) == Hub("a/b", None, "test")
    assert named("hub:a/b:train", default=own) == Hub("a/b", None, "train")
    assert named("hub:a/b:c:train", default=None) == Hub("a/b", "c", "train")
    assert str(named("hub:a/b:c:train", default=None)) == "hub:a/b:c:train"
    for wrong in ("hub:a:b:c:d", "hub:a::c"):
        with pytest.raises(RequestError, match=f"^{wrong} is not possible; use hub:NAME, hub:NAME:SPLIT or"):
            named(wrong, default=own)
    with pytest.raises(RequestError, match=r"^this task has no data set on the hub; give a file, or hub:NAME$"):
        spec_bench("hub")


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'layerskip\[eval\]'"):
        gsm8k("hub")


@pytest.mark.parametrize(
    ("make", "content", "message"),
    [
        (gsm8k, "", "x.jsonl holds no rows; give at least one"),
        (gsm8k, "\n \n", "x.jsonl holds no rows"),
        (gsm8k, '{"question": "a"}\n{"question": ', "x.jsonl:2 is not JSON: "),
        (gsm8k, "[1]", "x.jsonl:1 is a JSON list; give an object in each line"),
        (gsm8k, '{"answer": "1"}', "x.jsonl:1 has no 'question'; give it a text under that name"),
        (gsm8k, '{"question": " "}', "x.jsonl:1: 'question' is ' '; give it a text"),
        (gsm8k, '{"question": "a", "answer": "none"}', "x.jsonl:1: the answer has no number behind ####; give it one"),
        (gsm8k, '{"question": "a", "answer": 3}', "x.jsonl:1: 'answer' is 3; give it a text"),
        (mbpp, '{"code": "x"}', "x.jsonl:1 has no 'text' or 'prompt'"),
        (mbpp, '{"text": "x", "test_list": "assert 1"}', "'test_list' is 'assert 1'; give it a list of texts"),
        (spec_bench, '{"category": "qa", "turns": []}', "x.jsonl:1 has no 'turns'; give it a list of texts"),
        (spec_bench, '{"turns": ["a"]}', "x.jsonl:1 has no 'category'"),
        (humaneval, '{"prompt": "x", "test": "y"}', "x.jsonl:1 has no 'entry_point'"),
        (lm, '{"text": " "}', "x.jsonl:1: 'text' is ' '; give it a text"),
    ],
)
def test_malformed_data_are_named(make: Any, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(RequestError) as raised:
        make(tmp_path / "x.jsonl")
    assert message in str(raised.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"question": "a"}\n{"question": "\xff"}')
    with pytest.raises(RequestError, match=r"x.jsonl:2: byte 0xff is not UTF-8; convert it"):
        gsm8k(tmp_path)
    with pytest.raises(RequestError, match=f"^no \\*.txt in {tmp_path}; give a file, a folder with"):
        lm(tmp_path)
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(RequestError, match=r"x.txt holds no text; give at least two tokens of it"):
        lm(tmp_path / "x.txt")


# --- examples before a question


def few_shot(tmp_path: Path, make: Any = gsm8k) -> Task:
    return make(write(tmp_path / "asked.jsonl", ROWS[make]))  # type: ignore[no-any-return]


def test_shots_come_from_items_that_are_not_asked(tmp_path: Path) -> None:
    whole = few_shot(tmp_path)
    asked = whole.limited(2)
    shown = asked.with_shots(3, examples=whole.items, seed=1)
    before = shown.items[0].prompt.removesuffix(asked.items[0].prompt)
    for plain, item in zip(asked.items, shown.items, strict=True):
        assert item.prompt == before + plain.prompt
        assert item.answer == plain.answer
        assert plain.prompt not in before
    examples = before.split("\n\n")
    assert examples.pop() == ""
    assert len(set(examples)) == 3
    wanted = {f"{item.prompt}{item.shown}" for item in whole.items if item not in asked.items}
    assert set(examples) <= wanted


def test_the_seed_draws_the_shots(tmp_path: Path) -> None:
    whole = few_shot(tmp_path)
    one, again, other = (whole.limited(1).with_shots(2, examples=whole.items, seed=seed).items for seed in (1, 1, 2))
    assert one == again != other


def test_an_item_is_never_its_own_example(tmp_path: Path) -> None:
    whole = few_shot(tmp_path)
    with pytest.raises(RequestError, match=r"^1 shots need as many examples that are not asked, and there are 0; give"):
        whole.with_shots(1, examples=whole.items)
    # a training file that holds what is asked, under another answer too
    leaky = [Item(whole.items[0].prompt, 9, shown=" 9"), Item("Question: new?\nAnswer:", 1, shown=" 1")]
    shown = whole.with_shots(1, examples=leaky)
    assert all(item.prompt.startswith("Question: new?\nAnswer: 1\n\n") for item in shown.items)


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (cnn_dm, "Article: news {}\nSummary: short {} . more .\n\nArticle: news"),
        (xsum, "Article: news {}\nSummary: short {}\n\nArticle: news"),
        (gsm8k, "Question: what is {} + 1?\nAnswer: It is"),
        (humaneval, "def f{}():\n    return {}\n\n\ndef f"),
        (mbpp, "You are an expert Python programmer, and here is your task: Return {}. Your code should pass these"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_examples_look_like_solved_questions(make: Any, begins: str, tmp_path: Path) -> None:
    whole = few_shot(tmp_path, make)
    prompt = whole.limited(1).with_shots(1, examples=whole.items[4:5]).items[0].prompt
    assert prompt.startswith(begins.format(4, 4))


def test_tasks_without_solved_examples_say_so(tmp_path: Path) -> None:
    (tmp_path / "x_eval.tsv").write_text("domain\tutterance\tsemantic_parse\na\tx\t[IN:A x ]\nb\ty\t[IN:B y ]\n")
    for whole in (topv2(tmp_path), few_shot(tmp_path, spec_bench)):
        with pytest.raises(RequestError, match="has no way to show solved examples; leave shots out"):
            whole.limited(1).with_shots(1, examples=whole.items)
    with pytest.raises(RequestError, match="shots -1 are not possible; use 0 or more"):
        whole.with_shots(-1, examples=())
