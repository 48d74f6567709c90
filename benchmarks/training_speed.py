"""What the parts of the recipe cost, and what layer dropout saves, in processor time of a training step.

`ablation.py` measures it at its end and writes the table; `ablation.py --only-speed` measures it anew.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from layerskip.environment import machine, versions
from layerskip.train.recipe import read_recipe
from layerskip.train.run import Run
from layerskip.train.trainer import LayerSkipTrainer

NOTHING, HALF = "nothing", "nothing, half of the layers"
PLAIN: dict[str, Any] = {"dropout": 0.0, "curriculum": "last"}
SMALL: dict[str, dict[str, Any]] = {
    NOTHING: PLAIN,
    "dropout only, 0.2": PLAIN | {"dropout": 0.2},
    "dropout only, 0.5": PLAIN | {"dropout": 0.5},
    "exit loss only": {"dropout": 0.0},
    "both, dropout 0.2": {"dropout": 0.2},
    "both + self-distillation": {"dropout": 0.2, "distillation": 0.5},
    "both + anchor": {"dropout": 0.2, "anchor": 1.0},
    HALF: PLAIN,
}
"""Arms of the shipped model's layers; rates at their full height. The last says what the layers' share of a step is,
with nothing of dropout in it."""

WIDE: dict[str, dict[str, Any]] = {name: SMALL[name] for name in (NOTHING, "dropout only, 0.2", HALF)}
WIDE_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""Wider layers, 39 M parameters: moving rows counts for less there, because a layer's products grow with the square of
its width and its rows with the width."""

ROWS = 64


def measure(data_folder: str, folder: Path, batches: int = 16) -> dict[str, Any]:
    """Seconds of steps of every arm, with the shipped model's layers and with wider ones (half as many batches)."""
    torch.set_num_threads(1)
    small = dict(read_recipe("topv2-parser").architecture or {})
    allocator = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    shapes = [
        _measure(SMALL, small, data_folder, folder / "small", batches),
        _measure(WIDE, small | WIDE_SHAPE, data_folder, folder / "wide", batches // 2),
    ]
    return {"versions": versions(), "machine": machine(), "allocator": allocator, "shapes": shapes}


def _measure(
    arms: dict[str, dict[str, Any]], shape: dict[str, Any], data_folder: str, folder: Path, batches: int
) -> dict[str, Any]:
    """The arms take turns at every batch, so that whatever slows the machine slows all of them.

    Each step is run three times, and the quicker of the last two counts: the first to meet a shape pays for preparing
    its kernels, and now and then the system takes a step's pages away. Processor time of one thread, because another
    job on the machine would be in the time of a clock.
    """
    names, tokens = list(arms), []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    with ExitStack() as installed:
        trainers = {}
        for name, keys in arms.items():
            trainer = trainers[name] = _trainer(name, keys, shape, data_folder, folder, batches)
            installed.enter_context(trainer.exits)
            installed.enter_context(trainer.dropout)
            trainer.create_optimizer()
            trainer.model.train()
        for number, batch in enumerate(islice(trainers[NOTHING].get_train_dataloader(), batches)):
            turn = number % len(names)
            tokens.append(int(batch["attention_mask"].sum()))
            for name in names[turn:] + names[:turn]:
                (_, *took), drawn = zip(*(_step(trainers[name], batch, number) for _ in range(3)), strict=True)
                assert len(set(drawn)) == 1, "steps that are compared drop the same rows"
                seconds[name].append(min(took, key=sum))
                rows[name].append(drawn[0])
    found = {}
    for name in names:
        seen, dropped = (sum(counts) for counts in zip(*rows[name], strict=True))
        found[name] = {
            "seconds": [compute + update for compute, update in seconds[name]],
            "update_seconds": [update for _, update in seconds[name]],
            "skipped": dropped / seen if seen else 0.0,
        }
    return {"shape": shape, "rows": ROWS, "tokens": tokens, "arms": found}


def _trainer(
    name: str, keys: dict[str, Any], shape: dict[str, Any], data_folder: str, folder: Path, steps: int
) -> LayerSkipTrainer:
    if name == HALF:
        shape = shape | {"num_hidden_layers": shape["num_hidden_layers"] // 2}
    keys = {
        "seed": 1,
        "max_steps": steps,
        "eval_rows": 1,
        "per_device_train_batch_size": ROWS,
        "architecture": shape,
        "vocab_size": read_recipe("topv2-parser").vocab_size,
        "data_folder": data_folder,
        "output_dir": str(folder / name.replace(" ", "-")),
        **({"dropout_time": "constant", "dropout_depth": "exponential"} if keys["dropout"] else {}),
        **keys,
    }
    if "anchor" in keys:  # what it learns from is of its own size
        keys["reference"] = str(folder / "reference")
        _trainer(NOTHING, PLAIN, shape, data_folder, folder, steps).save_model(keys["reference"])
    trainer = Run(read_recipe("topv2-ablation", overrides=keys)).trainer
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = steps, 1
    return trainer


def _step(trainer: LayerSkipTrainer, batch: dict[str, Any], number: int) -> tuple[tuple[float, float], tuple[int, int]]:
    """Seconds of processor time of the passes and of the optimizer; rows that layers saw, and that they dropped.

    The batch is the first of its optimizer step whenever it is run, so that dropout draws the same rows again.
    """
    trainer.state.global_step, trainer._micro_steps = number, (-1, 0)
    begin = time.process_time()
    trainer.training_step(trainer.model, dict(batch))
    passed = time.process_time()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    took = passed - begin, time.process_time() - passed
    seen, dropped = (sum(counts) for counts in zip(*trainer.dropout.observed(), strict=True))
    return took, (seen, dropped)


def lines(whole: dict[str, Any]) -> list[str]:
    """The part of a page: a table for each shape."""
    settings = ", ".join(f"{name}={value}" for name, value in whole["allocator"].items())
    told = [
        "",
        "## Speed of training",
        "",
        f"Processor time of a step, one thread of an {whole['machine']['processor']}, rates at their full height"
        + (f"; allocator: {settings}" if settings else "")
        + ". The arms take turns at every batch, and the quicker of two equal steps counts. Tokens/s is the tokens of "
        'all batches by their time, and saved the time that is less than with nothing; "by batch" has the median and '
        "the quartiles of what single batches save. Skipped is the share of the layers' rows that dropout left out; "
        "what could be saved is that times the share of a step that the layers' forward and backward passes take "
        "(twice what half as many layers take less). 80% of it is wanted.",
        "",
        "```bash",
        "python -m benchmarks.ablation --only-speed --data-folder ../shared/data --output runs/ablation --report "
        "docs/results",
        "```",
    ]
    for each in whole["shapes"]:
        told += _table(each)
    return told


def _table(whole: dict[str, Any]) -> list[str]:
    arms, shape = whole["arms"], whole["shape"]
    plain = arms[NOTHING]["seconds"]
    savings = {name: [1 - a / b for a, b in zip(arm["seconds"], plain, strict=True)] for name, arm in arms.items()}
    passes, half = (
        [a - b for a, b in zip(arms[name]["seconds"], arms[name]["update_seconds"], strict=True)]
        for name in (NOTHING, HALF)
    )
    share = statistics.median(2 * (a - b) / step for a, b, step in zip(passes, half, plain, strict=True))
    told = [
        "",
        f"### {shape['num_hidden_layers']} layers of width {shape['hidden_size']}",
        "",
        f"{len(plain)} batches of {whole['rows']} rows; the layers' passes are {share:.0%} of a step.",
        "",
        "| arm | tokens/s | ms a step | saved | by batch | skipped | could be saved | saved of that |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in arms.items():
        low, middle, high = statistics.quantiles(savings[name], n=4)
        could, saved = arm["skipped"] * share, 1 - sum(arm["seconds"]) / sum(plain)
        cells = [
            f"{sum(whole['tokens']) / sum(arm['seconds']):,.0f}",
            f"{1000 * statistics.median(arm['seconds']):.0f}",
            f"{saved:.1%}",
            f"{middle:.1%} ({low:.1%} to {high:.1%})",
            f"{arm['skipped']:.1%}",
            f"{could:.1%}",
            f"{saved / could:.0%}" if name.startswith("dropout") else "",
        ]
        told.append(f"| {name} | {' | '.join(cells)} |")
    return told
