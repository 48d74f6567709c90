"""Recipes: one experiment as a flat YAML file, with every key checked before anything is loaded.

A recipe's keys are those of `Recipe` (model, tokenizer, data) and of `LayerSkipConfig` (training, transformers'
`TrainingArguments` among them). Knows what keys mean; reads no data and builds no model. Which keys go together is in
`rules`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from layerskip.errors import RequestError, suggest
from layerskip.train.data.encoding import Limits
from layerskip.train.data.sources import Source
from layerskip.train.rules import check, idle, number
from layerskip.train.trainer import LayerSkipConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment.

    Args:
        name: what reports and the model card call it.
        init_from: checkpoint to go on from: continual training or finetuning. Of several with one start, the mean of
            their weights. Either this or `architecture`.
        revision: branch, tag or commit of a hub id.
        architecture: a model from scratch: `model_type` and the settings of its transformers configuration.
        attention: transformers' `attn_implementation`; None is its default.
        dtype: of the weights while training; `bf16: true` computes in bfloat16 beside float32 weights.
        save_dtype: of the weights in the finished folder; None leaves them as they are.
        tokenizer: from scratch: "topv2" or "bpe" train one on the data; otherwise a folder or hub id.
        vocab_size: of a tokenizer that is trained.
        data: what is learnt: files, or mappings with the fields of `Source`.
        data_folder: where relative paths of `data` and `eval_data` begin.
        eval_data: what is evaluated on.
        eval_share: share of `data` that is held out by content and evaluated on, where there is no `eval_data`.
        eval_rows: rows evaluated on at most; 0 is all.
        recombine: further pairs of utterance and frame for each one, made by exchanging the words of slots (TOPv2).
        rename: further pairs for each one, with made-up words in the place of rare ones (TOPv2).
        skip_bad: leave malformed rows out.
        max_length: tokens of a row; what is longer is cut or refused (`too_long`).
        too_long: a prompt with a response longer than `max_length` is an "error", or left out: "drop".
        train_on_prompt: whether prompts are learnt too.
        batching: "padded" rows of one document each, "packed" rows of several that do not see each other, or "stream":
            documents one behind the other, cut into rows.
        lora: a LoRA adapter by the settings of peft's `LoraConfig`; None trains all weights.
        acceptance_prompts: how many evaluation prompts self-speculation is measured on at every checkpoint; 0 is none.
        acceptance_tokens: tokens generated for each of them at most.
        licence: of the trained model, for its card.
        description: for its card.
        training: the settings of `LayerSkipConfig`.
    """

    name: str
    init_from: str | list[str] | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    attention: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    data: tuple[Source, ...] = ()
    data_folder: str = "."
    eval_data: tuple[Source, ...] = ()
    eval_share: float = 0.0
    eval_rows: int = 0
    recombine: float = 0.0
    rename: float = 0.0
    skip_bad: bool = False
    max_length: int | None = None
    too_long: Literal["error", "drop"] = "error"
    train_on_prompt: bool = False
    batching: Literal["padded", "packed", "stream"] = "padded"
    lora: dict[str, Any] | None = None
    acceptance_prompts: int = 0
    acceptance_tokens: int = 64
    licence: str | None = None
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """How rows are made."""
        return Limits(max_length=self.max_length, too_long=self.too_long, train_on_prompt=self.train_on_prompt)

    @property
    def starts(self) -> list[str]:
        """The checkpoints to go on from; none where the model is built anew."""
        return [self.init_from] if isinstance(self.init_from, str) else self.init_from or []

    @property
    def data_seed(self) -> int:
        """What decides which rows are held out and which are made up."""
        seed = self.training.get("data_seed")
        return int(self.training.get("seed", 42) if seed is None else seed)

    def record(self) -> dict[str, Any]:
        """The recipe as JSON, for the trained model's folder: every key that is not at its default, flat as in YAML."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        kept = {
            f.name: own[f.name]
            for f in fields(self)
            if f.name in own and own[f.name] != (f.default_factory() if f.default_factory is not MISSING else f.default)
        }
        for name in ("data", "eval_data"):
            if name in kept:
                kept[name] = [_source_record(source) for source in kept[name]]
        return kept | dict(self.training)


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("layerskip.train") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name_or_path: str, *, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe and checks it.

    Args:
        name_or_path: a shipped recipe's name, or a YAML file.
        overrides: keys that replace those of the file; texts are read as YAML. `data` given as text keeps the
            other fields of the recipe's source, where it has one.

    Raises:
        RequestError: there is no such recipe; a key is unknown, its value is of the wrong kind, it has no effect beside
            the others, or one that is needed is missing.
    """
    path = _find(name_or_path)
    written = _mapping(path)
    given = {_spelled(name): value for name, value in (overrides or {}).items()}
    for name in (*written, *given):
        _check_known(name, path if name in written else None)
    given = {name: _parsed(name, value) for name, value in given.items()}
    if isinstance(given.get("data"), str) and isinstance(written.get("data"), dict):
        given["data"] = {**written["data"], "files": given["data"]}
    keys = {"name": path.stem, **written, **given}
    for name, reason in idle(keys).items():
        if name in given or not _idle_without(name, written, given):
            raise RequestError(f"{name} has no effect here: {reason}; leave it out")
        del keys[name]  # the file's own, made idle by an override
    recipe = _built(keys)
    check(recipe)
    return recipe


def _idle_without(name: str, written: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a key of the file has no effect only because of what overrides say."""
    return bool(given) and name not in idle(written)


# -- reading


def _find(name_or_path: str) -> Path:
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    near = suggest(name_or_path, known)
    raise RequestError(
        f"there is no recipe {name_or_path!r}: neither a file nor one of {', '.join(known)}; name one of them{near}"
    )


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}; correct it there") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(f"{path} is not a recipe; a recipe is a YAML mapping of keys to values")
    return content


def _spelled(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _parsed(name: str, value: Any) -> Any:
    """An override from the command line as YAML would have it."""
    if not isinstance(value, str) or value == "":
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # a file pattern such as *.tsv is no YAML, and is what it says
    return value if parsed is not None and _is_text(_hints()[name]) else parsed  # a commit may be all digits


def _check_known(name: str, path: Path | None) -> None:
    if name in _hints():
        return
    where = f" of {path.name}" if path else ""
    raise RequestError(
        f"unknown key {name!r}{where}; keys are those of a recipe and of transformers' TrainingArguments"
        f"{suggest(name, _hints())}"
    )


@cache
def _hints() -> dict[str, Any]:
    """Every key with the type of its value."""
    own = typing.get_type_hints(Recipe)
    trainer = typing.get_type_hints(LayerSkipConfig)
    settings = {f.name: trainer[f.name] for f in fields(LayerSkipConfig) if f.init and not f.name.startswith("_")}
    return settings | {f.name: own[f.name] for f in fields(Recipe) if f.name != "training"}


def _built(keys: Mapping[str, Any]) -> Recipe:
    own = {f.name for f in fields(Recipe)}
    values = {name: _value(name, value) for name, value in keys.items()}
    training = {name: value for name, value in values.items() if name not in own}
    return Recipe(**{name: value for name, value in values.items() if name in own}, training=training)


def _value(name: str, value: Any) -> Any:
    if name in ("data", "eval_data"):
        return _sources(name, value)
    hint = _hints()[name]
    return _checked(name, value if _is_text(hint) else number(value), hint)


def _checked(name: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise RequestError(
            f"{name} {value!r} is not possible: {what[:1].lower()}{what[1:]}; it is {_said(hint)}"
        ) from error


def _is_text(hint: Any) -> bool:
    return hint is str or set(typing.get_args(hint)) == {str, type(None)}


def _said(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_said(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    made_of = {dict: "a mapping", Mapping: "a mapping", list: "a list", Sequence: "a list"}
    origin = typing.get_origin(hint) or hint
    return plain.get(hint, made_of.get(origin, str(getattr(hint, "__name__", hint))))


def _sources(name: str, value: Any) -> tuple[Source, ...]:
    found = []
    allowed = [f.name for f in fields(Source)]
    for source in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(source, str):
            source = {"files": source}
        if not isinstance(source, dict):
            raise RequestError(f"{name} {source!r} is not possible; use file patterns, or mappings with files or hub")
        for key in source:
            if key not in allowed:
                near = suggest(str(key), allowed)
                raise RequestError(f"unknown key {key!r} in {name}; a source has {', '.join(allowed)}{near}")
        hints = typing.get_type_hints(Source)
        checked = {key: _checked(f"{key} in {name}", part, hints[key]) for key, part in source.items()}
        files = checked.get("files", ())
        found.append(Source(**{**checked, "files": tuple(files) if isinstance(files, list) else files}))
    return tuple(found)


def _source_record(source: Source) -> dict[str, Any]:
    default = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(Source)}
    values = {f.name: getattr(source, f.name) for f in fields(Source)}
    return {name: value for name, value in values.items() if value != default[name]}
