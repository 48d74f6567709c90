"""Which tokens a draft may propose: the likeliest first, then what the text at hand says.

Knows token ids and their order, and keeps a head for them. Only proposals are narrowed, so every choice here is exact.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence

from layerskip.decode.draft import Rows
from layerskip.errors import RequestError, check_ids, check_whole
from layerskip.model.decoder import Decoder
from layerskip.model.narrow import NarrowHead
from layerskip.model.shape import Shape

_FIXED = 0.75
"""Share of the places that keep their token; the others go to tokens of the text, the oldest first."""

_MEMORY = 0.015
"""Share of the weights that the copied rows of the head may take: with what keeps account of them under 2%."""


def rank(ids: Iterable[int]) -> list[int]:
    """The tokens of a text, the most frequent first.

    Example:
        >>> rank([3, 5, 5, 3, 8, 5])
        [5, 3, 8]
    """
    return [token for token, _ in Counter(ids).most_common()]


def fitting(shape: Shape) -> int:
    """How many tokens' rows of the head take 1.5% of a model's weights: a size for whoever has measured none.

    Example: 1.5% of 100,000 numbers are 1,500, rows of 32

        >>> from types import SimpleNamespace
        >>> fitting(SimpleNamespace(width=32, parameters=lambda: {"total": 100_000}))
        46
    """
    return int(_MEMORY * shape.parameters()["total"] / shape.width)


class Shortlist:
    """N places for tokens of a vocabulary.

    Args:
        size: N, at least 1.
        vocab: V; with N >= V nothing is left out.
        ranked: tokens by frequency, the likeliest first; those that are not named follow in the order of their ids,
            in which byte pair encodings learn their tokens, the most frequent pairs first.

    Example:
        >>> places = Shortlist(4, vocab=10, ranked=[7, 2])
        >>> places.tokens
        [7, 2, 0, 1]
        >>> places.admit([9, 7])
        {3: 9}
        >>> places.admit([8, 5])
        {3: 5}
        >>> places.reset()
        {3: 1}
    """

    def __init__(self, size: int, *, vocab: int, ranked: Sequence[int] = ()) -> None:
        self.tokens = [*dict.fromkeys((*ranked, *range(min(vocab, size + len(ranked)))))][:size]
        self._places = {token: place for place, token in enumerate(self.tokens)}
        self._first = min(int(_FIXED * len(self.tokens)), len(self.tokens) - 1)
        self._own, self._next = self.tokens[self._first :], self._first

    def admit(self, tokens: Iterable[int]) -> dict[int, int]:
        """Gives tokens of the text a place each, where they have none.

        Returns:
            The token of every place that changed.
        """
        changed = {}
        for token in tokens:
            if token in self._places:
                continue
            place = self._next
            self._next = self._next + 1 if self._next + 1 < len(self.tokens) else self._first
            del self._places[self.tokens[place]]
            self.tokens[place], self._places[token] = token, place
            changed[place] = token
        return changed

    def reset(self) -> dict[int, int]:
        """Gives tokens their first places back. Returns the token of every place that changed."""
        own = enumerate(self._own, self._first)
        changed = {place: token for place, token in own if token != self.tokens[place]}
        for place in changed:
            del self._places[self.tokens[place]]
        for place, token in changed.items():
            self.tokens[place], self._places[token] = token, place
        self._next = self._first
        return changed


class Narrowed:
    """Heads of N tokens for the decoders that a drafter drafts for, which follow the texts: a token of a prompt, or one
    that was emitted, gets a place. Once no row is left, the tokens of its text lose them again.

    Rows that decode side by side share the places, so what is proposed to one depends on its neighbours.

    Args:
        size: N.
        ranked: tokens by frequency, as for `Shortlist`.

    Raises:
        RequestError: no place.
    """

    def __init__(self, size: int, ranked: Sequence[int] = ()) -> None:
        check_whole("draft vocabulary", size)
        if size < 1:
            raise RequestError(f"a draft vocabulary of {size} tokens is not possible; use 1 or more")
        self.size, self.ranked = size, tuple(ranked)
        self._heads: weakref.WeakKeyDictionary[Decoder, tuple[Shortlist, NarrowHead]] = weakref.WeakKeyDictionary()
        self._seen: dict[int, int] = {}  # key of a row -> how many of its tokens were given a place
        self._lock = threading.Lock()  # one drafter may serve several batches

    def check(self, decoder: Decoder) -> None:
        """Raises RequestError where this would leave nothing out, or ranks tokens outside the vocabulary."""
        vocab = decoder.shape.vocab
        if self.size >= vocab:
            raise RequestError(
                f"a draft vocabulary of {self.size} is not below this model's {vocab} tokens; "
                f"use 1..{vocab - 1}, or leave it out"
            )
        check_ids(self.ranked, vocab=vocab, name="ranked token")

    def leave(self, key: int) -> None:
        """Forgets a row."""
        self._seen.pop(key, None)

    def head(self, rows: Rows) -> NarrowHead:
        """The head for a round of these rows: gives what they know by now a place."""
        with self._lock:
            places, head = self._head(rows.decoder)
            # a new text finds the places as the first one did: with a seed it repeats, and no run helps the next
            changed = {} if self._seen else places.reset()
            for key, ids in zip(rows.keys, rows.ids, strict=True):
                changed |= places.admit(ids[self._seen.get(key, 0) :])
                self._seen[key] = len(ids)
            if changed:
                head.replace(rows.decoder, changed)
            return head

    def _head(self, decoder: Decoder) -> tuple[Shortlist, NarrowHead]:
        found = self._heads.get(decoder)
        if found is None:
            places = Shortlist(self.size, vocab=decoder.shape.vocab, ranked=self.ranked)
            found = self._heads[decoder] = places, NarrowHead(decoder, places.tokens)
        return found


def narrowed(size: int | None, ranked: Sequence[int]) -> Narrowed | None:
    """What options mean. Raises RequestError for a size below 1, or a ranking without a size."""
    if size is not None:
        return Narrowed(size, ranked)
    if ranked:
        raise RequestError("a ranking of tokens is for a draft vocabulary; give its size too, or leave it out")
    return None
