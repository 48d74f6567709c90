"""The shared head restricted to some tokens, or to 8 bits: what a draft predicts through where the vocabulary is large.

Drafting only proposes, so a token it cannot propose costs a round its length and never changes the text. Knows weights
and token ids; does not know which tokens deserve a place. D width, V vocabulary, N places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerskip.model.decoder import Decoder
from layerskip.model.native.blocks import Blocks

_AT_ONCE = 256
"""Rows that are copied at a time: bounds the memory of what is between."""


class NarrowHead:
    """The final norm and a copy of N rows of the head.

    Weights of the kernels stay what they are, quantised or not. Others become plain: another row would mean to pack all
    of them again, which takes as long as several drafts. It does not hold on to the decoder. Another thread may replace
    rows between two predictions: whatever law a proposal is drawn from, it is verified as drawn from that.

    Args:
        decoder: whose head.
        tokens: the token in each place, N different ones.

    Attributes:
        head: the rows, stored.
        names: (N,) the token in each place.
    """

    def __init__(self, decoder: Decoder, tokens: Sequence[int]) -> None:
        self.names = torch.empty(len(tokens), dtype=torch.long, device=decoder.device)
        whole, width = decoder.get_submodule("head"), decoder.shape.width
        self.head: nn.Module
        if isinstance(whole, Blocks):
            self.head = whole.blank(len(tokens))
        else:
            self.head = nn.Linear(width, len(tokens), bias=False, device=decoder.device, dtype=decoder.dtype)
            self.head.requires_grad_(False)
        for start in range(0, len(tokens), _AT_ONCE):
            self.replace(decoder, dict(enumerate(tokens[start : start + _AT_ONCE], start)))

    def replace(self, decoder: Decoder, changed: Mapping[int, int]) -> None:
        """Puts other tokens into some places (place -> token), for every draft from now on."""
        where, new = torch.tensor([[*changed], [*changed.values()]], device=self.names.device)
        self.names[where] = new
        if isinstance(self.head, Blocks):
            whole = decoder.get_submodule("head")
            assert isinstance(whole, Blocks)
            self.head.put(where, whole, new)
        else:
            weight = self.head.get_parameter("weight")
            weight[where] = decoder.head_rows(new)

    def logits(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> (..., V), -inf for tokens that have no place."""
        narrow = decoder.predict(hidden, self.head)
        wide = narrow.new_full((*narrow.shape[:-1], decoder.shape.vocab), -torch.inf)
        return wide.index_copy_(-1, self.names, narrow)


class CoarseHead:
    """The final norm and the head at 8 bits: half of the bytes of bfloat16, for drafts through all tokens.

    Args:
        decoder: whose head; its weights are those of the kernels.

    Attributes:
        head: the rows, quantised.
        names: none, as every token has its place.
    """

    names: Tensor | None = None

    def __init__(self, decoder: Decoder) -> None:
        whole = decoder.get_submodule("head")
        assert isinstance(whole, Blocks)
        self.head: nn.Module = whole.coarse(8)

    def logits(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> (..., V)."""
        return decoder.predict(hidden, self.head)
