"""What can be chosen online: an exit, how long, or nothing.

Arithmetic. Knows no tensors, reads no clock, decides nothing over time: `online` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerskip.decode.controllers.controller import Plan

PLAIN = 0
"""The exit that stands for drafting nothing."""


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


@dataclass(frozen=True)
class Decision:
    """What a round does.

    Args:
        exit: that drafts; PLAIN for none.
        plan: of the draft.
        taps: exits to look at on the way.
        token: seconds that an emitted token should take so; None where nobody knows.
        watched: whether the round is learnt from.
    """

    exit: int
    plan: Plan = field(default_factory=lambda: Plan(0))
    taps: tuple[int, ...] = ()
    token: float | None = None
    watched: bool = True
