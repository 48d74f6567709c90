"""Weights of 8 or 4 bits: whole numbers, and a scale for each group of 32 inputs of an output.

A model with such weights is one of its own, close to the checkpoint's. What is multiplied by them is quantised too, to
8 bits in the same groups, at every number of rows: that is part of the model. The kernels of `native` (quantised.h)
compute it in whole numbers; `Quantised` is the same model in torch, for every device.

Knows weights and rows of numbers; does not know which layer they are of. O outputs, I inputs, G groups of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 32
BITS = {"int8": 8, "int4": 4}
PLAIN = "-plain"
"""What the torch form of a layout is called behind its name."""

_SLICE = 2**20  # weights that are held in float32 at a time


def bits_of(layout: str) -> int | None:
    """Bits of a weight in a layout; None where it is lossless."""
    return BITS.get(layout.removesuffix(PLAIN))


def note(layout: str) -> str:
    """What is said behind the name of a layout; nothing where it is lossless."""
    return "" if bits_of(layout) is None else " (quantised: lossy against the checkpoint)"


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales whose products are close to a weight.

    A scale is what the group's largest number needs: 127 of them at 8 bits; at 4 bits, where there is one more number
    below zero than above, -8. It is rounded to bfloat16 before the numbers are found.

    Args:
        weight: (O, I) of any float type.
        bits: 8 or 4.

    Returns:
        int8 (O, G, 32), zeros where the last group is not full, and bfloat16 (O, G). A group with a number that is not
        finite has a scale that is not.

    Example:
        >>> numbers, scales = quantised(torch.tensor([[0.5, -1.0, 0.25]]), 4)
        >>> numbers[0, 0, :4].tolist(), scales.tolist()
        ([4, -8, 2, 0], [[0.125]])
    """
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    sizes = groups.abs().amax(-1, keepdim=True)
    if bits == 8:
        scales, least, most = sizes / 127, -127, 127
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales, least, most = torch.where(sizes.isfinite(), largest / -8, sizes), -8, 7
    scales = scales.bfloat16()
    numbers = (groups / scales.float()).nan_to_num_(0).round_().clamp_(least, most)  # a scale of 0 is of zeros only
    return numbers.to(torch.int8), scales[..., 0]


def slices(weight: Tensor, *, unit: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(first output, outputs) of a weight, so many at a time, a multiple of `unit`: all in float32 would be large."""
    count = max(1, _SLICE // (weight.shape[1] * unit)) * unit
    for first in range(0, weight.shape[0], count):
        yield first, weight[first : first + count]


def rounded(x: Tensor) -> Tensor:
    """Numbers (..., I) as the nearest of 8 bits in their group, in float32.

    Example:
        >>> rounded(torch.tensor([127.0, 3.4, -2.6]))
        tensor([127.,   3.,  -3.])
    """
    groups = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    sizes = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(sizes == 0, 0.0, 127 / sizes)
    numbers: Tensor = (groups * inverse).round_().clamp_(-127, 127) * (sizes / 127)
    return numbers.flatten(-2)[..., : x.shape[-1]]


class Quantised(nn.Module):
    """Linear layers over the same input, quantised. The given ones can be let go of.

    Args:
        parts: one or more, of the same input width.
        bits: 8 or 4.
    """

    def __init__(self, parts: Sequence[nn.Linear], bits: int) -> None:
        super().__init__()
        weights = [part.weight.detach() for part in parts]
        self.bits, self.sizes, self.inputs = bits, [weight.shape[0] for weight in weights], weights[0].shape[1]
        self.register_buffer("sample", weights[0].flatten()[:64].clone())  # tells models apart
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        outputs, groups = sum(self.sizes), -(-self.inputs // GROUP)
        # not buffers: a cast would change what they mean
        self.numbers = weights[0].new_empty((outputs, groups, GROUP * bits // 8), dtype=torch.uint8)
        self.scales = weights[0].new_empty((outputs, groups), dtype=torch.bfloat16)
        at = 0
        for weight in weights:
            for _, piece in slices(weight):
                numbers, scales = quantised(piece, bits)
                self.numbers[at : at + len(piece)] = numbers.view(torch.uint8) if bits == 8 else _in_bytes(numbers)
                self.scales[at : at + len(piece)] = scales
                at += len(piece)
        self.nbytes = self.numbers.nbytes + self.scales.nbytes + sum(bias.nbytes for bias in biases)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), the outputs of all parts side by side."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rounded(x), self.weight(), bias).to(x.dtype)

    def weight(self, outputs: Tensor | slice = slice(None)) -> Tensor:
        """The weights that the numbers stand for, (O, I) float32, or of some outputs."""
        held = self.numbers[outputs]
        numbers = held.view(torch.int8) if self.bits == 8 else _from_bytes(held)
        return (numbers * self.scales[outputs].float()[..., None]).flatten(1)[:, : self.inputs]


class QuantisedFan(Quantised):
    """A `Fan`, quantised."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # as a Fan's
        """(..., I) -> (..., O) of each part, in order."""
        parts: tuple[Tensor, ...] = super().forward(x).split(self.sizes, -1)
        return parts


def _in_bytes(numbers: Tensor) -> Tensor:
    """int8 (..., 32) from -8 to 7 -> bytes (..., 16), the later half in the upper bits."""
    first, second = (numbers + 8).view(torch.uint8).chunk(2, -1)
    return first | second << 4


def _from_bytes(numbers: Tensor) -> Tensor:
    return torch.cat((numbers & 15, numbers >> 4), -1).view(torch.int8) - 8
