"""Copies as one choice among others: what a lookup finds for each row, and how many of its tokens to expect.

A copy is judged in every round by what the text turned out to be, used or not, which costs nothing. Knows the lookup
and counts; knows no seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.decode.controllers.learned import Agreement
from layerskip.decode.draft import Draft, Rows
from layerskip.decode.drafters.lookup import Lookup, copied


@dataclass(frozen=True)
class Copy:
    """Tokens to copy for one row, and the length of the n-gram that they followed: longer ones are better evidence."""

    tokens: list[int]
    matched: int


class Copies:
    """A lookup that knows what its copies are worth.

    Args:
        lookup: what finds them.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self._rates = [Agreement(n / (n + 2), weight=4.0) for n in range(lookup.ngram + 1)]

    def find(self, rows: Rows, tokens: int) -> list[Copy]:
        """For every row; empty where nothing is found."""
        return [Copy(found, n) for found, n in self.lookup.find(rows, tokens)]

    def expected(self, found: Sequence[Copy]) -> float:
        """Tokens that a round of these copies emits, over all rows."""
        return sum(self._rates[copy.matched].expected(len(copy.tokens)) for copy in found)

    def learn(self, found: Sequence[Copy], emitted: Sequence[Sequence[int]]) -> None:
        """Compares what was found with what the rows went on with."""
        for copy, text in zip(found, emitted, strict=True):
            known = min(len(copy.tokens), len(text))
            kept = next((i for i in range(known) if copy.tokens[i] != text[i]), known)
            self._rates[copy.matched].add(known, kept)

    def draft(self, rows: Rows, found: Sequence[Copy]) -> Draft:
        """The draft that copies them."""
        return copied(rows, [copy.tokens for copy in found])
