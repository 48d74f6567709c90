"""Single rows of a matrix in a safetensors file, for weights whose stored form cannot be read.

A map of the file would do as well, but what the system maps around every row counts as memory of the process: rows
scattered over a head would bring in most of it. Knows files; does not know what the rows mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor


class FileRows:
    """A matrix (V, D) in a file, which must stay as it is.

    Args:
        path: the file.
        name: of the matrix in it.
        dtype: its element type.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype) -> None:
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))[name]
        self._dtype, self._width = dtype, header["shape"][1]
        self._first = 8 + length + header["data_offsets"][0]

    def take(self, rows: Tensor) -> Tensor:
        """Rows (n, D) by number (n,), n at least 1."""
        size = self._width * self._dtype.itemsize
        found = b"".join(os.pread(self._file.fileno(), size, self._first + row * size) for row in rows.tolist())
        return torch.frombuffer(bytearray(found), dtype=self._dtype).view(-1, self._width)
