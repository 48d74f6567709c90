"""The tokens of prompts, checked before anything runs. Knows texts and the model's context."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.errors import RequestError
from layerskip.llm import LLM
from layerskip.llm.prompts import Prompt


def encode_prompts(llm: LLM, prompts: Sequence[Prompt], *, called: str = "prompt", of: str = "") -> list[list[int]]:
    """Every prompt's tokens.

    Args:
        llm: the model.
        prompts: texts or token ids.
        called: what messages call one.
        of: what they are prompts of, for messages.

    Raises:
        RequestError: there are none, or one will not do: says which.
    """
    if not prompts:
        raise RequestError(f"no {called}s; give at least one")
    found = []
    context = llm.decoder.shape.context
    for number, prompt in enumerate(prompts, 1):
        where = f"{called} {number} of {len(prompts)}" + (f" of {of}" if of else "")
        try:
            found.append(llm.encode(prompt))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from error
        if len(found[-1]) >= context:
            raise RequestError(
                f"{where}: the prompt has {len(found[-1])} tokens; this model's context holds {context}, "
                f"so use at most {context - 1}"
            )
    return found
