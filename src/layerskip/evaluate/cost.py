"""What a round of decoding takes on this machine, by exit and drafted tokens.

Knows rounds and their seconds, taken from real decoding in turns: a part that is timed alone runs from warm caches and
comes out too fast. Does not know acceptance.

The model of a round that drafts k tokens with the first E of L layers, with one row for each text side by side:

    seconds = once + (k + 1) node + k token + (k + 1) E layer + (L - E) (span + (k + 1) row)    [+ k sure]

Its parts are those of self-speculation: k + 1 passes of one position through the first layers (`layer` each), of which
k end in the head (`token`: head, law, choice; with a threshold also `sure`), then the other layers over k + 1 positions
at once (`span + (k + 1) row` each), the head over all of them (in `node`), and what a round costs whatever it does
(`once`). A round that drafts nothing is measured by itself: one position is another kernel than several.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from layerskip.decode.drafters import EarlyExit
from layerskip.errors import RequestError
from layerskip.evaluate.bench import Ours
from layerskip.evaluate.contest import PLAIN, Settings
from layerskip.evaluate.ways import Way
from layerskip.llm import LLM

NEVER = sys.float_info.min
"""A confidence that is read at every token and never ends a draft."""

GROUPS = 6
"""Prompts, or batches of them, that costs are taken from at least."""

PARTS = ("once", "node", "token", "layer", "span", "row", "sure")


@dataclass(frozen=True)
class Kind:
    """Rounds that cost the same.

    Args:
        exit: E; 0 where nothing drafts.
        tokens: k, drafted in each of them.
        confident: whether the exit's confidence is read.
    """

    exit: int
    tokens: int
    confident: bool = False

    def terms(self, layers: int) -> tuple[int, ...]:
        """How often such a round pays for each of `PARTS`, in a model of so many layers."""
        above, nodes = layers - self.exit, self.tokens + 1
        return 1, nodes, self.tokens, nodes * self.exit, above, above * nodes, self.tokens * self.confident


STEP = Kind(0, 0)
"""A round of plain decoding."""


@dataclass(frozen=True)
class Timed:
    """Rounds of a kind.

    Args:
        kind: which.
        steps: what one takes, in steps of plain decoding.
        rounds: how many there were.
    """

    kind: Kind
    steps: float
    rounds: int = 1


@dataclass(frozen=True)
class Costs:
    """Seconds, as in the formula above.

    Args:
        layers: L.
        plain: a round that drafts nothing.
        once: whatever a round does.
        node: each of the k + 1 positions that are verified.
        token: choosing a drafted token.
        layer: a layer at one position of each row.
        span: a layer of the verification, whatever it verifies.
        row: the same, each position.
        sure: reading how sure the exit is of a token.
    """

    layers: int
    plain: float
    once: float
    node: float
    token: float
    layer: float
    span: float
    row: float
    sure: float

    def round(self, kind: Kind) -> float:
        """Seconds of such a round."""
        if kind.tokens == 0:
            return self.plain
        terms = kind.terms(self.layers)
        return sum(count * float(getattr(self, part)) for part, count in zip(PARTS, terms, strict=True))

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def fit(timed: Sequence[Timed], *, plain: float, layers: int) -> Costs:
    """The costs that explain rounds best: least squares of relative errors, each kind weighted by its rounds, no cost
    below 0.

    Args:
        timed: rounds of several exits and numbers of tokens, at least one.
        plain: seconds of a step of plain decoding.
        layers: L.
    """
    terms = np.array([each.kind.terms(layers) for each in timed], dtype=float)
    seconds = plain * np.array([each.steps for each in timed])
    weight = np.sqrt([each.rounds for each in timed])
    found = non_negative(terms / seconds[:, None] * weight[:, None], weight)
    return Costs(layers, plain, **dict(zip(PARTS, map(float, found), strict=True)))


def non_negative(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x of least |rows x - target| with no element below 0.

    It is the plain least squares of the columns where it is above 0, so with a handful of columns every choice of them
    can be tried.

    Example:
        >>> non_negative(np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])).round(6).tolist()
        [2.0, 0.0]
    """
    width = rows.shape[1]
    best, least = np.zeros(width), float(target @ target)
    for size in range(1, width + 1):
        for chosen in combinations(range(width), size):
            columns = list(chosen)
            part = np.linalg.lstsq(rows[:, columns], target, rcond=None)[0]
            error = rows[:, columns] @ part - target
            if bool((part >= 0).all()) and float(error @ error) < least:
                best, least = np.zeros(width), float(error @ error)
                best[columns] = part
    return best


def measure_costs(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    *,
    exits: Sequence[int],
    draft_tokens: Sequence[int],
    confident: bool,
    settings: Settings,
    rounds: int = 24,
    see: Callable[[str], None] = lambda name: None,
) -> Costs:
    """Times rounds of real decoding: plainly, and drafted by the lowest, a middle and the deepest exit with the fewest,
    some and the most tokens; for every few prompts all of them, in an order drawn anew.

    A round counts by the plain steps of the same few prompts, and the median of that is taken: a machine that is slow
    for a while is slow for both.

    Args:
        llm: the model.
        prompts: ids; at least as many as rows decode side by side. Contexts are theirs.
        exits: E, that costs are wanted of.
        draft_tokens: K, likewise.
        confident: whether thresholds are wanted too.
        settings: rows side by side, and the length of a text.
        rounds: of each kind at least, where three passes over the prompts give as many.
        see: called with the name of what runs next.

    Raises:
        RequestError: the texts are so short that nothing is ever drafted side by side.
    """
    runners = {kind: Ours(llm, _way(kind)) for kind in (STEP, *_kinds(exits, draft_tokens, confident=confident))}
    steps: list[float] = []
    found: dict[Kind, list[float]] = defaultdict(list)
    order, counted = random.Random(0), dict.fromkeys(runners, 0)
    for number, group in enumerate(_groups(prompts, settings.batch)):
        seconds: dict[Kind, list[float]] = defaultdict(list)
        for kind in order.sample(list(runners), len(runners)):
            see(runners[kind].who.name)
            for tick in runners[kind].run(group, settings).ticks:
                # the first of everything is a warm-up; where rows have ended, a round is a smaller one
                if number and tick.cost and len(tick.gained) == settings.batch:
                    seconds[replace(kind, tokens=tick.drafted or 0)].append(sum(tick.cost))
                    counted[kind] += 1
        if STEP not in seconds:
            continue
        steps.append(statistics.fmean(seconds.pop(STEP)))
        for kind, each in seconds.items():
            found[kind] += [statistics.fmean(each) / steps[-1]] * len(each)
        if min(counted.values()) >= rounds and len(steps) >= GROUPS:
            break
    timed = [Timed(kind, statistics.median(each), len(each)) for kind, each in found.items() if kind.tokens]
    if not timed:
        raise RequestError("the texts are too short to time a round of them; use other prompts, or more --max-tokens")
    return fit(timed, plain=statistics.median(steps), layers=llm.decoder.shape.layers)


def _way(kind: Kind) -> Way:
    if kind == STEP:
        return Way(PLAIN, None)
    drafter = EarlyExit(kind.exit, tokens=kind.tokens, confidence=NEVER if kind.confident else None)
    return Way(f"early-exit:{kind.exit} K={kind.tokens}" + (" P=0" if kind.confident else ""), drafter)


def _kinds(exits: Sequence[int], draft_tokens: Sequence[int], *, confident: bool) -> list[Kind]:
    """What is timed."""
    depths, lengths = _ends_and_middle(exits), _ends_and_middle(draft_tokens)
    kinds = [Kind(exit, tokens) for exit in depths for tokens in lengths]
    return [*kinds, Kind(depths[len(depths) // 2], lengths[-1], confident=True)] if confident else kinds


def _ends_and_middle(values: Sequence[int]) -> list[int]:
    """The least, one near the geometric mean, and the most.

    Example:
        >>> _ends_and_middle(range(1, 13)), _ends_and_middle([2, 3]), _ends_and_middle([4])
        ([1, 3, 12], [2, 3], [4])
    """
    least, most = min(values), max(values)
    middle = min(values, key=lambda value: abs(value - (least * most) ** 0.5))
    return sorted({least, middle, most})


def _groups(prompts: Sequence[Sequence[int]], size: int) -> Iterable[list[Sequence[int]]]:
    """So many prompts at a time; the first ones twice, then three passes over all."""
    count = len(prompts)
    for start in [0, *(start % count for start in range(0, 3 * count, size))]:
        yield [prompts[(start + i) % count] for i in range(size)]
