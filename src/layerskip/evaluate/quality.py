"""How good the texts of a checkpoint are: plainly decoded, at early exits, and drafted.

Knows tasks and completions. Does not know what a task is about, nor files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.draft import Drafter
from layerskip.errors import RequestError
from layerskip.evaluate.follow import Run, follow, fresh
from layerskip.evaluate.tasks import Task
from layerskip.llm import LLM, Completion

ALL = "all"
"""The group that every item belongs to."""


@dataclass(frozen=True)
class Score:
    """The mean of a metric.

    Args:
        mean: over the items.
        error: its standard error, s / sqrt(count) with s the sample's standard deviation; None for a single item.
        count: items.
    """

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """The score of at least one value.

        Example:
            >>> Score.of([1.0, 0.0, 1.0, 1.0])
            Score(mean=0.75, error=0.25, count=4)
        """
        count = len(values)
        error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
        return cls(statistics.fmean(values), error, count)


@dataclass(frozen=True)
class Result:
    """What one way of decoding made of a task.

    Args:
        name: "plain", "exit E", or the drafter, such as "early-exit:3 K=4".
        exit: layers that decide.
        completions: one for each item, in order.
        scores: by group, "all" among them, and by metric.
        seconds: from the first prompt to the last token.
        acceptance: counts over all rounds, with the seconds of the rounds; None where nothing drafts.
        identical: items whose tokens are those of plain decoding; None for plain decoding, and where that was not run.
    """

    name: str
    exit: int
    completions: Sequence[Completion]
    scores: Mapping[str, Mapping[str, Score]]
    seconds: float
    acceptance: Acceptance | None
    identical: int | None

    @property
    def mode(self) -> str:
        """exact or lossy."""
        return self.completions[0].mode

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(len(completion.tokens) for completion in self.completions)

    def record(self) -> dict[str, Any]:
        """The same for JSON, without the texts."""
        return {
            "name": self.name,
            "mode": self.mode,
            "exit": self.exit,
            "scores": {
                group: {metric: vars(score) for metric, score in scores.items()}
                for group, scores in self.scores.items()
            },
            "tokens": self.tokens,
            "seconds": self.seconds,
            "identical": self.identical,
            "acceptance": None if self.acceptance is None else drafted_record(self.acceptance),
        }


@dataclass(frozen=True)
class Quality:
    """A task, done in one way or several."""

    task: Task
    results: Sequence[Result]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "task": self.task.name,
            "items": len(self.task.items),
            "results": [result.record() for result in self.results],
        }


def drafted_record(counts: Acceptance) -> dict[str, Any]:
    """Counts of a drafter for JSON, with tokens per round in both meanings: 1 + accepted / rounds, and emitted /
    rounds, which is less where the end of a text cut its last round."""
    return {**counts.as_dict(), "emitted_per_round": counts.emitted / counts.rounds if counts.rounds else 0.0}


def evaluate(
    llm: LLM,
    task: Task,
    *,
    plain: bool = True,
    exits: Sequence[int] | None = None,
    draft: Drafter | None = None,
    batch: int | None = None,
) -> Quality:
    """Generates greedily for every item, and scores the texts.

    The order of the items does not change: prompts are only run longest first, so that those that share a batch are of
    similar length. Every way of decoding begins with an empty cache, on the same weights.

    Args:
        llm: the model.
        task: what it shall do.
        plain: decode plainly, as what the others are compared with.
        exits: also at these exits, without the layers above: lossy.
        draft: also with this drafter: exact.
        batch: rows that decode side by side; None is the model's own.

    Returns:
        Results in this order: plain, each exit, drafted.

    Raises:
        RequestError: an exit or a drafter that cannot serve the model, a prompt that does not fit it, or nothing to do.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
    """
    layers = llm.decoder.shape.layers
    ways: list[tuple[str, int | None, Drafter | None]] = [("plain", None, None)] if plain else []
    ways += [(f"exit {exit}", exit, None) for exit in exits or ()]
    if draft is not None:
        ways.append((drafter_name(draft), None, draft))
    if not ways:
        raise RequestError("nothing to evaluate: no plain decoding, no exits and no drafter; ask for one of them")
    for _, exit, drafter in ways:
        if exit is not None and not 1 <= exit <= layers:
            raise RequestError(f"exit {exit} is not inside this {layers}-layer model; use 1..{layers}")
        if drafter is not None:
            drafter.check(llm.decoder, exit=layers)
    prompts = encoded(llm, task)
    results: list[Result] = []
    for name, exit, drafter in ways:
        run = _run(fresh(llm, batch=batch), task, prompts, exit=exit, draft=drafter)
        same = _same(run.completions, results[0].completions) if plain and results else None
        results.append(
            Result(
                name=name,
                exit=layers if exit is None else exit,
                completions=run.completions,
                scores=score(task, [completion.text for completion in run.completions]),
                seconds=run.total,
                acceptance=None if drafter is None else run.acceptance,
                identical=same,
            )
        )
    return Quality(task, results)


def score(task: Task, texts: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores a text for each item.

    Returns:
        By group, "all" first, and by metric.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for item, text in zip(task.items, texts, strict=True):
        for metric, value in task.scorer(text, item.answer).items():
            for group in (ALL, *item.groups):
                values.setdefault(group, {}).setdefault(metric, []).append(value)
    return {group: {metric: Score.of(found) for metric, found in metrics.items()} for group, metrics in values.items()}


def encoded(llm: LLM, task: Task) -> list[list[int]]:
    """Every prompt's tokens. Raises RequestError that says which one will not do."""
    found = []
    context = llm.decoder.shape.context
    for number, item in enumerate(task.items, 1):
        where = f"item {number} of {len(task.items)} of {task.name}"
        try:
            found.append(llm.encode(item.prompt))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
        if len(found[-1]) >= context:
            raise RequestError(
                f"{where}: the prompt has {len(found[-1])} tokens; this model's context holds {context}, "
                f"so use at most {context - 1}"
            )
    return found


def drafter_name(drafter: Drafter) -> str:
    """What reports call a drafter: "early-exit:3 K=4"."""
    from layerskip.decode.drafters import EarlyExit

    depth = f":{drafter.exit}" if isinstance(drafter, EarlyExit) else ""
    return f"{drafter.name}{depth} K={drafter.tokens}"


def _run(llm: LLM, task: Task, prompts: Sequence[Sequence[int]], *, exit: int | None, draft: Drafter | None) -> Run:
    """Generates for all prompts, longest first; the completions are in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    run = follow(
        llm.stream([prompts[i] for i in order], draft=draft, exit=exit, max_tokens=task.max_tokens, stop=task.stop)
    )
    if run.interrupted:
        raise KeyboardInterrupt
    found = dict(zip(order, run.completions, strict=True))
    return replace(
        run,
        completions=[found[i] for i in range(len(prompts))],
        arrivals=[replace(arrival, index=order[arrival.index]) for arrival in run.arrivals],
    )


def _same(one: Sequence[Completion], other: Sequence[Completion]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(one, other, strict=True))
