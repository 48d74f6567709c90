"""Which exits learn at a step, and how much each of them counts.

Pure functions of the step: nothing to save, nothing to restore. Exits are numbered as everywhere, 1..L; the paper's
layer index l is exit - 1 (LayerSkip, Elhoushi et al., ACL 2024, sections 4.1.2 and A.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.errors import RequestError, check_exit, suggest

CURRICULA = ("last", "all", "rotational", "gradual")


def exits_at(curriculum: str, *, layers: int, step: int, total_steps: int, period: int = 1) -> tuple[int, ...]:
    """The exits that learn at a step, in order; the last layer is always among them.

    Args:
        curriculum: "last" (plain training), "all", "rotational" (every `period`-th layer, moving on by one each step,
            so that each layer is enabled once in `period` steps) or "gradual" (from the last layer down, one more
            every total_steps / (2 L) steps).
        layers: L.
        step: optimizer steps done, from 0.
        total_steps: T.
        period: R of the rotational curriculum.

    Raises:
        RequestError: unknown curriculum, or a period outside 1..L.

    Example:
        >>> [exits_at("rotational", layers=8, step=t, total_steps=100, period=4) for t in range(4)]
        [(1, 5, 8), (2, 6, 8), (3, 7, 8), (4, 8)]
        >>> [exits_at("gradual", layers=4, step=t, total_steps=16) for t in (0, 2, 5, 6, 8)]
        [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]
    """
    check_curriculum(curriculum, layers=layers, period=period)
    if curriculum == "last":
        return (layers,)
    if curriculum == "all":
        return tuple(range(1, layers + 1))
    if curriculum == "rotational":
        chosen = set(range(step % period, layers, period))
    else:
        # layer l joins once (L - 1 - l) T / 2L steps are done; in integers, so that no rounding moves a boundary
        chosen = {layer for layer in range(layers) if 2 * layers * step >= (layers - 1 - layer) * total_steps}
    return tuple(layer + 1 for layer in sorted(chosen | {layers - 1}))


def check_curriculum(curriculum: str, *, layers: int, period: int) -> None:
    """Raises RequestError for an unknown curriculum, or a rotational period outside 1..L."""
    if curriculum not in CURRICULA:
        raise RequestError(
            f"unknown curriculum {curriculum!r}; use {', '.join(CURRICULA)}{suggest(curriculum, CURRICULA)}"
        )
    if curriculum == "rotational" and not 1 <= period <= layers:
        raise RequestError(f"rotational period {period} does not fit {layers} layers; use 1..{layers}")


def exit_weights(exits: Sequence[int], *, layers: int, scale: float) -> tuple[float, ...]:
    """What each enabled exit's loss is multiplied by; they sum to 1.

    With l = exit - 1: e(l) = scale * sum_{i=0..l} i below the last layer, e(L-1) = (L-1) + scale * sum_{i=0..L-2} i;
    the weight is e(l) over the sum of e of the enabled layers (equation 5 and below). As printed, e(0) = 0: exit 1
    never counts.

    Args:
        exits: enabled exits, 1..L.
        layers: L.
        scale: e_scale, at least 0.

    Raises:
        RequestError: an exit outside 1..L, a negative scale, or weights that are all zero.

    Example:
        >>> [round(w, 3) for w in exit_weights([1, 5, 8], layers=8, scale=1.0)]
        [0.0, 0.263, 0.737]
        >>> [round(w, 3) for w in exit_weights([1, 5, 8], layers=8, scale=0.2)]
        [0.0, 0.152, 0.848]
    """
    if scale < 0:
        raise RequestError(f"e_scale {scale} is not possible; use 0 or more")
    raw = []
    for exit in exits:
        check_exit(exit, layers=layers)
        below = (exit - 1) * exit // 2  # sum of 0 .. exit-1
        raw.append(scale * below if exit < layers else (layers - 1) + scale * (layers - 2) * (layers - 1) / 2)
    total = sum(raw)
    if len(exits) == 1 and exits[0] == layers:
        return (1.0,)
    if total == 0:
        raise RequestError(f"exits {list(exits)} all weigh nothing at e_scale {scale}; enable more, or raise e_scale")
    return tuple(weight / total for weight in raw)
