"""Recipes: which keys there are, what their values may be, and what does not go together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerskip.errors import RequestError
from layerskip.train.data import Limits, Source
from layerskip.train.recipe import Recipe, read_recipe, shipped

LLAMA = {"model_type": "llama", "num_hidden_layers": 4}
SCRATCH: dict[str, Any] = {"architecture": LLAMA, "tokenizer": "topv2", "vocab_size": 320, "data": "topv2/*.tsv"}
Read = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Read:
    """A recipe from scratch with other keys, read from a file: `recipe(rotation=3)`; None leaves a key out."""

    def make(overrides: dict[str, Any] | None = None, /, **keys: Any) -> Recipe:
        path = tmp_path / "mine.yaml"
        kept = {name: value for name, value in {**SCRATCH, **keys}.items() if value is not None}
        path.write_text(yaml.safe_dump(kept))
        return read_recipe(str(path), overrides=overrides)

    return make


# -- values


def test_a_recipe_has_its_own_keys_and_those_of_training(recipe: Read) -> None:
    found = recipe(learning_rate="1e-4", warmup_steps=5, bf16=True, max_length=64, dropout=0.2)
    assert (found.name, found.vocab_size, found.architecture) == ("mine", 320, LLAMA)  # the file's name
    assert found.training == {"learning_rate": 1e-4, "warmup_steps": 5, "bf16": True, "dropout": 0.2}
    assert found.limits == Limits(max_length=64)
    assert recipe(name="another").name == "another"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("1e-4", "learning_rate", 1e-4),  # a text to YAML 1.1
        ("3", "learning_rate", 3.0),
        ("-1", "max_steps", -1),
        ("true", "bf16", True),
        ("no", "bf16", False),
        ("[tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("null", "data_seed", None),
        ("cosine", "lr_scheduler_type", "cosine"),
        ("2024", "output_dir", "2024"),
        ("", "run_name", ""),
    ],
)
def test_overrides_are_read_as_yaml(recipe: Read, words: str, key: str, value: Any) -> None:
    found = recipe({f"--{key.replace('_', '-')}": words}).training[key]
    assert (found, type(found)) == (value, type(value))


def test_texts_stay_texts(recipe: Read) -> None:
    given = {"description": "1e5", "licence": "no", "name": "7", "data_folder": "2024"}
    found = recipe(given)
    assert {name: getattr(found, name) for name in given} == given
    hub = recipe({"--revision": "0123456"}, init_from="somewhere", architecture=None, tokenizer=None, vocab_size=None)
    assert hub.revision == "0123456"  # a commit, not a number


@pytest.mark.parametrize(
    ("data", "files"),
    [("a/*.txt", "a/*.txt"), (["a.txt", "b.txt"], ...), ({"files": ["a.txt", "b.txt"]}, ("a.txt", "b.txt"))],
    ids=["text", "list", "mapping"],
)
def test_data_as_a_text_a_list_or_a_mapping(recipe: Read, data: Any, files: Any) -> None:
    found = recipe(data=data).data
    if files is ...:
        assert found == (Source(files="a.txt"), Source(files="b.txt"))
    else:
        assert found == (Source(files=files),)


def test_several_sources_and_data_of_the_hub(recipe: Read) -> None:
    found = recipe(data=[{"files": "a.tsv", "format": "topv2"}, {"hub": "some/set", "columns": {"text": "story"}}]).data
    assert found == (Source(files="a.tsv", format="topv2"), Source(hub="some/set", columns={"text": "story"}))
    assert recipe({"data": "[a.txt, {hub: b}]"}).data == (Source(files="a.txt"), Source(hub="b"))


def test_files_given_as_a_text_keep_the_rest_of_the_source(recipe: Read) -> None:
    one = {"files": "old.table", "format": "topv2"}
    assert recipe({"--data": "*.table"}, data=one).data == (Source(files="*.table", format="topv2"),)
    assert recipe({"--data": "{files: new.tsv}"}, data=one).data == (Source(files="new.tsv"),)
    # there is no one source whose fields could be kept
    assert recipe({"--data": "new.tsv"}, data=[one]).data == (Source(files="new.tsv"),)
    assert recipe({"--data": "new.tsv"}, data="old.txt").data == (Source(files="new.tsv"),)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate 'fast' is not possible: .*; it is a number"),
        ({"max_steps": 2.5}, "max_steps 2.5 is not possible: .*; it is a whole number"),
        ({"bf16": "maybe"}, "bf16 'maybe' is not possible: .*; it is true or false"),
        ({"batching": "packd"}, "batching 'packd' is not possible: .*; it is 'padded' or 'packed' or 'stream'"),
        ({"save_dtype": "int8"}, "save_dtype 'int8' is not possible: .*'float16' or null"),
        ({"architecture": "llama"}, "architecture 'llama' is not possible: .*; it is a mapping or null"),
        ({"max_length": "long"}, "max_length 'long' is not possible: .*; it is a whole number or null"),
        ({"name": [1]}, r"name \[1\] is not possible: .*; it is a text"),
        ({"data": 5}, "data 5 is not possible; use file patterns, or mappings with files or hub"),
        ({"data": [["a"]]}, r"data \['a'\] is not possible; use file patterns, or mappings"),
        ({"data": {"files": 5}}, "files in data 5 is not possible: .*; it is a text or a list"),
        ({"data": {"files": "a", "columns": [1]}}, r"columns in data \[1\] is not possible: .*; it is a mapping"),
        ({"data": {"files": "a", "format": "csv"}}, "format in data 'csv' is not possible: .*'topv2' or null"),
        ({"eval_data": {"files": "a", "hub": "b"}}, "a source has either files or hub, not both; give one"),
        ({"learning_rate": -1}, "learning_rate -1.0 is not possible; use 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate nan is not possible; use 0 or more"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0 is not possible; use 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0 is not possible; use 1 or more"),
        ({"loss_chunk": -1}, "loss_chunk -1 is not possible; use 0 or more"),
        ({"seed": -1}, "seed -1 is not possible; use 0 or more"),
        ({"adam_beta2": 1}, "adam_beta2 1.0 is not possible; use a number from 0 and below 1"),
        ({"num_train_epochs": 0}, "num_train_epochs 0.0 trains nothing; use a number above 0"),
        ({"eval_share": 1}, "eval_share 1.0 is not possible; use a number from 0 and below 1"),
        ({"max_length": 1, "batching": "packed"}, "max_length 1 leaves nothing to predict; use 2 or more"),
    ],
    ids=str,
)
def test_values_that_cannot_be(recipe: Read, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _ = recipe(**keys).limits
    with pytest.raises(RequestError, match=message):
        _ = recipe(keys).limits


# -- keys


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("learning_rat", "unknown key 'learning_rat'.*; did you mean 'learning_rate'"),
        ("rotaton", "did you mean 'rotation'"),
        ("batchin", "did you mean 'batching'"),
        ("training", "unknown key 'training'"),  # a field of Recipe, but not a key
        ("xyzzy", "unknown key 'xyzzy'.*; keys are those of a recipe and of transformers' TrainingArguments$"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(recipe: Read, key: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recipe({f"--{key}": "1"})
    in_file = message.replace("'.*", "' of mine.yaml.*")
    with pytest.raises(RequestError, match=in_file):
        recipe(**{key: 1})


def test_an_unknown_key_of_a_source_is_refused(recipe: Read) -> None:
    message = r"unknown key 'file' in data; a source has files, format, .*; did you mean 'files'"
    with pytest.raises(RequestError, match=message):
        recipe(data={"file": "a.tsv"})
    with pytest.raises(RequestError, match=r"unknown key 'splits' in eval_data; .*; did you mean 'split'"):
        recipe(eval_data=[{"hub": "a", "splits": "b"}])
    with pytest.raises(RequestError, match="unknown key 'file' in data"):
        recipe({"--data": "{file: a.tsv}"})


CONTINUED = {"init_from": "somewhere", "architecture": None, "tokenizer": None, "vocab_size": None}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"curriculum": "gradual", "rotation": 3}, "rotation has no effect here: the curriculum is gradual"),
        ({"curriculum": "last", "exit_scale": 1.0}, "exit_scale has no effect here: the curriculum is last"),
        ({"curriculum": "last", "distillation": 0.5}, "distillation has no effect here"),
        ({"dropout_depth": "linear"}, "dropout_depth has no effect here: dropout is 0; leave it out"),
        ({"dropout": 0.0, "dropout_time": "exponential"}, "dropout_time has no effect here: dropout is 0"),
        ({"reference": "there"}, "reference has no effect here: anchor is 0"),
        ({**CONTINUED, "vocab_size": 100}, "vocab_size has no effect here: tokenizer is neither topv2 nor bpe"),
        ({"revision": "main"}, "revision has no effect here: there is no init_from"),
        ({"eval_share": 0.1, "eval_data": "b.tsv"}, "eval_share has no effect here: there is eval_data"),
        ({"eval_rows": 5}, "eval_rows has no effect here: there is neither eval_data nor eval_share"),
        ({"acceptance_tokens": 9}, "acceptance_tokens has no effect here: acceptance_prompts is 0"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint has no effect here: the same command resumes"),
    ],
    ids=str,
)
def test_keys_without_effect_are_refused(recipe: Read, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recipe(**keys)


def test_what_an_override_makes_idle_in_the_file_goes_silently(recipe: Read) -> None:
    file = {"rotation": 3, "exit_scale": 1.0, "dropout": 0.2, "dropout_time": "exponential", "eval_share": 0.1}
    assert recipe(**file).training == {name: value for name, value in file.items() if name != "eval_share"}
    last = recipe({"--curriculum": "last", "--dropout": "0e0", "--eval_data": "b.tsv"}, **file)
    assert last.training == {"dropout": 0.0, "curriculum": "last"}
    assert (last.eval_share, last.eval_data) == (0.0, (Source(files="b.tsv"),))


def test_an_override_that_is_idle_is_an_error(recipe: Read) -> None:
    with pytest.raises(RequestError, match="rotation has no effect here: the curriculum is last"):
        recipe({"--curriculum": "last", "--rotation": "2"}, rotation=3)
    # and a file's own idle key is one, whatever the overrides say about other things
    with pytest.raises(RequestError, match="rotation has no effect here"):
        recipe({"--seed": "2"}, curriculum="last", rotation=3)


# -- what is needed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": None}, "recipe mine names no data; give --data FILES or a hub data set"),
        ({"data": []}, "recipe mine names no data"),
        ({"init_from": "somewhere"}, "either init_from or architecture, not both; give one"),
        ({"architecture": None}, "either init_from or architecture, not neither; give one"),
        ({"architecture": {"hidden_size": 8}}, "architecture has no model_type; give one, such as llama"),
        ({"tokenizer": None, "vocab_size": None}, "a model from scratch needs a tokenizer; give topv2, bpe"),
        ({"vocab_size": None}, "tokenizer topv2 is trained on the data; give its vocab_size"),
        (
            {**CONTINUED, "tokenizer": "bpe", "vocab_size": 300},
            "bpe would be trained anew, but somewhere knows its own",
        ),
        ({"batching": "packed"}, "batching packed needs max_length, the tokens of a row; give it"),
        ({"batching": "stream"}, "batching stream needs max_length"),
        ({"anchor": 0.5}, "anchor needs reference, the checkpoint"),
        ({"acceptance_prompts": 5}, "acceptance_prompts are taken from what is evaluated on; give eval_data"),
        ({**CONTINUED, "lora": {"r": 4}, "fully_shard": True}, "leave lora or fully_shard out"),
        (
            {"eval_data": {"hub": "some/set", "streaming": True}},
            "eval_data is read whole, .* leave streaming out of it",
        ),
    ],
    ids=str,
)
def test_what_is_missing_or_too_much(recipe: Read, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recipe(**keys)


STREAM = {
    **CONTINUED,
    "data": {"hub": "some/set", "streaming": True},
    "batching": "stream",
    "max_length": 32,
    "max_steps": 9,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batching": "packed"}, "a streamed data set is read alone, with batching: stream; change that"),
        ({"data": [{"hub": "a", "streaming": True}, "b.txt"]}, "a streamed data set is read alone"),
        ({"max_steps": None}, "a streamed data set has no known end; give max_steps"),
        ({"max_steps": -1, "num_train_epochs": 2}, "no known end; give max_steps"),
        ({"eval_share": 0.1}, "a streamed data set gives neither a tokenizer nor an eval_share"),
        ({"dataloader_num_workers": 2}, "read by the process that trains; leave dataloader_num_workers out"),
        ({"recombine": 1}, "recombine makes pairs of pairs at hand"),
        ({"rename": 0.5}, "rename makes pairs of pairs at hand"),
        (
            {"init_from": None, "architecture": LLAMA, "tokenizer": "bpe", "vocab_size": 300},
            "a streamed data set gives neither a tokenizer",
        ),
        ({"data": {"files": "a.txt", "streaming": True}}, "streaming is for data sets of the hub; leave it out"),
    ],
    ids=str,
)
def test_streaming(recipe: Read, changes: dict[str, Any], message: str) -> None:
    assert recipe(**STREAM).data == (Source(hub="some/set", streaming=True),)
    with pytest.raises(RequestError, match=message):
        recipe(**{**STREAM, **changes})


# -- files and records


def test_which_recipes_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"there is no recipe 'topv2-parse'.* topv2-parser.*did you mean 'topv2-par"):
        read_recipe("topv2-parse")
    for content, message in (
        ("a: [1", "bad.yaml is not YAML: while parsing"),
        ("- a\n- b\n", "bad.yaml is not a recipe; a recipe is a YAML mapping"),
        ("", "is not a recipe"),
        ("1: 2\n", "is not a recipe"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(RequestError, match=message):
            read_recipe("bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RequestError, match=r"bad\.yaml is not YAML"):
        read_recipe("bad.yaml")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_one(name: str, tmp_path: Path) -> None:
    written = yaml.safe_load(shipped()[name].read_text())
    found = read_recipe(name, overrides=None if "data" in written else {"data": "some/*.txt"})
    assert found.description.strip()
    assert (found.name, bool(found.data)) == (written.get("name", name), True)
    if "data" not in written:
        with pytest.raises(RequestError, match=f"recipe {found.name} names no data; give --data FILES"):
            read_recipe(name)
    assert again(found, tmp_path) == found.record()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"data": ["a.txt", {"files": ["b.tsv", "c"], "format": "topv2"}], "eval_data": {"hub": "x", "split": "test"}},
        {"lora": {"r": 4, "target_modules": ["q_proj"]}, **CONTINUED},
        {"learning_rate": "1e-4", "lr_scheduler_type": "cosine", "save_strategy": "epoch", "optim": "adamw_torch"},
        {"report_to": ["tensorboard"], "dropout": 0.1, "dropout_depth": "linear", "max_length": 9, "skip_bad": True},
        STREAM,
    ],
    ids=str,
)
def test_a_record_gives_the_recipe_again(recipe: Read, tmp_path: Path, keys: dict[str, Any]) -> None:
    found = recipe(**keys)
    assert again(found, tmp_path) == found.record()
    assert "vocab_size" not in recipe(**CONTINUED).record()  # what is at its default is left out


def again(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The record of a recipe that was written to YAML and read, also by way of provenance.json."""
    records = []
    for record in (recipe.record(), json.loads(json.dumps(recipe.record()))):
        (folder / "again.yaml").write_text(yaml.safe_dump(record))
        records.append(read_recipe(str(folder / "again.yaml")).record())
    assert json.dumps(records[0]) == json.dumps(records[1])
    return records[0]
