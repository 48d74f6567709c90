"""What a task of this package shall ask: its options, and reading it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip.cli.screen import Screen
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.evaluate import Task
    from layerskip.llm import LLM


@dataclass(frozen=True)
class TaskFlags:
    """What is to be done, and how much of it."""

    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="topv2, cnn_dm, xsum, humaneval, mbpp, gsm8k, spec_bench (speed only), lm; required.",
            show_default=False,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A file, a folder or a pattern; hub for the task's data set there, hub:NAME[:SUBSET][:SPLIT] for "
            "another; required.",
            show_default=False,
        ),
    ] = None
    seen: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="What was trained on, a folder being its *_train.tsv (topv2): items not in it are also scored apart.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="So many items, spread over all.", show_default=False)
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Solved examples before each question: none, or what the harness says.",
            show_default=False,
        ),
    ] = None
    shots_data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where they are drawn from, as --data; without it, from items that --limit leaves out.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[int, typer.Option(metavar="S", help="Draws them.")] = 0
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out items whose prompts do not fit the model's context.")
    ] = False
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a text at most; the task's own.", show_default=False)
    ] = None

    def load(self) -> Task:
        """Reads the task.

        Raises:
            RequestError: a task or its data were not named, are missing or malformed, or too few for the shots.
        """
        from layerskip.evaluate import find_task, topv2

        if self.task is None:
            raise RequestError("no task: give --task a name, such as topv2")
        make = find_task(self.task)
        if self.data is None:
            raise RequestError("no data: give --data a file, a folder, a pattern or hub")
        if self.shots_data is not None and not self.shots:
            raise RequestError(f"--shots-data {self.shots_data} needs --shots; say how many")
        if self.seen is not None and self.task != "topv2":
            raise RequestError(f"task {self.task} does not tell apart what was trained on; leave --seen out")
        whole = make(self.data) if self.seen is None else topv2(self.data, seen=self.seen)
        asked = whole if self.limit is None else whole.limited(self.limit)
        if self.shots:
            examples = whole.items if self.shots_data is None else make(self.shots_data).items
            asked = asked.with_shots(self.shots, examples=examples, seed=self.seed)
        if self.max_tokens is not None:
            if self.max_tokens < 1:
                raise RequestError(f"--max-tokens {self.max_tokens} is not possible; use 1 or more")
            asked = replace(asked, max_tokens=self.max_tokens)
        return asked


def read_questions(task: TaskFlags, *, allow: bool) -> Task:
    """The task, if its texts can be scored at all: that shall be known before any model is loaded."""
    questions = task.load()
    from layerskip.evaluate.quality import check_scorer

    check_scorer(questions, allow_code_execution=allow)
    return questions


def fitting_ones(llm: LLM, questions: Task, screen: Screen) -> Task:
    """The task without items that the context does not hold; says how many they were."""
    from layerskip.evaluate.ways import fitting

    kept = fitting(llm, questions)
    left_out = len(questions.items) - len(kept.items)
    if left_out:
        screen.note(f"{left_out:,} of {len(questions.items):,} items do not fit the model's context and are left out")
    return kept
