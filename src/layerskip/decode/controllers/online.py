"""Where to exit, or not to draft at all, chosen while decoding.

Every exit is a drafter (DEL, arXiv 2504.05598): its acceptance is estimated from past rounds, of its own and of others
that looked at it on their way, its seconds from rounds measured in this process; what should emit the most tokens per
second is chosen. Plain numbers: a round costs some microseconds here.

Knows depths, counts and seconds. Knows no tensors and reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from layerskip.decode.controllers.choice import PLAIN, WAIT, Decision, Fastest, Place, candidates, fastest
from layerskip.decode.controllers.gain import Course, Learned
from layerskip.decode.controllers.seconds import ROW, Pace, bucket
from layerskip.decode.draft import Draft, Outcome

_EVERY = 8  # rounds between two choices
_FADE = 0.96  # what an observation counts for after one more choice: nobody knows how long a text stays as it is
_SWITCH = 1.05  # how much faster another exit has to look
_LEAVE, _RETURN = 1.02, 1.03  # how much slower than plain drafting has to be to end, and how much faster to begin anew
_TRIAL, _SETTLED = 6, 40  # rounds of drafting until it is judged, and until it counts as won
_LONGEST_WAIT = 512  # plain rounds until drafting is tried again: doubled each time it does not pay
_TAPS, _LOOK = 3, 3  # exits looked at in one round, and rounds from one look to the next at least


class Online:
    """The choice for one model, decoded at one depth.

    Args:
        depth: layers of the target.
        head: what a pass of the head costs, in layers, beforehand.
        tokens: the most drafted in a round.
        start: the exit to begin with, if one is recommended.
        guesses: acceptance by exit, as far as something is known beforehand.
        share: of all seconds that looking at other exits may take with all that choosing takes, and as much again that
            drafting may lose where it is tried in vain.
    """

    def __init__(
        self,
        depth: int,
        *,
        head: float,
        tokens: int,
        start: int | None = None,
        guesses: Mapping[int, float] | None = None,
        share: float = 0.03,
    ) -> None:
        known = guesses or {}
        self.depth, self.head, self.tokens, self.share = depth, head, tokens, share
        self.exits = candidates(depth, start=start)
        self.learned = {
            exit: Learned(known[exit], weight=10.0) if exit in known else Learned(0.45 + 0.5 * exit / depth)
            for exit in self.exits
        }
        self.start = start if start in self.learned else None
        self.places: dict[int, Place] = {}
        self.rounds = 0
        self.seconds, self.overhead, self.lost = 0.0, 0.0, 0.0  # of all rounds, of choosing, of drafting in vain
        self._tap, self._turn = 0.0, 0  # seconds of a tap; whose turn it is
        self._looked, self._unlooked = 0.0, 0  # seconds that the round looked; rounds since one did

    # -- before a round

    def decide(self, rows: int) -> Decision:
        """What the next round of so many rows does."""
        place = self._place(rows)
        self.rounds += 1
        place.rounds += 1
        if place.rounds % _EVERY == 1 or place.rounds <= 3:
            self._choose(place)
        if place.exit == PLAIN:
            place.waited += 1
            self._try_again(place)
        elif place.rounds > place.next_plain:  # what plain decoding takes has to be known to compare with it
            place.gap = min(2 * place.gap, 256)
            place.next_plain = place.rounds + place.gap
            return Decision(PLAIN)
        token, taps = self._token(place, rows), self._taps(place)
        if place.exit == PLAIN:
            return Decision(PLAIN, taps=taps, token=token)
        price = self._line(place, place.exit)[1] / token if token else 0.3 * rows  # a guess, for the first round
        return Decision(place.exit, price, taps, token)

    def course(self, decision: Decision, *, rows: int) -> Course:
        """How long the round drafts: as long as the next token pays."""
        return self.learned[decision.exit].course(self.tokens, rows=rows, price=decision.price)

    def copy_seconds(self, rows: int, width: int) -> float | None:
        """What a round that copies so many tokens takes; None where nothing is known."""
        place = self._place(rows)
        pace = place.paces.get(PLAIN)
        if pace is not None:
            return pace.start + pace.step * width
        return None if place.step is None else place.step * (1 + ROW * width)

    # -- after a round

    def learn(self, decision: Decision, draft: Draft, outcome: Outcome) -> None:
        """Takes up a round that did as decided; one that looked at other exits too was told by `look` before."""
        rows, count = len(outcome.accepted), draft.tokens.shape[1]
        place, seconds = self._place(rows), outcome.draft_seconds + outcome.verify_seconds
        self.seconds += seconds
        if decision.exit != PLAIN and count:
            self.learned[decision.exit].learn(draft, outcome)
            emitted = sum(map(len, outcome.emitted))
            if not decision.taps:
                pace = place.paces.setdefault(decision.exit, Pace())
                pace.add(count, draft=outcome.draft_seconds, verify=outcome.verify_seconds)
            if decision.exit == place.exit:
                place.spent.add(emitted, seconds - (self._looked if decision.taps else 0.0))
            if place.trial and place.step is not None:
                self.lost += max(0.0, seconds - emitted * place.step / rows)
            self._judge(place, rows)
        elif not count and not decision.taps:
            place.plain.append(seconds)

    def learn_copy(self, draft: Draft, outcome: Outcome) -> None:
        """Takes up a round that copied instead."""
        place = self._place(len(outcome.accepted))
        self.seconds += outcome.draft_seconds + outcome.verify_seconds
        pace = place.paces.setdefault(PLAIN, Pace(passes=False))
        pace.add(draft.tokens.shape[1], draft=outcome.draft_seconds, verify=outcome.verify_seconds)

    def look(
        self,
        decision: Decision,
        seen: Mapping[int, Sequence[Sequence[int]]],
        draft: Draft,
        outcome: Outcome,
        *,
        seconds: float,
    ) -> None:
        """Takes up what other exits would have said.

        Args:
            decision: of the round.
            seen: by exit, the token that each row would have drafted at every node.
            draft: of the round.
            outcome: of the round.
            seconds: of their heads; what the round took beyond its like counts as well.
        """
        for exit, tokens in seen.items():
            for said, text in zip(tokens, outcome.emitted, strict=True):
                # node i lies on the text up to the first token that was not drafted
                self.learned[exit].agreement.add_text([a == b for a, b in zip(said, text, strict=False)])
        place = self._place(len(outcome.accepted))
        usual = self._usual(place, decision.exit, draft.tokens.shape[1])
        beyond = outcome.draft_seconds + outcome.verify_seconds - seconds - usual if usual is not None else 0.0
        cost = seconds + max(0.0, beyond)
        self._looked, each = cost, cost / len(seen)
        self._tap = each if not self._tap else 0.8 * self._tap + 0.2 * each
        self.overhead += cost

    # -- choosing

    def _choose(self, place: Place) -> None:
        """Takes up an exit that looks better than what is done."""
        for learned in self.learned.values():
            learned.agreement.first.fade(_FADE)
            learned.agreement.later.fade(_FADE)
        self._share_guesses()
        best = self._fastest(place, self.exits)
        if best.exit in (PLAIN, place.exit):
            return
        if place.exit == PLAIN:
            if place.plain and not place.gave_up:  # one round of plain decoding first
                place.use(best.exit)
            return
        early = place.exit == self.start and place.rounds < 2 * _EVERY  # a recommendation has its first few rounds
        if not early and best.rate > _SWITCH * self._fastest(place, [place.exit], plain=False).rate:
            place.use(best.exit, trial=place.trial)

    def _try_again(self, place: Place) -> None:
        """Begins to draft anew where that should pay by now. The estimates may be what is wrong, so now and then it is
        tried against them."""
        if place.waited < place.wait or not self.exits or self.lost > self.share * self.seconds:
            return
        best = self._fastest(place, self.exits, plain=False)
        pays = place.step is not None and best.rate * place.step > _RETURN
        if pays or place.waited >= 4 * place.wait:
            place.use(best.exit, trial=True)

    def _judge(self, place: Place, rows: int) -> None:
        """Ends drafting that is slower than plain decoding."""
        spent, step = place.spent, place.step
        if place.trial and spent.count >= _SETTLED:
            place.trial, place.wait = False, WAIT
        if step is None or spent.count < _TRIAL or spent.token * rows <= _LEAVE * step:
            return
        other = self._fastest(place, [exit for exit in self.exits if exit != place.exit])
        if not place.trial and other.exit != PLAIN and other.rate * step > _SWITCH:
            place.use(other.exit, trial=True)  # it has to prove itself at once
            return
        if place.trial:
            place.wait = min(2 * place.wait, _LONGEST_WAIT)
        place.use(PLAIN)
        place.gave_up = True

    def _fastest(self, place: Place, exits: Sequence[int], *, plain: bool = True) -> Fastest:
        agreements = {exit: self.learned[exit].agreement for exit in exits}
        lines = {exit: self._line(place, exit) for exit in exits}
        return fastest(
            exits,
            expected=lambda exit, tokens: agreements[exit].expected(tokens),
            seconds=lambda exit, tokens: lines[exit][0] + lines[exit][1] * tokens,
            plain=place.step if plain else None,
            most=self.tokens,
        )

    def _share_guesses(self) -> None:
        """An exit that nobody asked is taken to be no worse than shallower ones, and no better than deeper ones."""
        least, asked = 0.0, [exit for exit in self.exits if self.learned[exit].agreement.first.tried >= 4]
        for exit in self.exits:
            agreement = self.learned[exit].agreement
            if exit in asked:
                least = max(least, agreement.first.value)
                continue
            most = min((self.learned[e].agreement.first.value for e in asked if e > exit), default=1.0)
            for rate in (agreement.first, agreement.later):
                rate.guess = min(max(rate.guess, least), max(most, least))

    def _taps(self, place: Place) -> tuple[int, ...]:
        """Exits that may be faster than what is done now, as far as is known; none where the budget is spent."""
        self._unlooked += 1
        if self._unlooked < _LOOK:
            return ()
        others = [exit for exit in self.exits if exit != place.exit]
        usual = self.seconds / max(self.rounds, 1)
        each = self._tap or usual * self.head / (self.depth + self.head)
        spare = self.share * self.seconds - self.overhead
        room = min(_TAPS, int(spare / each)) if each > 0 else 0
        if not others or room < 1 or (place.exit == PLAIN and place.step is None):
            return ()
        now = self._fastest(place, [place.exit], plain=False).rate if place.exit != PLAIN else 1.0 / (place.step or 1.0)
        hopes = sorted(((self._hope(place, exit), exit) for exit in others), reverse=True)
        promising = [exit for hope, exit in hopes if hope > now][:room]
        if not promising:  # texts change: look at one after another
            self._turn += 1
            promising = [others[self._turn % len(others)]]
        self._unlooked = 0
        return tuple(sorted(promising))

    def _hope(self, place: Place, exit: int) -> float:
        """Tokens per second and row if the exit is as good as its few trials leave possible."""
        agreement, (start, step) = self.learned[exit].agreement, self._line(place, exit)
        doubt = 0.5 / math.sqrt(agreement.first.tried + agreement.later.tried + 1.0)
        rate = min((agreement.first.value + agreement.later.value) / 2 + doubt, 0.98)
        return max(
            (1 - rate ** (k + 1)) / (1 - rate) / (start + k * step) for k in {1, min(self.tokens, 4), self.tokens}
        )

    # -- seconds

    def _place(self, rows: int) -> Place:
        kind = bucket(rows)
        if kind not in self.places:
            near = self._near(kind)
            # what is recommended, or did well with another number of rows, is taken at its word for a few rounds
            exit = near.exit if near is not None else self.start or PLAIN
            self.places[kind] = Place(exit, next_plain=5 if near is None else 2)
        return self.places[kind]

    def _near(self, kind: int) -> Place | None:
        """The measured place whose number of rows is the nearest."""
        known = {rows: place for rows, place in self.places.items() if place.measured and rows != kind}
        return known[min(known, key=lambda rows: abs(math.log2(rows / kind)))] if known else None

    def _token(self, place: Place, rows: int) -> float | None:
        """Seconds of an emitted token, over all rows."""
        if place.exit == PLAIN:
            return None if place.step is None else place.step / rows
        if place.spent.count >= 3:
            return place.spent.token
        if not place.measured and place.step is None:
            return None
        return 1.0 / (rows * self._fastest(place, [place.exit], plain=False).rate)

    def _usual(self, place: Place, exit: int, tokens: int) -> float | None:
        """What a round takes that does not look."""
        if exit == PLAIN:
            return place.step
        if exit not in place.paces:
            return None
        start, step = self._line(place, exit)
        return start + step * tokens

    def _line(self, place: Place, exit: int) -> tuple[float, float]:
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
            for other in self.places.values():
                if other is not place and other.measured:
                    return self._line(other, exit)
        layer = (place.step or 1.0) / (self.depth + self.head)
        verify = (self.depth - exit + self.head) * layer
        return exit * layer + verify, (exit + self.head) * layer + ROW * verify
