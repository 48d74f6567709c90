"""Tuning: costs from rounds, predictions from costs and counts, what is measured, and what is recommended."""

import doctest
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import layerskip
from layerskip import LLM
from layerskip.decode.acceptance import Acceptance
from layerskip.errors import RequestError
from layerskip.evaluate import acceptance, cost, drafts
from layerskip.evaluate.acceptance import continuations, share
from layerskip.evaluate.bench import Ours
from layerskip.evaluate.contest import Settings
from layerskip.evaluate.cost import Costs, Kind, Timed, fit, measure_costs, non_negative
from layerskip.evaluate.drafts import Draft, Grid, Prediction, Setting, choose, draft, predict, side_by_side
from layerskip.evaluate.record import Spread
from layerskip.evaluate.tune import Tuning
from layerskip.evaluate.verdict import Checked, as_recommended, fastest, quality, reason
from layerskip.llm import Recommended

COSTS = Costs(
    layers=8, plain=0.010, once=0.001, node=0.0005, token=0.0007, layer=0.001, span=0.0012, row=0.0001, sure=0.0002
)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")


# --- costs


def test_a_round_is_the_formula_by_hand() -> None:
    # 4 passes of 2 layers, 3 of them to the head; 6 layers over 4 positions; 4 nodes; once
    by_hand = 4 * 2 * 0.001 + 3 * 0.0007 + 6 * (0.0012 + 4 * 0.0001) + 4 * 0.0005 + 0.001
    assert COSTS.round(Kind(2, 3)) == pytest.approx(by_hand)
    assert COSTS.round(Kind(2, 3, confident=True)) == pytest.approx(by_hand + 3 * 0.0002)
    assert COSTS.round(Kind(2, 0)) == COSTS.plain


def test_a_fit_recovers_the_costs_that_made_the_rounds() -> None:
    kinds = [Kind(e, k) for e in (1, 3, 7) for k in (1, 3, 12)] + [Kind(3, 12, confident=True)]
    timed = [Timed(kind, COSTS.round(kind) / COSTS.plain, rounds=i + 1) for i, kind in enumerate(kinds)]
    found = fit(timed, plain=COSTS.plain, layers=8)
    for exit in range(1, 8):  # the parts can trade places; rounds cannot
        for tokens in range(13):
            for confident in (False, True):
                kind = Kind(exit, tokens, confident)
                assert found.round(kind) == pytest.approx(COSTS.round(kind))
    assert min(found.record().values()) >= 0


def test_a_fit_with_noise_keeps_within_it() -> None:
    noise = np.random.default_rng(3)
    kinds = [Kind(e, k) for e in (1, 3, 7) for k in (1, 3, 12)]
    timed = [Timed(kind, COSTS.round(kind) / COSTS.plain * noise.uniform(0.95, 1.05), 20) for kind in kinds]
    found = fit(timed, plain=COSTS.plain, layers=8)
    assert min(found.record().values()) >= 0
    for exit in range(1, 8):
        for tokens in range(1, 13):
            assert found.round(Kind(exit, tokens)) == pytest.approx(COSTS.round(Kind(exit, tokens)), rel=0.08)


def test_non_negative_least_squares_is_scipys() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    draws = np.random.default_rng(0)
    for _ in range(20):
        rows, target = draws.normal(size=(9, 5)), draws.normal(size=9)
        assert non_negative(rows, target) == pytest.approx(optimize.nnls(rows, target)[0], abs=1e-9)


def test_costs_of_a_model_are_taken_from_its_rounds(llm: LLM) -> None:
    prompts = llm.encode_all(["the cat sat", "the dog"])
    ran: list[str] = []
    found = measure_costs(
        llm,
        prompts,
        exits=[1, 2, 3],
        draft_tokens=[1, 4],
        confident=True,
        settings=Settings(2, 12),
        rounds=3,
        see=ran.append,
    )
    assert found.layers == 4
    assert found.plain > 0
    assert all(found.round(Kind(exit, tokens)) > 0 for exit in (1, 2, 3) for tokens in (1, 2, 3, 4))
    kinds = {f"early-exit:{e} K={k}" for e in (1, 2, 3) for k in (1, 4)} | {"plain", "early-exit:2 K=4 P=0"}
    groups = [ran[i : i + len(kinds)] for i in range(0, len(ran), len(kinds))]
    assert len(groups) > 1
    assert all(set(group) == kinds for group in groups)  # in turns,
    assert len({tuple(group) for group in groups}) > 1  # in changing orders


# --- predictions


def test_a_prediction_is_seconds_over_seconds_by_hand() -> None:
    found = Draft(Setting(2, 3), 2.5, {3: 10, 1: 2, 0: 1})
    drafted = 10 * COSTS.round(Kind(2, 3)) + 2 * COSTS.round(Kind(2, 1)) + COSTS.plain
    assert predict(found, COSTS, plain=30) == pytest.approx(30 * 0.010 / drafted)
    sure = replace(found, setting=Setting(2, 3, 0.5))
    drafted += (10 * 3 + 2) * COSTS.sure
    assert predict(sure, COSTS, plain=30) == pytest.approx(30 * 0.010 / drafted)


def test_rounds_of_rows_side_by_side_are_those_of_decoding(llm: LLM) -> None:
    prompts = ["the cat sat", "the dog", "a", "the mat and the cat"]
    texts = continuations(llm, prompts, exits=[1, 3], max_tokens=17)
    for setting in (Setting(1, 3), Setting(3, 5)):
        for rows in (1, 2, 3):
            ticks = Ours(llm, setting.way()).run(llm.encode_all(prompts), Settings(rows, 17)).ticks
            assert draft(texts, setting, batch=rows).widths == Counter(tick.drafted for tick in ticks)
    assert side_by_side([[0] * 3, [0] * 5, [0] * 2], batch=2) == {0: 5}


def test_the_best_and_some_others_are_measured() -> None:
    all_of_them = [
        Prediction(
            setting, 2.0, 3.0 - setting.exit / 2 - abs(setting.draft_tokens - 4) / 20 - (setting.confidence or 0)
        )
        for setting in Grid([1, 2, 3], range(1, 9), [0.1, 0.2]).settings()
    ]
    chosen = choose(all_of_them, 5)
    assert len({each.setting for each in chosen}) == 5
    # the best and what is as good within a few percent, then the best with a threshold
    assert [each.setting for each in chosen[:3]] == [Setting(1, 4), Setting(1, 3), Setting(1, 4, 0.1)]
    # the best of each exit, with and without a threshold, before another one of any
    best = [each.setting for each in choose(all_of_them, 10)[:6]]
    assert best == [Setting(1, 4), Setting(1, 3), Setting(1, 5), Setting(1, 2), Setting(1, 4, 0.1), Setting(2, 4)]
    ranked = sorted(all_of_them, key=lambda each: -each.speedup)
    places = [ranked.index(each) / len(ranked) for each in chosen[3:]]
    assert places == pytest.approx([1 / 3, 2 / 3], abs=0.1)
    assert len(choose(all_of_them[:3], 5)) == 3
    assert choose(all_of_them, 1) == [max(all_of_them, key=lambda each: each.speedup)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid([1, 4], [2]), "draft exit 4 is not below the 4 layers the model decodes with; use 1..3"),
        (Grid([1], [0]), "drafting 0 tokens a round is not possible"),
        (Grid([1], [2], [1.5]), "confidence 1.5 is not allowed; use more than 0 and at most 1"),
        (Grid([], [2]), "nothing to tune; give at least one exit and one number of draft tokens"),
        (Grid([1], [1, 8]), "texts of 8 tokens never draft 8; use at most 7 draft tokens, or more --max-tokens"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused(llm: LLM, grid: Grid, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("..", r"\.\.")):
        Tuning(llm, [[5], [6]], grid, settings=Settings(1, 8), repeat=1, measure=1)


# --- the verdict


def at(setting: Setting, *speedups: float, predicted: float = 1.2) -> Checked:
    return Checked(Prediction(setting, 2.0, predicted), Spread.of(speedups), 2.0, True)


def test_the_fastest_that_is_really_faster_is_recommended(llm: LLM) -> None:
    slow, doubtful = at(Setting(1, 2), 0.8, 0.9, 0.85), at(Setting(1, 3), 0.99, 1.02, 1.3)
    sure, fast = at(Setting(2, 2, 0.5), 1.001, 1.01, 1.02), at(Setting(2, 4), 0.9, 1.25, 1.3)
    assert fastest([slow, doubtful]) is None
    assert fastest([slow, doubtful, sure]) is sure
    assert fastest([slow, sure, fast, doubtful]) is fast
    shape = llm.decoder.shape
    assert reason([slow, fast], {1: 0.5, 2: 0.7}, COSTS, shape) == (
        "early-exit:2 K=4 is the fastest measured: 1.25x (0.90..1.30) of plain decoding's speed"
    )
    why = reason([slow, at(Setting(2, 1), 0.95, 0.96, 0.97)], {1: 0.3, 2: 0.41}, COSTS, shape)
    clock = COSTS.round(Kind(2, 1)) / COSTS.plain - 1
    assert why == (
        "plain is faster here: early-exit:2 K=1, the fastest measured, reaches 0.96x (0.95..0.97) of its speed; "
        f"alpha at exit 2 is 0.41, and to gain with one drafted token it has to exceed {clock:.2f} by the clock, "
        f"{share(shape, exit=2):.2f} by the weights (E/L = 2/4 of the layers plus the head's share)"
    )


def test_with_one_token_a_draft_pays_from_the_share_on(llm: LLM) -> None:
    """What `reason` says of alpha is what `predict` of counts means."""
    shape = llm.decoder.shape
    alpha = share(shape, exit=1)
    for shift in (-0.01, 0.0, 0.01):
        counts = Acceptance(rounds=1000, drafted=1000, accepted=0, emitted=round(1000 * (1 + alpha + shift)))
        assert acceptance.predict(counts, shape, exit=1) == pytest.approx((1 + alpha + shift) / (1 + alpha), abs=1e-3)


def test_what_a_record_tells_its_checkpoint() -> None:
    record: dict[str, Any] = {
        "exits": [{"exit": 2, "agreement": 0.8, "rate_by_position": [0.8, 0.6], "loss": None}],
        "recommended": {"exit": 2, "draft_tokens": 5, "confidence": 0.5, "speedup": 1.5},
    }
    assert as_recommended(record) == Recommended(2, 5, 0.5)
    assert as_recommended({**record, "recommended": None}) is None
    assert quality(record) == {"own_agreement/2": 0.8, "own_rate_by_position/2": [0.8, 0.6]}


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(cost) == doctest.TestResults(failed=0, attempted=2)
    assert doctest.testmod(drafts) == doctest.TestResults(failed=0, attempted=1)
