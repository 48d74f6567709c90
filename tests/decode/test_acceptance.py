"""The counts add up, and the definitions are those that the module docstring states."""

import doctest
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import layerskip.decode.acceptance
from layerskip.decode.acceptance import Acceptance


def test_examples() -> None:
    assert doctest.testmod(layerskip.decode.acceptance).failed == 0


# (drafted, accepted, emitted): the last number is at most accepted + 1.
ROUND = st.integers(0, 6).flatmap(
    lambda drafted: st.integers(0, drafted).flatmap(
        lambda accepted: st.tuples(st.just(drafted), st.just(accepted), st.integers(1, accepted + 1))
    )
)


def counted(rounds: list[tuple[int, int, int]]) -> Acceptance:
    counts = Acceptance()
    for drafted, accepted, emitted in rounds:
        counts.add(drafted=drafted, accepted=accepted, emitted=emitted)
    return counts


def test_nothing_is_zero_and_json() -> None:
    empty = Acceptance()
    assert (empty.rate, empty.length) == (0.0, 0.0)
    assert json.loads(json.dumps(empty.as_dict())) == empty.as_dict()


def test_plain_rounds_have_length_one() -> None:
    counts = counted([(0, 0, 1)] * 3)
    assert (counts.rate, counts.length, counts.by_length) == (0.0, 1.0, {0: 3})


def test_a_round_cut_short_keeps_the_definition() -> None:
    counts = counted([(4, 4, 5), (4, 4, 1)])
    assert counts.length == 5.0
    assert counts.emitted == 6


@given(st.lists(ROUND))
def test_counts_agree_with_each_other(rounds: list[tuple[int, int, int]]) -> None:
    counts = counted(rounds)
    assert counts.rounds == len(rounds) == sum(counts.by_length.values())
    assert counts.drafted == sum(drafted for drafted, _, _ in rounds) == sum(counts.drafted_at)
    assert counts.accepted == sum(accepted for _, accepted, _ in rounds) == sum(counts.accepted_at)
    assert counts.accepted == sum(size * times for size, times in counts.by_length.items())
    assert counts.emitted == sum(emitted for _, _, emitted in rounds)
    assert len(counts.drafted_at) == len(counts.accepted_at)
    assert all(a <= d for a, d in zip(counts.accepted_at, counts.drafted_at, strict=True))
    for position, accepted_at in enumerate(counts.accepted_at):
        assert accepted_at == sum(accepted > position for _, accepted, _ in rounds)


@given(st.lists(ROUND), st.lists(ROUND))
def test_a_sum_counts_both(one: list[tuple[int, int, int]], other: list[tuple[int, int, int]]) -> None:
    left, right = counted(one), counted(other)
    left.draft_seconds, right.draft_seconds, right.verify_seconds = 1.0, 2.0, 0.5
    expected = counted(one + other)
    expected.draft_seconds, expected.verify_seconds = 3.0, 0.5
    assert left + right == expected
    assert (left, right.drafted_at) == (left, counted(other).drafted_at)
    left.merge(right)
    assert left == expected
    # The sum shares nothing with its parts.
    left.add(drafted=1, accepted=1, emitted=2)
    assert (right.drafted_at, right.by_length) == (counted(other).drafted_at, counted(other).by_length)


def test_a_tree_is_counted_by_depth() -> None:
    counts = Acceptance()
    counts.add(drafted=6, accepted=2, emitted=3, drafted_depths=[0, 0, 1, 1, 1, 2])
    counts.add(drafted=1, accepted=0, emitted=1)
    assert counts.drafted_at == [3, 3, 1]
    assert counts.accepted_at == [1, 1, 0]
    assert (counts.drafted, counts.accepted, counts.by_length) == (7, 2, {2: 1, 0: 1})


@pytest.mark.parametrize(
    "impossible",
    [
        {"drafted": 1, "accepted": 2, "emitted": 1},
        {"drafted": 2, "accepted": 1, "emitted": 3},
        {"drafted": 2, "accepted": 2, "emitted": 3, "drafted_depths": [0, 0]},
        {"drafted": 2, "accepted": 1, "emitted": 2, "drafted_depths": [0]},
    ],
)
def test_impossible_rounds_are_refused(impossible: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        Acceptance().add(**impossible)  # type: ignore[arg-type]


def test_the_names_are_those_people_scrape() -> None:
    counts = counted([(4, 4, 5), (4, 1, 2), (4, 4, 5)])
    counts.draft_seconds, counts.verify_seconds, counts.rest_seconds = 0.5, 1.5, 0.25
    assert counts.as_dict() == {
        "mean_acceptance_length": 4.0,
        "draft_acceptance_rate": 0.75,
        "acceptance_histogram": {"1": 1, "4": 2},
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 9,
        "num_draft_tokens": 12,
        "num_emitted_tokens": 12,
        "accepted_by_position": [3, 2, 2, 2],
        "drafted_by_position": [3, 3, 3, 3],
        "seconds": {"draft": 0.5, "verify": 1.5, "rest": 0.25},
    }
    assert json.loads(json.dumps(counts.as_dict())) == counts.as_dict()
