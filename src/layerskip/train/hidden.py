"""Hidden dropout: numbers of the embeddings, and of what attention and feed-forward add to the states, set to zero.

For families that have no such setting of their own (Llama, Mistral, Qwen): a model that sees few rows often learns them
by heart without it. Rates, not rows: layer dropout is in `dropout`. Nothing is added to the model's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerskip.errors import RequestError
from layerskip.train.parts import parts, unwrap


class HiddenDropout:
    """Dropout where the states are added to (Srivastava et al., JMLR 2014; Vaswani et al., NeurIPS 2017, section 5.4).

    Drawn from torch's own generator, as attention dropout is, so that a checkpoint's random state resumes it.

    Args:
        model: a transformers causal language model, plain or wrapped.
        rate: chance of a number to be zero, in [0, 1); the others grow by 1 / (1 - rate). 0 installs nothing.

    Raises:
        RequestError: a rate out of range, or layers that are not one attention and one feed-forward module: their
            family has dropout settings of its own.
    """

    def __init__(self, model: nn.Module, *, rate: float) -> None:
        if not 0 <= rate < 1:
            raise RequestError(f"hidden_dropout {rate} is not possible; use a number from 0 and below 1")
        self.rate = rate
        self._places = _places(model) if rate else []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> HiddenDropout:
        self._hooks = [place.register_forward_hook(self._drop) for place in self._places]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _drop(self, module: nn.Module, _: object, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        dropped = F.dropout(states, self.rate, training=module.training)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped


def _places(model: nn.Module) -> list[nn.Module]:
    """The embedding of tokens, and of every layer the two modules whose outputs are added to its input."""
    found = parts(model)
    places = [unwrap(model).get_input_embeddings()]
    for layer in found.layers:
        added = [child for child in layer.children() if any(part.weight.dim() > 1 for part in _weighted(child))]
        if len(added) != 2 or any(isinstance(child, nn.Linear) for child in added):
            raise RequestError(
                f"{type(layer).__name__} is not one attention and one feed-forward module, so hidden_dropout finds no "
                "place; use the dropout settings of its own configuration in architecture"
            )
        places += added
    return places


def _weighted(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(getattr(part, "weight", None), Tensor)]
