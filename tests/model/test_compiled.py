"""Compiled spans: the same numbers as without, graphs that settle, and a compiler that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import TritonMissing
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip import Auto, Cascade, EarlyExit, Lookup, load
from layerskip.decode.sampling import Sampling
from layerskip.model.checkpoint import load_decoder
from layerskip.model.compiled import filled
from layerskip.model.decoder import Decoder

VIEW = slice(1, 3)
CAPTURED = "aot_eager"  # everything but the C++ that inductor would write and build for a minute


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    }  # fmt: skip
    window = {"sliding_window": 5} if request.param == "mistral" else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes, **window)).save_pretrained(folder)
    return folder


def decoders(folder: Path) -> tuple[Decoder, Decoder]:
    plain, compiled = (load_decoder(folder, dtype=torch.float32, weights="plain") for _ in range(2))
    compiled.compile(backend=CAPTURED)
    return plain, compiled


def score(decoder: Decoder, ids: Tensor, *, pieces: list[int], rows: Any, size: tuple[int, int] = (6, 128)) -> Tensor:
    cache, found, start = decoder.cache(rows=size[0], slots=size[1]), list[Tensor](), 0
    for count in pieces:
        at = torch.arange(start, start + count).expand(len(ids), -1)
        hidden = decoder.run(decoder.embed(ids[:, start : start + count]), at, cache, 0, 1, rows=rows)
        found.append(decoder.logits(decoder.run(hidden, at, cache, 1, None, rows=rows)))
        start += count
    return torch.cat(found, 1)


def test_graphs_compute_what_the_layers_do(folder: Path) -> None:
    rows: Any = slice(1, 4) if "llama" in folder.name else torch.tensor([5, 0, 3])
    count = 3
    ids = torch.randint(0, 61, (count, 80), generator=torch.Generator().manual_seed(1))
    plain, compiled = decoders(folder)
    assert compiled.compiled is not None
    graphs = []
    for pieces in ([80], [7, 1, 70, 2], [8, 1, 67, 2]):
        with torch.inference_mode():
            expected = score(plain, ids[:, : sum(pieces)], pieces=pieces, rows=rows)
            found = score(compiled, ids[:, : sum(pieces)], pieces=pieces, rows=rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        graphs.append(compiled.compiled.graphs)
    assert 4 < graphs[1] == graphs[2], "pieces that are filled up to the same sizes need no graphs of their own"
    assert graphs[0] == 1, "of a prompt the head is compiled, and the layers run as they are"
    known = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size, some in (((7, 128), rows), ((6, 160), rows), ((9, 300), rows), ((6, 128), VIEW), ((6, 256), VIEW)):
        given = ids[:2, :78] if some is VIEW else ids[:, :78]
        with torch.inference_mode():
            expected = score(plain, given, pieces=[78], rows=some)
            found = score(compiled, given, pieces=[8, 1, 67, 2], rows=some, size=size)
        if some is VIEW and size[1] == 128:  # two rows are the first to be read where they lie
            graphs[2], known = compiled.compiled.graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert compiled.compiled.graphs == graphs[2], "a bigger cache needs no graphs of its own"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == known


def test_the_longest_draft_is_compiled_and_a_cache_doubles(folder: Path) -> None:
    """As many slots as a graph reads: a limit of 150 is of one size with 192 slots and with 320."""
    plain, compiled = decoders(folder)
    assert compiled.compiled is not None
    ids = torch.randint(0, 61, (1, 33), generator=torch.Generator().manual_seed(1))
    for count, graphs in ((33, 0), (17, 2)):  # a prompt; a draft of 16 tokens, through two spans
        with torch.inference_mode():
            hidden, at = compiled.embed(ids[:, :count]), torch.arange(count)[None]
            cache = compiled.cache(rows=1, slots=64)
            compiled.run(compiled.run(hidden, at, cache, 0, 1), at, cache, 1, None)
        assert compiled.compiled.graphs == graphs
    assert [decoder.cache(rows=1, slots=192).slots for decoder in (plain, compiled)] == [192, 256]


def test_a_tree_sees_its_branch_only(folder: Path) -> None:
    at, slots = torch.tensor([[8, 9, 9, 10, 10]]), torch.arange(8, 13)[None]
    mask = torch.zeros(1, 5, 13, dtype=torch.bool)
    mask[..., :9] = True
    for node, seen in ((1, [9]), (2, [10]), (3, [9, 11]), (4, [10, 12])):
        mask[0, node, seen] = True
    found = []
    for decoder in decoders(folder):
        cache, ids = decoder.cache(rows=1, slots=20), torch.arange(13)[None]
        decoder.run(decoder.embed(ids[:, :8]), torch.arange(8)[None], cache)
        found.append(decoder.run(decoder.embed(ids[:, 8:]), at, cache, slots=slots, mask=mask))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft", [EarlyExit(1, tokens=3)], ids=["exit"])
def test_text_is_that_of_plain_decoding_and_graphs_settle(tiny_checkpoint: Path, draft: Any) -> None:
    plain = load(tiny_checkpoint, dtype="float32", weights="plain")
    compiled = load(tiny_checkpoint, dtype="float32", weights="plain")
    compiled.decoder.compile(backend=CAPTURED)
    assert compiled.decoder.compiled is not None
    prompts = ["the cat sat on", "a"]
    expected = [one.tokens for one in plain.generate(prompts, max_tokens=24, ignore_eos=True)]
    graphs = []
    for lengths in ((24, 13), (24, 13), (13, 24)):
        for length in lengths:
            found = compiled.generate(prompts, max_tokens=length, ignore_eos=True, draft=draft)
            assert [one.tokens for one in found] == [tokens[:length] for tokens in expected]
        graphs.append((compiled.decoder.compiled.graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert graphs[1] == graphs[2], "something was compiled anew for what had been asked before"


def test_text_of_drafters_that_learn_is_that_of_plain_decoding(tiny_checkpoint: Path) -> None:
    """What they try depends on texts and on the clock, so their graphs are not counted."""
    llm = load(tiny_checkpoint, dtype="float32", weights="plain")
    llm.decoder.compile(backend=CAPTURED)
    exit = EarlyExit(2, tokens=3, vocabulary=90)
    for sampling, drafts in (
        (Sampling(), (Cascade(Lookup(), exit),)),
        (Sampling(temperature=0.9, seed=3), (Auto(exit=2, tokens=3),)),
    ):
        settings: Any = {"max_tokens": 16, "ignore_eos": True, "sampling": sampling}
        plain = [one.tokens for one in llm.generate(["the cat sat on", "a"], **settings)]
        for draft in drafts:
            found = [one.tokens for one in llm.generate(["the cat sat on", "a"], draft=draft, **settings)]
            assert found == plain, draft.name
    assert llm.decoder.compiled is not None
    assert llm.decoder.compiled.failed is None
    assert llm.decoder.compiled.graphs > 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no C++ compiler"), r"no C\+\+ compiler"),
        (TritonMissing(None), "Cannot find a working triton installation"),
    ],
)
def test_a_compiler_that_fails_is_said_and_done_without(tiny_checkpoint: Path, error: Exception, reason: str) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise error

    llm = load(tiny_checkpoint, dtype="float32", weights="plain")
    expected = llm.generate("the cat", max_tokens=12).tokens
    llm.decoder.compile(backend=broken)
    with pytest.warns(UserWarning, match=f"torch could not compile, so nothing is compiled: {reason}"):
        assert llm.generate("the cat", max_tokens=12).tokens == expected
    assert llm.decoder.compiled is not None
    assert llm.decoder.compiled.failed is not None


def test_sizes_are_few() -> None:
    assert {filled(count) for count in range(1, 65)} == {1, 2, 4, 8, 16, 32, 64}
    assert [filled(count, least=64, most=1000) for count in (3, 65, 600)] == [64, 128, 1000]
