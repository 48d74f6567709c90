"""What each part of the recipe does: six arms, several seeds, the same steps and tokens.

    python -m benchmarks.ablation --data-folder FOLDER_WITH_topv2 --output runs/ablation

Trains `topv2-ablation` with and without layer dropout, early-exit loss, self-distillation and an anchor, evaluates
every model on rows held out of the train split, and writes `results.json` into the output folder; `--report FOLDER`
also writes the table and the figure. A run that was stopped goes on where it was; what is finished is not done
again. The speed of training is measured at the end, the arms in turns, in processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import training_speed
from layerskip.environment import machine, versions
from layerskip.errors import RequestError
from layerskip.evaluate.acceptance import best, measure
from layerskip.evaluate.quality import ALL, evaluate
from layerskip.evaluate.tasks import Item, Task, score_frame
from layerskip.llm import LLM, load
from layerskip.train.recipe import read_recipe
from layerskip.train.run import Run

NOTHING = training_speed.NOTHING
ARMS: dict[str, dict[str, Any]] = {
    NOTHING: {"dropout": 0.0, "curriculum": "last"},
    "dropout only": {"curriculum": "last"},
    "exit loss only": {"dropout": 0.0},
    "both": {},
    "both + self-distillation": {"distillation": 0.5},
    "both + anchor": {"anchor": 1.0},
}
NAME = "topv2-ablation"  # the recipe, and the files of the report
EXIT_ITEMS, DRAFT_ITEMS = 300, 150  # of the held-out rows, for figures by exit; the last layer is scored on all


def main() -> None:
    """Trains what is missing, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--only-train", action="store_true", help="leave speed and results to another call")
    parser.add_argument("--only-speed", action="store_true", help="measure training's speed anew for a report's table")
    parser.add_argument("--report", type=Path, help="folder for the table and the figure")
    asked = parser.parse_args()
    speeds = asked.output / "speed.json"
    if asked.only_speed:
        if not asked.report:
            parser.error("--only-speed measures anew for a report; say which folder it is in with --report")
        whole = json.loads((asked.report / f"{NAME}.json").read_text())
        whole["speed"] = training_speed.measure(asked.data_folder, asked.output / "speed")
        speeds.write_text(json.dumps(whole["speed"], indent=2))
        report(whole, asked.report)
        return
    for seed in asked.seeds:
        for arm in asked.arms:
            one(arm, seed, asked)
    if asked.only_train:
        return
    if not speeds.exists():
        speeds.write_text(json.dumps(training_speed.measure(asked.data_folder, asked.output / "speed"), indent=2))
    runs = [json.loads(path.read_text()) for path in sorted(asked.output.glob("*/result.json"))]
    whole = {"versions": versions(), "machine": machine(), "runs": runs, "speed": json.loads(speeds.read_text())}
    (asked.output / "results.json").write_text(json.dumps(whole, indent=1))
    if asked.report:
        report(whole, asked.report)


def one(arm: str, seed: int, asked: argparse.Namespace) -> None:
    """Trains and evaluates one model, unless that was done.

    Raises:
        RequestError: it was done with other steps or other data.
    """
    folder = asked.output / f"{arm.replace(' ', '-').replace('+-', '')}-{seed}"
    settings = {"steps": asked.steps, "data_folder": asked.data_folder}
    if (folder / "result.json").exists():
        before = json.loads((folder / "result.json").read_text()).get("settings")
        if before != settings:
            raise RequestError(f"{folder} was made with {before}, not with {settings}; choose another --output")
        return
    run = build(arm, seed, asked, folder)
    if not (folder / "model.safetensors").exists():
        print(f"== {arm}, seed {seed}", flush=True)
        outcome = run.train()
        (folder / "metrics.json").write_text(json.dumps(outcome.metrics))
    items = [Item(example.prompt, example.response) for example in run.examples.evaluated]
    task = Task("topv2", items, score_frame, max_tokens=128)
    llm = load(folder, dtype="float32", max_batch=64)
    metrics = json.loads((folder / "metrics.json").read_text())
    result = {"arm": arm, "seed": seed, "settings": settings, "items": len(items), "metrics": metrics}
    result |= {"exact_match": exact_match(llm, task), "speculation": speculation(llm, items)}
    (folder / "result.json").write_text(json.dumps(result))
    print(json.dumps({k: v for k, v in result.items() if k != "metrics"}), flush=True)


def build(arm: str, seed: int, asked: argparse.Namespace, folder: Path, **more: Any) -> Run:
    """The arm's run; the anchor's reference is the run without the recipe, of the same seed."""
    keys = {"seed": seed, "data_seed": seed, "data_folder": asked.data_folder, "output_dir": str(folder)}
    keys |= ARMS[arm] | more
    if "anchor" in keys:
        keys["reference"] = str(asked.output / f"nothing-{seed}")
    if asked.steps and "max_steps" not in more:
        keys["max_steps"] = asked.steps
    if (folder / "model.safetensors").exists():
        keys["output_dir"] = str(folder / "again")  # only its data is wanted
    return Run(read_recipe(NAME, overrides=keys))


def exact_match(llm: LLM, task: Task) -> dict[str, float]:
    """By exit on some rows, and of the last layer on all."""
    layers = llm.decoder.shape.layers
    some = Task(task.name, task.items[:EXIT_ITEMS], task.scorer, max_tokens=task.max_tokens)
    found = evaluate(llm, some, plain=False, exits=range(1, layers + 1)).results
    by_exit = {str(result.exit): result.scores[ALL]["exact_match"].mean for result in found}
    return by_exit | {"all": evaluate(llm, task).results[0].scores[ALL]["exact_match"].mean}


def speculation(llm: LLM, items: Sequence[Item]) -> dict[str, Any]:
    """At the best exit and draft length; what the best of all is where none is predicted to be faster."""
    prompts = [item.prompt for item in items[:DRAFT_ITEMS]]
    found = measure(llm, prompts, exits=range(1, 5), draft_tokens=(2, 4, 6), max_tokens=128)
    chosen = best(found) or max(found, key=lambda each: each.predicted_speedup)
    return chosen.record()


def means(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of a single value."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def report(whole: dict[str, Any], folder: Path) -> None:
    """Writes the results, their table and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / f"{NAME}.md").write_text(text(whole))
    figure(whole, folder / f"{NAME}.png")


def text(whole: dict[str, Any]) -> str:
    """The tables, means with standard errors over the seeds."""
    runs = whole["runs"]
    layers = len(runs[0]["exact_match"]) - 1
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        "# What each part of the recipe does",
        "",
        f"About {runs[0]['items']} rows held out of TOPv2's train split (alarm, timer), {len(seeds)} seeds, mean ± "
        "standard error; the same steps and tokens for every arm. Exact match of the last layer on all, by exit on "
        f"the first {EXIT_ITEMS}; loss and agreement per token with the right tokens before it; self-speculation on "
        f"{DRAFT_ITEMS} rows at the exit and draft length with the best predicted speedup.",
        "",
        "```bash",
        "python -m benchmarks.ablation --data-folder ../shared/data --output runs/ablation --report docs/results",
        "```",
        "",
        "![Loss, agreement and exact match by exit](topv2-ablation.png)",
        "",
        "## Last layer, and self-speculation",
        "",
        "| arm | exact match | less nothing's, by seed | loss | acceptance | tokens per round | best (E, K) |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    plain = {run["seed"]: run["exact_match"]["all"] for run in runs if run["arm"] == NOTHING}
    for arm, found in arms(runs):
        less = [run["exact_match"]["all"] - plain[run["seed"]] for run in found if run["seed"] in plain]
        best_at = ", ".join(f"({run['speculation']['exit']}, {run['speculation']['draft_tokens']})" for run in found)
        cells = [
            _cell([run["exact_match"]["all"] for run in found], percent=True),
            _cell(less, percent=True),
            _cell([run["metrics"][f"eval_exit_loss/{layers}"] for run in found]),
            _cell([run["speculation"]["rate"] for run in found], percent=True),
            _cell([run["speculation"]["tokens_per_round"] for run in found]),
            best_at,
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for title, value in (
        ("Exact match by exit", lambda run, exit: 100 * run["exact_match"][str(exit)]),
        ("Loss by exit", lambda run, exit: run["metrics"][f"eval_exit_loss/{exit}"]),
        (
            "Agreement with the last layer by exit, %",
            lambda run, exit: 100 * run["metrics"][f"eval_exit_agreement/{exit}"],
        ),
    ):
        lines += ["", f"## {title}", "", "| arm |" + "".join(f" {exit} |" for exit in range(1, layers + 1))]
        lines.append("|---|" + "---:|" * layers)
        for arm, found in arms(runs):
            cells = [_cell([value(run, exit) for run in found]) for exit in range(1, layers + 1)]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += _verdicts(runs)
    return "\n".join(lines + (training_speed.lines(whole["speed"]) if "speed" in whole else [])) + "\n"


def _verdicts(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where each arm's exits and last layer stand beside no recipe at all, by more than a standard error or not."""
    layers = len(runs[0]["exact_match"]) - 1
    plain = {run["seed"]: run for run in runs if run["arm"] == NOTHING}
    middle = [str(exit) for exit in range(2, layers)]
    if not plain:
        return []

    def gain(run: dict[str, Any], exits: Sequence[str]) -> float:
        other = plain[run["seed"]]
        return statistics.fmean(run["exact_match"][exit] - other["exact_match"][exit] for exit in exits)

    lines = [
        "",
        "## What that says",
        "",
        f"Exact match less that of no recipe with the same seed: the mean over exits 2 to {layers - 1}, and the last "
        'layer on all rows ("lower" or "higher" where it is so by more than its standard error).',
        "",
        f"| arm | exits 2 to {layers - 1} | last layer | which is |",
        "|---|---:|---:|---|",
    ]
    for arm, found in arms(runs):
        found = [run for run in found if run["seed"] in plain]
        if arm == NOTHING or not found:
            continue
        mean, error = means([gain(run, ["all"]) for run in found])
        if math.isnan(error):  # a single seed says nothing about another
            last, word = f"{mean:+.2%}", ""
        else:
            last = f"{mean:+.2%} ± {error:.2%}"
            word = "equal" if abs(mean) <= error else "higher" if mean > 0 else "lower"
        cells = [_cell([gain(run, middle) for run in found], percent=True), last, word]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float], *, percent: bool = False) -> str:
    if not values:
        return ""
    mean, error = means(values)
    shown, scatter = (f"{mean:.1%}", f"{error:.1%}") if percent else (f"{mean:.3g}", f"{error:.2g}")
    return shown if math.isnan(error) else f"{shown} ± {scatter}"


def figure(whole: dict[str, Any], path: Path) -> None:
    """Loss, agreement and exact match over exits, one line per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = whole["runs"]
    exits = range(1, len(runs[0]["exact_match"]))
    panels = {
        "loss": lambda run, exit: run["metrics"][f"eval_exit_loss/{exit}"],
        "agreement with the last layer, %": lambda run, exit: 100 * run["metrics"][f"eval_exit_agreement/{exit}"],
        "exact match, %": lambda run, exit: 100 * run["exact_match"][str(exit)],
    }
    drawn, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for arm, found in arms(runs):
            points = [means([value(run, exit) for run in found]) for exit in exits]
            axis.errorbar(
                list(exits), [mean for mean, _ in points], [error for _, error in points], label=arm, capsize=2
            )
        axis.set_title(title)
        axis.set_xlabel("exit")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    drawn.savefig(path, dpi=110)


def arms(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The runs of each arm that has any."""
    for arm in ARMS:
        if found := [run for run in runs if run["arm"] == arm]:
            yield arm, found


if __name__ == "__main__":
    main()
