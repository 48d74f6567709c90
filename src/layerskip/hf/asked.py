"""What a call of `model.generate` asks for: settings that can be served, prompts, the drafter.

Knows how transformers 5 prepares a decoding loop; refuses by name what cannot be served. Runs nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import logits_process as theirs
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    StopStringCriteria,
)

from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Auto, EarlyExit
from layerskip.errors import RequestError


def check_settings(config: GenerationConfig, *, synced: bool) -> None:
    """Raises RequestError for a mode or an output that cannot be served; names the settings that ask for it."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        given = [f"{name} {value}" for name, off in _MODES.items() if (value := getattr(config, name)) not in off]
        raise RequestError(f"{mode.value} is not served; for greedy search or sampling leave out {', '.join(given)}")
    if config.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
        raise RequestError(f"cache_implementation {config.cache_implementation!r} is not served; leave it out")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise RequestError(f"{name} is not served, because the model's own layers are not run; leave it out")
    if synced:
        raise RequestError("synced_gpus is not served: a sharded model cannot be decoded here; leave it out")


# settings that ask for another mode, and the values that do not
_MODES: Mapping[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
}


def check_processors(processors: Sequence[object]) -> None:
    """Raises RequestError for a processor that remembers calls, or needs more than one row's ids and scores."""
    for processor in processors:
        for refused, reason in _REFUSED.items():
            if isinstance(processor, refused):
                raise RequestError(
                    f"{type(processor).__name__} is not served: it {reason}; drafts need processors that depend on the "
                    "ids and scores of a row only"
                )


_REFUSED: Mapping[type, str] = {
    theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor: "runs the model with a cache of its own (guidance_scale)",
    theirs.ClassifierFreeGuidanceLogitsProcessor: "needs two rows of scores for every sequence",
    theirs.SynthIDTextWatermarkLogitsProcessor: "remembers the contexts of past calls",
    theirs.WhisperNoSpeechDetection: "runs a model and remembers what it said",
    theirs.DiaClassifierFreeGuidanceLogitsProcessor: "needs two rows of scores for every sequence",
    theirs.DiaEOSChannelFilterLogitsProcessor: "takes rows for channels of one sequence",
    theirs.DiaEOSDelayPatternLogitsProcessor: "counts its calls",
}


def kept_back(model: PreTrainedModel) -> Mapping[str, Any]:
    """What the `model.generate` that leads here was given and does not hand on.

    transformers 5.23 passes a callable neither `streamer` nor `assistant_model`: a reader of the streamer would wait
    for ever, the assistant would be ignored in silence. They are named parameters of `generate`, so its frame has them.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: None if frame is None else frame.f_locals.get(name) for name in names}


def drafter(
    exit: int | None, tokens: int | None, confidence: float | None, draft: Drafter | str | None
) -> Drafter | None:
    """The drafter that the `draft_*` options mean; None decodes plainly. Raises RequestError where they conflict."""
    options = {"draft_exit": exit, "draft_tokens": tokens, "draft_confidence": confidence}
    given = [name for name, value in options.items() if value is not None]
    if draft is not None:
        if given:
            raise RequestError(f"draft and {given[0]} exclude each other; a drafter carries its own settings")
        if draft == "auto":
            return Auto()
        if isinstance(draft, str) or not callable(getattr(draft, "propose", None)):
            raise RequestError(
                f"draft {draft!r} is not a drafter; use draft_exit, 'auto', or one such as layerskip.Lookup()"
            )
        return draft
    if exit is None:
        if given:
            raise RequestError(f"{given[0]} needs draft_exit, the layers that draft")
        return None
    for name in ("draft_exit", "draft_tokens"):
        if name in given and type(options[name]) is not int:
            raise RequestError(f"{name} {options[name]!r} is not possible; use a whole number")
    return EarlyExit(exit, tokens=tokens, confidence=confidence)


def stop_criteria(stop_strings: str | list[str], tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    """The criterion for stop strings. Raises RequestError where there is no tokenizer to read them with."""
    if tokenizer is None:
        raise RequestError(
            "stop_strings need the tokenizer, which transformers does not hand to custom_generate; bind it with "
            "custom_generate=functools.partial(layerskip.hf.generate, tokenizer=tokenizer)"
        )
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)


def prompts(input_ids: Tensor, given: Mapping[str, Any], *, windows: bool) -> list[list[int]]:
    """The prompt of each row without its padding.

    Args:
        input_ids: (B, P).
        given: the model's arguments as transformers prepared them.
        windows: whether a layer sees a sliding window, which gaps inside a prompt would shift.
    """
    for name, value in given.items():
        if value is None or name in ("attention_mask", "position_ids", "use_cache", "logits_to_keep"):
            continue
        if name == "past_key_values" and not getattr(value, "_is_user_defined", False):
            continue  # made by transformers for a loop of its own
        raise RequestError(f"{name} is not served; give the whole prompt as input_ids, and leave it out")
    if not input_ids.shape[1]:
        raise RequestError("the prompt has no tokens; give at least one")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise RequestError(f"attention_mask has shape {tuple(mask.shape)}; use {tuple(input_ids.shape)}")
        kept = (mask != 0).to(input_ids.device)
    if not bool(kept[:, -1].all()):
        raise RequestError("attention_mask ends in 0, so there is padding on the right; pad the prompts on the left")
    if windows and bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise RequestError("attention_mask has gaps, which would shift sliding windows; mask padding on the left only")
    usual = kept.long().cumsum(-1) - 1
    if positions is not None and bool((kept & (positions.to(usual.device) != usual)).any()):
        raise RequestError("position_ids do not count the tokens that attention_mask keeps; leave them out")
    return [ids[row].tolist() for ids, row in zip(input_ids, kept, strict=True)]
