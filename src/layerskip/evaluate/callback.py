"""Acceptance while training goes on: every checkpoint that is saved is loaded and drafts for itself.

Knows transformers' callbacks and checkpoint folders. Does not know `layerskip.train`: any `Trainer` will do.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerskip.errors import CheckpointError, LayerSkipError, RequestError
from layerskip.evaluate.acceptance import Measurement, measure
from layerskip.evaluate.contest import at_least_one
from layerskip.evaluate.quality import ALL, evaluate
from layerskip.evaluate.tasks import Task
from layerskip.llm import LLM, load


class AcceptanceCallback(TrainerCallback):
    """Measures every saved checkpoint in the main process, in float32, and adds what it finds to `state.log_history`.

    An entry has, for every exit E with the K of the highest predicted speedup, `acceptance/E`, `tokens_per_round/E`,
    `draft_tokens/E` and `predicted_speedup/E`; with a task also `TASK/METRIC` of plain decoding; and `step`. It reaches
    the trainer_state.json of the next checkpoint: its own is written before.

    Training is the same to the bit with it and without: random numbers and threads are left as they are found. What
    cannot be measured, such as a model that layerskip does not load, is warned about once and then left alone.

    Args:
        prompts: what the model continues greedily.
        exits: E, each below the model's layers; None is a sixth, a quarter, a third and a half of them.
        draft_tokens: K, the numbers of drafted tokens to try.
        max_tokens: tokens of each continuation at most.
        task: also scored, plainly decoded.
        device: where to measure; None is where the model trains.

    Raises:
        RequestError: no prompts, exits or draft tokens, or one that is out of range.

    Attributes:
        measured: the entries so far.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        exits: Iterable[int] | None = None,
        draft_tokens: Iterable[int] = (1, 2, 4, 6),
        max_tokens: int = 64,
        task: Task | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.exits = None if exits is None else list(exits)
        self.draft_tokens = list(draft_tokens)
        self.max_tokens, self.task, self.device = max_tokens, task, device
        self.measured: list[dict[str, float]] = []
        self._refused = False
        for name, values in (("prompts", self.prompts), ("exits", self.exits), ("draft_tokens", self.draft_tokens)):
            if values is not None and not values:
                raise RequestError(f"no {name} to measure acceptance with; give at least one")
        for name, number in [
            ("max_tokens", max_tokens),
            *(("exit", exit) for exit in self.exits or ()),
            *(("draft tokens", tokens) for tokens in self.draft_tokens),
        ]:
            at_least_one(name, number)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measures the checkpoint just written."""
        if not state.is_world_process_zero or self._refused:
            return control
        assert args.output_dir is not None  # transformers fills it in
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            entry = self._entry(folder, self.device if self.device is not None else args.device)
        except LayerSkipError as error:  # hours of training are worth more than a measurement
            self._warn(error)
            return control
        entry["step"] = state.global_step
        self.measured.append(entry)
        state.log_history.append(dict(entry))
        return control

    def final(self, folder: str | Path) -> list[Measurement]:
        """Measures the folder of a finished training.

        Returns:
            A measurement for each exit and each K; none for a folder that cannot be loaded, which is warned about
            unless that was said before.

        Raises:
            RequestError: a prompt or an exit does not fit the model.
        """
        try:
            with _undisturbed():
                return self._measure(load(folder, dtype="float32", device=self.device))
        except CheckpointError as error:
            if not self._refused:
                self._warn(error)
            return []

    def _entry(self, folder: Path, device: torch.device | str) -> dict[str, float]:
        with _undisturbed():
            llm = load(folder, dtype="float32", device=device)
            found = self._measure(llm)
            scores = {} if self.task is None else evaluate(llm, self.task).results[0].scores[ALL]
        entry: dict[str, float] = {}
        for exit in dict.fromkeys(each.exit for each in found):
            chosen = max((each for each in found if each.exit == exit), key=lambda each: each.predicted_speedup)
            entry[f"acceptance/{exit}"] = chosen.rate
            entry[f"tokens_per_round/{exit}"] = chosen.tokens_per_round
            entry[f"draft_tokens/{exit}"] = chosen.draft_tokens
            entry[f"predicted_speedup/{exit}"] = chosen.predicted_speedup
        if self.task is not None:
            entry |= {f"{self.task.name}/{metric}": score.mean for metric, score in scores.items()}
        return entry

    def _measure(self, llm: LLM) -> list[Measurement]:
        exits = default_exits(llm.decoder.shape.layers) if self.exits is None else self.exits
        return measure(llm, self.prompts, exits=exits, draft_tokens=self.draft_tokens, max_tokens=self.max_tokens)

    def _warn(self, error: LayerSkipError) -> None:
        self._refused = True
        warnings.warn(f"acceptance is not measured: {error}", stacklevel=3)


def default_exits(layers: int) -> list[int]:
    """A sixth, a quarter, a third and a half of the layers, rounded, at least 1.

    Example:
        >>> default_exits(12), default_exits(6), default_exits(2)
        ([2, 3, 4, 6], [1, 2, 3], [1])
    """
    return sorted({max(1, round(layers / parts)) for parts in (6, 4, 3, 2)})


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves torch's random numbers and threads as they were found."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
