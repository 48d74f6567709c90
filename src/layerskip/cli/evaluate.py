"""`layerskip eval`: how good a checkpoint's texts are on a task, plainly decoded, at early exits, and drafted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.flags import DraftFlags, ModelFlags, ShowFlags, draft_record
from layerskip.cli.generate import dtype_name
from layerskip.cli.harness import HarnessFlags, run_harness
from layerskip.cli.screen import Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.evaluate import Quality, Result, Score, Task


@dataclass(frozen=True)
class TaskFlags:
    """What is to be done, and how much of it."""

    task: Annotated[str | None, typer.Option(metavar="NAME", help="topv2; required.", show_default=False)] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A file, a folder (its *_eval.tsv) or a pattern; required.", show_default=False
        ),
    ] = None
    seen: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="What was trained on, a folder being its *_train.tsv: items not in it are also scored apart.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="So many items, spread over all.", show_default=False)
    ] = None
    shots: Annotated[
        int | None,
        typer.Option(metavar="N", help="Solved examples before each question; what the task says.", show_default=False),
    ] = None

    def load(self) -> Task:
        """Reads the task. Raises RequestError where one was not named, or its files are missing or malformed."""
        from layerskip.evaluate import find_task

        if self.task is None:
            raise RequestError("no task: give --task a name, such as topv2")
        make = find_task(self.task)
        if self.data is None:
            raise RequestError("no data: give --data a file, a folder or a pattern")
        task = make(self.data, seen=self.seen)
        return task if self.limit is None else task.limited(self.limit)


def evaluate(
    *,
    model: ModelFlags,
    task: TaskFlags,
    harness: HarnessFlags,
    exit: Annotated[
        str | None,
        typer.Option(
            metavar="all|E[,E..]", help="Also stop after E layers (lossy), at each of these.", show_default=False
        ),
    ] = None,
    draft: DraftFlags,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Rows that decode side by side; 16.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write the record there, for layerskip report.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    show: ShowFlags,
) -> None:
    """Score a checkpoint's greedy texts on a task.

    Plain decoding always runs, then each --exit, or the drafter: its texts are compared with the plain ones.
    """
    if exit is not None and draft.draft != "none":
        raise RequestError(
            "--exit and --draft answer different questions: what lossy exits cost in quality, and whether an exact "
            "drafter changes nothing; use one of them"
        )
    if harness.used(task=task.task):
        screen = Screen(no_color=show.no_color)
        run_harness(
            harness,
            model=model,
            exit=exit,
            draft=draft,
            batch=batch,
            limit=task.limit,
            shots=task.shots,
            output=output,
            json=json,
            screen=screen,
        )
        return
    if task.shots is not None or output is not None:
        raise RequestError("--shots and --output are for tasks of lm-evaluation-harness; add --harness NAME")
    questions = task.load()
    llm = model.load()
    from layerskip.evaluate import evaluate

    drafter = draft.drafter(llm)
    exits = None if exit is None else read_exits(exit, layers=llm.decoder.shape.layers)
    found = evaluate(llm, questions, exits=exits, draft=drafter, batch=batch)
    if json:
        about = {"model": llm.name, "dtype": dtype_name(llm), "device": str(llm.decoder.device)}
        write_json({**about, "draft": draft_record(draft, drafter), **found.record()})
        return
    screen = Screen(no_color=show.no_color)
    for group in found.results[0].scores:
        screen.table(score_rows(found, group), columns=("", *found.results[0].scores[group]), title=title(found, group))
    screen.table([speed_row(result) for result in found.results], columns=("", "mode", "tokens", "s", "tokens/s"))
    for result in found.results:
        if result.acceptance is not None:
            screen.line(drafted_line(result))


def read_exits(words: str, *, layers: int) -> list[int]:
    """The exits that "all" or "2,4" mean, without the last, which is plain decoding.

    Raises:
        RequestError: neither "all" nor numbers, or an exit outside the model.
    """
    if words == "all":
        return list(range(1, layers))
    parts = words.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"--exit {words} is not possible; use all, or numbers of layers such as 2,4")
    exits = sorted({int(part) for part in parts})
    for exit in exits:
        if not 1 <= exit <= layers:
            raise RequestError(f"exit {exit} is not inside this {layers}-layer model; use 1..{layers}")
    return [exit for exit in exits if exit < layers]


def title(found: Quality, group: str) -> str:
    """What a table is about: "topv2, unseen: 12 items"."""
    count = next(iter(found.results[0].scores[group].values())).count
    return f"{found.task.name}, {group}: {count:,} item{'' if count == 1 else 's'}"


def score_rows(found: Quality, group: str) -> list[tuple[str, ...]]:
    """The scores of a group, a row for each way of decoding."""
    return [(result.name, *map(percent, result.scores[group].values())) for result in found.results]


def percent(score: Score) -> str:
    """The mean with its standard error."""
    return f"{score.mean:.1%}" + ("" if score.error is None else f" ± {100 * score.error:.1f}")


def speed_row(result: Result) -> tuple[str, ...]:
    """What a way of decoding cost, prompts included."""
    rate = result.tokens / result.seconds
    return (result.name, result.mode, f"{result.tokens:,}", f"{result.seconds:.1f}", f"{rate:.1f}")


def drafted_line(result: Result) -> str:
    """What became of the drafts, and whether the texts are the plain ones."""
    record: dict[str, Any] = result.record()["acceptance"]
    return (
        f"{result.name}: acceptance {record['draft_acceptance_rate']:.1%}, "
        f"{record['mean_acceptance_length']:.2f} tokens/round ({record['emitted_per_round']:.2f} emitted); "
        f"{result.identical:,} of {len(result.completions):,} texts identical to plain ones"
    )
