"""`layerskip train`: what is shown, how keys are replaced, and one line for everything that cannot be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerskip.cli.train import exit_rows, overrides
from layerskip.errors import RequestError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RECIPE: dict[str, Any] = {
    "architecture": LLAMA,
    "tokenizer": "bpe",
    "vocab_size": 280,
    "data": {"files": "pairs.jsonl", "format": "jsonl"},
    "curriculum": "rotational",
    "rotation": 3,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 2,
    "save_strategy": "no",
    "use_cpu": True,
}
Train = Callable[..., Any]


@pytest.fixture
def train(run: Any, tmp_path: Path) -> Train:
    """Calls `layerskip train` with a recipe of few steps: `train("--seed", 3, rotation=2)`; None leaves a key out."""
    lines = [json.dumps({"prompt": f"twice {number}", "response": f" {2 * number}"}) for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")

    def call(*words: object, **keys: Any) -> Any:
        whole = {"data_folder": str(tmp_path), "output_dir": str(tmp_path / "out"), **RECIPE, **keys}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))
        return run("train", tmp_path / "tiny.yaml", *words)

    return call


def refused(done: Any, status: int, message: str) -> None:
    """One line, on standard error, behind lines about data at most."""
    assert done.exit_code == status, done.stderr
    assert done.stdout == ""
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not any("rror" in other or "Traceback" in other for other in before)
    assert "not foreseen" not in line


# -- keys in words


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", {}),
        ("--seed 3 --output_dir=runs/a", {"--seed": "3", "--output_dir": "runs/a"}),
        ("--bf16", {"--bf16": "true"}),
        ("--bf16 --seed 3", {"--bf16": "true", "--seed": "3"}),
        ("--max_steps -1", {"--max_steps": "-1"}),
        ("--data= --name a=b", {"--data": "", "--name": "a=b"}),
        ("--seed 3 --seed 4", {"--seed": "4"}),
    ],
)
def test_keys_in_words(words: str, found: dict[str, str]) -> None:
    assert overrides(words.split()) == found


@pytest.mark.parametrize("words", ["a.tsv", "--data a.tsv b.tsv", "--bf16=true a", "-n 3", "--"])
def test_words_that_belong_to_no_key(words: str) -> None:
    with pytest.raises(
        RequestError, match=r"unexpected '.*'; settings are given as --key value, a pattern of files in"
    ):
        overrides(words.split())


def test_the_table_of_exits() -> None:
    metrics = {
        f"eval_exit_{kind}/{exit}": value * exit
        for kind, value in (("loss", 0.5), ("accuracy", 0.25), ("agreement", 0.5))
        for exit in (1, 2)
    }
    table = [{"exit": 1, "tokens_per_round": value} for value in (1.5, 2.25)]
    assert exit_rows(metrics, {"table": table}) == [
        ("1", "0.5000", "25.00%", "50.00%", "2.25"),
        ("2", "1.0000", "50.00%", "100.00%", ""),
    ]
    assert exit_rows({}, None) == []


# -- what is shown


def test_lines_with_the_time_left_where_nobody_watches_a_bar(train: Train, tmp_path: Path) -> None:
    done = train("--save_strategy", "steps", "--save_steps", "2", "--eval_share", "0.2", "--eval_strategy=epoch")
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"\d+ examples to learn, \d+ to evaluate on", lines[0])
    assert re.fullmatch(r"0\.0 M parameters, .* GFLOP/s\) and \d+ MiB \(weights .*\)", lines[1])
    steps = [line for line in lines if "  loss " in line]
    assert len(steps) == 2
    for line, step in zip(steps, (2, 4), strict=True):
        assert re.fullmatch(
            rf"step {step}/4  loss \d\.\d{{4}}  lr \d\.\d\de-0\d  [\d,]+ tokens/s  \d+ (s|min \d\d s) left", line
        )
    assert steps[-1].endswith("  0 s left")
    assert [line for line in lines if "saved checkpoint" in line] == [
        "step 2  saved checkpoint-2",
        "step 4  saved checkpoint-4",
    ]
    evaluated = [line for line in lines if "eval loss" in line]
    assert re.fullmatch(
        r"step 4  eval loss \d\.\d{4}, accuracy [\d.]+%; agreement at exit 1: [\d.]+%  2: [\d.]+%  3: [\d.]+%",
        evaluated[0],
    )
    assert re.fullmatch(rf"saved {tmp_path / 'out'} after \d+ s", lines[-1])
    words = [line.split() for line in done.stdout.splitlines()]
    assert ["exit", "loss", "accuracy", "agreement", "tokens/round"] in words
    assert [row[0] for row in words if len(row) == 4 and row[0].isdecimal()] == ["1", "2", "3", "4"]
    assert done.stdout.splitlines()[-1] == f"the model is in {tmp_path / 'out'}"
    assert "\x1b" not in done.output
    refused(train(), 2, f"{tmp_path / 'out'} holds another run: its eval_share is 0.2, now it is None; choose another")


def test_malformed_rows_are_left_out_only_when_asked(train: Train, tmp_path: Path) -> None:
    train(max_steps=1)  # writes the data
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": "twice"}\n')
    refused(train(output_dir=str(tmp_path / "other")), 2, r"pairs\.jsonl:41: .*--skip-bad")
    done = train("--skip-bad", output_dir=str(tmp_path / "other"))
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:2] == ["40 examples to learn, 0 to evaluate on", "1 malformed rows left out, such as:"]
    assert "pairs.jsonl:41: " in lines[2]


def test_keys_are_replaced(train: Train, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text((tmp_path / "pairs.jsonl").read_text())
    output = tmp_path / "2024"
    words = ("--data", "other.jsonl", "--max-steps", 1, "--learning_rate=1e-4", "--output_dir", output, "--bf16")
    done = train(*words, "--curriculum", "last")
    assert done.exit_code == 0, done.stderr
    record = json.loads((output / "provenance.json").read_text())
    recipe = record["recipe"]
    assert recipe["data"] == [{"files": "other.jsonl", "format": "jsonl"}]
    assert (recipe["max_steps"], recipe["learning_rate"], recipe["bf16"]) == (1, 1e-4, True)
    assert "rotation" not in recipe
    assert list(record["data"]) == ["other.jsonl"]
    refused(train(*words, "--curriculum", "last"), 2, "is finished already; choose another --output_dir")


def test_acceptance_is_measured_and_recommended(train: Train, tmp_path: Path) -> None:
    keys = {"eval_share": 0.2, "acceptance_prompts": 2, "acceptance_tokens": 6}
    done = train(**keys, save_strategy="steps", save_steps=2)
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())["acceptance"]
    assert record["prompts"] == 2
    best = max(row["tokens_per_round"] for row in record["table"] if row["exit"] == 1)
    assert any(line.split()[-1] == f"{best:.2f}" for line in done.stdout.splitlines() if line.split()[:1] == ["1"])
    if record["exit"]:
        wanted = f"recommended: --draft early-exit:{record['exit']} --draft-tokens {record['draft_tokens']}"
        assert wanted in done.stdout


# -- what cannot be


def test_an_unknown_recipe_names_those_there_are(run: Any) -> None:
    done = run("train", "topv2-parse")
    refused(done, 2, "there is no recipe 'topv2-parse': neither a file nor one of .*topv2-parser.*did you mean 'topv2")
    assert run("train").exit_code == 2
    assert len(run("train").stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("more", "unexpected 'more'; settings are given as --key value"),
        ("--data a.jsonl b.jsonl", "unexpected 'b.jsonl'; .* a pattern of files in quotes"),
        ("--learning_rat 1", "unknown key 'learning_rat'; .*; did you mean 'learning_rate'"),
        ("--data nowhere.jsonl", "no file matches 'nowhere.jsonl' in .*; check the path"),
        ("--data *.jsnl", "no file matches '.*.jsnl'"),
        ("--data_folder nowhere", "no file matches 'pairs.jsonl' in .*nowhere"),
        ("--output_dir {}/pairs.jsonl", "output_dir .*pairs.jsonl is a file; choose a folder"),
        ("--rotation 5", r"rotational period 5 does not fit 4 layers; use 1\.\.4"),
        ("--curriculum gradul", "unknown curriculum 'gradul'; use last, all, .*; did you mean 'gradual'"),
        ("--dropout 1", "p_max 1.0 is not possible; use 0 .* or more, below 1"),
        ("--dropout 0.1 --dropout_depth expo", "unknown depth profile 'expo'; use exponential, linear"),
        ("--exit_scale -1", "e_scale -1.0 is not possible; use 0 or more"),
        ("--distillation 2", r"distillation 2.0 is not possible; use 0\.\.1"),
        ("--anchor 1 --reference nowhere", "the reference nowhere could not be loaded: .*; give a checkpoint folder"),
        ("--eval_strategy steps", "eval_strategy needs something to evaluate on; give eval_data or eval_share"),
        ("--eval_share 0.00001", "eval_share 1e-05 of 40 examples leaves one side empty; give eval_data"),
        ("--acceptance_prompts 3", "acceptance_prompts are taken from what is evaluated on"),
        ("--max_length 2", "40 of 40 rows are longer than max_length 2 .*; raise max_length, or leave them out"),
        ("--max_length 2 --too_long drop", "no example is as short as max_length 2, so none is left"),
        ("--batching stream --max_length 60000", "tokens are less than one row of 60000; give more text"),
        (
            "--batching stream --max_length 65",
            "rows of 65 tokens do not fit a model of 64 positions; give max_length 64",
        ),
        ("--vocab_size 10", "vocab_size 10 is too small for 256 bytes and 3 given tokens; use 259 or more"),
        ("--tokenizer topv2 --data [{}/note.txt]", "a Document has no frame; TOPv2 examples are pairs"),
        ("--per_device_train_batch_size 50 --dataloader_drop_last", "there is not one batch of per_device_train_batch"),
        ("--optim sdg", "sdg is not a valid OptimizerNames, please select one of"),
        ("--optim adamw_8bit", "You need to install `bitsandbytes`"),
        ("--report_to wandb", "WandbCallback requires wandb to be installed"),
        ("--attention flash", 'the model cannot be built: Specified `attn_implementation="flash"` is not supported'),
        ("--fully_shard", "fully_shard needs several processes; start them with torchrun"),
        ("--init_from nowhere", "either init_from or architecture, not both; give one"),
    ],
)
def test_what_cannot_be_asked_is_one_line(train: Train, tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "note.txt").write_text("a note")
    refused(train(*(word.replace("{}", str(tmp_path)) for word in words.split())), 2, message)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hiden_size": 16},
            "unknown key 'hiden_size' in architecture: a llama model has no such .*mean 'hidden_size'",
        ),
        ({"hidden_size": "wide"}, "architecture is not possible: .*'hidden_size' expected int, got str"),
        ({"hidden_size": 17}, "architecture is not possible: .*not a multiple of the number of attention heads"),
        ({"hidden_act": "silo"}, "the model cannot be built: nothing is called 'silo'"),
        ({"vocab_size": 50}, "the tokenizer has 280 tokens and the model 50; .* leave vocab_size out of architecture"),
        ({"max_position_embeddings": 4}, r"rows of \d+ tokens do not fit a model of 4 positions; give max_length 4"),
        ({"model_type": "lama"}, "model_type 'lama' is unknown to transformers; use llama"),
        ({"model_type": "t5"}, "unknown key|the model cannot be built: Unrecognized configuration class"),
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be(train: Train, changes: dict[str, Any], message: str) -> None:
    refused(train(architecture={**LLAMA, **changes}), 2, message)


def test_an_adapter_on_the_head_is_refused(train: Train) -> None:
    done = train("--lora", "{r: 2, target_modules: [q_proj, lm_head]}")
    refused(
        done, 2, r"the head is wrapped by an adapter \(LoRA\): all exits share one head, .* leave the head out of it"
    )
    refused(
        train("--lora", "{r: 2, target_modules: [nothing]}"), 2, "lora is not possible: Target modules .* not found"
    )
    refused(train("--lora", "{rank: 2}"), 2, "lora is not possible: .*unexpected keyword argument 'rank'")


def test_a_model_that_cannot_be_loaded(train: Train, tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    none = {"architecture": None, "tokenizer": None, "vocab_size": None, "rotation": 2}
    refused(
        train(**none, init_from="nowhere"), 2, "no tokenizer could be loaded from nowhere: .*; give a checkpoint folder"
    )
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    refused(train(**none, init_from=str(broken)), 2, f"{broken} could not be loaded: .*; give a checkpoint folder")


def test_what_fails_is_one_line_too(train: Train, tmp_path: Path) -> None:
    done = train("--learning_rate", "1e18", "--max_steps", "8", "--warmup_steps", "0")
    refused(done, 1, r"not finite at or before step \d; training stopped, and no checkpoint was saved before")
    done = train("--output_dir", tmp_path / "pairs.jsonl" / "out")
    refused(done, 1, "pairs.jsonl/out could not be written: Not a directory; nothing was trained yet; mend that")


def test_debug_shows_where(train: Train) -> None:
    done = train("--rotation", "5", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: rotational period 5 does not fit 4 layers; use 1..4"
