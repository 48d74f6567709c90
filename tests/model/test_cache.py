"""What the cache keeps when it grows, copies and moves, and what it says when memory runs out."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip.model.cache
from layerskip.errors import CapacityError
from layerskip.model.cache import Cache, free_bytes
from layerskip.model.shape import Shape

SHAPE = Shape.from_config(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


def cache_of(rows: int, slots: int) -> Cache:
    return Cache(SHAPE, rows=rows, slots=slots, dtype=torch.float32)


def fill(cache: Cache) -> None:
    """A number of its own in every place: keys tell row, slot and layer, values are their negatives."""
    rows, slots = torch.arange(cache.rows)[:, None, None, None], torch.arange(cache.slots)[:, None]
    for layer in range(3):
        keys = ((layer + 1) * (1000 * (rows + 1) + slots)).float().expand(-1, 2, -1, 2)
        cache.write(layer, slice(0, cache.rows), slots.T.expand(cache.rows, -1), keys, -keys)


def held(cache: Cache, row: int, limit: int) -> Tensor:
    """1000 x (row + 1) + slot for slots 0..limit-1, or 0 where nothing is held; every layer must agree."""
    numbers = []
    for layer in range(3):
        keys, values = cache.read(layer, slice(row, row + 1), limit)
        assert torch.equal(keys, -values)
        assert torch.equal(keys, keys[:, :1, :, :1].expand_as(keys))
        numbers.append(keys[0, 0, :, 0] / (layer + 1))
    assert torch.equal(numbers[0], numbers[1])
    assert torch.equal(numbers[0], numbers[2])
    return numbers[0]


def test_an_empty_cache_is_zero_and_has_its_size() -> None:
    cache = cache_of(2, 5)
    assert (cache.rows, cache.slots) == (2, 5)
    assert held(cache, 1, 5).tolist() == [0] * 5


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0])], ids=["slice", "tensor"])
def test_what_is_written_is_read(rows: slice | Tensor) -> None:
    cache, slots = cache_of(3, 6), torch.tensor([[4, 1], [0, 5]])
    keys, values = torch.randn(2, 2, 2, 2), torch.randn(2, 2, 2, 2)
    cache.write(1, rows, slots, keys, values)
    read_keys, read_values = cache.read(1, rows, 6)
    for row in range(2):
        assert torch.equal(read_keys[row][:, slots[row]], keys[row])
        assert torch.equal(read_values[row][:, slots[row]], values[row])
    assert cache.keys[0].count_nonzero() == cache.keys[2].count_nonzero() == 0
    assert cache.keys[1].count_nonzero() == keys.count_nonzero()


@pytest.mark.parametrize("size", [(4, 5), (2, 9), (7, 12), (1, 30), (2, 5)])
def test_growing_keeps_what_was_held_and_never_shrinks(size: tuple[int, int]) -> None:
    cache = cache_of(2, 5)
    fill(cache)
    cache.place(slice(1, 2), torch.tensor([[4]]), torch.tensor([[2]]))
    cache.grow(rows=size[0], slots=size[1])
    assert (cache.rows, cache.slots) == (max(2, size[0]), max(5, size[1]))
    assert held(cache, 0, 5).tolist() == [1000, 1001, 1002, 1003, 1004]
    assert held(cache, 1, 5).tolist() == [2000, 2001, 2002, 2003, 2004]
    assert cache.positions[1, :5].tolist() == [0, 1, 2, 3, 2]
    assert cache.positions[0].tolist() == list(range(cache.slots + 1))
    for row in range(cache.rows):
        assert held(cache, row, cache.slots)[0 if row > 1 else 5 :].tolist() == [0] * (cache.slots - 5 * (row < 2))


def test_copy_prefix_copies_exactly_the_prefix() -> None:
    cache = cache_of(3, 6)
    fill(cache)
    cache.copy_prefix(2, 0, length=4)
    assert held(cache, 0, 6).tolist() == [3000, 3001, 3002, 3003, 1004, 1005]
    assert held(cache, 1, 6).tolist() == [2000, 2001, 2002, 2003, 2004, 2005]
    assert held(cache, 2, 6).tolist() == [3000, 3001, 3002, 3003, 3004, 3005]


@pytest.mark.parametrize("rows", [slice(0, 2), torch.tensor([0, 1])], ids=["slice", "tensor"])
def test_gather_moves_overlapping_slots_at_once(rows: slice | Tensor) -> None:
    cache = cache_of(3, 8)
    fill(cache)
    source = torch.tensor([[2, 3, 5], [1, 4, 3]])  # each row reads slots that it also writes
    target = torch.tensor([[1, 2, 3], [1, 2, 3]])
    cache.gather(rows, source, target)
    assert held(cache, 0, 8).tolist() == [1000, 1002, 1003, 1005, 1004, 1005, 1006, 1007]
    assert held(cache, 1, 8).tolist() == [2000, 2001, 2004, 2003, 2004, 2005, 2006, 2007]
    assert held(cache, 2, 8).tolist() == list(range(3000, 3008))


def test_clear_wipes_one_row() -> None:
    cache = cache_of(2, 4)
    fill(cache)
    cache.keys[1][0, :, 2] = torch.nan
    cache.values[2][0, :, 4] = torch.nan
    cache.clear(0)
    assert held(cache, 0, 4).tolist() == [0] * 4
    assert all(torch.isfinite(tensor).all() for tensor in (*cache.keys, *cache.values))
    assert held(cache, 1, 4).tolist() == [2000, 2001, 2002, 2003]


def would_fit(error: CapacityError) -> tuple[int, int]:
    found = re.search(r"(\d+) rows x (\d+) positions would fit", str(error))
    assert found, error
    return int(found[1]), int(found[2])


def test_a_cache_too_big_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerskip.model.cache, "free_bytes", lambda device: 100_000)
    with pytest.raises(CapacityError, match=r"a cache of 4 rows x 5000 positions needs 0\.00 GiB") as caught:
        cache_of(4, 5000)
    rows, slots = would_fit(caught.value)
    assert rows == 4
    cache_of(4, slots)
    with pytest.raises(CapacityError):
        cache_of(4, slots + 1)


def test_a_cache_that_cannot_grow_stays_and_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(2, 300)
    fill(cache)
    monkeypatch.setattr(layerskip.model.cache, "free_bytes", lambda device: 50_000)
    with pytest.raises(CapacityError, match="ask for fewer tokens or rows") as caught:
        cache.grow(rows=2, slots=5000)
    assert (cache.rows, cache.slots) == (2, 300)
    assert held(cache, 1, 300).tolist() == list(range(2000, 2300))
    rows, slots = would_fit(caught.value)
    assert (rows, slots > 300) == (2, True)  # what is held already counts towards the bigger cache
    with pytest.raises(CapacityError):
        cache.grow(rows=2, slots=slots + 1)
    cache.grow(rows=2, slots=slots)
    assert held(cache, 1, 300).tolist() == list(range(2000, 2300))


def test_not_even_one_position_is_said_without_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerskip.model.cache, "free_bytes", lambda device: 10)
    with pytest.raises(CapacityError, match="ask for fewer tokens or rows") as caught:
        cache_of(4, 5000)
    assert "would fit" not in str(caught.value)


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("after", range(6))
def test_growth_that_fails_half_way_leaves_a_usable_cache(
    monkeypatch: pytest.MonkeyPatch, after: int, failure: BaseException
) -> None:
    cache, allocate, calls = cache_of(2, 5), torch.zeros, []
    fill(cache)

    def failing(*size: Any, **how: Any) -> Tensor:
        calls.append(size)
        if len(calls) > after:
            raise failure
        return allocate(*size, **how)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", failing)
        with pytest.raises(
            (CapacityError, KeyboardInterrupt), match=r"^$|could not be allocated; ask for fewer tokens"
        ):
            cache.grow(rows=4, slots=9)
    assert (cache.rows, cache.slots) == (2, 5)
    assert held(cache, 0, 5).tolist() == [1000, 1001, 1002, 1003, 1004]
    assert held(cache, 1, 5).tolist() == [2000, 2001, 2002, 2003, 2004]
    for layer in (*cache.keys, *cache.values):  # as code that takes addresses counts on
        assert (tuple(layer.shape), layer.is_contiguous()) == ((2, 2, 6, 2), True)
    fill(cache)
    cache.grow(rows=3, slots=7)
    assert held(cache, 1, 7).tolist() == [2000, 2001, 2002, 2003, 2004, 0, 0]
    assert held(cache, 2, 7).tolist() == [0] * 7


def test_free_memory_is_told_or_unknown() -> None:
    told = free_bytes(torch.device("cpu"))
    assert told is None or told > 0
    assert free_bytes(torch.device("meta")) is None
