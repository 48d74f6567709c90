"""Which keys of a recipe go together: what has no effect beside the others, what is needed, and ranges.

Knows keys and values. Does not know files, nor how a value is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.train.recipe import Recipe

TRAINED = ("topv2", "bpe")
"""Tokenizers that are trained on the data."""

_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def number(value: Any) -> Any:
    """The number that a text such as 1e-4 means, which YAML 1.1 takes for a text; anything else as it is."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def idle(keys: Mapping[str, Any]) -> dict[str, str]:
    """Keys that say nothing beside the others, each with the reason."""

    def has(name: str) -> Any:
        return number(keys.get(name))

    curriculum = keys.get("curriculum", "rotational")
    idle = {
        "rotation": (curriculum != "rotational", f"the curriculum is {curriculum}, not rotational"),
        "exit_scale": (curriculum == "last", "the curriculum is last, so only the last layer learns"),
        "distillation": (curriculum == "last", "the curriculum is last, so only the last layer learns"),
        "dropout_depth": (not has("dropout"), "dropout is 0"),
        "dropout_time": (not has("dropout"), "dropout is 0"),
        "reference": (not has("anchor"), "anchor is 0"),
        "vocab_size": (has("tokenizer") not in TRAINED, f"tokenizer is neither {' nor '.join(TRAINED)}"),
        "revision": (not has("init_from"), "there is no init_from"),
        "eval_share": (bool(has("eval_data")), "there is eval_data"),
        "eval_rows": (not has("eval_data") and not has("eval_share"), "there is neither eval_data nor eval_share"),
        "resume_from_checkpoint": (True, "the same command resumes from the newest checkpoint by itself"),
        "acceptance_tokens": (not has("acceptance_prompts"), "acceptance_prompts is 0"),
    }
    return {name: reason for name, (condition, reason) in idle.items() if name in keys and condition}


def check(recipe: Recipe) -> None:
    """Raises RequestError where a key that is needed is missing, or numbers are out of range."""
    if bool(recipe.starts) == (recipe.architecture is not None):
        both = "both" if recipe.starts else "neither"
        raise RequestError(f"a recipe has either init_from or architecture, not {both}; give one")
    if recipe.architecture is not None:
        if "model_type" not in recipe.architecture:
            raise RequestError("architecture has no model_type; give one, such as llama, mistral, qwen3 or gpt2")
        if recipe.tokenizer is None:
            raise RequestError("a model from scratch needs a tokenizer; give topv2, bpe, a folder or a hub id")
        if recipe.tokenizer in TRAINED and recipe.vocab_size is None:
            raise RequestError(f"tokenizer {recipe.tokenizer} is trained on the data; give its vocab_size")
    elif recipe.tokenizer in TRAINED:
        raise RequestError(
            f"tokenizer {recipe.tokenizer} would be trained anew, but {recipe.starts[0]} knows its own; leave it out"
        )
    if not recipe.data:
        raise RequestError(f"recipe {recipe.name} names no data; give --data FILES or a hub data set")
    if recipe.batching != "padded" and recipe.max_length is None:
        raise RequestError(f"batching {recipe.batching} needs max_length, the tokens of a row; give it")
    if not 0 <= recipe.eval_share < 1:
        raise RequestError(f"eval_share {recipe.eval_share} is not possible; use a number from 0 and below 1")
    if recipe.acceptance_prompts and not (recipe.eval_data or recipe.eval_share):
        raise RequestError("acceptance_prompts are taken from what is evaluated on; give eval_data or eval_share")
    _check_ranges(recipe)
    if recipe.lora is not None and recipe.training.get("fully_shard"):
        raise RequestError("an adapter is small, and its frozen model is not sharded; leave lora or fully_shard out")
    if recipe.training.get("anchor") and not recipe.training.get("reference"):
        raise RequestError("anchor needs reference, the checkpoint that the last layer stays close to; give it")
    _check_streaming(recipe)


_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": 0, "weight_decay": 0, "adam_epsilon": 0, "loss_chunk": 0, "seed": 0, "data_seed": 0,
    "max_grad_norm": 0, "eval_rows": 0, "recombine": 0, "rename": 0, "acceptance_prompts": 0, "acceptance_tokens": 1,
}  # fmt: skip
"""Numbers that transformers and torch would refuse late, or in no words of ours."""


def _check_ranges(recipe: Recipe) -> None:
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)} | dict(recipe.training)
    for name, least in _LEAST.items():
        value = values.get(name)
        if value is not None and not (value >= least):
            raise RequestError(f"{name} {value} is not possible; use {least} or more")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= values.get(name, 0) < 1:
            raise RequestError(f"{name} {values[name]} is not possible; use a number from 0 and below 1")
    if not values.get("num_train_epochs", 1) > 0 and values.get("max_steps", -1) < 1:
        raise RequestError(f"num_train_epochs {values['num_train_epochs']} trains nothing; use a number above 0")


def _check_streaming(recipe: Recipe) -> None:
    if any(source.streaming for source in recipe.eval_data):
        raise RequestError("eval_data is read whole, the same rows each time; leave streaming out of it")
    streamed = [source for source in recipe.data if source.streaming]
    if not streamed:
        return
    if len(recipe.data) > 1 or recipe.batching != "stream":
        raise RequestError("a streamed data set is read alone, with batching: stream; change that")
    if int(recipe.training.get("max_steps") or -1) < 1:
        raise RequestError("a streamed data set has no known end; give max_steps")
    if recipe.training.get("dataloader_num_workers"):
        raise RequestError("a streamed data set is read by the process that trains; leave dataloader_num_workers out")
    for name in ("recombine", "rename"):
        if getattr(recipe, name):
            raise RequestError(f"{name} makes pairs of pairs at hand, which a streamed data set is not; leave it out")
    if recipe.tokenizer in TRAINED or recipe.eval_share:
        raise RequestError("a streamed data set gives neither a tokenizer nor an eval_share; name them otherwise")
