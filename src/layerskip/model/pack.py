"""How a linear layer is stored, and what multiplies by it: the one place that knows.

plain    torch's own; shared with the tensors it was made from
packed   prepacked for oneDNN on the CPU: the same numbers in the order its kernels read them. Lossless.
native   in the order that our own kernels read them, which run whole spans (folder native). Lossless.
int8     8 or 4 bits a weight (quantise.py), for the same kernels: a model of its own, close to the checkpoint's.
int4     Quantised, and lossy in that sense: drafting is exact for the quantised model.
int8-plain, int4-plain  the same models in torch, where there are no kernels

Whatever kernel serves a weight serves it at every number of rows: another kernel for verification would be another
model. Knows weights and rows of numbers; does not know which layer it is. T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layerskip.errors import RequestError, suggest
from layerskip.model.native import build
from layerskip.model.native.blocks import Blocks
from layerskip.model.native.span import FORMATS, WIDEST_HEAD
from layerskip.model.quantise import BITS, PLAIN, Quantised, QuantisedFan, bits_of
from layerskip.model.shape import Shape

LAYOUTS = ("plain", "packed", "native", *BITS, *(name + PLAIN for name in BITS))
KERNELS = ("native", *BITS)  # those that our own kernels read


class Fan(nn.Module):
    """Linear layers that read the same input, by name."""

    def __init__(self, width: int, sizes: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(width, size, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., I) -> (..., O) of each, in order."""
        return tuple(part(x) for part in self.children())


class Packed(nn.Module):
    """Linear layers over the same input as one prepacked weight. The given ones can be let go of.

    Args:
        parts: one or more, of the same input width.
    """

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [part.weight.detach() for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.sizes = [weight.shape[0] for weight in weights]
        self.register_buffer("sample", weights[0].flatten()[:64].clone())  # tells models apart
        whole = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
        self.nbytes = whole.nbytes + sum(bias.nbytes for bias in biases)
        self.bias = torch.cat(biases) if biases else None
        # not a buffer: an opaque tensor can neither be cast nor moved
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), the outputs of all parts side by side."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class PackedFan(Packed):
    """A `Fan` as one prepacked weight."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # as a Fan's
        """(..., I) -> (..., O) of each part, in order."""
        parts: tuple[Tensor, ...] = super().forward(x).split(self.sizes, -1)
        return parts


def chosen(layout: str | None, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> str:
    """The layout a name means; None and "auto" are the fastest lossless one that is possible, "int8" and "int4" their
    plain form where there can be no kernels.

    Raises:
        RequestError: an unknown layout, or one that dtype or device do not allow.
    """
    if layout is not None and layout != "auto" and layout not in LAYOUTS:
        raise RequestError(f"unknown weights {layout!r}; use auto, {', '.join(LAYOUTS)}{suggest(layout, LAYOUTS)}")
    if layout in BITS and no_kernels(shape, dtype, device) is not None:
        return layout + PLAIN
    for name, obstacle_to in (("native", no_kernels), ("packed", _packed)):
        if layout in (None, "auto", name):
            obstacle = obstacle_to(shape, dtype, device)
            if obstacle is None:
                return name
            if layout == name:
                raise RequestError(f"weights cannot be {name}: {obstacle}; use auto")
    return "plain" if layout in (None, "auto") else layout


def no_kernels(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why our own kernels cannot serve; None where they can."""
    if device.type != "cpu":
        return f"the kernels are for the CPU, not for {device.type}"
    if dtype not in FORMATS:
        return f"the kernels know {' and '.join(_short(known) for known in FORMATS)}, not {_short(dtype)}"
    if shape.head_width > WIDEST_HEAD:
        return f"the kernels hold heads up to {WIDEST_HEAD} wide, not {shape.head_width}"
    try:
        build.library()
    except build.Unavailable as reason:
        return str(reason)
    return None


def _packed(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why weights cannot be packed; None where they can."""
    if device.type != "cpu":
        return f"packing is for the CPU, not for {device.type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return f"this processor has no oneDNN kernels for {_short(dtype)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack(module: nn.Module, layout: str) -> None:
    """Replaces every linear layer inside by its form in `layout`, one at a time, so that at most one is held twice."""
    if layout == "plain":
        return
    for name, child in module.named_children():
        if isinstance(child, Fan | nn.Linear):
            setattr(module, name, _stored(child, layout, turns=name == "gate_up"))
        else:
            pack(child, layout)


def _stored(linear: Fan | nn.Linear, layout: str, *, turns: bool) -> nn.Module:
    parts = [linear] if isinstance(linear, nn.Linear) else [p for p in linear.children() if isinstance(p, nn.Linear)]
    bits = bits_of(layout)
    if layout in KERNELS:
        return Blocks(parts, interleaved=turns, bits=bits)
    if bits is not None:
        return Quantised(parts, bits) if isinstance(linear, nn.Linear) else QuantisedFan(parts, bits)
    return Packed(parts) if isinstance(linear, nn.Linear) else PackedFan(parts)


def stored_bytes(module: nn.Module) -> int:
    """Bytes that the weights inside take, as they are stored."""
    packed = [part for part in module.modules() if isinstance(part, Packed | Blocks | Quantised)]
    return sum(p.nbytes for p in module.parameters()) + sum(part.nbytes for part in packed)
