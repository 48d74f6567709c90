"""Draft lengths by expected gain: a draft goes on as long as the next token should save more time than it takes.

    reach(i) = product over drafted tokens j <= i of the share kept of tokens as sure as j
    go on while  sum over rows of reach(i) x a  >=  step / token

a is the acceptance of a token not yet drafted, given that all before it were kept; `step` the seconds that drafting and
verifying one token more take, for all rows; `token` the seconds that an emitted token takes now, which is what an
accepted one saves (in the steady state the best rule of this kind is the one that prices time at the rate it attains:
Dinkelbach, 1967). All four are learned while decoding.

Exact: it looks at past rounds and at tokens already drafted, and keeps the token that made it stop. Its choices depend
on the clock: with a seed, sampled text whose drafts are drawn repeats in law only. Knows no model.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict

from layerskip.decode.controllers.controller import Plan
from layerskip.decode.controllers.fixed import check_tokens
from layerskip.decode.controllers.learned import EDGES, Agreement, Calibration, trials
from layerskip.decode.controllers.seconds import Pace, bucket
from layerskip.decode.draft import Draft, Outcome
from layerskip.model.stop import Stop

PRICE = 0.3
"""What a drafted token costs, in emitted tokens of a row, before a round was measured."""


class Learned:
    """What a drafter's past rounds say about its tokens: rates, by place and by confidence.

    Args:
        guess: of the acceptance rate.
        weight: trials that the guess is worth.
    """

    def __init__(self, guess: float = 0.75, *, weight: float = 2.0) -> None:
        self.agreement, self.calibration = Agreement(guess, weight=weight), Calibration()

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Counts a round."""
        sure = draft.confidence or ()
        for b, (judged, accepted) in enumerate(trials(draft, outcome)):
            self.agreement.add(judged, accepted)
            for i in range(min(judged, accepted + 1, len(sure))):
                self.calibration.add(sure[i][b], i < accepted)

    def plan(self, length: int, *, price: float) -> Plan:
        """A round that goes on as long as the next token should save more than it takes.

        Args:
            length: the most tokens.
            price: seconds of a step, for all rows, over seconds that an emitted token takes.

        Example: tokens are kept as often as they are sure, the next one with 0.8; a step costs half a token

            >>> from layerskip.model.stop import Ends
            >>> ends = Ends(Learned(0.8).plan(9, price=0.5).stop, rows=1, count=9)
            >>> ends([0.95]), ends([0.9]), ends([0.7])  # 0.76, 0.67 and 0.46 are to be had
            (False, False, True)
        """
        rate = self.agreement.later.value  # 0 where it was told so and saw nothing else
        return Plan(length, Stop(EDGES, self.calibration.values, price / rate if rate else math.inf))


class Gain:
    """Ends a draft where the next token no longer pays.

    What rounds take is measured as they run, for each number of rows: where a further position costs more, drafts are
    shorter.

    Args:
        tokens: the most to draft in a round.

    Raises:
        RequestError: fewer than one token.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = check_tokens(tokens)
        self.learned = Learned()
        self._paces: dict[int, Pace] = defaultdict(Pace)
        self._spent: dict[int, Spent] = defaultdict(Spent)
        self._lock = threading.Lock()

    def plan(self, rows: int) -> Plan:
        """Drafts as long as the next token pays."""
        with self._lock:
            kind = bucket(rows)
            return self.learned.plan(self.tokens, price=self._price(kind, rows))

    def learn(self, draft: Draft, outcome: Outcome) -> None:
        """Counts tokens and seconds."""
        with self._lock:
            self.learned.learn(draft, outcome)
            kind = bucket(len(outcome.accepted))
            seconds = outcome.draft_seconds + outcome.verify_seconds
            self._spent[kind].add(sum(map(len, outcome.emitted)), seconds)
            if count := draft.tokens.shape[1]:
                self._paces[kind].add(count, draft=outcome.draft_seconds, verify=outcome.verify_seconds)

    def _price(self, kind: int, rows: int) -> float:
        token = self._spent[kind].token
        return self._paces[kind].step / token if token else PRICE * rows


class Spent:
    """Seconds and tokens of the last few dozen rounds."""

    __slots__ = ("count", "seconds", "tokens")

    def __init__(self) -> None:
        self.seconds, self.tokens, self.count = 0.0, 0.0, 0

    def add(self, tokens: int, seconds: float) -> None:
        """Counts a round."""
        self.count += 1
        self.seconds = self.seconds * 0.97 + seconds
        self.tokens = self.tokens * 0.97 + tokens

    @property
    def token(self) -> float:
        """Seconds of a token; 0.0 before the first."""
        return self.seconds / self.tokens if self.tokens else 0.0
