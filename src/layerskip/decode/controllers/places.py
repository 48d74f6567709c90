"""What is known of rounds, apart for numbers of rows that cost alike: what they take, and what they do now.

Records and arithmetic. Knows no tensors, reads no clock, decides nothing: `online` does.
"""

from __future__ import annotations

import math
from collections import deque

from layerskip.decode.controllers.choice import PLAIN, Decision
from layerskip.decode.controllers.gain import Spent
from layerskip.decode.controllers.seconds import RECENT, ROW, Pace, bucket, median

WAIT = 8
"""Plain rounds until drafting is tried again, the first time that it did not pay."""

_UNUSED = 2  # plain rounds after another kind that say little: they take up to 1.3 times as long as those in a row
_ASKED = 3 + _UNUSED  # plain rounds in a row that drafting is compared with
_LATER = 128  # rounds until plain ones are measured again
_SEEN = 16  # rounds of a choice until it is taken to be known


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
        self.doubted, self.asked = False, 0  # whether drafting was seen to lose once; plain rounds to compare with it
        self.row, self.sure = 0, False  # plain rounds just now; whether plain rounds were measured in a row
        self.routine = Decision(PLAIN)  # what unwatched rounds repeat
        self.stir()

    @property
    def settled(self) -> bool:
        """Whether what the rounds do has been seen often enough to watch only some of them."""
        if self.exit == PLAIN:
            return len(self.plain) == RECENT
        return not self.trial and self.spent.count >= _SEEN

    @property
    def step(self) -> float | None:
        """Seconds of a plain round."""
        return median(self.plain) if self.plain else None

    @property
    def measured(self) -> list[int]:
        """Exits whose rounds were measured."""
        return [exit for exit in self.paces if exit != PLAIN]

    def stir(self) -> None:
        """Something changes: the next rounds are watched more closely."""
        self.unwatched, self.calm = 0, 0

    def drafted(self) -> None:
        """Takes up a round that was not plain."""
        self.row = 0

    def took(self, seconds: float | None = None) -> None:
        """Takes up a plain round: what it took, where that was measured. The first ones after another kind count only
        until there are better ones."""
        self.asked = max(self.asked - 1, 0)
        self.row += 1
        if seconds is None:
            return
        if self.row > _UNUSED and not self.sure:
            self.plain.clear()
            self.sure = True
        if self.row > _UNUSED or not self.sure:
            self.plain.append(seconds)

    def ask(self) -> None:
        """Some plain rounds in a row come next, in turns that become rarer; one will do while nothing is at stake."""
        self.gap = min(2 * self.gap, 256)
        self.next_plain = self.rounds + self.gap
        self.asked = _ASKED if self.sure else 1

    def doubt(self) -> None:
        """Drafting seems to lose. Plain rounds may have been measured long ago, or one by one, and the machine may be
        what changed: both are measured again, one after the other."""
        self.doubted, self.asked, self.sure, self.spent = True, _ASKED, False, Spent()
        self.next_plain, self.gap = self.rounds + _LATER, _LATER
        self.stir()

    def forget(self) -> None:
        """What rounds that draft took."""
        self.paces = {exit: pace for exit, pace in self.paces.items() if exit == PLAIN}

    def use(self, exit: int, *, trial: bool = False) -> None:
        """Changes what the rounds do."""
        self.doubted, self.asked = False, 0
        self.exit, self.trial, self.spent, self.waited = exit, trial, Spent(), 0
        self.stir()


class Places:
    """All numbers of rows that were met.

    Args:
        depth: layers of the target.
        head: what a pass of the head costs, in layers, before a round was measured.
        start: the exit to begin with; None begins plainly.
    """

    def __init__(self, depth: int, *, head: float, start: int | None) -> None:
        self.depth, self.head, self.start = depth, head, start
        self._places: dict[int, Place] = {}

    def at(self, rows: int) -> Place:
        """That of about so many rows."""
        kind = bucket(rows)
        if kind not in self._places:
            near = self._near(kind)
            # what is recommended, or did well with another number of rows, is taken at its word for a few rounds
            exit = near.exit if near is not None else self.start or PLAIN
            self._places[kind] = Place(exit, next_plain=5 if near is None else 2)
        return self._places[kind]

    def _near(self, kind: int) -> Place | None:
        """The measured place whose number of rows is the nearest."""
        known = {rows: place for rows, place in self._places.items() if place.measured and rows != kind}
        return known[min(known, key=lambda rows: abs(math.log2(rows / kind)))] if known else None

    def usual(self, place: Place, exit: int, tokens: int) -> float | None:
        """What a round takes that does not look."""
        if exit == PLAIN:
            return place.step
        if exit not in place.paces:
            return None
        start, step = self.line(place, exit)
        return start + step * tokens

    def copy(self, place: Place, tokens: int) -> float | None:
        """What a round takes that verifies so many copied tokens: as measured, else by what drafted ones take, else by
        what a plain round takes; None where nothing is known."""
        pace = place.paces.get(PLAIN)
        if pace is not None and pace.known:
            return pace.start + pace.step * tokens
        if place.measured:
            exit = min(place.measured)
            rest = (self.depth + self.head) / (self.depth - exit + self.head)
            return place.paces[exit].verify.at(tokens) * rest
        return None if place.step is None else place.step * (1 + ROW * tokens)

    def line(self, place: Place, exit: int) -> tuple[float, float]:
        """(seconds of a round, and of each drafted token more) of an exit: as measured, else from the nearest exit that
        was, else from what a plain round takes."""
        if exit in place.paces:
            pace = place.paces[exit]
            return pace.start, pace.step
        if place.measured:
            near = min(place.measured, key=lambda e: abs(e - exit))
            pace = place.paces[near]
            below = (exit + self.head) / (near + self.head)
            above = (self.depth - exit + self.head) / (self.depth - near + self.head)
            return (
                pace.draft.start * below + pace.verify.start * above,
                pace.draft.slope * below + pace.verify.slope * above,
            )
        if place.step is None:
            for other in self._places.values():
                if other is not place and other.measured:
                    return self.line(other, exit)
        layer = (place.step or 1.0) / (self.depth + self.head)
        verify = (self.depth - exit + self.head) * layer
        return exit * layer + verify, (exit + self.head) * layer + ROW * verify
