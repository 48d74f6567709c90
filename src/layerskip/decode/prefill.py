"""Running known tokens through the decoder, in chunks, without predicting.

The head is not applied to a prompt: the last token of a prompt is run by the first round, which needs its logits
anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerskip.model.cache import Cache, RowIndex
from layerskip.model.decoder import Decoder

CHUNK = 512
"""Positions run at a time: bounds the memory of activations and masks."""


def prefill(
    decoder: Decoder,
    cache: Cache,
    *,
    rows: Sequence[int],
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    depth: int,
    each: Callable[[list[int], Tensor, Tensor], None] | None = None,
) -> None:
    """Fills the cache with tokens starts[i] .. len(ids[i]) - 1 of every row, in layers 0..depth-1.

    Rows may be ragged: a row that is done leaves the batch; padding lies beyond a row's tokens and is overwritten
    later.

    Args:
        decoder: the model.
        cache: its cache.
        rows: the row of the cache of each sequence.
        ids: all tokens of each sequence.
        starts: how many of them the cache holds already.
        depth: layers to run.
        each: called per chunk with (sequences, positions (B, T), hidden (B, T, D)).
    """
    done = list(starts)
    while waiting := [i for i, tokens in enumerate(ids) if done[i] < len(tokens)]:
        width = min(CHUNK, max(len(ids[i]) - done[i] for i in waiting))
        pieces = [list(ids[i][done[i] : done[i] + width]) for i in waiting]
        # padding is run like any token, so it is one that the row has already
        tokens = torch.tensor([p + p[-1:] * (width - len(p)) for p in pieces], device=decoder.device)
        first = torch.tensor([done[i] for i in waiting], device=decoder.device)
        at = first[:, None] + torch.arange(width, device=decoder.device)
        limit = min(max(done[i] for i in waiting) + width, cache.slots)
        index = row_index([rows[i] for i in waiting], decoder.device)
        hidden = decoder.run(decoder.embed(tokens), at, cache, 0, depth, rows=index, limit=limit)
        if each is not None:
            each(waiting, at, hidden)
        for i, piece in zip(waiting, pieces, strict=True):
            done[i] += len(piece)


def row_index(rows: Sequence[int], device: torch.device) -> RowIndex:
    """A slice where the rows are consecutive (read as views), else a tensor (read as copies).

    Example:
        >>> row_index([2, 3, 4], torch.device("cpu"))
        slice(2, 5, None)
    """
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)
