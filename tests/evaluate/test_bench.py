"""The benchmark counts what was emitted, compares within repeats, and says what it cannot measure."""

import doctest
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip import LLM, EarlyExit, Lookup
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.errors import CapacityError, RequestError
from layerskip.evaluate import contest as contest_module
from layerskip.evaluate.bench import Ours, bench, cells
from layerskip.evaluate.cell import PARTS, Contender, Measured, cell
from layerskip.evaluate.contest import PLAIN, Contest, Settings, Step, Texts, measured
from layerskip.evaluate.prompts import encode_prompts
from layerskip.evaluate.ticks import Tick
from layerskip.evaluate.ways import Way
from layerskip.model import cache as cache_module
from layerskip.model.decoder import Decoder

PROMPTS = ("the cat sat on the mat and the dog ran", "the", "the dog ran to the cat", "a", "the cat", "mat and dog")


class Script:
    """Drafts the plain continuation it was told, every third token of it wrong: a drafter made by hand."""

    name, tokens = "script", 5

    def __init__(self, known: dict[tuple[int, ...], list[int]]) -> None:
        self.known = known
        self.emitted = 0

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Any model will do."""

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Rows near the end of their script draft less."""
        drafts = []
        for ids, start in zip(rows.ids, rows.starts, strict=True):
            done = len(ids) - start
            told = self.known[tuple(ids[:start])][done : done + tokens]
            drafts.append([token if (done + i) % 3 else token ^ 1 for i, token in enumerate(told)])
        width = max(map(len, drafts))
        padded = torch.tensor([d + [0] * (width - len(d)) for d in drafts], dtype=torch.long)
        return Draft(padded, lengths=torch.tensor([len(d) for d in drafts]))

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Counts what the loop says was emitted, stop strings aside."""
        self.emitted += sum(map(len, outcome.emitted))

    def leave(self, key: int) -> None:
        """It keeps nothing."""


@pytest.fixture
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")


def alone(llm: LLM, **settings: Any) -> list[list[int]]:
    """What plain decoding emits for each prompt by itself."""
    completions = [llm.generate(prompt, **settings) for prompt in PROMPTS]
    return [completion.tokens for completion in completions]  # type: ignore[union-attr]


def script(llm: LLM, *, max_tokens: int) -> Script:
    texts = alone(llm, max_tokens=max_tokens, ignore_eos=True)
    return Script({tuple(llm.encode(prompt)): text for prompt, text in zip(PROMPTS, texts, strict=True)})


def run_contest(llm: LLM, ways: Sequence[Way], settings: Settings, *, repeats: int = 1) -> list[dict[str, Measured]]:
    runners = [Ours(llm, way) for way in ways]
    contest = Contest(runners, encode_prompts(llm, PROMPTS), settings=settings, device=llm.decoder.device)
    return [contest.repeat(number) for number in range(repeats)]


@pytest.mark.parametrize(
    ("batch", "end"), [(1, "length"), (1, "stop"), (4, "length"), (4, "eos"), (4, "ignored eos"), (4, "stop")]
)
def test_tokens_counted_are_tokens_emitted(llm: LLM, batch: int, end: str) -> None:
    drafter = script(llm, max_tokens=14)
    long = alone(llm, max_tokens=14, ignore_eos=True)
    settings = Settings(batch, 14)
    if "eos" in end:
        llm.eos = (long[0][7], long[2][11])
        settings = replace(settings, ignore_eos=end == "ignored eos")
    if end == "stop":
        text = str(llm.tokenizer.decode(long[0][:9]))
        settings = replace(settings, stop=(text[-3:],))
    wanted = alone(llm, max_tokens=14, ignore_eos=settings.ignore_eos, stop=settings.stop)
    sizes = [len(tokens) for tokens in wanted]
    assert (sizes == [14] * 6) == (end in ("length", "ignored eos"))  # else some end sooner: the batch is ragged
    ways = [Way(PLAIN), Way("script", drafter), Way("early", EarlyExit(1, tokens=3)), Way("lookup", Lookup())]
    runners = [Ours(llm, way) for way in ways]
    for runner in runners:
        assert runner.run([llm.encode(prompt) for prompt in PROMPTS], settings).tokens == wanted
    [runs] = run_contest(llm, ways, settings)
    for name, run in runs.items():
        assert run.tokens == run.decode_tokens == sum(sizes)
        if name != PLAIN:
            assert run.acceptance is not None
            assert run.acceptance["num_emitted_tokens"] == sum(sizes)
            assert run.differs_at == [None] * 6
    assert runs["script"].acceptance["num_accepted_draft_tokens"] > 0  # type: ignore[index]


def test_a_drafter_is_counted_as_the_loop_counts_it(llm: LLM) -> None:
    drafter = script(llm, max_tokens=24)
    texts = Ours(llm, Way("script", drafter)).run([llm.encode(prompt) for prompt in PROMPTS], Settings(3, 24))
    # in a round without room for a draft nothing is observed
    undrafted = sum(sum(tick.gained.values()) for tick in texts.ticks if not tick.drafted)
    assert drafter.emitted + undrafted == sum(map(len, texts.tokens))
    assert texts.counts is not None
    assert texts.counts.rounds == sum(len(tick.gained) for tick in texts.ticks)
    assert texts.weights_read is None  # nobody knows what a drafter of somebody else reads
    gained: dict[int, int] = {}
    for tick in texts.ticks:
        assert len(tick.gained) == min(3, 6 - len([i for i in gained if gained[i] == len(texts.tokens[i])]))
        for index, tokens in tick.gained.items():
            assert (index in tick.new) == (index not in gained)
            gained[index] = gained.get(index, 0) + tokens
    assert [gained[i] for i in range(6)] == [len(tokens) for tokens in texts.tokens]


def test_cells_of_real_runs(llm: LLM) -> None:
    steps: list[Step] = []
    early = EarlyExit(2, tokens=3)
    ways = [Way("early-exit:2 K=3", early), Way("lookup K=8", Lookup())]
    found = bench(llm, PROMPTS, ways, batch=2, repeat=2, max_tokens=12, ignore_eos=True, see=steps.append)
    assert [each.name for each in found] == [PLAIN, "early-exit:2 K=3", "lookup K=8"]
    # a warm-up, then turns: who was first comes last
    names = [each.name for each in found]
    assert [(step.repeat, step.name) for step in steps] == [
        *((0, name) for name in names),
        *((1, name) for name in names),
        *((2, name) for name in [*names[1:], names[0]]),
    ]
    plain, drafted, copied = found
    assert {each.tokens for each in found} == {6 * 12}
    assert (plain.speedup, plain.identical, plain.acceptance) == (None, None, None)
    assert (drafted.identical, drafted.who.exit, drafted.who.draft_tokens) == (True, 2, 3)
    assert (copied.identical, copied.who.exit, copied.who.draft_tokens) == (True, None, 8)
    for each in found:
        assert each.seconds is not None
        rate = each.tokens_per_second["end_to_end"]
        assert rate is not None
        for number, tokens_per_second in enumerate(rate.runs):
            # the parts are all of the time
            whole = sum(each.seconds[part].runs[number] for part in PARTS)
            assert whole == pytest.approx(each.tokens / tokens_per_second)
            rounds = sum(each.seconds[part].runs[number] for part in ("draft", "verify", "rest"))
            assert rounds == pytest.approx(each.tokens / each.tokens_per_second["decode"].runs[number])  # type: ignore[union-attr]
        record = json.loads(json.dumps(each.record(), allow_nan=False))
        assert ("speedup" in record) == (each is not plain)
        assert (record["name"], record["mode"], record["batch"]) == (each.name, "exact", 2)
    assert drafted.speedup is not None
    for name in ("decode", "end_to_end"):
        mine, its = drafted.tokens_per_second[name], plain.tokens_per_second[name]
        assert mine is not None
        assert its is not None
        assert drafted.speedup[name].runs == pytest.approx([a / b for a, b in zip(mine.runs, its.runs, strict=True)])  # type: ignore[union-attr]
    assert drafted.bandwidth_share is None  # nobody measured what the machine can do


RUN = Measured(10, None, 10, 2.0, 4.0, 0.1, (0.1, 0.2), (0.1, 0.3), dict.fromkeys(PARTS, 0.8), None, 1000, 7)


def test_speedups_are_paired_within_each_repeat() -> None:
    plain = [RUN, replace(RUN, decode_seconds=4.0), replace(RUN, decode_seconds=1.0)]
    other = [replace(RUN, decode_seconds=s, differs_at=[None, 3]) for s in (1.0, 1.0, 1.0)]
    [one, two] = cells(
        [Contender(PLAIN), Contender("x", exit=2)],
        [{PLAIN: a, "x": b} for a, b in zip(plain, other, strict=True)],
        batch=4,
        bandwidth=2000.0,
    )
    assert two.speedup is not None
    assert two.speedup["decode"].runs == (2.0, 4.0, 1.0)  # type: ignore[union-attr]
    assert two.speedup["decode"].median == 2.0  # type: ignore[union-attr]  # the medians of the rates are even
    assert (two.identical, two.differs_at) == (False, [None, 3])
    assert one.weights_read_per_second is not None
    assert one.weights_read_per_second.runs == (500.0, 250.0, 1000.0)
    assert one.bandwidth_share is not None
    assert one.bandwidth_share.runs == (0.25, 0.125, 0.5)


def test_one_repeat_that_differs_is_told() -> None:
    same, other = replace(RUN, differs_at=[None]), replace(RUN, differs_at=[4], peak_memory=None)
    found = cell(Contender("x"), [same, other], batch=1, plain=[RUN, RUN])
    assert (found.identical, found.differs_at, found.peak_memory) == (False, [4], 7)


def test_a_peer_decodes_from_its_first_token_on() -> None:
    ticks = [
        Tick(0.0, 1.0, {0: 1, 1: 1}, frozenset({0, 1})),
        Tick(1.0, 1.5, {0: 1, 1: 1}, frozenset()),
        Tick(1.5, 1.75, {1: 1}, frozenset()),
    ]
    found = measured(Texts([[5, 6], [7, 8, 9]], ticks, 1.75), plain=[[5, 6], [7, 8, 1]])
    assert (found.tokens, found.decode_tokens, found.decode_seconds, found.first_token) == (5, 3, 0.75, 1.0)
    assert found.rates == {"decode": 4.0, "end_to_end": 5 / 1.75}
    assert (found.differs_at, found.parts, found.weights_read) == ([None, 2], None, None)
    first = measured(Texts([[5], [7]], ticks[:1], 1.0), plain=None)
    assert (first.rates["decode"], first.token_latency, first.round_latency) == (None, None, None)
    only = cell(Contender("x", peer=True), [first], batch=1, plain=[RUN])
    assert (only.tokens_per_second["decode"], only.token_latency) == (None, None)
    json.dumps(only.record(), allow_nan=False)


def test_seconds_beyond_a_round_are_prompts_or_text() -> None:
    ticks = [
        Tick(0.0, 1.0, {0: 1}, frozenset({0}), cost=(0.1, 0.2, 0.1)),
        Tick(1.0, 1.5, {0: 2}, frozenset(), cost=(0.1, 0.3, 0.0)),
        Tick(1.5, 2.5, {0: 1, 1: 1}, frozenset({1}), cost=(0.2, 0.3, 0.0)),
    ]
    found = measured(Texts([[1, 2, 3, 4], [5]], ticks, 2.75), plain=None)
    assert found.parts == pytest.approx({"prompt": 1.1, "draft": 0.4, "verify": 0.8, "rest": 0.1, "text": 0.35})
    assert found.decode_seconds == pytest.approx(1.3)
    assert (found.first_token, found.token_latency) == (1.0, pytest.approx((0.25, 0.925)))


def test_fewer_rows_than_asked_for_is_no_measurement(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = llm.decoder.shape.cache_bytes(1, 130, llm.decoder.dtype.itemsize)
    monkeypatch.setattr(cache_module, "free_bytes", lambda device: 2 * rows)
    with pytest.raises(CapacityError, match=r"^batch 6 does not fit in memory: \d rows? decoded side by side; use --b"):
        bench(llm, PROMPTS, [], batch=6, repeat=1, max_tokens=100, ignore_eos=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 7}, r"^batch 7 needs as many prompts, and there are 6; use a batch of at most 6, or more prompts$"),
        ({"batch": 0}, r"^batch 0 is not possible; use 1 or more$"),
        ({"repeat": 0}, r"^repeat 0 is not possible; use 1 or more$"),
        ({"max_tokens": 0}, r"^max_tokens 0 is not possible; use 1 or more$"),
        ({"prompts": []}, r"^no prompts; give at least one$"),
        (
            {"prompts": ["a", "q" * 300]},
            r"^prompt 2 of 2: the prompt has 301 tokens; this model's context holds 256, so use at",
        ),
        ({"prompts": ["a", "\ud800"]}, r"^prompt 2 of 2: the prompt is not valid text"),
        ({"ways": [Way("x", Lookup()), Way("x", Lookup())]}, r"^x is asked for twice; leave one of them out$"),
        ({"ways": [Way("x", EarlyExit(4))]}, r"^draft exit 4 is not below the 4 layers the model decodes with"),
        ({"ways": [Way(PLAIN, Lookup())]}, r"^'plain' is not possible: plain decoding, and nothing else, is called"),
        ({"ways": [Way("x", None)]}, r"^'x' is not possible: plain decoding, and nothing else, is called 'plain'$"),
    ],
)
def test_what_cannot_be_measured_is_refused(llm: LLM, settings: dict[str, Any], message: str) -> None:
    def never(step: Step) -> None:
        raise AssertionError(step)

    given: dict[str, Any] = {"prompts": PROMPTS, "ways": [], "batch": 1, "repeat": 1, "max_tokens": 4, **settings}
    with pytest.raises(RequestError, match=message):
        bench(llm, given.pop("prompts"), given.pop("ways"), **given, see=never)


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(contest_module) == doctest.TestResults(failed=0, attempted=1)
