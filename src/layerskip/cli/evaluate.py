"""`layerskip eval`: how good a checkpoint's texts are on a task, plainly decoded, at early exits, and drafted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.drafting import DraftFlags, draft_record
from layerskip.cli.flags import ModelFlags, ShowFlags, read_exits
from layerskip.cli.harness import HarnessFlags, run_harness
from layerskip.cli.questions import TaskFlags, fitting_ones, read_questions
from layerskip.cli.scores import show_quality
from layerskip.cli.screen import Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.evaluate import Quality, Task
    from layerskip.llm import LLM


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
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Let programs that the model writes be run, in a sandbox."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the record there, as eval-TASK.json; what was finished is kept when interrupted.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    show: ShowFlags,
) -> None:
    """Score a checkpoint's greedy texts on a task, or with lm what every exit predicts.

    Plain decoding always runs, then each --exit, or the drafter: its texts are compared with the plain ones.
    """
    if exit is not None and draft.draft != "none":
        raise RequestError(
            "--exit and --draft answer different questions: what lossy exits cost in quality, and whether an exact "
            "drafter changes nothing; use one of them"
        )
    screen = Screen(no_color=show.no_color)
    if harness.used(task=task, allow=allow_code_execution):
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
    questions = read_questions(task, allow=allow_code_execution)
    llm = model.load()
    if task.skip_long:
        questions = fitting_ones(llm, questions, screen)
    layers = llm.decoder.shape.layers
    drafter = draft.drafter(llm)
    found = _evaluated(
        llm,
        questions,
        exits=None if exit is None else [each for each in read_exits(exit, layers=layers) if each < layers],
        drafter=drafter,
        batch=batch,
        allow=allow_code_execution,
        output=output,
        screen=screen,
    )
    record = _record(llm, found, task, drafted=draft_record(draft, drafter), batch=batch)
    if output is not None:
        _keep(output, questions, record)
    if json:
        write_json(record)
    else:
        show_quality(found, screen)


def _keep(output: Path, questions: Task, record: dict[str, Any]) -> None:
    from layerskip.evaluate.record import write

    write(output / f"eval-{questions.name}.json", record)
    _unfinished(output, questions).unlink(missing_ok=True)


def _evaluated(
    llm: LLM,
    questions: Task,
    *,
    exits: list[int] | None,
    drafter: Drafter | None,
    batch: int | None,
    allow: bool,
    output: Path | None,
    screen: Screen,
) -> Quality:
    from layerskip.evaluate import evaluate
    from layerskip.evaluate.kept import Kept, identity

    kept = None
    if output is not None:
        kept = Kept(_unfinished(output, questions), same=identity(llm, questions, batch=batch))
        if kept.resumed:
            screen.note("going on where an interrupted run of the same ended")
    try:
        return evaluate(llm, questions, exits=exits, draft=drafter, batch=batch, allow_code_execution=allow, kept=kept)
    except KeyboardInterrupt:
        screen.note("interrupted" if kept is None else "interrupted; the same command goes on with what is unfinished")
        raise
    finally:
        if kept is not None:
            kept.close()


def _unfinished(output: Path, task: Task) -> Path:
    return output / f"unfinished-eval-{task.name}.json"


def _record(
    llm: LLM, found: Quality, task: TaskFlags, *, drafted: dict[str, Any] | None, batch: int | None
) -> dict[str, Any]:
    from layerskip.evaluate.record import about

    settings = {
        "data": task.data,
        "seen": task.seen,
        "limit": task.limit,
        "skip_long": task.skip_long,
        "shots": task.shots or 0,
        "shots_data": task.shots_data,
        "seed": task.seed,
        "max_tokens": found.task.max_tokens,
        "batch": batch or llm.max_batch,
    }
    return {**about("eval", llm), "settings": settings, "draft": drafted, **found.record()}
