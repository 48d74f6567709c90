"""Puts the early-exit loss inside a transformers model's own forward.

There, because FSDP2 gives norm and head back when the forward ends and DDP synchronises on what the forward used.
Knows where layers, norm and head are (`parts`) and what the loss needs; knows no schedule. Nothing is added to the
model's state: removed, it is the model it was.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from layerskip.errors import RequestError
from layerskip.train.loss import IGNORED, ExitLoss, Teachers, cross_entropy
from layerskip.train.parts import Parts, head_is_adapted, parts, ties_an_adapter, unwrap


class EarlyExits:
    """Lets a causal language model return the early-exit loss when it is called with labels in training mode.

    Args:
        model: the model, plain or wrapped.
        teachers: what the exits learn from beside the labels.
        chunk: tokens whose logits are held at a time; None holds one exit's.
        references: the anchor's reference models, frozen; needed where `teachers.anchor` is set.

    Raises:
        RequestError: the model's layers, norm or head are not found, its head is adapted, or the reference is missing
            or of another vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teachers: Teachers = Teachers(),  # noqa: B008  # frozen
        chunk: int | None = None,
        references: Sequence[nn.Module] = (),
    ) -> None:
        self.causal, self.parts = unwrap(model), parts(model)
        if head_is_adapted(self.parts):
            raise RequestError(
                "the head is wrapped by an adapter (LoRA): all exits share one head, and with the adapter left out or "
                "merged later they would not be the exits that were trained; leave the head out of its target modules"
            )
        if ties_an_adapter(self.causal):
            raise RequestError(
                "the embedding is wrapped by an adapter (LoRA) and is the head as well: merged, the exits would not be "
                "those that were trained; leave it out of target_modules, or name it in modules_to_save"
            )
        if getattr(self.causal.config, "output_router_logits", False):
            raise RequestError(
                "output_router_logits adds a loss of the router's, which the exits' loss has not; leave it out"
            )
        if teachers.anchor and not references:
            raise RequestError("an anchor needs a reference model to stay close to; give one")
        self.layers = len(self.parts.layers)
        self.loss = ExitLoss(_norm(self.parts), self.parts.head, teachers=teachers, chunk=chunk)
        self.references = [reference.eval().requires_grad_(False) for reference in references]
        self._check_references()
        self.weights: Mapping[int, float] | None = None
        self._wanted: frozenset[int] = frozenset()
        self.by_exit: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._qualities: dict[int, ExitQuality] = {}
        self._measuring = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def install(self) -> EarlyExits:
        """Wraps the model's forward and hooks its layers."""
        if self._hooks:
            raise RequestError("early exits are installed on this model already; remove them first")
        for exit, layer in enumerate(self.parts.layers, start=1):
            self._hooks.append(layer.register_forward_hook(self._keeper(exit)))
        # wrapped, so that Trainer still reads which arguments the model takes
        self.causal.forward = functools.wraps(self.causal.forward)(functools.partial(self._forward))
        return self

    def remove(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.causal.__dict__.pop("forward", None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Installed while it lasts, where it was not already: evaluation may come without training."""
        if self._hooks:
            yield
            return
        with self:
            yield

    def __enter__(self) -> EarlyExits:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def begin(self, weights: Mapping[int, float] | None) -> None:
        """Which exits the next forwards learn at, and their weights; None is the model's own loss."""
        self.weights = weights
        self._wanted = frozenset(weights or ()) - {self.layers}

    def _keeper(self, exit: int) -> Any:
        def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if exit in self._wanted:
                self._states[exit] = output if isinstance(output, Tensor) else output[0]

        return keep

    def _forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        plain = type(self.causal).forward
        if self._measuring:
            assert labels is not None
            self._measure(self.parts_body()(*args, **kwargs | {"use_cache": False})[0], labels)
            return CausalLMOutputWithPast()
        if labels is None or self.weights is None or not self.causal.training:
            return plain(self.causal, *args, labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("return_dict", "logits_to_keep")}
        try:
            body = self.parts_body()
            output = body(*args, **kwargs)
            losses = self.loss(
                self._states,
                output[0],
                labels,
                weights=self.weights,
                items=items,
                references=self._anchors(args, kwargs),
            )
        finally:
            self._states = {}  # the graph keeps what it needs
        self.by_exit = losses.by_exit
        return CausalLMOutputWithPast(loss=losses.total, past_key_values=getattr(output, "past_key_values", None))

    @torch.no_grad()
    def measure(self, inputs: Mapping[str, Any], *, model: nn.Module | None = None) -> dict[int, ExitQuality]:
        """What every exit makes of a batch, without training on it. Has to be installed.

        Args:
            inputs: the model's arguments, `labels` (B, T) among them.
            model: the model in its wrappers; None is the model itself. FSDP2 gathers norm and head for its forward.
        """
        wanted, self._wanted = self._wanted, frozenset(range(1, self.layers))
        self._measuring = True
        try:
            (model or self.causal)(**inputs)
            return self._qualities
        finally:
            self._wanted, self._states, self._qualities, self._measuring = wanted, {}, {}, False

    def _measure(self, final: Tensor, labels: Tensor) -> None:
        learnt = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED  # (B, T)
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:][learnt]
        best = self.parts.head(final[learnt]).argmax(-1)
        for exit in range(1, self.layers + 1):
            states = final[learnt] if exit == self.layers else self.loss.norm(self._states[exit][learnt])
            logits = self.parts.head(states).float()
            own = logits.argmax(-1)
            self._qualities[exit] = ExitQuality(
                loss=cross_entropy(logits, targets),
                correct=(own == targets).sum(),
                agreeing=(own == best).sum(),
                tokens=learnt.sum(),
            )

    def parts_body(self) -> nn.Module:
        """What runs the layers and the norm: the model without its head."""
        return self.causal.base_model if self.causal.base_model is not self.causal else self.parts.body

    @torch.no_grad()
    def _anchors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, nn.Module]]:
        if not self.loss.teachers.anchor:
            return []
        given = {**kwargs, "use_cache": False}
        return [(unwrap(model).base_model(*args, **given)[0], parts(model).head) for model in self.references]

    def _check_references(self) -> None:
        for reference in self.references:
            ours, theirs = self.causal.config.vocab_size, unwrap(reference).config.vocab_size
            if ours != theirs:
                raise RequestError(
                    f"the reference has {theirs} tokens and the model {ours}; use a model of the same tokenizer"
                )


@dataclass(frozen=True)
class ExitQuality:
    """Sums over the learnt tokens of a batch: cross-entropy, right predictions, and those equal to the last layer's."""

    loss: Tensor
    correct: Tensor
    agreeing: Tensor
    tokens: Tensor

    def __add__(self, other: ExitQuality) -> ExitQuality:
        return ExitQuality(
            self.loss + other.loss,
            self.correct + other.correct,
            self.agreeing + other.agreeing,
            self.tokens + other.tokens,
        )

    def stacked(self) -> Tensor:
        """The four sums as one tensor, to be reduced over ranks together."""
        return torch.stack([self.loss.double(), self.correct.double(), self.agreeing.double(), self.tokens.double()])


def _norm(found: Parts) -> Any:
    return found.norm if found.norm is not None else nn.Identity()
