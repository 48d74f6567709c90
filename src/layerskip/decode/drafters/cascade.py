"""Copies first, the exit otherwise: copies cost no pass, but there is not always one.

One choice for all rows of a round. Rows with a copy could ride along in a round of the exit, but their copies would
then cost its passes like drawn tokens: what makes a copy good is that nobody drafts. So a round copies where that
should emit more tokens per second than a round of the exit, counting rows without a copy as the one token they gain.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.decode.controllers.gain import Spent
from layerskip.decode.controllers.seconds import Pace, bucket
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.decode.drafters.copies import Copies, Copy
from layerskip.decode.drafters.early_exit import EarlyExit
from layerskip.decode.drafters.lookup import Lookup
from layerskip.model.decoder import Decoder


@dataclass(frozen=True)
class CascadeDraft(Draft):
    """A draft, what could be copied instead, and whether it was."""

    found: Sequence[Copy] = ()
    copies: bool = False


class Cascade:
    """Copies where a copy should pay, and drafts with the first layers elsewhere. Exact.

    Which of the two a round does may depend on the clock, so with a seed, sampled text repeats in law only.

    Args:
        lookup: what copies.
        exit: what drafts otherwise.
    """

    name = "cascade"

    def __init__(self, lookup: Lookup, exit: EarlyExit) -> None:
        self.lookup, self.exit = lookup, exit
        self._copies = Copies(lookup)
        self._copy: dict[int, Pace] = defaultdict(lambda: Pace(passes=False))
        self._drawn: dict[int, Spent] = defaultdict(Spent)
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """The most tokens drafted in a round."""
        return max(self.lookup.tokens, self.exit.tokens)

    @property
    def vocabulary(self) -> int | None:
        """As many tokens the exit may propose; None is all. Copies are free."""
        return self.exit.vocabulary

    @property
    def head(self) -> str:
        """What the exit drafts through, as in `EarlyExit`."""
        return self.exit.head

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Raises RequestError where one of the two cannot draft."""
        self.lookup.check(decoder, exit=exit)
        self.exit.check(decoder, exit=exit)

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Of one of the two."""
        with self._lock:
            found = self._copies.find(rows, tokens)
            copies = self._pays(found)
        draft = self._copies.draft(rows, found) if copies else self.exit.propose(rows, min(tokens, self.exit.tokens))
        return CascadeDraft(**vars(draft), found=found, copies=copies)

    def leave(self, key: int) -> None:
        """Both forget the row."""
        self.lookup.leave(key)
        self.exit.leave(key)

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Learns what copies are worth, and what either takes."""
        assert isinstance(draft, CascadeDraft)
        with self._lock:
            self._copies.learn(draft.found, outcome.emitted)
            kind = bucket(len(draft.found))
            if draft.copies:
                self._copy[kind].add(draft.tokens.shape[1], draft=outcome.draft_seconds, verify=outcome.verify_seconds)
            else:
                seconds = outcome.draft_seconds + outcome.verify_seconds
                self._drawn[kind].add(sum(map(len, outcome.emitted)), seconds)
        if not draft.copies:
            self.exit.observe(rows, draft, outcome)

    def _pays(self, found: Sequence[Copy]) -> bool:
        width = max(len(copy.tokens) for copy in found)
        if not width:
            return False
        pace, token = self._copy[bucket(len(found))], self._drawn[bucket(len(found))].token
        if not (pace.known and token):  # where every row has one, until both were measured
            return all(copy.tokens for copy in found) and (token > 0 or not pace.count)
        return copying_pays(self._copies.expected(found), pace.start + pace.step * width, token=token)


def copying_pays(expected: float, seconds: float, *, token: float) -> bool:
    """Whether a round of copies emits more tokens per second than the other rounds do.

    Args:
        expected: tokens it should emit.
        seconds: it should take.
        token: seconds of a token in the other rounds.

    Example: 3 tokens in 2 ms are faster than 1 ms a token, 3 in 4 ms are not

        >>> copying_pays(3.0, 0.002, token=0.001), copying_pays(3.0, 0.004, token=0.001)
        (True, False)
    """
    return expected * token > seconds
