"""Finding where numbers went wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerskip.decode.prefill import CHUNK
from layerskip.errors import NumericalError
from layerskip.model.decoder import Decoder


def diagnose(decoder: Decoder, ids: Sequence[int], *, depth: int) -> NumericalError:
    """Names the first layer after which the states of `ids` are no longer finite, by running them layer by layer."""
    cache = decoder.cache(rows=1, slots=len(ids))
    at = torch.arange(len(ids), device=decoder.device)[None]
    hidden = decoder.embed(torch.tensor([list(ids)], device=decoder.device))
    place = "the embedding"
    for layer in range(-1, depth):
        if layer >= 0:
            pieces = zip(hidden.split(CHUNK, 1), at.split(CHUNK, 1), strict=True)
            hidden = torch.cat([decoder.run(h, p, cache, layer, layer + 1) for h, p in pieces], 1)
            place = f"layer {layer} (of 0..{decoder.shape.layers - 1})"
        if not bool(hidden.isfinite().all()):
            position = int((~hidden.isfinite().all(-1))[0].nonzero()[0])
            return NumericalError(
                f"the model's states are not finite from {place} on, at position {position} of {len(ids)}; "
                "check the checkpoint's weights, or load it with a wider dtype"
            )
    return NumericalError(
        f"the model's logits are not finite though its states after {depth} layers are; "
        "check the final norm and the head, or load it with a wider dtype"
    )
