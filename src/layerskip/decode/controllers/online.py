"""Where to exit, or not to draft at all, chosen while decoding.

Every exit is a drafter (DEL, arXiv 2504.05598): its acceptance is estimated from past rounds, of its own and of others
that looked at it on their way, its seconds from rounds measured in this process; what should emit the most tokens per
second is chosen. Plain numbers: a round costs some microseconds here.

Knows depths, counts and seconds. Knows no tensors and reads no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerskip.decode.controllers.choice import PLAIN, Decision, Fastest, candidates, fastest
from layerskip.decode.controllers.gain import PRICE, Learned
from layerskip.decode.controllers.places import WAIT, Place, Places
from layerskip.decode.controllers.seconds import Pace
from layerskip.decode.draft import Draft, Outcome

_EVERY = 8  # rounds between two choices
_FADE = 0.96  # what an observation counts for after one more choice: nobody knows how long a text stays as it is
_SWITCH = 1.05  # how much faster another exit has to look
_LEAVE, _RETURN = 1.02, 1.03  # how much slower than plain drafting has to be to end, and how much faster to begin anew
_HASTE = 1.5  # how much faster drafting has to be for plain rounds measured one by one to say so
_TRIAL, _SETTLED = 6, 40  # rounds of drafting until it is judged, and until it counts as won
_REST, _MOST_REST = 3, 15  # rounds that repeat what is done, between two that are watched: at first, and at last
_VARY = 1.25  # how differently such a round prices tokens
_SURPRISE = 1.2  # how much dearer than it was tokens have to become for that to end
_LONGEST_WAIT = 512  # plain rounds until drafting is tried again: doubled each time it does not pay
_AGAINST = 4  # how many times as many they are where it should not pay
_TAPS, _LOOK = 3, 2  # exits looked at in one round, and watched rounds from one look to the next at least


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
        self.places = Places(depth, head=head, start=self.start)
        self.rounds = 0
        self.seconds, self.overhead, self.lost = 0.0, 0.0, 0.0  # of all rounds, of choosing, of drafting in vain
        self._tap, self._turn = 0.0, 0  # seconds of a tap; whose turn it is
        self._looked, self._unlooked = 0.0, 0  # seconds that the round looked; rounds since one did

    # -- before a round

    def decide(self, rows: int) -> Decision:
        """What the next round of so many rows does."""
        place = self.places.at(rows)
        self.rounds += 1
        if place.exit == PLAIN:
            place.waited += 1
        if place.unwatched:
            place.unwatched -= 1
            return place.routine
        decision = self._decide(place, rows)
        exit, plan, token = decision.exit, decision.plan, decision.token
        if place.settled and exit == place.exit:
            place.calm += 1
            place.unwatched = min(_REST + place.calm // _EVERY, _MOST_REST)
            place.routine = Decision(exit, plan, token=token, watched=False)
            if exit != PLAIN:
                # a little longer and shorter in turn: among equal lengths nobody would see what a token costs
                plan = plan.eager(_VARY if place.rounds // 2 % 2 else 1 / _VARY)
                return Decision(exit, plan, decision.taps, token)
        return decision

    def _decide(self, place: Place, rows: int) -> Decision:
        place.rounds += 1
        if place.rounds % _EVERY == 1 or place.rounds <= 3:
            self._choose(place)
        if place.exit == PLAIN:
            self._try_again(place)
        elif place.asked:
            return Decision(PLAIN)
        elif place.rounds > place.next_plain:  # what plain decoding takes has to be known to compare with it
            place.ask()
            return Decision(PLAIN)
        token, taps = self._token(place, rows), self._taps(place)
        if place.exit == PLAIN:
            return Decision(PLAIN, taps=taps, token=token)
        price = self.places.line(place, place.exit)[1] / token if token else PRICE * rows
        plan = self.learned[place.exit].plan(self.tokens, price=price)  # as long as the next token pays
        return Decision(place.exit, plan, taps, token)

    def copy_seconds(self, rows: int, width: int) -> float | None:
        """What a round that copies so many tokens takes; None where nothing is known."""
        return self.places.copy(self.places.at(rows), width)

    # -- after a round

    def learn(self, decision: Decision, draft: Draft, outcome: Outcome) -> None:
        """Takes up a round that did as decided; one that looked at other exits too was told by `look` before."""
        rows, count = len(outcome.accepted), draft.tokens.shape[1]
        place, seconds = self.places.at(rows), outcome.draft_seconds + outcome.verify_seconds
        self.seconds += seconds
        emitted = sum(map(len, outcome.emitted))
        if count:
            place.drafted()
        else:  # looking for copies is left out: rounds that repeat what is done do not look
            place.took(outcome.verify_seconds if decision.watched and not decision.taps else None)
        if count and decision.exit == place.exit:
            place.spent.add(emitted, seconds - (self._looked if decision.taps else 0.0))
        if not decision.watched:
            if decision.token is not None and place.spent.token > _SURPRISE * decision.token:
                place.stir()
        elif decision.exit != PLAIN and count:
            self.learned[decision.exit].learn(draft, outcome)
            if not decision.taps:
                pace = place.paces.setdefault(decision.exit, Pace())
                pace.add(count, draft=outcome.draft_seconds, verify=outcome.verify_seconds)
            if place.trial and place.step is not None:
                self.lost += max(0.0, seconds - emitted * place.step / rows)
            self._judge(place, rows)

    def learn_copy(self, draft: Draft, outcome: Outcome) -> None:
        """Takes up a round that copied instead."""
        place = self.places.at(len(outcome.accepted))
        place.stir()  # the next round may go on copying
        place.drafted()
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
        place = self.places.at(len(outcome.accepted))
        usual = self.places.usual(place, decision.exit, draft.tokens.shape[1])
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
        if place.exit == PLAIN:
            best = self._fastest(place, self.exits)
            if best.exit != PLAIN and place.plain and not place.gave_up:  # one round of plain decoding first
                place.use(best.exit)
            return
        # looking is cheap and changing is not: exits are looked at for what they may be, and taken for what they are
        best = self._fastest(place, [exit for exit in self.exits if exit != place.exit], plain=False, proven=True)
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
        if not pays and place.waited < _AGAINST * place.wait:
            return
        if not pays:  # what rounds took may be long ago, on a machine that had more to do
            place.forget()
            best = self._fastest(place, self.exits, plain=False)
        place.use(best.exit, trial=True)

    def _judge(self, place: Place, rows: int) -> None:
        """Ends drafting that is slower than plain decoding."""
        spent, step = place.spent, place.step
        if spent.count >= _SETTLED:
            place.trial, place.doubted, place.wait = False, False, WAIT
        if step is None or spent.count < (2 * _TRIAL if place.doubted else _TRIAL):
            return
        if spent.token * rows <= (_LEAVE * step if place.sure else step / _HASTE):
            return
        if not place.trial and not place.doubted:
            place.doubt()
            return
        other = self._fastest(place, [exit for exit in self.exits if exit != place.exit])
        if not place.trial and other.exit != PLAIN and other.rate * step > _SWITCH:
            place.use(other.exit, trial=True)  # it has to prove itself at once
            return
        if place.trial:
            place.wait = min(2 * place.wait, _LONGEST_WAIT)
        place.use(PLAIN)
        place.gave_up = True

    def _fastest(self, place: Place, exits: Sequence[int], *, plain: bool = True, proven: bool = False) -> Fastest:
        """Of these exits and plain decoding; with `proven`, an exit is only taken to be as good as its trials show."""
        agreements = {exit: self.learned[exit].agreement for exit in exits}
        less = {exit: agreement.doubt / 2 if proven else 0.0 for exit, agreement in agreements.items()}
        lines = {exit: self.places.line(place, exit) for exit in exits}
        return fastest(
            exits,
            expected=lambda exit, tokens: agreements[exit].expected(tokens, less=less[exit]),
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
        agreement, (start, step) = self.learned[exit].agreement, self.places.line(place, exit)
        rate = min((agreement.first.value + agreement.later.value) / 2 + agreement.doubt, 0.98)
        return max(
            (1 - rate ** (k + 1)) / (1 - rate) / (start + k * step) for k in {1, min(self.tokens, 4), self.tokens}
        )

    def _token(self, place: Place, rows: int) -> float | None:
        """Seconds of an emitted token, over all rows."""
        if place.exit == PLAIN:
            return None if place.step is None else place.step / rows
        if place.spent.count >= 3:
            return place.spent.token
        if not place.measured and place.step is None:
            return None
        return 1.0 / (rows * self._fastest(place, [place.exit], plain=False).rate)
