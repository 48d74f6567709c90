"""What counts as a prompt: a text, token ids, or a list of such; and what is refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    if prompt and not all(isinstance(one, str | Sequence) or hasattr(one, "__index__") for one in prompt):
        raise RequestError("the prompt is a list of neither texts nor token ids; give texts, or whole numbers")
    return prompt


def is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (a text, or token ids) rather than a list of prompts."""
    return isinstance(prompt, str) or (len(prompt) > 0 and hasattr(prompt[0], "__index__"))
