"""The most memory that a run took, beyond what was taken before anything ran.

On the CPU it is the process's resident memory as Linux counts it, whose high-water mark can be set back; on a GPU what
torch has allocated. Elsewhere it is not known, and nothing is said in its place.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch


class HighWater:
    """Memory beyond that at the moment this was made, loaded weights and all.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = 0
        gc.collect()
        self.reset()
        if self._before is not None:
            self._before = self._mark()

    def reset(self) -> None:
        """Begins anew: what was taken and given back is forgotten."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: the mark falls to what is resident
        except OSError:  # another system, or a sandbox that does not allow it
            self._before = None

    def peak(self) -> int | None:
        """Bytes at most since `reset`, beyond those at the beginning; None where that is not known."""
        mark = self._mark()
        return None if mark is None or self._before is None else max(0, mark - self._before)

    def _mark(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
        return None if found is None else int(found[1]) * 1024
