"""Random numbers by counter: pure functions of what they are for, so that nothing depends on the order of calls.

The number used for a row depends on (seed, position, purpose) and nothing else, so neighbours, draft lengths and
timing do not change seeded text. Knows integers; knows no law. B rows, T positions.
"""

from __future__ import annotations

import secrets
from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a uniform number decides; numbers of different purposes are independent."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def uniform(seeds: Tensor, positions: Tensor, purpose: Purpose, *, offset: Tensor | int = 0) -> Tensor:
    """Counter-based uniform numbers: a pure function of (seed, position, purpose, offset).

    Args:
        seeds: (B,) int64.
        positions: (B, T) int64, the positions of the tokens decided.
        purpose: what is decided.
        offset: position within the draft, so that a position drafted again in a later round gets fresh numbers; 0 for
            `Purpose.TOKEN`, whose numbers must not depend on the draft.

    Returns:
        (B, T) float32 in [0, 1), multiples of 2**-24.
    """
    counter = _mix(seeds[:, None] + _mix(positions * 4 + int(purpose)))
    bits = _mix(counter + torch.as_tensor(offset, device=seeds.device) * 0x632BE59BD9B4E019)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def new_seed() -> int:
    """A fresh seed from the operating system, below 2**63."""
    return secrets.randbits(63)


def sample_seed(seed: int, index: int) -> int:
    """The seed of the index-th sample of one request; index 0 keeps the request's own."""
    if index == 0:
        return seed & 0x7FFFFFFFFFFFFFFF
    mixed = _mix(torch.tensor([seed & 0x7FFFFFFFFFFFFFFF]) + _mix(torch.tensor([index])))
    return int(mixed) & 0x7FFFFFFFFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that scatters close inputs far apart (splitmix64's finaliser; Steele et al., 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
