"""What a run will take, before its first step: seconds from the products it has to compute, bytes from what it holds.

An estimate from formulas and one short measurement of this machine; the progress bar knows better after a few steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layerskip.train.parts import Parts, parts

_IN_PRODUCTS = 0.55
"""Share of a step spent in matrix products: measured for 12 layers of width 192 on two CPU cores with autocast."""
_PROBE_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Args:
        steps: optimizer steps still to do.
        rows: rows of a micro-batch on one device.
        length: tokens of a row, on average, with fill.
        learnt: share of the tokens that are learnt.
        accumulation: micro-batches of a step on one device.
        exits: exits that learn at a step, on average, the last layer among them.
        dropped: share of the layers' rows that dropout skips, on average over layers and steps.
        chunk: tokens whose logits are held at a time; 0 holds all learnt ones.
        bytes_per_number: of what is computed: 2 with bfloat16 autocast, else that of the weights.
        checkpointing: whether activations are computed again instead of being kept.
        shards: processes that share weights and optimizer.
    """

    steps: int
    rows: int
    length: float
    learnt: float
    accumulation: int
    exits: float
    dropped: float
    chunk: int
    bytes_per_number: int
    checkpointing: bool
    shards: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a run takes on each device.

    Args:
        parameters: of the model; trained ones beside them.
        trained: parameters that get gradients.
        flops: of a step, floating point operations.
        flops_per_second: measured in products of this run's shapes.
        seconds: of the whole run.
        weights: bytes of weights, those of references among them.
        gradients: bytes of gradients.
        optimizer: bytes of the optimizer's state: two numbers per trained parameter, as Adam has.
        activations: bytes of what is kept for the backward pass, logits among them.
    """

    parameters: int
    trained: int
    flops: float
    flops_per_second: float
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M trained; about "
            f"{duration(self.seconds)} ({self.flops / 1e9:,.0f} GFLOP a step at {self.flops_per_second / 1e9:,.0f} "
            f"GFLOP/s) and {self.bytes / 2**20:,.0f} MiB (weights {self.weights / 2**20:,.0f}, gradients "
            f"{self.gradients / 2**20:,.0f}, optimizer {self.optimizer / 2**20:,.0f}, activations "
            f"{self.activations / 2**20:,.0f})"
        )


def estimate(
    model: nn.Module, work: Work, *, references: Sequence[nn.Module] = (), flops_per_second: float | None = None
) -> Estimate:
    """Estimates time and memory.

    6 operations per weight and token (2 forward, 4 backward; Kaplan et al., 2020), the head's only for learnt tokens
    and once for each exit, two more where its logits are computed again; 12 L T d per token for attention.
    A reference runs forward only, a third of a model's own pass, and its head once.
    Activations: s b h (34 + 5 a s / h) bytes a layer in 16 bits (Korthikanti et al., 2022, equation 2), or each
    layer's input and one layer with checkpointing.

    Args:
        model: with layers and a head that can be found.
        work: what it is to do.
        references: models of the anchor, which run forward beside it.
        flops_per_second: of this machine; measured where None.
    """
    found = parts(model)
    every = list(model.parameters())
    trained = [weight for weight in every if weight.requires_grad]
    vocabulary, width = _head_size(found.head)
    tokens = work.rows * work.length
    backward = 1.0 if len(trained) == len(every) else 2 / 3  # frozen weights need no gradient of their own
    weights, attention = _per_token(found, work.length)
    in_layers = tokens * (6 * weights * backward + 12 * attention) * (1 - work.dropped)
    if work.checkpointing:
        in_layers *= 4 / 3
    in_heads = tokens * work.learnt * work.exits * (8 if work.chunk else 6) * vocabulary * width
    beside = 0.0
    for reference in references:
        its = parts(reference)
        its_weights, its_attention = _per_token(its, work.length)
        beside += tokens * (2 * its_weights + 4 * its_attention)
        beside += tokens * work.learnt * 2 * math.prod(_head_size(its.head))
    flops = work.accumulation * (in_layers + in_heads + beside)
    speed = flops_per_second or probe(tokens=int(tokens), width=width, like=every[0], bytes_each=work.bytes_per_number)
    heads = _heads(model)
    per_layer = tokens * width * 17 * work.bytes_per_number + 2.5 * heads * tokens * work.length * work.bytes_per_number
    kept = len(found.layers) * tokens * width * work.bytes_per_number + per_layer
    logits = (work.chunk or tokens * work.learnt) * vocabulary * 4 * 2
    return Estimate(
        parameters=sum(weight.numel() for weight in every),
        trained=sum(weight.numel() for weight in trained),
        flops=flops,
        flops_per_second=speed,
        seconds=work.steps * flops / speed / _IN_PRODUCTS,
        weights=_bytes(every) // work.shards + sum(_bytes(list(reference.parameters())) for reference in references),
        gradients=_bytes(trained) // work.shards,
        optimizer=2 * _bytes(trained) // work.shards,
        activations=int((kept if work.checkpointing else len(found.layers) * per_layer) + logits),
    )


def probe(*, tokens: int, width: int, like: torch.Tensor, bytes_each: int) -> float:
    """Operations per second of products (tokens, width) x (width, 2 width) on this device.

    Args:
        tokens: rows of the product.
        width: of the model.
        like: a tensor on the device.
        bytes_each: 2 for bfloat16, else the type of `like`.
    """
    dtype = torch.bfloat16 if bytes_each == 2 else like.dtype
    device = like.device
    left = torch.zeros(max(tokens, 1), width, dtype=dtype, device=device)
    right = torch.zeros(width, 2 * width, dtype=dtype, device=device)
    done = 0
    left @ right
    _wait(device)
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < _PROBE_SECONDS or not done:
        left @ right
        _wait(device)
        done += 1
    return done * 4 * left.shape[0] * width**2 / max(passed, 1e-9)


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(42), duration(754), duration(7300)
        ('42 s', '12 min 34 s', '2 h 01 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _per_token(found: Parts, length: float) -> tuple[int, float]:
    """Weights that a token passes in the layers, and L T d: their number, the row's length, the width."""
    weights = sum(weight.numel() for layer in found.layers for weight in layer.parameters())
    return weights, len(found.layers) * length * _head_size(found.head)[1]


def _head_size(head: nn.Module) -> tuple[int, int]:
    weight = next(head.parameters())
    return weight.shape[0], weight.shape[1]


def _heads(model: nn.Module) -> int:
    config = model.config
    return int(getattr(config, "num_attention_heads", 1) or 1)


def _bytes(weights: Sequence[torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
