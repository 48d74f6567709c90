"""Runs of a recipe: what is left when they end, when they are killed, when the disk is full and when numbers break."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import layerskip
from layerskip.cli import app, main
from layerskip.cli.progress import TrainingProgress
from layerskip.errors import NumericalError, RequestError, StorageError
from layerskip.train import experiment
from layerskip.train.data import Example, Packed, Padded
from layerskip.train.estimate import duration
from layerskip.train.recipe import read_recipe
from layerskip.train.run import Outcome, Run

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,  # so that a resumed run has random numbers to get right
}
RECIPE: dict[str, Any] = {
    "architecture": LLAMA,
    "tokenizer": "topv2",
    "vocab_size": 320,
    "data": "alarm.tsv",
    "dropout": 0.3,
    "dropout_time": "exponential",
    "curriculum": "rotational",
    "rotation": 3,
    "exit_scale": 1.0,
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "max_steps": 40,
    "save_steps": 5,
    "logging_steps": 5,
    "use_cpu": True,
}
MADE_ANEW = {"architecture": None, "tokenizer": None, "vocab_size": None}
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a TOPv2 table, pairs and texts, all of them generated."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    table = ["domain\tutterance\tsemantic_parse"]
    for _ in range(240):
        hour, day = f"{draw.randint(1, 12)} {draw.choice(['am', 'pm'])}", draw.choice(["", " today", " on monday"])
        table.append(
            f"alarm\tset an alarm for {hour}{day}\t[IN:CREATE_ALARM set an alarm [SL:DATE_TIME for {hour}{day} ] ]"
        )
    (folder / "alarm.tsv").write_text("\n".join(table) + "\n")
    pairs = [{"prompt": f"twice {number}", "response": f" {2 * number}"} for number in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stories = (f"once there were {draw.randint(2, 99)} cats and a dog." * draw.randint(1, 3) for _ in range(60))
    (folder / "stories.txt").write_text("\n\n".join(stories))
    return folder


@pytest.fixture(scope="session")
def write(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a recipe file; its output is beside it: `write(rotation=2)`; None leaves a key out."""

    def make(**keys: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        whole = {**RECIPE, "data_folder": str(data), "output_dir": str(folder / "out"), **keys}
        (folder / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))
        return folder / "tiny.yaml"

    return make


class Killed(Exception):
    """What ends a run in this process."""


class At(TrainerCallback):
    """Calls something when a step has ended, before anything is logged or saved."""

    def __init__(self, step: int, action: Callable[[Any], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            self.action(model)


def killed(_: Any) -> None:
    raise Killed


def built(path: Path, *callbacks: TrainerCallback, **overrides: Any) -> Run:
    return Run(read_recipe(str(path), overrides=overrides), callbacks=callbacks)


def trained(path: Path, *callbacks: TrainerCallback, **overrides: Any) -> Outcome:
    return built(path, *callbacks, **overrides).train()


def out(path: Path) -> Path:
    return path.parent / "out"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def finite(folder: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


# -- what is left when it ends


@pytest.fixture(scope="module")
def finished(write: Write) -> Path:
    """The folder of a run through the command line, with evaluation and acceptance."""
    path = write(
        max_steps=12,
        save_steps=6,
        eval_share=0.1,
        eval_strategy="steps",
        eval_steps=6,
        acceptance_prompts=3,
        acceptance_tokens=8,
        save_dtype="bfloat16",
        licence="cc-by-sa-4.0",
        description="Sets alarms.",
    )
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.stderr
    return out(path)


def test_a_finished_folder_is_an_ordinary_checkpoint(finished: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert (model.dtype, model.config.use_cache, model.config.vocab_size) == (torch.bfloat16, True, len(tokenizer))
    assert {tensor.dtype for tensor in weights(finished).values()} == {torch.bfloat16}
    llm = layerskip.load(finished, dtype="float32", device="cpu")
    ids = tokenizer("set an alarm for 7 am", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = llm.decoder.run(
            llm.decoder.embed(ids), torch.arange(ids.shape[1])[None], llm.decoder.cache(rows=1, slots=ids.shape[1])
        )
        theirs = model.float().eval()(input_ids=ids).logits
    torch.testing.assert_close(llm.decoder.logits(hidden), theirs, rtol=1e-4, atol=1e-4)
    assert llm.generate("set an alarm for 7 am", max_tokens=4).tokens
    assert not (finished / ".unfinished").exists()
    assert checkpoints(finished) == [6, 12]


def test_provenance_says_what_was_run_on_what(finished: Path, data: Path) -> None:
    record = json.loads((finished / "provenance.json").read_text())
    assert (record["finished"], record["run"]["steps"], record["processes"]) == (True, 12, 1)
    assert record["recipe"]["rotation"] == 3
    assert record["recipe"] == read_recipe(str(finished.parent / "tiny.yaml")).record()
    assert record["data"] == {"alarm.tsv": sha256(data / "alarm.tsv")}
    assert {name: len(digest) for name, digest in record["digests"].items()} == {"data": 64, "eval_data": 64}
    assert sum(record["examples"].values()) == 240
    assert {"python", "layerskip", "torch", "transformers"} <= record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(finished).parameters())
    assert [session["from_step"] for session in record["sessions"]] == [0]
    assert record["sessions"][0]["hours"] == record["run"]["hours"] > 0


def test_metrics_of_every_exit_are_in_provenance_config_and_card(finished: Path) -> None:
    record = json.loads((finished / "provenance.json").read_text())
    metrics, card = record["metrics"], (finished / "README.md").read_text()
    for exit in range(1, 5):
        loss, accuracy, agreement = (metrics[f"eval_exit_{kind}/{exit}"] for kind in ("loss", "accuracy", "agreement"))
        assert f"| {exit} | {loss:.4f} | {accuracy:.2%} | {agreement:.2%} |" in card
    assert metrics["eval_exit_agreement/4"] == 1
    table = record["acceptance"]["table"]
    assert {row["exit"] for row in table} == {1, 2}
    for row in table:
        figures = f"| {row['acceptance']:.1%} | {row['tokens_per_round']:.2f} |"
        assert f"| {row['exit']} | {row['draft_tokens']} {figures}" in card
    assert "license: cc-by-sa-4.0" in card
    assert "Sets alarms." in card
    assert "12 steps, 0." in card
    settings = json.loads((finished / "config.json").read_text())["layerskip"]
    assert settings["recipe"]["dropout"] == 0.3
    assert settings["quality"]["loss/4"] == metrics["eval_exit_loss/4"]
    for name in ("exit", "draft_tokens"):
        assert settings[name] == record["acceptance"][name]


def test_every_checkpoint_was_evaluated_and_drafted_for_itself(finished: Path) -> None:
    history = json.loads((finished / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_exit_loss/1" in entry] == [6, 12]
    # a checkpoint is measured when it is complete, so the next one tells
    [measured] = [entry for entry in history if "acceptance/1" in entry]
    kinds = ("acceptance", "tokens_per_round", "draft_tokens", "predicted_speedup")
    assert {f"{kind}/{exit}" for kind in kinds for exit in (1, 2)} | {"step"} == measured.keys()
    assert measured["step"] == 6


def test_what_is_evaluated_is_what_is_saved(write: Write) -> None:
    path = write(save_dtype="bfloat16", max_steps=6, eval_share=0.2, learning_rate=0.03)
    run = built(path)
    metrics = run.train().metrics
    run.trainer.model.load_state_dict(  # type: ignore[union-attr]  # the saved numbers, in float32
        {**AutoModelForCausalLM.from_pretrained(out(path), dtype=torch.float32).state_dict()}
    )
    run.trainer.model.float()  # type: ignore[union-attr]
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_files_of_one_name_have_a_hash_each(write: Write, data: Path, tmp_path: Path) -> None:
    lines = (data / "alarm.tsv").read_text().splitlines(keepends=True)
    for name, part in (("learnt", lines[:150]), ("checked", [lines[0], *lines[150:]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alarm.tsv").write_text("".join(part))
    path = write(data_folder=str(tmp_path), data="learnt/alarm.tsv", eval_data="checked/alarm.tsv", max_steps=2)
    trained(path)
    record = json.loads((out(path) / "provenance.json").read_text())
    wanted = {sha256(tmp_path / name / "alarm.tsv") for name in ("learnt", "checked")}
    assert set(record["data"].values()) == wanted


def test_an_adapter_begins_as_the_seed_says(finished: Path, write: Write) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))  # what a process happens to have
        path = write(**MADE_ANEW, init_from=str(finished), lora={"r": 4, "target_modules": ["q_proj"]}, seed=seed)
        model = built(path).trainer.model
        drawn.append(next(p for name, p in model.named_parameters() if "lora_A" in name))  # type: ignore[union-attr]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"batching": "packed", "max_length": 90, "data": "stories.txt", "tokenizer": "bpe", "vocab_size": 270},
            "do not fit a model of 64 positions; give max_length 64",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rat": 0.1}},
            "unexpected keyword argument 'min_lr_rat'",
        ),
    ],
    ids=["positions", "schedule"],
)
def test_what_would_fail_late_is_refused(write: Write, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        trained(write(**keys))


def test_packed_rows_may_be_longer_than_the_models_positions(write: Write) -> None:
    trained(write(batching="packed", max_length=90, max_steps=2))  # every document begins at position 0


@pytest.mark.parametrize("batching", ["padded", "packed", "stream"])
def test_every_batching_learns(write: Write, batching: str) -> None:
    keys = {"batching": batching, "data": "stories.txt", "tokenizer": "bpe", "vocab_size": 300, "max_length": 48}
    text = {"data": {"files": "stories.txt", "separator": "\n\n"}, "train_sampling_strategy": "random"}
    path = write(**{**keys, **text}, max_steps=12, learning_rate=0.01, eval_share=0.2, save_strategy="no")
    run = built(path)
    lengths = set(map(len, (row["input_ids"] for row in run.trainer.train_dataset)))  # type: ignore[union-attr]
    assert max(lengths) <= 48
    assert (len(lengths) == 1) == (batching == "stream")
    assert isinstance(run.trainer.data_collator, Packed if batching == "packed" else Padded)
    metrics = run.train().metrics
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert metrics["eval_loss"] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out(path))
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("once there were 7 cats")["input_ids"][1:]) == "once there were 7 cats"


def test_a_streamed_data_set_can_be_resumed(finished: Path, data: Path, write: Write, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": f"set an alarm for {hour} pm and one for {hour + 3} am"}) for hour in range(60)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines) + "\n")
    keys = {
        **MADE_ANEW,
        "init_from": str(finished),
        "data": {"hub": str(tmp_path / "set"), "streaming": True},
        "batching": "stream",
        "max_length": 16,
        "max_steps": 6,
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    whole, cut = write(**keys), write(**keys)
    trained(whole)
    with pytest.raises(Killed):
        trained(cut, At(5, killed))
    assert trained(cut).resumed_at == 4
    assert sha256(out(whole) / "model.safetensors") == sha256(out(cut) / "model.safetensors")


def test_training_goes_on_from_a_finished_folder(finished: Path, write: Write) -> None:
    keys = {**MADE_ANEW, "init_from": str(finished), "data": "pairs.jsonl", "max_steps": 3, "save_strategy": "no"}
    same, other = write(**keys, learning_rate=0.0, weight_decay=0.0), write(**keys, save_dtype="float32")
    trained(same)
    before, after = weights(finished), weights(out(same))
    assert all(torch.equal(tensor.float(), after[name]) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert (out(same) / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()
    trained(other)
    assert not torch.equal(after["model.norm.weight"], weights(out(other))["model.norm.weight"])
    # what the folder that was begun from said about itself is not said again
    settings = json.loads((out(other) / "config.json").read_text())["layerskip"]
    assert set(settings) == {"recipe"}


def test_what_is_held_out_is_decided_by_the_seed_of_the_data(write: Write) -> None:
    def held(**keys: int) -> list[Example]:
        return experiment.examples(read_recipe(str(write(eval_share=0.2, **keys)))).evaluated

    assert held(seed=1, data_seed=0) == held(seed=2, data_seed=0) == held(seed=0)
    assert held(seed=1) != held(seed=2)


def test_training_goes_on_from_the_mean_of_several_folders(finished: Path, write: Write, tmp_path: Path) -> None:
    other, wider = write(**MADE_ANEW, init_from=str(finished), max_steps=3, save_dtype="float32"), tmp_path / "wider"
    trained(other)
    keys = {**MADE_ANEW, "data": "pairs.jsonl", "max_steps": 1, "learning_rate": 0.0, "weight_decay": 0.0}
    mean = write(**keys, init_from=[str(finished), str(out(other)), str(out(other))])
    trained(mean)
    one, two, made = (weights(folder) for folder in (finished, out(other), out(mean)))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name].float() + 2 * two[name]) / 3)

    config = AutoConfig.from_pretrained(finished)
    config.intermediate_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(wider)
    with pytest.raises(RequestError, match=r"wider is not of the shape of .*; name equal ones"):
        trained(write(**keys, init_from=[str(finished), str(wider)]))


def test_lora_leaves_an_adapter_and_a_merged_model(finished: Path, write: Write) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    path = write(
        **MADE_ANEW, init_from=str(finished), lora=lora, max_steps=6, save_steps=2, eval_share=0.1, learning_rate=0.01
    )
    with pytest.raises(Killed):
        trained(path, At(5, killed))
    outcome = trained(path)
    assert (outcome.resumed_at, outcome.steps) == (4, 6)
    assert (out(path) / "adapter_model.safetensors").is_file()
    assert not (out(path) / "model.safetensors").exists()
    merged = out(path) / "merged"
    assert json.loads((merged / "config.json").read_text())["layerskip"]["quality"]
    assert (merged / "README.md").is_file()
    assert not torch.equal(
        weights(merged)["model.layers.0.self_attn.q_proj.weight"],
        weights(finished)["model.layers.0.self_attn.q_proj.weight"].float(),
    )
    assert torch.equal(
        weights(merged)["model.layers.0.mlp.up_proj.weight"],
        weights(finished)["model.layers.0.mlp.up_proj.weight"].float(),
    )
    llm = layerskip.load(merged, device="cpu")
    assert llm.generate("set an alarm", max_tokens=3).tokens
    # the merged model is the one that was evaluated
    again = built(write(**MADE_ANEW, init_from=str(merged), eval_share=0.1)).trainer.evaluate()
    assert again["eval_loss"] == pytest.approx(outcome.metrics["eval_loss"], rel=1e-5)


def test_gradient_checkpointing_gives_equal_weights(write: Write) -> None:
    paths = [write(max_steps=6, save_strategy="no", activation_checkpointing=on) for on in (False, True)]
    for path in paths:
        trained(path)
    one, other = (weights(out(path)) for path in paths)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_rows_that_are_too_long_are_counted(write: Write) -> None:
    told: list[str] = []
    recipe = read_recipe(str(write(max_length=22, too_long="drop")))
    run = Run(recipe, tell=told.append)
    left_out = 240 - len(run.trainer.train_dataset)  # type: ignore[arg-type]
    assert 0 < left_out < 240
    assert f"{left_out} examples longer than max_length 22 left out" in told


# -- numbers that break


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(write: Write) -> None:
    path = write(learning_rate=1e18, save_steps=1, logging_steps=500, max_steps=30, warmup_steps=0)
    with pytest.raises(NumericalError, match=r"not finite at or before step \d+; training stopped, and the last comp"):
        trained(path)
    steps = checkpoints(out(path))
    assert steps
    assert finite(out(path) / f"checkpoint-{steps[-1]}")
    assert not (out(path) / "model.safetensors").exists()
    assert not json.loads((out(path) / "provenance.json").read_text())["finished"]


def test_broken_gradients_beside_a_finite_loss_are_not_saved(write: Write) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            next(model.parameters())[0] = float("nan")  # BOS's row: what an optimizer makes of one NaN

    path = write(save_steps=2, logging_steps=500)
    with pytest.raises(NumericalError, match=r"weights are not finite at or before step 4; .* is .*/checkpoint-2"):
        trained(path, At(4, poison))
    assert checkpoints(out(path)) == [2]
    assert finite(out(path) / "checkpoint-2")


@pytest.mark.parametrize("steps", [2, 6])
def test_a_poisoned_start_is_found_without_logs_or_checkpoints(finished: Path, write: Write, steps: int) -> None:
    import shutil

    path = write(**MADE_ANEW, max_steps=steps, save_strategy="no", logging_steps=500)
    poisoned = path.parent / "poisoned"
    shutil.copytree(finished, poisoned, ignore=shutil.ignore_patterns("checkpoint-*"))
    model = AutoModelForCausalLM.from_pretrained(poisoned)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(poisoned)
    with pytest.raises(NumericalError, match=r"the loss is not finite .*no checkpoint was saved before"):
        trained(path, init_from=str(poisoned))
    assert not (out(path) / "model.safetensors").exists()


# -- resuming


@pytest.fixture(scope="module")
def whole(write: Write) -> str:
    """The sha256 of what RECIPE gives when nothing happens to it."""
    path = write(save_strategy="no")
    trained(path)
    return sha256(out(path) / "model.safetensors")


@pytest.fixture
def cut(write: Write) -> Path:
    """A run that ended at step 12 of 40, with checkpoints 5 and 10."""
    path = write()
    with pytest.raises(Killed):
        trained(path, At(12, killed))
    return path


def test_the_same_command_again_resumes(cut: Path, whole: str) -> None:
    # none of them changes a weight; 42 is what the seed was
    outcome = trained(cut, save_total_limit=2, logging_steps=7, per_device_eval_batch_size=3, seed=42)
    assert (outcome.resumed_at, outcome.steps) == (10, 40)
    assert sha256(out(cut) / "model.safetensors") == whole
    assert checkpoints(out(cut)) == [35, 40]
    record = json.loads((out(cut) / "provenance.json").read_text())
    assert [session["from_step"] for session in record["sessions"]] == [0, 10]
    assert record["run"]["hours"] == sum(session["hours"] for session in record["sessions"])
    assert all(session["hours"] > 0 for session in record["sessions"])


def test_a_run_that_ended_after_its_last_checkpoint_takes_no_step_more(write: Write, whole: str) -> None:
    class AtSave(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 40:
                raise Killed

    path = write()
    with pytest.raises(Killed):
        trained(path, AtSave())
    assert checkpoints(out(path))[-1] == 40
    outcome = trained(path)
    assert (outcome.resumed_at, outcome.steps) == (40, 40)
    assert sha256(out(path) / "model.safetensors") == whole


def test_another_recipe_is_not_resumed(cut: Path, data: Path, write: Write) -> None:
    for key, value, message in (
        ("learning_rate", 1e-3, "its learning_rate is 0.003, now it is 0.001; choose another --output_dir"),
        ("rotation", 2, "its rotation is 3, now it is 2"),
        ("max_length", 50, "its max_length is None, now it is 50"),
        ("data", "pairs.jsonl", "its data is .*alarm.tsv.*, now it is .*pairs.jsonl"),
    ):
        with pytest.raises(RequestError, match=f"{out(cut)} holds another run: {message}"):
            built(cut, **{key: value})
    (out(cut) / "provenance.json").unlink()
    with pytest.raises(RequestError, match="holds checkpoints of something else; choose another --output_dir"):
        built(cut)
    (out(cut) / "provenance.json").write_text("{")
    with pytest.raises(RequestError, match=r"provenance\.json is not JSON"):
        built(cut)
    (out(cut) / "provenance.json").write_text("{}")
    with pytest.raises(RequestError, match=r"provenance\.json was not written by layerskip train"):
        built(cut)


def test_other_data_under_the_same_name_is_not_resumed(write: Write, data: Path, tmp_path: Path) -> None:
    (tmp_path / "alarm.tsv").write_bytes((data / "alarm.tsv").read_bytes())
    path = write(data_folder=str(tmp_path), save_steps=2)
    with pytest.raises(Killed):
        trained(path, At(3, killed))
    lines = (tmp_path / "alarm.tsv").read_text().splitlines()
    (tmp_path / "alarm.tsv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(
        RequestError, match=r"holds a run on other data: its digest was .*; put the files back, or choo"
    ):
        built(path)
    assert built(path, data_folder=str(data)).resume_from == out(path) / "checkpoint-2"


def test_a_finished_folder_is_left_alone(finished: Path) -> None:
    with pytest.raises(RequestError, match=f"{finished} is finished already; choose another --output_dir"):
        built(finished.parent / "tiny.yaml")


# -- killed


def started(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "layerskip", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """Kills it where `seen` holds while it is stopped, so that what was seen is how it died."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        if seen():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            if seen():
                process.kill()
                process.wait()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    process.kill()
    output = process.communicate()[0]
    raise AssertionError(f"it ended before it could be killed: {output[-2000:]}")


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_gives_the_same_weights(times: int, write: Write, whole: str) -> None:
    path = write()
    folder = out(path)
    # while a checkpoint is being written
    kill_when(started(path), lambda: bool(checkpoints(folder)) and (folder / ".unfinished").exists())
    assert (folder / ".unfinished").exists()
    first = resumed_at = checkpoints(folder)[-1]
    if times == 2:  # between two checkpoints, at some step
        kill_when(started(path), lambda: checkpoints(folder)[-1] > first and not (folder / ".unfinished").exists())
        resumed_at = checkpoints(folder)[-1]
        assert first < resumed_at
    assert resumed_at < 40
    assert not (folder / "model.safetensors").exists()
    process = started(path)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"resuming from {folder / f'checkpoint-{resumed_at}'}" in output
    assert sha256(folder / "model.safetensors") == whole
    assert not (folder / ".unfinished").exists()
    sessions = json.loads((folder / "provenance.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == sorted({0, first, resumed_at})


# -- a full disk


def train_without_room(recipe: Path, moment: str, limit: int, told: int) -> None:
    """Trains in a process in which no file can grow beyond a limit from some moment on: to a program that is a disk
    without room, or a used-up quota. What it says goes into a pipe, which has no limit."""

    def full(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if moment == "train_end" or state.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    os.dup2(told, 1)
    os.dup2(told, 2)
    sys.stdout, sys.stderr = (os.fdopen(place, "w", buffering=1) for place in (1, 2))
    setattr(TrainingProgress, "on_" + moment, full)
    sys.argv[1:] = ["train", str(recipe)]
    main()


# when the disk is full, the bytes that still fit into a file, the checkpoint that is kept
FULL = {"weights": ("save", 4_000, 5), "optimizer": ("save", 80_000, 5), "model": ("train_end", 4_000, 40)}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_leaves_the_last_checkpoint(write: Write, whole: str, name: str) -> None:
    path, (moment, limit, kept) = write(), FULL[name]
    folder = out(path)
    told, said = os.pipe()
    # a fork: the imports are there
    process = multiprocessing.get_context("fork").Process(target=train_without_room, args=(path, moment, limit, said))
    process.start()
    os.close(said)
    with os.fdopen(told) as pipe:
        lines = pipe.read().splitlines()
    process.join()
    assert process.exitcode == 1, lines
    lost = folder / f"checkpoint-{kept + 5}" if kept < 40 else folder
    # torch keeps for itself what the system told it
    why = r"No space left on device, or so it seems \(.*\)" if name == "optimizer" else "File too large"
    kept_folder = re.escape(str(folder / f"checkpoint-{kept}"))
    message = (
        f"error: {re.escape(str(lost))} could not be written: {why}; the last complete checkpoint is {kept_folder}; "
    )
    assert re.fullmatch(message + "mend that, then run the same command again", lines[-1])
    assert sum("error: " in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    assert checkpoints(folder)[-1] == kept
    assert finite(folder / f"checkpoint-{kept}")
    assert not (folder / "model.safetensors").exists()
    outcome = trained(path)
    assert (outcome.resumed_at, outcome.steps) == (kept, 40)
    assert sha256(folder / "model.safetensors") == whole


def test_a_full_disk_at_the_very_end_leaves_the_model_whole(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written beside the weights, once they are there, replaces what was there only when it is whole."""
    path = write(max_steps=2, save_strategy="no")
    written = Path.write_text

    def full(place: Path, text: str, **how: Any) -> int:
        if place.name.startswith("config.json"):
            written(place, text[:40], **how)
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(place, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"could not be written: No space left on device; the model itself is in"):
        trained(path)
    assert AutoModelForCausalLM.from_pretrained(out(path)).config.num_hidden_layers == 4


def test_what_is_pushed_is_the_finished_folder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, str]] = []

    def upload(self: HfApi, *, folder_path: str, **_: Any) -> None:
        texts = [place for place in Path(folder_path).iterdir() if place.suffix in (".json", ".md")]
        pushed.append({place.name: place.read_text() for place in texts})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    path = write(max_steps=2, save_strategy="no", push_to_hub=True, eval_share=0.1)
    trained(path)
    [found] = pushed
    assert json.loads(found["config.json"])["layerskip"]["recipe"]["dropout"] == 0.3
    assert "## Quality at every exit" in found["README.md"]
    assert json.loads(found["provenance.json"])["finished"]
    # a hub that cannot be reached loses nothing
    monkeypatch.setattr(HfApi, "upload_folder", refuse_upload)
    path = write(max_steps=2, save_strategy="no", push_to_hub=True)
    with pytest.raises(StorageError, match=r"could not be uploaded to me/.*: no route; the model is complete there"):
        trained(path)
    assert json.loads((out(path) / "provenance.json").read_text())["finished"]


def refuse_upload(self: HfApi, **_: Any) -> None:
    raise ConnectionError("no route")


# -- what it will take


class Held(TrainerCallback):
    """Bytes of gradients and optimizer state at the first step."""

    def __init__(self, told: list[str]) -> None:
        self.told, self.gradients, self.optimizer = told, 0, 0
        self.told_before: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told_before = self.told_before or list(self.told)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.gradients = sum(size(p.grad) for p in model.parameters() if p.grad is not None)
        self.optimizer = sum(
            size(moment) for held in optimizer.state.values() for name, moment in held.items() if "exp_avg" in name
        )


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("lora", [False, True])
def test_the_estimate_holds_for_what_can_be_counted(finished: Path, write: Write, lora: bool) -> None:
    keys: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "dtype": "float64"}
    if lora:
        keys |= {**MADE_ANEW, "init_from": str(finished), "lora": {"r": 2, "target_modules": ["q_proj"]}}
    told: list[str] = []
    held = Held(told)
    run = Run(read_recipe(str(write(**keys))), callbacks=[held], tell=told.append)
    expected = run.estimate()
    run.train()
    parameters = list(run.trainer.model.parameters())  # type: ignore[union-attr]
    if not lora:
        assert expected.weights == sum(map(size, parameters))
        assert expected.parameters == expected.trained == sum(p.numel() for p in parameters)
    assert expected.gradients == held.gradients > 0
    assert expected.optimizer == held.optimizer == 2 * held.gradients
    assert (expected.trained < expected.parameters) == lora
    [line] = [line for line in held.told_before if " parameters, " in line]
    assert " GFLOP/s) and " in line
    assert run.trainer.state.global_step == 2


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_the_estimate_counts_the_products_of_a_step(finished: Path, write: Write, anchor: float) -> None:
    keys: dict[str, Any] = {"max_steps": 6, "save_strategy": "no", "eval_strategy": "no", "eval_share": None}
    keys |= {"dropout": 0.0, "dropout_time": None, "curriculum": "all", "rotation": None}
    keys |= {"anchor": anchor, "reference": [str(finished)] * 2} if anchor else {}
    run = Run(read_recipe(str(write(**keys))))
    expected = run.estimate()
    with FlopCounterMode(display=False) as counter:
        run.trainer.train()
    assert counter.get_total_flops() / 6 == pytest.approx(expected.flops, rel=0.2)
    assert (expected.weights > 4 * expected.parameters) == bool(anchor)


@pytest.mark.parametrize(("rows", "accumulation"), [(2, 1), (4, 7), (64, 4)])
def test_the_estimate_takes_as_many_steps_as_training(write: Write, rows: int, accumulation: int) -> None:
    keys: dict[str, Any] = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    run = Run(read_recipe(str(write(**keys, max_steps=-1, num_train_epochs=0.6, save_strategy="no"))))
    estimated = run.estimate()
    run.trainer.train()
    each = run.trainer.estimate(done=run.trainer.state.max_steps - 1)  # of one step
    steps = (estimated.seconds * estimated.flops_per_second) / (each.seconds * each.flops_per_second)
    assert round(steps) == run.trainer.state.global_step


def test_the_estimate_counts_what_is_still_to_do(cut: Path) -> None:
    run = built(cut)
    rest, whole = run.estimate(), run.trainer.estimate()
    assert rest.flops == whole.flops
    assert rest.seconds * rest.flops_per_second == pytest.approx(0.75 * whole.seconds * whole.flops_per_second)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"), (42, "42 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (754, "12 min 34 s"), (3599, "59 min 59 s"),
        (3600, "1 h 00 min"), (7300, "2 h 01 min"), (360_000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_durations_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_another_number_of_processes_is_not_resumed(write: Write) -> None:
    path = write(save_steps=2)
    with pytest.raises(Killed):
        trained(path, At(3, killed))
    place = out(path) / "provenance.json"
    record = json.loads(place.read_text())
    place.write_text(json.dumps(record | {"processes": 2}))
    with pytest.raises(RequestError, match="holds a run of 2 processes, now there is 1; use torchrun --nproc-per-n"):
        built(path)
