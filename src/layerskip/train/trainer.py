"""The recipe as a transformers Trainer: layer dropout, the early-exit loss and its curriculum, and what they log.

Knows steps and schedules; the loss, the dropout and the curriculum are functions of them. Everything that `Trainer`
does it still does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import has_length

from layerskip.errors import NumericalError, RequestError
from layerskip.train.average import WeightAverage
from layerskip.train.curriculum import check_curriculum, exit_weights, exits_at
from layerskip.train.data.encoding import Rows
from layerskip.train.data.order import LengthBuckets
from layerskip.train.dropout import LayerDropout
from layerskip.train.estimate import Estimate, Work, estimate
from layerskip.train.exits import EarlyExits, ExitQuality
from layerskip.train.hidden import HiddenDropout
from layerskip.train.loading import load_model
from layerskip.train.loss import IGNORED, Teachers
from layerskip.train.muon import with_muon
from layerskip.train.parts import check_last_exit
from layerskip.train.rates import rates
from layerskip.train.saving import CompleteSaves
from layerskip.train.sharding import ShardedTrainer


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
        reference: checkpoint of the anchor's reference model, or several, whose distributions are averaged.
        loss_chunk: tokens whose logits are held at a time; 0 holds one exit's whole logits.
        hidden_dropout: chance that a number added to the states is left out, for families without such a setting.
        ema_decay: of the moving average of the weights, which is what is evaluated and saved; 0 is no average.
        muon: whether Muon updates the matrices of the layers; all other weights have the optimizer of `optim`.
        fully_shard: shard weights and optimizer over the processes (FSDP2), where no launcher's configuration does.

    `train_sampling_strategy="group_by_length"` uses `LengthBuckets` for our own rows.
    """

    dropout: float = field(default=0.0, metadata={"help": "p_max, the last layer's drop rate, in [0, 1)"})
    dropout_depth: str = field(default="exponential", metadata={"help": "exponential, linear, uniform or step"})
    dropout_time: str = field(default="constant", metadata={"help": "constant or exponential"})
    curriculum: str = field(default="rotational", metadata={"help": "rotational, gradual, all or last"})
    rotation: int = field(default=8, metadata={"help": "R of the rotational curriculum"})
    exit_scale: float = field(default=0.2, metadata={"help": "e_scale, how much earlier exits count"})
    distillation: float = field(default=0.0, metadata={"help": "share of exit loss learnt from the last layer"})
    anchor: float = field(default=0.0, metadata={"help": "weight of the divergence from the reference"})
    reference: str | list[str] | None = field(
        default=None, metadata={"help": "checkpoint of the anchor's reference model, or several"}
    )
    loss_chunk: int = field(default=4096, metadata={"help": "tokens whose logits are held at a time; 0 is all"})
    hidden_dropout: float = field(default=0.0, metadata={"help": "chance that a number added to the states is 0"})
    ema_decay: float = field(default=0.0, metadata={"help": "of the weights' moving average; 0 is no average"})
    muon: bool = field(default=False, metadata={"help": "Muon for the layers' matrices, optim for the rest"})
    fully_shard: bool = field(default=False, metadata={"help": "shard over the processes (FSDP2) without a launcher"})

    def teachers(self) -> Teachers:
        """What is learnt from beside the labels. Raises RequestError for values out of range."""
        return Teachers(distillation=self.distillation, anchor=self.anchor)


class LayerSkipTrainer(CompleteSaves, ShardedTrainer):
    """A `Trainer` that trains with the recipe. Its arguments are `Trainer`'s; `args` is a `LayerSkipConfig`.

    With dropout 0, curriculum "last" and loss_chunk 0 it is plain `Trainer`, bit for bit. Logs `exit_loss/E`,
    `dropout_rate/L` and `tokens_per_second` (of this process, fill included, since the last log) in training, and in
    evaluation loss, accuracy and agreement with the last layer at every exit.

    Args:
        references: the anchor's reference models; the checkpoints that `args.reference` names where there are none.

    Raises:
        RequestError: a setting out of range for this model.
    """

    args: LayerSkipConfig

    def __init__(
        self, model: nn.Module, args: LayerSkipConfig, *, references: Sequence[nn.Module] = (), **rest: Any
    ) -> None:
        super().__init__(model=model, args=args, **rest)
        if args.anchor and args.reference and not references:
            names = [args.reference] if isinstance(args.reference, str) else args.reference
            how = {"dtype": torch.float32, "device_map": {"": args.device}}
            references = [load_model(name, what="the reference ", **how) for name in names]
        self._check_labels(rest.get("compute_loss_func"))
        assert isinstance(self.model, nn.Module)
        inner = self.model
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # sharded or empty weights cannot be run
            check_last_exit(inner)
        self.exits = EarlyExits(inner, teachers=args.teachers(), chunk=args.loss_chunk or None, references=references)
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
        self.hidden_dropout = HiddenDropout(inner, rate=args.hidden_dropout)
        self.average = WeightAverage(inner, decay=args.ema_decay)
        if args.ema_decay:
            self._check_averaged()
            self.add_callback(self.average)
        self._micro_steps = (-1, 0)  # optimizer step, batches accumulated in it
        self._sums: dict[int, tuple[Tensor, int]] = {}  # exit -> sum of its losses since the last log, and how many
        self._tokens, self._since = 0, time.perf_counter()
        self._broken: Tensor | None = None
        self._qualities: dict[int, ExitQuality] = {}
        if args.fully_shard:
            self.shard()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains with dropout and early exits installed; they are gone afterwards, also after an exception."""
        with self.exits, self.dropout, self.hidden_dropout:
            output = super().train(*args, **kwargs)
        self.average.finish()
        self.check_before_saving()  # the last steps may have been neither logged nor saved
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # killed after its last checkpoint: transformers would do one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """`Trainer`'s, or Muon beside it. Raises RequestError where `with_muon` does."""
        if self.args.muon and self.optimizer is None:
            whole = cast("PreTrainedModel", self.model if model is None else model)
            self.optimizer = with_muon(
                whole,
                rest=self.get_optimizer_cls_and_kwargs(self.args, whole),
                decayed=self.get_decay_parameter_names(whole),
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
        return super().create_optimizer(model)

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
        inputs = self._once(self._prepare_inputs(inputs))
        # after training, transformers' own autocast around the model is gone
        with self.accelerator.autocast(), self.exits.watching():
            measured = self.exits.measure(inputs, model=model)
        for exit, quality in measured.items():
            self._qualities[exit] = quality + self._qualities[exit] if exit in self._qualities else quality
        last = measured[self.layers]
        return last.loss / last.tokens.clamp(min=1), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """`Trainer`'s, with every row: `dataloader_drop_last` is for training, where rows are plenty."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def _once(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels in the rows that accelerate repeats, so that every process gets as many."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels = inputs["labels"].clone()
        # the last batches of all processes, one behind the other: `remainder` rows, then repeated ones
        labels[max(state.remainder - self.args.process_index * len(labels), 0) :] = IGNORED
        return {**inputs, "labels": labels}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, with what every exit makes of the data beside the loss."""
        self._qualities = {}
        with self.average.applied():
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

    # -- what it will take

    def estimate(self, *, done: int = 0) -> Estimate:
        """Seconds and bytes of the run on each device; measures the device for a moment.

        Args:
            done: steps that a resumed run has behind it.

        Raises:
            RequestError: neither the data nor `max_steps` says when the run ends.
        """
        batches = self.get_train_dataloader()
        batch = next(iter(batches), None)
        if batch is None:
            raise RequestError(
                f"there is not one batch of per_device_train_batch_size {self.args.per_device_train_batch_size} on "
                f"{self.args.world_size} process(es) in the data; make it smaller, or give more data"
            )
        per_epoch = len(batches) if has_length(batches) else 0
        total = self._total_steps(per_epoch)
        lengths = self.train_dataset.lengths.mean() if isinstance(self.train_dataset, Rows) else None
        tokens = batch["input_ids"].shape
        steps = range(0, max(total, 1), max(total // 97, 1))  # a sample; curricula and rates change slowly or in turns
        exits = [len(self._weights(step, total)) for step in steps]
        dropped = [
            sum(
                rates(
                    layers=self.layers,
                    p_max=self.args.dropout,
                    depth=self.args.dropout_depth,
                    time=self.args.dropout_time,
                    step=step,
                    total_steps=max(total, 1),
                )
            )
            / self.layers
            for step in steps
        ]
        assert isinstance(self.model, nn.Module)
        sharded = self.args.fully_shard or self.is_fsdp_enabled or self.is_deepspeed_enabled
        return estimate(
            self.model,
            Work(
                steps=max(total - done, 0),
                rows=tokens[0],
                length=float(lengths) if lengths is not None else tokens[1],
                learnt=float((batch["labels"] != -100).float().mean()),
                accumulation=self.args.gradient_accumulation_steps,
                exits=sum(exits) / len(exits),
                dropped=sum(dropped) / len(dropped),
                chunk=self.args.loss_chunk,
                bytes_per_number=2
                if self.args.bf16 or self.args.fp16
                else next(self.model.parameters()).element_size(),
                checkpointing=bool(self.args.activation_checkpointing),
                shards=self.args.world_size if sharded else 1,
            ),
            references=self.exits.references,
        )

    def parameters(self) -> int:
        """Numbers in the whole model, adapters and frozen ones included."""
        return sum(weight.numel() for weight in self.exits.causal.parameters())

    def _total_steps(self, batches: int) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        if not batches:
            raise RequestError("the data has no known end; give max_steps")
        return math.ceil(math.ceil(batches / self.args.gradient_accumulation_steps) * self.args.num_train_epochs)

    # -- order

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(rows, Rows):
            # one step's rows on all ranks are of about one length, so that none waits for another
            together = self.args.train_batch_size * max(self.args.world_size, 1)
            return LengthBuckets(rows.lengths, batch_size=together, seed=self._order_seed())
        return super()._get_train_sampler(train_dataset)

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # -- the average of the weights

    def save_beside(self, checkpoint: Path) -> None:
        """The average of the weights, where one is kept."""
        if self.args.ema_decay:
            self.average.save(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.ema_decay:
            self.average.load(Path(resume_from_checkpoint))

    def _check_labels(self, own_loss: Any) -> None:
        """Raises RequestError for what takes the labels away before the model sees them: exits would not be learnt."""
        plain = self.args.curriculum == "last" and not self.args.anchor
        taken = {"label_smoothing_factor": self.args.label_smoothing_factor, "compute_loss_func": own_loss}
        for name, given in taken.items():
            if given and not plain:
                raise RequestError(f"{name} computes another loss than that of the exits; leave it out")

    def _check_averaged(self) -> None:
        if self.args.fully_shard or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RequestError("ema_decay averages whole weights, and these are sharded; leave it out, or do not shard")
        if self.args.load_best_model_at_end:
            raise RequestError("ema_decay ends with the average of the last steps; leave load_best_model_at_end out")

    # -- what must not be saved

    def _check_finite(self) -> None:
        """Stops where the loss was not finite, on all ranks at once."""
        if self._broken is not None:
            self._refuse("the loss is", self._broken)

    def check_before_saving(self) -> None:
        """Stops before weights are saved that a finite loss with broken gradients has spoilt."""
        self._check_finite()
        trained = (weight for weight in self.exits.causal.parameters() if weight.requires_grad)
        held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained]
        self._refuse("weights are", ~torch.stack([part.detach().isfinite().all() for part in held]).all())

    def _refuse(self, what: str, broken: Tensor) -> None:
        if self.args.world_size > 1:
            broken = cast("Tensor", self.accelerator.reduce(broken.float(), "sum"))
        if bool(broken):
            raise NumericalError(
                f"{what} not finite at or before step {self.state.global_step}; training stopped, and "
                f"{self.kept()}: begin again in another output_dir with a lower "
                "learning rate (init_from takes a checkpoint), for this run would fail again were it to resume from "
                "there"
            )
