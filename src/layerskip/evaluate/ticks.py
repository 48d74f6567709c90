"""A run as a line of rounds: when each ended, and what every completion gained in it.

Knows seconds and counts. Does not know models, nor who decoded: a peer's steps are told in the same way, so that one
set of definitions serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerskip.evaluate.follow import Arrival
from layerskip.llm import Chunk


@dataclass(frozen=True)
class Tick:
    """A round of all rows that decoded side by side.

    Args:
        began: seconds from the run's beginning to the end of the round before; prompts that join are run after it.
        ended: seconds to the moment in which what the round emitted had arrived.
        gained: tokens that each completion emitted, by its index.
        new: completions whose first round it is: their prompts were run in it.
        finished: completions that ended with it.
        drafted: tokens drafted in the row that drafted most; None where that is not known.
        cost: seconds in draft, verify and rest; None where the parts are not known.
    """

    began: float
    ended: float
    gained: dict[int, int]
    new: frozenset[int]
    finished: frozenset[int] = frozenset()
    drafted: int | None = None
    cost: tuple[float, float, float] | None = None

    @property
    def gap(self) -> float:
        """Seconds from the end of the round before to its own."""
        return self.ended - self.began


def read_ticks(arrivals: Sequence[Arrival], chunks: Sequence[Chunk]) -> list[Tick]:
    """The rounds that chunks came from.

    The rows of a round carry the same three seconds, and a row is in a round once: a chunk with other seconds, or of a
    row that is already there, begins the next round.

    Args:
        arrivals: one for each chunk, in the same order.
        chunks: as `LLM.stream` yields them.
    """
    groups: list[list[tuple[Arrival, Chunk]]] = []
    for pair in zip(arrivals, chunks, strict=True):
        chunk = pair[1]
        if (
            not groups
            or groups[-1][0][1].seconds != chunk.seconds
            or any(chunk.index == c.index for _, c in groups[-1])
        ):
            groups.append([])
        groups[-1].append(pair)
    ticks: list[Tick] = []
    known: set[int] = set()
    for group in groups:
        gained = {arrival.index: arrival.tokens for arrival, _ in group}
        ticks.append(
            Tick(
                began=ticks[-1].ended if ticks else 0.0,
                ended=group[-1][0].seconds,
                gained=gained,
                new=frozenset(gained.keys() - known),
                finished=frozenset(chunk.index for _, chunk in group if chunk.finish_reason is not None),
                drafted=max(len(chunk.drafted) for _, chunk in group),
                cost=group[0][1].seconds,
            )
        )
        known |= gained.keys()
    return ticks


def first_tokens(ticks: Sequence[Tick]) -> list[float]:
    """For every completion, the seconds from the moment its row was free to its first token: its prompt, those that
    joined with it, and a round. Waiting for a free row does not count."""
    return [tick.gap for tick in ticks for _ in tick.new]


def token_latencies(ticks: Sequence[Tick]) -> list[float]:
    """For every token behind a completion's first round, its share of the gap in front of it: seconds / tokens that
    came together."""
    found: list[float] = []
    for tick in ticks:
        for index, tokens in tick.gained.items():
            if index not in tick.new:
                found += [tick.gap / tokens] * tokens
    return found


def round_latencies(ticks: Sequence[Tick]) -> list[float]:
    """The gaps of the rounds in which no prompt was run."""
    return [tick.gap for tick in ticks if not tick.new]


def percentiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The 50th and the 95th percentile, between two values on the straight line; None of nothing.

    Example:
        >>> percentiles([1.0, 2.0, 3.0])
        (2.0, 2.9)
    """
    if not values:
        return None
    median, high = np.percentile(np.asarray(values), (50, 95))
    return float(median), float(high)
