"""What a task of lm-evaluation-harness asks of generation, in this package's words.

Knows the names of `generation_kwargs`. Does not know models or texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from layerskip.decode.sampling import Sampling
from layerskip.errors import RequestError

MAX_TOKENS = 256
"""Tokens generated where a task does not say: the harness's own number for transformers models."""

_LAW = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# asked for by tasks of the harness, and of no effect at these values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True, False),
    "length_penalty": (1, None),
    "pad_token_id": (None,),
}


@dataclass(frozen=True)
class Generation:
    """How a text is generated.

    Args:
        stops: strings that end it, left out of it.
        max_tokens: its tokens at most.
        sampling: how tokens are chosen; without a seed.
    """

    stops: tuple[str, ...]
    max_tokens: int
    sampling: Sampling


def read_settings(asked: Mapping[str, Any]) -> Generation:
    """Reads `generation_kwargs` as the harness means them: without `do_sample` or a temperature it is greedy, and then
    settings of sampling have no effect.

    Raises:
        RequestError: a setting that this package does not have, or a value out of its range.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), MAX_TOKENS))
    stops, max_tokens = settings.pop("until"), settings.pop("max_gen_toks")
    sampled = settings.pop("do_sample")
    law = {name: settings.pop(name) for name in _LAW if name in settings}
    for name, value in settings.items():
        if value not in _NEUTRAL.get(name, ()):
            raise RequestError(
                f"a task asks for generation with {name}={value!r}, which layerskip does not do; "
                f"it knows until, max_gen_toks, do_sample, {', '.join(_LAW)}"
            )
    if not sampled:
        law = {name: value for name, value in law.items() if name == "repetition_penalty"}
    elif "temperature" not in law:
        law["temperature"] = 1.0
    return Generation(tuple(filter(None, stops)), max_tokens, Sampling(**law))
