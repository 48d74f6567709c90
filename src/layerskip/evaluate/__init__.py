"""What a checkpoint can do: tasks and their scores, and how well it drafts for itself.

    find_task("topv2")(files) -> evaluate(llm, task) -> Quality
    measure(llm, prompts, exits=..., draft_tokens=...) -> [Measurement] -> best

Knows `LLM`s, prompts and answers. Does not know training: `callback.AcceptanceCallback` meets it through the folders
that it saves.
"""

from layerskip.evaluate.acceptance import Measurement, best, measure
from layerskip.evaluate.curves import Point, exit_curves
from layerskip.evaluate.quality import Quality, Result, Score, evaluate
from layerskip.evaluate.tasks import Item, Task, find_task, topv2

__all__ = [
    "Item",
    "Measurement",
    "Point",
    "Quality",
    "Result",
    "Score",
    "Task",
    "best",
    "evaluate",
    "exit_curves",
    "find_task",
    "measure",
    "topv2",
]
