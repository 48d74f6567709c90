"""The order in which the kernels read weights: blocks of 16 outputs side by side, two inputs at a time.

Knows weights and their sizes; does not know which layer they are of. I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 16


class Blocks(nn.Module):
    """Linear layers over the same input as one weight in the kernels' order. The given ones can be let go of.

    Args:
        parts: one or more, of the same input width.
        interleaved: their blocks take turns, rather than follow one another.
    """

    def __init__(self, parts: Sequence[nn.Linear], *, interleaved: bool = False) -> None:
        super().__init__()
        weights = [part.weight.detach() for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.register_buffer("sample", weights[0].flatten()[:64].clone())  # tells models apart
        if not interleaved:
            weights, biases = [torch.cat(weights)] if len(parts) > 1 else weights, [torch.cat(biases)] if biases else []
        blocks = [in_blocks(weight) for weight in weights]
        # not buffers: their numbers are in no order that a cast or a state_dict would mean
        self.weight = blocks[0] if len(blocks) == 1 else torch.stack(blocks, 1).flatten(0, 1)
        self.bias = torch.stack([_filled(b).unflatten(0, (-1, BLOCK)) for b in biases], 1).flatten() if biases else None
        self.inputs, self.outputs = 2 * self.weight.shape[1], BLOCK * self.weight.shape[0]
        self.nbytes = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


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


def _filled(x: Tensor) -> Tensor:
    """Zeros behind, up to whole blocks of outputs."""
    missing = -x.shape[0] % BLOCK
    return F.pad(x, (*([0, 0] * (x.dim() - 1)), 0, missing)) if missing else x
