"""From a recipe to what a trainer needs: examples, tokenizer, rows, model.

Knows data and models; knows nothing of steps. Everything is decided by the recipe and its seed, so every process
builds the same.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from layerskip.errors import RequestError, suggest
from layerskip.train.average import mean_weights
from layerskip.train.data import (
    Document,
    Encoded,
    Example,
    Packed,
    Padded,
    Pair,
    Source,
    StreamedRows,
    cut_stream,
    digest,
    encode,
    hold_out,
    iterate,
    pack,
    read,
    recombined,
    renamed,
    topv2_tokenizer,
    train_tokenizer,
)
from layerskip.train.loading import CHOICE, first_line, load_model
from layerskip.train.recipe import Recipe


@dataclass(frozen=True)
class Examples:
    """What is learnt and what is evaluated on.

    Args:
        learnt: to train on; empty where a data set is streamed.
        evaluated: to evaluate on; may be empty.
        sha256: of the files that were read, by name.
        digests: of both lists of examples.
        skipped: malformed rows left out.
        complaints: the first of them.
    """

    learnt: list[Example]
    evaluated: list[Example]
    sha256: dict[str, str]
    digests: dict[str, str]
    skipped: int
    complaints: tuple[str, ...]


def examples(recipe: Recipe) -> Examples:
    """Reads a recipe's data. Raises what `read` raises."""
    folder = Path(recipe.data_folder)
    hashes: dict[str, str] = {}
    learnt, skipped, complaints = _read_all(recipe, recipe.data, folder, hashes)
    evaluated, missed, moaned = _read_all(recipe, recipe.eval_data, folder, hashes)
    if recipe.eval_share:
        learnt, evaluated = hold_out(learnt, share=recipe.eval_share, seed=recipe.data_seed)
        if not learnt or not evaluated:
            raise RequestError(
                f"eval_share {recipe.eval_share} of {len(learnt) + len(evaluated):,} examples leaves one side empty; "
                "give eval_data"
            )
    if recipe.eval_rows:
        evaluated = evaluated[: recipe.eval_rows]
    digests = {name: digest(part) for name, part in (("data", learnt), ("eval_data", evaluated)) if part}
    return Examples(learnt, evaluated, hashes, digests, skipped + missed, (*complaints, *moaned))


def _read_all(
    recipe: Recipe, sources: Iterable[Source], folder: Path, hashes: dict[str, str]
) -> tuple[list[Example], int, tuple[str, ...]]:
    """Examples, malformed rows left out, and complaints about them; adds the files' hashes."""
    found: list[Example] = []
    skipped = 0
    complaints: tuple[str, ...] = ()
    for source in sources:
        if source.streaming:
            continue
        reading = read(_with_library(source), skip_bad=recipe.skip_bad, folder=folder)
        found += reading.examples
        for name, value in reading.sha256.items():  # two sources may have files of one name
            hashes[name if hashes.get(name, value) == value else f"{name} of {source.hub or source.files}"] = value
        skipped += reading.skipped
        complaints = (*complaints, *reading.complaints)
    return found, skipped, complaints


def _with_library(source: Source) -> Source:
    """A source whose patterns may begin with ${stdlib}, the folder of Python's standard library."""
    library = sysconfig.get_paths()["stdlib"]
    files = [source.files] if isinstance(source.files, str) else list(source.files)
    return replace(source, files=tuple(name.replace("${stdlib}", library) for name in files)) if files else source


def tokenizer(recipe: Recipe, learnt: list[Example]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: trained on what is learnt, or loaded."""
    if recipe.tokenizer == "topv2":
        assert recipe.vocab_size is not None
        return topv2_tokenizer(learnt, vocab_size=recipe.vocab_size)
    if recipe.tokenizer == "bpe":
        assert recipe.vocab_size is not None
        return train_tokenizer(_texts(learnt), vocab_size=recipe.vocab_size)
    name = recipe.tokenizer or recipe.starts[0]
    revision = None if recipe.tokenizer else recipe.revision
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise RequestError(f"no tokenizer could be loaded from {name}: {first_line(error)}; {CHOICE}") from error
    if loaded.pad_token_id is None:  # as Llama's: any id will do, since fill is neither learnt nor attended to
        loaded.pad_token = loaded.eos_token
    return loaded


def _texts(learnt: Iterable[Example]) -> Iterator[str]:
    for example in learnt:
        match example:
            case Document(text):
                yield text
            case Pair(prompt, response):
                yield from (prompt, response)
            case _:
                yield from (turn.content for turn in example.turns)


def rows(recipe: Recipe, learnt: list[Example], tokens: PreTrainedTokenizerBase) -> tuple[Dataset[Any], int]:
    """What is learnt, as rows for a trainer, and how many examples were too long and left out."""
    streamed = next((source for source in recipe.data if source.streaming), None)
    if streamed is not None:
        assert recipe.max_length is not None
        endless = StreamedRows(
            lambda epoch: iterate(streamed, skip_bad=recipe.skip_bad, seed=recipe.data_seed + epoch),
            tokenizer=tokens,
            length=recipe.max_length,
            limits=recipe.limits,
        )
        return endless, 0
    made: list[Example] = []
    if recipe.recombine:
        made += recombined(learnt, share=recipe.recombine, seed=recipe.data_seed)
    if recipe.rename:
        made += renamed(learnt, share=recipe.rename, seed=recipe.data_seed)
    encoded = arranged(recipe, [*learnt, *made], tokens)
    return encoded.rows, encoded.dropped


def arranged(recipe: Recipe, some: list[Example], tokens: PreTrainedTokenizerBase) -> Encoded:
    """Examples as rows, put together as the recipe's batching says."""
    limits = recipe.limits if recipe.batching != "stream" else replace(recipe.limits, max_length=None)
    encoded = encode(some, tokenizer=tokens, limits=limits)
    if recipe.batching == "padded":
        return encoded
    assert recipe.max_length is not None
    together = pack if recipe.batching == "packed" else cut_stream
    return replace(encoded, rows=together(encoded.rows, length=recipe.max_length))


def collator(recipe: Recipe, model: torch.nn.Module, tokens: PreTrainedTokenizerBase) -> Padded | Packed:
    """What makes batches of the rows."""
    pad = tokens.pad_token_id
    assert isinstance(pad, int)
    if recipe.batching == "packed":
        return Packed.suited_to(model.config, pad_id=pad, length=recipe.max_length)  # type: ignore[arg-type]
    return Padded(pad_id=pad)


def model(recipe: Recipe, tokens: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The recipe's model: from scratch with the recipe's seed, or loaded; with its adapter."""
    dtype = getattr(torch, recipe.dtype)
    how: dict[str, Any] = {"attn_implementation": recipe.attention} if recipe.attention else {}
    set_seed(recipe.training.get("seed", 42))  # adapters and what a checkpoint lacks are drawn too
    if recipe.architecture is not None:
        config = _config(recipe.architecture, tokens)
        try:
            built: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
        except (ValueError, ImportError, KeyError, RuntimeError) as error:
            raise RequestError(f"the model cannot be built: {first_line(error)}") from error
    else:
        how |= {"revision": recipe.revision, "dtype": dtype}
        built = mean_weights([(name, load_model(name, **how)) for name in recipe.starts])
    if len(tokens) > built.config.vocab_size:
        raise RequestError(
            f"the tokenizer has {len(tokens):,} tokens and the model {built.config.vocab_size:,}; use the model's own "
            "tokenizer, or leave vocab_size out of architecture"
        )
    return _adapted(built, recipe.lora) if recipe.lora is not None else built


def _config(architecture: dict[str, Any], tokens: PreTrainedTokenizerBase) -> Any:
    settings = dict(architecture)
    kind = settings.pop("model_type")
    try:
        default = AutoConfig.for_model(kind)
    except ValueError as error:
        raise RequestError(
            f"model_type {kind!r} is unknown to transformers; use llama, mistral, qwen3 or gpt2, say"
        ) from error
    known = [*default.to_dict(), *default.attribute_map]
    for name in settings:
        if name not in known:
            raise RequestError(
                f"unknown key {name!r} in architecture: a {kind} model has no such setting{suggest(name, known)}"
            )
    ids = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return AutoConfig.for_model(kind, **{"vocab_size": len(tokens), **ids, **settings})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RequestError(f"architecture is not possible: {' '.join(str(error).split())}") from error


def _adapted(built: Any, settings: dict[str, Any]) -> torch.nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RequestError("lora needs peft; install layerskip[train]") from error
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
        adapted: torch.nn.Module = get_peft_model(built, config)
    except (TypeError, ValueError) as error:
        raise RequestError(f"lora is not possible: {first_line(error)}") from error
    return adapted
