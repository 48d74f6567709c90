"""Frames of TOPv2: reading and comparing them."""

import doctest
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip import frames
from layerskip.errors import RequestError
from layerskip.evaluate import topv2
from layerskip.frames import exact_match, parse_tree, table_rows, template, well_formed
from layerskip.train.data import Pair, Source, read


def test_a_frame_is_a_tree() -> None:
    tree = parse_tree("[IN:A x  [SL:B [IN:C y ] ]\t[SL:D z ] w ]")
    assert str(tree) == "[IN:A x [SL:B [IN:C y ] ] [SL:D z ] w ]"
    assert [child if isinstance(child, str) else child.label for child in tree.children] == ["x", "SL:B", "SL:D", "w"]
    assert template(str(tree)) == "[IN:A [SL:B [IN:C ] ] [SL:D ] ]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no frame in an empty text"),
        ("hello", "token 1, 'hello', is outside"),
        ("] x", "token 1 closes a bracket that nothing opened"),
        ("[IN:A x", "never closed, the last one \\[IN:A"),
        ("[IN:A x ] ]", "token 4, ']', comes after"),
        ("[IN:A ] [IN:B ]", "comes after"),
        ("[SL:A x ]", "stands at the root, where only \\[IN: may open"),
        ("[IN:A [IN:B ] ]", "stands inside IN:A, where only \\[SL: may open"),
        ("[IN:A [SL:B [SL:C ] ] ]", "stands inside SL:B"),
        ("[IN:A [x ] ]", "opens neither an intent"),
        ("[IN: x ]", "opens neither an intent"),
    ],
)
def test_what_is_no_frame_says_why(text: str, message: str) -> None:
    assert not well_formed(text)
    with pytest.raises(RequestError, match=message):
        parse_tree(text)


@given(st.lists(st.sampled_from(["[IN:A", "[SL:B", "[IN:C", "]", "]", "]", "x", "[y"]), max_size=9).map(" ".join))
def test_what_can_be_read_is_written_as_it_was(text: str) -> None:
    if well_formed(text):
        assert str(parse_tree(text)) == text
        assert well_formed(template(text))
        assert template(template(text)) == template(text)
    else:
        with pytest.raises(RequestError):
            template(text)


def test_training_and_evaluation_read_one_table_alike(tmp_path: Path) -> None:
    lines = ["a\tset it \t[IN:A set  it ]", "a\tb", "", "a\tstop\t[IN:A stop", "a\t\t[IN:A ]", "b\tgo\t[IN:B go ]\r"]
    raw = b"\xef\xbb\xbfdomain\tutterance\tsemantic_parse\r\n" + "\n".join(lines).encode() + b"\n"
    rows = list(table_rows(raw, name="x.tsv"))
    assert [number for number, _ in rows] == [2, 3, 4, 5, 6, 7]
    assert [row for _, row in rows if not isinstance(row, RequestError)] == [
        ("set it ", "[IN:A set it ]"),
        ("go", "[IN:B go ]"),
    ]
    (tmp_path / "x.tsv").write_bytes(raw)
    trained = read(Source(files=str(tmp_path / "x.tsv")), skip_bad=True)
    assert trained.examples == [Pair("set it ", "[IN:A set it ]"), Pair("go", "[IN:B go ]")]
    said = [f"{tmp_path}/x.tsv:{number}: {row}" for number, row in rows if isinstance(row, RequestError)]
    assert list(trained.complaints) == said
    with pytest.raises(RequestError) as raised:
        topv2(tmp_path / "x.tsv")
    assert str(raised.value) == said[0].replace(":3: ", ":3 is malformed: ")
    with pytest.raises(
        RequestError, match=r"y.tsv:1 is not the header of a TOPv2 table; its columns have to be domain"
    ):
        list(table_rows(b"a\tb\n", name="y.tsv"))


def test_exact_match_is_about_the_whole_frame() -> None:
    assert exact_match(" [IN:A  x ]\n", "[IN:A x ]")
    assert not exact_match("[IN:A X ]", "[IN:A x ]")
    assert not exact_match("[IN:A x ] ]", "[IN:A x ]")
    assert exact_match("[IN:A", "[IN:A")  # frames that are none can be equal too


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(frames) == doctest.TestResults(failed=0, attempted=3)
