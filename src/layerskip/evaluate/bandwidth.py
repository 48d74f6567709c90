"""How fast this machine reads memory, measured: what a share of the limit is a share of.

On the CPU a buffer that no cache holds is read from end to end with torch's current threads; on a GPU it is copied,
and both directions count. Knows buffers and clocks; knows no models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

LEAST = 256 << 20
"""Bytes of the buffer at least, where there is memory for them."""


@dataclass(frozen=True)
class Bandwidth:
    """What was measured.

    Args:
        bytes_per_second: the best of several passes.
        bytes: moved in a pass.
        threads: that read.
    """

    bytes_per_second: float
    bytes: int
    threads: int

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def measure_bandwidth(device: torch.device | str = "cpu", *, size: int | None = None, passes: int = 5) -> Bandwidth:
    """Measures it now: on a busy machine it is less, and so is everything else.

    Args:
        device: whose memory.
        size: bytes of the buffer; None is twice the last cache, at least `LEAST`, at most a quarter of what is free.
        passes: over the buffer, in each of two ways of reading; the best one counts.
    """
    place = torch.device(device)
    count = (buffer_size(place) if size is None else size) // (4096 * 8) * 4096
    buffer = torch.ones(count, dtype=torch.int64, device=place)
    if place.type == "cpu":
        rows = buffer.view(-1, 4096)
        # integers, whose sums wait for nothing; which of the two is faster depends on the threads
        ways: list[Callable[[], object]] = [buffer.sum, lambda: rows.sum(1)]
        moved = buffer.nbytes
    else:
        target = torch.empty_like(buffer)
        ways = [lambda: target.copy_(buffer)]
        moved = 2 * buffer.nbytes
    seconds = min(_seconds(way, place) for _ in range(passes) for way in ways)
    return Bandwidth(moved / seconds, moved, torch.get_num_threads())


def buffer_size(device: torch.device) -> int:
    """Bytes that no cache holds, and memory does."""
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    return min(max(LEAST, 2 * last_cache()), free // 4)


def last_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache of the first core as Linux tells them; 0 elsewhere."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [0]
    for file in folder.glob("index*/size"):
        try:
            text = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text[:-1].isdecimal() and text[-1] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found)


def _seconds(way: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
