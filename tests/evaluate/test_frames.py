"""Frames of TOPv2: reading and comparing them."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.errors import RequestError
from layerskip.evaluate import frames
from layerskip.evaluate.frames import exact_match, parse_tree, template, well_formed
from layerskip.train.data.topv2 import check_frame


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
    for read in (parse_tree, check_frame):
        with pytest.raises(RequestError, match=message):
            read(text)


@given(st.lists(st.sampled_from(["[IN:A", "[SL:B", "[IN:C", "]", "]", "]", "x", "[y"]), max_size=9).map(" ".join))
def test_training_and_evaluation_read_frames_by_one_rule(text: str) -> None:
    said = []
    for read in (parse_tree, check_frame):
        try:
            read(text)
            said.append("")
        except RequestError as error:
            said.append(str(error))
    assert said[0] == said[1]


def test_exact_match_is_about_the_whole_frame() -> None:
    assert exact_match(" [IN:A  x ]\n", "[IN:A x ]")
    assert not exact_match("[IN:A X ]", "[IN:A x ]")
    assert not exact_match("[IN:A x ] ]", "[IN:A x ]")
    assert exact_match("[IN:A", "[IN:A")  # frames that are none can be equal too


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(frames) == doctest.TestResults(failed=0, attempted=2)
