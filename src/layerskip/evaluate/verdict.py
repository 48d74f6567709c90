"""What a tuning comes to: predictions beside what was measured, the draft that is recommended, and why.

Knows figures. Does not know how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.evaluate.acceptance import share
from layerskip.evaluate.cell import Cell
from layerskip.evaluate.cost import Costs, Kind
from layerskip.evaluate.drafts import Prediction
from layerskip.evaluate.record import Spread
from layerskip.llm import Recommended
from layerskip.model.shape import Shape

REAL = 1.03
"""A median speedup from here on counts though single runs fell below 1."""


@dataclass(frozen=True)
class Checked:
    """A prediction that was measured.

    Args:
        prediction: before.
        speedup: of decoding over plain decoding in the same repeat.
        tokens_per_round: as decoded.
        identical: whether the texts were those of plain decoding.
    """

    prediction: Prediction
    speedup: Spread
    tokens_per_round: float
    identical: bool

    @property
    def real(self) -> bool:
        """Whether it is faster than plain decoding beyond doubt."""
        return self.speedup.low > 1 or self.speedup.median > REAL

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            **asdict(self.prediction.setting),
            "predicted": self.prediction.speedup,
            "speedup": self.speedup.record(),
            "tokens_per_round": self.tokens_per_round,
            "identical": self.identical,
        }


def checked(prediction: Prediction, cell: Cell) -> Checked:
    """A prediction with the cell that measured it."""
    assert cell.speedup is not None
    assert cell.acceptance is not None
    speedup = cell.speedup["decode"]
    assert speedup is not None
    length = float(cell.acceptance["mean_acceptance_length"])
    return Checked(prediction, speedup, length, bool(cell.identical))


def fastest(measured: Sequence[Checked]) -> Checked | None:
    """The fastest of those that are really faster than plain decoding; None where none is."""
    return max((each for each in measured if each.real), key=lambda each: each.speedup.median, default=None)


def reason(measured: Sequence[Checked], agreement: Mapping[int, float], costs: Costs, shape: Shape) -> str:
    """Why a setting is recommended, or none is, in numbers.

    With K = 1 a draft pays where its acceptance exceeds what drafting costs in steps of plain decoding: E/L of the
    layers plus the head's share of the weights, and by the clock what a round of one drafted token costs beyond a step.
    """
    best = fastest(measured)
    top = max(measured, key=lambda each: each.speedup.median)
    spread = f"{top.speedup.median:.2f}x ({top.speedup.low:.2f}..{top.speedup.high:.2f})"
    if best is not None:
        spread = f"{best.speedup.median:.2f}x ({best.speedup.low:.2f}..{best.speedup.high:.2f})"
        return f"{best.prediction.setting.name} is the fastest measured: {spread} of plain decoding's speed"
    exit = top.prediction.setting.exit
    clock = costs.round(Kind(exit, 1)) / costs.plain - 1
    return (
        f"plain is faster here: {top.prediction.setting.name}, the fastest measured, reaches {spread} of its speed; "
        f"alpha at exit {exit} is {agreement[exit]:.2f}, and to gain with one drafted token it has to exceed "
        f"{clock:.2f} by the clock, {share(shape, exit=exit):.2f} by the weights (E/L = {exit}/{shape.layers} of the "
        f"layers plus the head's share)"
    )


def as_recommended(found: Mapping[str, Any], *, ranked: Sequence[int] = ()) -> Recommended | None:
    """What a finished record recommends to its checkpoint.

    Args:
        found: the record.
        ranked: tokens by frequency, that its draft vocabularies were made of.
    """
    best = found["recommended"]
    if best is None:
        return None
    size = best.get("vocabulary")
    return Recommended(
        best["exit"],
        best["draft_tokens"],
        best["confidence"],
        vocabulary=size,
        ranked=tuple(ranked[: size or 0]),
        head=best.get("head", "own"),
    )


def quality(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished record says of every exit, as `config.layerskip` holds it: agreement along the model's own greedy
    texts, and the acceptance rate by position."""
    exits = found["exits"]
    return {f"own_agreement/{each['exit']}": each["agreement"] for each in exits} | {
        f"own_rate_by_position/{each['exit']}": each["rate_by_position"] for each in exits
    }
