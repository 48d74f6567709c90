"""Tasks by name: what is asked, when a text ends, how it is scored. One file per task, or per kind of task."""

from layerskip.errors import RequestError, suggest
from layerskip.evaluate.tasks.code import humaneval, mbpp
from layerskip.evaluate.tasks.gsm8k import gsm8k
from layerskip.evaluate.tasks.language import lm
from layerskip.evaluate.tasks.spec_bench import spec_bench
from layerskip.evaluate.tasks.summarisation import cnn_dm, xsum
from layerskip.evaluate.tasks.task import Item, Maker, Scorer, Task
from layerskip.evaluate.tasks.topv2 import score_frame, topv2

__all__ = [
    "TASKS",
    "Item",
    "Maker",
    "Scorer",
    "Task",
    "cnn_dm",
    "find_task",
    "gsm8k",
    "humaneval",
    "lm",
    "mbpp",
    "score_frame",
    "spec_bench",
    "topv2",
    "xsum",
]

TASKS: dict[str, Maker] = {
    "topv2": topv2,
    "cnn_dm": cnn_dm,
    "xsum": xsum,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "gsm8k": gsm8k,
    "spec_bench": spec_bench,
    "lm": lm,
}
"""Every task that has a name."""


def find_task(name: str) -> Maker:
    """What makes the task of this name.

    Raises:
        RequestError: there is no such task.
    """
    if name not in TASKS:
        raise RequestError(f"unknown task {name!r}; use {', '.join(TASKS)}{suggest(name, TASKS)}")
    return TASKS[name]
