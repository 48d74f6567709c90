"""Draft lengths by Thompson sampling: an acceptance rate is drawn from what past rounds leave open, and the length that
would be fastest at it is drafted (EESD, Liu et al., 2024, arXiv 2406.03853, who stop drafts by such a draw).

Exact: the rate is drawn from counts of past rounds by a generator of its own, before the round drafts anything. Which
length a round gets depends on the clock, though: with a seed, sampled text repeats in law only.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict

from layerskip.decode.controllers.controller import Plan
from layerskip.decode.controllers.fixed import check_tokens
from layerskip.decode.controllers.learned import trials
from layerskip.decode.controllers.seconds import Pace, bucket
from layerskip.decode.draft import Draft, Outcome


def best_length(rate: float, *, start: float, step: float, most: int) -> int:
    """The number of drafted tokens k, 1..most, with the most tokens per second: (1 - a^(k+1)) / (1 - a) of them, if
    each is accepted with probability a, in start + k step seconds (Leviathan et al., 2023, section 3).

    Example: at 0.5 two tokens give 1.75 in 1.4 units, one 1.5 in 1.2, three 1.875 in 1.6; 1.5 / 1.2 and 1.75 / 1.4 tie

        >>> best_length(0.5, start=1.0, step=0.2, most=8), best_length(0.9, start=1.0, step=0.2, most=8)
        (1, 7)
    """
    tokens, power, best, fastest = 1.0, 1.0, 1, 0.0
    for k in range(1, most + 1):
        power *= rate
        tokens += power
        speed = tokens / (start + k * step)
        if speed <= fastest * (1 + 1e-12):
            break  # one peak: the next token only pays less
        best, fastest = k, speed
    return best


_MEMORY = 0.99  # what a trial counts for after one more


class Thompson:
    """Draws an acceptance rate from its posterior Beta law every round, and drafts what is fastest at it.

    What rounds take is measured as they run, for each number of rows: where a further position costs more, drafts are
    shorter.

    Args:
        tokens: the most to draft in a round.
        seed: of its own random numbers.

    Raises:
        RequestError: fewer than one token.
    """

    def __init__(self, tokens: int, *, seed: int = 0) -> None:
        self.tokens = check_tokens(tokens)
        self.kept, self.lost = 2.0, 1.0  # of trials, the first few imagined
        self._random = random.Random(seed)
        self._paces: dict[int, Pace] = defaultdict(Pace)
        self._lock = threading.Lock()

    def plan(self, rows: int) -> Plan:
        """A length that fits one draw."""
        with self._lock:
            rate = self._random.betavariate(self.kept, self.lost)
            pace = self._paces[bucket(rows)]
            start, step = (pace.start, pace.step) if pace.count else (1.0, 0.25)  # a draft step beside a verification
            return Plan(best_length(rate, start=start, step=step, most=self.tokens))

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Counts trials and seconds."""
        with self._lock:
            for judged, accepted in trials(draft, outcome):
                tried = min(judged, accepted + 1)
                keep = _MEMORY**tried
                # never less than what was imagined: a law that is sure of 0 or 1 would try nothing else
                self.kept = max(self.kept * keep, 0.5) + accepted
                self.lost = max(self.lost * keep, 0.5) + tried - accepted
            if count := draft.tokens.shape[1]:
                pace = self._paces[bucket(len(outcome.accepted))]
                pace.add(count, draft=outcome.draft_seconds, verify=outcome.verify_seconds)
