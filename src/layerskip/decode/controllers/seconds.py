"""What rounds take, measured while they run: medians of the last few, and a line through them.

Knows numbers of tokens and seconds; reads no clock.
"""

from __future__ import annotations

import math
from collections import deque

RECENT = 9
"""Measurements of a kind that count: a median of so many shrugs off a pause of the machine."""

ROW = 0.04
"""What a further position adds to a verification, as a share of it, before that was measured. (The prepacked kernels of
the CPU: 0.02 to 0.08 by size.)"""

_PRIOR = 8.0  # how much the slope expected beforehand counts, in squared tokens
_REFIT = 4  # a line is drawn anew after so many measurements
_FEW = 3  # measurements of a place that make a median
_FADE = 64  # measurements after which a place that was not measured again counts half


def median(values: deque[float]) -> float:
    """The middle one."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


class Line:
    """seconds = start + slope x, through the medians of recent measurements at each whole x >= 1.

    The slope is bounded by what is known beforehand, so that one slow round cannot forbid long drafts for ever: nobody
    would then measure them again. The very first measurement is left out: the first use of anything is slow.

    Args:
        least: of what each x adds, as a share of `start`.
        most: likewise; infinity where `start` may be nothing.
        expected: likewise, where only one x was measured.

    Example: passes one after another, of which the last may be cheaper

        >>> line = Line(least=1.0, most=math.inf, expected=1.0)
        >>> line.add(1, 0.5), line.add(3, 0.008)
        (None, None)
        >>> round(line.at(1), 6), round(line.slope, 6)
        (0.004, 0.002)
    """

    def __init__(self, *, least: float, most: float, expected: float) -> None:
        self._least, self._most, self._expected = least, most, expected
        self._cells: dict[int, tuple[deque[float], list[int]]] = {}
        self.start, self.slope, self.count = 0.0, 0.0, 0

    def add(self, x: int, seconds: float) -> None:
        """Takes a measurement."""
        self.count += 1
        if self.count == 2:
            self._cells.clear()
        if x not in self._cells:
            self._cells[x] = (deque(maxlen=RECENT), [0])
        values, latest = self._cells[x]
        values.append(seconds)
        latest[0] = self.count
        if self.count <= _REFIT or self.count % _REFIT == 0:
            self._fit()

    def at(self, x: float) -> float:
        """Seconds at x."""
        return self.start + self.slope * x

    def _fit(self) -> None:
        points = [
            (x, median(values), len(values) * 0.5 ** ((self.count - latest[0]) / _FADE))
            for x, (values, latest) in self._cells.items()
        ]
        # a place measured once or twice has no median to speak of: others speak for it
        known = [point for point in points if len(self._cells[point[0]][0]) >= _FEW]
        points = known or points
        weight = sum(n for _, _, n in points)
        x0 = sum(x * n for x, _, n in points) / weight
        y0 = sum(y * n for _, y, n in points) / weight
        across = sum((x - x0) * (y - y0) * n for x, y, n in points)
        spread = sum((x - x0) ** 2 * n for x, _, n in points)
        slope = (across + _PRIOR * _share(y0, x0, self._expected)) / (spread + _PRIOR)
        self.slope = min(max(slope, _share(y0, x0, self._least)), _share(y0, x0, self._most))
        self.start = y0 - self.slope * x0


def _share(seconds: float, x: float, share: float) -> float:
    """The slope of a line through (x, seconds) that adds such a share of its start with each x."""
    return seconds / x if share == math.inf else seconds * share / (1.0 + share * x)


class Pace:
    """What rounds of one setting take at one number of rows.

    Args:
        passes: whether drafting runs passes one after another; copies do not.
    """

    def __init__(self, *, passes: bool = True) -> None:
        # K + 1 passes, the last one without the head; and what a round takes besides, which is most of it where passes
        # take microseconds
        self.draft = Line(least=0.1, most=3.0, expected=1.0) if passes else Line(least=0, most=0, expected=0)
        self.verify = Line(least=0.0, most=1.0, expected=ROW)  # many rows pay for a position as for the first

    def add(self, drafted: int, *, draft: float, verify: float) -> None:
        """Takes a round that drafted so many tokens."""
        self.draft.add(drafted, draft)
        self.verify.add(drafted, verify)

    @property
    def count(self) -> int:
        """Rounds measured."""
        return self.draft.count

    @property
    def known(self) -> bool:
        """Whether a median of rounds speaks: a first one that was slow would, believed, forbid all others."""
        return self.count > _FEW

    @property
    def start(self) -> float:
        """Seconds of a round whatever it drafts."""
        return self.draft.start + self.verify.start

    @property
    def step(self) -> float:
        """Seconds that each drafted token adds: drawing it, and verifying one position more."""
        return self.draft.slope + self.verify.slope


def bucket(rows: int) -> int:
    """Numbers of rows that are taken to cost alike, by their largest: 1, 2, 4, 8, ...

    Example:
        >>> [bucket(rows) for rows in (1, 2, 3, 5, 16)]
        [1, 2, 4, 8, 16]
    """
    return 1 << (rows - 1).bit_length()
