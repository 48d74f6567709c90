"""How token rows share a batch: padded, packed without seeing each other, or as one stream.

Knows shapes, masks and labels. Does not know tokenizers, nor the order of an epoch (`order`).

B is rows, S tokens of a row.

Masks. transformers 5.23 finds packed documents by itself where `position_ids` start again, for any number of rows, but
only while there is neither an attention mask nor a cache; `model(**batch)` with `use_cache` left on loses the
borders without a word. So `Packed` hands over the mask itself: a 4-D one reaches attention as it is. As
booleans it suits `sdpa`; `eager` attention adds the mask to the scores, and needs it as numbers. A 4-D mask also
replaces the sliding window of the models that have one, and flash attention takes none: these have to find the borders
themselves. `Packed.suited_to` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from layerskip.errors import RequestError
from layerskip.train.data.encoding import IGNORE, Ids, Limits, Row, Rows, encode_each
from layerskip.train.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Packing = Literal["first-fit", "sequential"]

Batch = dict[str, Tensor]
"""What a model is called with."""


def pack(rows: Rows, *, length: int, how: Packing = "first-fit") -> Rows:
    """Puts several documents into each row; `Packed` keeps them from seeing each other.

    A document begins at position 0 wherever it lies, and its first token is predicted from nothing, so its label is
    ignored: the loss is the one of the documents alone.

    Args:
        rows: one document each.
        length: tokens of a packed row at most; what is left free is filled by the collator.
        how: "first-fit" puts a document into the first row with room for it, "sequential" into the last row.

    Returns:
        Rows with `position_ids`.

    Raises:
        RequestError: a document is longer than a row, or `how` is unknown.

    Example:
        >>> three = Rows({"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9], [3]))
        >>> [row["position_ids"].tolist() for row in pack(three, length=4)]
        [[0, 1, 2, 0], [0, 1]]
        >>> [row["position_ids"].tolist() for row in pack(three, length=4, how="sequential")]
        [[0, 1, 2], [0, 1, 0]]
    """
    lengths = rows.lengths
    if how not in ("first-fit", "sequential"):
        raise RequestError(f"packing {how!r} is not one of 'first-fit', 'sequential'; use one of them")
    if len(rows) and lengths.max() > length:
        raise RequestError(
            f"{int((lengths > length).sum()):,} documents are longer than a packed row of {length} tokens (the longest "
            f"has {lengths.max():,}); raise the length, or encode with Limits(max_length={length})"
        )
    return Rows(_joined([rows[place] for place in places]) for places in _fit(lengths, length=length, how=how))


def cut_stream(rows: Rows, *, length: int) -> Rows:
    """Puts documents one behind the other and cuts that into rows of one length; no masks.

    For plain language modelling: a row may begin inside a document, and a later document sees the earlier ones.

    Args:
        rows: one document each.
        length: tokens of every row; what remains at the end, less than one row, is left out.

    Raises:
        RequestError: there are not enough tokens for one row.
    """
    row = next(iter(_cut(rows, length=length)), None)
    if row is None:
        raise RequestError(f"{rows.lengths.sum():,} tokens are less than one row of {length}; give more text")
    return Rows(_cut(rows, length=length))


class StreamedRows(IterableDataset[Row]):
    """`cut_stream` over examples that are read while training goes on, such as a streamed data set.

    The process that trains reads and encodes them, not workers of a DataLoader. `set_epoch` is called by `Trainer`.

    Args:
        examples: gives the examples of an epoch.
        tokenizer: with an EOS token.
        length: tokens of every row.
        limits: only `train_on_prompt` counts.
    """

    def __init__(
        self,
        examples: Callable[[int], Iterable[Example]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        limits: Limits | None = None,
    ) -> None:
        self._examples, self._tokenizer, self._length = examples, tokenizer, length
        self._limits = limits or Limits()
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration reads."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:  # some sources share themselves out among workers, and others do not
            raise RequestError("streamed rows are read by the process that trains; use dataloader_num_workers 0")
        rows = encode_each(self._examples(self._epoch), tokenizer=self._tokenizer, limits=self._limits)
        return _cut((row for row, _ in rows), length=self._length)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Collates rows of one document each: filled on the right, nothing learnt there.

    Args:
        pad_id: fills rows.
        multiple_of: batches are as long as their longest row, rounded up to this.
        mask: whether the batch has an attention mask. Fill on the right changes nothing for the tokens before it, so
            a causal model gives the same loss without, and faster attention.
    """

    pad_id: int
    multiple_of: int = 1
    mask: bool = True

    def __call__(self, rows: Sequence[Row]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": _stack([row["input_ids"] for row in rows], length=length, fill=self.pad_id),
            "labels": _stack([row["labels"] for row in rows], length=length, fill=IGNORE),
        }
        if self.mask:
            batch["attention_mask"] = _stack([np.ones_like(row["input_ids"]) for row in rows], length=length, fill=0)
        return batch


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Collates rows of `pack`: no token sees another document.

    Args:
        pad_id: fills rows.
        length: tokens of every row; None for those of the longest.
        mask: the type of the 4-D mask: `torch.bool` for sdpa, or a floating type for eager attention, where
            `torch.float32` suits any model. None for no mask: then the model has to find the borders by
            `position_ids`, and has to be called with `use_cache=False`, as `Trainer` does.
    """

    pad_id: int
    length: int | None = None
    mask: torch.dtype | None = torch.bool

    @classmethod
    def suited_to(cls, config: PreTrainedConfig, *, pad_id: int, length: int | None = None) -> Packed:
        """The collator whose mask is right for a model.

        Args:
            config: the model's; its kind of attention and its sliding window count.
            pad_id: fills rows.
            length: tokens of every row; None for those of the longest.
        """
        attention = config._attn_implementation or "eager"
        mask: torch.dtype | None = None
        if getattr(config, "sliding_window", None) is None and attention in ("sdpa", "eager"):
            mask = torch.bool if attention == "sdpa" else torch.float32
        return cls(pad_id=pad_id, length=length, mask=mask)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        length = self.length or max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": _stack([row["input_ids"] for row in rows], length=length, fill=self.pad_id),
            "labels": _stack([row["labels"] for row in rows], length=length, fill=IGNORE),
            # Every token of the fill is a document of its own and sees itself: no row of the mask is empty.
            "position_ids": _stack([row["position_ids"] for row in rows], length=length, fill=0),
        }
        if self.mask is not None:
            batch["attention_mask"] = block_diagonal(batch["position_ids"], dtype=self.mask)
        return batch


def block_diagonal(position_ids: Tensor, *, dtype: torch.dtype = torch.bool) -> Tensor:
    """The causal mask of packed rows.

    Args:
        position_ids: [B, S]; a document begins where they are 0.
        dtype: `torch.bool` for True where a token (row) sees another (column); a floating type for 0 there and
            its lowest number elsewhere.

    Returns:
        [B, 1, S, S].

    Example:
        >>> block_diagonal(torch.tensor([[0, 1, 0]])).int().tolist()
        [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    document = (position_ids == 0).cumsum(-1)  # [B, S]
    size = position_ids.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=position_ids.device).tril()
    seen = (document[:, None, :, None] == document[:, None, None, :]) & causal  # [B, 1, S, S]
    if dtype is torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _fit(lengths: Sequence[int] | np.ndarray, *, length: int, how: Packing) -> list[list[int]]:
    """Which documents lie in which row."""
    packed: list[list[int]] = []
    room = np.zeros(max(len(lengths), 1), np.int64)
    first = 0  # rows before it have no room even for the shortest document
    shortest = min(lengths, default=0)
    for place, size in enumerate(lengths):
        if how == "sequential":
            first = max(len(packed) - 1, 0)
        while first < len(packed) and room[first] < shortest:
            first += 1
        open_rows = room[first : len(packed)] >= size
        row = first + int(open_rows.argmax()) if open_rows.any() else len(packed)
        if row == len(packed):
            packed.append([])
            room[row] = length
        packed[row].append(place)
        room[row] -= size
    return packed


def _joined(documents: Sequence[Row]) -> Row:
    labels = [document["labels"].copy() for document in documents]
    for each in labels:
        each[0] = IGNORE
    return {
        "input_ids": np.concatenate([document["input_ids"] for document in documents]),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(len(each), dtype=np.int32) for each in labels]),
    }


def _cut(rows: Iterable[Row], *, length: int) -> Iterator[Row]:
    waiting: list[Row] = []
    tokens = 0
    for row in rows:
        waiting.append(row)
        tokens += len(row["input_ids"])
        if tokens < length:
            continue
        joined = {name: np.concatenate([each[name] for each in waiting]) for name in ("input_ids", "labels")}
        whole = tokens - tokens % length
        for begin in range(0, whole, length):
            yield {name: values[begin : begin + length] for name, values in joined.items()}
        waiting, tokens = [{name: values[whole:] for name, values in joined.items()}], tokens - whole


def _stack(rows: Sequence[Ids], *, length: int, fill: int) -> Tensor:
    stacked = np.full((len(rows), length), fill, np.int64)
    for place, row in enumerate(rows):
        stacked[place, : len(row)] = row
    return torch.from_numpy(stacked)
