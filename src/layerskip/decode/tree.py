"""The shape of a drafted tree: parents, depths, ancestors, and who sees whom.

Index arithmetic only. A draft of K tokens has K + 1 nodes: node 0 is the last known token, the root; node i + 1 is
drafted token i, whose parent is a node of a smaller number. B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def node_depths(parents: Tensor) -> Tensor:
    """(K + 1,) how many drafted tokens lie on the path to each node; 0 for the root.

    Example:
        >>> node_depths(torch.tensor([0, 0, 2])).tolist()
        [0, 1, 1, 2]
    """
    depths = [0]
    for parent in parents.tolist():
        depths.append(depths[parent] + 1)
    return torch.tensor(depths, device=parents.device)


def ancestors(parents: Tensor) -> Tensor:
    """(K + 1, K) bool: which drafted tokens belong to the prefix of each node, itself included.

    Example: a tree whose tokens 0 and 1 follow the root and whose token 2 follows token 0

        >>> ancestors(torch.tensor([0, 0, 1])).int()
        tensor([[0, 0, 0],
                [1, 0, 0],
                [0, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    count = parents.shape[0]
    rows = torch.zeros(count + 1, count, dtype=torch.bool, device=parents.device)
    for token, parent in enumerate(parents.tolist()):
        rows[token + 1] = rows[parent]
        rows[token + 1, token] = True
    return rows


def tree_mask(at: Tensor, family: Tensor, *, limit: int) -> Tensor:
    """(B, K + 1, limit) bool: every node sees the slots before the root, the root, and its own ancestors' slots.

    Args:
        at: (B, 1) the root's position, which is also its slot; node i lies in slot `at + i`.
        family: (K + 1, K) from `ancestors`.
        limit: slots read.
    """
    slots = torch.arange(limit, device=at.device)
    nodes, drafted = family.shape
    mask = (slots <= at)[:, None].repeat(1, nodes, 1)
    offset = slots - at - 1  # (B, limit): which drafted token lies in a slot
    inside = (offset >= 0) & (offset < drafted)
    of_tree = family[:, offset.clamp(0, max(drafted - 1, 0))].transpose(0, 1)  # (B, K + 1, limit)
    return mask | (of_tree & inside[:, None])
