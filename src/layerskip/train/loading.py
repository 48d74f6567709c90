"""Models that a run begins from or compares with: transformers loads them, or one line says why it cannot."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from layerskip.errors import RequestError

CHOICE = "give a checkpoint folder, or the id of one on the hub"


def load_model(name: str, *, what: str = "", **how: Any) -> nn.Module:
    """A causal language model.

    Args:
        name: a folder or hub id.
        what: what it is for, in messages.
        how: further arguments of transformers' `from_pretrained`.

    Raises:
        RequestError: it cannot be loaded.
    """
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, **how)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"{what}{name} could not be loaded: {first_line(error)}; {CHOICE}") from error
    return model


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, KeyError):
        return f"nothing is called {error}"
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
