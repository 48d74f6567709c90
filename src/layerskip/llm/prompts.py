"""What counts as a prompt: a text, token ids, or a list of such; and what is refused with a reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from layerskip.errors import RequestError

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""


def plain(prompt: Any) -> Any:
    """A prompt or several as texts and lists of ids: tensors and arrays become lists.

    Raises:
        RequestError: what a tokenizer returns whole, or something that is neither text nor ids.
    """
    if isinstance(prompt, Mapping):
        raise RequestError('the prompt is a mapping, as tokenizers return; give the text, or its ["input_ids"]')
    if hasattr(prompt, "tolist"):  # tensors and arrays of any library
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise RequestError(f"the prompt is a {type(prompt).__name__}; give a text, token ids, or a list of such")
    parts = [one.tolist() if hasattr(one, "tolist") else one for one in prompt]
    if not (all(hasattr(one, "__index__") for one in parts) or all(isinstance(one, Sequence) for one in parts)):
        raise RequestError("the prompt is a list of neither texts nor token ids; give texts, or whole numbers")
    return parts


def stop_strings(stop: Any) -> list[str]:
    """The texts that end a completion: none, one or several.

    Raises:
        RequestError: something that is not text.
    """
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, Collection) or not all(isinstance(one, str) for one in stops):
        raise RequestError(f"stop {stop!r} is not possible; use a text, or a list of texts")
    return list(stops)


def is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (a text, or token ids) rather than a list of prompts."""
    return isinstance(prompt, str) or (len(prompt) > 0 and hasattr(prompt[0], "__index__"))
