"""Rates of layer dropout over depth and time, and which rows they drop: pure functions of (seed, step, layer, rank).

p(l, t) = S(t) D(l) p_max (LayerSkip, Elhoushi et al., ACL 2024, section 4.1.1). Randomness is counter-based: a draw
depends on its key and on nothing that ran before. Sizes: L layers, B rows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from layerskip.errors import RequestError, suggest

DEPTHS = ("exponential", "linear", "uniform", "step")
TIMES = ("constant", "exponential")


def depth_profile(kind: str, layers: int) -> tuple[float, ...]:
    """D(l), by which a layer's rate is multiplied; 1 at the last layer (also where it is the only one).

    "exponential" (the paper's): exp(l ln2 / (L-1)) - 1; "linear": l / (L-1); "uniform": 1; "step": 0 in the lower half
    of the layers, 1 in the upper.

    Raises:
        RequestError: unknown kind, or no layers.

    Example:
        >>> [round(scale, 3) for scale in depth_profile("exponential", 4)]
        [0.0, 0.26, 0.587, 1.0]
        >>> depth_profile("step", 5)
        (0.0, 0.0, 0.0, 1.0, 1.0)
    """
    _check_kind("depth", kind, DEPTHS)
    if layers < 1:
        raise RequestError(f"{layers} layers are not possible; use 1 or more")
    if layers == 1 or kind == "uniform":
        return (1.0,) * layers
    if kind == "step":
        return tuple(float(2 * layer >= layers) for layer in range(layers))
    part = [layer / (layers - 1) for layer in range(layers)]
    return tuple(part) if kind == "linear" else tuple(_doubling(x) for x in part)


def time_scale(kind: str, *, step: int, total_steps: int) -> float:
    """S(t), by which all rates are multiplied at a step.

    "constant": 1, for continual pretraining and finetuning; "exponential", from scratch: exp(t ln2 / (T-1)) - 1, from 0
    at the first step to 1 at the last (also where it is the only one).

    Args:
        kind: one of `TIMES`.
        step: t, optimizer steps done, 0..T-1.
        total_steps: T.

    Raises:
        RequestError: unknown kind, or a step outside 0..T-1.

    Example:
        >>> [round(time_scale("exponential", step=t, total_steps=3), 3) for t in range(3)]
        [0.0, 0.414, 1.0]
    """
    _check_kind("time", kind, TIMES)
    if not 0 <= step < total_steps:
        raise RequestError(f"step {step} is not inside a run of {total_steps} steps; use 0..{total_steps - 1}")
    return 1.0 if kind == "constant" or total_steps == 1 else _doubling(step / (total_steps - 1))


def rates(
    layers: int,
    *,
    p_max: float,
    depth: str = "exponential",
    time: str = "constant",
    step: int = 0,
    total_steps: int = 1,
) -> tuple[float, ...]:
    """p(l, t) = S(t) D(l) p_max of every layer: the chance that a row leaves it.

    Args:
        layers: L.
        p_max: the last layer's rate where S is 1, in [0, 1).
        depth: D, one of `DEPTHS`.
        time: S, one of `TIMES`.
        step: optimizer steps done.
        total_steps: T.

    Raises:
        RequestError: p_max outside [0, 1), an unknown kind, or a step outside the run.

    Example:
        >>> [round(rate, 3) for rate in rates(4, p_max=0.2)]
        [0.0, 0.052, 0.117, 0.2]
    """
    if not 0 <= p_max < 1:
        raise RequestError(f"p_max {p_max} is not possible; use 0 (no dropout) or more, below 1")
    scale = time_scale(time, step=step, total_steps=total_steps)
    return tuple(scale * part * p_max for part in depth_profile(depth, layers))


def dropped_rows(rate: float, rows: int, *, seed: int, step: int, micro_step: int, layer: int, rank: int) -> list[int]:
    """The rows that leave a layer, in order.

    How many is Binomial(rows, rate), drawn from (seed, step, micro_step, layer) alone, so that every data-parallel rank
    with as many rows drops the same number; which ones is drawn from the rank too.

    Args:
        rate: chance of each row, in [0, 1).
        rows: B.
        seed: of the run, 0 or more.
        step: optimizer steps done.
        micro_step: accumulated batches done inside the step.
        layer: index from 0.
        rank: data-parallel rank.
    """
    counter = (0, layer, micro_step, step)
    number = int((_uniform(rows, key=(seed, 0), counter=counter) < rate).sum())
    order = np.argsort(_uniform(rows, key=(seed, 1 + rank), counter=counter), kind="stable")
    return sorted(order[:number].tolist())


def _doubling(part: float) -> float:
    """From 0 at 0 to 1 at 1: exp(part ln2) - 1."""
    return math.expm1(part * math.log(2)) if part < 1 else 1.0


def _check_kind(word: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise RequestError(f"unknown {word} profile {given!r}; use {', '.join(allowed)}{suggest(given, allowed)}")


def _uniform(count: int, *, key: tuple[int, int], counter: tuple[int, int, int, int]) -> NDArray[np.float64]:
    """Numbers in [0, 1) from Philox at a place of its counter; the raw words, which numpy promises never to change."""
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
    raw: NDArray[np.uint64] = np.asarray(bits.random_raw(count), dtype=np.uint64)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
