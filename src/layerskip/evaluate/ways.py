"""Ways to do a task: plainly, at an exit, with a drafter; what each gave, and what it cost.

Knows prompts, completions and seconds. Does not know scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.controllers import MOST
from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Assistant, Auto, Cascade, EarlyExit
from layerskip.errors import RequestError
from layerskip.evaluate.follow import Run, follow, fresh
from layerskip.evaluate.record import digest, weights_digest
from layerskip.evaluate.tasks import Item, Task
from layerskip.llm import LLM, Completion

ALL = "all"
"""The group that every item belongs to."""


@dataclass(frozen=True)
class Way:
    """One way of decoding.

    Args:
        name: "plain", "exit E", or the drafter, such as "early-exit:3 K=4".
        draft: what drafts, if anything does.
        exit: layers that decide; None is all of them. Fewer is lossy.
    """

    name: str
    draft: Drafter | None = None
    exit: int | None = None

    @property
    def plain(self) -> bool:
        """Whether all layers decide and nothing drafts."""
        return self.draft is None and self.exit is None

    @property
    def key(self) -> str:
        """Tells apart all ways that may differ in what they cost."""
        if self.draft is None:
            return self.name
        inner = drawing(self.draft)
        ranked = getattr(inner, "ranked", ())  # not every drafter has them, nor a threshold
        parts = {
            "confidence": getattr(inner, "confidence", None),
            "ranking": digest(ranked) if ranked else None,
            "weights": weights_digest(inner.decoder) if isinstance(inner, Assistant) else None,
        }
        return " ".join([self.name, *(f"{name}={value}" for name, value in parts.items() if value is not None)])


@dataclass(frozen=True)
class Pace:
    """What the texts of a group cost.

    Args:
        items: texts.
        tokens: generated.
        decode: seconds of the rounds.
        end_to_end: seconds from the first prompt to the last token.
    """

    items: int
    tokens: int
    decode: float
    end_to_end: float

    @property
    def rate(self) -> float:
        """Tokens/s, prompts included."""
        return self.tokens / self.end_to_end if self.end_to_end else 0.0

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "items": self.items,
            "tokens": self.tokens,
            "seconds": {"decode": self.decode, "end_to_end": self.end_to_end},
            "tokens_per_second": {
                "decode": self.tokens / self.decode if self.decode else 0.0,
                "end_to_end": self.rate,
            },
        }


@dataclass(frozen=True)
class Decoded:
    """What a way gave.

    Args:
        completions: one for each item, in order.
        acceptance: counts over all rounds, with the seconds of the rounds.
        pace: by group that was run on its own, and "all".
    """

    completions: Sequence[Completion]
    acceptance: Acceptance
    pace: Mapping[str, Pace]

    def kept(self) -> dict[str, Any]:
        """All of it as JSON, less the prompts."""
        fields = ("mode", "text", "tokens", "finish_reason", "stop")
        return {
            "completions": [{name: getattr(each, name) for name in fields} for each in self.completions],
            "acceptance": asdict(self.acceptance),
            "pace": {group: asdict(pace) for group, pace in self.pace.items()},
        }

    @classmethod
    def of(cls, kept: Mapping[str, Any], *, prompts: Sequence[Sequence[int]]) -> Decoded:
        """What `kept` wrote, of these prompts."""
        counts = Acceptance(**kept["acceptance"])
        counts.by_length = {int(size): rounds for size, rounds in counts.by_length.items()}
        completions = [
            Completion(list(ids), **fields) for ids, fields in zip(prompts, kept["completions"], strict=True)
        ]
        return cls(completions, counts, {group: Pace(**pace) for group, pace in kept["pace"].items()})


def decode(llm: LLM, task: Task, way: Way, *, prompts: Sequence[Sequence[int]], batch: int | None) -> Decoded:
    """Generates for every item, with an empty cache to begin with.

    Where nothing is scored, each group is run on its own: what it costs is then its own, whatever the batch.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
    """
    parts: dict[str, list[int]] = {}
    for place, item in enumerate(task.items):
        parts.setdefault(_part(task, item), []).append(place)
    found: dict[int, Completion] = {}
    counts = Acceptance()
    pace: dict[str, Pace] = {}
    if task.scorer is None:  # the first pass of a process is slow, and here speed is what is asked
        fresh(llm, batch=batch).generate(prompts[0], draft=way.draft, exit=way.exit, max_tokens=2)
    for group, places in parts.items():
        run = _run(fresh(llm, batch=batch), task, [prompts[place] for place in places], way)
        found |= dict(zip(places, run.completions, strict=True))
        counts.merge(run.acceptance)
        pace[group] = Pace(len(places), run.tokens, run.decode, run.total)
    whole = pace.values()
    total = Pace(
        sum(each.items for each in whole),
        sum(each.tokens for each in whole),
        sum(each.decode for each in whole),
        sum(each.end_to_end for each in whole),
    )
    return Decoded([found[place] for place in range(len(prompts))], counts, {ALL: total, **pace})


def _part(task: Task, item: Item) -> str:
    return item.groups[0] if task.scorer is None and item.groups else ALL


def fitting(llm: LLM, task: Task) -> Task:
    """The task without the items whose prompts the context does not hold. Raises RequestError where none is left."""
    if not task.generates:
        return task
    context = llm.decoder.shape.context
    items = tuple(item for item in task.items if len(llm.encode(item.prompt)) < context)
    if not items:
        raise RequestError(
            f"none of the {len(task.items)} prompts of {task.name} fits the context of this model, {context} tokens; "
            "use fewer shots, or another model"
        )
    return replace(task, items=items)


def drawing(drafter: Drafter) -> Drafter:
    """What draws the tokens that a drafter does not copy."""
    return drafter.exit if isinstance(drafter, Cascade) else drafter


def with_exit(words: str, drafter: Drafter) -> str:
    """The words for a drafter with the exit that they leave to the checkpoint."""
    inner = drawing(drafter)
    return f"{words}:{inner.exit}" if ":" not in words and isinstance(inner, EarlyExit) else words


def drafter_name(drafter: Drafter, *, words: str | None = None) -> str:
    """What reports call a drafter: "early-exit:3 K=4".

    Args:
        drafter: that drafts.
        words: how it was asked for; None names its kind.
    """
    inner, name = drawing(drafter), with_exit(words or drafter.name, drafter)
    if isinstance(drafter, Auto) and drafter.tokens == MOST:
        return name + _narrowness(drafter)
    rule = getattr(inner, "length", "fixed")  # not every drafter has one
    return f"{name} K={inner.tokens}{'' if rule == 'fixed' else f' {rule}'}{_narrowness(drafter)}"


def _narrowness(drafter: Drafter) -> str:
    """ " N=2048" where only so many tokens are proposed, " int8 head" where they are through such a one."""
    drafter = drawing(drafter)
    if getattr(drafter, "head", "own") == "int8":
        return " int8 head"
    vocabulary = getattr(drafter, "vocabulary", None)  # not every drafter has one
    return "" if vocabulary is None else f" N={vocabulary}"


def _run(llm: LLM, task: Task, prompts: Sequence[Sequence[int]], way: Way) -> Run:
    """Generates for all prompts, longest first; the completions are in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    run = follow(
        llm.stream(
            [prompts[i] for i in order], draft=way.draft, exit=way.exit, max_tokens=task.max_tokens, stop=task.stop
        )
    )
    if run.interrupted:
        raise KeyboardInterrupt
    found = dict(zip(order, run.completions, strict=True))
    return replace(run, completions=[found[i] for i in range(len(prompts))])
