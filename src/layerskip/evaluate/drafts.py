"""Settings of early-exit drafting, what each makes of a model's own texts, and how fast each should be.

Knows counted rounds and the costs of a round. Does not know clocks: what is worth measuring is chosen here, and
measured elsewhere.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.decode.drafters import EarlyExit
from layerskip.errors import RequestError
from layerskip.evaluate.acceptance import Continuation, count, rounds
from layerskip.evaluate.cost import Costs, Kind
from layerskip.evaluate.ways import Way
from layerskip.llm import LLM


@dataclass(frozen=True)
class Setting:
    """A way to draft.

    Args:
        exit: E.
        draft_tokens: K.
        confidence: the threshold; None is none.
    """

    exit: int
    draft_tokens: int
    confidence: float | None = None

    @property
    def name(self) -> str:
        """What reports call it: "early-exit:2 K=6 P=0.5"."""
        return f"early-exit:{self.exit} K={self.draft_tokens}" + (
            "" if self.confidence is None else f" P={self.confidence:g}"
        )

    def way(self) -> Way:
        """The same to be run."""
        return Way(self.name, EarlyExit(self.exit, tokens=self.draft_tokens, confidence=self.confidence))


@dataclass(frozen=True)
class Grid:
    """What is tried: every exit with every number of tokens, without a threshold and with each.

    Args:
        exits: E.
        draft_tokens: K.
        confidences: thresholds.
    """

    exits: Sequence[int]
    draft_tokens: Sequence[int]
    confidences: Sequence[float] = ()

    def settings(self) -> list[Setting]:
        """All of them."""
        return [
            Setting(exit, tokens, confidence)
            for exit in self.exits
            for tokens in self.draft_tokens
            for confidence in (None, *self.confidences)
        ]

    def check(self, llm: LLM, *, max_tokens: int) -> None:
        """Raises RequestError where something of it cannot be tried."""
        if not self.exits or not self.draft_tokens:
            raise RequestError("nothing to tune; give at least one exit and one number of draft tokens")
        for setting in self.settings():
            drafter = EarlyExit(setting.exit, tokens=setting.draft_tokens, confidence=setting.confidence)
            drafter.check(llm.decoder, exit=llm.decoder.shape.layers)
        if max(self.draft_tokens) >= max_tokens:
            raise RequestError(
                f"texts of {max_tokens} tokens never draft {max(self.draft_tokens)}; use at most {max_tokens - 1} "
                f"draft tokens, or more --max-tokens"
            )


@dataclass(frozen=True)
class Draft:
    """What a setting makes of the model's own texts.

    Args:
        setting: which.
        tokens_per_round: 1 + accepted / rounds.
        widths: how many rounds of all rows side by side draft so many tokens.
    """

    setting: Setting
    tokens_per_round: float
    widths: Mapping[int, int]


def draft(texts: Sequence[Continuation], setting: Setting, *, batch: int) -> Draft:
    """Counts, without decoding."""
    exit, tokens, confidence = setting.exit, setting.draft_tokens, setting.confidence
    counts = count(texts, exit=exit, tokens=tokens, confidence=confidence)
    rows = [
        [drafted for drafted, _, _ in rounds(text.guesses[exit], most=text.most, tokens=tokens, confidence=confidence)]
        for text in texts
    ]
    return Draft(setting, counts.length, side_by_side(rows, batch=batch))


def side_by_side(rows: Sequence[Sequence[int]], *, batch: int) -> dict[int, int]:
    """How many rounds draft so many tokens, where `batch` rows share a round and one that ends makes room for the next.

    Args:
        rows: for every text, the tokens drafted in each of its rounds.
        batch: rows.

    Returns:
        By the most that a row drafts.

    Example:
        >>> side_by_side([[4, 4, 1], [2], [3, 0]], batch=2)
        {4: 2, 1: 1}
    """
    waiting = deque(map(deque, rows))
    active: list[deque[int]] = []
    widths: Counter[int] = Counter()
    while waiting or active:
        while waiting and len(active) < batch:
            active.append(waiting.popleft())
        widths[max(row.popleft() for row in active)] += 1
        active = [row for row in active if row]
    return dict(widths)


def predict(found: Draft, costs: Costs, *, plain: int) -> float:
    """The speedup over plain decoding: its rounds' seconds over those of the drafted rounds, for the same tokens.

    The cost model of a round is in `cost`; the tokens per round are counted, not derived from a mean acceptance.

    Args:
        found: what is drafted.
        costs: of this machine.
        plain: rounds that plain decoding needs for the same texts.
    """
    exit, confident = found.setting.exit, found.setting.confidence is not None
    drafted = sum(number * costs.round(Kind(exit, width, confident)) for width, number in found.widths.items())
    return plain * costs.plain / drafted


@dataclass(frozen=True)
class Prediction:
    """A setting and its predicted speedup."""

    setting: Setting
    tokens_per_round: float
    speedup: float

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self.setting), "tokens_per_round": self.tokens_per_round, "speedup": self.speedup}


_CLOSE = 0.95  # a prediction this near to the best may be the fastest: models of cost err by as much


def choose(predictions: Sequence[Prediction], number: int) -> list[Prediction]:
    """What to measure: three in five are the best, the rest is spread over all that is left, so that predictions are
    checked everywhere. Of the best, three in five may be settings that are predicted as fast as the best or nearly so;
    then each exit comes at most once with and once without a threshold, as long as there are others."""
    ranked = sorted(predictions, key=lambda each: -each.speedup)
    count = _three_in_five(number)
    close = [each for each in ranked if each.speedup >= _CLOSE * ranked[0].speedup][: _three_in_five(count)]
    heads: dict[tuple[int, bool], Prediction] = {}
    for each in ranked:
        heads.setdefault((each.setting.exit, each.setting.confidence is None), each)
    best = list(dict.fromkeys([*close, *heads.values(), *ranked]))[:count]
    left = [each for each in ranked if each not in best]
    spread = min(number - len(best), len(left))
    return best + [left[(i + 1) * len(left) // (spread + 1)] for i in range(spread)]


def _three_in_five(number: int) -> int:
    return -(-3 * number // 5)
