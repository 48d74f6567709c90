"""What a task is: prompts with their answers, when a text ends, and how it is scored.

Knows texts. Does not know files or models, nor how the texts come about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from layerskip.errors import RequestError, check_whole

Scorer = Callable[[str, Any], Mapping[str, float]]
"""(text, answer) -> metrics by name, the same names for every text; a share is 0 or 1."""


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        prompt: what the model continues.
        answer: what its scorer wants: a text, a number, tests to run; None where the data have none.
        groups: parts of the task it belongs to, which are also scored apart, such as "unseen".
        shown: how a prompt of several examples goes on behind `prompt` where this item is one of them.
    """

    prompt: str
    answer: Any = None
    groups: tuple[str, ...] = ()
    shown: str | None = None


@dataclass(frozen=True)
class Task:
    """Questions, and how their answers are scored.

    Args:
        name: what reports call it.
        items: at least one.
        scorer: scores a text against an answer; None where only speed is measured.
        max_tokens: tokens generated for each item at most.
        stop: strings that end a text.
        between: stands between the examples of a prompt, and before its question.
        generates: whether items are prompts to be continued; else they are texts whose tokens every exit predicts.
        executes: whether the scorer runs what the model wrote.
        ready: raises RequestError where the scorer lacks something, before any text is made.

    Raises:
        RequestError: there are no items.
    """

    name: str
    items: tuple[Item, ...]
    scorer: Scorer | None
    max_tokens: int
    stop: tuple[str, ...] = ()
    between: str = "\n\n"
    generates: bool = True
    executes: bool = False
    ready: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if not self.items:
            raise RequestError(f"task {self.name} has no items; give at least one")

    def limited(self, count: int) -> Task:
        """The task with so many of its items, spread evenly over all of them; all where it has no more.

        Raises:
            RequestError: fewer than one item.
        """
        check_whole("limit", count)
        if count < 1:
            raise RequestError(f"limit {count} is not possible; use 1 or more items")
        total = len(self.items)
        kept = min(count, total)
        return replace(self, items=tuple(self.items[i * total // kept] for i in range(kept)))

    def with_shots(self, count: int, *, examples: Iterable[Item], seed: int = 0) -> Task:
        """The task with solved examples before each question, the same ones before all.

        Args:
            count: examples.
            examples: what they are drawn from; those that are asked are left out.
            seed: draws them; another one draws others.

        Raises:
            RequestError: the task shows no examples, or there are not enough.
        """
        check_whole("shots", count)
        if count < 0:
            raise RequestError(f"shots {count} are not possible; use 0 or more")
        asked = {item.prompt for item in self.items}
        pool = {item.prompt: item for item in examples if item.shown is not None and item.prompt not in asked}
        if count and all(item.shown is None for item in self.items) and not pool:
            raise RequestError(f"task {self.name} has no way to show solved examples; leave shots out")
        if count > len(pool):
            raise RequestError(
                f"{count} shots need as many examples that are not asked, and there are {len(pool)}; "
                "give --shots-data, or ask fewer items with --limit"
            )
        drawn = random.Random(seed).sample(list(pool.values()), count)
        before = "".join(f"{item.prompt}{item.shown}{self.between}" for item in drawn)
        return replace(self, items=tuple(replace(item, prompt=before + item.prompt) for item in self.items))


class Maker(Protocol):
    """Makes a task of data."""

    def __call__(self, files: str | Path) -> Task:
        """Reads the task.

        Args:
            files: a file, a folder, a pattern, or hub[:NAME[:SUBSET][:SPLIT]] for a data set of the hub.

        Raises:
            RequestError: the data are missing or malformed.
        """
        ...
