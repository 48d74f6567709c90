"""Where a draft ends: a rule that a kernel can follow as well as the loop in Python.

Every row has a *reach*, the chance that all its tokens so far are kept. It begins at 1; each drafted token multiplies
it by the factor of the range that its probability lies in. A row ends where its reach is 0, all end where the reaches
sum to less than `least`. The token that ended a draft belongs to it: throwing it away would bias the law.

Knows probabilities; knows no tokens and no model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """The rule of one round.

    Args:
        edges: between the ranges, ascending; a probability on an edge belongs above it.
        factors: of the ranges, one more than edges.
        least: sum of all rows' reaches below which nobody goes on.

    Example: a threshold of 0.6

        >>> rule = Stop(edges=(0.6,), factors=(0.0, 1.0), least=1e-9)
        >>> rule.factor(0.6), rule.factor(0.59), rule.factor(float("nan"))
        (1.0, 0.0, 0.0)
    """

    edges: Sequence[float]
    factors: Sequence[float]
    least: float

    def factor(self, sure: float) -> float:
        """Of a probability; 0 where it is none, as a broken model may say."""
        return self.factors[bisect_right(self.edges, sure)] if sure == sure else 0.0


class Ends:
    """Where the rows of one draft end.

    Args:
        rule: of the round.
        rows: B.
        count: the most tokens.

    Example: two rows, of which the second is unsure of its first token

        >>> ends = Ends(Stop((0.6,), (0.0, 1.0), 1e-9), rows=2, count=4)
        >>> ends([0.9, 0.5]), ends([0.5, 0.9]), ends.lengths
        (False, True, [2, 1])
    """

    def __init__(self, rule: Stop, *, rows: int, count: int) -> None:
        self.rule, self.lengths = rule, [count] * rows
        self.confidence: list[list[float]] = []
        self._reach = [1.0] * rows

    def __call__(self, confidence: list[float]) -> bool:
        """Takes up how sure the drafter was of a token of each row; whether that ends the draft."""
        self.confidence.append(confidence)
        drafted, reach, rule = len(self.confidence), self._reach, self.rule
        for b, sure in enumerate(confidence):
            reach[b] *= rule.factor(sure)
            if not reach[b]:
                self.lengths[b] = min(self.lengths[b], drafted)
        over = sum(reach) < rule.least
        if over:
            self.lengths = [min(length, drafted) for length in self.lengths]
        return over
