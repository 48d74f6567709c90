"""The early-exit loss: cross-entropy at several depths through the one shared norm and head.

Knows hidden states, labels and a head that is called as a module (so adapted and sharded heads work); knows no
curriculum and no trainer. The logits of all exits are never held at once: one exit and one chunk of tokens at a time,
computed again in the backward pass. Sizes: B rows, T positions, N = B T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layerskip.errors import RequestError

IGNORED = -100
"""The label of a token that is not learnt, as in transformers."""

Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Teachers:
    """What is learnt from beside the labels; all off by default.

    Args:
        distillation: share of an earlier exit's loss that is its divergence from the last layer's own, detached
            distribution.
        anchor: weight of the last layer's divergence from the reference models' distribution, added to its loss.

    Raises:
        RequestError: distillation outside 0..1, or a negative anchor.
    """

    distillation: float = 0.0
    anchor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise RequestError(f"distillation {self.distillation} is not possible; use 0..1")
        if self.anchor < 0:
            raise RequestError(f"anchor {self.anchor} is not possible; use 0 or more")


@dataclass(frozen=True)
class ExitLosses:
    """The loss to train on, and each exit's own cross-entropy (mean per learnt token, detached) for the logs."""

    total: Tensor
    by_exit: dict[int, Tensor]


@dataclass(frozen=True)
class ExitLoss:
    """How hidden states become the loss.

    Args:
        norm: the shared final norm.
        head: the shared head.
        teachers: what is learnt from beside the labels.
        chunk: tokens whose logits are held at a time; None holds the whole logits of one exit, ignored tokens
            included, as plain training does (and equals it bit for bit when the last layer is the only exit).
    """

    norm: Project
    head: Project
    teachers: Teachers = Teachers()
    chunk: int | None = None

    def __call__(
        self,
        states: Mapping[int, Tensor],
        final: Tensor,
        labels: Tensor,
        *,
        weights: Mapping[int, float],
        items: Tensor | int | None = None,
        references: Sequence[tuple[Tensor, Project]] = (),
    ) -> ExitLosses:
        """The weighted sum of the exits' losses.

        Args:
            states: earlier exit -> hidden states (B, T, D) after its last layer.
            final: (B, T, D) the last layer's states *after* the norm, as the body of a transformers model returns them.
            labels: (B, T), unshifted.
            weights: exit -> weight, the last layer's included.
            items: learnt tokens of the whole (accumulated, data-parallel) batch, so that accumulation and padding do
                not change the mean; None counts this batch's.
            references: final states (B, T, D) of each of the anchor's reference models, and its head; the anchor is the
                mean of their distributions.
        """
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        learnt = (targets != IGNORED).sum()
        count = learnt if items is None else items
        final, last = final.flatten(0, 1), max(weights)
        anchors, heads = [states.flatten(0, 1) for states, _ in references], [head for _, head in references]
        total, by_exit = torch.zeros((), device=targets.device), {}
        for exit, weight in weights.items():
            if exit == last:
                parts = [
                    self._run(self._last, h, t, heads, *anchor)
                    for h, t, *anchor in self._chunks(targets, final, targets, *anchors)
                ]
            else:
                state = states[exit].flatten(0, 1)
                parts = [
                    self._run(self._early, h, t, f) for h, t, f in self._chunks(targets, state, targets, final.detach())
                ]
            total = total + weight * (sum(loss for loss, _ in parts) / count)
            by_exit[exit] = torch.stack([entropy.detach() for _, entropy in parts]).sum() / learnt.clamp(min=1)
        return ExitLosses(total, by_exit)

    def _chunks(self, targets: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        if self.chunk is None:
            yield tensors
            return
        # ignored tokens cost no logits
        for piece in (targets != IGNORED).nonzero()[:, 0].split(self.chunk):
            yield tuple(tensor[piece] for tensor in tensors)

    def _run(self, part: Callable[..., tuple[Tensor, Tensor]], *inputs: object) -> tuple[Tensor, Tensor]:
        loss, entropy = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return loss, entropy

    def _last(
        self, hidden: Tensor, targets: Tensor, heads: Sequence[Project], *references: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self.head(hidden).float()
        entropy = cross_entropy(logits, targets)
        if not references or not self.teachers.anchor:
            return entropy, entropy
        with torch.no_grad():
            laws = [head(states).float().log_softmax(-1) for head, states in zip(heads, references, strict=True)]
            wanted = laws[0] if len(laws) == 1 else torch.stack(laws).logsumexp(0) - math.log(len(laws))
        return entropy + self.teachers.anchor * divergence(wanted, logits, targets), entropy

    def _early(self, hidden: Tensor, targets: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.norm(hidden)).float()
        entropy = cross_entropy(logits, targets)
        share = self.teachers.distillation
        if not share:
            return entropy, entropy
        with torch.no_grad():
            wanted = self.head(final).float().log_softmax(-1)
        return (1 - share) * entropy + share * divergence(wanted, logits, targets), entropy


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over learnt tokens of -log p(target), for logits (n, V) and targets (n,)."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def divergence(wanted: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over learnt tokens of KL(wanted || softmax(logits)); `wanted` (n, V) are log-probabilities."""
    each = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    return (each * (targets != IGNORED)).sum()
