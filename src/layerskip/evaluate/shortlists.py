"""Which draft head makes the best setting faster still, one of fewer tokens or bits: what is tried, and what it comes
to.

Knows sizes and figures. Does not know clocks: what is tried is measured elsewhere, beside the setting without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.decode.drafters import EarlyExit
from layerskip.decode.drafters.shortlist import fitting
from layerskip.evaluate.cell import Cell
from layerskip.evaluate.drafts import Setting
from layerskip.evaluate.record import Spread
from layerskip.evaluate.verdict import REAL, Checked
from layerskip.evaluate.ways import Way
from layerskip.model.shape import Shape

LEAST = 256
"""The smallest size that is tried unasked."""

HEAVY = 0.2
"""Share of a draft step from which on another head is worth trying: below it nothing gains a quarter."""


@dataclass(frozen=True)
class Narrow:
    """A setting that proposes only some tokens, or all of them through a head of 8 bits.

    Args:
        setting: which.
        vocabulary: N; None is the head of 8 bits.
    """

    setting: Setting
    vocabulary: int | None

    @property
    def name(self) -> str:
        """What reports call it: "early-exit:2 K=6 N=2048", "early-exit:2 K=6 int8 head"."""
        return f"{self.setting.name} {'int8 head' if self.vocabulary is None else f'N={self.vocabulary}'}"

    @property
    def head(self) -> dict[str, Any]:
        """What records say of it: {"vocabulary": 2048}, or {"head": "int8"}."""
        return {"head": "int8"} if self.vocabulary is None else {"vocabulary": self.vocabulary}

    def way(self, ranked: Sequence[int]) -> Way:
        """The same to be run, with tokens by frequency."""
        each = self.setting
        through = self.head if self.vocabulary is None else {**self.head, "ranked": ranked}
        drafter = EarlyExit(each.exit, tokens=each.draft_tokens, confidence=each.confidence, **through)
        return Way(self.name, drafter)


def heavy(shape: Shape, *, exit: int) -> bool:
    """Whether the head is a large part of what a drafted token of exit E reads."""
    layers = (shape.parameters()["attention"] + shape.parameters()["mlp"]) * exit / shape.layers
    head = shape.vocab * shape.width
    return head >= HEAVY * (layers + head)


def sizes(shape: Shape, *, exit: int) -> list[int]:
    """What is tried unasked: up to three powers of two that fit into 1.5% of the weights and leave out most of the
    vocabulary; none where the head is a small part of what a drafted token reads.

    Args:
        shape: of the model.
        exit: E.
    """
    most = min(fitting(shape), shape.vocab // 4)
    if not heavy(shape, exit=exit):
        return []
    return [size for size in (2**power for power in range(most.bit_length())) if size >= LEAST and size > most / 8]


def candidates(setting: Setting, sizes: Sequence[int | None], *, draft_tokens: Sequence[int]) -> list[Narrow]:
    """Each size, None for the head of 8 bits, with the setting, and with half as many drafted tokens again: cheaper
    drafts may be longer.

    Example:
        >>> [each.name for each in candidates(Setting(2, 4), [512], draft_tokens=[1, 2, 4, 5, 6, 8])]
        ['early-exit:2 K=4 N=512', 'early-exit:2 K=6 N=512']
    """
    longer = sorted(count for count in draft_tokens if count >= 1.5 * setting.draft_tokens)[:1]
    lengths = [setting.draft_tokens, *longer]
    return [
        Narrow(Setting(setting.exit, count, setting.confidence), size)
        for size in sizes
        for count in dict.fromkeys(lengths)
    ]


@dataclass(frozen=True)
class Gained:
    """A draft vocabulary, or a head of 8 bits, that was measured.

    Args:
        narrow: which.
        speedup: of decoding, over plain decoding in the same repeat.
        gain: over the best setting without it, likewise.
        tokens_per_round: as decoded.
        identical: whether the texts were those of plain decoding.
    """

    narrow: Narrow
    speedup: Spread
    gain: Spread
    tokens_per_round: float
    identical: bool

    @property
    def real(self) -> bool:
        """Whether it is faster than without beyond doubt."""
        return self.gain.low > 1 or self.gain.median > REAL

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            **asdict(self.narrow.setting),
            **self.narrow.head,
            "speedup": self.speedup.record(),
            "gain": self.gain.record(),
            "tokens_per_round": self.tokens_per_round,
            "identical": self.identical,
        }


def gained(narrow: Narrow, cells: Mapping[str, Cell], *, without: Setting) -> Gained:
    """What it gains over `without`, from the cells that measured both."""
    mine, other = cells[narrow.name], cells[without.name]
    assert mine.speedup is not None
    assert mine.acceptance is not None
    assert other.speedup is not None
    speedup, before = mine.speedup["decode"], other.speedup["decode"]
    assert speedup is not None
    assert before is not None
    ratios = [a / b for a, b in zip(speedup.runs, before.runs, strict=True)]
    length = float(mine.acceptance["mean_acceptance_length"])
    return Gained(narrow, speedup, Spread.of(ratios), length, bool(mine.identical))


def best(measured: Sequence[Gained]) -> Gained | None:
    """The fastest of those that are really faster than without; None where none is."""
    return max((each for each in measured if each.real), key=lambda each: each.gain.median, default=None)


def remark(measured: Sequence[Gained]) -> str:
    """What a recommendation adds of draft heads, in numbers; nothing where none was tried."""
    if not measured:
        return ""
    found = best(measured)
    top = found or max(measured, key=lambda each: each.gain.median)
    spread = f"{top.gain.median:.2f}x ({top.gain.low:.2f}..{top.gain.high:.2f})"
    verdict = "is faster still" if found else "gains nothing sure"
    return f"; {top.narrow.name} {verdict}: {spread} of that"


def recommended(best: Checked | None, narrow: Gained | None) -> dict[str, Any] | None:
    """What a record recommends: the best setting, or one with a draft head that is faster still."""
    if best is None:
        return None
    if narrow is None:
        return {**asdict(best.prediction.setting), "speedup": best.speedup.median}
    return {**asdict(narrow.narrow.setting), **narrow.narrow.head, "speedup": narrow.speedup.median}
