"""Hands a decoder's weights, and the positions to run, to the kernels.

Knows the kernels' structs and what lies where in memory; knows no arithmetic. States are float32 here, whatever the
weights are: between a span and the next nothing is rounded. B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, addressof, byref, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from layerskip.model.cache import Cache, RowIndex
from layerskip.model.native.blocks import Blocks
from layerskip.model.native.build import library
from layerskip.model.shape import Shape
from layerskip.model.stop import Ends

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
QUANTISED = {None: 0, 8: 2, 4: 4}  # on top, by the bits of a weight; then FORMATS is that of the cache
WIDEST_HEAD = 128
ACTIVATIONS = {"silu": 0, "swish": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3}


def _struct(name: str, **fields: type) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(fields.items())})


_LINEAR = _struct("Linear", weight=c_void_p, bias=c_void_p, inputs=c_int32, outputs=c_int32)
_TABLE = _struct("Table", numbers=c_void_p, format=c_int32)
_LAYER = _struct(
    "Layer",
    **dict.fromkeys(("query_key_value", "output", "gate_up", "down"), _LINEAR),
    **dict.fromkeys(("attention_norm", "mlp_norm", "query_norm", "key_norm"), c_void_p),
    window=c_int64,
)
_SIZES = ("format", "activation", "width", "heads", "kv_heads", "head_width", "ffn_width", "vocab")
_MODEL = _struct("Model", **dict.fromkeys(_SIZES, c_int32), eps=c_float)
_CALL = _struct(
    "Call",
    **dict.fromkeys(("rows", "positions", "limit", "threads"), c_int32),
    first_row=c_int64,
    **dict.fromkeys(("row", "at", "slots"), c_void_p),
    spare=c_int64,
    **dict.fromkeys(("cosines", "sines", "mask", "placed"), c_void_p),
)

_STOP = _struct("Stop", edges=c_void_p, factors=c_void_p, count=c_int32, least=c_double)


class Native:
    """A decoder's layers and head, run by the kernels.

    Args:
        shape: sizes of the model.
        layers: its layers, their linear layers as `Blocks`.
        norm: the final norm.
        head: the head.
        embedding: its table (V, D). A tied one is exchanged for its file's later, so that it is not held twice.
        rotations: positions -> cosines and sines (at least so many, H), float32.

    Raises:
        Unavailable: the kernels cannot be built here.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        layers: nn.ModuleList,
        norm: nn.RMSNorm,
        head: nn.Module,
        embedding: nn.Embedding,
        rotations: Callable[[int], tuple[Tensor, Tensor]],
    ) -> None:
        self._library, self._shape, self._rotations = library(), shape, rotations
        self._kept: list[Tensor] = []  # what the structs point to
        s = shape
        sizes = (s.width, s.heads, s.kv_heads, s.head_width, s.ffn_width, s.vocab)
        assert isinstance(head, Blocks)
        form = FORMATS[norm.weight.dtype] + QUANTISED[head.bits]
        self._model = _MODEL(form, ACTIVATIONS[s.activation], *sizes, s.eps)
        self._layers = (_LAYER * s.layers)(*map(self._layer, layers, s.windows))
        self._norm = self._numbers(norm.weight)
        self._embedding, self._dtype = embedding, norm.weight.dtype

    def run(
        self,
        hidden: Tensor,
        at: Tensor,
        cache: Cache,
        first: int,
        last: int,
        *,
        rows: RowIndex,
        slots: Tensor | None,
        mask: Tensor | None,
        limit: int,
    ) -> Tensor:
        """As `Decoder.run`. Positions and slots past the cache are padding; the kernels find them."""
        hidden = hidden.clone(memory_format=torch.contiguous_format).float()
        at = _laid(at, hidden.shape[:2], torch.long)
        with self._call(at, cache, rows=rows, slots=slots, mask=mask, limit=limit) as call:
            self._library.layerskip_span(
                byref(self._model), self._layers, first, last, c_void_p(hidden.data_ptr()), call, *cache.addresses()
            )
        return hidden

    def draft(
        self,
        tokens: Tensor,
        at: Tensor,
        cache: Cache,
        exit: int,
        count: int,
        *,
        rows: RowIndex,
        limit: int,
        ends: Ends | None,
        head: nn.Module,
        names: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.draft`."""
        model, linear = self._predicting(head)
        drafted = torch.empty(count + 1, tokens.shape[0], dtype=torch.long)
        drafted[0] = tokens[:, 0]
        states = torch.empty(count + 1, tokens.shape[0], self._shape.width, dtype=torch.float32)
        sure = torch.empty(count if ends is not None else 0, tokens.shape[0], dtype=torch.float32)
        with self._call(at, cache, rows=rows, slots=None, mask=None, limit=limit) as call, _stop(ends) as stop:
            done = self._library.layerskip_draft(
                byref(self._model),
                self._layers,
                exit,
                byref(model),
                byref(linear),
                c_void_p(_address(names)),
                c_void_p(self._norm),
                byref(_TABLE(self._embedding.weight.data_ptr(), FORMATS[self._embedding.weight.dtype])),
                call,
                *cache.addresses(),
                count,
                stop,
                c_void_p(drafted.data_ptr()),
                c_void_p(states.data_ptr()),
                c_void_p(sure.data_ptr()),
            )
        if ends is not None:
            for confidence in sure[:done].tolist():
                ends(confidence)
        return drafted[1 : done + 1].T, states[: done + 1].transpose(0, 1)

    @contextmanager
    def _call(
        self, at: Tensor, cache: Cache, *, rows: RowIndex, slots: Tensor | None, mask: Tensor | None, limit: int
    ) -> Iterator[Any]:
        """Where the positions of a call are; what it points to lives as long as the context."""
        if cache.dtype != self._dtype or cache.device.type != "cpu":
            raise TypeError(f"native weights of {self._dtype} were given a cache of {cache.dtype} on {cache.device}")
        at = _laid(at, at.shape, torch.long)
        slots = None if slots is None else _laid(slots, at.shape, torch.long)
        mask = None if mask is None else _laid(mask, (*at.shape, limit), torch.bool)
        cosines, sines = self._rotations(cache.slots + 1)
        start, index = _rows(rows, len(at), cache)
        call = _CALL(
            *at.shape,
            limit,
            torch.get_num_threads(),
            start,
            _address(index),
            at.data_ptr(),
            _address(slots),
            cache.slots,
            cosines.data_ptr(),
            sines.data_ptr(),
            _address(mask),
            cache.positions.data_ptr(),
        )
        yield byref(call)

    @property
    def drafts(self) -> bool:
        """Whether the kernels can look tokens up: a tied embedding keeps the dtype of its file, maybe float16."""
        table = self._embedding.weight
        return table.dtype in FORMATS and table.is_contiguous()

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """(..., D) -> (..., outputs of `head`) float32, through the final norm."""
        hidden = hidden.float().contiguous()
        model, linear = self._predicting(head)
        out = hidden.new_empty(*hidden.shape[:-1], model.vocab)
        self._library.layerskip_predict(
            byref(model),
            byref(linear),
            c_void_p(self._norm),
            c_void_p(hidden.data_ptr()),
            hidden.numel() // hidden.shape[-1],
            c_void_p(out.data_ptr()),
            torch.get_num_threads(),
        )
        return out

    def _predicting(self, head: nn.Module) -> tuple[Any, Structure]:
        """A model that predicts by this head, and the head: it may be of fewer tokens, or of fewer bits."""
        assert isinstance(head, Blocks)
        model: Any = _MODEL.from_buffer_copy(self._model)
        model.vocab, model.format = head.rows, FORMATS[self._dtype] + QUANTISED[head.bits]
        return model, _LINEAR(head.weight.data_ptr(), None, head.inputs, head.outputs)

    def _layer(self, layer: nn.Module, window: int | None) -> Structure:
        linears = [self._linear(getattr(layer, name)) for name in ("query_key_value", "output", "gate_up", "down")]
        norms = [getattr(layer, name) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")]
        weights = [None if norm is None else self._numbers(norm.weight) for norm in norms]
        return _LAYER(*linears, *weights, window or 0)

    def _linear(self, blocks: Blocks) -> Structure:
        self._kept.append(blocks.weight)
        bias = None if blocks.bias is None else self._numbers(blocks.bias)
        return _LINEAR(blocks.weight.data_ptr(), bias, blocks.inputs, blocks.outputs)

    def _numbers(self, tensor: Tensor) -> int:
        """The address of the same numbers as float32."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()


@contextmanager
def _stop(ends: Ends | None) -> Iterator[Any]:
    """Where a draft ends, as long as the context."""
    if ends is None:
        yield None
        return
    edges, factors = ((c_double * len(numbers))(*numbers) for numbers in (ends.rule.edges, ends.rule.factors))
    yield byref(_STOP(addressof(edges), addressof(factors), len(edges), ends.rule.least))


def _rows(rows: RowIndex, count: int, cache: Cache) -> tuple[int, Tensor | None]:
    """The first of `count` rows that follow one another, or 0 and all of them."""
    numbers = range(*rows.indices(cache.rows)) if isinstance(rows, slice) else rows.tolist()
    if len(numbers) != count or (count and (min(numbers) < 0 or max(numbers) >= cache.rows)):
        raise IndexError(f"{count} rows of states were given rows {rows} of a cache that has {cache.rows}")
    if isinstance(numbers, range) and numbers.step == 1:
        return numbers.start, None
    return 0, torch.tensor(numbers, dtype=torch.long, device="cpu")


def _laid(tensor: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As the kernels read it: they trust sizes and types."""
    if tensor.shape != size or tensor.dtype != dtype:
        tensor = tensor.expand(size).to(dtype)
    return tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
