"""Muon for the matrices of the layers, another optimizer for all other weights: two optimizers that act as one.

Muon (Jordan et al., 2024; Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982) moves a matrix by its
momentum with all singular values made about equal, so that rare directions learn as fast as frequent ones. It is meant
for hidden matrices: embeddings, heads, norms and biases keep the optimizer that `optim` names. Knows weights and
optimizers; knows no steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layerskip.errors import RequestError
from layerskip.train.parts import parts


class Together(Optimizer):
    """Several optimizers as one: a step is one of each, schedules and checkpoints see the groups of all.

    Args:
        members: each with weights of its own.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = list(members)
        super().__init__([group for member in members for group in member.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self._members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The members work on the groups and the state that are seen from outside."""
        begin = 0
        for member in self._members:
            end = begin + len(member.param_groups)
            member.param_groups, member.state = self.param_groups[begin:end], self.state
            begin = end


def with_muon(
    model: nn.Module,
    *,
    rest: tuple[Any, Mapping[str, Any]],
    decayed: Collection[str],
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """Muon for the matrices of the layers and another optimizer for all other trained weights.

    Muon's updates are as large as AdamW's (0.2 sqrt(max(rows, columns)) of an orthogonal matrix, arXiv 2502.16982), so
    that one learning rate serves both.

    Args:
        model: a transformers causal language model, plain or wrapped.
        rest: class and settings of the other optimizer, as `Trainer.get_optimizer_cls_and_kwargs` gives them.
        decayed: names of the other weights that decay.
        learning_rate: at the top of the schedule.
        weight_decay: of the matrices, and of what `decayed` names.

    Raises:
        RequestError: no matrix of a layer is trained, or the other optimizer chooses its weights itself.
    """
    optimizer, settings = rest
    if not isinstance(optimizer, type) or {"params", "model", "optimizer_dict"} & settings.keys():
        raise RequestError("muon is not possible beside this optim; use adamw_torch or adamw_torch_fused")
    inside = {weight for layer in parts(model).layers for weight in layer.parameters() if weight.ndim == 2}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [weight for weight in trained.values() if weight in inside]
    if not matrices:
        raise RequestError("muon is for the matrices of the layers, and none of them is trained; leave muon out")
    others = {name: weight for name, weight in trained.items() if weight not in inside}
    groups = [
        {"params": [weight for name, weight in others.items() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    first = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together([first, optimizer(groups, **settings)])
