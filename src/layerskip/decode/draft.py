"""What a drafter is, what it sees and what it returns.

Knows tokens, positions and laws; knows no acceptance rule and no particular drafter. B rows, K drafted tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from layerskip.decode.randomness import Purpose, uniform
from layerskip.decode.sampling import Law, Laws
from layerskip.decode.tree import ancestors
from layerskip.model.cache import Cache, RowIndex
from layerskip.model.decoder import Decoder


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for verification.

    A draft of K tokens has K + 1 nodes: node 0 is the last token the row knows, node i + 1 is drafted token i.

    Args:
        tokens: (B, K).
        proposals: per position, the (B, V) law its tokens were drawn from (the very tensor that was sampled), or None
            where the token was not drawn but chosen. None for all: the whole draft is deterministic.
        parents: (K,), the parent node of each drafted token, at most i for token i; None is a chain.
        lengths: (B,) how many of the tokens count in each row; None is all K. Chains only.
        hidden: (B, K + 1, D) states of the nodes after layer depth - 1, where the drafter ran the target's own first
            layers.
        depth: layers of the target that `hidden` has passed.
        confidence: per position, the drafter's largest probability there for each row, where its controller asked.
    """

    tokens: Tensor
    proposals: Sequence[Tensor | None] | None = None
    parents: Tensor | None = None
    lengths: Tensor | None = None
    hidden: Tensor | None = None
    depth: int = 0
    confidence: Sequence[Sequence[float]] | None = None

    def counts(self) -> list[int]:
        """How many tokens were drafted in each row."""
        rows, count = self.tokens.shape
        return [count] * rows if self.lengths is None else self.lengths.tolist()

    def within(self, room: Sequence[int]) -> Draft:
        """The same draft, no row's longer than its room: a row that ends sooner than its neighbours drafts as alone.

        A tree stays as it is. It is matched, not drawn, so its size does not change the text.
        """
        counts = self.counts()
        if self.parents is not None or all(n <= most for n, most in zip(counts, room, strict=True)):
            return self
        return replace(self, lengths=torch.tensor([*map(min, counts, room)], device=self.tokens.device))

    def ancestors(self) -> Tensor:
        """(K + 1, K) bool: which drafted tokens belong to the prefix of each node, itself included."""
        count = self.tokens.shape[1]
        if self.parents is None:
            return torch.ones(count + 1, count, dtype=torch.bool, device=self.tokens.device).tril(-1)
        return ancestors(self.parents)


@dataclass
class Rows:
    """The rows of one round, as a drafter sees them. Read only: the loop moves them on.

    Args:
        decoder: the target.
        cache: its cache; every position before `at` is valid in `exit` layers.
        exit: the target's depth; a drafter that exits early exits before it.
        law: the target law of each row.
        keys: a number per row, unique in the process: what a drafter files its own state under.
        ids: the tokens each row knows, prompt and generated.
        starts: where the generated part of each row begins.
        index: the rows of the cache.
        last: (B, 1) the last token of each row, not yet run.
        at: (B, 1) its position.
        seeds: (B,).
    """

    decoder: Decoder
    cache: Cache
    exit: int
    law: Law
    keys: list[int]
    ids: list[list[int]]
    starts: list[int]
    index: RowIndex
    last: Tensor
    at: Tensor
    seeds: Tensor

    @property
    def longest(self) -> int:
        """Tokens the longest row knows."""
        return max(map(len, self.ids))

    def uniform(self, purpose: Purpose, count: int, *, first: int = 0) -> Tensor:
        """(B, count) uniform numbers for the tokens `first` .. `first + count - 1` after the last known one."""
        if self.law.greedy:  # a one-hot law draws its token whatever the number
            return torch.zeros(len(self.ids), count, device=self.at.device)
        steps = torch.arange(first, first + count, device=self.at.device)
        offset = 0 if purpose is Purpose.TOKEN else steps + 1
        return uniform(self.seeds, self.at + 1 + steps, purpose, offset=offset)


class Drafter(Protocol):
    """What proposes tokens. It changes speed only: whatever it proposes, the text keeps the target's law.

    Choices of how much and how to draft may look at past rounds and at the drafted prefix, never at a token just
    drawn in order to throw it away.
    """

    name: str

    @property
    def tokens(self) -> int:
        """The most tokens it drafts in a round."""
        ...

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Raises RequestError where it cannot draft for this decoder, decoding at depth `exit`."""
        ...

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Drafts at most `tokens` tokens for every row."""
        ...

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Sees what became of its draft; everything that learns while decoding learns here.

        A drafter with a true `watches_plain` also sees rounds that drafted nothing.
        """
        ...

    def leave(self, key: int) -> None:
        """Lets go of what it keeps for a row that has left its batch."""
        ...


@dataclass(frozen=True)
class Outcome:
    """A verified draft.

    Args:
        target: (B, K + 1, V) the target law at every node, or the tokens it chooses.
        hidden: (B, K + 1, D) the target's last states at every node.
        accepted: per row, how many drafted tokens were kept.
        path: per row, the drafted tokens kept, as indices into the draft, in order.
        emitted: per row, the tokens the row gained: the kept ones and one more, cut at a stop.
        draft_seconds: of the round, spent on drafting.
        verify_seconds: spent on verifying.
    """

    target: Laws
    hidden: Tensor
    accepted: list[int]
    path: list[list[int]]
    emitted: list[list[int]]
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
