"""Several processes: what two of them learn is what one learns, with whole weights (DDP) and with shards (FSDP2)."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from layerskip.train.recipe import read_recipe
from layerskip.train.run import Run

# Numbers that leave no doubt: float64, no random attention, and gradients of their own size (clipping would hide a
# wrong scale of them, as Adam does; plain descent does not).
RECIPE: dict[str, Any] = {
    "architecture": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "dtype": "float64",
    "tokenizer": "bpe",
    "vocab_size": 280,
    "data": "pairs.jsonl",
    "eval_share": 0.1,
    "curriculum": "rotational",
    "rotation": 2,
    "exit_scale": 1.0,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
    "max_steps": 6,
    "save_strategy": "no",
    "logging_steps": 2,
    "use_cpu": True,
    "ddp_backend": "gloo",
}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a recipe file; its output is beside it."""
    data, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    # answers of very different lengths: a mean of the processes' means is not the mean of all tokens
    lines = [{"prompt": f"say {n}", "response": " and".join([f" {n}"] * draw.randint(1, 9))} for n in range(64)]
    (data / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**keys: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        whole = {**RECIPE, "data_folder": str(data), "output_dir": str(folder / "out"), **keys}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(whole))
        return folder / "tiny.yaml"

    return make


def on_two(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on two processes that find each other on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, env=environment)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path.parent / "out" / "model.safetensors")


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def alone(write: Callable[..., Path]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights and metrics of one process with twice the batch."""
    path = write(per_device_train_batch_size=4)
    run = Run(read_recipe(str(path)))
    before = {name: tensor.clone() for name, tensor in run.trainer.model.state_dict().items()}  # type: ignore[union-attr]
    metrics = run.train().metrics
    after = weights(path)
    # far enough from where it began that a gradient of half the size would be seen
    assert all((tensor - before[name]).abs().max() > 1e-5 for name, tensor in after.items())
    return after, metrics


def test_two_processes_learn_what_one_does_with_twice_the_batch(write: Callable[..., Path], alone: Any) -> None:
    path = write(acceptance_prompts=2, acceptance_tokens=6)
    done = on_two("-m", "layerskip", "train", str(path))
    assert done.returncode == 0, done.stderr
    after, metrics = alone
    assert_close(weights(path), after)
    record = json.loads((path.parent / "out" / "provenance.json").read_text())
    assert (record["finished"], record["processes"]) == (True, 2)
    assert record["acceptance"]["prompts"] == 2  # measured by the first, while the other waits
    # evaluated by token over both processes' shares
    for name in ("eval_loss", "eval_exit_loss/1", "eval_exit_accuracy/2", "eval_exit_agreement/3"):
        assert record["metrics"][name] == pytest.approx(metrics[name], rel=1e-6), name
    lines = done.stderr.splitlines()
    for once in ("examples to learn", " parameters, ", "step 6/6", "saved "):
        assert sum(once in line for line in lines) == 1, once
    assert done.stdout.count("the model is in") == 1


@pytest.mark.slow
def test_the_command_shards_and_leaves_whole_weights(write: Callable[..., Path]) -> None:
    whole, sharded = write(**ADAM), write(**ADAM, fully_shard=True, acceptance_prompts=2, acceptance_tokens=6)
    for path in (whole, sharded):
        done = on_two("-m", "layerskip", "train", str(path))
        assert done.returncode == 0, done.stderr
    assert_close(weights(sharded), weights(whole))
    record = json.loads((sharded.parent / "out" / "provenance.json").read_text())
    assert (record["finished"], record["acceptance"]["prompts"]) == (True, 2)


# What each of two processes does; it leaves what it saw in a file of its own.
WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from layerskip.train.recipe import read_recipe
from layerskip.train.run import Run

class Watch(TrainerCallback):
    def __init__(self, stop):
        self.stop, self.sharded, self.held = stop, [], 0
    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        parameters = list(model.parameters())
        self.sharded.append(all(isinstance(p, DTensor) for p in parameters))
        if self.sharded[-1]:
            self.held = sum(p.to_local().numel() for p in parameters)
            moments = [m for s in optimizer.state.values() for n, m in s.items() if "exp_avg" in n]
            self.sharded.append(bool(moments) and all(isinstance(m, DTensor) for m in moments))
        if state.global_step == self.stop:
            raise InterruptedError

def train(path, stop=None, **overrides):
    watch = Watch(stop)
    run = Run(read_recipe(path, overrides=overrides), callbacks=[watch])
    counts = []
    run.trainer.dropout.observed = lambda own=run.trainer.dropout.observed: counts.append(own()) or counts[-1]
    try:
        outcome = run.train()
    except InterruptedError:
        outcome = None
    return {
        "sharded": all(watch.sharded), "steps": len(watch.sharded), "held": watch.held, "counts": counts,
        "parameters": run.trainer.parameters(), "resumed_at": outcome and outcome.resumed_at,
        "metrics": outcome and outcome.metrics, "draws_as": run.trainer.dropout.rank,
    }

jobs, seen = json.loads(open(sys.argv[1]).read()), []
for job in jobs:
    seen.append(train(**job))
    dist.barrier()
    seen[-1]["rank"] = dist.get_rank()
with open(f"{sys.argv[1]}.{dist.get_rank()}", "w") as file:
    json.dump(seen, file)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes outlive the interpreter, and abort it
"""

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_strategy": "steps",
    "load_best_model_at_end": True,
    "greater_is_better": True,  # the first checkpoint, then
    "max_steps": 4,
}
ADAM = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0}


@pytest.fixture(scope="module")
def watched(write: Callable[..., Path]) -> dict[str, Any]:
    """What two processes saw in several runs, one list for each name: what the first saw, and what the second saw."""
    shards = {**ADAM, "fully_shard": True}
    jobs: dict[str, dict[str, Any]] = {
        "ddp": {"path": str(write(**ADAM))},
        "fsdp": {"path": str(write(**shards))},
        "descent": {"path": str(write(fully_shard=True))},
        "dropout": {"path": str(write(**ADAM, dropout=0.5))},
        "dropout-fsdp": {"path": str(write(**shards, dropout=0.5))},
        "cut": {"path": str(cut := write(**shards, save_strategy="steps", save_steps=3)), "stop": 5},
        "resumed": {"path": str(cut)},
        "muon": {"path": str(write(**ADAM, muon=True, max_steps=2))},
        "muon-fsdp": {"path": str(write(**shards, muon=True, max_steps=2))},
        "narrow": {"path": str(write(**shards, save_dtype="bfloat16", max_steps=2))},
        "best": {"path": str(write(**shards, **BEST))},
    }
    folder = Path(jobs["ddp"]["path"]).parent
    (folder / "worker.py").write_text(WORKER)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = on_two(str(folder / "worker.py"), str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in (0, 1))
    return {
        name: {"path": Path(job["path"]), "ranks": pair}
        for (name, job), pair in zip(jobs.items(), zip(first, second, strict=True), strict=True)
    }


def test_fully_sharded_parameters_are_shards_while_training(watched: dict[str, Any]) -> None:
    for name in ("fsdp", "dropout-fsdp", "resumed"):
        ranks = watched[name]["ranks"]
        assert all(rank["sharded"] and rank["steps"] for rank in ranks), name
        assert sum(rank["held"] for rank in ranks) == ranks[0]["parameters"]  # each number once
        assert max(rank["held"] for rank in ranks) < 0.6 * ranks[0]["parameters"]
    assert not any(rank["sharded"] for rank in watched["ddp"]["ranks"])


def test_shards_learn_what_whole_weights_learn(watched: dict[str, Any], alone: Any) -> None:
    assert_close(weights(watched["fsdp"]["path"]), weights(watched["ddp"]["path"]))
    assert_close(weights(watched["dropout-fsdp"]["path"]), weights(watched["dropout"]["path"]))
    assert_close(weights(watched["descent"]["path"]), alone[0])
    metrics = [watched[name]["ranks"][0]["metrics"] for name in ("fsdp", "ddp")]
    for name, value in metrics[1].items():
        if name.startswith("eval_exit") or name == "eval_loss":
            assert metrics[0][name] == pytest.approx(value, rel=1e-6), name
    with pytest.raises(AssertionError):  # dropout is not nothing
        assert_close(weights(watched["dropout"]["path"]), weights(watched["ddp"]["path"]))


def test_shards_of_matrices_are_turned_as_the_whole_ones_are(watched: dict[str, Any]) -> None:
    whole, shards = (weights(watched[name]["path"]) for name in ("muon", "muon-fsdp"))
    for name, tensor in whole.items():  # PyTorch's Muon iterates in bfloat16, and moves them by 3e-3 a step
        torch.testing.assert_close(shards[name], tensor, rtol=0, atol=5e-4, msg=name)


def test_shards_that_are_resumed_equal_a_run_that_was_not_cut(watched: dict[str, Any]) -> None:
    assert [rank["resumed_at"] for rank in watched["resumed"]["ranks"]] == [3, 3]
    assert_close(weights(watched["resumed"]["path"]), weights(watched["fsdp"]["path"]))


def test_the_best_shards_may_be_what_is_left(watched: dict[str, Any]) -> None:
    path = watched["best"]["path"]
    assert_close(weights(path), load_file(path.parent / "out" / "checkpoint-2" / "model.safetensors"))


def test_every_process_drops_as_many_rows(watched: dict[str, Any]) -> None:
    for name in ("dropout", "dropout-fsdp"):
        first, second = (rank["counts"] for rank in watched[name]["ranks"])
        assert first == second
        assert [rank["draws_as"] for rank in watched[name]["ranks"]] == [0, 1]  # as many, not the same
        dropped = [sum(each[layer][1] for each in first) for layer in range(4)]
        assert dropped[0] == 0 < dropped[3]


def test_shards_can_be_saved_in_fewer_bits(watched: dict[str, Any]) -> None:
    narrow = weights(watched["narrow"]["path"])
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
