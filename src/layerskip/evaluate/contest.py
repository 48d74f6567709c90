"""Ways of decoding that run in turns over the same prompts, in one process.

Every repeat runs each way once, over all prompts; who begins moves on by one from repeat to repeat, so that nobody
always has the quiet or the warm moment. Knows whom to run when, and what to measure of it. Does not know who decodes,
nor files.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from layerskip.decode.acceptance import Acceptance
from layerskip.errors import RequestError, check_whole
from layerskip.evaluate.cell import Contender, Measured
from layerskip.evaluate.memory import HighWater
from layerskip.evaluate.quality import drafted_record
from layerskip.evaluate.ticks import Tick, first_tokens, percentiles, round_latencies, token_latencies

PLAIN = "plain"
"""The name of plain decoding, which everything is compared with."""


@dataclass(frozen=True)
class Settings:
    """What all ways have in common.

    Args:
        batch: rows that decode side by side.
        max_tokens: tokens of each completion at most.
        stop: strings that end a completion.
        ignore_eos: go on after end of sequence, so that every completion has `max_tokens` where the context allows it.

    Raises:
        RequestError: a number below 1.
    """

    batch: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("max_tokens", self.max_tokens)):
            at_least_one(name, value)


@dataclass(frozen=True)
class Texts:
    """What a way of decoding made of all prompts.

    Args:
        tokens: the ids that each completion emitted, in the order of the prompts.
        ticks: its rounds; a peer's steps.
        total: seconds from the first call to the last token.
        counts: of its drafts; None where nothing of ours drafts.
        weights_read: bytes read in the rounds; None where that is not known.
    """

    tokens: list[list[int]]
    ticks: list[Tick]
    total: float
    counts: Acceptance | None = None
    weights_read: int | None = None


class Runner(Protocol):
    """Who decodes."""

    @property
    def who(self) -> Contender:
        """What reports say of it."""
        ...

    def check(self, prompts: Sequence[Sequence[int]], settings: Settings) -> None:
        """Raises RequestError where it cannot decode these prompts."""
        ...

    def run(self, prompts: Sequence[Sequence[int]], settings: Settings) -> Texts:
        """Decodes all prompts greedily, with nothing cached from before.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            CapacityError: so many rows do not fit in memory side by side.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What is about to run.

    Args:
        name: of the way.
        batch: rows side by side.
        repeat: from 1; 0 is the warm-up.
    """

    name: str
    batch: int
    repeat: int


class Contest:
    """Runners over the same prompts with the same settings.

    Args:
        runners: plain decoding among them.
        prompts: ids.
        settings: what all have in common.
        device: where the model is: whose memory is watched.
        see: called before each run.

    Raises:
        RequestError: fewer prompts than rows, two runners of the same name, or what a runner cannot decode.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        prompts: Sequence[Sequence[int]],
        *,
        settings: Settings,
        device: torch.device,
        see: Callable[[Step], None] | None = None,
    ) -> None:
        self.prompts, self.settings = prompts, settings
        self._runners = {runner.who.name: runner for runner in runners}
        self._see = see or (lambda step: None)
        names = [runner.who.name for runner in runners]
        for name in self._runners:
            if names.count(name) > 1:
                raise RequestError(f"{name} is asked for twice; leave one of them out")
        if len(prompts) < settings.batch:
            raise RequestError(
                f"batch {settings.batch} needs as many prompts, and there {_are(len(prompts))}; use a batch of at most "
                f"{len(prompts)}, or more prompts"
            )
        for runner in runners:
            runner.check(prompts, settings)
        self._memory = HighWater(device)

    @property
    def who(self) -> list[Contender]:
        """Everybody, in order."""
        return [runner.who for runner in self._runners.values()]

    def warm_up(self) -> None:
        """Runs everybody over the first `batch` prompts, unmeasured: none pays for the first use of anything."""
        for name, runner in self._runners.items():
            self._see(Step(name, self.settings.batch, 0))
            runner.run(self.prompts[: self.settings.batch], self.settings)

    def repeat(self, number: int) -> dict[str, Measured]:
        """Runs everybody once over all prompts.

        Args:
            number: of the repeat, from 0: says who begins.

        Returns:
            By name.

        Raises:
            KeyboardInterrupt: Ctrl-C; this repeat is lost.
            CapacityError: so many rows do not fit in memory side by side.
            NumericalError: the model's logits are not finite.
        """
        names = list(self._runners)
        turn = number % len(names)
        found: dict[str, tuple[Texts, int | None]] = {}
        gc.collect()
        gc.freeze()  # what is there by now is not looked through again before every run
        try:
            for name in names[turn:] + names[:turn]:
                self._see(Step(name, self.settings.batch, number + 1))
                gc.collect()  # what the one before left behind is no cost of the next
                self._memory.reset()
                texts = self._runners[name].run(self.prompts, self.settings)
                found[name] = texts, self._memory.peak()
        finally:
            gc.unfreeze()
        plain = found[PLAIN][0].tokens
        return {
            name: measured(found[name][0], plain=None if name == PLAIN else plain, peak_memory=found[name][1])
            for name in names
        }


def measured(texts: Texts, *, plain: Sequence[Sequence[int]] | None, peak_memory: int | None = None) -> Measured:
    """The figures of one run.

    Args:
        texts: what was decoded.
        plain: the tokens of plain decoding in the same repeat; None where this is plain decoding.
        peak_memory: bytes.
    """
    ticks = texts.ticks
    costs = [tick.cost for tick in ticks if tick.cost is not None]
    ours = len(costs) == len(ticks)
    # a peer's first step runs the prompt and gives a token: what it decodes is counted from there on
    counted = ticks if ours else [tick for tick in ticks if not tick.new]
    seconds = sum(map(sum, costs)) if ours else sum(tick.gap for tick in counted)
    starts = first_tokens(ticks)
    return Measured(
        tokens=sum(map(len, texts.tokens)),
        differs_at=None if plain is None else [*map(first_difference, texts.tokens, plain)],
        decode_tokens=sum(sum(tick.gained.values()) for tick in counted),
        decode_seconds=seconds,
        total_seconds=texts.total,
        first_token=statistics.median(starts),
        token_latency=percentiles(token_latencies(ticks)),
        round_latency=percentiles(round_latencies(ticks)),
        parts=_parts(ticks, costs, total=texts.total) if ours else None,
        acceptance=None if texts.counts is None else drafted_record(texts.counts),
        weights_read=texts.weights_read,
        peak_memory=peak_memory,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place in which two sequences differ, their ends included; None where they are equal.

    Example:
        >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1], [1, 2]), first_difference([1], [1])
        (1, 1, None)
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def at_least_one(name: str, value: object) -> int:
    """A whole number from 1 on. Raises RequestError for everything else."""
    check_whole(name, value)
    assert isinstance(value, int)
    if value < 1:
        raise RequestError(f"{name} {value} is not possible; use 1 or more")
    return value


def _parts(ticks: Sequence[Tick], costs: Sequence[tuple[float, float, float]], *, total: float) -> dict[str, float]:
    """All seconds of a run: what a gap holds beyond its round is the prompts that joined, or else work on text."""
    draft, verify, rest = (sum(cost[i] for cost in costs) for i in range(3))
    prompt = sum(tick.gap - sum(cost) for tick, cost in zip(ticks, costs, strict=True) if tick.new)
    text = total - draft - verify - rest - prompt
    return {"prompt": prompt, "draft": draft, "verify": verify, "rest": rest, "text": text}


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
