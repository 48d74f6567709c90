"""Keys and values of every layer, preallocated and addressed by (layer, row, slot).

Knows where things lie and how much memory they take; knows nothing of tokens, of drafts, or of which rows are in use.

A query at position p sees slots 0..p of its row, so what a rejected draft wrote lies beyond every later query until
it is overwritten: nothing is ever trimmed. Sizes: R rows, S slots, G key/value heads, H head width.
"""

from __future__ import annotations

import math
from ctypes import Array, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from layerskip.errors import CapacityError
from layerskip.model.shape import Shape

RowIndex = slice | Tensor
"""Which rows of the cache a call touches: a slice (read as views) or a long tensor (B,) (read as copies)."""


class Cache:
    """One key tensor and one value tensor per layer, each (R, G, S + 1, H); the last slot takes what padding writes.

    Args:
        shape: sizes of the model.
        rows: R, sequences held side by side.
        slots: S, positions a row can hold.
        dtype: element type, the decoder's.
        device: where it lives.
        doubling: S is always a power of two: graphs are of few sizes.

    Raises:
        CapacityError: the memory is not there; says what would fit.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        rows: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        doubling: bool = False,
    ) -> None:
        self.shape, self.rows, self.slots, self.doubling = shape, 0, 0, doubling
        self.dtype, self.device = dtype, torch.device(device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions = torch.zeros(0, 0, dtype=torch.long)
        self._addresses: tuple[Array[c_void_p], Array[c_void_p]] | None = None
        self.grow(rows=rows, slots=slots)

    def grow(self, *, rows: int, slots: int) -> None:
        """Holds at least `rows` x `slots` from now on; what was held stays held.

        Raises:
            CapacityError: the memory is not there; the cache is left as it was.
        """
        rows, slots = max(rows, self.rows), self._whole(max(slots, self.slots))
        if (rows, slots) == (self.rows, self.slots):
            return
        self.check_memory(rows=rows, slots=slots)
        self._addresses = None
        size = (rows, self.shape.kv_heads, slots + 1, self.shape.head_width)
        try:
            for tensors in (self.keys, self.values):
                for layer in range(self.shape.layers):
                    new = torch.zeros(size, dtype=self.dtype, device=self.device)
                    if self.rows:  # layer by layer, so that at most one layer is held twice
                        new[: self.rows, :, : self.slots] = tensors[layer][:, :, : self.slots]
                        tensors[layer] = new
                    else:
                        tensors.append(new)
            positions = torch.arange(slots + 1, device=self.device).repeat(rows, 1)
            if self.rows:
                positions[: self.rows, : self.slots] = self.positions[:, : self.slots]
            self.positions, self.rows, self.slots = positions, rows, slots
        except (RuntimeError, MemoryError) as error:
            raise self._does_not_fit(rows, slots, None) from error
        finally:  # half way, too: code that takes addresses counts on layers of one size
            self.keys, self.values = ([self._sized(t) for t in ts if self.rows] for ts in (self.keys, self.values))

    def shrink(self, *, rows: int) -> None:
        """Holds only its first `rows` rows from now on; 0 gives all memory back."""
        self._addresses = None
        if rows == 0:
            self.keys, self.values, self.rows, self.slots = [], [], 0, 0
            return
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[:rows].clone()
        self.positions = self.positions[:rows].clone()
        self.rows = rows

    def place(self, rows: RowIndex, slots: Tensor, at: Tensor) -> None:
        """Notes that `slots` (B, T) hold positions `at` (B, T): a tree's nodes have slots apart from positions."""
        self.positions[self._row_numbers(rows)[:, None], slots] = at

    def write(self, layer: int, rows: RowIndex, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values (B, G, T, H) of one layer into `slots` (B, T) of `rows`."""
        row = self._row_numbers(rows)[:, None]
        self.keys[layer][row, :, slots] = keys.transpose(1, 2)
        self.values[layer][row, :, slots] = values.transpose(1, 2)

    def read(self, layer: int, rows: RowIndex, limit: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, limit, H) of slots 0..limit-1."""
        return self.keys[layer][rows, :, :limit], self.values[layer][rows, :, :limit]

    def addresses(self) -> tuple[Array[c_void_p], Array[c_void_p]]:
        """Where keys and values of every layer begin, for code that takes addresses."""
        if self._addresses is None:
            pointers = c_void_p * len(self.keys)
            self._addresses = (
                pointers(*(tensor.data_ptr() for tensor in self.keys)),
                pointers(*(tensor.data_ptr() for tensor in self.values)),
            )
        return self._addresses

    def copy_prefix(self, source: int, target: int, *, length: int) -> None:
        """Copies slots 0..length-1 of row `source` to row `target`, in every layer."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
        self.positions[target, :length] = self.positions[source, :length]

    def gather(self, rows: RowIndex, source: Tensor, target: Tensor) -> None:
        """Moves slots `source` (B, T) to slots `target` (B, T) of `rows`: the accepted path of a tree, in place.

        Each row is read whole before it is written, so the two may overlap. A moved slot holds position `target`.
        """
        row = self._row_numbers(rows)[:, None]
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[row, :, target] = tensor[row, :, source]
        self.positions[row, target] = target

    def clear(self, row: int, *, first: int = 0) -> None:
        """Zeroes a row from slot `first` on: a masked NaN still poisons attention (0 x NaN), so it is wiped."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[row, :, first:].zero_()

    def _sized(self, tensor: Tensor) -> Tensor:
        """A layer in the size that all have: of a bigger one the beginning, in its memory (there may be no other)."""
        size = (self.rows, self.shape.kv_heads, self.slots + 1, self.shape.head_width)
        if tensor.shape == size:
            return tensor
        out = tensor.flatten()[: math.prod(size)].view(size)
        for row in range(self.rows):
            for head in range(self.shape.kv_heads):  # in order: each comes to lie where nothing is still to be read
                out[row, head] = tensor[row, head, : self.slots + 1].clone()
        return out

    def _row_numbers(self, rows: RowIndex) -> Tensor:
        if isinstance(rows, slice):
            return torch.arange(*rows.indices(self.rows), device=self.device)
        return rows

    def _whole(self, slots: int) -> int:
        """So many slots, or as many as there have to be."""
        return 1 << (slots - 1).bit_length() if self.doubling else slots

    def check_memory(self, *, rows: int, slots: int) -> None:
        """Raises CapacityError where so much could not be held, even if nothing else were."""
        free, slots = free_bytes(self.device), self._whole(slots)
        if free is None:
            return
        if self.rows:  # what is held becomes part of the bigger cache
            free += self.shape.cache_bytes(self.rows, self.slots + 1, self.dtype.itemsize)
        if self.shape.cache_bytes(rows, slots + 1, self.dtype.itemsize) > free:
            raise self._does_not_fit(rows, slots, free)

    def _does_not_fit(self, rows: int, slots: int, free: int | None) -> CapacityError:
        need = self.shape.cache_bytes(rows, slots + 1, self.dtype.itemsize)
        text = f"a cache of {rows} rows x {slots} positions needs {need / 2**30:.2f} GiB"
        if free is None:
            return CapacityError(f"{text}, which could not be allocated; ask for fewer tokens or rows")
        fits = int(free // (need / (slots + 1))) - 1
        return CapacityError(
            f"{text}, {free / 2**30:.2f} GiB are free; "
            + (f"{rows} rows x {fits} positions would fit: " if fits > 0 else "")
            + "ask for fewer tokens or rows"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, or None where the system does not tell."""
    if device.type == "cuda":
        # what torch holds without using can be taken as well
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + spare
    # Linux hands out memory it does not have and kills later, so ask before allocating
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    for line in table.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
