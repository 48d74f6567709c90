"""What rows of a cache hold after they were given back, and who gets which."""

from collections.abc import Callable
from typing import Any

import pytest

from layerskip import CapacityError
from layerskip.decode.pool import Pool, common_prefix
from layerskip.model import cache as cache_module

TALK = [1, 2, 3, 4, 5, 6]


@pytest.fixture
def pool(tiny: Callable[..., Any], decoder_of: Callable[..., Any]) -> Pool:
    return Pool(decoder_of(tiny("llama")).cache(rows=2, slots=64))


def used(pool: Pool, ids: list[int]) -> tuple[int, int]:
    """Claims a row, fills it and gives it back: (row, tokens it held already)."""
    row, length = pool.claim(ids, depth=1, slots=16)
    pool.hold(row, ids, depth=1)
    pool.give_back(row)
    return row, length


def test_a_prompt_that_only_begins_alike_leaves_a_conversation_its_row(pool: Pool) -> None:
    kept, _ = used(pool, TALK)
    other, length = used(pool, [1, 9, 9])
    assert (other != kept, length) == (True, 1)
    assert used(pool, [*TALK, 7]) == (kept, len(TALK))


def test_the_row_longest_unused_is_taken(pool: Pool) -> None:
    first, _ = used(pool, TALK)
    second, _ = used(pool, [9, 8, 7])
    assert used(pool, [5, 5]) == (first, 0)
    assert used(pool, [9, 8, 7, 6]) == (second, 3)


def test_a_claim_for_which_idle_rows_must_go_finds_nothing_of_theirs(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(pool, TALK)
    used(pool, [9, 8, 7])
    shape = pool.cache.shape
    held = shape.cache_bytes(1, 201, 8)  # room for one row of that length in all

    def free(_: object) -> int:
        return held - (shape.cache_bytes(pool.cache.rows, pool.cache.slots + 1, 8) if pool.cache.rows else 0)

    monkeypatch.setattr(cache_module, "free_bytes", free)
    assert pool.claim([*TALK, 7], depth=1, slots=200) == (0, 0)
    assert len(pool.rows) == pool.cache.rows == 1


def test_a_claim_that_can_never_fit_leaves_idle_rows_what_they_hold(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(pool, TALK)
    monkeypatch.setattr(cache_module, "free_bytes", lambda _: 0)
    with pytest.raises(CapacityError):
        pool.claim([*TALK, 7], depth=1, slots=200)
    assert pool.shared([*TALK, 7], depth=1) == len(TALK)
    assert pool.claim([*TALK, 7], depth=1, slots=64)[1] == len(TALK)


def test_a_cache_that_grows_token_by_token_is_copied_a_few_times(
    tiny: Callable[..., Any], decoder_of: Callable[..., Any]
) -> None:
    pool = Pool(decoder_of(tiny("llama", max_position_embeddings=2048)).cache(rows=2, slots=64))
    sizes = set()
    for slots in range(1, 2049):
        pool.make_room(rows=1, slots=slots)
        assert pool.cache.slots >= slots
        sizes.add(pool.cache.slots)
    assert len(sizes) < 12
    assert pool.cache.slots == 2048  # there is nothing behind the context


@pytest.mark.parametrize("length", [0, 1, 2, 7, 100])
def test_common_prefix(length: int) -> None:
    for same in range(length + 1):
        other = [*range(same), *range(1000, 1000 + length - same)]
        assert common_prefix(range(length), other) == same
        assert common_prefix([*range(same)], [*range(length)]) == same
