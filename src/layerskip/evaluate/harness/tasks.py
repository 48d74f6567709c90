"""Tasks of lm-evaluation-harness: found by name, run on a model, their metrics read.

Knows the harness's index of tasks and its results. Does not know how a model scores or generates.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from layerskip.errors import RequestError, check_whole, suggest
from layerskip.evaluate.harness.model import LayerSkipLM
from layerskip.evaluate.quality import Score, drafted_record

# what `lm_eval.simple_evaluate` sets, so that shuffled choices and examples are those of everybody's figures
_SEED, _NUMPY_SEED, _SHOTS_SEED = 0, 1234, 1234


@dataclass(frozen=True)
class Opened:
    """Tasks with their data read.

    Args:
        names: as they were asked for.
        loaded: tasks and groups by name, as `TaskManager.load` gives them.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, Any]

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Every single task by its name."""
        return self.loaded["tasks"]  # type: ignore[no-any-return]

    @property
    def generates(self) -> bool:
        """Whether one of them has a model write text."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())


@dataclass(frozen=True)
class Outcome:
    """What one way of decoding made of tasks.

    Args:
        name: "plain", "exit E", or the drafter, such as "early-exit:3 K=4".
        exit: layers that decide.
        mode: exact or lossy.
        scores: by task or group, and by metric, as the harness names them; a filter stands in brackets.
        shots: examples before each question, by task.
        items: questions of all tasks.
        tokens: generated.
        seconds: spent on scoring and generating.
        acceptance: counts of the drafter for JSON; None where nothing drafts.
    """

    name: str
    exit: int
    mode: str
    scores: Mapping[str, Mapping[str, Score]]
    shots: Mapping[str, int]
    items: int
    tokens: int
    seconds: float
    acceptance: Mapping[str, Any] | None

    def record(self) -> dict[str, Any]:
        """The same for JSON, as `Result.record` has it."""
        return {
            "name": self.name,
            "mode": self.mode,
            "exit": self.exit,
            "scores": {
                task: {metric: vars(score) for metric, score in found.items()} for task, found in self.scores.items()
            },
            "tokens": self.tokens,
            "seconds": self.seconds,
            "identical": None,
            "acceptance": self.acceptance,
        }


def open_tasks(names: Sequence[str], *, folder: Path | None = None) -> Opened:
    """Finds tasks and reads their data.

    Args:
        names: of tasks, groups or tags of the harness.
        folder: YAML files of further tasks, which come before tasks of the same name.

    Raises:
        RequestError: an unknown name, a folder without tasks, data that cannot be read, or a task that needs what is
            not here: images, or the running of generated code.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it writes a page of warnings; errors come as errors
    if not names:
        raise RequestError("no task of lm-evaluation-harness is named; give one, such as arc_easy")
    manager = _manager(names, folder)
    for name in names:
        if name not in manager.task_index:
            places = (
                "lm-evaluation-harness does not have it"
                if folder is None
                else (f"neither {folder} nor lm-evaluation-harness has it")
            )
            raise RequestError(f"unknown task {name!r}: {places}{suggest(name, manager.all_tasks)}")
    random.seed(_SEED)
    numpy.random.seed(_NUMPY_SEED)
    try:
        with _quiet():
            opened = Opened(tuple(names), manager.load(list(names)))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        RuntimeError,
    ) as error:  # of YAML, data sets, the net
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"task {', '.join(names)} cannot be opened: {reason}") from error
    for name, task in opened.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RequestError(
                f"task {name} runs generated code, which lm-evaluation-harness does not isolate; "
                "use layerskip eval --task, which does"
            )
        if getattr(task, "MULTIMODAL", False):
            raise RequestError(f"task {name} shows images; layerskip's models read text only")
    return opened


def run(
    model: LayerSkipLM,
    opened: Opened,
    *,
    name: str,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> Outcome:
    """Runs tasks on a model.

    Args:
        model: new, or its counts are added to.
        opened: the tasks.
        name: what reports call this way of decoding.
        limit: so many items of each task, its first ones; None is all.
        shots: examples before each question; None is what each task says. Tasks that fix 0 keep it.
        chat: put the questions into the model's chat template.

    Raises:
        RequestError: a drafter for tasks that generate nothing, a limit or shots out of range, settings of a task
            that cannot be served.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
    """
    if model.draft is not None and not opened.generates:
        raise RequestError(
            f"{', '.join(opened.names)} only compares log-likelihoods: nothing is generated, so a drafter changes "
            "nothing; leave --draft out, or use --exit to see what an exit costs"
        )
    for what, number, least in (("limit", limit, 1), ("shots", shots, 0)):
        if number is not None:
            check_whole(what, number)
            if number < least:
                raise RequestError(f"{what} {number} is not possible; use {least} or more")
    for task in opened.tasks.values():
        given = task.get_config("num_fewshot")
        task.set_config("num_fewshot", given if given is not None and (given == 0 or shots is None) else shots or 0)
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    with _quiet():
        # not simple_evaluate: beyond this it describes the machine, which takes seconds at every call
        found = evaluate(model, opened.loaded, limit=limit, apply_chat_template=chat, log_samples=False)
    assert found is not None  # this is the only process
    return Outcome(
        name=name,
        exit=model.llm.decoder.shape.layers if model.exit is None else model.exit,
        mode=model.mode,
        scores={task: _scores(metrics, _count(task, found)) for task, metrics in found["results"].items()},
        shots={task: int(number) for task, number in found["n-shot"].items()},
        items=sum(int(count["effective"]) for count in found["n-samples"].values()),
        tokens=model.tokens,
        seconds=model.seconds,
        acceptance=None if model.draft is None else drafted_record(model.acceptance),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness draws bars, and tasks print: who watches sees them on standard error, and a pipe holds results."""
    place = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(place), contextlib.redirect_stderr(place):
        yield


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The index of a folder alone where that is enough: reading the harness's own takes many seconds."""
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise RequestError(f"no folder {folder}; give one with YAML files of tasks")
    local = TaskManager(include_path=str(folder), include_defaults=False)
    if not local.all_tasks:
        raise RequestError(f"{folder} holds no task; give a folder with YAML files that say task: NAME")
    own = set(local.all_subtasks)
    for group in local.all_groups:
        parts = (local.task_index[group].cfg or {}).get("task", [])
        if all(isinstance(part, str) and part in own for part in parts):
            own.add(group)
    return local if own.issuperset(names) else TaskManager(include_path=str(folder))


def _count(task: str, found: Mapping[str, Any]) -> int:
    """Items of a task, or of all tasks of a group."""
    counts = found["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_count(child, found) for child in found["group_subtasks"].get(task, ()))


def _scores(metrics: Mapping[str, Any], count: int) -> dict[str, Score]:
    """Metrics by name; the harness calls them "acc,none", and their errors "acc_stderr,none"."""
    scores = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        scores[name] = Score(float(value), float(error) if isinstance(error, int | float) else None, count)
    return scores
