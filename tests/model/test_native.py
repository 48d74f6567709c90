"""The kernels in C++: the same bits however many positions share a call, and what happens where they cannot be."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip.errors import RequestError
from layerskip.model.cache import Cache
from layerskip.model.checkpoint import load_decoder, read_config
from layerskip.model.decoder import Decoder
from layerskip.model.native import build
from layerskip.model.pack import chosen
from layerskip.model.shape import Shape
from layerskip.model.stop import Ends, Stop

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 54, "intermediate_size": 75, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip  # nothing fits a vector
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "windows": ("mistral", {"sliding_window": 3, "hidden_size": 31}),
    "norms": ("qwen3", {"head_dim": 40, "hidden_act": "relu", "rms_norm_eps": 0.1}),
    "odd": ("llama", {"hidden_size": 30, "head_dim": 98, "hidden_act": "gelu_pytorch_tanh"}),
}
TOKENS = 30


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["float32 native", "bfloat16 native", "float32 int8", "bfloat16 int8", "bfloat16 int4"])
def decoder(folder: Path, request: pytest.FixtureRequest) -> Decoder:
    dtype, weights = request.param.split()
    decoder = load_decoder(folder, dtype=getattr(torch, dtype), weights=weights)
    assert decoder.layout == weights
    return decoder


def tokens(rows: int = 1) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def score(decoder: Decoder, ids: Tensor, *, pieces: list[int], rows: Tensor | None = None, exit: int = 1) -> Tensor:
    """Logits of every token, so many at a time, in two spans."""
    cache = decoder.cache(rows=6, slots=40)
    found, start = [], 0
    for count in pieces:
        at = torch.arange(start, start + count).expand(len(ids), -1)
        hidden = decoder.run(decoder.embed(ids[:, start : start + count]), at, cache, 0, exit, rows=rows)
        found.append(decoder.logits(decoder.run(hidden, at, cache, exit, None, rows=rows)))
        start += count
    return torch.cat(found, 1)


def test_they_compute_what_torch_computes(folder: Path) -> None:
    plain, native = (load_decoder(folder, dtype=torch.float32, weights=weights) for weights in ("plain", "native"))
    expected = score(plain, tokens(2), pieces=[TOKENS])
    torch.testing.assert_close(score(native, tokens(2), pieces=[TOKENS]), expected, rtol=1e-4, atol=1e-4)


def test_a_position_has_the_same_bits_however_many_share_its_call(decoder: Decoder) -> None:
    alone = score(decoder, tokens(), pieces=[1] * TOKENS)
    for pieces in ([TOKENS], [9, 5, 1, 2, 7, 6], [3, 4, 8, 15], [13, 17]):
        assert torch.equal(score(decoder, tokens(), pieces=pieces, exit=2), alone), pieces


def test_a_row_has_the_same_bits_beside_others(decoder: Decoder) -> None:
    alone = score(decoder, tokens(4)[2:3], pieces=[TOKENS])
    beside = score(decoder, tokens(4), pieces=[11, 5, 14], rows=torch.tensor([5, 0, 3, 1]))
    assert torch.equal(beside[2:3], alone)


def test_the_number_of_threads_changes_no_bit(decoder: Decoder) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(score(decoder, tokens(), pieces=[20, 5, 5]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_chain_written_as_a_tree_is_the_chain(decoder: Decoder) -> None:
    cache, ids = decoder.cache(rows=2, slots=40), tokens(2)
    decoder.run(decoder.embed(ids[:, :20]), torch.arange(20).expand(2, -1), cache)
    at = torch.arange(20, 25).expand(2, -1)
    chain = decoder.run(decoder.embed(ids[:, 20:25]), at, cache)
    slots = torch.tensor([[20, 24, 22, 21, 23], [22, 20, 21, 24, 23]])  # elsewhere than at their positions
    mask = torch.zeros(2, 5, 25, dtype=torch.bool)
    mask[..., :20] = True
    for row in range(2):
        for i in range(5):
            mask[row, i, slots[row, : i + 1]] = True
        cache.clear(row, first=20)
    tree = decoder.run(decoder.embed(ids[:, 20:25]), at, cache, slots=slots, mask=mask)
    # slots are summed in another order
    close = 1e-4 if decoder.dtype == torch.float32 and decoder.layout == "native" else 0.1
    torch.testing.assert_close(tree, chain, rtol=close, atol=close)


@pytest.mark.parametrize("apart", [False, True], ids=["", "slots"])
def test_padding_is_written_where_nobody_reads(decoder: Decoder, apart: bool) -> None:
    cache, ids = decoder.cache(rows=2, slots=10), tokens(2)
    at = torch.arange(10).expand(2, -1).clone()
    at[1, 6:] = 2**40
    hidden = decoder.run(decoder.embed(ids[:, :10]), at, cache, slots=at if apart else None)
    alone = decoder.run(decoder.embed(ids[1:, :6]), at[1:, :6], decoder.cache(rows=1, slots=10))
    assert torch.equal(hidden[1, :6], alone[0])
    assert all(int(keys[1, :, 6:10].count_nonzero()) == 0 for keys in cache.keys)


def test_numbers_that_are_not_finite_stay_in_their_row(decoder: Decoder) -> None:
    cache, ids = decoder.cache(rows=2, slots=10), tokens(2)[:, :6]
    hidden = decoder.embed(ids)
    hidden[0, 3] = torch.nan
    at = torch.arange(6).expand(2, -1)
    logits = decoder.logits(decoder.run(hidden, at, cache))
    assert bool(logits[0, :3].isfinite().all())
    assert bool(logits[0, 3:].isnan().all())
    assert bool(logits[1].isfinite().all())


def drafted(decoder: Decoder, rows: Any, *, one_by_one: bool) -> tuple[Tensor, ...]:
    """Ten tokens of two rows of unequal length, the last of them beyond the cache; what the cache then holds."""
    cache, ids = decoder.cache(rows=4, slots=24), tokens(2)
    hidden = decoder.embed(ids[:, :17])
    decoder.run(hidden, torch.arange(17).expand(2, -1), cache, rows=rows, limit=17)
    last, at, states = ids[:, 17:18], torch.tensor([[17], [12]]), []
    if not one_by_one:
        more, hidden = decoder.draft(last, at, cache, 3, 10, rows=rows, limit=18)
    else:
        more = last
        for i in range(11):
            states.append(decoder.run(decoder.embed(more[:, -1:]), at + i, cache, 0, 3, rows=rows, limit=18 + i))
            more = torch.cat((more, decoder.logits(states[-1]).argmax(-1)), 1)
        more, hidden = more[:, 1:-1], torch.cat(states, 1)
    held = [part[:, :, :24] for part in (*cache.keys, *cache.values)]
    return more, hidden, *held, cache.positions[:, :24]


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])], ids=["slice", "index"])
def test_a_draft_is_what_one_by_one_gives(decoder: Decoder, rows: Any) -> None:
    expected = drafted(decoder, rows, one_by_one=True)
    for found, wanted in zip(drafted(decoder, rows, one_by_one=False), expected, strict=True):
        assert torch.equal(found, wanted)
    assert expected[0].unique().numel() > 3


def test_a_draft_ends_where_its_rule_says(decoder: Decoder) -> None:
    cache, ids = decoder.cache(rows=2, slots=24), tokens(2)
    at = torch.full((2, 1), 17)
    decoder.run(decoder.embed(ids[:, :17]), torch.arange(17).expand(2, -1), cache)
    whole, all_states = decoder.draft(ids[:, 17:18], at, cache, 3, 5, rows=slice(0, 2), limit=18)
    sure = decoder.logits(all_states[:, :5]).softmax(-1).amax(-1)
    draws, counts = random.Random(3), set[int]()
    for _ in range(60):
        edges = sorted(draws.uniform(0.0, 2 * float(sure.mean())) for _ in range(draws.randrange(5)))
        factors = [draws.choice([0.0, 0.3, 0.9, 1.0]) for _ in range(len(edges) + 1)]
        rule = Stop(edges, factors, draws.uniform(0.0, 1.5))
        wanted = Ends(rule, rows=2, count=5)
        count = next((i + 1 for i in range(5) if wanted(sure[:, i].tolist())), 5)
        ends = Ends(rule, rows=2, count=5)
        more, states = decoder.draft(ids[:, 17:18], at, cache, 3, 5, rows=slice(0, 2), limit=18, ends=ends)
        assert torch.equal(more, whole[:, :count])
        assert torch.equal(states, all_states[:, : count + 1])
        torch.testing.assert_close(torch.tensor(ends.confidence).T, sure[:, :count])
        assert ends.lengths == wanted.lengths
        counts.add(count)
    assert {1, 2, 5} <= counts


def test_a_draft_without_kernels_is_the_same(folder: Path) -> None:
    plain = load_decoder(folder, dtype=torch.float32, weights="plain")
    expected = drafted(plain, slice(1, 3), one_by_one=True)
    for found, wanted in zip(drafted(plain, slice(1, 3), one_by_one=False), expected, strict=True):
        assert torch.equal(found, wanted)


def test_what_earlier_calls_left_in_memory_is_not_read(decoder: Decoder, tiny_checkpoint: Path) -> None:
    expected = score(decoder, tokens(), pieces=[20, 5, 5])
    other = load_decoder(tiny_checkpoint, dtype=decoder.dtype, weights="native")  # nothing lies where ours does
    for count in (40, 8):
        hidden = torch.full((1, count, 32), torch.nan)
        other.logits(other.run(hidden, torch.arange(count)[None], other.cache(rows=1, slots=count)))
    assert torch.equal(score(decoder, tokens(), pieces=[20, 5, 5]), expected)


def test_large_numbers_do_not_overflow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    for layer in model.model.layers:
        layer.input_layernorm.weight.data *= 6  # scores up to 300 apart
        layer.post_attention_layernorm.weight.data *= 60  # gates of some hundreds
    model.save_pretrained(tmp_path)
    plain, native = (load_decoder(tmp_path, dtype=torch.float32, weights=weights) for weights in ("plain", "native"))
    expected = score(plain, tokens(), pieces=[TOKENS])
    torch.testing.assert_close(score(native, tokens(), pieces=[TOKENS]), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "given",
    [
        {"rows": slice(0, 3, 2)},
        {"rows": slice(-2, None)},
        {"rows": torch.tensor([2, 0], dtype=torch.int32)},
        {"at": torch.arange(8, dtype=torch.int32).expand(2, -1)},
        {"at": torch.arange(8)[None]},
        {"mask": torch.ones(1, 8, 8).tril().bool()},
    ],
    ids=str,
)
def test_native_weights_take_what_plain_weights_take(given: dict[str, Any], tiny_checkpoint: Path) -> None:
    found, ids = [], tokens(2)[:, :8] % 40
    arguments = {"at": torch.arange(8).expand(2, -1), **given}
    for weights in ("plain", "native"):
        decoder = load_decoder(tiny_checkpoint, dtype=torch.float32, weights=weights)
        cache = decoder.cache(rows=3, slots=8)
        states = decoder.run(decoder.embed(ids), cache=cache, **arguments)
        found.append((decoder.logits(states), cache.keys[3]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_what_would_be_written_elsewhere_is_refused(tiny_checkpoint: Path) -> None:
    decoder = load_decoder(tiny_checkpoint, dtype=torch.float32, weights="native")
    cache, at = decoder.cache(rows=3, slots=8), torch.arange(8).expand(2, -1)
    hidden = decoder.embed(at)
    for rows in (slice(2, 4), slice(0, 3), torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([1])):
        with pytest.raises(IndexError, match="2 rows of states were given rows"):
            decoder.run(hidden, at, cache, rows=rows)
    with pytest.raises(RuntimeError, match="size"):
        decoder.run(hidden, at, cache, mask=torch.ones(2, 8, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"native weights of torch\.float32 were given a cache of torch\.bfloat16"):
        decoder.run(hidden, at, Cache(decoder.shape, rows=2, slots=8, dtype=torch.bfloat16))
    decoder.run(hidden, at - 2, cache)  # a position below 0 is padding as well
    assert not any(bool(keys[:, :, 6:8].any()) for keys in cache.keys)


def test_the_default_dtype_changes_nothing(decoder: Decoder) -> None:
    expected = score(decoder, tokens(), pieces=[TOKENS])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(score(decoder, tokens(), pieces=[TOKENS]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_threads_share_one_decoder(decoder: Decoder) -> None:
    expected = score(decoder, tokens(), pieces=[20, 5, 5])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: score(decoder, tokens(), pieces=[20, 5, 5]), range(8)))
    assert all(torch.equal(each, expected) for each in found)


OTHER_PROCESSOR = """
import sys, torch
from pathlib import Path
from layerskip.model.checkpoint import load_decoder

ids = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))

def logits(weights, dtype, pieces):
    decoder, start, found = load_decoder(Path(sys.argv[1]), dtype=dtype, weights=weights), 0, []
    assert decoder.layout == weights
    cache = decoder.cache(rows=1, slots=24)
    for count in pieces:
        at = torch.arange(start, start + count)[None]
        found.append(decoder.logits(decoder.run(decoder.embed(ids[:, start : start + count]), at, cache)))
        start += count
    return torch.cat(found, 1).float()

for weights, plain in (("native", "plain"), ("int8", "int8-plain"), ("int4", "int4-plain")):
    for dtype, close in ((torch.float32, 1e-5 if weights == "native" else 0.01), (torch.bfloat16, 0.1)):
        expected, found = logits(plain, dtype, [24]), logits(weights, dtype, [24])
        assert (expected - found).abs().max() < close * expected.abs().max(), (weights, dtype)
        for pieces in ([1] * 24, [7, 2, 15]):
            assert torch.equal(logits(weights, dtype, pieces), found), (weights, dtype, pieces)

plain = load_decoder(Path(sys.argv[1]), dtype=torch.bfloat16).float()
native = load_decoder(Path(sys.argv[1]), dtype=torch.bfloat16, weights="native")
cache = native.cache(rows=1, slots=24)
native.run(native.embed(ids), torch.arange(24)[None], cache)
value = plain.layers[0].query_key_value.value(plain.layers[0].attention_norm(plain.embed(ids)))
held = cache.values[0][0, :, :24].transpose(0, 1).flatten(1)
assert (held == value[0].bfloat16()).float().mean() > 0.95  # rounded to the nearest
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for a lesser x86-64 processor")
@pytest.mark.slow  # builds the kernels anew
def test_without_bfloat16_products_the_same_holds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CXXFLAGS": "-O1 -march=x86-64-v3"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", OTHER_PROCESSOR, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.so"))


NO_COMPILER = """
import sys, torch
from pathlib import Path
from layerskip import load
from layerskip.errors import RequestError

llm = load(sys.argv[1])
assert llm.decoder.layout == "packed", llm.decoder.layout
assert llm.generate("the cat", max_tokens=3).tokens
quantised = load(sys.argv[1], weights="int8")
assert quantised.decoder.layout == "int8-plain", quantised.decoder.layout
assert quantised.generate("the cat", max_tokens=3).tokens
try:
    load(sys.argv[1], weights="native")
except RequestError as error:
    print(error)
"""


def test_without_a_compiler_another_layout_serves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CXX": "nowhere"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", NO_COMPILER, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights cannot be native: no C++ compiler was found")
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was found out about the compiler is found out anew, during a test and after it."""
    build._library.cache_clear()
    build._place.cache_clear()
    yield
    build._library.cache_clear()
    build._place.cache_clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "no-such-compiler", r"no C\+\+ compiler was found \(looked for no-such-compiler\)"),
        ("CXX", "{folder}/broken", "Exec format error"),
        ("CXXFLAGS", "-DNAME='", "CXXFLAGS cannot be read: No closing quotation"),
        ("HOME", None, "there is no home folder to keep the kernels in; set XDG_CACHE_HOME"),
        ("XDG_CACHE_HOME", "{folder}/broken", "could not be kept or loaded"),
    ],
)
def test_whatever_prevents_the_kernels_is_said(
    name: str, value: str | None, reason: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_bytes(b"\x7fELF and no more")
    (tmp_path / "broken").chmod(0o755)
    if value is not None:
        monkeypatch.setenv(name, value.format(folder=tmp_path))
    else:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user whom the system does not know
    shape = Shape.from_config(read_config(tiny_checkpoint))
    build.is_due()  # the command line asks before anything else
    assert chosen(None, shape, dtype=torch.float32, device=torch.device("cpu")) == "packed"
    with pytest.raises(RequestError, match=f"weights cannot be native: .*{reason}.*; use auto"):
        chosen("native", shape, dtype=torch.float32, device=torch.device("cpu"))
