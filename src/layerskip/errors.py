"""What a caller can catch.

    LayerSkipError(Exception)
    ├── CheckpointError   also a ValueError        a checkpoint folder that cannot be loaded
    ├── RequestError      also a ValueError        an argument that cannot be served
    ├── CapacityError     also a MemoryError       the cache does not fit in memory
    ├── NumericalError    also an ArithmeticError  the logits are NaN
    └── StorageError      also an OSError          a folder that cannot be written

A message says what was given, what is allowed and what to do:
``exit 40 is not inside this 32-layer model; use 1..32``. Longer hints go through ``add_note``.

This file imports nothing of ours and nothing heavy, so every other module may use it.
"""

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real


class LayerSkipError(Exception):
    """Every error this package raises on purpose.

    `completions` holds what `LLM.generate` had generated when one of its rows failed; elsewhere it is empty.
    """

    completions: Sequence[object] = ()


class CheckpointError(LayerSkipError, ValueError):
    """A checkpoint folder that cannot be loaded: a file, tensor or setting is missing or not supported."""


class RequestError(LayerSkipError, ValueError):
    """An argument that cannot be served: unknown, out of range, or at odds with another one."""


class CapacityError(LayerSkipError, MemoryError):
    """The cache that was asked for does not fit in memory."""


class NumericalError(LayerSkipError, ArithmeticError):
    """The logits are NaN, so there is no distribution to draw from."""


class StorageError(LayerSkipError, OSError):
    """A file or folder that could not be written: the disk is full, say. What was there before is still there."""


def check_whole(name: str, value: object) -> None:
    """Raises RequestError unless a value is a whole number; a float or a text would fail later, somewhere else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} {value!r} is not possible; use a whole number")


def check_number(name: str, value: object) -> None:
    """Raises RequestError unless a value is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} {value!r} is not possible; use a number")


def check_exit(exit: int, *, layers: int) -> None:
    """Raises RequestError unless a model of so many layers has this exit."""
    check_whole("exit", exit)
    if not 1 <= exit <= layers:
        raise RequestError(f"exit {exit} is not inside this {layers}-layer model; use 1..{layers}")


def check_ids(ids: Iterable[int], *, vocab: int, name: str = "token") -> None:
    """Raises RequestError unless all are tokens of a vocabulary of that size."""
    for token in ids:
        if type(token) is not int:  # texts are long, and nearly all are
            check_whole(name, token)
        if not 0 <= token < vocab:
            raise RequestError(f"{name} {token} is outside the vocabulary; use 0..{vocab - 1}")


def suggest(word: object, allowed: Iterable[str]) -> str:
    """The tail of an error message: the allowed word nearest to a misspelt one.

    Args:
        word: what was given; also what is no word.
        allowed: what could have been given.

    Returns:
        ``"; did you mean 'x'?"``, or ``""`` when nothing is near.

    Example:
        >>> suggest("temperatur", ["temperature", "top_k"])
        "; did you mean 'temperature'?"
        >>> suggest("seed", ["temperature", "top_k"])
        ''
    """
    near = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
