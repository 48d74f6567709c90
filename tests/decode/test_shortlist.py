"""Drafting from a part of the vocabulary: other proposals, the same text. Its output law is in test_output_law."""

from __future__ import annotations

import doctest
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip import LLM, Auto, Cascade, EarlyExit, Lookup, Sampling, load
from layerskip.decode.draft import Draft, Rows
from layerskip.decode.drafters import shortlist
from layerskip.decode.drafters.shortlist import Shortlist, fitting, rank
from layerskip.errors import RequestError
from layerskip.llm import Recommended
from layerskip.model.checkpoint import load_decoder
from layerskip.model.narrow import NarrowHead

PROMPTS = ["the cat sat on the mat", "a", "the dog ran to the cat and"]
LAYOUTS = ["plain", "packed", "native", "int8"]


@pytest.fixture(scope="module", params=LAYOUTS)
def llm(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LLM:
    return stored(tiny_checkpoint, request.param)


def stored(folder: Path, weights: str) -> LLM:
    try:
        return load(folder, weights=weights)
    except RequestError as reason:
        pytest.skip(str(reason))


# --- the list


def test_places_go_to_the_commonest_then_to_the_text() -> None:
    places = Shortlist(8, vocab=50, ranked=[40, 3])
    assert places.tokens == [40, 3, 0, 1, 2, 4, 5, 6]
    assert places.admit([3, 30, 31]) == {6: 30, 7: 31}
    assert places.admit([32, 30]) == {6: 32, 7: 30}  # the oldest of the text go first, and may come back
    assert places.tokens == [40, 3, 0, 1, 2, 4, 32, 30]
    assert places.admit([5, 6, 5]) == {6: 5, 7: 6}  # what had the place at first, and in the other order
    assert places.reset() == {}
    assert places.admit([6, 9]) == {6: 9}
    assert places.reset() == {6: 5}
    assert places.admit([9, 10]) == {6: 9, 7: 10}  # it begins anew with the first of them
    assert Shortlist(60, vocab=50).tokens == list(range(50))
    assert Shortlist(1, vocab=50).admit([7]) == {0: 7}
    assert Shortlist(3, vocab=50, ranked=[4, 4, 7, 0, 8]).tokens == [4, 7, 0]


def test_a_text_is_ranked_by_frequency(llm: LLM) -> None:
    assert llm.rank("the the the cat cat dog") == rank(llm.tokenizer("the the the cat cat dog")["input_ids"][1:])
    assert rank([]) == []


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(shortlist) == doctest.TestResults(failed=0, attempted=8)


# --- the head


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [*LAYOUTS, "int4", "int8-plain", "int4-plain"])
def test_a_narrow_head_has_the_numbers_of_the_whole_one(
    weights: str, dtype: str, tied: bool, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}
    tiny("llama", **odd, tie_word_embeddings=tied).save_pretrained(tmp_path)
    try:
        decoder = load_decoder(tmp_path, dtype=getattr(torch, dtype), weights=weights)
    except RequestError as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr("layerskip.model.narrow._AT_ONCE", 2)  # a few rows at a time, the last fewer
    hidden = decoder.embed(torch.tensor([[3, 5, 8]]))
    whole, narrow = decoder.logits(hidden), NarrowHead(decoder, [4, 0, 9, 2, 11])
    error = 0.05 if weights.endswith("-plain") else 1e-5  # there what is multiplied is not quantised for a draft
    assert agrees(narrow.logits(decoder, hidden), whole, [4, 0, 9, 2, 11], error)
    narrow.replace(decoder, {1: 63, 4: 1})
    assert agrees(narrow.logits(decoder, hidden), whole, [4, 63, 9, 2, 1], error)
    assert agrees(decoder.logits(hidden), whole, range(64), error)  # which keeps its own


def agrees(found: torch.Tensor, whole: torch.Tensor, inside: Any, error: float) -> bool:
    """Whether logits are those of the whole head at some tokens, and nowhere else."""
    outside = [token for token in range(whole.shape[-1]) if token not in inside]
    close = torch.allclose(found[..., list(inside)], whole[..., list(inside)], rtol=1e-2, atol=error)
    return close and bool((found[..., outside] == -torch.inf).all())


def test_a_drafter_does_not_hold_on_to_a_model(tiny_checkpoint: Path) -> None:
    llm, draft = load(tiny_checkpoint, weights="plain"), EarlyExit(2, vocabulary=9)
    llm.generate("a", max_tokens=4, draft=draft)
    decoder = weakref.ref(llm.decoder)
    del llm
    gc.collect()
    assert decoder() is None
    assert not draft._heads._heads  # type: ignore[union-attr]


# --- the text


@pytest.mark.parametrize("size", [1, 9, 30])
def test_greedy_text_is_that_of_plain_decoding(size: int, llm: LLM) -> None:
    """Side by side, with a text that ends later than others, and with drafters that were used before."""
    plain = [done.tokens for done in llm.generate(PROMPTS, max_tokens=24, ignore_eos=True)]
    early = EarlyExit(2, tokens=4, vocabulary=size)
    cascade = Cascade(Lookup(), EarlyExit(1, vocabulary=size))
    for draft in (cascade, Auto(exit=2, vocabulary=size), EarlyExit(1, length="gain", vocabulary=size), early, early):
        drafted = llm.generate(PROMPTS, max_tokens=24, ignore_eos=True, draft=draft)
        assert [done.tokens for done in drafted] == plain
    for narrowed in (early._heads, cascade.exit._heads):
        assert narrowed is not None
        assert not narrowed._seen  # rows that left are forgotten
    counts = [done.acceptance for done in drafted]
    assert sum(each.drafted for each in counts) > sum(each.accepted for each in counts)
    assert sum(each.accepted for each in counts) > 0 or size == 1  # which is for the last token of a text


def test_tokens_that_are_forbidden_leave_nothing_to_propose(llm: LLM) -> None:
    """All that the list holds is banned, at the end of the text or everywhere: the target decides alone."""
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, banned=[0, 1, 2], seed=3, repetition_penalty=1.3, top_k=5)
        draft = EarlyExit(2, tokens=3, vocabulary=1, confidence=0.5)
        done = llm.generate("a", max_tokens=12, min_tokens=12, sampling=sampling, draft=draft)
        assert len(done.tokens) == 12
        assert not {0, 1, 2} & {*done.tokens}
        if temperature == 0:
            assert done.tokens == llm.generate("a", max_tokens=12, min_tokens=12, sampling=sampling).tokens


class Watched(EarlyExit):
    """Keeps what it proposed."""

    proposed: list[list[int]]

    def propose(self, rows: Rows, tokens: int) -> Draft:
        draft = super().propose(rows, tokens)
        self.proposed += draft.tokens.tolist()
        return draft


def test_only_tokens_of_the_list_and_of_the_text_are_proposed(llm: LLM) -> None:
    draft = Watched(2, tokens=4, vocabulary=12, ranked=[60, 61, 62])
    for prompt in ("the cat sat", "on a mat"):
        draft.proposed = []
        done = llm.generate(prompt, max_tokens=30, ignore_eos=True, draft=draft)
        text, listed = {*llm.encode(prompt), *done.tokens}, {60, 61, 62, *range(9)}
        proposed = {token for tokens in draft.proposed for token in tokens}
        assert proposed <= text | listed  # nothing of the text before
        assert proposed - listed  # what the text brought in


def test_a_list_follows_its_text_and_costs_little(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are looked at once; rows of the head are copied for new ones only, at most once a round."""
    copied: list[int] = []
    looked: list[int] = []
    replace, admit = NarrowHead.replace, Shortlist.admit
    monkeypatch.setattr(
        NarrowHead, "replace", lambda self, decoder, new: (copied.append(len(new)), replace(self, decoder, new))[1]
    )
    monkeypatch.setattr(Shortlist, "admit", lambda self, ids: (looked.extend(ids), admit(self, ids))[1])
    done = llm.generate("the cat sat", max_tokens=40, draft=EarlyExit(2, tokens=4, vocabulary=200), ignore_eos=True)
    text = [*llm.encode("the cat sat"), *done.tokens]
    assert text[: len(looked)] == looked
    assert len(text) - 6 <= len(looked) < len(text)  # what the last rounds brought is of no use
    first, *later = copied
    assert first == 200
    assert 0 < sum(later) <= len(text)
    assert len(later) <= done.acceptance.rounds


def test_sampled_text_repeats_with_a_seed(llm: LLM) -> None:
    """Alone, also with a drafter that served another text: the list begins anew."""
    draft, sampling = EarlyExit(2, tokens=4, vocabulary=120), Sampling(temperature=2.0, seed=5)
    prompts = ("the cat sat", "the dog", "the cat sat")
    texts = [llm.generate(prompt, max_tokens=40, draft=draft, sampling=sampling).tokens for prompt in prompts]
    assert texts[0] == texts[2] != texts[1]


def test_auto_narrows_greedy_text_only(llm: LLM) -> None:
    """Drawn, its tokens are matched with the target's by their place in the whole vocabulary."""
    draft = Auto(exit=2, vocabulary=9)
    for temperature, narrow in ((0.8, False), (0.0, True)):
        sampling = Sampling(temperature=temperature, seed=5)
        plain = llm.generate(PROMPTS[0], max_tokens=40, sampling=sampling)
        assert llm.generate(PROMPTS[0], max_tokens=40, sampling=sampling, draft=draft).tokens == plain.tokens
        assert draft._heads is not None
        assert bool(draft._heads._heads) == narrow


# --- options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 0}, "a draft vocabulary of 0 tokens is not possible; use 1 or more"),
        ({"vocabulary": 1.5}, "draft vocabulary"),
        ({"vocabulary": 100_000}, r"a draft vocabulary of 100000 is not below this model's \d+ tokens; use 1\.\."),
        ({"vocabulary": 5, "ranked": [99_999]}, "ranked token 99999 is outside the vocabulary"),
        ({"ranked": [5]}, "a ranking of tokens is for a draft vocabulary; give its size too, or leave it out"),
    ],
)
@pytest.mark.parametrize("drafter", [EarlyExit, Auto])
def test_bad_vocabularies_are_refused(drafter: Any, settings: dict[str, Any], message: str, llm: LLM) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate("a", max_tokens=1, draft=drafter(exit=2, **settings))


@pytest.mark.parametrize("words", ["lookup", "assistant:x"])
def test_only_an_exit_has_a_draft_vocabulary(words: str, llm: LLM) -> None:
    for settings, name in (({"vocabulary": 5}, "draft vocabulary"), ({"ranked": [3]}, "ranking of tokens")):
        with pytest.raises(RequestError, match=f"has no {name}; leave it out"):
            llm.drafter(words, **settings)  # type: ignore[arg-type]


def test_what_words_and_a_checkpoint_come_to(tiny_checkpoint: Path) -> None:
    llm = load(tiny_checkpoint, weights="plain")

    def asked(words: str, **options: Any) -> tuple[int | None, tuple[int, ...]]:
        drafter: Any = llm.drafter(words, **options)
        narrowed = getattr(drafter, "exit" if words.startswith("cascade") else "_heads")
        narrowed = narrowed._heads if words.startswith("cascade") else narrowed
        return drafter.vocabulary, () if narrowed is None else narrowed.ranked

    fits = fitting(llm.decoder.shape)
    assert 0 < fits * 32 <= 0.015 * llm.decoder.shape.parameters()["total"]
    assert asked("early-exit:2") == asked("early-exit:2", vocabulary=0) == asked("auto") == (None, ())
    assert asked("early-exit:2", vocabulary=7, ranked=[4]) == (7, (4,))
    assert asked("cascade:2", vocabulary=7) == (7, ())
    assert asked("cascade:2", vocabulary="auto") == asked("auto", vocabulary="auto") == (fits, ())
    llm.recommended = Recommended(2, 3, vocabulary=12, ranked=(9, 8))
    for words in ("early-exit", "cascade", "auto"):
        assert asked(words) == asked(words, vocabulary="auto") == (12, (9, 8))
        assert asked(words, vocabulary=0) == (None, ())
        assert asked(words, ranked=[5]) == (12, (5,))
        assert asked(words, vocabulary=20) == (20, (9, 8))
    assert asked("early-exit:1") == (None, ())  # who names an exit chooses for himself
    assert asked("early-exit:1", vocabulary="auto") == (12, (9, 8))
    with pytest.raises(RequestError, match="draft vocabulary 'many' is not possible; use 'auto', or a number of"):
        llm.drafter("early-exit:1", vocabulary="many")
    with pytest.raises(RequestError, match="a draft vocabulary of -3 tokens is not possible"):
        llm.drafter("early-exit:1", vocabulary=-3)
    assert load(tiny_checkpoint, weights="plain").drafter("lookup", vocabulary=0) is not None
