"""The order of an epoch: decided by (seed, epoch) alone, the same on every machine, resumable.

Knows how many rows there are and how long. Does not know what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from layerskip.errors import RequestError

Order = npt.NDArray[np.int64]


def permutation(count: int, *, seed: int, epoch: int) -> Order:
    """The numbers below `count` in an order that depends on the arguments alone.

    Args:
        count: how many.
        seed: 0 or more.
        epoch: 0 or more.

    Raises:
        RequestError: the seed or the epoch is negative.
    """
    if seed < 0 or epoch < 0:
        raise RequestError(f"seed {seed} and epoch {epoch} cannot order rows; use numbers from 0 on")
    # Raw bits and a stable sort: numpy promises these for ever, and `shuffle` only for one version.
    draws = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(draws, kind="stable")


class LengthBuckets(Sampler[int]):
    """Every row once in an epoch, so that each run of `batch_size` has rows of about one length.

    Rows are shuffled, `window` batches of them are sorted by length, and the batches are shuffled again: which rows
    meet changes with every epoch. An incomplete batch comes last; its rows have any length.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch (per device, before accumulation).
        seed: another one orders otherwise.
        window: batches sorted together, at most a fourth of the epoch; more waste less, and mix less.

    Raises:
        RequestError: batch_size or window is below 1.
    """

    def __init__(self, lengths: Sequence[int] | Order, *, batch_size: int, seed: int, window: int = 64) -> None:
        if batch_size < 1 or window < 1:
            raise RequestError(f"batch_size {batch_size} and window {window} cannot make batches; use 1 or more")
        self._lengths = np.asarray(lengths, np.int64)
        self._size, self._seed, self._window, self._epoch = batch_size, seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; `Trainer` calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter([row for batch in self.batches() for row in batch])

    def batches(self) -> list[list[int]]:
        """The batches of the epoch, as rows."""
        rows = permutation(len(self), seed=self._seed, epoch=self._epoch)
        whole = len(rows) // self._size
        rest = rows[whole * self._size :].tolist()
        rows = rows[: whole * self._size]
        together = self._size * max(min(self._window, whole // 4), 1)
        for begin in range(0, len(rows), together):
            part = rows[begin : begin + together]
            rows[begin : begin + together] = part[np.argsort(-self._lengths[part], kind="stable")]
        # Another epoch number than any that shuffles rows, so that the two orders are independent.
        order = permutation(whole, seed=self._seed, epoch=self._epoch + 2**32)
        batches: list[list[int]] = rows.reshape(whole, self._size)[order].tolist()
        return [*batches, rest] if rest else batches
