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

import threading
from collections import defaultdict
from collections.abc import Sequence

from layerskip.decode.controllers.fixed import check_tokens
from layerskip.decode.controllers.learned import Agreement, Calibration, trials
from layerskip.decode.controllers.seconds import Pace, bucket
from layerskip.decode.draft import Draft, Outcome


def pays(reach: float, rate: float, *, price: float) -> bool:
    """Whether the next token should save more than it takes.

    Args:
        reach: probability that all tokens drafted so far are kept, summed over rows.
        rate: acceptance of the next one, given that.
        price: seconds it takes, over seconds that an emitted token takes.

    Example: a step of 0.3 ms where a token takes 1 ms pays while reach x 0.8 is 0.3 or more

        >>> pays(0.5, 0.8, price=0.3), pays(0.3, 0.8, price=0.3)
        (True, False)
    """
    return reach * rate >= price


class Course:
    """The plan of one round: whether it goes on is decided after every token, for all rows together, which share the
    price of a step.

    Args:
        length: the most tokens.
        rows: B.
        calibration: how often tokens are kept that the drafter is so sure of.
        rate: acceptance of a token not drafted yet.
        price: seconds of a step over seconds of an emitted token.
    """

    confident = True

    def __init__(self, length: int, *, rows: int, calibration: Calibration, rate: float, price: float) -> None:
        self.length, self._reach = length, [1.0] * rows
        self._calibration, self._rate, self._price = calibration, rate, price

    def stop(self, confidence: Sequence[float]) -> list[bool]:
        """All rows or none."""
        reach = self._reach
        for b, sure in enumerate(confidence):
            reach[b] *= self._calibration.rate(sure)
        return [not pays(sum(reach), self._rate, price=self._price)] * len(reach)


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

    def course(self, length: int, *, rows: int, price: float) -> Course:
        """A round's plan."""
        return Course(length, rows=rows, calibration=self.calibration, rate=self.agreement.later.value, price=price)


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

    def plan(self, rows: int) -> Course:
        """Decides token by token."""
        with self._lock:
            kind = bucket(rows)
            return self.learned.course(self.tokens, rows=rows, price=self._price(kind, rows))

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
        return self._paces[kind].step / token if token else 0.3 * rows  # a guess, for the first round


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
