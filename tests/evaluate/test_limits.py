"""Rounds read from arrivals, bytes of weights computed by hand, and what a machine can do."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip import EarlyExit, Lookup
from layerskip.evaluate import ticks as ticks_module
from layerskip.evaluate import weights as weights_module
from layerskip.evaluate.bandwidth import buffer_size, last_cache, measure_bandwidth
from layerskip.evaluate.follow import Arrival
from layerskip.evaluate.memory import HighWater
from layerskip.evaluate.ticks import first_tokens, percentiles, read_ticks, round_latencies, token_latencies
from layerskip.evaluate.ways import Way
from layerskip.evaluate.weights import Weights
from layerskip.llm import Chunk


def chunk(
    index: int, tokens: int, seconds: tuple[float, float, float], *, drafted: int = 0, end: bool = False
) -> Chunk:
    ids = list(range(drafted))
    return Chunk(index, "", "", [7] * tokens, 0, ids, ids, None, "stop" if end else None, None, seconds)


ONE, TWO, THREE = (0.1, 0.1, 0.1), (0.2, 0.1, 0.1), (0.3, 0.1, 0.1)
# two rows; row 1 ends and row 2 takes its place; the last two rounds cost the same to the last digit
CHUNKS = [
    (1.0, chunk(0, 1, ONE, drafted=2)),
    (1.1, chunk(1, 3, ONE, drafted=4, end=True)),
    (2.5, chunk(0, 2, TWO)),
    (2.5, chunk(2, 1, TWO, drafted=1)),
    (3.0, chunk(0, 4, THREE)),
    (3.1, chunk(2, 1, THREE, end=True)),
    (3.5, chunk(0, 1, THREE, end=True)),
]
ARRIVALS = [Arrival(c.index, at, len(c.tokens)) for at, c in CHUNKS]


def test_rounds_are_read_from_arrivals() -> None:
    found = read_ticks(ARRIVALS, [c for _, c in CHUNKS])
    assert [(tick.began, tick.ended) for tick in found] == [(0.0, 1.1), (1.1, 2.5), (2.5, 3.1), (3.1, 3.5)]
    assert [tick.gained for tick in found] == [{0: 1, 1: 3}, {0: 2, 2: 1}, {0: 4, 2: 1}, {0: 1}]
    assert [set(tick.new) for tick in found] == [{0, 1}, {2}, set(), set()]
    assert [set(tick.finished) for tick in found] == [{1}, set(), {2}, {0}]
    assert [tick.drafted for tick in found] == [4, 1, 0, 0]
    assert [tick.cost for tick in found] == [ONE, TWO, THREE, THREE]


def test_latencies_of_arrivals_made_by_hand() -> None:
    found = read_ticks(ARRIVALS, [c for _, c in CHUNKS])
    # row 2 waited until 1.1 for its place; that is no part of its first token
    assert first_tokens(found) == pytest.approx([1.1, 1.1, 1.4])
    # a token's share of the gap before its chunk: 1.4 / 2 twice, 0.6 / 4 four times, 0.6 once, 0.4 once
    assert sorted(token_latencies(found)) == pytest.approx([0.15] * 4 + [0.4, 0.6] + [0.7] * 2)
    assert round_latencies(found) == pytest.approx([0.6, 0.4])
    assert percentiles(token_latencies(found)) == pytest.approx((0.275, 0.7))
    assert percentiles(round_latencies(found)) == pytest.approx((0.5, 0.59))
    assert percentiles([]) is None


@pytest.mark.parametrize("tied", [False, True])
def test_weights_by_hand(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], tied: bool) -> None:
    decoder = decoder_of(tiny("llama-tied-biases" if tied else "llama", double=True, num_key_value_heads=4))
    # width 32, 4 heads of 8, as many for keys and values, MLP 40, vocabulary 64; 8 bytes a number
    layer = 4 * 32 * 32 + 3 * 32 * 40 + 2 * 32
    layer += (3 * 32 + 32 + 2 * 40 + 32) if tied else 0
    head = 64 * 32 + 32
    weights = Weights.of(decoder)
    assert weights == Weights((8 * layer,) * 4, 8 * head, 64)
    # verification is one pass over everything, the last token of the draft included; a drafted token a pass to the exit
    assert (
        weights.round(Way("plain"), drafted=0)
        == weights.round(Way("lookup", Lookup()), drafted=8)
        == 8 * (4 * layer + head)
    )
    assert weights.round(Way("early", EarlyExit(1, tokens=6)), drafted=3) == 8 * (4 * layer + head + 3 * (layer + head))
    assert weights.round(Way("early", EarlyExit(3)), drafted=0) == 8 * (4 * layer + head)
    assert weights.round(Way("exit 3", exit=3), drafted=0) == 8 * (3 * layer + head)
    rounds = read_ticks(ARRIVALS, [c for _, c in CHUNKS])
    # a round costs what its longest draft costs, however many rows: 4, 1, 0 and 0 tokens
    assert weights.run(Way("early", EarlyExit(1)), rounds) == 8 * (4 * (4 * layer + head) + 5 * (layer + head))
    assert weights.run(Way("plain"), rounds) == 8 * 4 * (4 * layer + head)


def test_passes_are_those_that_run(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any]) -> None:
    """The bytes of a real run are those of the layers and heads that were called."""
    from layerskip.decode.batch import Batch
    from layerskip.decode.pool import Pool
    from layerskip.decode.request import Request
    from layerskip.evaluate.ticks import Tick

    decoder = decoder_of(tiny("llama", double=True, agree=0.2))
    weights, read = Weights.of(decoder), 0

    def count(size: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal read
            read += size

        return hook

    drafter = EarlyExit(2, tokens=4, confidence=0.5)
    batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=64)), drafter=drafter)
    batch.join([Request([1, 2, 3], 20), Request([4], 20)])
    for size, layer in zip(weights.layers, decoder.layers, strict=True):
        layer.register_forward_hook(count(size))
    decoder.head.register_forward_hook(count(weights.head))
    rounds = []
    while len(batch):
        rounds.append(Tick(0, 0, {}, frozenset(), drafted=max(len(done.drafted) for done in batch.round())))
    assert weights.run(Way("it", drafter), rounds) == read > 0
    assert len({tick.drafted for tick in rounds}) > 1


def test_bandwidth_is_measured_over_the_whole_buffer() -> None:
    found = measure_bandwidth("cpu", size=1 << 22, passes=2)
    assert (found.bytes, found.threads) == (1 << 22, torch.get_num_threads())
    assert found.bytes_per_second > 1e7
    assert found.record()["bytes"] == 1 << 22


def test_no_cache_holds_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate(("32K", "1024K", "48M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert last_cache(tmp_path) == 48 << 20
    assert last_cache(tmp_path / "nowhere") == 0
    from types import SimpleNamespace

    from layerskip.evaluate import bandwidth

    for cache, free, wanted in ((48, 1 << 40, 256), (260, 1 << 40, 520), (260, 1 << 30, 256)):
        monkeypatch.setattr(bandwidth, "last_cache", lambda cache=cache: cache << 20)
        monkeypatch.setattr(bandwidth.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert buffer_size(torch.device("cpu")) == wanted << 20


def test_the_high_water_mark_is_of_what_came_after_the_reset() -> None:
    memory = HighWater(torch.device("cpu"))
    if memory.peak() is None:
        pytest.skip("the resident memory's high-water mark cannot be set back here")
    size = 96 << 20
    taken = torch.ones(size // 8, dtype=torch.int64)
    del taken
    peak = memory.peak()
    assert peak is not None
    assert size * 0.9 < peak < size * 1.5
    memory.reset()
    after = memory.peak()
    assert after is not None
    assert after < size / 2


@pytest.mark.parametrize(("module", "count"), [(ticks_module, 1), (weights_module, 1)])
def test_examples_in_docstrings_run(module: Any, count: int) -> None:
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=count)
