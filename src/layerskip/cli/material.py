"""What models are measured on: prompts of a file, of a task, or a few that suit the parser in the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from layerskip.cli.prompts import read_prompts
from layerskip.errors import RequestError

UTTERANCES = (
    "set an alarm for 7 am tomorrow and remind me to call mom",
    "how long is my commute to work if I leave at 8",
    "play some jazz from the 60s",
    "will it rain in Seattle this weekend",
    "remind me to water the plants every Friday evening",
    "start a timer for twelve minutes and call it pasta",
    "send a message to Anna that I will be twenty minutes late",
    "what events are happening in Austin on the 4th of July",
    "delete all my alarms for next week",
    "is there heavy traffic on the way to the airport right now",
    "skip this song and play the album from the beginning",
    "do I need an umbrella in London tomorrow morning",
    "what reminders do I have for today",
    "pause the timer",
    "read me the last message from my sister",
    "find a concert near me this Saturday that is free",
)
"""Everyday requests in the domains of the parser in the package."""


@dataclass(frozen=True)
class Material:
    """Prompts, and how far they go.

    Args:
        source: what reports call it.
        prompts: texts.
        max_tokens: what a task asks for; None where nothing does.
        stop: strings that end a task's texts.
    """

    source: str
    prompts: Sequence[str]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class MaterialFlags:
    """Where prompts come from."""

    prompts: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help='One prompt in each line, or .jsonl with "prompt" or "text"; without it and a model, a few requests '
            "are built in.",
            show_default=False,
        ),
    ] = None
    task: Annotated[str | None, Option(metavar="NAME", help="The prompts of a task.", show_default=False)] = None
    data: Annotated[
        str | None, Option(metavar="PATH", help="The task's file, folder or pattern.", show_default=False)
    ] = None
    limit: Annotated[int | None, Option(metavar="N", help="So many prompts, spread over all.", show_default=False)] = (
        None
    )

    def load(self, model: str | None) -> Material:
        """Reads them.

        Args:
            model: what was named; None is the parser in the package.

        Raises:
            RequestError: none are named, or two sources are; the file is missing, malformed or empty.
        """
        if self.prompts is not None and self.task is not None:
            raise RequestError("both --prompts and --task are given; use one of them")
        if self.task is not None:
            return self._of_task(self.task)
        if self.data is not None:
            raise RequestError("--data belongs to a task; add --task, or use --prompts FILE")
        if self.prompts is not None:
            return Material(str(self.prompts), spread_over(read_prompts(self.prompts), self.limit))
        if model is not None:
            raise RequestError("no prompts: give --prompts FILE, or --task NAME with --data PATH")
        return Material("built in", spread_over(UTTERANCES, self.limit))

    def _of_task(self, name: str) -> Material:
        from layerskip.evaluate import find_task

        make = find_task(name)
        if self.data is None:
            raise RequestError("no data: give --data a file, a folder or a pattern")
        task = make(self.data)
        if self.limit is not None:
            task = task.limited(self.limit)
        return Material(task.name, [item.prompt for item in task.items], task.max_tokens, tuple(task.stop))


def spread_over(prompts: Sequence[str], limit: int | None) -> list[str]:
    """So many of the prompts, spread evenly over all of them; all where there are no more, or without a limit.

    Raises:
        RequestError: fewer than one.

    Example:
        >>> spread_over(["a", "b", "c", "d"], 2)
        ['a', 'c']
    """
    if limit is None:
        return list(prompts)
    if limit < 1:
        raise RequestError(f"limit {limit} is not possible; use 1 or more prompts")
    kept = min(limit, len(prompts))
    return [prompts[i * len(prompts) // kept] for i in range(kept)]
