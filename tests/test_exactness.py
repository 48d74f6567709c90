"""Exactness where things cross: every layout of the weights with every drafter, controller and draft vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerskip import Assistant, Auto, Cascade, EarlyExit, Lookup, load
from layerskip.decode.sampling import Sampling
from layerskip.llm import LLM
from layerskip.model.pack import LAYOUTS

PROMPTS = ["the cat sat on", "a", "the dog ran to the cat and"]
KERNELS = ("native", "int8", "int4")  # their verification rounds as a step does, so that bfloat16 is exact too
CASES = [*((layout, "float32") for layout in LAYOUTS), *((layout, "bfloat16") for layout in KERNELS)]
CERTAIN = {1: 0.99, 2: 0.99}  # what exits are said to agree: `auto` drafts from the first round on
COARSE = "exit, head of 8 bits"

DRAFTERS: dict[str, Callable[[LLM], Any]] = {
    "exit 1": lambda llm: EarlyExit(1, tokens=7),
    "exit 3": lambda llm: EarlyExit(3, tokens=4),
    "exit, confidence": lambda llm: EarlyExit(2, tokens=6, confidence=0.3),
    "exit, gain": lambda llm: EarlyExit(2, tokens=6, length="gain"),
    "exit, thompson": lambda llm: EarlyExit(1, tokens=6, length="thompson"),
    "exit, shortlist": lambda llm: EarlyExit(2, tokens=4, vocabulary=120),
    "exit, shortlist, gain": lambda llm: EarlyExit(2, tokens=4, vocabulary=120, length="gain"),
    COARSE: lambda llm: EarlyExit(2, tokens=4, head="int8"),
    "lookup": lambda llm: Lookup(),
    "cascade": lambda llm: Cascade(Lookup(), EarlyExit(2, tokens=4)),
    "cascade, shortlist": lambda llm: Cascade(Lookup(), EarlyExit(1, vocabulary=120)),
    "assistant": lambda llm: Assistant(llm.decoder, tokens=3),
    "auto": lambda llm: Auto(guesses=CERTAIN),
    "auto, shortlist": lambda llm: Auto(exit=2, vocabulary=120, guesses=CERTAIN),
}
SEEDED = ("lookup", "auto", "auto, shortlist")  # draw by the target's own numbers: the law is kept draw by draw


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> tuple[LLM, dict[str, Any]]:
    """A model, and whatever plain decoding generates, one prompt at a time."""
    layout, dtype = request.param
    llm = load(tiny_checkpoint, dtype=dtype, weights=layout)
    assert llm.decoder.layout == layout
    length = 64 if dtype == "bfloat16" else 32  # beyond the cache that a model begins with, and within it
    settings = {
        "greedy": {"max_tokens": length, "ignore_eos": True, "logprobs": 2},
        "sampled": {"max_tokens": 32, "ignore_eos": True, "sampling": Sampling(temperature=0.9, top_p=0.95, seed=3)},
    }
    return llm, {name: (given, [llm.generate(p, **given) for p in PROMPTS]) for name, given in settings.items()}


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_that_of_plain_decoding(case: tuple[LLM, dict[str, Any]], name: str) -> None:
    """Of the same weights, side by side; log-probabilities too, to the bit where kernels do not depend on rows."""
    llm, texts = case
    if name == COARSE and llm.decoder.layout != "native":
        pytest.skip("made from native weights only, which a test of its own says")
    settings, plain = texts["greedy"]
    found = llm.generate(PROMPTS, draft=DRAFTERS[name](llm), **settings)
    for alone, done in zip(plain, found, strict=True):
        assert done.tokens == alone.tokens
        assert done.mode == "exact"
        if llm.decoder.layout in KERNELS:
            assert done.logprobs == alone.logprobs
    assert sum(done.acceptance.accepted for done in found) > 0


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_text_is_that_of_plain_decoding(case: tuple[LLM, dict[str, Any]], name: str) -> None:
    llm, texts = case
    if llm.decoder.layout.endswith("-plain"):
        pytest.skip("what products of several rows change, numbers of 8 bits magnify (docs/weights.md)")
    settings, plain = texts["sampled"]
    found = llm.generate(PROMPTS, draft=DRAFTERS[name](llm), **settings)
    assert [done.tokens for done in found] == [done.tokens for done in plain]
    assert sum(done.acceptance.drafted for done in found) > 0
