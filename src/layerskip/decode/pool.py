"""Which rows of a cache are taken, and what the others still hold.

Knows token ids and row numbers. A row that is given back keeps its keys and values until the row is needed, so that
the next turn of a conversation, or a prompt that starts alike, does not run its prefix again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from layerskip.errors import CapacityError
from layerskip.model.cache import Cache


@dataclass
class Held:
    """What a row of the cache holds: `ids` valid in layers 0..depth-1; `used` orders rows by last use."""

    ids: list[int] = field(default_factory=list)
    depth: int = 0
    taken: bool = False
    used: int = 0


class Pool:
    """Hands out rows of `cache`, growing it when all are taken."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.rows = [Held() for _ in range(cache.rows)]
        self._clock = count(1)

    def shared(self, ids: Sequence[int], *, depth: int) -> int:
        """How many leading tokens of `ids` some row already holds in `depth` layers."""
        return self._best(ids, depth)[1]

    def claim(self, ids: Sequence[int], *, depth: int, slots: int, reuse: bool = True) -> tuple[int, int]:
        """Takes a row for `ids`, with as long a prefix of it as any row holds.

        Args:
            ids: the tokens to be cached.
            depth: layers in which the prefix must be valid.
            slots: positions the row must be able to hold.
            reuse: False starts from an empty row.

        Returns:
            The row, and how many leading tokens of `ids` it holds already.

        Raises:
            CapacityError: a bigger cache does not fit in memory.
        """
        self.make_room(rows=1, slots=slots)  # first: it may let idle rows go
        source, length = self._best(ids, depth) if reuse and ids else (0, 0)
        row = self._choose(source, length)
        if length and row != source:
            self.cache.copy_prefix(source, row, length=length)
        self.rows[row] = Held(list(ids[:length]), depth, True, next(self._clock))
        return row, length

    def hold(self, row: int, ids: Sequence[int], *, depth: int) -> None:
        """Notes what a taken row holds now."""
        self.rows[row].ids, self.rows[row].depth = list(ids), depth

    def give_back(self, row: int) -> None:
        """Frees a row; what it holds stays until the row is needed."""
        self.rows[row].taken = False
        self.rows[row].used = next(self._clock)

    def forget(self, row: int) -> None:
        """Frees a row and wipes it."""
        self.cache.clear(row)
        self.rows[row] = Held()

    def _best(self, ids: Sequence[int], depth: int) -> tuple[int, int]:
        lengths = [common_prefix(held.ids, ids) if held.depth >= depth else 0 for held in self.rows]
        # among equals an idle row needs no copy
        best = max(
            range(len(lengths)),
            key=lambda r: (lengths[r], not self.rows[r].taken),
        )
        return best, lengths[best]

    def make_room(self, *, rows: int, slots: int) -> None:
        """Makes sure that `rows` rows are free to be claimed and that every row can hold `slots` positions.

        Raises:
            CapacityError: that does not fit in memory; nothing has changed then.
        """
        total = max(len(self.rows), sum(held.taken for held in self.rows) + rows)
        if total <= self.cache.rows and slots <= self.cache.slots:
            return
        wanted = self.cache.slots
        if slots > wanted:  # by half, within the context: growing copies
            wanted = max(slots, min(wanted * 3 // 2, self.cache.shape.context))
        try:
            self.cache.grow(rows=total, slots=-(-wanted // 64) * 64)
        except CapacityError:
            self._let_go(rows, slots)
        self.rows += [Held() for _ in range(self.cache.rows - len(self.rows))]

    def _let_go(self, rows: int, slots: int) -> None:
        """Makes room without the idle rows behind the last taken one, if that is enough."""
        last = max((row + 1 for row, held in enumerate(self.rows) if held.taken), default=0)
        total = max(last, sum(held.taken for held in self.rows) + rows)
        slots = max(slots, self.cache.slots) if last else slots
        self.cache.check_memory(rows=total, slots=slots)
        self.cache.shrink(rows=last)
        del self.rows[last:]
        self.cache.grow(rows=total, slots=slots)

    def _choose(self, source: int, length: int) -> int:
        """The row to take: one that is continued, else the one longest unused, else what there is.

        A row that merely begins alike is copied from and kept: somebody may come back to the rest of it.
        """
        idle = [r for r, held in enumerate(self.rows) if not held.taken]
        if length and source in idle and length == len(self.rows[source].ids):
            return source
        return min(idle, key=lambda r: (bool(length) and r == source, self.rows[r].used, r))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    same, most = 0, min(len(a), len(b))
    if list(a[:most]) == list(b[:most]):  # the usual case: one continues the other
        return most
    while same < most:  # comparing whole parts, thousands of tokens take microseconds
        middle = (same + most + 1) // 2
        if list(a[same:middle]) == list(b[same:middle]):
            same = middle
        else:
            most = middle - 1
    return same
