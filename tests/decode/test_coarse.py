"""Draft heads of 8 bits: text stays that of plain decoding, and what is proposed is nearly what the own head would."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip import Auto, EarlyExit, RequestError, load
from layerskip.decode.sampling import Sampling
from layerskip.llm import LLM
from layerskip.model.narrow import CoarseHead

PROMPTS = ["the cat sat on", "a", "the dog ran to the cat and"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LLM:
    return load(tiny_checkpoint, dtype=request.param, weights="native")


def test_greedy_text_is_that_of_plain_decoding(llm: LLM) -> None:
    plain = [one.tokens for one in llm.generate(PROMPTS, max_tokens=50, ignore_eos=True)]
    auto = Auto(exit=1, head="int8")
    for draft in (EarlyExit(1, tokens=5, head="int8"), EarlyExit(2, tokens=4, confidence=0.3, head="int8"), auto):
        found = llm.generate(PROMPTS, max_tokens=50, ignore_eos=True, draft=draft)
        assert [one.tokens for one in found] == plain
    assert auto.counts["early-exit:1"].drafted > 0


def test_seeded_text_of_auto_is_that_of_plain_decoding(llm: LLM) -> None:
    """Draws by the target's own numbers, from whatever law the head of 8 bits gives."""
    auto, sampling = Auto(exit=1, head="int8"), Sampling(temperature=1.0, seed=4)
    plain = [one.tokens for one in llm.generate(PROMPTS, max_tokens=50, ignore_eos=True, sampling=sampling)]
    found = llm.generate(PROMPTS, max_tokens=50, ignore_eos=True, sampling=sampling, draft=auto)
    assert [one.tokens for one in found] == plain
    assert auto.counts["early-exit:1"].drafted > 0


def test_it_proposes_nearly_what_the_own_head_would(llm: LLM) -> None:
    counts = [
        sum(one.acceptance.accepted for one in llm.generate(PROMPTS, max_tokens=60, ignore_eos=True, draft=draft))
        for draft in (EarlyExit(2, tokens=4), EarlyExit(2, tokens=4, head="int8"))
    ]
    assert counts[1] > 0.7 * counts[0] > 0


def test_its_numbers_are_those_of_the_head_to_8_bits(llm: LLM) -> None:
    head = CoarseHead(llm.decoder)
    hidden = torch.randn(3, llm.decoder.shape.width, generator=torch.Generator().manual_seed(0))
    expected = llm.decoder.logits(hidden)
    found = head.logits(llm.decoder, hidden)
    assert 0 < float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_sampled_text_keeps_its_law(tiny_checkpoint: Path) -> None:
    llm = load(tiny_checkpoint, dtype="float32", weights="native", max_batch=128)
    counts = []
    for draft, seed in ((None, 1), (EarlyExit(1, tokens=2, head="int8"), 2)):
        sampling = Sampling(temperature=1.5, seed=seed)
        found = llm.generate("the cat", n=2048, max_tokens=3, sampling=sampling, ignore_eos=True, draft=draft)
        last = torch.tensor([one.tokens[-1] for one in found])  # drafted in most of the rounds that brought it
        counts.append(last.bincount(minlength=llm.decoder.shape.vocab).double())
    plain, drafted = (each[counts[0] + counts[1] >= 10] for each in counts)
    freedom = len(plain) - 1
    statistic = float(((plain - drafted) ** 2 / (plain + drafted)).sum())
    assert freedom > 10
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "int4"}, "unknown draft head 'int4'; use own, int8"),
        ({"head": "int8", "vocabulary": 5}, "a draft vocabulary has a head of its own"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EarlyExit(1, **settings)


def test_other_weights_are_refused(tiny_checkpoint: Path) -> None:
    llm = load(tiny_checkpoint, dtype="float32", weights="plain")
    with pytest.raises(RequestError, match="made from native weights, and these are plain; leave it out"):
        llm.generate("a", draft=EarlyExit(1, head="int8"))
