"""The choice of exits on made-up machines: what rounds take and keep is given. No model, no clock."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from layerskip.decode.controllers import Plan
from layerskip.decode.controllers.choice import PLAIN, Decision, candidates, fastest
from layerskip.decode.controllers.online import Online
from layerskip.decode.draft import Draft, Outcome
from layerskip.model.stop import Ends

EMPTY = torch.zeros(0)


def drafted(plan: Plan, draws: random.Random, rows: int) -> list[list[float]]:
    """A draft's confidence: more or less sure, whatever becomes of the tokens."""
    assert plan.stop is not None
    ends = Ends(plan.stop, rows=rows, count=plan.length)
    while len(ends.confidence) < plan.length and not ends([draws.uniform(0.6, 1.0) for _ in range(rows)]):
        pass
    return ends.confidence


@dataclass
class Machine:
    """Rounds of a model of 8 layers, a millisecond each, as its head; tokens are kept with the rates of the exits."""

    rates: Mapping[int, float]
    rows: int = 1
    position: float = 0.03  # what a further position adds to a verification
    overhead: float = 0.0  # of a draft step
    pace: float = 1.0  # others may use the machine
    cold: float = 1.0  # how much longer a plain round takes after another kind
    row: int = 0  # plain rounds just now
    draws: random.Random = field(default_factory=lambda: random.Random(5))

    def seconds(self, exit: int, tokens: int) -> tuple[float, float]:
        if exit == PLAIN:
            return 0.0, 0.009 * self.pace * (self.cold if self.row < 2 else 1.0)
        step = 0.001 * (exit + 1) + self.overhead
        verify = 0.001 * (9 - exit) * (1 + self.position * tokens)
        return (tokens * step + 0.001 * exit) * self.pace, verify * self.pace

    def run(self, online: Online, rounds: int) -> Counter[int]:
        """Decodes; returns how many rounds each exit drafted."""
        done: Counter[int] = Counter()
        for _ in range(rounds):
            decision = online.decide(self.rows)
            self.one(online, decision)
            done[decision.exit] += 1
        return done

    def one(self, online: Online, decision: Decision) -> int:
        """A round; returns how many tokens it drafted."""
        sure = drafted(decision.plan, self.draws, self.rows) if decision.exit != PLAIN else []
        tokens = len(sure)
        kept = [self.kept(self.rates.get(decision.exit, 0.0), tokens) for _ in range(self.rows)]
        draft, verify = self.seconds(decision.exit, tokens)
        chain = Draft(torch.zeros(self.rows, tokens, dtype=torch.long), confidence=sure or None)
        emitted = [[1] * (n + 1) for n in kept]
        looked = 0.0005 * len(decision.taps)
        outcome = Outcome(EMPTY, EMPTY, kept, [[]] * self.rows, emitted, draft + looked, verify)
        if decision.taps:
            seen = {
                tap: [[int(self.draws.random() < self.rates[tap]) for _ in text] for text in emitted]
                for tap in decision.taps
            }
            online.look(decision, seen, chain, outcome, seconds=looked)
        online.learn(decision, chain, outcome)
        self.row = 0 if tokens else self.row + 1
        return tokens

    def kept(self, rate: float, tokens: int) -> int:
        return next((i for i in range(tokens) if self.draws.random() >= rate), tokens)

    def best(self) -> int:
        """The exit with the most tokens per second at its best fixed length."""
        found = fastest(
            list(self.rates),
            expected=lambda e, k: sum(self.rates[e] ** i for i in range(k + 1)),
            seconds=lambda e, k: sum(self.seconds(e, k)),
            plain=0.009,
            most=16,
        )
        return found.exit


GOOD = {1: 0.3, 2: 0.85, 3: 0.88, 4: 0.9, 5: 0.92, 6: 0.95, 7: 0.97}
DEEP = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.97, 5: 0.98, 6: 0.98, 7: 0.99}
NEVER = dict.fromkeys(range(1, 8), 0.02)


def online(**settings: object) -> Online:
    return Online(8, head=1.0, tokens=16, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [None, 2, 6])
@pytest.mark.parametrize("rates", [GOOD, DEEP], ids=["shallow", "deep"])
def test_the_fastest_exit_is_found_wherever_it_begins(rates: Mapping[int, float], start: int | None) -> None:
    machine, mind = Machine(rates), online(start=start)
    machine.run(mind, 600)
    late = machine.run(mind, 300)
    assert machine.best() in (2, 4)
    assert late[machine.best()] > 250, late


def test_what_was_measured_beforehand_is_used_from_the_first_round() -> None:
    machine, mind = Machine(GOOD), online(guesses=GOOD)
    # the first is plain, for it is measured; and some in a row, where drafting looks hardly faster
    done = machine.run(mind, 40)
    assert done[2] + done[PLAIN] == 40
    assert done[PLAIN] <= 7


def test_a_recommended_exit_drafts_at_once() -> None:
    assert online(start=3).decide(1).exit == 3
    assert online().decide(1).exit == PLAIN


def test_hostile_text_is_decoded_plainly_and_tried_ever_more_rarely() -> None:
    machine, mind = Machine(NEVER), online(start=2)
    first, later = machine.run(mind, 100), machine.run(mind, 1900)
    assert first[PLAIN] > 50
    assert later[PLAIN] > 0.95 * 1900, later
    assert sum(later.values()) > later[PLAIN]  # it was tried again
    assert mind.lost < 0.04 * mind.seconds


def test_drafting_comes_back_when_it_pays() -> None:
    machine, mind = Machine(NEVER), online(start=2)
    machine.run(mind, 300)
    machine.rates = GOOD
    machine.run(mind, 300)
    assert machine.run(mind, 200)[PLAIN] < 50
    machine.rates = NEVER
    machine.run(mind, 100)
    assert machine.run(mind, 200)[PLAIN] > 180


def test_a_machine_that_slows_down_is_not_taken_for_drafts_that_lose() -> None:
    machine, mind = Machine(GOOD), online(start=2)
    for pace in (1.0, 3.0, 1.0, 4.0):
        machine.pace = pace
        assert machine.run(mind, 100)[PLAIN] < 10


def test_a_few_lucky_looks_change_nothing() -> None:
    machine, mind = Machine(GOOD), online(start=2, share=0.0)  # nobody looks
    machine.run(mind, 100)
    for _ in range(2):
        mind.learned[3].agreement.add_text([True, True])
    assert machine.run(mind, 100)[2] > 90
    for _ in range(60):
        mind.learned[3].agreement.add_text([True] * 6)
    assert machine.run(mind, 100)[3] > 50


def test_ever_fewer_rounds_are_watched_until_tokens_get_dearer() -> None:
    machine, mind = Machine(GOOD), online(start=2)
    machine.run(mind, 100)

    def watched(rounds: int) -> int:
        found = 0
        for _ in range(rounds):
            decision = mind.decide(1)
            machine.one(mind, decision)
            found += decision.watched
        return found

    assert 10 < watched(100) < 35
    machine.run(mind, 1000)
    assert watched(100) < 10
    machine.rates = NEVER
    assert watched(40) > 15


def test_looking_at_other_exits_keeps_within_its_share() -> None:
    for rates, looked_at in ((GOOD, 3), (NEVER, 7)):  # those that promise something, or all where none does
        machine, mind = Machine(rates), online()
        machine.run(mind, 800)
        assert 0 < mind.overhead <= 0.03 * mind.seconds
        asked = [exit for exit in mind.exits if mind.learned[exit].agreement.first.tried > 0.5]
        assert len(asked) >= looked_at


def test_without_a_share_nobody_looks() -> None:
    machine, mind = Machine(GOOD), online(share=0.0)
    machine.run(mind, 200)
    assert mind.overhead == 0


def test_a_round_that_looks_costs_what_it_takes_beyond_its_like() -> None:
    mind, machine = online(start=2), Machine(GOOD)
    machine.run(mind, 60)
    before = mind.overhead
    decision = Decision(2, taps=(3,))
    draft, verify = machine.seconds(2, 1)
    chain = Draft(torch.zeros(1, 1, dtype=torch.long), confidence=[[0.8]])
    outcome = Outcome(EMPTY, EMPTY, [1], [[0]], [[1, 1]], draft + 0.003, verify)
    mind.look(decision, {3: [[1, 1]]}, chain, outcome, seconds=0.002)
    assert mind.overhead - before == pytest.approx(0.003, abs=0.0008)  # 2 ms of heads, 1 ms of passes cut in two


def test_many_rows_narrow_drafts() -> None:
    """Where positions are dear, as with many rows, drafts are shorter, or there are none."""

    def length(position: float, rows: int) -> float:
        machine, mind = Machine(GOOD, rows=rows, position=position), online(start=2)
        machine.run(mind, 400)
        lengths = []
        for _ in range(400):
            decision = mind.decide(rows)
            lengths.append(machine.one(mind, decision))
        return sum(lengths) / len(lengths)

    assert length(0.02, 1) > length(0.25, 16) + 0.5
    assert Machine(GOOD, rows=16, position=3.0).run(online(start=2), 400)[PLAIN] > 300


def test_numbers_of_rows_are_judged_apart() -> None:
    mind = online(start=2)
    one, many = Machine(GOOD), Machine(GOOD, rows=16, position=3.0)
    for _ in range(40):
        one.run(mind, 10)
        many.run(mind, 10)
    assert one.run(mind, 50)[2] > 40
    assert many.run(mind, 50)[PLAIN] > 40


@pytest.mark.parametrize("cold", [1.0, 1.4])
def test_plain_rounds_among_drafts_do_not_speak_for_plain_decoding(cold: float) -> None:
    """Alone they take longer than in a row: by them, drafts that lose would look like a gain."""
    machine, mind = Machine(GOOD, rows=16, position=0.7, cold=cold), online(start=2)
    assert machine.best() == PLAIN
    late = [machine.run(mind, 200) for _ in range(3)][-1]
    assert late[PLAIN] > 150, late


def test_a_model_of_one_layer_has_no_exit() -> None:
    assert candidates(1) == []
    machine = Machine({})
    assert machine.run(Online(1, head=1.0, tokens=4), 50) == {PLAIN: 50}


def test_exits_nobody_asked_lie_between_their_neighbours() -> None:
    mind = online()
    for _ in range(50):
        mind.learned[4].agreement.add_text([False] * 4)
    mind._share_guesses()
    assert mind.learned[3].agreement.first.guess <= mind.learned[4].agreement.first.value + 1e-9
    assert mind.learned[5].agreement.first.guess > 0.5


Expected = Callable[[int, int], float]


def test_the_fastest_of_all_against_every_setting() -> None:
    expected: Expected = lambda e, k: sum((0.5 + 0.05 * e) ** i for i in range(k + 1))  # noqa: E731 -- two formulas
    seconds: Expected = lambda e, k: 1 + 0.05 * e * k + 0.01 * e  # noqa: E731
    found = fastest(range(1, 9), expected=expected, seconds=seconds, plain=1.0, most=10)
    best = max((expected(e, k) / seconds(e, k), e, k) for e in range(1, 9) for k in range(1, 11))
    assert (found.rate, found.exit, found.tokens) == pytest.approx(best)
    assert fastest([], expected=expected, seconds=seconds, plain=None, most=3).exit == PLAIN


def test_one_slow_copy_says_little() -> None:
    """The first round of a kind may take ten times as long; believed, it would forbid all others for good."""
    mind = online()
    Machine(NEVER).run(mind, 5)
    before = mind.copy_seconds(1, 8)
    assert before == pytest.approx(0.009 * (1 + 8 * 0.03), rel=0.05)

    def copied(seconds: float) -> float | None:
        outcome = Outcome(EMPTY, EMPTY, [8], [[*range(8)]], [[1] * 9], 0.0, seconds)
        mind.learn_copy(Draft(torch.zeros(1, 8, dtype=torch.long)), outcome)
        return mind.copy_seconds(1, 8)

    assert copied(0.15) == before
    assert [copied(0.02) for _ in range(5)][-1] == pytest.approx(0.02, rel=0.05)
