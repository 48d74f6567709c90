"""What small models learn in a few steps, and the settings of runs that leave nothing but weights."""

from typing import Any

import torch

QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that a small model learns: each token is the last plus a step of its own."""
    sequences = [(torch.arange(14) * (1 + i % 3) + i) % 61 for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]
