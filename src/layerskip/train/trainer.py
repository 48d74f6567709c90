"""The recipe as a transformers Trainer: layer dropout, the early-exit loss and its curriculum, and what they log.

Knows steps and schedules; the loss, the dropout and the curriculum are functions of them. Everything that `Trainer`
does it still does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from layerskip.errors import NumericalError
from layerskip.train.curriculum import check_curriculum, exit_weights, exits_at
from layerskip.train.dropout import LayerDropout
from layerskip.train.exits import EarlyExits, ExitQuality
from layerskip.train.loss import Teachers


@dataclass
class LayerSkipConfig(TrainingArguments):
    """`TrainingArguments` with the recipe's settings (LayerSkip, Elhoushi et al., ACL 2024, section 4.1).

    Args:
        dropout: p_max, the last layer's drop rate, in [0, 1).
        dropout_depth: how rates rise with depth: "exponential" (the paper's), "linear", "uniform" or "step".
        dropout_time: "constant" (continual training, finetuning) or "exponential" (from scratch).
        curriculum: "rotational", "gradual", "all", or "last", which is plain training.
        rotation: R of the rotational curriculum.
        exit_scale: e_scale, how much earlier exits count.
        distillation: share of an earlier exit's loss that is its divergence from the last layer's own distribution.
        anchor: weight of the last layer's divergence from `reference`.
        reference: checkpoint of the anchor's reference model.
        loss_chunk: tokens whose logits are held at a time; 0 holds one exit's whole logits.
    """

    dropout: float = field(default=0.0, metadata={"help": "p_max, the last layer's drop rate, in [0, 1)"})
    dropout_depth: str = field(default="exponential", metadata={"help": "exponential, linear, uniform or step"})
    dropout_time: str = field(default="constant", metadata={"help": "constant or exponential"})
    curriculum: str = field(default="rotational", metadata={"help": "rotational, gradual, all or last"})
    rotation: int = field(default=8, metadata={"help": "R of the rotational curriculum"})
    exit_scale: float = field(default=0.2, metadata={"help": "e_scale, how much earlier exits count"})
    distillation: float = field(default=0.0, metadata={"help": "share of exit loss learnt from the last layer"})
    anchor: float = field(default=0.0, metadata={"help": "weight of the divergence from the reference"})
    reference: str | None = field(default=None, metadata={"help": "checkpoint of the anchor's reference model"})
    loss_chunk: int = field(default=4096, metadata={"help": "tokens whose logits are held at a time; 0 is all"})

    def teachers(self) -> Teachers:
        """What is learnt from beside the labels. Raises RequestError for values out of range."""
        return Teachers(distillation=self.distillation, anchor=self.anchor)


class LayerSkipTrainer(Trainer):
    """A `Trainer` that trains with the recipe. Its arguments are `Trainer`'s; `args` is a `LayerSkipConfig`.

    With dropout 0 and curriculum "last" it is plain `Trainer`, bit for bit. Logs `exit_loss/E`, `dropout_rate/L` and
    `tokens_per_second` in training, and in evaluation loss, accuracy and agreement with the last layer at every exit.

    Args:
        reference: the anchor's reference model; the checkpoint that `args.reference` names where None.

    Raises:
        RequestError: a setting out of range for this model.
    """

    args: LayerSkipConfig

    def __init__(
        self, model: nn.Module, args: LayerSkipConfig, *, reference: nn.Module | None = None, **rest: Any
    ) -> None:
        super().__init__(model=model, args=args, **rest)
        if reference is None and args.anchor and args.reference:
            reference = AutoModelForCausalLM.from_pretrained(
                args.reference, dtype=torch.float32, device_map={"": args.device}
            )
        assert isinstance(self.model, nn.Module)
        inner = self.model
        self.exits = EarlyExits(inner, teachers=args.teachers(), chunk=args.loss_chunk or None, reference=reference)
        self.layers = self.exits.layers
        check_curriculum(args.curriculum, layers=self.layers, period=args.rotation)
        self.dropout = LayerDropout(
            inner,
            p_max=args.dropout,
            depth=args.dropout_depth,
            time=args.dropout_time,
            seed=args.seed,
            rank=args.process_index,
        )
        self._micro_steps = (-1, 0)  # optimizer step, batches accumulated in it
        self._sums: dict[int, tuple[Tensor, int]] = {}  # exit -> sum of its losses since the last log, and how many
        self._tokens, self._since = 0, time.perf_counter()
        self._broken: Tensor | None = None
        self._qualities: dict[int, ExitQuality] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains with dropout and early exits installed; they are gone afterwards, also after an exception."""
        with self.exits, self.dropout:
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass under the curriculum's exits and this step's draws."""
        step, total = self.state.global_step, max(self.state.max_steps, 1)
        known, micro = self._micro_steps
        micro = micro + 1 if known == step else 0
        self._micro_steps = (step, micro)
        self.dropout.begin(step=step, micro_step=micro, total_steps=total)
        self.exits.begin(self._weights(step, total))
        tokens = int(inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._note(loss, tokens)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each exit's loss, each layer's drop rate and the speed to what is logged."""
        if "loss" in logs:
            self._check_finite()
            for exit, (total, count) in sorted(self._sums.items()):
                logs[f"exit_loss/{exit}"] = float(total) / count
            for layer, (seen, dropped) in enumerate(self.dropout.observed()):
                if dropped:
                    logs[f"dropout_rate/{layer}"] = dropped / seen
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens / (now - self._since)
            self._sums, self._tokens, self._since = {}, 0, now
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Measures every exit on a batch; the loss returned is the last layer's."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager(), self.exits.watching():
            measured = self.exits.measure(inputs)
        for exit, quality in measured.items():
            self._qualities[exit] = quality + self._qualities[exit] if exit in self._qualities else quality
        last = measured[self.layers]
        return last.loss / last.tokens.clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, with what every exit makes of the data beside the loss."""
        self._qualities = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = output.metrics if output.metrics is not None else {}
        for exit, quality in self._qualities.items():
            loss, correct, agreeing, tokens = self.accelerator.reduce(quality.stacked(), "sum").tolist()
            if exit == self.layers:
                metrics[f"{prefix}_loss"] = loss / max(tokens, 1)  # by token, whatever the batches
            metrics[f"{prefix}_exit_loss/{exit}"] = loss / max(tokens, 1)
            metrics[f"{prefix}_exit_accuracy/{exit}"] = correct / max(tokens, 1)
            metrics[f"{prefix}_exit_agreement/{exit}"] = agreeing / max(tokens, 1)
        return output

    def _weights(self, step: int, total: int) -> dict[int, float]:
        exits = exits_at(
            self.args.curriculum, layers=self.layers, step=step, total_steps=total, period=self.args.rotation
        )
        weights = exit_weights(exits, layers=self.layers, scale=self.args.exit_scale)
        # an exit that weighs nothing (exit 1, as the paper prints the formula) would cost a head for nothing
        return {exit: weight for exit, weight in zip(exits, weights, strict=True) if weight or exit == self.layers}

    def _note(self, loss: Tensor, tokens: int) -> None:
        self._tokens += tokens
        for exit, value in self.exits.by_exit.items():
            total, count = self._sums.get(exit, (torch.zeros_like(value), 0))
            self._sums[exit] = (total + value, count + 1)
        broken = ~torch.isfinite(loss.detach())
        self._broken = broken if self._broken is None else self._broken | broken

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        super()._save_checkpoint(model, trial)

    def _check_finite(self) -> None:
        """Stops before weights spoilt by a loss that is not finite are saved."""
        if self._broken is not None and bool(self._broken):
            raise NumericalError(
                f"the loss is not finite at or before step {self.state.global_step}; training stopped, and the last "
                f"checkpoint in {self.args.output_dir} is from before it: lower the learning rate and resume from there"
            )
