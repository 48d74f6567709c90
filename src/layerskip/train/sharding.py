"""FSDP2 without a launcher's configuration: `fully_shard` on every layer and on the model, on any device.

accelerate turns an FSDP configuration into DDP on the CPU without a word; this is what `fully_shard: true` does there,
and wherever no configuration is wanted. Knows parameters and optimizers as DTensors, and what
a `Trainer` saves and resumes of them; knows no steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from transformers import Trainer

from layerskip.errors import RequestError
from layerskip.train.parts import parts

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(model: nn.Module) -> None:
    """Shards a model over all processes, in place: each layer on its own, what is left with the whole.

    Raises:
        RequestError: there are no processes to shard over, or the model is sharded already.
    """
    if not dist.is_initialized():
        raise RequestError("fully_shard needs several processes; start them with torchrun --nproc-per-node 2, say")
    if isinstance(model, FSDPModule):
        raise RequestError("the model is sharded already; leave fully_shard out")
    for layer in parts(model).layers:
        fully_shard(layer)
    fully_shard(model)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights, gathered on the first process; empty on others. Every process has to call it."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state, gathered on the first process; empty on others. Every process has to call it."""
    return cast("dict[str, Any]", get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def spread_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Gives every process its part of the first one's weights."""
    set_model_state_dict(model, weights, options=_SPREAD)


def spread_moments(model: nn.Module, optimizer: Optimizer, moments: dict[str, Any]) -> None:
    """Gives every process its part of the first one's optimizer state."""
    set_optimizer_state_dict(model, optimizer, moments, options=_SPREAD)


class ShardedTrainer(Trainer):
    """A `Trainer` that trains, saves and resumes a model that `shard` has sharded."""

    _sharded = False

    def shard(self) -> None:
        """Shards the model. Raises what `shard` raises."""
        assert isinstance(self.model, nn.Module)
        shard(self.model)
        self._sharded = True
        # transformers' word for a model whose placement and gradient reduction are its own business
        self.is_distributed_loading_by_transformers = True

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # transformers' wants a configuration that `sharding` has not; reduced at every batch, gradients stay shards
        yield

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._sharded and state_dict is None:
            assert isinstance(self.model, nn.Module)
            state_dict = whole_weights(self.model)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        assert isinstance(self.model, nn.Module)
        first = self.args.process_index == 0
        files = Path(resume_from_checkpoint).glob("model*.safetensors") if first else ()  # large models have several
        spread_weights(self.model, {name: weight for file in files for name, weight in load_file(file).items()})

    def _load_best_model(self) -> None:
        if not self._sharded:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert isinstance(self.model, nn.Module)
        assert self.optimizer is not None
        moments = whole_moments(self.model, _inner(self.optimizer))
        if self.args.should_save:
            torch.save(moments, Path(output_dir) / "optimizer.pt")
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert isinstance(self.model, nn.Module)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        first = self.args.process_index == 0
        moments = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True) if first else {}
        spread_moments(self.model, _inner(self.optimizer), moments)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer under accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
