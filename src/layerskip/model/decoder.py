"""A Llama-family decoder that runs any span of its layers.

Tensors in, tensors out: knows layers, positions and the cache; knows nothing of drafting, sampling or text.
Sizes: B rows, T new positions, S cache slots, D width, V vocabulary; N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerskip.model.cache import Cache, RowIndex
from layerskip.model.compiled import Compiled
from layerskip.model.native.span import Native
from layerskip.model.pack import KERNELS, Fan, pack
from layerskip.model.quantise import Quantised, bits_of
from layerskip.model.rope import cos_sin
from layerskip.model.rows import FileRows
from layerskip.model.shape import Shape
from layerskip.model.stop import Ends

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Layer(nn.Module):
    """One pre-norm transformer layer: grouped-query attention with rotary positions, then a gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = shape
        self.shape, self.activation = s, ACTIVATIONS[s.activation]
        self.attention_norm = nn.RMSNorm(s.width, s.eps)
        shared = s.kv_heads * s.head_width
        sizes = {"query": s.heads * s.head_width, "key": shared, "value": shared}
        self.query_key_value = Fan(s.width, sizes, bias=s.query_key_value_bias)
        self.output = nn.Linear(s.heads * s.head_width, s.width, bias=s.output_bias)
        self.query_norm = nn.RMSNorm(s.head_width, s.eps) if s.query_key_norm else None
        self.key_norm = nn.RMSNorm(s.head_width, s.eps) if s.query_key_norm else None
        self.mlp_norm = nn.RMSNorm(s.width, s.eps)
        self.gate_up = Fan(s.width, {"gate": s.ffn_width, "up": s.ffn_width}, bias=s.mlp_bias)
        self.down = nn.Linear(s.ffn_width, s.width, bias=s.mlp_bias)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `remember` stores new keys and values (B, G, T, H) and returns all that is in use."""
        x = self.attention_norm(hidden)
        heads = (-1, self.shape.head_width)
        query, key, value = (part.unflatten(-1, heads) for part in self.query_key_value(x))  # (B, T, N, H)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query.transpose(1, 2), rotation), rotate(key.transpose(1, 2), rotation)
        keys, values = remember(key, value.transpose(1, 2))
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=self.shape.heads != self.shape.kv_heads
        )
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(hidden))
        out: Tensor = hidden + self.down(self.activation(gate) * up)
        return out


class Table(nn.Embedding):
    """An embedding left unfilled: a checkpoint fills it. (Drawing numbers on the meta device takes torch a second.)"""

    def reset_parameters(self) -> None:
        """Nothing to draw."""


class Decoder(nn.Module):
    """The model of a checkpoint: embedding, layers, the shared final norm and head.

    Every depth predicts through the same norm and head; which layers run is an argument of `run`, never a change of the
    model, so one decoder serves any number of exits, drafters and threads.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.layout = shape, "plain"  # of the weights, as `pack` calls it
        self._native: Native | None = None
        self.compiled: Compiled | None = None
        self.head_in_file: FileRows | None = None  # where the head as it is stored cannot be read
        self.embedding = Table(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.eps)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self._table: tuple[Tensor, Tensor] | None = None  # cos and sin of positions 0..n-1, (n, H)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weights."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def state_dtype(self) -> torch.dtype:
        """Element type of hidden states."""
        return self.dtype if self._native is None else torch.float32

    @property
    def quantised(self) -> bool:
        """Whether the weights are close to the checkpoint's rather than the same: a model of its own."""
        return bits_of(self.layout) is not None

    @property
    def row_invariant(self) -> bool:
        """Whether a position's numbers are the same bits however many others share its pass."""
        return self.layout in KERNELS

    def store(self, layout: str) -> None:
        """Stores the weights, all of them filled, in `layout`; layers may be stored already."""
        pack(self, layout)
        self.layout = layout
        if layout in KERNELS:
            self._native = Native(
                self.shape,
                layers=self.layers,
                norm=self.norm,
                head=self.get_submodule("head"),
                embedding=self.embedding,
                rotations=self._rotations,
            )

    def compile(self, *, backend: str = "inductor") -> None:
        """Runs spans and head as compiled graphs from now on; for plain weights.

        Args:
            backend: of torch.compile.
        """
        head = nn.Sequential(self.norm, self.head)
        self.compiled = Compiled(list(self.layers), self.shape.windows, head, device=self.device, backend=backend)

    def cache(self, *, rows: int, slots: int) -> Cache:
        """An empty cache for this model. Raises CapacityError where it does not fit."""
        doubling = self.compiled is not None
        return Cache(self.shape, rows=rows, slots=slots, dtype=self.dtype, device=self.device, doubling=doubling)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, T, D)."""
        out: Tensor = self.embedding(tokens)
        return out.to(self.dtype).to(self.state_dtype)  # a table that stayed in its file has the file's

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) at any depth -> (..., V), through the one shared norm and head."""
        return self.predict(hidden, self.head)

    def predict(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """Hidden states (..., D) -> (..., N) through the final norm and a head of N outputs, stored as the weights."""
        if self._native is not None:
            return self._native.logits(hidden, head)
        if self.compiled is not None and head is self.head and (found := self.compiled.logits(hidden)) is not None:
            return found
        out: Tensor = head(self.norm(hidden))
        return out

    def head_rows(self, tokens: Tensor) -> Tensor:
        """Rows (n, D) of the head's weight, for token ids (n,); where it is not in the order of the kernels."""
        head: nn.Module = self.head
        if isinstance(head, Quantised):
            return head.weight(tokens).to(self.dtype)
        return self.head.weight[tokens] if self.head_in_file is None else self.head_in_file.take(tokens).to(self.dtype)

    def run(
        self,
        hidden: Tensor,
        at: Tensor,
        cache: Cache,
        first: int = 0,
        last: int | None = None,
        *,
        rows: RowIndex | None = None,
        slots: Tensor | None = None,
        mask: Tensor | None = None,
        limit: int | None = None,
    ) -> Tensor:
        """Carries hidden states through layers first..last-1, writing their keys and values as it goes.

        Args:
            hidden: (B, T, D), what layer `first` takes: embeddings for 0, else the states that an earlier span
                returned.
            at: (B, T) positions. Positions past the cache are padding: they are written to a spare slot that nobody
                reads.
            cache: the keys and values of these rows.
            first: first layer of the span.
            last: one past its last layer; None is all layers.
            rows: the B rows of the cache; None is its first B.
            slots: (B, T) slots to write; None is `at`. The nodes of a tree need slots apart from their positions.
            mask: (B, T, limit) bool, the slots each new position sees, itself included; None is slots 0..at. Sliding
                windows are applied on top.
            limit: attention reads slots 0..limit-1; None is just past the largest slot written. Pass it where the
                caller knows it: finding it waits for the device.

        Returns:
            (B, T, D), the state after layer last-1.
        """
        rows = slice(0, hidden.shape[0]) if rows is None else rows
        last = self.shape.layers if last is None else last
        if mask is not None:
            limit = mask.shape[-1]
        elif limit is None:
            limit = int((at if slots is None else slots).max()) + 1
        limit = min(limit, cache.slots)
        if any(self.shape.windows):
            cache.place(rows, (at if slots is None else slots).clamp(max=cache.slots), at.clamp(max=cache.slots))
        if self._native is not None:
            return self._native.run(hidden, at, cache, first, last, rows=rows, slots=slots, mask=mask, limit=limit)
        at = at.clamp(max=cache.slots)
        slots = at if slots is None else slots.clamp(max=cache.slots)
        cos, sin = self._rotations(cache.slots + 1)
        if self.compiled is not None:
            found = self.compiled.run(
                hidden,
                at,
                slots,
                cache,
                first,
                last,
                rows=rows,
                limit=limit,
                mask=mask,
                rotations=(cos, sin),
                scores=partial(self._mask, cache),
            )
            if found is not None:
                return found
        rotation = cos[at][:, None], sin[at][:, None]  # (B, 1, T, H)
        masks = {w: self._mask(cache, at, rows, mask, limit, w) for w in set(self.shape.windows)}

        for i in range(first, last):

            def remember(key: Tensor, value: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                cache.write(i, rows, slots, key, value)
                return cache.read(i, rows, limit)

            hidden = self.layers[i](hidden, rotation, masks[self.shape.windows[i]], remember)
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
        ends: Ends | None = None,
        head: nn.Module | None = None,
        names: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after the given ones, one after the other, as the first layers and the head see them.

        Args:
            tokens: (B, 1) the last known tokens, not yet run.
            at: (B, 1) their positions.
            cache: as in `run`.
            exit: layers 0..exit-1 run.
            count: K, tokens to draft at most.
            rows: as in `run`.
            limit: as in `run`, for the given tokens.
            ends: where the draft ends, by how sure it is of its tokens; asking takes a softmax over the vocabulary.
            head: as in `predict`; None is the model's own.
            names: (N,) the token that each output of `head` means; None where they are the tokens.

        Returns:
            (B, K) the tokens, and (B, K + 1, D) the states after layer exit-1 of the given ones and of all
            drafted ones.
        """
        head = self.head if head is None else head
        if self._native is not None and self._native.drafts:
            if any(self.shape.windows):
                steps = (at + torch.arange(count + 1)).clamp(max=cache.slots)
                cache.place(rows, steps, steps)
            limit = min(limit, cache.slots)
            return self._native.draft(
                tokens, at, cache, exit, count, rows=rows, limit=limit, ends=ends, head=head, names=names
            )
        states = list[Tensor]()
        while True:
            i = len(states)
            states.append(self.run(self.embed(tokens[:, -1:]), at + i, cache, 0, exit, rows=rows, limit=limit + i))
            if i == count:
                break
            logits = self.predict(states[-1], head)
            best = logits.argmax(-1)
            tokens = torch.cat((tokens, best if names is None else names[best]), 1)
            if ends is not None and ends(largest_probability(logits)):
                count = i + 1
        return tokens[:, 1:], torch.cat(states, 1)

    def _rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, H) of positions 0..n-1, n at least `positions`."""
        table = self._table  # read once: another thread may put a table of its own in its place
        if table is None or table[0].shape[0] < positions or table[0].dtype != self.state_dtype:
            steps = torch.arange(positions, device=self.device)
            cos, sin = cos_sin(self.shape.rope, self.shape.head_width, steps)
            self._table = table = cos.to(self.state_dtype).contiguous(), sin.to(self.state_dtype).contiguous()
        return table

    def _mask(
        self, cache: Cache, at: Tensor, rows: RowIndex, mask: Tensor | None, limit: int, window: int | None
    ) -> Tensor | None:
        """What is added to the attention scores, (B, 1, T, limit): 0 where seen, -inf elsewhere; None where all is
        seen."""
        if mask is None:
            if at.numel() == 1 and at.device.type == "cpu" and window is None and int(at) == limit - 1:
                return None
            mask = torch.arange(limit, device=at.device) <= at[..., None]
        if window is not None:
            mask = mask & (cache.positions[rows, None, :limit] > at[..., None] - window)
        return torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]


def largest_probability(logits: Tensor) -> list[float]:
    """Of each row (B, 1, V)."""
    found: list[float] = logits[:, 0].float().softmax(-1).amax(-1).tolist()
    return found


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x (B, heads, T, H), halves paired as Llama checkpoints store
    them."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
