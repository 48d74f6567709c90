"""What past rounds teach about acceptance, as plain numbers that a round updates in a microsecond.

Old rounds fade, because texts change. Knows counts; knows no tokens, clocks or models.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from layerskip.decode.draft import Draft, Outcome

MEMORY = 100
"""Trials after which an observation counts a third of a new one."""


class Rate:
    """The share of trials that succeed: a guess that trials outweigh, the old ones less and less.

    Args:
        guess: before any trial.
        weight: trials that the guess is worth.

    Example:
        >>> rate = Rate(0.5, weight=2)
        >>> rate.add(2, 2)
        >>> round(rate.value, 3)
        0.75
    """

    __slots__ = ("guess", "hits", "tried", "weight")

    def __init__(self, guess: float, *, weight: float = 2.0) -> None:
        self.guess, self.weight, self.hits, self.tried = guess, weight, 0.0, 0.0

    def add(self, hits: float, tried: float) -> None:
        """Counts trials."""
        keep = 1.0 - tried / MEMORY if tried < MEMORY else 0.0
        self.hits = self.hits * keep + hits
        self.tried = self.tried * keep + tried

    def fade(self, keep: float) -> None:
        """Lets trials count less, because time has passed."""
        self.hits *= keep
        self.tried *= keep

    @property
    def value(self) -> float:
        """The estimate."""
        return (self.hits + self.weight * self.guess) / (self.tried + self.weight)


class Agreement:
    """How many tokens of a draft are kept: the first with one rate, each later one, if all before it were, with
    another.

    Errors come in clusters, so one rate for all would promise too few long runs: a mean agreement of 0.785 was seen to
    give the runs of an independent 0.86.

    Example: of four drafted tokens two were kept: one trial of the first, two of later ones, one of them kept

        >>> agreement = Agreement(0.5, weight=0.0001)
        >>> agreement.add(4, 2)
        >>> round(agreement.first.value, 2), round(agreement.later.value, 2), round(agreement.expected(2), 2)
        (1.0, 0.5, 2.5)
    """

    __slots__ = ("first", "later")

    def __init__(self, guess: float, *, weight: float = 2.0) -> None:
        self.first, self.later = Rate(guess, weight=weight), Rate(guess, weight=weight)

    def add(self, drafted: int, accepted: int) -> None:
        """Counts a draft of one row."""
        if drafted:
            self.first.add(1.0 if accepted else 0.0, 1.0)
            if accepted and drafted > 1:
                self.later.add(accepted - 1.0, min(drafted, accepted + 1) - 1.0)

    def add_text(self, agreed: Sequence[bool]) -> None:
        """Counts a text along which the drafter was asked at every token: after a miss a new draft would begin."""
        before = False
        for hit in agreed:
            (self.later if before else self.first).add(1.0 if hit else 0.0, 1.0)
            before = hit

    def expected(self, tokens: int, *, less: float = 0.0) -> float:
        """Tokens a round emits on average when it drafts so many: 1 + a + a b + a b^2 + ...

        Args:
            tokens: drafted.
            less: subtracted from both rates, for an estimate on the safe side.
        """
        first, ratio = max(self.first.value - less, 0.0), min(max(self.later.value - less, 0.0), 0.999)
        return 1.0 + first * (1.0 - ratio**tokens) / (1.0 - ratio)

    @property
    def doubt(self) -> float:
        """How far off the rates may be: less with every trial."""
        return 0.5 / math.sqrt(self.first.tried + self.later.tried + 1.0)


EDGES = (0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
_MIDDLES = (0.1, 0.3, 0.5, 0.68, 0.8, 0.88, 0.95, 0.99)


class Calibration:
    """How often a token is kept of which the drafter is so sure: one rate for each range of its largest probability.

    Example:
        >>> calibration = Calibration()
        >>> calibration.add(0.9, False)
        >>> calibration.values[5] < calibration.values[4]
        True
    """

    __slots__ = ("rates",)

    def __init__(self) -> None:
        self.rates = [Rate(middle, weight=1.0) for middle in _MIDDLES]

    def add(self, confidence: float, kept: bool) -> None:
        """Counts a token all of whose predecessors were kept."""
        if confidence == confidence:  # a broken model may be not-a-number sure
            self.rates[bisect_right(EDGES, confidence)].add(1.0 if kept else 0.0, 1.0)

    @property
    def values(self) -> list[float]:
        """The share kept, by range: of what lies between `EDGES`."""
        return [rate.value for rate in self.rates]


def trials(draft: Draft, outcome: Outcome) -> Iterator[tuple[int, int]]:
    """(tokens judged, tokens kept) of each row; where the end of a text cut a round, what came after was not judged."""
    for drafted, accepted, emitted in zip(draft.counts(), outcome.accepted, outcome.emitted, strict=True):
        yield (drafted if len(emitted) > accepted else accepted), accepted
