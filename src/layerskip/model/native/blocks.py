"""The order in which the kernels read weights: blocks of 16 outputs side by side, two inputs at a time; quantised, 64.

Knows weights and their sizes; does not know which layer they are of. I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerskip.model.quantise import GROUP, quantised, slices

BLOCK = 16
PIECE = 64  # inputs: two groups, as in quantised.h
_AT_ONCE = 2**20  # weights that are quantised at a time


class Blocks(nn.Module):
    """Linear layers over the same input as one weight in the kernels' order. The given ones can be let go of.

    Args:
        parts: one or more, of the same input width.
        interleaved: their blocks take turns, rather than follow one another.
        bits: 8 or 4, quantised; None holds the same numbers.
    """

    def __init__(self, parts: Sequence[nn.Linear], *, interleaved: bool = False, bits: int | None = None) -> None:
        super().__init__()
        weights = [part.weight.detach() for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.register_buffer("sample", weights[0].flatten()[:64].clone())  # tells models apart
        if not interleaved:
            weights, biases = [torch.cat(weights)] if len(parts) > 1 else weights, [torch.cat(biases)] if biases else []
        blocks = [in_blocks(weight) if bits is None else in_pieces(weight, bits) for weight in weights]
        # not buffers: their numbers are in no order that a cast or a state_dict would mean
        self.weight = blocks[0] if len(blocks) == 1 else torch.stack(blocks, 1).flatten(0, 1)
        self.bias = torch.stack([_filled(b).unflatten(0, (-1, BLOCK)) for b in biases], 1).flatten() if biases else None
        self.bits = bits
        self.rows = sum(part.weight.shape[0] for part in parts)  # outputs that are not filled up
        self.inputs = (2 if bits is None else PIECE) * self.weight.shape[1]
        self.outputs = BLOCK * self.weight.shape[0]
        self.nbytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def blank(self, rows: int) -> Blocks:
        """A layer of so many outputs over the same input, of the same form, zeros throughout; without a bias."""
        other = copy.copy(self)
        other.weight = self.weight.new_zeros(-(-rows // BLOCK), *self.weight.shape[1:])
        other.bias, other.rows = None, rows
        other.outputs, other.nbytes = BLOCK * other.weight.shape[0], other.weight.nbytes
        return other

    def coarse(self, bits: int) -> Blocks:
        """The same layer with quantised weights; of one part, without a bias, that is not quantised yet."""
        other = copy.copy(self)
        step = max(1, _AT_ONCE // (BLOCK * self.inputs))
        first = in_pieces(self._outputs(0, 1), bits)
        other.weight = first.new_empty(self.weight.shape[0], *first.shape[1:])
        for start in range(0, self.weight.shape[0], step):
            other.weight[start : start + step] = in_pieces(self._outputs(start, start + step), bits)
        other.bits, other.inputs, other.nbytes = bits, PIECE * other.weight.shape[1], other.weight.nbytes
        return other

    def _outputs(self, first: int, last: int) -> Tensor:
        """Outputs of some blocks, (n, I), as they were before they were put in order."""
        lanes = 2 if self.weight.dtype == torch.bfloat16 else 3
        return self.weight[first:last].movedim(lanes, 1).flatten(2).flatten(0, 1)

    def put(self, outputs: Tensor, source: Blocks, rows: Tensor) -> None:
        """Makes outputs (n,) those of a layer of the same form, of one part: its outputs `rows` (n,)."""
        for mine, others in zip(self._lanes(), source._lanes(), strict=True):
            mine[outputs // BLOCK, outputs % BLOCK] = others[rows // BLOCK, rows % BLOCK]

    def _lanes(self) -> list[Tensor]:
        """All that belongs to an output, as (O/16, 16, ...)."""
        if self.bits is not None:  # as in `in_pieces`: scales, then numbers
            scales, numbers = self.weight[..., :PIECE], self.weight[..., PIECE:]
            return [
                scales.unflatten(2, (2, BLOCK, 2)).movedim(3, 1),
                numbers.unflatten(2, (-1, BLOCK, 4)).movedim(3, 1),
            ]
        return [self.weight.movedim(2 if self.weight.dtype == torch.bfloat16 else 3, 1)]


def in_blocks(weight: Tensor) -> Tensor:
    """(O, I) -> (O/16, I/2, 16, 2) for bfloat16, (O/16, I/2, 2, 16) for float32; filled up with zeros.

    Example: 16 outputs of 2 inputs are one block
        >>> in_blocks(torch.arange(32.0).view(16, 2))[0, 0, :, :3]
        tensor([[0., 2., 4.],
                [1., 3., 5.]])
    """
    weight = F.pad(_filled(weight), (0, weight.shape[1] % 2))
    pairs = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, 2))  # (O/16, 16, I/2, 2)
    order = (0, 2, 1, 3) if weight.dtype == torch.bfloat16 else (0, 2, 3, 1)
    out: Tensor = pairs.permute(order).contiguous()
    return out


def in_pieces(weight: Tensor, bits: int) -> Tensor:
    """(O, I) -> bytes (O/16, I/64, n), quantised: each n are 64 inputs of 16 outputs, their scales first.

    They are the structs of quantised.h: bfloat16 (2, 16) scales of two groups, then bytes (2, 8, 16, 4), four inputs of
    16 outputs in turn, or (2, 4, 16, 4) of two numbers each. Outputs and inputs are filled up with zeros.
    """
    outputs, inputs = -(-weight.shape[0] // BLOCK), -(-weight.shape[1] // PIECE)
    out = torch.empty((outputs, inputs, PIECE + PIECE * BLOCK * bits // 8), dtype=torch.uint8)
    for first, piece in slices(weight, unit=BLOCK):
        padded = F.pad(_filled(piece), (0, -piece.shape[1] % PIECE))
        numbers, scales = quantised(padded, bits)
        groups = numbers.add_(-128 if bits == 8 else 8).view(torch.uint8)  # (O, I/32, 32), its zero 128 or 8
        quads = groups.unflatten(2, (-1, 4)).unflatten(1, (-1, PIECE // GROUP)).unflatten(0, (-1, BLOCK))
        quads = quads.permute(0, 2, 3, 4, 1, 5)  # (O/16, I/64, 2, 8, 16, 4)
        if bits == 4:
            quads = quads[:, :, :, :4] | quads[:, :, :, 4:] << 4
        at = slice(first // BLOCK, first // BLOCK + len(quads))
        out[at, :, PIECE:] = quads.flatten(2)
        scales = scales.unflatten(1, (-1, PIECE // GROUP)).unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1)
        out[at, :, :PIECE] = scales.flatten(2).contiguous().view(torch.uint8)
    return out


def _filled(x: Tensor) -> Tensor:
    """Zeros behind, up to whole blocks of outputs."""
    missing = -x.shape[0] % BLOCK
    return F.pad(x, (*([0, 0] * (x.dim() - 1)), 0, missing)) if missing else x
