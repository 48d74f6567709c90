"""Drafters that choose while they decode: whatever they choose, the text is that of plain decoding.

Most tests run with the real clock, so what is chosen differs from run to run, and the text may not. Where the choice
itself is tested, every pass of a layer or head takes a unit of a clock that stands still otherwise.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch

from layerskip.decode.batch import Batch
from layerskip.decode.draft import Drafter, Outcome, Rows
from layerskip.decode.drafters import Assistant, Auto, Cascade, EarlyExit, Lookup
from layerskip.decode.drafters.auto import AutoDraft
from layerskip.decode.drafters.cascade import CascadeDraft
from layerskip.decode.drafters.copies import Copy
from layerskip.decode.pool import Pool
from layerskip.decode.randomness import Purpose, uniform
from layerskip.decode.request import Request
from layerskip.decode.sampling import Law, Sampling, draw
from layerskip.errors import RequestError
from layerskip.model.decoder import Decoder

V, N = 24, 18
GENERATOR = torch.Generator().manual_seed(99)
PROMPTS = [torch.randint(V, (n,), generator=GENERATOR).tolist() for n in (9, 1, 23, 4, 14, 2, 17, 6)]
ROUGH = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.2)


class Restless(Auto):
    """Takes up another exit, or none, every round, and looks at others."""

    def propose(self, rows: Rows, tokens: int) -> Any:
        mind = self._mind(rows)
        place = mind.places.at(len(rows.ids))
        place.use([1, 3, 0, 2][mind.rounds % 4])
        place.rounds = 3  # nothing is due
        mind.seconds, mind.overhead, mind._unlooked = 1e9, 0.0, 9
        return super().propose(rows, tokens)


MAKE: dict[str, Callable[[Decoder], Drafter]] = {
    "auto": lambda decoder: Auto(),
    "auto from 2": lambda decoder: Auto(tokens=5, exit=2),
    "restless": lambda decoder: Restless(tokens=6),
    "cascade": lambda decoder: Cascade(Lookup(tokens=5), EarlyExit(2, tokens=3)),
    "gain": lambda decoder: EarlyExit(2, tokens=7, length="gain"),
    "thompson": lambda decoder: EarlyExit(3, tokens=7, length="thompson"),
    "gain assistant": lambda decoder: Assistant(decoder, tokens=7, length="gain"),
}
DRAWN = ("cascade", "gain", "thompson", "gain assistant")  # sampled text repeats in law only


@pytest.fixture(params=MAKE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_greedy_text_is_that_of_transformers(
    kind: str, name: str, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    target = target_of(name, prompts=PROMPTS)
    drafter = MAKE[kind](target.decoder)  # one for all: it goes on learning
    eos = [target.text(PROMPTS[0], N)[7], target.text(PROMPTS[2], N)[12]]
    drafted = 0
    for rows in (1, 3, 8, 1):
        requests = [Request(ids, N - i, eos=eos) for i, ids in enumerate(PROMPTS[:rows])]
        run = generate(target.decoder, requests, drafter=drafter)
        assert run.texts == [target.text(r.ids, N, eos=eos)[: r.max_tokens] for r in requests]
        assert all(len(r.drafted) <= drafter.tokens for rounds in run.rounds for r in rounds)
        drafted += run.drafted
    assert drafted > 0


@pytest.mark.parametrize("kind", ["auto", "auto from 2", "restless"])
def test_seeded_text_is_that_of_plain_decoding(
    kind: str, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    """Its choices depend on the clock, and the text on the seed alone: alone, side by side, again."""
    target = target_of("llama", prompts=PROMPTS)
    requests = [Request(ids, N, sampling=replace(ROUGH, seed=7 + i)) for i, ids in enumerate(PROMPTS[:5])]
    plain = generate(target.decoder, requests).texts
    drafter, drafted, accepted = MAKE[kind](target.decoder), 0, 0
    for chosen in (requests, requests[::-1], requests[:1], requests):
        run = generate(target.decoder, chosen, drafter=drafter)
        assert run.texts == [plain[requests.index(r)] for r in chosen]
        drafted, accepted = drafted + run.drafted, accepted + run.accepted
    if kind == "restless":
        assert 0 < accepted < drafted


def test_an_exit_that_is_the_target_has_all_its_sampled_tokens_kept(
    tiny: Callable[..., Any], decoder_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    """Its draws are by the target's own numbers, so equal laws draw equal tokens."""
    decoder = decoder_of(tiny("llama", double=True, vocab_size=V, agree=0.0))
    requests = [Request(ids, 40, sampling=replace(ROUGH, seed=i)) for i, ids in enumerate(PROMPTS[:3])]
    run = generate(decoder, requests, drafter=Auto(exit=2, lookup=False))
    assert run.accepted == run.drafted > 0


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_drafts_serve_every_setting(kind: str, target_of: Callable[..., Any], generate: Any) -> None:
    target = target_of("llama", prompts=PROMPTS)
    requests = [Request(ids, N, sampling=replace(ROUGH, seed=i)) for i, ids in enumerate(PROMPTS)]
    run = generate(target.decoder, requests, drafter=MAKE[kind](target.decoder))
    assert [len(text) for text in run.texts] == [N] * len(PROMPTS)
    assert run.accepted > 0


def test_a_lossy_target_and_a_model_without_exits_are_served(
    target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    decoder = target_of("llama", prompts=PROMPTS).decoder
    drafter = Auto(exit=3)
    for exit in (1, 2, 3):
        requests = [Request(ids, N) for ids in PROMPTS[:3]]
        plain = generate(decoder, requests, exit=exit)
        assert generate(decoder, requests, exit=exit, drafter=drafter).texts == plain.texts
    assert not any(name.startswith("early-exit:3") for name in drafter.counts)


class Seen(Restless):
    """Remembers which exits said what the text turned out to be."""

    def observe(self, rows: Rows, draft: Any, outcome: Outcome) -> None:
        if isinstance(draft, AutoDraft):
            for exit, tokens in draft.seen.items():
                for said, text, accepted in zip(tokens, outcome.emitted, outcome.accepted, strict=True):
                    assert len(said) == draft.tokens.shape[1] + 1 >= len(text)
                    self.told.append((exit, draft.decision.exit, said[: accepted + 1], text))
        super().observe(rows, draft, outcome)

    told: list[tuple[int, int, list[int], list[int]]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=4)], ids=["greedy", "sampled"])
def test_what_an_exit_is_seen_to_say_is_what_it_would_draft(
    sampling: Sampling, target_of: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    """Above and below the exit that drafts, and in plain rounds; compared with drafts of that exit along the text."""
    decoder = target_of("llama", prompts=PROMPTS).decoder
    drafter = Seen(tokens=4, lookup=False)
    drafter.told = []
    text = generate(decoder, [Request(PROMPTS[0], N, sampling=sampling)], drafter=drafter).texts[0]
    with torch.inference_mode():
        ids = torch.tensor([[*PROMPTS[0], *text]])
        at, hidden = torch.arange(ids.shape[1])[None], decoder.embed(ids)
        cache = decoder.cache(rows=1, slots=ids.shape[1])
        law = Law([sampling], V, ids=[PROMPTS[0]])
        numbers = uniform(torch.tensor([sampling.seed or 0]), at + 1, Purpose.TOKEN)
        drawn = {}
        for exit in (1, 2, 3):
            hidden = decoder.run(hidden, at, cache, exit - 1, exit)
            chain = ids[:, 1:], torch.ones(ids.shape[1], ids.shape[1] - 1, dtype=torch.bool).tril(-1)
            drawn[exit] = draw(law(decoder.logits(hidden), *chain), numbers)[0].tolist()
    where, pairs = len(PROMPTS[0]) - 1, set()
    begins = 0
    for exit, used, said, emitted in drafter.told:
        begins = next(i for i in range(begins, len(text)) if text[i : i + len(emitted)] == emitted)
        pairs.add((exit, used))
        along = said[: len(emitted)]
        assert along == drawn[exit][where + begins :][: len(along)]
    assert {exit < used for exit, used in pairs if used} == {True, False}
    assert any(used == 0 for _, used in pairs)


# -- what is chosen


class Clock:
    """A second for every layer and head that runs, whatever it runs on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, *ignored: object) -> None:
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def models(tiny: Callable[..., Any], decoder_of: Callable[..., Any], clock: Clock) -> tuple[Decoder, Decoder]:
    """Two models of one shape, 8 layers: in one the exits never agree with the last layer, in the other always from
    exit 2 on."""
    found = []
    for agree in (6.0, 0.0):
        decoder = decoder_of(tiny("llama", double=True, num_hidden_layers=8, vocab_size=64, agree=agree))
        for layer in (*decoder.layers, decoder.head):
            layer.register_forward_hook(clock.tick)
        found.append(decoder)
    return found[0], found[1]


def test_it_gives_up_comes_back_and_says_so(
    models: tuple[Decoder, Decoder], clock: Clock, generate: Callable[..., Any]
) -> None:
    never, always = models
    drafter = Auto(exit=2, lookup=False, clock=clock)

    def decode(decoder: Decoder, times: int = 3) -> dict[str, int]:
        before = {name: count.rounds for name, count in drafter.counts.items()}
        for prompt in (PROMPTS * 2)[:times]:
            generate(decoder, [Request(prompt, 60)], drafter=drafter)
        return {name: count.rounds - before.get(name, 0) for name, count in drafter.counts.items()}

    hostile = decode(never, 5)
    assert hostile["plain"] > 0.7 * sum(hostile.values()), hostile
    assert drafter.choice == "plain"
    assert "auto: plain in " in drafter.line()
    decode(always, 6)
    friendly = decode(always, 2)
    assert friendly.get("plain", 0) <= 6, friendly  # the last token of a text is never drafted for
    assert drafter.record()["rounds"]["early-exit:2"]["drafted"] > 0
    decode(never, 3)
    assert decode(never, 2)["plain"] > 80


def test_it_is_faster_than_plain_decoding_where_exits_agree(
    models: tuple[Decoder, Decoder], clock: Clock, generate: Callable[..., Any]
) -> None:
    always = models[1]
    drafter = Auto(lookup=False, clock=clock)
    for prompt in PROMPTS[:6]:
        generate(always, [Request(prompt, 60)], drafter=drafter)
    began = clock.now
    plain = generate(always, [Request(PROMPTS[0], 60)])
    took, began = clock.now - began, clock.now
    auto = generate(always, [Request(PROMPTS[0], 60)], drafter=drafter)
    assert auto.texts == plain.texts
    assert clock.now - began < 0.55 * took  # exit 2 of 8: at best (3 k + 9) / (k + 1) of 9
    assert "early-exit:2" in drafter.choice or drafter.choice == "plain"


def test_overhead_is_counted_and_bounded(
    models: tuple[Decoder, Decoder], clock: Clock, generate: Callable[..., Any]
) -> None:
    for decoder in models:
        drafter = Auto(lookup=False, clock=clock)
        for prompt in PROMPTS[:4]:
            generate(decoder, [Request(prompt, 60)], drafter=drafter)
        assert 0 < drafter.overhead_seconds < 0.035 * drafter.seconds
        assert drafter.record()["overhead_seconds"] == drafter.overhead_seconds


def test_copies_are_used_where_the_text_repeats_itself(clock: Clock, models: Any, generate: Callable[..., Any]) -> None:
    """An exit that is never wrong would be slower than copies, which take no pass."""
    request = Request(PROMPTS[5], 80)  # goes on with the same token for ever
    drafter = Auto(clock=clock)
    for each in (drafter, Cascade(Lookup(), EarlyExit(2))):
        run = generate(models[1], [request], drafter=each)
        assert run.texts == generate(models[1], [request]).texts
        copied = sum(len(done.drafted) for rounds in run.rounds for done in rounds if done.seconds.draft < 2)
        assert copied > 50
        assert run.accepted > 60
    assert drafter.counts["lookup"].drafted > 50


# -- sharing, and what is refused


class Rounds:
    """A cascade that is told what its rounds took; each has 8 tokens to copy."""

    def __init__(self) -> None:
        self.cascade, self.found = Cascade(Lookup(), EarlyExit(2)), [Copy([7] * 8, 3)]

    def copies(self) -> bool:
        return self.cascade._pays(self.found)

    def copied(self, seconds: float, kept: int) -> None:
        self._done(CascadeDraft(torch.zeros(1, 8, dtype=torch.long), found=self.found, copies=True), seconds, kept)

    def drawn(self, seconds: float) -> None:
        self._done(CascadeDraft(torch.zeros(1, 4, dtype=torch.long), found=self.found), seconds, 0)

    def _done(self, draft: CascadeDraft, seconds: float, kept: int) -> None:
        none = torch.zeros(1, 1, 1)
        text = [[7] * kept + [8]]
        self.cascade.observe(Any, draft, Outcome(none, none, [kept], [[*range(kept)]], text, 0.0, seconds))  # type: ignore[arg-type]


def test_copies_do_not_go_on_before_the_exit_was_tried() -> None:
    """Copies that never match would be all that there ever is."""
    rounds = Rounds()
    assert rounds.copies()
    rounds.copied(0.015, kept=0)
    assert not rounds.copies()  # the exit's turn
    rounds.drawn(0.01)
    while rounds.copies():
        rounds.copied(0.015, kept=0)
        assert rounds.cascade._copy[1].count < 9
    assert rounds.cascade._copy[1].known


def test_one_slow_copy_does_not_end_copying() -> None:
    rounds = Rounds()
    rounds.copied(0.15, kept=8)
    rounds.drawn(0.01)
    for _ in range(20):
        assert rounds.copies()
        rounds.copied(0.012, kept=8)


def test_one_serves_threads(target_of: Callable[..., Any], generate: Callable[..., Any]) -> None:
    target = target_of("llama", prompts=PROMPTS)
    drafter, texts = Auto(exit=2), dict[int, Any]()

    def decode(i: int) -> None:
        texts[i] = generate(target.decoder, [Request(PROMPTS[i], N)], drafter=drafter).texts[0]

    threads = [Thread(target=decode, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: target.text(PROMPTS[i], N) for i in range(4)}


def test_rows_that_leave_are_forgotten(target_of: Callable[..., Any]) -> None:
    decoder = target_of("llama", prompts=PROMPTS).decoder
    narrow = Auto(exit=2, vocabulary=9)
    for drafter in (Auto(), narrow, Cascade(Lookup(), EarlyExit(2))):
        batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=16)), drafter=drafter)
        batch.join([Request(ids, N) for ids in PROMPTS[:3]])
        batch.round()
        lookup = drafter.lookup if isinstance(drafter, Cascade) else drafter._copies and drafter._copies.lookup
        assert lookup is not None
        assert len(lookup._contexts) == 3
        assert isinstance(drafter, Cascade) or drafter._heads is None or len(drafter._heads._seen) == 3  # type: ignore[union-attr]
        batch.close()
        assert not lookup._contexts
    assert not narrow._heads._seen  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Auto(tokens=0), "drafting 0 tokens a round is not possible"),
        (lambda: Auto(exit=0), "draft exit 0 is not possible; use 1 or more layers"),
        (lambda: Auto(exit=True), "draft exit True is not possible; use a whole number"),
        (lambda: Auto(guesses={2: 1.5}), "acceptance 1.5 of exit 2 is not possible; use 0 to 1"),
        (lambda: EarlyExit(2, length="auto"), "unknown draft length 'auto'; use fixed, thompson, gain"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cascade_refuses_what_its_parts_refuse(target_of: Callable[..., Any]) -> None:
    decoder = target_of("llama", prompts=PROMPTS).decoder
    with pytest.raises(RequestError, match="not below the 4 layers"):
        Batch(decoder, Pool(decoder.cache(rows=1, slots=8)), drafter=Cascade(Lookup(), EarlyExit(4)))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        Batch(decoder, Pool(decoder.cache(rows=1, slots=8)), drafter=Cascade(Lookup(predicted=[V]), EarlyExit(2)))
