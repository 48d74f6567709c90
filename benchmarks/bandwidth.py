"""How fast this machine reads memory, measured now: what a share of the limit is a share of."""

from __future__ import annotations

import time

import torch

BYTES = 256 << 20
"""Far beyond any cache."""


def bandwidth(*, threads: int, passes: int = 5) -> float:
    """Bytes per second of the best of several passes over a buffer: sums of integers, which wait for nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    buffer = torch.ones(BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return BYTES / min(seconds)
