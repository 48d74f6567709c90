"""Text in, text out: `load` a checkpoint and generate with it."""

from __future__ import annotations

from pathlib import Path

import torch

from layerskip.errors import RequestError, suggest
from layerskip.llm.completion import Chunk, Completion, Stream
from layerskip.llm.model import LLM
from layerskip.llm.recommended import Recommended, recommend, recommended
from layerskip.llm.tokenizer import end_tokens, load_tokenizer
from layerskip.model import checkpoint
from layerskip.model.decoder import Decoder
from layerskip.model.pack import KERNELS, no_kernels
from layerskip.pretrained import embedded

__all__ = ["LLM", "Chunk", "Completion", "Recommended", "Stream", "load", "recommend"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    path_or_id: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    max_batch: int = 16,
    weights: str | None = None,
    compile: bool = False,
    row_invariant: bool = False,
) -> LLM:
    """Loads a Hugging Face checkpoint.

    Args:
        path_or_id: a folder, or a hub id; None is the checkpoint that comes with the package.
        dtype: element type to hold the weights in ("bfloat16" or `torch.bfloat16`); None is the checkpoint's own.
        device: None is "cuda" where there is one, else "cpu".
        revision: of a hub id.
        token: for private and gated hub models.
        max_batch: rows that decode side by side.
        weights: how they are stored: "plain", "packed" (for oneDNN on the CPU), "native" (for kernels of our own), or
            None for the fastest of them; they hold the checkpoint's numbers. "int8" and "int4" quantise them: a model
            of its own, whose text drafting does not change.
        compile: run plain weights as graphs of torch.compile, compiled as they are first needed: for devices and dtypes
            that the kernels do not serve.
        row_invariant: refuse weights with which a position's numbers depend on how many others share a pass. With the
            others, text with a drafter is that of plain decoding to the bit, in bfloat16 too.

    Raises:
        CheckpointError: it cannot be loaded; names the file and what is wrong with it.
        RequestError: unknown dtype, device or layout, or a layout that they do not allow.
    """
    kind, place = as_dtype(dtype), as_device(device)
    if compile:
        weights = _compilable(weights)
    folder = checkpoint.find(embedded() if path_or_id is None else path_or_id, revision=revision, token=token)
    decoder = checkpoint.load_decoder(folder, dtype=kind, device=place, weights=weights)
    if row_invariant and not decoder.row_invariant:
        raise RequestError(_varies(decoder))
    if compile:
        decoder.compile()
    tokenizer = load_tokenizer(folder)
    return LLM(
        decoder,
        tokenizer,
        eos=end_tokens(folder, tokenizer, vocab=decoder.shape.vocab),
        name=folder.name if path_or_id is None else str(path_or_id),
        max_batch=max_batch,
        recommended=recommended(folder),
    )


def _compilable(weights: str | None) -> str:
    if weights not in (None, "auto", "plain"):
        raise RequestError(f"{weights} weights are not compiled, only plain ones are; leave one of the two out")
    return "plain"


def _varies(decoder: Decoder) -> str:
    why = no_kernels(decoder.shape, decoder.dtype, decoder.device)
    return (
        f"{decoder.layout} weights are not row-invariant; use {', '.join(KERNELS)}"
        if why is None
        else f"{decoder.layout} weights are not row-invariant, and those that are cannot be here: {why}"
    )


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The element type a name means; None and "auto" are the checkpoint's own. Raises RequestError for others."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
    return DTYPES[dtype]


def as_device(device: torch.device | str | None) -> torch.device:
    """The device a name means; None and "auto" are a GPU where there is one. Raises RequestError for one that is not
    there."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device} is not here: torch sees no GPU; use cpu")
    if place.type == "meta":
        raise RequestError("device meta holds no numbers; use auto, cpu or cuda")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch was built without it, or there are fewer of them
        raise RequestError(
            f"device {device} is not here: {str(error).splitlines()[0]}; use auto, cpu or cuda"
        ) from error
    return place
