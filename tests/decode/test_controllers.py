"""How long drafts get: the rules as arithmetic, and what they learn from rounds. No model, no clock."""

import math
from collections.abc import Sequence

import pytest
import torch

from layerskip.decode.controllers import LENGTHS, Confidence, Fixed, Gain, Plan, Thompson, controller_for
from layerskip.decode.controllers.gain import Learned
from layerskip.decode.controllers.learned import Agreement, Calibration, Rate, trials
from layerskip.decode.controllers.seconds import Line, Pace, bucket
from layerskip.decode.controllers.thompson import best_length
from layerskip.decode.draft import Draft, Outcome
from layerskip.errors import RequestError
from layerskip.model.stop import Ends

EMPTY = torch.zeros(0)


def round_of(
    drafted: int,
    accepted: Sequence[int],
    *,
    draft: float = 0.0,
    verify: float = 0.0,
    confidence: float | None = None,
    cut: bool = False,
) -> tuple[Draft, Outcome]:
    """A chain for each row and what was kept of it; `cut` where the text ended with the last kept token."""
    sure = None if confidence is None else [[confidence] * len(accepted)] * drafted
    emitted = [[7] * (n + (not cut)) for n in accepted]
    return (
        Draft(torch.zeros(len(accepted), drafted, dtype=torch.long), confidence=sure),
        Outcome(EMPTY, EMPTY, list(accepted), [list(range(n)) for n in accepted], emitted, draft, verify),
    )


def ends_of(plan: Plan, *, rows: int = 1) -> Ends:
    assert plan.stop is not None
    return Ends(plan.stop, rows=rows, count=plan.length)


def best_by_hand(rate: float, start: float, step: float, most: int) -> int:
    """Every length, by the sum rather than the formula."""
    speeds = [sum(rate**i for i in range(k + 1)) / (start + k * step) for k in range(1, most + 1)]
    return 1 + max(range(most), key=lambda i: (round(speeds[i], 12), -i))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("step", [0.05, 0.2, 0.6])
def test_the_best_length_is_the_best_of_all(rate: float, step: float) -> None:
    assert best_length(rate, start=1.0, step=step, most=12) == best_by_hand(rate, 1.0, step, 12)


def test_a_draft_goes_on_while_it_pays() -> None:
    """Tokens are kept as often as the drafter is sure: 0.95, 0.88, 0.68 are the middles of their ranges."""
    ends = ends_of(Learned(0.8).plan(9, price=0.5))
    # 0.95 x 0.8 = 0.76, then x 0.88 = 0.669, then x 0.68 = 0.455 < 0.5
    assert [ends([c]) for c in (0.95, 0.9, 0.7)] == [False, False, True]
    assert ends.lengths == [3]


def test_rows_share_the_price_of_a_step_and_stop_together() -> None:
    ends = ends_of(Learned(1.0).plan(9, price=1.0), rows=2)
    assert not ends([0.1, 0.95])  # 0.1 + 0.95 >= 1
    assert ends([0.1, 0.95])  # 0.01 + 0.9025 < 1
    assert ends.lengths == [2, 2]


def test_a_drafter_that_is_never_right_drafts_one_token() -> None:
    assert ends_of(Learned(0.0, weight=10.0).plan(9, price=0.0))([0.99])


def test_rows_pass_a_threshold_one_by_one() -> None:
    ends = ends_of(Confidence(9, threshold=0.6).plan(3), rows=3)
    assert [ends(sure) for sure in ([0.6, 0.5, 0.9], [0.9, 0.9, 0.1], [0.2, 0.9, 0.9])] == [False, False, True]
    assert ends.lengths == [3, 1, 2]


def test_a_broken_confidence_ends_the_draft() -> None:
    assert ends_of(Learned(1.0).plan(9, price=0.1))([math.nan])
    unmoved, surest = Calibration(), Calibration()
    unmoved.add(math.nan, True)
    surest.add(1.0, True)
    assert unmoved.values == Calibration().values != surest.values


def test_what_the_end_of_a_text_cut_off_was_not_judged() -> None:
    assert list(trials(*round_of(4, [2, 4]))) == [(4, 2), (4, 4)]
    assert list(trials(*round_of(4, [2], cut=True))) == [(2, 2)]


def test_agreement_counts_first_and_later_tokens() -> None:
    agreement = Agreement(0.5, weight=1e-9)
    for accepted in (0, 3, 1):
        agreement.add(3, accepted)
    assert agreement.first.value == pytest.approx(2 / 3, abs=0.01)
    assert agreement.later.value == pytest.approx(2 / 3, abs=0.01)  # of 3 judged after a kept one, 2 were kept
    along = Agreement(0.5, weight=1e-9)
    along.add_text([True, True, False, True])
    assert along.first.tried == pytest.approx(2, abs=0.02)  # the beginning, and the token after the miss
    assert along.later.value == pytest.approx(1 / 2, abs=0.01)
    assert Agreement(1.0).expected(4) == pytest.approx(5, abs=0.01)


def test_rates_follow_a_text_that_changes() -> None:
    rate = Rate(0.5)
    rate.add(0, 100)
    for _ in range(600):
        rate.add(1, 1)
    assert rate.value > 0.9


def test_a_line_forgets_the_first_use_and_one_slow_round() -> None:
    """Otherwise long drafts that met a pause of the machine would never be tried again."""
    pace = Pace()
    pace.add(8, draft=5.0, verify=5.0)
    for _ in range(20):
        pace.add(2, draft=0.003, verify=0.01)
    pace.add(6, draft=1.0, verify=1.0)
    for _ in range(20):
        pace.add(2, draft=0.003, verify=0.01)
    assert 0.0005 < pace.draft.slope < 0.01
    assert pace.draft.at(2) < 0.1


def test_a_line_finds_the_slope_there_is() -> None:
    line = Line(least=0.0, most=0.3, expected=0.04)
    for x in [1, 5, 9, 3, 7] * 9:
        line.add(x, 2.0 + 0.1 * x)
    assert line.slope == pytest.approx(0.1, rel=0.02)
    assert line.at(4) == pytest.approx(2.4, rel=0.02)


def test_what_a_round_takes_besides_its_passes_is_no_price_of_tokens() -> None:
    """Where passes take microseconds, most of a draft is not a pass."""
    pace = Pace()
    for x in [1, 5, 3, 7] * 9:
        pace.add(x, draft=0.5 + 0.1 * x, verify=1.0)
    assert pace.draft.slope == pytest.approx(0.1, rel=0.15)


def test_rows_are_taken_together_by_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]


def lengths(controller: Thompson, *, rows: int, times: int = 300) -> float:
    return sum(controller.plan(rows).length for _ in range(times)) / times


def test_thompson_drafts_more_where_more_is_kept() -> None:
    good, bad = Thompson(12), Thompson(12)
    for _ in range(60):
        good.learn(*round_of(6, [6], draft=0.6, verify=1.0))
        bad.learn(*round_of(6, [0], draft=0.6, verify=1.0))
    assert lengths(good, rows=1) > 8
    assert lengths(bad, rows=1) < 1.5
    assert [Thompson(9, seed=3).plan(1).length for _ in range(3)] == [Thompson(9, seed=3).plan(1).length] * 3


def test_both_rules_draft_less_where_a_position_costs_more() -> None:
    """Many rows make a further position dear, which shows in the seconds of verification."""
    thompson, gain = Thompson(12), Gain(12)
    for _ in range(40):
        for drafted in (2, 6):
            for rows, verify in ((1, 1.0 + 0.02 * drafted), (16, 1.0 + 0.29 * drafted)):
                for controller in (thompson, gain):
                    controller.learn(
                        *round_of(drafted, [drafted - 1] * rows, draft=0.1 * drafted, verify=verify, confidence=0.8)
                    )
    assert lengths(thompson, rows=16) < lengths(thompson, rows=1) - 1

    def steps(rows: int) -> int:
        ends = ends_of(gain.plan(rows), rows=rows)
        return next((i + 1 for i in range(12) if ends([0.8] * rows)), 12)

    assert steps(16) < steps(1)


def test_gain_learns_what_confidence_is_worth() -> None:
    """Sure and wrong: drafts end at once. Unsure and right: they go on."""
    for confidence, accepted, stops in ((0.99, 0, True), (0.1, 6, False)):
        gain = Gain(12)
        for _ in range(80):
            gain.learn(*round_of(6, [accepted], draft=0.6, verify=1.0, confidence=confidence))
        assert ends_of(gain.plan(1))([confidence]) == stops


def test_options_mean_controllers() -> None:
    kinds = {"fixed": Fixed, "thompson": Thompson, "gain": Gain}
    for length in LENGTHS:
        assert type(controller_for(5, confidence=None, length=length)) is kinds[length]
        assert controller_for(5, confidence=None, length=length).tokens == 5
    assert type(controller_for(5, confidence=0.5)) is Confidence
    assert controller_for(None, confidence=None).tokens == 4
    assert controller_for(None, confidence=None, length="gain").tokens == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": "gian"}, "unknown draft length 'gian'; use fixed, thompson, gain; did you mean 'gain'?"),
        ({"length": "gain", "confidence": 0.5}, "finds where drafts end; leave confidence 0.5 out"),
        ({"length": "thompson", "tokens": 0}, "drafting 0 tokens a round is not possible"),
        ({"length": "gain", "tokens": 2.5}, "draft tokens 2.5 is not possible; use a whole number"),
    ],
)
def test_what_no_controller_can_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=r"^[^\n]*$") as error:
        controller_for(**{"tokens": 4, "confidence": None, **settings})  # type: ignore[arg-type]
    assert message in str(error.value)
