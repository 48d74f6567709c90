"""Acceptance rules: which drafted tokens stay, and which token comes next.

Pure functions of laws and uniform numbers; no model is imported, so the theorems are tested on tiny vocabularies.

Two rules suffice for exactness. *Rejection* (Leviathan et al., 2023, algorithm 1) for a token drawn from a known law
q: keep it with probability min(1, p/q), else draw from the residual (p - q)+. *Sample and match* for a token that was
chosen rather than drawn, in a chain or a tree: draw x from p and keep the drafted token that equals it; what is
emitted is x itself, whatever was drafted.

Sizes: B rows, K drafted tokens, V vocabulary; node 0 is the last known token, node i + 1 drafted token i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decode.sampling import Laws, draw
from layerskip.decode.tree import node_depths


@dataclass(frozen=True)
class Verdict:
    """What stays of a draft.

    Args:
        accepted: (B,) drafted tokens kept.
        path: (B, depth) the drafted tokens along the kept path, as indices into the draft; the first `accepted` count.
        token: (B,) the token that follows them.
    """

    accepted: Tensor
    path: Tensor
    token: Tensor


@dataclass(frozen=True)
class Uniforms:
    """The random numbers of one verification, (B, n) each in [0, 1).

    Args:
        token: (B, K + 1) for draws from the target, one per position after the last known token.
        accept: (B, K) for accepting drawn proposals; (B, 0) where there are none.
        residual: (B, K) for draws from the residual; (B, 0) where there are none.
    """

    token: Tensor
    accept: Tensor
    residual: Tensor


def verify_chain(
    target: Tensor,
    tokens: Tensor,
    *,
    uniforms: Uniforms,
    proposals: Sequence[Tensor | None] | None = None,
    lengths: Tensor | None = None,
) -> Verdict:
    """Verifies a chain of drafted tokens; what comes out has exactly the law `target`.

    Args:
        target: (B, K + 1, V) the target law after each node; for laws that choose there is `verify_chosen`.
        tokens: (B, K) drafted tokens.
        uniforms: the random numbers to use.
        proposals: per position the (B, V) law the token was drawn from, or None where it was chosen; None for all.
        lengths: (B,) how many of the K tokens count in each row.

    Example: greedy laws say 2, 0, 1; the draft said 2, 1: one token stays and 0 follows it

        >>> target = torch.eye(3)[[2, 0, 1]][None]
        >>> half = torch.full((1, 3), 0.5)
        >>> v = verify_chain(target, torch.tensor([[2, 1]]), uniforms=Uniforms(half, half, half))
        >>> v.accepted.tolist(), v.token.tolist()
        ([1], [0])
    """
    rows, count = tokens.shape
    own = draw(target, uniforms.token)
    keep = own[:, :count] == tokens
    laws = {i: q for i, q in enumerate(proposals or ()) if q is not None}
    drawn = list(laws)
    if drawn:
        q = torch.zeros_like(target)
        for i in drawn:
            q[:, i] = laws[i]
        chosen = tokens[..., None]
        p_token = target[:, :count].gather(-1, chosen)[..., 0]
        q_token = q[:, :count].gather(-1, chosen)[..., 0]
        keep[:, drawn] = (uniforms.accept * q_token < p_token)[:, drawn]
    if lengths is not None:
        keep &= torch.arange(count, device=tokens.device) < lengths[:, None]
    accepted = keep.long().cumprod(-1).sum(-1)
    token = own.gather(1, accepted[:, None])[:, 0]
    if drawn:
        # a drawn token was turned down here: not the end of the row's draft, and not a chosen token
        was_drawn = torch.zeros(count + 1, dtype=torch.bool, device=tokens.device)
        was_drawn[drawn] = True
        turned_down = was_drawn[accepted] & (accepted < (count if lengths is None else lengths))
        at = accepted[:, None, None].expand(-1, 1, target.shape[-1])
        p, q = target.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
        residual = (p - q).clamp_min(0)
        # p = q up to rounding leaves nothing over; p itself is then the law
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
        number = uniforms.residual.gather(1, accepted.clamp(max=count - 1)[:, None])[:, 0]
        token = torch.where(turned_down, draw(residual, number), token)
    path = torch.arange(count, device=tokens.device).expand(rows, -1)
    return Verdict(accepted, path, token)


def verify_chosen(own: Sequence[int], drafted: Sequence[int]) -> list[int]:
    """What follows the last known token of a row where every law chooses: what `verify_chain` gives, on the host.

    Args:
        own: the K + 1 tokens that the target chooses after each node.
        drafted: K or fewer tokens.

    Returns:
        The drafted tokens up to the first that is not the chosen one, and the chosen one after them.

    Example: as above, the laws choose 2, 0, 1 and the draft said 2, 1

        >>> verify_chosen([2, 0, 1], [2, 1])
        [2, 0]
    """
    kept = next((i for i, token in enumerate(drafted) if token != own[i]), len(drafted))
    return list(own[: kept + 1])


def verify_tree(target: Laws, tokens: Tensor, parents: Tensor, *, depth: int, uniforms: Uniforms) -> Verdict:
    """Verifies a tree of chosen tokens by sample-and-match: draw from the law at a node, descend if the draw is a
    child.

    Nodes of equal depth share their random number, which therefore depends on the position only: seeded text is that
    of plain decoding, whatever the tree.

    Args:
        target: (B, K + 1, V) the target law after each node, or the tokens it chooses.
        tokens: (B, K) drafted tokens.
        parents: (K,) the parent node of each.
        depth: the most tokens on a path.
        uniforms: of which `token` is used, (B, at least depth + 1).

    Example: children 2 and 1 of the root, child 0 of token 1; greedy laws say 1 at the root, then 0, then 2

        >>> target = torch.eye(3)[[1, 0, 0, 2]][None]
        >>> half = torch.full((1, 3), 0.5)
        >>> v = verify_tree(target, torch.tensor([[2, 1, 0]]), torch.tensor([0, 0, 2]), depth=2,
        ...                 uniforms=Uniforms(half, half, half))
        >>> v.accepted.tolist(), v.path.tolist(), v.token.tolist()
        ([2], [[1, 2]], [2])
    """
    rows = tokens.shape[0]
    node_depth = node_depths(parents)
    own = draw(target, uniforms.token[:, node_depth])  # (B, K + 1)
    node = torch.zeros(rows, 1, dtype=torch.long, device=tokens.device)
    alive = torch.ones(rows, dtype=torch.bool, device=tokens.device)
    accepted = torch.zeros(rows, dtype=torch.long, device=tokens.device)
    path = []
    for _ in range(depth):
        child = (parents == node) & (tokens == own.gather(1, node))  # (B, K)
        alive = alive & child.any(-1)
        step = child.long().argmax(-1)
        path.append(torch.where(alive, step, 0))
        node = torch.where(alive[:, None], step[:, None] + 1, node)
        accepted = accepted + alive
    token = own.gather(1, node)[:, 0]
    return Verdict(accepted, torch.stack(path, 1) if path else tokens[:, :0], token)
