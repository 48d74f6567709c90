"""`layerskip eval --harness`: tasks of lm-evaluation-harness, at exits or with a drafter.

Knows options, tables and files of results. Does not know how a task is scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.drafting import DraftFlags, draft_record
from layerskip.cli.flags import ModelFlags, read_exits
from layerskip.cli.scores import accepted
from layerskip.cli.screen import Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.cli.questions import TaskFlags
    from layerskip.evaluate.harness import Outcome
    from layerskip.evaluate.quality import Score

_PANEL = "lm-evaluation-harness"
_SHARED = ("limit", "shots")  # the options of a task that the harness reads too


@dataclass(frozen=True)
class HarnessFlags:
    """Which tasks of lm-evaluation-harness, and how."""

    harness: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME..]",
            help="Tasks, groups or tags of lm-evaluation-harness, such as arc_easy,gsm8k, instead of --task.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None
    tasks_folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="YAML files of further tasks.", rich_help_panel=_PANEL, show_default=False),
    ] = None
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Ask through the model's chat template.", rich_help_panel=_PANEL),
    ] = False

    @property
    def names(self) -> list[str]:
        """The tasks that are asked for."""
        return [name.strip() for name in (self.harness or "").split(",") if name.strip()]

    def used(self, *, task: TaskFlags, allow: bool) -> bool:
        """Whether the harness shall run.

        Args:
            task: the options of a task of this package.
            allow: whether what the model writes may be run.

        Raises:
            RequestError: both it and a task of this package are asked for, or the options of one for the other.
        """
        if self.harness is None:
            for name, value in (("--tasks-folder", self.tasks_folder), ("--chat-template", self.chat_template)):
                if value:
                    raise RequestError(f"{name} is for tasks of lm-evaluation-harness; add --harness NAME")
            return False
        if task.task is not None:
            raise RequestError(f"--harness {self.harness} and --task {task.task} are two questions; use one of them")
        given = [each.name for each in fields(task) if getattr(task, each.name) != each.default]
        unread = [name for name in given if name not in _SHARED] + (["allow-code-execution"] if allow else [])
        if unread:
            raise RequestError(f"--{unread[0].replace('_', '-')} is for --task; leave it out with --harness")
        return True


def run_harness(
    flags: HarnessFlags,
    *,
    model: ModelFlags,
    exit: str | None,
    draft: DraftFlags,
    batch: int | None,
    limit: int | None,
    shots: int | None,
    output: Path | None,
    json: bool,
    screen: Screen,
) -> None:
    """Runs the tasks once for each way that is asked for: plainly, at every exit of `exit`, or drafted.

    Raises:
        RequestError: lm-eval is missing, an unknown task, or a way that cannot be.
    """
    from importlib.metadata import version

    from layerskip.evaluate.harness import LayerSkipLM, open_tasks, run
    from layerskip.evaluate.record import about, make_folder, write

    if output is not None:
        make_folder(output)
    opened = open_tasks(flags.names, folder=flags.tasks_folder)
    llm = model.load()
    drafter = draft.drafter(llm)
    layers = llm.decoder.shape.layers
    ways = [(way_name(each, layers), each) for each in ([None] if exit is None else read_exits(exit, layers=layers))]
    if drafter is not None:
        from layerskip.evaluate.quality import drafter_name

        ways = [(drafter_name(drafter), None)]
    outcomes: list[Outcome] = []
    for name, each in ways:
        lm = LayerSkipLM(llm, exit=each, draft=drafter, batch=batch)
        outcomes.append(run(lm, opened, name=name, limit=limit, shots=shots, chat=flags.chat_template))
        record = {
            **about("eval", llm),
            "task": ",".join(opened.names),
            "items": outcomes[0].items,
            "draft": draft_record(draft, drafter),
            "harness": {
                "version": version("lm_eval"),
                "shots": dict(outcomes[0].shots),
                "limit": limit,
                "chat_template": flags.chat_template,
            },
            "results": [outcome.record() for outcome in outcomes],
            "curves": None,
        }
        if output is not None:  # after every way, so that an interrupt keeps those that are done
            write(output / file_name(opened.names, [name for name, _ in ways]), record)
    if json:
        write_json(record)
        return
    show(outcomes, screen)


def way_name(exit: int | None, layers: int) -> str:
    """What reports call decoding with so many layers."""
    return "plain" if exit in (None, layers) else f"exit {exit}"


_LONGEST = 150  # letters of a file's name


def file_name(tasks: Sequence[str], ways: Sequence[str]) -> str:
    """The file of a record, so that other tasks and other ways have other files.

    Example:
        >>> file_name(["arc_easy", "gsm8k"], ["early-exit:8 K=4"])
        'eval-arc_easy-gsm8k-early-exit-8-K-4.json'
        >>> file_name(["arc_easy"], ["exit 1", "exit 2"])
        'eval-arc_easy-exit-1-exit-2.json'
    """
    from layerskip.evaluate.record import digest

    words = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join([*tasks, *ways]))
    return f"eval-{words if len(words) <= _LONGEST else f'{words[:_LONGEST]}-{digest([words])}'}.json"


def show(outcomes: Sequence[Outcome], screen: Screen) -> None:
    """The metrics of every task, a column for each way, then what each way cost."""
    first = outcomes[0]
    rows = [
        (
            f"{task}, {first.shots[task]}-shot" if task in first.shots else task,
            metric,
            *(figure(outcome.scores[task][metric]) for outcome in outcomes),
        )
        for task, metrics in first.scores.items()
        for metric in metrics
    ]
    screen.table(rows, columns=("", "metric", *(outcome.name for outcome in outcomes)))
    screen.table(
        [(outcome.name, outcome.mode, f"{outcome.tokens:,}", f"{outcome.seconds:.1f}") for outcome in outcomes],
        columns=("", "mode", "tokens generated", "s"),
    )
    for outcome in outcomes:
        if outcome.acceptance is not None:
            screen.line(drafted(outcome.name, outcome.acceptance))


def figure(score: Score) -> str:
    """A metric with its standard error, as the harness writes them: its metrics are not all shares."""
    return f"{score.mean:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")


def drafted(name: str, acceptance: Any) -> str:
    """What became of the drafts."""
    return f"{name}: {accepted(acceptance)}; exact: a drafter changes speed only"
