"""How good the texts of a checkpoint are: plainly decoded, at early exits, and drafted.

Knows tasks, completions and scores. Does not know what a task is about, nor files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.draft import Drafter
from layerskip.errors import RequestError, check_exit
from layerskip.evaluate.curves import Point, exit_curves
from layerskip.evaluate.kept import Kept
from layerskip.evaluate.prompts import encode_prompts
from layerskip.evaluate.tasks import Task
from layerskip.evaluate.ways import ALL, Decoded, Pace, Way, decode, drafter_name
from layerskip.llm import LLM, Completion

__all__ = ["ALL", "Quality", "Result", "Score", "drafted_record", "drafter_name", "evaluate", "score"]


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
        scores: by group, "all" among them, and by metric; none where the task has no scorer.
        pace: what it cost: of "all" items, and where nothing is scored of every group.
        acceptance: counts over all rounds, with the seconds of the rounds; None where nothing drafts.
        identical: items whose tokens are those of plain decoding; None for plain decoding, and where that was not run.
    """

    name: str
    exit: int
    completions: Sequence[Completion]
    scores: Mapping[str, Mapping[str, Score]]
    pace: Mapping[str, Pace]
    acceptance: Acceptance | None
    identical: int | None

    @property
    def mode(self) -> str:
        """exact or lossy."""
        return self.completions[0].mode

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return self.pace[ALL].tokens

    @property
    def seconds(self) -> float:
        """From the first prompt to the last token."""
        return self.pace[ALL].end_to_end

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
            "pace": {group: pace.record() for group, pace in self.pace.items()},
            "identical": self.identical,
            "acceptance": None if self.acceptance is None else drafted_record(self.acceptance),
        }


@dataclass(frozen=True)
class Quality:
    """A task, done in one way or several.

    Args:
        task: with the items that were asked.
        results: a way each; none where the task generates nothing.
        curves: what every exit predicts, for language modelling; else None.
    """

    task: Task
    results: Sequence[Result]
    curves: Sequence[Point] | None = None

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "task": self.task.name,
            "items": len(self.task.items),
            "results": [result.record() for result in self.results],
            "curves": None if self.curves is None else [point.record() for point in self.curves],
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
    allow_code_execution: bool = False,
    kept: Kept | None = None,
) -> Quality:
    """Generates greedily for every item, and scores the texts; or predicts every token of texts, at every exit.

    The order of the items does not change: prompts are only run longest first, so that those that share a batch are of
    similar length. Every way of decoding begins with an empty cache, on the same weights.

    Args:
        llm: the model.
        task: what it shall do.
        plain: decode plainly, as what the others are compared with.
        exits: also at these exits, without the layers above: lossy. For language modelling, the exits of the curves;
            None is all of them.
        draft: also with this drafter: exact.
        batch: rows that decode side by side; None is the model's own.
        allow_code_execution: whether programs that the model wrote may be run, in the sandbox.
        kept: takes up what each way gave, and gives back what an earlier run had finished.

    Returns:
        Results in this order: plain, each exit, drafted; or curves.

    Raises:
        RequestError: an exit or a drafter that cannot serve the model, a prompt that does not fit it, nothing to do, an
            item without an answer, programs that may not or cannot be run.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
        StorageError: what was finished cannot be kept.
    """
    if not task.generates:
        if draft is not None:
            raise RequestError(f"task {task.name} generates nothing, so a drafter changes nothing; leave --draft out")
        return Quality(task, (), exit_curves(llm, [item.prompt for item in task.items], exits=exits))
    ways = _ways(llm, plain=plain, exits=exits, draft=draft)
    check_scorer(task, allow_code_execution=allow_code_execution)
    prompts = encode_prompts(llm, [item.prompt for item in task.items], called="item", of=task.name)
    results: list[Result] = []
    for way in ways:
        found = _decoded(llm, task, way, prompts=prompts, batch=batch, kept=kept)
        same = _same(found.completions, results[0].completions) if plain and results else None
        results.append(
            Result(
                name=way.name,
                exit=way.exit or llm.decoder.shape.layers,
                completions=found.completions,
                scores=score(task, [completion.text for completion in found.completions]),
                pace=found.pace,
                acceptance=None if way.draft is None else found.acceptance,
                identical=same,
            )
        )
    return Quality(task, results)


def check_scorer(task: Task, *, allow_code_execution: bool = False) -> None:
    """Raises RequestError where the texts of a task could not be scored, before there are any."""
    if task.scorer is None:
        return
    for number, item in enumerate(task.items, 1):
        if item.answer is None:
            raise RequestError(
                f"item {number} of {len(task.items)} of {task.name} has no answer to score a text against; "
                "give data with answers, or measure speed alone with bench"
            )
    if task.executes and not allow_code_execution:
        raise RequestError(
            f"task {task.name} runs programs that the model writes, in a sandbox; allow it with --allow-code-execution"
        )
    if task.ready is not None:
        task.ready()


def score(task: Task, texts: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores a text for each item.

    Returns:
        By group, "all" first, and by metric; nothing where the task has no scorer.
    """
    if task.scorer is None:
        return {}
    values: dict[str, dict[str, list[float]]] = {}
    for item, text in zip(task.items, texts, strict=True):
        for metric, value in task.scorer(text, item.answer).items():
            for group in (ALL, *item.groups):
                values.setdefault(group, {}).setdefault(metric, []).append(value)
    return {group: {metric: Score.of(found) for metric, found in metrics.items()} for group, metrics in values.items()}


def _ways(llm: LLM, *, plain: bool, exits: Sequence[int] | None, draft: Drafter | None) -> list[Way]:
    layers = llm.decoder.shape.layers
    ways = [Way("plain")] if plain else []
    ways += [Way(f"exit {exit}", exit=exit) for exit in exits or ()]
    if draft is not None:
        ways.append(Way(drafter_name(draft), draft))
    if not ways:
        raise RequestError("nothing to evaluate: no plain decoding, no exits and no drafter; ask for one of them")
    for way in ways:
        if way.exit is not None:
            check_exit(way.exit, layers=layers)
        if way.draft is not None:
            way.draft.check(llm.decoder, exit=layers)
    return ways


def _decoded(
    llm: LLM, task: Task, way: Way, *, prompts: Sequence[Sequence[int]], batch: int | None, kept: Kept | None
) -> Decoded:
    """What a way gives, or gave in an earlier run."""
    if kept is None:
        return decode(llm, task, way, prompts=prompts, batch=batch)
    if (before := kept.get(way.key)) is not None:
        return Decoded.of(before, prompts=prompts)
    found = decode(llm, task, way, prompts=prompts, batch=batch)
    kept.put(way.key, found.kept())
    return found


def _same(one: Sequence[Completion], other: Sequence[Completion]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(one, other, strict=True))
