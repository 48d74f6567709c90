"""Data for training: what is read, how it becomes tokens, and how tokens share a batch."""

import doctest
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerskip.errors import RequestError
from layerskip.train.data import (
    IGNORE,
    Chat,
    Document,
    LengthBuckets,
    Limits,
    Packed,
    Padded,
    Pair,
    Rows,
    Source,
    StreamedRows,
    Turn,
    block_diagonal,
    cut_stream,
    digest,
    encode,
    hold_out,
    iterate,
    pack,
    packing,
    permutation,
    read,
    topv2_tokenizer,
    train_tokenizer,
)
from layerskip.train.data.topv2 import EOS, PARSE

ROOT = Path(__file__).resolve().parents[2]
HEADER = "domain\tutterance\tsemantic_parse\n"
ALARM = Pair("Set an alarm for 7am, today.", "[IN:CREATE_ALARM Set an alarm [SL:DATE_TIME for 7 am , today ] . ]")
PAIRS = [
    ALARM,
    Pair("what's today's weather?", "[IN:GET_WEATHER what 's [SL:DATE_TIME today 's ] weather ? ]"),
    Pair("wake me at 9:30", "[IN:CREATE_ALARM wake me [SL:DATE_TIME at 9 : 30 ] ]"),
    Pair("is it cold at home", "[IN:GET_WEATHER is it cold [SL:LOCATION [IN:GET_LOCATION at home ] ] ]"),
]


@pytest.fixture(scope="module")
def parser() -> PreTrainedTokenizerFast:
    return topv2_tokenizer(PAIRS * 4, vocab_size=400)


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Puts BOS in front, and knows a few words."""
    return train_tokenizer(["the cat sat on the mat"] * 4, vocab_size=280)


def rows_of(*lengths: int) -> Rows:
    """Rows whose tokens are all different."""
    ends = np.cumsum([1, *lengths])
    ids = [np.arange(begin, end) for begin, end in pairwise(ends)]
    return Rows({"input_ids": each, "labels": each} for each in ids)


# --- reading


def test_files_become_examples(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"a text\r\nof two lines\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "c.jsonl").write_text(
        '{"text": "t\u2028t"}\n{"prompt": "p", "response": "r", "id": 3}\r\n'
        '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}'
    )
    (tmp_path / "d.tsv").write_text(f'{HEADER}weather\t"how  cold\t[IN:GET_WEATHER " how  cold ]\r\n', newline="")
    found = read(Source(files=["*.txt", "c.jsonl", "*.tsv", "a.txt"]), folder=tmp_path)
    assert found.examples == [
        Document("with a mark"),
        Document("a text\r\nof two lines\n"),
        Document("t\u2028t"),
        Pair("p", "r"),
        Chat((Turn("user", "u"), Turn("assistant", "a"))),
        Pair('"how  cold', '[IN:GET_WEATHER " how cold ]'),
    ]
    assert list(found.sha256) == ["a.txt", "b.txt", "c.jsonl", "d.tsv"]
    assert found.sha256["a.txt"] == hashlib.sha256(b"\xef\xbb\xbfwith a mark").hexdigest()
    assert (found.skipped, found.complaints) == (0, ())


def test_a_separator_ends_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|end|>\ntwo\nlines\n<|end|>\n")
    found = read(Source(files="a.txt", separator="<|end|>"), folder=tmp_path)
    assert found.examples == [Document("one"), Document("two\nlines")]


def test_patterns_go_into_folders_and_formats_override_names(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "m.py").write_text("pass")
    (tmp_path / "x" / "n.py").write_text("1")
    (tmp_path / "odd[1].py").write_text("2")
    found = read(Source(files=("x/**/*.py", "odd[1].py"), format="text"), folder=tmp_path)
    assert found.examples == [Document("1"), Document("pass"), Document("2")]
    assert list(found.sha256) == ["x/n.py", "x/y/m.py", "odd[1].py"]


def test_columns_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "unused", "article": "long", "highlights": "short"}\n')
    columns = {"response": "highlights", "prompt": "article"}
    assert read(Source(files="a.jsonl", columns=columns), folder=tmp_path).examples == [Pair("long", "short")]


BAD_JSON = [
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
    (b"[1]", "a JSON list instead of an object"),
    (b"", "the line is empty"),
    (b'{"prompt": "p"}', "neither text nor prompt + response nor messages; it has 'prompt'"),
    (b'{"text": "a", "prompt": "p", "response": "r"}', "both prompt + response and text; choose with columns"),
    (b'{"text": " "}', "text is empty"),
    (b'{"prompt": "p", "response": null}', "response is missing instead of text"),
    (b'{"text": 3}', "text is a int instead of text"),
    (b'{"text": "\\ud800"}', "text has half of a surrogate pair at letter 1"),
    (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
    (b'{"text": %s}' % (b"9" * 5000), "JSON beyond what Python reads"),
    (b"[" * 100_000, "JSON beyond what Python reads"),
    (b'{"messages": []}', "messages is not a list of messages"),
    (b'{"messages": ["hi"]}', "message 1 is not an object with role and content"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "content of message 1 is a list instead of text"),
    (b'{"messages": [{"role": "user", "content": "u"}]}', "no message is the assistant's"),
]
BAD_TABLE = [
    (b"a\tb", "2 columns instead of 3"),
    (b"a\tb\t[IN:B b ]\tc", "4 columns instead of 3"),
    (b"a\t \t[IN:B b ]", "the utterance is empty"),
    (b"a\tb\t[IN:B b", "1 bracket(s) are never closed, the last one [IN:B"),
    (b"a\tb\t[IN:B b ] ]", "token 4, ']', comes after the frame has ended"),
    (b"a\t\xffb\t[IN:B b ]", "byte 0xff is not UTF-8"),
]


@pytest.mark.parametrize(("line", "why"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_malformed_record_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    check_malformed(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n', line=2, why=why)


@pytest.mark.parametrize(("line", "why"), BAD_TABLE, ids=range(len(BAD_TABLE)))
def test_a_malformed_table_row_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    fine = b"a\tb\t[IN:B b ]\n"
    check_malformed(tmp_path / "a.tsv", HEADER.encode() + fine + line + b"\n" + fine, line=3, why=why)


def check_malformed(path: Path, raw: bytes, *, line: int, why: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(RequestError) as raised:
        read(Source(files=str(path)))
    assert f"1 of 3 rows are malformed: {path}:{line}: {why}" in str(raised.value)
    assert str(raised.value).endswith("mend them, or leave them out with --skip-bad (skip_bad=True)")
    found = read(Source(files=str(path)), skip_bad=True)
    assert (len(found.examples), found.skipped) == (2, 1)
    assert found.complaints[0].startswith(f"{path}:{line}: {why}")


def test_a_malformed_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n|\n|\ntwo\nth\xffree\n|four")
    with pytest.raises(RequestError, match=r"2 of 4 rows .*a.txt:2: the document is empty; .*a.txt:5: byte 0xff"):
        read(Source(files="a.txt", separator="|"), folder=tmp_path)


def test_only_the_first_malformed_rows_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 7 + '{"text": "a"}\n')
    with pytest.raises(RequestError, match=r"^7 of 8 rows") as raised:
        read(Source(files="a.jsonl"), folder=tmp_path)
    message = str(raised.value)
    assert "a.jsonl:5: " in message
    assert "a.jsonl:6: " not in message
    assert "; ...; mend them" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "name", "settings", "message"),
    [
        ("", "a.txt", {"files": "b.txt"}, "no file matches 'b.txt'"),
        ("", "a.txt", {"files": "*.jsonl"}, "no file matches"),
        ("x", "a.csv", {"files": "a.csv"}, "none of the endings .txt, .jsonl, .tsv; give its format"),
        ("a\tb\n", "a.tsv", {"files": "a.tsv"}, "a.tsv:1 is not the header of a TOPv2 table"),
        ("", "a.jsonl", {"files": "a.jsonl"}, "there are no examples in a.jsonl"),
        ("x", "a.txt", {"files": "a.txt", "columns": {"text": "t"}}, "is read as text; separator is for text files"),
        ("x", "a.jsonl", {"files": "a.jsonl", "separator": "|"}, "is read as jsonl; separator is for text files"),
    ],
)
def test_a_file_that_cannot_be_read_is_always_an_error(
    tmp_path: Path, content: str, name: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        read(Source(**settings), folder=tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either files or hub, not neither"),
        ({"files": "a", "hub": "b"}, "either files or hub, not both"),
        ({"files": "a", "streaming": True}, "streaming is for data sets"),
        ({"hub": "a", "separator": "|"}, "format and separator are for files"),
        ({"files": "a", "format": "json"}, "'json' is not one of text, jsonl, topv2; use one of them; did you mean"),
        ({"files": "a", "separator": ""}, "an empty separator"),
        ({"files": "a", "columns": {"respons": "x"}}, "maps 'respons'; .*; did you mean 'response'"),
        ({"files": "a", "columns": {"response": "x"}}, "map text, or prompt and response, or messages"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Source(**settings)


def test_data_sets_are_read_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"q": f"q{i}", "a": None if i == 3 else f"a{i}"}) + "\n" for i in range(6))
    )
    columns = {"prompt": "q", "response": "a"}
    source = Source(hub=str(folder), columns=columns)
    with pytest.raises(RequestError, match=r"1 of 6 rows .*train row 4: a is missing"):
        read(source)
    found = read(source, skip_bad=True)
    assert found.examples == [Pair(f"q{i}", f"a{i}") for i in (0, 1, 2, 4, 5)]
    assert list(found.sha256.values()) == [digest(found.examples)]

    streamed = Source(hub=str(folder), columns=columns, streaming=True)
    with pytest.raises(RequestError, match="streamed"):
        read(streamed)
    assert list(iterate(streamed, skip_bad=True)) == found.examples
    with pytest.raises(RequestError, match=r"a row is malformed: .* row 4"):
        list(iterate(streamed))
    mixed = [list(iterate(streamed, skip_bad=True, seed=seed)) for seed in (1, 1, 2)]
    assert mixed[0] == mixed[1] != mixed[2]
    assert Counter(mixed[2]) == Counter(found.examples)
    with pytest.raises(RequestError, match="cannot be loaded"):
        read(Source(hub=str(tmp_path / "nowhere")))
    with pytest.raises(RequestError, match="cannot be loaded"):
        read(Source(hub=str(folder), split="test"))


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'layerskip\[train\]'"):
        read(Source(hub="a/b"))


# --- parting and fingerprints


def test_equal_examples_are_held_out_together() -> None:
    examples = [Pair(f"q{i % 500}", "r") for i in range(1000)]
    kept, held = hold_out(examples, share=0.2)
    assert not set(kept) & set(held)
    assert sorted(map(str, kept + held)) == sorted(map(str, examples))
    assert 0.14 < len(held) / 1000 < 0.26
    assert held == [example for example in examples if example in set(held)]


def test_an_example_stays_where_it_is() -> None:
    examples = [Document(str(i)) for i in range(400)]
    _, held = hold_out(examples, share=0.3, seed=1)
    _, of_fewer = hold_out(examples[::-2], share=0.3, seed=1)
    assert set(of_fewer) == set(held) & set(examples[::-2])
    assert set(hold_out(examples, share=0.1, seed=1)[1]) < set(held)
    assert hold_out(examples, share=0.3, seed=2)[1] != held
    # The very ones, so that a later version cannot move examples from one part to the other.
    assert [each.text for each in held[:6]] == ["7", "8", "13", "14", "17", "18"]
    assert hold_out(examples, share=0) == (examples, [])
    assert hold_out(examples, share=1) == ([], examples)
    with pytest.raises(RequestError, match="from 0 to 1"):
        hold_out(examples, share=1.2)


def test_the_digest_sees_every_field_and_the_order() -> None:
    texts = [
        [Pair("ab", "c"), Document("d")],
        [Pair("a", "bc"), Document("d")],
        [Document("d"), Pair("ab", "c")],
        [Pair("ab", "c"), Document("dd")],
        [Pair("ab", "c")],
        [Chat((Turn("ab", "c"),)), Document("d")],
    ]
    assert len({digest(each) for each in texts}) == len(texts)
    assert digest(texts[0]) == digest(list(texts[0]))


# --- tokens


def test_a_document_is_learnt_from_end_to_end(letters: PreTrainedTokenizerFast) -> None:
    row = encode([Document("the cat")], tokenizer=letters).rows[0]
    assert letters.convert_ids_to_tokens(row["input_ids"].tolist()) == ["<s>", "the", "Ġcat", "</s>"]
    assert row["labels"].tolist() == row["input_ids"].tolist()


def test_a_prompt_is_not_learnt_unless_asked(letters: PreTrainedTokenizerFast) -> None:
    pairs = [Pair("the cat", " sat"), Pair("on", " the mat")]
    rows = encode(pairs, tokenizer=letters).rows
    assert [letters.decode(row["input_ids"]) for row in rows] == ["<s>the cat sat</s>", "<s>on the mat</s>"]
    learnt = [[label for label in row["labels"].tolist() if label != IGNORE] for row in rows]
    assert [letters.decode(each) for each in learnt] == [" sat</s>", " the mat</s>"]
    assert rows.learnt == 2 + 3
    for row in encode(pairs, tokenizer=letters, limits=Limits(train_on_prompt=True)).rows:
        assert row["labels"].tolist() == row["input_ids"].tolist()


def test_eos_is_there_once_whatever_the_tokenizer_does(letters: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    ends_texts = train_tokenizer(["the cat sat on the mat"] * 4, vocab_size=280)
    ends_texts.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    examples = [Document("the cat"), Pair("the", " cat")]
    for one, other in zip(*(encode(examples, tokenizer=each).rows for each in (letters, ends_texts)), strict=True):
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert one["labels"].tolist() == other["labels"].tolist()


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_the_assistant_says_is_learnt() -> None:
    tokenizer = train_tokenizer(["a b c"], vocab_size=280)
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    chat = Chat(tuple(Turn(role, content) for role, content in turns))
    with pytest.raises(RequestError, match="no chat template"):
        encode([chat], tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    row = encode([chat], tokenizer=tokenizer).rows[0]
    text = "<system>s</s>\n<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>d</s>\n"
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode(row["labels"][row["labels"] != IGNORE]) == "b</s>\nd</s>\n"
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(RequestError, match="rewrites earlier turns when turn 3 comes"):
        encode([chat], tokenizer=tokenizer)


def test_an_assistant_may_speak_first_and_what_a_template_refuses_is_named() -> None:
    tokenizer = train_tokenizer(["a b c"], vocab_size=280)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if not messages %}{{ messages[0]['content'] }}{% endif %}" + TEMPLATE
    )
    chat = Chat((Turn("assistant", "a"), Turn("user", "b"), Turn("assistant", "c")))
    row = encode([chat], tokenizer=tokenizer).rows[0]
    assert tokenizer.decode(row["labels"][row["labels"] != IGNORE]) == "<assistant>a</s>\nc</s>\n"
    with pytest.raises(RequestError, match="refuses a conversation: no system role; its roles are system, assistant"):
        encode([Chat((Turn("system", "s"), Turn("assistant", "a")))], tokenizer=tokenizer)


def test_long_documents_are_cut_and_lose_nothing(letters: PreTrainedTokenizerFast) -> None:
    text = "the cat sat on the mat"
    whole = encode([Document(text)], tokenizer=letters).rows[0]["input_ids"].tolist()
    found = encode([Document(text), Document("the")], tokenizer=letters, limits=Limits(max_length=3))
    assert max(found.rows.lengths) == 3
    assert np.concatenate([row["input_ids"] for row in found.rows])[: len(whole)].tolist() == whole
    assert (found.cut, found.dropped) == (1, 0)


def test_a_single_token_is_no_chunk(letters: PreTrainedTokenizerFast) -> None:
    rows = encode([Document("the cat")], tokenizer=letters, limits=Limits(max_length=3)).rows  # 4 tokens
    assert rows.lengths.tolist() == [3]


def test_long_pairs_are_an_error_or_counted(letters: PreTrainedTokenizerFast) -> None:
    pairs = [Pair("the", " cat"), Pair("the cat sat on", " the mat")]
    with pytest.raises(RequestError, match=r"1 of 2 rows are longer than max_length 4 \(the longest has 8 tokens\)"):
        encode(pairs, tokenizer=letters, limits=Limits(max_length=4))
    found = encode(pairs, tokenizer=letters, limits=Limits(max_length=4, too_long="drop"))
    assert (len(found.rows), found.dropped, found.cut) == (1, 1, 0)


@pytest.mark.parametrize(("settings", "message"), [({"max_length": 1}, "use 2 or more"), ({"too_long": "x"}, "'drop'")])
def test_limits_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Limits(**settings)


def test_a_tokenizer_without_eos_is_refused(letters: PreTrainedTokenizerFast) -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer)
    with pytest.raises(RequestError, match="no EOS token"):
        encode([Document("a")], tokenizer=without)


@pytest.mark.parametrize("piece", [18, 31, 33, 41])  # some end between two line ends
def test_a_huge_document_is_tokenised_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "the cat\n\n sat on\nthe mat\n" * 5
    tokenizer = train_tokenizer([lines] * 4, vocab_size=280)
    one_line = "the mat" * 9  # longer than a piece
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    whole = [row["input_ids"].tolist() for row in encode([Document(lines)], tokenizer=tokenizer).rows]
    monkeypatch.setattr("layerskip.train.data.encoding._PIECE", piece)
    assert [row["input_ids"].tolist() for row in encode([Document(lines)], tokenizer=tokenizer).rows] == whole
    ids = encode([Document(lines + one_line)], tokenizer=tokenizer).rows[0]["input_ids"].tolist()
    assert tokenizer.decode(ids) == f"<s>{lines}{one_line}</s>"
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_rows_are_a_data_set() -> None:
    rows = rows_of(3, 2)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 3], [4, 5]]
    assert rows[-1]["input_ids"].tolist() == [4, 5]
    assert rows.lengths.tolist() == [3, 2]
    with pytest.raises(IndexError):
        rows[2]
    assert len(Rows([])) == 0


# --- batches


def test_examples_in_docstrings_run() -> None:
    found = doctest.testmod(packing, extraglobs={"torch": torch})
    assert found.failed == 0
    assert found.attempted > 0


@given(lengths=st.lists(st.integers(1, 12), max_size=40), how=st.sampled_from(["first-fit", "sequential"]))
def test_packing_loses_and_splits_nothing(lengths: list[int], how: packing.Packing) -> None:
    documents = rows_of(*lengths)
    packed = pack(documents, length=12, how=how)
    assert all(packed.lengths <= 12)
    found = []
    for row in packed:
        begins = np.flatnonzero(row["position_ids"] == 0)
        assert (row["labels"][begins] == IGNORE).all()
        rest = np.setdiff1d(np.arange(len(row["labels"])), begins)
        assert (row["labels"][rest] == row["input_ids"][rest]).all()
        found += [part.tolist() for part in np.split(row["input_ids"], begins[1:])]
        assert all((part == np.arange(len(part))).all() for part in np.split(row["position_ids"], begins[1:]))
    assert sorted(found) == [row["input_ids"].tolist() for row in documents]
    if how == "sequential":
        assert found == sorted(found)


@given(lengths=st.lists(st.integers(1, 12), max_size=40))
def test_first_fit_is_the_first_row_with_room(lengths: list[int]) -> None:
    expected: list[list[int]] = []
    for place, size in enumerate(lengths):
        row = next((row for row in expected if sum(lengths[each] for each in row) + size <= 12), None)
        if row is None:
            expected.append(row := [])
        row.append(place)
    assert packing._fit(np.array(lengths), length=12, how="first-fit") == expected


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        RequestError, match=r"1 documents are longer than a packed row of 4 tokens \(the longest has 5\)"
    ):
        pack(rows_of(3, 5), length=4)
    with pytest.raises(RequestError, match="'first-fit', 'sequential'"):
        pack(rows_of(3), length=4, how="best-fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_gets_the_logits_it_gets_alone(
    family: str, attention: str, causal: Callable[..., Any]
) -> None:
    model = causal(family, attn_implementation=attention).eval()
    documents = rows_of(7, 4, 6, 9, 1, 5, 3)
    packed = pack(documents, length=12)
    collate = Packed.suited_to(model.config, pad_id=60, length=13)
    batch = collate(list(packed))
    assert batch["input_ids"].shape[0] > 1
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        for row in documents:
            at = batch["input_ids"] == torch.from_numpy(row["input_ids"])[:, None, None]
            alone = model(torch.from_numpy(row["input_ids"])[None].long(), use_cache=False).logits[0]
            together = torch.stack([logits[each][0] for each in at])
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
            assert torch.equal(together.argmax(-1), alone.argmax(-1))


def test_the_mask_suits_the_model(causal: Callable[..., Any]) -> None:
    def mask(name: str, attention: str) -> torch.dtype | None:
        config = causal(name).config
        config._attn_implementation = attention
        return Packed.suited_to(config, pad_id=0).mask

    assert mask("llama", "sdpa") is torch.bool
    assert mask("llama", "eager") is torch.float32
    assert mask("llama", "flash_attention_2") is None
    assert mask("mistral", "sdpa") is None  # it has a sliding window


def test_a_packed_loss_is_the_loss_of_the_documents(causal: Callable[..., Any]) -> None:
    model = causal("llama").eval()
    documents = rows_of(7, 4, 6, 9, 5)
    with torch.no_grad():
        packed = model(**Packed(pad_id=0, length=16)(list(pack(documents, length=16)))).loss
        padded = model(**Padded(pad_id=0)(list(documents))).loss
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-6)


def test_padding_is_on_the_right_and_not_learnt(causal: Callable[..., Any]) -> None:
    rows = list(rows_of(3, 5))
    batch = Padded(pad_id=60, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, *[60] * 5], [4, 5, 6, 7, 8, 60, 60, 60]]
    assert batch["labels"].tolist() == [[1, 2, 3, *[IGNORE] * 5], [4, 5, 6, 7, 8, *[IGNORE] * 3]]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    without = Padded(pad_id=60, multiple_of=4, mask=False)(rows)
    assert set(without) == {"input_ids", "labels"}
    model = causal("llama").eval()
    with torch.no_grad():
        one, other = model(**batch), model(**without)
    torch.testing.assert_close(one.loss, other.loss, rtol=0, atol=1e-9)


def test_fill_sees_itself_alone() -> None:
    batch = Packed(pad_id=60, length=5)(list(pack(rows_of(2, 1), length=3)))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 60, 60]]
    assert batch["labels"].tolist() == [[IGNORE, 2, IGNORE, IGNORE, IGNORE]]
    assert batch["attention_mask"][0, 0, 3:].nonzero().tolist() == [[0, 3], [1, 4]]


def test_without_a_mask_a_cache_would_lose_the_borders(causal: Callable[..., Any]) -> None:
    """Why `Packed` hands over a mask: transformers looks for the borders only while there is no cache."""
    model = causal("llama").eval()
    rows = list(pack(rows_of(5, 4), length=9))
    with torch.no_grad():
        wanted = model(**Packed(pad_id=60)(rows)).logits
        found = model(**Packed(pad_id=60, mask=None)(rows), use_cache=False).logits
        lost = model(**Packed(pad_id=60, mask=None)(rows), use_cache=True).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert (lost - wanted).abs().max() > 0.01


def test_the_mask_is_block_diagonal_as_numbers_too() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    seen = block_diagonal(positions)
    assert seen.shape == (1, 1, 6, 6)
    assert seen[0, 0].nonzero().tolist() == [
        [0, 0], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2], [3, 3], [4, 3], [4, 4], [5, 5],
    ]  # fmt: skip
    added = block_diagonal(positions, dtype=torch.bfloat16)
    assert added.dtype is torch.bfloat16
    assert torch.equal(added == 0, seen)
    assert added[~seen].unique().tolist() == [torch.finfo(torch.bfloat16).min]


def test_a_stream_is_cut_into_rows_of_one_length() -> None:
    rows = cut_stream(rows_of(3, 8, 1, 2), length=4)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert [row["labels"].tolist() for row in rows] == [row["input_ids"].tolist() for row in rows]
    with pytest.raises(RequestError, match="14 tokens are less than one row of 20"):
        cut_stream(rows_of(3, 8, 1, 2), length=20)


def test_a_streamed_data_set_is_the_cut_stream(letters: PreTrainedTokenizerFast) -> None:
    def texts(epoch: int) -> list[Document]:
        return [Document(f"the cat sat {epoch} {i}") for i in range(9)]

    rows = StreamedRows(texts, tokenizer=letters, length=8)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        wanted = cut_stream(encode(texts(epoch), tokenizer=letters).rows, length=8)
        assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in wanted]


def test_a_streamed_data_set_is_not_shared_out_among_workers(letters: PreTrainedTokenizerFast) -> None:
    rows = StreamedRows(lambda _: [Document(word) for word in "abcde"], tokenizer=letters, length=3)
    with pytest.raises(RequestError, match="read by the process that trains; use dataloader_num_workers 0"):
        list(DataLoader(rows, batch_size=1, num_workers=1))


# --- order


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {
        (seed, epoch): tuple(permutation(100, seed=seed, epoch=epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(each) == list(range(100)) for each in orders.values())
    # Never another one, on any machine: a run that is resumed with a later version goes on in the same order.
    assert permutation(8, seed=3, epoch=2).tolist() == [2, 3, 6, 4, 1, 7, 5, 0]
    with pytest.raises(RequestError, match="from 0 on"):
        permutation(3, seed=-1, epoch=0)


def test_buckets_waste_little_and_mix() -> None:
    lengths = np.random.default_rng(0).integers(8, 70, 1003)
    sampler = LengthBuckets(lengths, batch_size=16, seed=5)
    first = sampler.batches()
    assert [row for batch in first for row in batch] == list(sampler)
    assert sorted(sampler) == list(range(1003)) == list(range(len(sampler)))
    assert [len(batch) for batch in first] == [16] * 62 + [11]
    shuffled = permutation(1003, seed=5, epoch=0).tolist()
    plain = _fill(lengths, [shuffled[i : i + 16] for i in range(0, 1003, 16)])
    assert _fill(lengths, first) < 0.08 < 0.3 < plain
    # Neither the longest first, nor the same rows together again, nor the shortest always last.
    assert len(set(lengths[first[-1]].tolist())) > 5
    shorter = np.diff([lengths[batch].mean() for batch in first]) < 0
    assert 0.3 < shorter.mean() < 0.7
    sampler.set_epoch(1)
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in sampler.batches())
    sampler.set_epoch(0)
    assert sampler.batches() == first
    with pytest.raises(RequestError, match="use 1 or more"):
        LengthBuckets(lengths, batch_size=0, seed=0)


def _fill(lengths: np.ndarray[Any, Any], batches: list[list[int]]) -> float:
    """How much of padded batches is fill."""
    room = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / room


# --- tokenizers


def test_a_tokenizer_from_scratch_loads_like_any_other(tmp_path: Path) -> None:
    texts = ["hello world, hello <tool> again"] * 8
    tokenizer = train_tokenizer(
        texts, vocab_size=300, special_tokens=("<s>", "</s>", "<pad>", "<sep>"), whole_tokens=("<tool>", "[x")
    )
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # older transformers add a third
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello<tool> 世界\t [xyz \udcff".encode(errors="replace").decode() + "  e\u0301\n"
    for each in (tokenizer, loaded):
        found = each(text)
        assert set(found) == {"input_ids", "attention_mask"}
        assert found["input_ids"][0] == each.bos_token_id == 0
        assert each.decode(found["input_ids"], skip_special_tokens=True) == text
        assert {"<tool>", "[x"} < set(each.convert_ids_to_tokens(found["input_ids"]))
        assert (each.eos_token, each.pad_token, len(each)) == ("</s>", "<pad>", len(tokenizer))
        assert each.decode(each("a<sep>b").input_ids, skip_special_tokens=True) == "ab"
    assert loaded(text) == tokenizer(text)
    assert len(tokenizer) <= 300
    assert train_tokenizer(texts, vocab_size=300).get_vocab() == train_tokenizer(texts, vocab_size=300).get_vocab()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 258}, "too small for 256 bytes and 3 given tokens; use 259 or more"),
        ({"vocab_size": 300, "special_tokens": ("<s>",)}, "give BOS, EOS and PAD"),
        ({"vocab_size": 300, "whole_tokens": ("<s>",)}, "'<s>' is given twice"),
        ({"vocab_size": 300, "whole_tokens": ("",)}, "empty string"),
    ],
)
def test_a_vocabulary_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train_tokenizer(["a"], **settings)


def test_a_user_types_the_utterance_alone(parser: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parser.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    prompt = loaded("set an alarm")
    assert set(prompt) == {"input_ids", "attention_mask"}
    assert loaded.convert_ids_to_tokens([prompt.input_ids[0], prompt.input_ids[-1]]) == ["<s>", PARSE]
    row = encode([ALARM], tokenizer=loaded).rows[0]["input_ids"].tolist()
    assert row == loaded(ALARM.prompt, ALARM.response).input_ids
    assert row[: len(loaded(ALARM.prompt).input_ids)] == loaded(ALARM.prompt).input_ids
    generated = row[len(loaded(ALARM.prompt).input_ids) :]
    assert generated[-1] == loaded.convert_tokens_to_ids(EOS)
    assert loaded.decode(generated, skip_special_tokens=True) == ALARM.response
    # A batch is filled on the left, so that generation goes on from the utterances.
    filled = loaded(["set", ALARM.prompt], padding=True).input_ids
    assert filled[0][0] == loaded.pad_token_id
    assert filled[0][-1] == filled[1][-1]


def test_structure_is_one_token_each(parser: PreTrainedTokenizerFast) -> None:
    for pair in PAIRS:
        ids = parser(pair.response, add_special_tokens=False).input_ids
        words = [token[1:] for token in parser.convert_ids_to_tokens(ids)]
        structure = [word for word in pair.response.split() if word == "]" or word.startswith("[")]
        assert [word for word in words if word in set(structure)] == structure


def test_a_frame_copies_the_tokens_of_its_utterance(parser: PreTrainedTokenizerFast) -> None:
    assert _copied(parser, PAIRS) == [True] * 4
    assert _copied(parser, [Pair("go to town", "[IN:GET_WEATHER to go town ]")]) == [False]
    with pytest.raises(RequestError, match="a Document has no frame"):
        topv2_tokenizer([Document("a")])


def _copied(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[bool]:
    """Whether a frame is the tokens of its utterance, in order, with structure between them."""
    frames = tokenizer([pair.response for pair in pairs], add_special_tokens=False)["input_ids"]
    utterances = tokenizer([pair.prompt for pair in pairs], add_special_tokens=False)["input_ids"]
    structure = {index for token, index in tokenizer.get_vocab().items() if token[1:2] == "[" or token[1:] == "]"}
    return [
        utterance == [token for token in frame if token not in structure]
        for utterance, frame in zip(utterances, frames, strict=True)
    ]


def _round_trips(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[bool]:
    frames = tokenizer([pair.response for pair in pairs], add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(frames, skip_special_tokens=True)
    return [text == pair.response for text, pair in zip(decoded, pairs, strict=True)]


@pytest.mark.parametrize(
    ("utterance", "words"),
    [
        ("at 4pm, or 4:30am?", "at 4 pm , or 4 : 30 am ?"),
        ("what's  Bob’s don't I'm", "what 's Bob ’s don't I'm"),
        ("at 6 a.m. or 4.30pm; 10,000!", "at 6 a.m . or 4.30pm ; 10,000 !"),
        ("I-40 'go' R&B 8:05:10", "I - 40 ' go ' R & B 8 : 05 : 10"),
    ],
)
def test_utterances_are_cut_into_the_words_of_frames(
    parser: PreTrainedTokenizerFast, utterance: str, words: str
) -> None:
    frame = parser(f"[IN:GET_WEATHER {words} ]", add_special_tokens=False).input_ids
    assert parser(utterance, add_special_tokens=False).input_ids == frame[1:-1]
    assert parser.decode(frame) == f"[IN:GET_WEATHER {words} ]"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=8).filter(
    lambda word: not word.startswith("[") and "]" not in word and word.split() == [word] and "<" not in word
)


@given(words=st.lists(WORDS, min_size=1, max_size=6))
def test_any_frame_decodes_to_itself(parser: PreTrainedTokenizerFast, words: list[str]) -> None:
    frame = f"[IN:NEVER_SEEN {' '.join(words)} [SL:DATE_TIME {words[0]} ] ]"
    ids = parser(frame, add_special_tokens=False).input_ids
    assert parser.decode(ids, skip_special_tokens=True) == frame


# --- the real data


def test_topv2_as_published() -> None:
    pairs = _published("eval")
    assert len(pairs) == 17_160
    train, held = pairs[::2], pairs[1::4]
    tokenizer = topv2_tokenizer(train)
    assert all(_round_trips(tokenizer, held))
    assert np.mean(_copied(tokenizer, held)) > 0.995


@pytest.mark.slow
def test_topv2_whole() -> None:
    train, held = _published("train"), _published("eval")
    assert (len(train), len(held)) == (124_597, 17_160)
    tokenizer = topv2_tokenizer(train)
    assert len(tokenizer) == 3072
    for pairs in (train, held):
        assert all(_round_trips(tokenizer, pairs))
        assert np.mean(_copied(tokenizer, pairs)) > 0.998


def _published(part: str) -> list[Pair]:
    folder = ROOT.parent / "shared" / "data" / "topv2"
    if not folder.is_dir():
        pytest.skip(f"needs the TOPv2 tables, and there is no {folder}")
    return [pair for pair in read(Source(files=f"*_{part}.tsv"), folder=folder).examples if isinstance(pair, Pair)]


def test_importing_data_reads_no_data_sets() -> None:
    code = "import sys, layerskip.train.data; print('datasets' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
