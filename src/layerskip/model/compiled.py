"""Spans and the head as compiled graphs (torch.compile), for plain weights.

A graph is of one shape: rows, positions and slots are filled up to a few sizes, so that a text of any length runs in
graphs that are there already. What takes more positions than a draft (prompts) runs as it is: its time is that of
products, and there is no end of its lengths. Knows tensors and the cache; knows no arithmetic of its own. B rows, T
positions, S slots.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerskip.model.cache import Cache, RowIndex

LEAST_SLOTS = 64
MOST_POSITIONS = 32  # of a row: a draft of 16 tokens, and the one before
MOST_LOGITS = 256  # positions of all rows
_GRAPHS = 512  # torch gives up on a function after 8 shapes, which is for those that never settle


def filled(count: int, *, least: int = 1, most: int | None = None) -> int:
    """The size that so many are filled up to: the next power of two.

    Example:
        >>> [filled(count) for count in (1, 2, 3, 5, 8)], filled(70, least=64, most=100)
        ([1, 2, 4, 8, 8], 100)
    """
    size = max(least, 1 << (count - 1).bit_length())
    return size if most is None else min(size, most)


class Span(nn.Module):
    """Some layers of a decoder, as one function of tensors.

    Args:
        layers: the decoder's own.
        windows: of each, None where it sees all.
    """

    def __init__(self, layers: Sequence[nn.Module], windows: Sequence[int | None]) -> None:
        super().__init__()
        self.layers, self.windows = nn.ModuleList(layers), list(windows)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        masks: dict[int | None, Tensor | None],
        row: Tensor,
        slots: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        limit: int,
        gathered: bool,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `keys` and `values` hold the B rows alone, or all of them where they are gathered."""
        place = row[:, None]
        for i, layer in enumerate(self.layers):

            def remember(key: Tensor, value: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                keys[i][place, :, slots] = key.transpose(1, 2)
                values[i][place, :, slots] = value.transpose(1, 2)
                if gathered:
                    return keys[i][row, :, :limit], values[i][row, :, :limit]
                return keys[i][:, :, :limit], values[i][:, :, :limit]

            hidden = layer(hidden, rotation, masks[self.windows[i]], remember)
        return hidden


class Compiled:
    """A decoder's spans and head, compiled as they are asked for.

    Args:
        layers: of the decoder.
        windows: of each.
        head: hidden states -> logits.
        backend: of torch.compile.

    Attributes:
        graphs: how many were compiled.
        seconds: that took, each with its first run.
        failed: why nothing is compiled any more; None while it works.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        windows: Sequence[int | None],
        head: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        backend: str = "inductor",
    ) -> None:
        self._layers, self._windows = list(layers), list(windows)
        # graphs of CUDA calls, so that a step is one launch
        mode = {"mode": "reduce-overhead"} if device.type == "cuda" and backend == "inductor" else {}
        self._settings: dict[str, Any] = {"backend": backend, "dynamic": False, **mode}
        self._head = torch.compile(head, **self._settings)
        self._spans: dict[tuple[int, int], Any] = {}
        self._known: set[Hashable] = set()
        self._lock = threading.Lock()
        self.graphs, self.seconds = 0, 0.0
        self.failed: str | None = None
        torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.accumulated_recompile_limit = max(
            4 * _GRAPHS, torch._dynamo.config.accumulated_recompile_limit
        )

    def __str__(self) -> str:
        if self.failed is not None:
            return f"not compiled: {self.failed}"
        return f"{self.graphs} graphs compiled in {self.seconds:.1f} s"

    def run(
        self,
        hidden: Tensor,
        at: Tensor,
        slots: Tensor,
        cache: Cache,
        first: int,
        last: int,
        *,
        rows: RowIndex,
        limit: int,
        mask: Tensor | None,
        rotations: tuple[Tensor, Tensor],
        scores: Callable[[Tensor, RowIndex, Tensor | None, int, int | None], Tensor | None],
    ) -> Tensor | None:
        """As `Decoder.run`, with positions and slots that are within the cache.

        None where nothing can be compiled, or where there are more positions than a graph is made for.

        Args:
            rotations: cosines and sines by position.
            scores: `Decoder`'s mask of positions (B, T) in rows, given a mask, a limit and a window.
        """
        batch, positions = at.shape
        if positions > MOST_POSITIONS:
            return None
        below, beside = filled(batch) - batch, filled(positions) - positions
        size = filled(limit, least=LEAST_SLOTS, most=cache.slots)
        # what is filled up with is padding of the first row: written where nobody reads
        at, slots = (F.pad(part, (0, beside, 0, below), value=cache.slots) for part in (at, slots))
        if mask is not None:
            mask = F.pad(mask, (0, size - limit, 0, beside, 0, below))
            mask[..., 0] |= ~mask.any(-1)  # a position that sees nothing would be no number
        gathered = bool(below) or not isinstance(rows, slice)
        index: RowIndex = rows
        if gathered:
            index = rows if isinstance(rows, Tensor) else torch.arange(*rows.indices(cache.rows), device=at.device)
            index = torch.cat((index, index[:1].expand(below)))
        row = index if isinstance(index, Tensor) else torch.arange(batch, device=at.device)
        held = [
            [_any_size(part if gathered else part[index], rows=gathered) for part in parts[first:last]]
            for parts in (cache.keys, cache.values)
        ]
        masks = {window: scores(at, index, mask, size, window) for window in set(self._windows[first:last])}
        given = (
            F.pad(hidden, (0, 0, 0, beside, 0, below)),
            (rotations[0][at][:, None], rotations[1][at][:, None]),
            masks,
            row,
            slots,
            *held,
            size,
            gathered,
        )
        some = tuple(part is None for part in masks.values())
        kind = (first, last, *at.shape, size, gathered, some)
        found = self._call(kind, lambda: self._span(first, last)(*given))
        return None if found is None else found[:batch, :positions]

    def logits(self, hidden: Tensor) -> Tensor | None:
        """(..., D) -> (..., V); None as for `run`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        count = flat.shape[0]
        if count > MOST_LOGITS:
            return None
        padded = F.pad(flat, (0, 0, 0, filled(count) - count))
        found = self._call(("head", padded.shape), lambda: self._head(padded))
        return None if found is None else found[:count].unflatten(0, hidden.shape[:-1])

    def _span(self, first: int, last: int) -> Any:
        if (first, last) not in self._spans:
            span = Span(self._layers[first:last], self._windows[first:last])
            self._spans[first, last] = torch.compile(span, **self._settings)
        return self._spans[first, last]

    def _call(self, kind: Hashable, graph: Callable[[], Tensor]) -> Tensor | None:
        if self.failed is not None:
            return None
        try:
            if kind in self._known:
                return graph()
            with self._lock:
                began = time.perf_counter()
                found = graph()
                self._known.add(kind)
                self.graphs, self.seconds = self.graphs + 1, self.seconds + time.perf_counter() - began
                return found
        except torch._dynamo.exc.ShortenTraceback as error:  # no compiler, one that fails, or none for the GPU
            self.failed = " ".join(str(getattr(error, "inner_exception", error)).split())[:200]
            warnings.warn(f"torch could not compile, so nothing is compiled: {self.failed}", stacklevel=2)
            return None


def _any_size(held: Tensor, *, rows: bool) -> Tensor:
    """Keys or values of a layer (R, G, S + 1, H), of which a graph takes any number of slots and rows: caches grow."""
    for dimension in (0, 2) if rows else (2,):
        torch._dynamo.maybe_mark_dynamic(held, dimension)
    return held
