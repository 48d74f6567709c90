"""The first law: greedy text is transformers' text, and what else a drafter must not change.

Models are random and in float64, where different orders of summation cannot turn an argmax. Their upper layers add
little, so that early exits are right often and wrong often; the grid checks that it saw both.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip.decode.batch import Batch
from layerskip.decode.drafters import Assistant, EarlyExit, Lookup
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Sampling
from layerskip.errors import NumericalError, RequestError
from layerskip.model.decoder import Decoder

V, N = 24, 18
GENERATOR = torch.Generator().manual_seed(99)
PROMPTS = [torch.randint(V, (n,), generator=GENERATOR).tolist() for n in (9, 1, 23, 4, 14, 2, 17, 6)]
ROUGH = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.2, seed=5)


def seeded(base: Sampling, seed: int) -> Sampling:
    return replace(base, seed=seed)


def stops(target: Any) -> list[int]:
    """End-of-sequence ids that end some texts early, each somewhere else."""
    return [target.text(PROMPTS[0], N)[7], target.text(PROMPTS[2], N)[12]]


def plan(target: Any, rows: int) -> tuple[list[Request], list[list[int]]]:
    """Requests that end at ids and at different lengths, and what transformers says to them."""
    eos = stops(target)
    lengths = [N, N - 5, N, 3, N, N - 1, 11, 1][:rows]
    requests = [Request(ids, n, eos=eos) for ids, n in zip(PROMPTS, lengths, strict=False)]
    return requests, [target.text(ids, N, eos=eos)[:n] for ids, n in zip(PROMPTS, lengths, strict=False)]


GRID = [(1, 1), (1, 7), (3, 4), (8, 1), (8, 7)]  # rows, drafted tokens


def test_plain_greedy_text_is_that_of_transformers(
    architecture: str, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    target = target_of(architecture, prompts=PROMPTS)
    finishes = set()
    for rows in (1, 3, 8):
        requests, expected = plan(target, rows)
        run = generate(target.decoder, requests)
        assert run.texts == expected
        assert run.drafted == 0
        for request, text, finish in zip(requests, run.texts, run.finishes, strict=True):
            assert finish == ("stop" if text[-1] in request.eos else "length")
        finishes |= {*run.finishes}
    assert finishes == {"stop", "length"}


def test_drafted_greedy_text_is_that_of_transformers(
    architecture: str, drafter_name: str, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    target = target_of(architecture, prompts=PROMPTS)
    drafted = accepted = 0
    for rows, tokens in GRID:
        requests, expected = plan(target, rows)
        run = generate(target.decoder, requests, drafter=target.drafters[drafter_name](tokens))
        assert run.texts == expected, (rows, tokens)
        assert [f == "stop" for f in run.finishes] == [text[-1] in stops(target) for text in expected]
        for rounds in run.rounds:
            assert all(1 <= len(r.tokens) <= len(r.drafted) + 1 <= tokens + 1 for r in rounds)
        drafted, accepted = drafted + run.drafted, accepted + run.accepted
    assert accepted < drafted
    assert accepted > 0 or drafter_name == "lookup"  # not every random model repeats itself; "predicted" copies too


@pytest.fixture(scope="module")
def llama(target_of: Callable[..., Any]) -> Any:
    return target_of("llama", prompts=PROMPTS)


def drafters(target: Any, tokens: int = 4) -> dict[str, Any]:
    return {name: make(tokens) for name, make in target.drafters.items()}


def test_rounds_account_for_every_token(llama: Any, drafter_name: str, generate: Callable[..., Any]) -> None:
    requests, _ = plan(llama, 8)
    for rounds in generate(llama.decoder, requests, drafter=llama.drafters[drafter_name](7)).rounds:
        for r in rounds:
            assert r.accepted <= len(r.tokens) <= r.accepted + 1
            assert len(r.depths) == len(r.drafted)
            for place, token in enumerate(r.tokens[: r.accepted]):
                assert (token, place) in zip(r.drafted, r.depths, strict=True)
            assert r.seconds.draft >= 0
            assert r.seconds.verify > 0
        assert [r.finish for r in rounds[:-1]] == [None] * (len(rounds) - 1)


@pytest.mark.parametrize("kind", ["predicted", "tree"])
def test_a_stop_inside_an_accepted_block_ends_the_text(
    llama: Any, kind: str, tree: Any, generate: Callable[..., Any]
) -> None:
    """The draft is the right text itself, so the block would go on beyond the stop."""
    inside = 0
    for prompt in PROMPTS[:3]:
        text = llama.text(prompt, N)
        for place in range(N):
            if text[place] in text[:place]:
                continue
            if kind == "predicted":
                drafter = Lookup(tokens=7, predicted=text)
            else:
                drafter = tree([*prompt, *text], vocab=V, tokens=9, drifting=0)
            run = generate(llama.decoder, [Request(prompt, N, eos=[text[place]])], drafter=drafter)
            assert run.texts == [text[: place + 1]]
            assert run.finishes == ["stop"]
            last = run.rounds[0][-1]
            assert last.accepted <= len(last.tokens)
            inside += last.accepted == len(last.tokens) and len(last.drafted) > last.accepted
    assert inside > 10


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_max_tokens_is_exact(llama: Any, drafter_name: str, tokens: int, generate: Callable[..., Any]) -> None:
    for most in range(1, 2 * tokens + 3):
        requests = [Request(ids, most) for ids in PROMPTS[:2]]
        run = generate(llama.decoder, requests, drafter=llama.drafters[drafter_name](tokens))
        assert run.texts == [llama.text(ids, N)[:most] for ids in PROMPTS[:2]]
        assert run.finishes == ["length", "length"]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_context_ends_the_text(
    name: str, drafter_name: str, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    target = target_of(name, prompts=PROMPTS, max_position_embeddings=24)
    prompts = [PROMPTS[2], PROMPTS[6], PROMPTS[1], PROMPTS[4]]  # 23, 17, 1 and 14 tokens
    expected = [target.text(ids, 24 - len(ids)) for ids in prompts]
    for tokens in (1, 7):
        drafter = target.drafters[drafter_name](tokens)
        run = generate(target.decoder, [Request(ids, 50) for ids in prompts], drafter=drafter)
        assert run.texts == expected
        assert run.finishes == ["length"] * 4
        alone = generate(target.decoder, [Request(prompts[1], 50)], drafter=target.drafters[drafter_name](tokens))
        assert alone.texts == expected[1:2]


@pytest.mark.parametrize("least", [1, 4, 9, N])
def test_min_tokens_holds_the_end_back(llama: Any, least: int, generate: Callable[..., Any]) -> None:
    """As transformers' min_new_tokens: before it, an end is not even drawn."""
    eos = [*stops(llama), llama.text(PROMPTS[1], N)[0], llama.text(PROMPTS[3], N)[2]]
    expected = [llama.text(ids, N, eos=eos, min_new_tokens=least) for ids in PROMPTS[:4]]
    assert least == N or any(len(text) < N for text in expected)
    requests = [Request(ids, N, min_tokens=least, eos=eos) for ids in PROMPTS[:4]]
    for name, drafter in drafters(llama).items():
        assert generate(llama.decoder, requests, drafter=drafter).texts == expected, name


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_penalised_greedy_text_is_that_of_transformers(
    llama: Any, penalty: float, generate: Callable[..., Any]
) -> None:
    expected = [llama.text(ids, N, repetition_penalty=penalty) for ids in PROMPTS[:4]]
    requests = [Request(ids, N, sampling=Sampling(repetition_penalty=penalty)) for ids in PROMPTS[:4]]
    assert expected != [llama.text(ids, N) for ids in PROMPTS[:4]]
    for name, drafter in drafters(llama, 5).items():
        assert generate(llama.decoder, requests, drafter=drafter).texts == expected, name


def test_an_assistant_may_have_another_vocabulary_size(
    llama: Any, tiny: Callable[..., Any], decoder_of: Callable[..., Decoder], generate: Callable[..., Any]
) -> None:
    """Checkpoints pad their vocabularies; ids that only one of them has are no reason to fail."""
    requests = [Request([*ids, V - 1], N) for ids in PROMPTS[:3]]
    sampled = [replace(r, sampling=Sampling(temperature=0.8, seed=3)) for r in requests]
    expected = generate(llama.decoder, requests)
    for vocab in (20, V, 31):
        assistant = decoder_of(tiny("qwen3", vocab_size=vocab, num_hidden_layers=1).double())
        assert generate(llama.decoder, requests, drafter=Assistant(assistant)).texts == expected.texts
        assert generate(llama.decoder, sampled, drafter=Assistant(assistant)).drafted > 0


# -- neighbours


@pytest.mark.parametrize("sampling", [Sampling(), ROUGH], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_row_never_depends_on_its_neighbours(
    name: str,
    sampling: Sampling,
    drafter_name: str,
    target_of: Callable[..., Any],
    generate: Callable[..., Any],
    finish: Callable[..., Any],
) -> None:
    """Alone, side by side, joining late, with others leaving: the same text, sampled text too."""
    target = target_of(name, prompts=PROMPTS)
    decoder, make = target.decoder, target.drafters[drafter_name]
    lengths = [N, 7, 12, N, 3]
    requests = [
        Request(ids, n, sampling=seeded(sampling, i))
        for i, (ids, n) in enumerate(zip(PROMPTS[:5], lengths, strict=True))
    ]
    alone = [generate(decoder, [request], drafter=make(4)).texts[0] for request in requests]
    assert generate(decoder, requests, drafter=make(4)).texts == alone
    assert generate(decoder, requests[::-1], drafter=make(4)).texts == alone[::-1]

    batch = Batch(decoder, Pool(decoder.cache(rows=2, slots=8)), drafter=make(4))
    keys = batch.join(requests[:2])
    early = {key: list[int]() for key in keys}
    for done in batch.round():
        early[done.key] += done.tokens
    keys += batch.join(requests[2:4])
    for key in keys:
        early.setdefault(key, [])
    for done in batch.round():
        early[done.key] += done.tokens
    batch.leave(keys[0])
    late = batch.join(requests[4:])
    run = finish(batch, keys[1:] + late)
    texts = [early.get(key, []) + text for key, text in zip(keys[1:] + late, run.texts, strict=True)]
    assert texts == alone[1:]
    assert early[keys[0]] == alone[0][: len(early[keys[0]])] != []


@pytest.mark.parametrize("drafter_name", ["lookup", "predicted", "tree"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
def test_seeded_text_of_deterministic_drafts_is_that_of_plain_decoding(
    llama: Any, drafter_name: str, tokens: int, generate: Callable[..., Any]
) -> None:
    requests = [
        Request(ids, N, sampling=seeded(base, 10 * i))
        for i, (ids, base) in enumerate(zip(PROMPTS, [ROUGH, Sampling(temperature=0.5)] * 4, strict=True))
    ]
    plain = generate(llama.decoder, requests)
    run = generate(llama.decoder, requests, drafter=llama.drafters[drafter_name](tokens))
    assert run.texts == plain.texts
    assert 0 < run.accepted < run.drafted


def test_seeds_repeat_and_differ(llama: Any, drafter_name: str, generate: Callable[..., Any]) -> None:
    def texts(seed: int | None) -> list[list[int]]:
        requests = [Request(PROMPTS[0], N, sampling=Sampling(temperature=1.5, seed=seed))] * 2
        return generate(llama.decoder, requests, drafter=llama.drafters[drafter_name](4)).texts  # type: ignore[no-any-return]

    one, other = texts(1), texts(2)
    assert one == texts(1)
    assert one[0] == one[1] != other[0]
    free = texts(None)
    assert free[0] != free[1]


# -- the cache between requests


def test_a_conversation_does_not_run_its_past_again(
    llama: Any, generate: Callable[..., Any], counting: Callable[..., Any]
) -> None:
    for name in llama.drafters:
        pool = Pool(llama.decoder.cache(rows=1, slots=16))
        first = generate(llama.decoder, [Request(PROMPTS[2], 10)], pool=pool, drafter=llama.drafters[name](4))
        longer = [*PROMPTS[2], *first.texts[0], 5, 6, 7]
        with counting(llama.decoder.layers) as counts:
            batch = Batch(llama.decoder, pool, drafter=llama.drafters[name](4))
            batch.join([Request(longer, N)])
            assert counts == [3] * 4, name  # the last token of the answer, which was emitted but not run, and two more
            batch.close()
        again = generate(llama.decoder, [Request(longer, N)], pool=pool, drafter=llama.drafters[name](4))
        assert again.texts == [llama.text(longer, N)], name


def test_a_text_that_was_left_can_be_taken_up_again(
    llama: Any, drafter_name: str, generate: Callable[..., Any], counting: Callable[..., Any]
) -> None:
    """A stream closed between rounds leaves its cache for whoever continues the text."""
    decoder, drafter = llama.decoder, llama.drafters[drafter_name](4)
    pool = Pool(decoder.cache(rows=1, slots=16))
    batch = Batch(decoder, pool, drafter=drafter)
    keys = batch.join([Request(ids, N) for ids in PROMPTS[:3]])
    texts: dict[int, list[int]] = {key: [] for key in keys}
    for _ in range(2):
        for done in batch.round():
            texts[done.key] += done.tokens
    batch.close()
    assert len(batch) == 0
    longer = [[*ids, *texts[key]] for ids, key in zip(PROMPTS[:3], keys, strict=True)]
    with counting(decoder.layers) as counts:
        keys = batch.join([Request(ids, N) for ids in longer])
        assert counts == [0] * 4
    batch.leave(keys[1])
    run = generate(decoder, [Request(ids, N) for ids in longer], pool=pool, drafter=drafter)
    assert run.texts == [llama.text(ids, N) for ids in longer]
    with pytest.raises(RequestError, match=f"row {keys[1]} is not in this batch; it finished or left"):
        batch.leave(keys[1])


def test_prompts_that_share_a_long_beginning_run_it_once(
    llama: Any, generate: Callable[..., Any], counting: Callable[..., Any], drafter_name: str
) -> None:
    shared = [*PROMPTS[2], *PROMPTS[6]]  # 40 tokens
    prompts = [shared + tail for tail in ([1], [2, 3], [1, 4, 5], [1])] + [PROMPTS[3], shared[:30]]
    decoder, drafter = llama.decoder, llama.drafters[drafter_name](4)
    pool = Pool(decoder.cache(rows=1, slots=16))
    with counting(decoder.layers) as counts:
        batch = Batch(decoder, pool, drafter=drafter)
        batch.join([Request(ids, N) for ids in prompts])
        assert counts[0] < 2 * 41  # 210 if each was run by itself
        batch.close()
    run = generate(decoder, [Request(ids, N) for ids in prompts], pool=pool, drafter=drafter)
    assert run.texts == [llama.text(ids, N) for ids in prompts]


def test_a_pool_serves_many_requests_in_any_order(llama: Any, generate: Callable[..., Any]) -> None:
    """Rows are reused, prefixes copied, the cache grows; the texts stay right, whoever drafts."""
    decoder, pool = llama.decoder, Pool(llama.decoder.cache(rows=2, slots=4))
    names, drawn = list(llama.drafters), torch.Generator().manual_seed(4)
    for step in range(12):
        chosen = torch.randint(8, (1 + step % 4,), generator=drawn).tolist()
        prompts = [PROMPTS[i] + llama.text(PROMPTS[i], N)[: step % 5] for i in chosen]
        drafter = llama.drafters[names[step % len(names)]](1 + step % 6)
        run = generate(decoder, [Request(ids, 8) for ids in prompts], pool=pool, drafter=drafter)
        assert run.texts == [llama.text(ids, N)[:8] for ids in prompts]


class Stop(BaseException):
    """What a caller's interrupt looks like."""


@pytest.mark.parametrize("drafter_name", ["early exit", "confident exit", "assistant", "lookup", "tree"])
@pytest.mark.parametrize("call", [1, 4, 9, 14])
def test_an_exception_in_the_middle_of_a_round_leaves_everything_usable(
    llama: Any, drafter_name: str, call: int, generate: Callable[..., Any], finish: Callable[..., Any]
) -> None:
    """A processor of the caller's raises while a draft is drawn, or while it is verified."""
    calls = []

    def raising(prefix: Tensor, logits: Tensor) -> Tensor:
        calls.append(len(prefix))
        if len(calls) == call:
            raise Stop
        return logits

    decoder, drafter = llama.decoder, llama.drafters[drafter_name](4)
    pool = Pool(decoder.cache(rows=1, slots=16))
    requests = [Request(PROMPTS[0], N, sampling=Sampling(processors=[raising])), Request(PROMPTS[2], N)]
    batch = Batch(decoder, pool, drafter=drafter)
    keys = batch.join(requests)
    texts: dict[int, list[int]] = {key: [] for key in keys}

    def go_on() -> None:
        while True:
            for done in batch.round():
                texts[done.key] += done.tokens

    with pytest.raises(Stop):
        go_on()
    if call % 2:  # the same batch goes on where it was
        run = finish(batch, keys)
        expected = [llama.text(ids, N) for ids in (PROMPTS[0], PROMPTS[2])]
        assert [texts[key] + text for key, text in zip(keys, run.texts, strict=True)] == expected
    else:
        batch.close()
    again = [Request(ids, N) for ids in (*PROMPTS[:3], PROMPTS[0] + llama.text(PROMPTS[0], N)[:4])]
    run = generate(decoder, again, pool=pool, drafter=drafter)
    assert run.texts == [llama.text(request.ids, N) for request in again]


def test_a_drafter_that_raises_leaves_everything_usable(
    llama: Any, generate: Callable[..., Any], finish: Callable[..., Any]
) -> None:
    class Failing(EarlyExit):
        failing = True

        def propose(self, rows: Any, tokens: int) -> Any:
            draft = super().propose(rows, tokens)  # its junk is in the cache by now
            if self.failing:
                raise RuntimeError("no draft today")
            return draft

    pool, drafter = Pool(llama.decoder.cache(rows=1, slots=16)), Failing(2, tokens=5)
    batch = Batch(llama.decoder, pool, drafter=drafter)
    keys = batch.join([Request(ids, N) for ids in PROMPTS[:3]])
    with pytest.raises(RuntimeError, match="no draft today"):
        batch.round()
    drafter.failing = False
    expected = [llama.text(ids, N) for ids in PROMPTS[:3]]
    assert finish(batch, keys).texts == expected
    assert generate(llama.decoder, [Request(ids, N) for ids in PROMPTS[:3]], pool=pool).texts == expected


def test_a_request_that_cannot_join_leaves_everything_usable(llama: Any, generate: Callable[..., Any]) -> None:
    pool = Pool(llama.decoder.cache(rows=1, slots=16))
    batch = Batch(llama.decoder, pool)
    for bad, message in [
        ([1] * 96, r"the prompt has 96 tokens; this model's context holds 96, so use at most 95"),
        ([1, 24], r"token 24 is outside the vocabulary; use 0\.\.23"),
        ([-1], r"token -1 is outside the vocabulary"),
    ]:
        with pytest.raises(RequestError, match=message):
            batch.join([Request(PROMPTS[0], N), Request(bad, N)])
        assert len(batch) == 0
    with pytest.raises(RequestError, match="token 24 is outside the vocabulary"):
        batch.join([Request([1], N, sampling=Sampling(banned=[24]))])
    assert batch.round() == []
    assert generate(llama.decoder, [Request(PROMPTS[0], N)], pool=pool).texts == [llama.text(PROMPTS[0], N)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": []}, "the prompt has no tokens; give at least one"),
        ({"max_tokens": 0}, "max_tokens 0 is not possible; use 1 or more"),
        ({"min_tokens": 6}, r"min_tokens 6 is not possible; use 0\.\.5"),
        ({"logprobs": -1}, "logprobs -1 is not possible; use 0 or more"),
    ],
)
def test_requests_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**{"ids": [1], "max_tokens": 5, **settings})


# -- exits


@pytest.mark.parametrize("exit", [1, 2, 3])
def test_an_early_exit_is_the_model_with_fewer_layers(
    tiny: Callable[..., Any], decoder_of: Callable[..., Decoder], generate: Callable[..., Any], exit: int
) -> None:
    model = tiny("llama", double=True, agree=0.35)
    decoder = decoder_of(model)
    model.model.layers = model.model.layers[:exit]
    model.config.num_hidden_layers = exit
    requests, expected = [Request(ids, 8) for ids in PROMPTS[:3]], []
    for ids in PROMPTS[:3]:
        everything = torch.ones(1, len(ids), dtype=torch.long)
        out = model.generate(torch.tensor([ids]), attention_mask=everything, max_new_tokens=8, do_sample=False)
        expected.append(out[0, len(ids) :].tolist())
    assert generate(decoder, requests, exit=exit).texts == expected
    for draft in range(1, exit):
        assert generate(decoder, requests, exit=exit, drafter=EarlyExit(draft)).texts == expected
    assert generate(decoder, requests, exit=exit, drafter=Lookup()).texts == expected


def test_lossy_and_exact_requests_share_a_pool(llama: Any, generate: Callable[..., Any], drafter_name: str) -> None:
    """What an early exit left is not valid in the layers above it; what the whole model left is valid below."""
    decoder, requests = llama.decoder, [Request(ids, N) for ids in PROMPTS[:3]]
    lossy = generate(decoder, requests, exit=2).texts
    exact = [llama.text(ids, N) for ids in PROMPTS[:3]]
    assert lossy != exact
    pool, drafter = Pool(decoder.cache(rows=1, slots=16)), llama.drafters[drafter_name](4)
    assert generate(decoder, requests, pool=pool, exit=2).texts == lossy
    assert generate(decoder, requests, pool=pool, drafter=drafter).texts == exact
    assert generate(decoder, requests[::-1], pool=pool, exit=2, drafter=EarlyExit(1)).texts == lossy[::-1]
    assert generate(decoder, requests, pool=pool).texts == exact


def test_a_batch_says_whether_it_is_lossless(llama: Any) -> None:
    pool = Pool(llama.decoder.cache(rows=1, slots=16))
    assert Batch(llama.decoder, pool).lossless
    assert Batch(llama.decoder, pool, exit=4, drafter=EarlyExit(3)).lossless
    assert not Batch(llama.decoder, pool, exit=3).lossless


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit": 0}, r"exit 0 is not inside this 4-layer model; use 1\.\.4"),
        ({"exit": 5}, r"exit 5 is not inside this 4-layer model; use 1\.\.4"),
        ({"drafter": EarlyExit(4)}, r"draft exit 4 is not below the 4 layers the model decodes with; use 1\.\.3"),
        ({"drafter": EarlyExit(2), "exit": 2}, r"draft exit 2 is not below the 2 layers the model decodes with; use 1"),
        ({"drafter": EarlyExit(1), "exit": 1}, "no earlier exit to draft from; use no drafter"),
        ({"drafter": Lookup(predicted=[24])}, r"predicted token 24 is outside the vocabulary; use 0\.\.23"),
        ({"drafter": Lookup(predicted="text")}, "must be token ids here"),
    ],
)
def test_exits_and_drafters_that_do_not_fit_are_refused(llama: Any, settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Batch(llama.decoder, Pool(llama.decoder.cache(rows=1, slots=16)), **settings)


def test_drafters_out_of_range_are_refused(llama: Any) -> None:
    for make in (
        lambda: EarlyExit(0),
        lambda: EarlyExit(1, tokens=0),
        lambda: EarlyExit(1, confidence=0.0),
        lambda: EarlyExit(1, confidence=1.5),
        lambda: Lookup(tokens=0),
        lambda: Lookup(ngram=0),
        lambda: Assistant(llama.decoder, tokens=0),
    ):
        with pytest.raises(RequestError, match="; use "):
            make()


# -- log-probabilities


def raw_logprobs(target: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return target.model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("drafter_name", ["none", "early exit", "confident exit", "lookup", "assistant", "tree"])
@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=1.4), ROUGH], ids=["greedy", "sampled"])
def test_logprobs_are_the_targets_raw_ones(
    llama: Any, drafter_name: str, sampling: Sampling, generate: Callable[..., Any]
) -> None:
    """Before temperature, penalties and bans, for accepted and corrected tokens alike."""
    requests = [
        Request(ids, n, sampling=replace(seeded(sampling, i), banned=[3]), logprobs=top, eos=stops(llama))
        for i, (ids, n, top) in enumerate(zip(PROMPTS[:4], (N, 5, 11, 1), (3, 0, None, V), strict=True))
    ]
    run = generate(llama.decoder, requests, drafter=llama.drafters[drafter_name](4))
    for request, text, entries in zip(requests, run.texts, run.logprobs, strict=True):
        if request.logprobs is None:
            assert entries == []
            continue
        table = raw_logprobs(llama, [*request.ids, *text])[len(request.ids) - 1 : -1]
        assert [entry.token for entry in entries] == text
        for row, entry in zip(table, entries, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            best = row.sort(descending=True)
            assert [token for token, _ in entry.top] == best.indices[: request.logprobs].tolist()
            assert [value for _, value in entry.top] == pytest.approx(
                best.values[: request.logprobs].tolist(), abs=1e-4
            )
    if drafter_name in ("lookup", "tree") or sampling.temperature == 0:  # seeded text is plain decoding's: so are these
        plain = generate(llama.decoder, requests).logprobs
        for ours, theirs in zip(run.logprobs, plain, strict=True):
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-9)


@pytest.mark.parametrize("chunk", [512, 5])
def test_prompt_logprobs_are_transformers(llama: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the beginning is held already or shared: it is run all the same."""
    monkeypatch.setattr("layerskip.decode.prefill.CHUNK", chunk)
    pool = Pool(llama.decoder.cache(rows=1, slots=16))
    batch = Batch(llama.decoder, pool, drafter=EarlyExit(2))
    prompts = [PROMPTS[2], PROMPTS[1], [*PROMPTS[2][:20], 9], PROMPTS[0]]
    for _ in range(2):
        wanted = [True, True, True, False]
        requests = [Request(ids, 4, prompt_logprobs=w, logprobs=2) for ids, w in zip(prompts, wanted, strict=True)]
        for key, ids, w in zip(batch.join(requests), prompts, wanted, strict=True):
            entries = batch.prompt_logprobs(key)
            if not w:
                assert entries is None
                continue
            assert entries is not None
            table = raw_logprobs(llama, ids)
            assert [entry.token for entry in entries] == ids[1:]
            expected = [float(table[i, token]) for i, token in enumerate(ids[1:])]
            assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-4)
            assert [[t for t, _ in entry.top] for entry in entries] == table[:-1].topk(2).indices.tolist()
        batch.close()


@pytest.mark.parametrize("name", ["llama", "mistral", "llama-dynamic"])
def test_prompts_may_run_in_chunks(
    name: str, target_of: Callable[..., Any], generate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerskip.decode.prefill.CHUNK", 5)
    target = target_of(name, prompts=PROMPTS)
    requests, expected = plan(target, 8)
    for drafter in ("none", "early exit", "assistant"):
        assert generate(target.decoder, requests, drafter=target.drafters[drafter](4)).texts == expected


# -- what goes wrong in the numbers


def with_nan(decoder: Decoder, place: str, index: Any = ...) -> Decoder:
    broken = copy.deepcopy(decoder)
    broken.get_parameter(place).data[index] = torch.nan
    return broken


def until_done(batch: Batch) -> tuple[dict[int, list[int]], dict[int, Exception]]:
    texts: dict[int, list[int]] = {}
    errors: dict[int, Exception] = {}
    while len(batch):
        for done in batch.round():
            texts[done.key] = texts.get(done.key, []) + done.tokens
            if done.error is not None:
                assert (done.finish, done.tokens) == ("error", [])
                errors[done.key] = done.error
    return texts, errors


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("embedding.weight", "from the embedding on, at position 0 of 9"),
        ("layers.2.gate_up.up.weight", r"from layer 2 \(of 0\.\.3\) on, at position 0 of 9"),
        ("layers.0.query_key_value.key.weight", r"from layer 0 \(of 0\.\.3\) on"),
        (
            "head.weight",
            "logits are not finite though its states after 4 layers are; check the final norm and the head",
        ),
    ],
)
@pytest.mark.parametrize("drafter", ["none", "early exit", "lookup", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_named(llama: Any, place: str, message: str, drafter: str, temperature: float) -> None:
    decoder = with_nan(llama.decoder, place)
    batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=16)), drafter=llama.drafters[drafter](4))
    keys = batch.join([Request(PROMPTS[0], N, sampling=Sampling(temperature=temperature))])
    texts, errors = until_done(batch)
    assert texts == {keys[0]: []}
    with pytest.raises(NumericalError, match=message):
        raise errors[keys[0]]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("drafter_name", ["none", "early exit", "lookup", "assistant", "tree"])
def test_a_broken_row_harms_no_neighbour_and_no_successor(llama: Any, drafter_name: str, temperature: float) -> None:
    """One token's embedding is NaN; one prompt holds it. Its row of the cache is used again by the next request."""
    unused = next(t for t in range(V) if t not in [*PROMPTS[0], *PROMPTS[1], *PROMPTS[2]])
    decoder = with_nan(llama.decoder, "embedding.weight", unused)
    good = [Request(ids, N, sampling=Sampling(temperature=temperature, seed=1, banned=[unused])) for ids in PROMPTS[:3]]
    bad = Request([4, unused, *PROMPTS[2]], N)
    make = llama.drafters[drafter_name]
    alone = Batch(llama.decoder, Pool(llama.decoder.cache(rows=1, slots=16)), drafter=make(4))
    expected = list(zip(alone.join(good), good, strict=True))
    right, none = until_done(alone)
    assert none == {}
    batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=16)), drafter=make(4))
    keys = batch.join([good[0], bad, good[1]])
    texts, errors = until_done(batch)
    assert errors.keys() == {keys[1]}
    with pytest.raises(NumericalError, match="from the embedding on, at position 1 of 25"):
        raise errors[keys[1]]
    assert [texts[keys[0]], texts[keys[2]]] == [right[key] for key, _ in expected[:2]]
    keys = batch.join([good[1], good[2], good[0]])
    texts, errors = until_done(batch)
    assert errors == {}
    assert [texts[key] for key in keys] == [right[expected[i][0]] for i in (1, 2, 0)]


@pytest.mark.parametrize("where", ["drafted", "padding of prompts", "in the text"])
def test_a_token_without_finite_numbers_matters_only_in_the_text(llama: Any, where: str) -> None:
    """A masked NaN still poisons attention, so a token that is only drafted or padded with must not be charged."""
    plain = Batch(llama.decoder, Pool(llama.decoder.cache(rows=1, slots=16)))
    (key,) = plain.join([Request(PROMPTS[0], N)])
    text = until_done(plain)[0][key]
    unused = next(t for t in range(V) if t not in [*PROMPTS[0], *text])
    late = next(t for t in text if t not in PROMPTS[0] and text.index(t) >= 3)
    bad = {"drafted": unused, "padding of prompts": 0, "in the text": late}[where]
    if where == "padding of prompts" and 0 in [*PROMPTS[0], *text]:
        pytest.skip("the padding id is in the text itself")
    decoder = with_nan(llama.decoder, "embedding.weight", bad)
    predicted = [*text[:3], unused, *text[4:]] if where == "drafted" else text
    batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=16)), drafter=Lookup(tokens=7, predicted=predicted))
    longer = [t for t in range(V) if t != bad][:20]
    keys = batch.join([Request(PROMPTS[0], N), *([Request(longer, 2)] if where == "padding of prompts" else [])])
    texts, errors = until_done(batch)
    if where == "in the text":
        # what came before the token is kept, the token itself included; the error names where it lies
        assert texts[keys[0]] == text[: text.index(bad) + 1]
        with pytest.raises(NumericalError, match=rf"from the embedding on, at position {9 + text.index(bad)} of"):
            raise errors[keys[0]]
    else:
        assert errors == {}
        assert texts[keys[0]] == text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter_name", ["none", "early exit", "lookup", "assistant", "tree"])
def test_when_no_token_is_allowed_the_row_says_so(llama: Any, drafter_name: str, temperature: float) -> None:
    def dead_end(prefix: Tensor, logits: Tensor) -> Tensor:
        return logits if len(prefix) < 12 else torch.full_like(logits, -torch.inf)

    batch = Batch(llama.decoder, Pool(llama.decoder.cache(rows=1, slots=16)), drafter=llama.drafters[drafter_name](4))
    keys = batch.join(
        [
            Request(PROMPTS[0], N, sampling=Sampling(temperature=temperature, banned=range(V))),
            Request(PROMPTS[1], N),
            Request(PROMPTS[3], N, sampling=Sampling(temperature=temperature, processors=[dead_end])),
        ]
    )
    texts, errors = until_done(batch)
    assert errors.keys() == {keys[0], keys[2]}
    with pytest.raises(RequestError, match="no token is allowed after 9 tokens: bans, biases or processors exclude"):
        raise errors[keys[0]]
    with pytest.raises(RequestError, match=r"no token is allowed after \d+ tokens"):
        raise errors[keys[2]]
    assert (texts[keys[0]], texts[keys[1]]) == ([], llama.text(PROMPTS[1], N))
    assert len(texts[keys[2]]) <= 8


# -- work


def test_early_exit_drafts_cost_less_than_those_of_transformers(
    llama: Any, generate: Callable[..., Any], counting: Callable[..., Any]
) -> None:
    """The same 50 tokens. Each position passes each layer once, and rejected drafts pass each once more."""
    exit, tokens, prompt = 2, 4, PROMPTS[0]
    with counting(llama.decoder.layers) as ours:
        run = generate(llama.decoder, [Request(prompt, 50)], drafter=EarlyExit(exit, tokens=tokens))
    model = copy.deepcopy(llama.model)
    # the assistant reads these from its own generation_config, which here is the model's
    model.generation_config.num_assistant_tokens = tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    with counting(model.model.layers) as theirs:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=50,
            do_sample=False,
            assistant_early_exit=exit,
        )
    assert run.texts == [out[0, len(prompt) :].tolist()] == [llama.text(prompt, 50)]
    print(f"positions through each layer for 50 tokens: ours {ours}, assistant_early_exit {theirs}")  # noqa: T201
    positions = len(prompt) + 50 - 1  # the last token emitted is not run
    rejected = run.drafted - run.accepted
    assert rejected > 0
    assert ours == [positions + rejected] * 4
    assert sum(ours) < sum(theirs)
    assert all(mine < other for mine, other in zip(ours[:exit], theirs[:exit], strict=True))


def test_plain_decoding_runs_each_position_once(
    llama: Any, generate: Callable[..., Any], counting: Callable[..., Any]
) -> None:
    with counting(llama.decoder.layers) as counts:
        generate(llama.decoder, [Request(PROMPTS[0], N)])
        assert counts == [len(PROMPTS[0]) + N - 1] * 4
        generate(llama.decoder, [Request(PROMPTS[0], N)], exit=3)
    assert [b - a for a, b in pairwise(counts)] == [0, 0, -(len(PROMPTS[0]) + N - 1)]


def test_a_drafter_that_fails_when_a_row_ends_leaves_no_row_behind(llama: Any) -> None:
    class Fails(EarlyExit):
        def observe(self, rows: Any, draft: Any, outcome: Any) -> None:
            raise RuntimeError("observed")

    batch = Batch(llama.decoder, Pool(llama.decoder.cache(rows=1, slots=16)), drafter=Fails(1, tokens=2))
    batch.join([Request(PROMPTS[0], 5), Request(PROMPTS[1], 1)])
    with pytest.raises(RuntimeError, match="observed"):
        batch.round()
    assert len(batch) == 1  # the row that ended is gone
    for _ in range(5):
        with suppress(RuntimeError):
            batch.round()
    assert not len(batch)
    assert not any(row.taken for row in batch.pool.rows)
