"""How a training run looks to whoever waits for it: a bar with the time left on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerskip.cli.screen import Screen
from layerskip.train.estimate import duration


class TrainingProgress(TrainerCallback):
    """Shows steps, losses, tokens per second and the time left, on the first process.

    Args:
        screen: where to.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._bar: Progress | None = None
        self._task: Any = None
        self._begun, self._from = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begins the bar."""
        self._begun, self._from = time.perf_counter(), state.global_step
        if not state.is_world_process_zero or not self._screen.interactive:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._screen.err,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("steps", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Writes a line."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            done = state.global_step - self._from
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self._begun) / max(done, 1)
            speed = float(logs["tokens_per_second"]) * args.world_size
            self._line(
                f"step {state.global_step:,}/{state.max_steps:,}  loss {float(logs['loss']):.4f}  "
                f"lr {float(logs.get('learning_rate', 0)):.2e}  {speed:,.0f} tokens/s  {duration(left)} left"
            )
        elif "eval_loss" in logs:
            self._line(f"step {state.global_step:,}  " + evaluation_line(logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Says so."""
        if state.is_world_process_zero:
            self._line(f"step {state.global_step:,}  saved checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar, also after an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            self._screen.note(text)


def evaluation_line(metrics: dict[str, Any]) -> str:
    """The last layer's loss, and how often each exit agrees with it."""
    exits = sorted(int(name.rsplit("/", 1)[1]) for name in metrics if name.startswith("eval_exit_agreement/"))
    agreement = "  ".join(f"{exit}: {float(metrics[f'eval_exit_agreement/{exit}']):.1%}" for exit in exits[:-1])
    accuracy = float(metrics.get(f"eval_exit_accuracy/{exits[-1]}", 0.0)) if exits else 0.0
    return f"eval loss {float(metrics['eval_loss']):.4f}, accuracy {accuracy:.2%}; agreement at exit {agreement}"
