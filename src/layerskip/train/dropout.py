"""Layer dropout on a model: how the rows that `rates` drops leave a layer's computation.

x_{l+1} = x_l + M f_l(x_l), where M is 0 for a dropped row; f_l is the whole layer, and nothing is rescaled by 1/(1-p)
(LayerSkip, Elhoushi et al., ACL 2024, section 4.1.1). Knows a decoder's layers and the key of a draw; knows no loss, no
trainer and no process group. Sizes: L layers, B rows, T positions, D width.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache

from layerskip.errors import RequestError
from layerskip.train.parts import parts
from layerskip.train.rates import dropped_rows, rates


class LayerDropout:
    """Layer dropout on the layers of a transformers causal language model.

    In training, the rows dropped at a layer leave the batch: every argument with one entry per row (masks, position
    ids, position embeddings; inside tuples too) loses theirs, the layer runs on the rest, and its output is put back
    among the untouched rows. Where all rows drop, one runs and counts with weight zero, so that every parameter keeps a
    gradient (FSDP and DDP wait for it). In evaluation, and where the rate is 0, a layer is called as if this did not
    exist. Gradients of gradients cannot be taken.

    It replaces `layer.forward` on the instances: parameters, state dict keys and module hooks stay, and activation
    checkpointing recomputes inside, on the rows that were kept. A layer whose rate is above 0 never fills a cache: the
    empty one transformers makes by default is withheld from it, one with content is an error. What a layer returns
    beside the hidden states covers the kept rows only.

    Args:
        model: as for `parts`; wrapped before or after `install`, by DDP, FSDP2 or PEFT.
        p_max: the last layer's rate, in [0, 1).
        depth: how the rate rises over the layers, one of `rates.DEPTHS`.
        time: how it rises over the run, one of `rates.TIMES`.
        seed: 0 or more; the same on every rank.
        rank: data-parallel rank.

    Raises:
        RequestError: a setting out of range, or a model whose layers are not found or that drops layers itself.

    Example:
        with LayerDropout(model, p_max=0.1) as dropout:
            for step, batch in enumerate(batches):
                dropout.begin(step=step, micro_step=0, total_steps=len(batches))
                model(**batch).loss.backward()
                ...
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        p_max: float,
        depth: str = "exponential",
        time: str = "constant",
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        found = parts(model)
        own = getattr(found.body, "layerdrop", 0.0)  # OPT
        if own:
            raise RequestError(
                f"{type(found.body).__name__} drops whole layers itself (layerdrop {own}); load it with layerdrop=0"
            )
        if seed < 0 or rank < 0:
            raise RequestError(f"seed {seed} and rank {rank} are not possible together; use 0 or more for both")
        rates(len(found.layers), p_max=p_max, depth=depth, time=time)  # checked now, not at the first step
        self.p_max, self.depth, self.time, self.seed, self.rank = p_max, depth, time, seed, rank
        self._layers = tuple(found.layers)
        self._installed = False
        self._rates: tuple[float, ...] | None = None  # None: the step is not known yet
        self._step = self._micro_step = 0
        self._drawn: dict[tuple[int, torch.device], list[_Leaving | None]] = {}  # by rows and device
        self._counted: set[int] = set()
        self._seen, self._dropped = [0] * len(self._layers), [0] * len(self._layers)

    def install(self) -> LayerDropout:
        """Wraps every layer's forward, and returns self.

        Raises:
            RequestError: a layer's forward was replaced already (another LayerDropout, accelerate's device hooks).
        """
        for index, layer in enumerate(self._layers):
            if "forward" in layer.__dict__:
                raise RequestError(
                    f"layer {index} has a replaced forward already; remove the other LayerDropout or device hooks first"
                )
        for index, layer in enumerate(self._layers):
            # a partial of a method, not a closure: a deep copy of the model gets a dropout of its own
            layer.forward = functools.partial(self._forward, index, layer)
        self._installed = True
        return self

    def remove(self) -> None:
        """Leaves the layers as they were before `install`; does nothing where it is not installed.

        Raises:
            RequestError: somebody wrapped a layer's forward after us.
        """
        if not self._installed:
            return
        for index, layer in enumerate(self._layers):
            if not self._is_mine(layer.__dict__.get("forward")):
                raise RequestError(f"the forward of layer {index} was replaced after install; undo that before remove")
        for layer in self._layers:
            del layer.__dict__["forward"]
        self._installed = False

    def __enter__(self) -> LayerDropout:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def begin(self, *, step: int, micro_step: int, total_steps: int) -> None:
        """Says which forward pass comes next; call it after the backward pass of the one before.

        Draws stay as they are until then, so that whatever is recomputed draws the same.

        Args:
            step: optimizer steps done, 0..total_steps-1.
            micro_step: accumulated batches done inside the step.
            total_steps: T.

        Raises:
            RequestError: a step outside the run, or a negative micro-step.
        """
        if micro_step < 0:
            raise RequestError(f"micro-step {micro_step} is not possible; use 0 or more")
        self._rates = rates(
            len(self._layers), p_max=self.p_max, depth=self.depth, time=self.time, step=step, total_steps=total_steps
        )
        self._step, self._micro_step = step, micro_step
        self._counted.clear()
        self._drawn.clear()

    def observed(self) -> tuple[tuple[int, int], ...]:
        """(rows seen, rows dropped) of every layer since this was last called; all zeros where p_max is 0."""
        counts = tuple(zip(self._seen, self._dropped, strict=True))
        self._seen, self._dropped = [0] * len(self._layers), [0] * len(self._layers)
        return counts

    def _is_mine(self, forward: object) -> bool:
        return isinstance(forward, functools.partial) and forward.func == self._forward

    # torch.compile: the layer inside is compiled, for any number of rows; what is around it, and the draw, is not.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _forward(self, index: int, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        # Looked up at every call: FSDP2 swaps the class, and a forward kept from before would not checkpoint.
        forward = functools.partial(type(layer).forward, layer)
        if not layer.training or not self.p_max:
            return forward(*args, **kwargs)
        if self._rates is None:
            raise RequestError(
                "layer dropout does not know its step; call begin(step=..., micro_step=..., total_steps=...) before "
                "each forward pass in training"
            )
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        leaving = self._draw(index, hidden)
        if not self._rates[index]:
            return forward(*args, **kwargs)
        taken, rest = (hidden, hidden) if leaving is None else _take_out(hidden, leaving)
        chosen = None if leaving is None else leaving.chosen
        take = functools.partial(_take, layer=index, rows=hidden.shape[0], chosen=chosen)
        output = forward(
            *(taken if value is hidden else take(value, f"argument {place}") for place, value in enumerate(args)),
            **{name: taken if value is hidden else take(value, name) for name, value in kwargs.items()},
        )
        if leaving is None:
            return output
        if isinstance(output, tuple):
            return (_put_back(rest, output[0], leaving), *output[1:])
        return _put_back(rest, output, leaving)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _draw(self, index: int, hidden: Tensor) -> _Leaving | None:
        """The rows that leave this layer; counted once for each `begin`, however often a layer is recomputed."""
        if hidden.dim() != 3:
            raise RequestError(
                f"layer {index} got hidden states of {hidden.dim()} dimensions; use (rows, positions, width)"
            )
        rows, key = hidden.shape[0], (hidden.shape[0], hidden.device)
        if key not in self._drawn:
            self._drawn[key] = self._draw_all(rows, hidden.device)
        leaving = self._drawn[key][index]
        if index not in self._counted:
            self._counted.add(index)
            self._seen[index] += rows
            self._dropped[index] += 0 if leaving is None else len(leaving.dropped)
        return leaving

    def _draw_all(self, rows: int, device: torch.device) -> list[_Leaving | None]:
        """Of every layer, in one go: amid a layer's products the same lines take seven times as long."""
        assert self._rates is not None
        key = {"seed": self.seed, "step": self._step, "micro_step": self._micro_step, "rank": self.rank}
        drawn = (dropped_rows(rate, rows, **key, layer=index) if rate else [] for index, rate in enumerate(self._rates))
        return [_Leaving.of(dropped, rows, device) if dropped else None for dropped in drawn]


@dataclass(frozen=True)
class _Leaving:
    """Which rows leave a layer, and which it computes: all others, or row 0 where none is left.

    Args:
        dropped: rows that leave, in order.
        chosen: rows that are computed, in order.
        runs: what the batch consists of: whether of computed rows, and from which to which of them or of all.
    """

    dropped: list[int]
    chosen: Tensor
    runs: list[tuple[bool, int, int]]

    @classmethod
    def of(cls, dropped: list[int], rows: int, device: torch.device) -> _Leaving:
        kept = sorted(set(range(rows)) - set(dropped))
        runs, place = [], 0  # of the kept ones
        for gone, run in itertools.groupby(range(rows), key=set(dropped).__contains__):
            these = list(run)
            first = these[0] if gone else place
            runs.append((not gone, first, first + len(these)))
            place += 0 if gone else len(these)
        # non_blocking: the host need not wait for the device
        return cls(dropped, torch.tensor(kept or [0]).to(device, non_blocking=True), runs)

    @property
    def none_counts(self) -> bool:
        """Whether all rows leave, and row 0 is computed for the sake of its gradients."""
        return not any(ours for ours, _, _ in self.runs)

    def together(self, kept: Tensor, rest: Tensor) -> Tensor:
        """The dropped rows of `rest` (B, T, D), and between them those of `kept` in order."""
        return torch.cat([(kept if ours else rest)[first:last] for ours, first, last in self.runs])


def _take(value: Any, name: str, *, layer: int, rows: int, chosen: Tensor | None) -> Any:
    """An argument of a layer, for the chosen rows only; all of it where `chosen` is None.

    Raises:
        RequestError: it cannot be told which part of it belongs to which row, or it is a cache with content. Raised
            whether or not a row drops now, so that it does not take an unlucky draw to find out.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Cache):
        if value.get_seq_length(layer):
            raise RequestError(
                f"layer {layer} got a cache with content in training ({name}); pass an empty one, or use_cache=False"
            )
        return None
    if isinstance(value, tuple | list):
        return type(value)([_take(part, name, layer=layer, rows=rows, chosen=chosen) for part in value])
    if rows == 1:  # the one row runs, whatever is drawn
        return value
    if not isinstance(value, Tensor):
        given = f"a {type(value).__name__}"  # a BlockMask of flex attention
    elif value.dim() == 0 or value.shape[0] == 1:
        return value
    elif value.dim() > 1 and value.shape[0] == rows:
        if chosen is None:
            return value
        # what is expanded over the rows (a mask without padding) stays so, instead of being copied for each
        return value[: len(chosen)] if value.stride(0) == 0 else value.index_select(0, chosen)
    else:  # one dimension: positions (cu_seq_lens of flash attention), of which there can be as many as rows
        given = f"a tensor of shape {tuple(value.shape)}"
    raise RequestError(
        f"layer dropout cannot take rows out of {name}, {given}, in a batch of {rows}; "
        f"use attn_implementation 'sdpa' or 'eager', and arguments of shape ({rows} or 1, ...)"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _take_out(hidden: Tensor, leaving: _Leaving) -> tuple[Tensor, Tensor]:
    """The chosen rows of `hidden` (B, T, D), and `hidden` itself to put them back into."""
    taken, rest = _TakeOut.apply(hidden, leaving)  # type: ignore[no-untyped-call]
    return taken, rest


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _put_back(rest: Tensor, output: Tensor, leaving: _Leaving) -> Tensor:
    """`rest` (B, T, D) with the rows that are not dropped replaced by `output` (n, T, D), in the dtype the layer gives.

    Where all rows are dropped, `output` (row 0) does not count: it gets a gradient of exact zeros, and no value of it,
    infinite or NaN, reaches the result.
    """
    together: Tensor = _PutBack.apply(rest.to(output.dtype), output, leaving)  # type: ignore[no-untyped-call]
    return together


class _TakeOut(torch.autograd.Function):
    """One pass over the rows each way, here and in `_PutBack`.

    Of `index_select` and `index_copy` the backward passes fill whole batches with zeros and add them up: twice the
    memory traffic, which for a narrow model is a good part of what dropping rows saves (docs/training.md).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaving: _Leaving) -> tuple[Tensor, Tensor]:
        ctx.leaving = leaving
        return hidden.index_select(0, leaving.chosen), hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, taken: Tensor, rest: Tensor) -> tuple[Tensor, None]:
        return ctx.leaving.together(taken, rest), None  # the gradient of rest's other rows is of no use


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Tensor, output: Tensor, leaving: _Leaving) -> Tensor:
        ctx.leaving = leaving
        return leaving.together(output, rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, Tensor, None]:
        leaving = ctx.leaving
        # `rest` gets all of it: `_TakeOut` looks at the dropped rows alone
        return (
            whole,
            torch.zeros_like(whole[:1]) if leaving.none_counts else whole.index_select(0, leaving.chosen),
            None,
        )
