"""Drafting by copying: what followed the last tokens when they occurred before, in the context or in a text the
caller predicts.

Copies cost no model pass. They are chosen, not drawn, so they are verified by sample-and-match and stay exact at any
temperature (prompt lookup decoding, Saxena 2023; the caller's text is OpenAI's "predicted outputs").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from layerskip.decode.controllers.fixed import check_tokens
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.errors import RequestError, check_ids, check_whole
from layerskip.model.decoder import Decoder


class NgramIndex:
    """Where each n-gram of a growing text last ended.

    Example:
        >>> index = NgramIndex(2)
        >>> index.extend([1, 2, 3, 1, 2])
        >>> index.after([1, 2, 3, 1, 2], 2)
        [3, 1]
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.ends: dict[tuple[int, ...], int] = {}
        self.known = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Indexes what `ids` added since the last call: every n-gram that something follows."""
        for n in range(1, self.longest + 1):
            first, last = max(self.known, n), len(ids)
            if first < last:
                grams = zip(*(ids[first - n + i : last - n + i] for i in range(n)), strict=True)
                self.ends.update(zip(grams, range(first, last), strict=True))
        self.known = len(ids)

    def after(self, ids: Sequence[int], count: int, *, source: Sequence[int] | None = None) -> list[int]:
        """Up to `count` tokens that followed the longest known n-gram ending `ids`; [] where none occurred."""
        return self.find(ids, count, source=source)[0]

    def find(self, ids: Sequence[int], count: int, *, source: Sequence[int] | None = None) -> tuple[list[int], int]:
        """The same, and how long the n-gram is; 0 where none occurred.

        Example: the last two tokens occurred two tokens before, and what followed is known that far

            >>> index = NgramIndex(2)
            >>> index.extend([9, 1, 2, 1, 2])
            >>> index.find([9, 1, 2, 1, 2], 5)
            ([1, 2, 1, 2, 1], 2)
        """
        text = ids if source is None else source
        for n in range(min(self.longest, len(ids)), 0, -1):
            end = self.ends.get(tuple(ids[-n:]))
            if end is None:
                continue
            if source is None and n == self.longest:
                return list(islice(cycle(ids[end:]), count)), n  # a text that goes in circles goes on doing so
            return list(text[end : end + count]), n
        return [], 0


class Lookup:
    """Copies from the context, or first from `predicted` where it fits. Exact.

    Args:
        tokens: K, the most tokens copied in a round.
        ngram: the longest n-gram looked up; shorter ones are tried after it.
        predicted: token ids the caller expects the answer to resemble; `LLM` also takes a text.

    Raises:
        RequestError: tokens or ngram below 1.
    """

    name = "lookup"

    def __init__(self, *, tokens: int = 8, ngram: int = 3, predicted: str | Sequence[int] = ()) -> None:
        self.tokens = check_tokens(tokens)
        check_whole("ngram", ngram)
        if ngram < 1:
            raise RequestError(f"looking up n-grams of {ngram} tokens is not possible; use 1 or more")
        self.ngram, self.predicted = ngram, predicted
        self._contexts: dict[int, NgramIndex] = {}
        self._prediction = NgramIndex(ngram)

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Raises RequestError where the predicted text is not token ids of this model."""
        if isinstance(self.predicted, str):
            raise RequestError("the predicted text must be token ids here; pass Lookup(predicted=[...])")
        check_ids(self.predicted, vocab=decoder.shape.vocab, name="predicted token")
        self._prediction.extend(self.predicted)

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Copies for every row what it finds; rows that find less stop earlier."""
        return copied(rows, [found for found, _ in self.find(rows, tokens)])

    def find(self, rows: Rows, tokens: int) -> list[tuple[list[int], int]]:
        """For every row, at most so many tokens to copy, and the length of the n-gram they followed; the caller's text
        counts as the longest."""
        return [
            self._copy(self._contexts.setdefault(key, NgramIndex(self.ngram)), ids, start, min(tokens, self.tokens))
            for key, ids, start in zip(rows.keys, rows.ids, rows.starts, strict=True)
        ]

    def leave(self, key: int) -> None:
        """Forgets the row's index."""
        self._contexts.pop(key, None)

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Nothing to learn: the context itself is the memory."""

    def _copy(self, context: NgramIndex, ids: Sequence[int], start: int, count: int) -> tuple[list[int], int]:
        if self.predicted:
            assert not isinstance(self.predicted, str)
            if len(ids) == start:  # nothing generated yet: the prediction begins here
                return list(self.predicted[:count]), self.ngram
            if copy := self._prediction.after(ids[start:], count, source=self.predicted):
                return copy, self.ngram
        context.extend(ids)
        return context.find(ids, count)


def copied(rows: Rows, found: Sequence[Sequence[int]]) -> Draft:
    """The draft of what was found for each row."""
    width = max(map(len, found))
    # padding is run like any token, so it is one that the row has already
    padded = torch.tensor(
        [[*f, *ids[-1:] * (width - len(f))] for f, ids in zip(found, rows.ids, strict=True)], dtype=torch.long
    )
    lengths = torch.tensor([len(f) for f in found])
    return Draft(padded.to(rows.last.device), lengths=lengths.to(rows.last.device))
