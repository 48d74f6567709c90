"""`layerskip train`: a recipe, run to the end or resumed where it was."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.flags import ShowFlags
from layerskip.cli.screen import Screen
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip.train.recipe import Recipe
    from layerskip.train.run import Outcome, Run

ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}
"""How typer leaves the keys of a recipe to us."""


def train(
    context: typer.Context,
    *,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file.")],
    show: ShowFlags,
) -> None:
    """Train a model with layer dropout and the early-exit loss.

    Every key of the recipe, and every setting of transformers' TrainingArguments, can be replaced:
    layerskip train topv2-parser --data 'topv2/*_train.tsv' --learning_rate 1e-3 --output_dir runs/mine

    The same command again resumes a run that was stopped. Several processes: torchrun --nproc-per-node 2 -m layerskip
    train ...
    """
    try:
        from layerskip.train.recipe import read_recipe
    except ImportError as error:
        raise RequestError(f"training needs {error.name}; install layerskip[train]") from error

    wanted = read_recipe(recipe, overrides=overrides(context.args))
    screen = Screen(no_color=show.no_color)
    outcome = _run(wanted, screen)
    if outcome is not None:
        _show(outcome, screen)
    _leave_together()


def _show(outcome: Outcome, screen: Screen) -> None:
    measured = outcome.measured
    rows = exit_rows(outcome.metrics, measured)
    if rows:
        screen.table(rows, columns=("exit", "loss", "accuracy", "agreement", "tokens/round"))
    if measured and measured.get("exit"):
        screen.line(f"recommended: --draft early-exit:{measured['exit']} --draft-tokens {measured['draft_tokens']}")
    screen.line(f"the model is in {outcome.folder}")


def _leave_together() -> None:
    """Ends a process of several when all are done.

    Past the interpreter's own end: there a DDP reducer and gloo's threads wait for each other, now and then for ever.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        dist.barrier()  # a process that leaves early would take the others' connections with it
        os._exit(0)


def overrides(words: list[str]) -> dict[str, str]:
    """`--key value`, `--key=value` and `--key` (true) as a mapping.

    Raises:
        RequestError: a word that belongs to no key.
    """
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found[name] = value if equals else "true"
            waiting = None if equals else name
        elif waiting is not None:
            found[waiting] = word
            waiting = None
        else:
            raise RequestError(f"unexpected {word!r}; settings are given as --key value, a pattern of files in quotes")
    return found


def exit_rows(metrics: dict[str, float], measured: Any) -> list[tuple[str, ...]]:
    """One row per exit: what evaluation and self-speculation gave there."""
    best: dict[int, float] = {}
    for row in (measured or {}).get("table", ()):
        best[row["exit"]] = max(best.get(row["exit"], 0.0), row["tokens_per_round"])
    exits = sorted(int(name.rsplit("/", 1)[1]) for name in metrics if name.startswith("eval_exit_loss/"))
    return [
        (
            str(exit),
            f"{metrics[f'eval_exit_loss/{exit}']:.4f}",
            f"{metrics[f'eval_exit_accuracy/{exit}']:.2%}",
            f"{metrics[f'eval_exit_agreement/{exit}']:.2%}",
            f"{best[exit]:.2f}" if exit in best else "",
        )
        for exit in exits
    ]


def _run(wanted: Recipe, screen: Screen) -> Outcome | None:
    """The outcome on the first process, None on others."""
    from transformers.utils import logging

    from layerskip.cli.progress import TrainingProgress
    from layerskip.train.run import Run as Built

    logging.disable_progress_bar()  # of every file that is saved
    progress = TrainingProgress(screen)
    try:
        run = Built(wanted, callbacks=[progress], tell=screen.note)
        outcome = run.train(measure=_measuring(run))
    finally:
        progress.close()
    return outcome if run.args.process_index == 0 else None


def _measuring(run: Run) -> Any:
    """Measures self-speculation at every checkpoint, and returns what measures the finished model."""
    prompts = run.prompts
    if not prompts:
        return None
    from layerskip.evaluate.acceptance import best
    from layerskip.evaluate.callback import AcceptanceCallback

    callback = AcceptanceCallback(prompts, draft_tokens=(2, 4, 6, 8), max_tokens=run.recipe.acceptance_tokens)
    run.trainer.add_callback(callback)

    def measure(folder: Path) -> dict[str, Any] | None:
        found = callback.final(folder)
        chosen = best(found)
        return (
            {
                "exit": chosen.exit if chosen else None,
                "draft_tokens": chosen.draft_tokens if chosen else None,
                "prompts": len(prompts),
                "table": [
                    {
                        "exit": each.exit,
                        "draft_tokens": each.draft_tokens,
                        "acceptance": each.rate,
                        "tokens_per_round": each.tokens_per_round,
                        "predicted_speedup": each.predicted_speedup,
                    }
                    for each in found
                ],
            }
            if found
            else None
        )

    return measure
