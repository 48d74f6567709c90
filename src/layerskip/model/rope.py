"""Rotary positions: the cosines and sines of any position, for each way of stretching the context.

Knows the formulas and how config.json spells them. Knows nothing of layers, caches or of where a position came from.

All arithmetic is float32, as in transformers: at large positions the rounding of the angle is part of what a
model was trained with. Sizes: n positions, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip.errors import suggest
from layerskip.model.config import Reader

ROPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: which frequencies, and how they are stretched past the pretraining context.

    Args:
        kind: one of `ROPES`.
        theta: base of the frequencies.
        original_context: positions of pretraining, from which the scaled kinds stretch.
        factor: how many times longer the stretched context is; 1.0 for the default kind.
        beta_fast: yarn; turns within the original context from which a frequency is left alone.
        beta_slow: yarn; turns within the original context up to which a frequency is fully interpolated.
        attention_factor: yarn; multiplies cos and sin. None derives it from factor, mscale and
            mscale_all_dim.
        mscale: yarn; weight of log(factor) in the numerator of the derived attention factor.
        mscale_all_dim: yarn; the same for the denominator. Both or neither count.
        truncate: yarn; whether the two boundaries are rounded outwards to whole dimensions.
        low_freq_factor: llama3; wavelengths above original_context / low_freq_factor are divided by factor.
        high_freq_factor: llama3; wavelengths below original_context / high_freq_factor are left alone.
    """

    kind: str
    theta: float
    original_context: int
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def stretched(self, context: int) -> int:
        """Positions after scaling, of a config that says `context`.

        Llama 3 writes the stretched number in its config, linear and dynamic scaling the original one; YaRN checkpoints
        are found with either.
        """
        if self.kind in ("linear", "dynamic"):
            return int(context * self.factor)
        return max(context, int(self.original_context * self.factor)) if self.kind == "yarn" else context


def read_rope(read: Reader, *, context: int, head_width: int) -> Rope:
    """Rotary positions from a config.json, in either spelling.

    As in transformers, a non-empty rope_scaling wins over rope_parameters, and a theta inside over one beside it.

    Args:
        read: the config.
        context: its max_position_embeddings.
        head_width: H.

    Raises:
        CheckpointError: a kind that is not supported, or a setting that is missing or wrong.
    """
    key = "rope_scaling" if read.get("rope_scaling", None) else "rope_parameters"
    scaling = Reader(_flat(read, key), read.source, f"{key}.")
    for place in (read, scaling):
        if place.get("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise place.wrong("partial_rotary_factor", place.get("partial_rotary_factor"), "1")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPES:
        hint = suggest(str(kind), ROPES)
        raise read.error(f"rope type {kind!r} is not supported; use {', '.join(ROPES)}{hint}")
    theta = (scaling if "rope_theta" in scaling.values else read).number("rope_theta", 10000.0)
    if kind == "default":
        return Rope(kind=kind, theta=theta, original_context=context)
    if kind == "linear":
        return Rope(kind=kind, theta=theta, original_context=context, factor=scaling.number("factor"))
    if kind == "dynamic":
        if head_width == 2:
            raise read.error("dynamic rope is not defined for head_dim 2")
        return Rope(kind=kind, theta=theta, original_context=context, factor=scaling.number("factor"))
    # A value beside rope_parameters wins over the one inside: transformers does so when it builds the
    # frequencies.
    place = read if "original_max_position_embeddings" in read.values else scaling
    original = place.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        return Rope(
            kind=kind,
            theta=theta,
            original_context=original,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    return Rope(
        kind=kind,
        theta=theta,
        original_context=original,
        # An explicit null means the ratio of the two contexts.
        factor=context / original if scaling.get("factor") is None else scaling.number("factor"),
        beta_fast=scaling.optional_number("beta_fast") or 32.0,
        beta_slow=scaling.optional_number("beta_slow") or 1.0,
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _flat(read: Reader, key: str) -> Mapping[str, Any]:
    """The rope settings that hold for every layer; version 5 may nest them under the layer types."""
    settings = read.get(key, None) or {}
    if not isinstance(settings, Mapping):
        raise read.wrong(key, settings, "an object")
    if not any(isinstance(value, Mapping) for value in settings.values()):
        return settings
    first, *others = settings.values()
    if any(other != first for other in others):
        raise read.error(f"{key} differs between {' and '.join(settings)}; all layers must turn alike")
    return first  # type: ignore[no-any-return]


def cos_sin(rope: Rope, head_width: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine and sine that turn a head at each position, attention scaling included.

    Pair j of a head at position p turns by the angle p * f_j, where f_j = theta^(-2j/H) (RoFormer, Su et al.,
    2021, section 3.2), stretched as `rope.kind` says. Halves are paired, dimension j with j + H/2, as Llama
    checkpoints store them, so the angles stand twice in a row. A position's values depend on that position
    only.

    Args:
        rope: which frequencies.
        head_width: H, even.
        positions: (n,) long.

    Returns:
        cos and sin, each (n, H) float32, on the device of `positions`.
    """
    frequencies = _frequencies(rope, head_width, positions)  # (H/2,) or (n, H/2)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat((angles, angles), -1)  # (n, H)
    scaling = _attention_scaling(rope)
    return angles.cos() * scaling, angles.sin() * scaling


def _frequencies(rope: Rope, head_width: int, positions: Tensor) -> Tensor:
    exponents = torch.arange(0, head_width, 2, device=positions.device).float() / head_width  # (H/2,)
    if rope.kind == "dynamic":
        return 1.0 / _dynamic_base(rope, head_width, positions)[:, None] ** exponents
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        # Chen et al., 2023, "Extending Context Window of LLMs via Positional Interpolation": p -> p / factor.
        return plain / rope.factor
    if rope.kind == "yarn":
        return _yarn(rope, rope.theta**exponents)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    assert rope.kind == "default", rope.kind
    return plain


def _dynamic_base(rope: Rope, head_width: int, positions: Tensor) -> Tensor:
    """Dynamic NTK scaling (bloc97 and emozilla, 2023): past the pretraining context, the base grows.

    base = theta * (factor * n / context - (factor - 1))^(H / (H - 2)), where n is the length so far. We take
    n = p + 1 for the token at position p: what one-token-a-step decoding gives, whatever the size of the call
    that computes it.

    Returns:
        (n,) float32.
    """
    context, power = rope.original_context, head_width / (head_width - 2)
    length = (positions + 1).clamp(min=context).float()
    grown = rope.theta * (rope.factor * length / context - (rope.factor - 1)) ** power
    # Within the context the bracket is 1, but only up to rounding: take theta itself there.
    return torch.where(positions < context, rope.theta, grown)


def _yarn(rope: Rope, periods: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023, section 3.2, "NTK-by-parts"): slow pairs are interpolated, fast ones left
    alone.

    A pair that makes r turns within the original context L sits at dimension H ln(L / (2 pi r)) / (2 ln
    theta). Between the dimensions of beta_fast and beta_slow turns, a linear ramp blends the two.
    """
    half = periods.shape[-1]
    width = 2 * half

    def dimension(turns: float) -> float:
        return width * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, device=periods.device).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Llama 3.1's scaling (Grattafiori et al., 2024, and Meta's reference code): long waves are divided by
    factor.

    With w the wavelength 2 pi / f and L the original context: w above L / low is divided by factor, w below L
    / high is left alone, and between them the share left alone is (L / w - low) / (high - low).
    """
    wavelength = 2 * math.pi / plain
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_context
    share = (original / wavelength - low) / (high - low)
    blended = (1 - share) * plain / rope.factor + share * plain
    outer = torch.where(wavelength > original / low, plain / rope.factor, plain)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, outer)


def _attention_scaling(rope: Rope) -> float:
    """YaRN's temperature on the attention scores, as a factor on cos and sin (Peng et al., 2023, equation
    22)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)
