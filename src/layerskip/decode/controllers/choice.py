"""What can be chosen online: an exit, how long, or nothing; and what is known of rounds with so many rows.

Arithmetic and records. Knows no tensors, reads no clock, decides nothing over time: `online` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerskip.decode.controllers.gain import Spent
from layerskip.decode.controllers.seconds import RECENT, Pace, median

PLAIN = 0
"""The exit that stands for drafting nothing."""

WAIT = 8
"""Plain rounds until drafting is tried again, the first time that it did not pay."""


@dataclass(frozen=True)
class Fastest:
    """The setting that should emit the most tokens per second and row; `exit` is PLAIN where that is none."""

    exit: int
    tokens: int
    rate: float


def fastest(
    exits: Sequence[int],
    *,
    expected: Callable[[int, int], float],
    seconds: Callable[[int, int], float],
    plain: float | None,
    most: int,
) -> Fastest:
    """The best exit and draft length, against plain decoding.

    Args:
        exits: to choose from.
        expected: (exit, drafted tokens) -> tokens a row emits in a round.
        seconds: (exit, drafted tokens) -> seconds of the round.
        plain: seconds of a round that drafts nothing; None where they are not known, and anything is then faster.
        most: drafted tokens at most.

    Example: the exit 2 emits 1 + k tokens up to 3, in 1 + 0.5 k ms; plain decoding takes 0.9 ms, then 0.6

        >>> given = {"expected": lambda e, k: 1 + min(k, 2), "seconds": lambda e, k: 1 + 0.5 * k, "most": 8}
        >>> fastest([2], plain=0.9, **given), fastest([2], plain=0.6, **given).exit
        (Fastest(exit=2, tokens=2, rate=1.5), 0)
    """
    best = Fastest(PLAIN, 0, 1.0 / plain if plain else 0.0)
    for exit in exits:
        before = 0.0
        for tokens in range(1, most + 1):
            rate = expected(exit, tokens) / seconds(exit, tokens)
            if rate < before:
                break  # one peak
            before = rate
            if rate > best.rate:
                best = Fastest(exit, tokens, rate)
    return best


def candidates(depth: int, *, start: int | None = None) -> list[int]:
    """Exits worth a look: all of a shallow model, ever fewer of a deep one, and the one to start from.

    Example:
        >>> candidates(6), candidates(32, start=7)
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28])
    """
    found, exit = set[int](), 1
    while exit < depth:
        found.add(exit)
        exit += 1 << max(0, exit.bit_length() - 3)
    if start is not None and start < depth:
        found.add(start)
    return sorted(found)


class Place:
    """What is known of rounds with about so many rows, and what they do.

    Args:
        exit: in use; PLAIN where nothing drafts.
        next_plain: rounds until one of plain decoding is measured.
    """

    def __init__(self, exit: int, *, next_plain: int) -> None:
        self.exit, self.next_plain, self.gap = exit, next_plain, 4
        self.paces: dict[int, Pace] = {}  # by exit; PLAIN is for copies
        self.plain: deque[float] = deque(maxlen=RECENT)
        self.spent = Spent()  # with the exit in use
        self.rounds = 0
        self.waited, self.wait, self.trial, self.gave_up = 0, WAIT, False, False

    @property
    def step(self) -> float | None:
        """Seconds of a plain round."""
        return median(self.plain) if self.plain else None

    @property
    def measured(self) -> list[int]:
        """Exits whose rounds were measured."""
        return [exit for exit in self.paces if exit != PLAIN]

    def use(self, exit: int, *, trial: bool = False) -> None:
        """Changes what the rounds do."""
        self.exit, self.trial, self.spent, self.waited = exit, trial, Spent(), 0


@dataclass(frozen=True)
class Decision:
    """What a round does.

    Args:
        exit: that drafts; PLAIN for none.
        price: of a drafted token, in emitted ones.
        taps: exits to look at on the way.
        token: seconds that an emitted token should take so; None where nobody knows.
    """

    exit: int
    price: float = 0.0
    taps: tuple[int, ...] = ()
    token: float | None = None
