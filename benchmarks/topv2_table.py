"""The paper's TOPv2 table, rebuilt on the model of the package: early exit alone and self-speculation at three exits.

    python benchmarks/topv2_table.py --data FOLDER_OF_topv2 --report docs/results

Exact match on `--items` utterances of the eval split, decoded in batches; milliseconds a token, acceptance and speedup
on `--timed` of them, one at a time, all ways in turns in one process. The paper exits from 18, 12 and 6 of 24 layers
and drafts 7 tokens on the CPU (LayerSkip, Elhoushi et al., ACL 2024, tables of sections 5.2 and 5.3): the same shares
of our layers, and the setting that the checkpoint recommends. Writes topv2-table.json and topv2-table.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from layerskip import EarlyExit, load
from layerskip.evaluate import evaluate, record
from layerskip.evaluate.bench import bench
from layerskip.evaluate.cell import Cell
from layerskip.evaluate.quality import ALL, Result
from layerskip.evaluate.tasks import topv2
from layerskip.evaluate.ways import Way, drafter_name
from layerskip.llm import LLM

SHARES = (3 / 4, 1 / 2, 1 / 4)
DRAFTED = 7
PAPER = (
    "| way | exit | exact match | acceptance | ms a token | speedup |",
    "|---|---:|---:|---:|---:|---:|",
    "| plain, GPU | 24 | 85.9% (without the recipe) | | 36 | |",
    "| early exit alone, GPU | 18, 12, 6 | 83.3%, 79.4%, 62.9% | | 28, 19, 10 | |",
    "| self-speculation, GPU | 18, 12, 6 | 82.9% | 98.9%, 97.6%, 76.0% | 29, 22, 18 | 1.24, 1.64, 2.0 |",
    "| self-speculation, CPU | 18, 12, 6 | | 99%, 97%, 76% | 134, 104, 87 (plain 165) | 1.23, 1.59, 1.90 |",
)


def main() -> None:
    """Measures, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the tables of TOPv2")
    parser.add_argument("--model", help="a checkpoint; the parser of the package where left out")
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--timed", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--report", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    llm = load(asked.model, dtype=asked.dtype)
    found = measure(llm, asked)
    record.write(asked.report / "topv2-table.json", found)
    (asked.report / "topv2-table.md").write_text(text(found), encoding="utf-8")


def ways(llm: LLM) -> list[Way]:
    """Plain decoding, the exits, and drafts from them."""
    exits = [round(share * llm.decoder.shape.layers) for share in SHARES]
    drafts = [EarlyExit(exit, tokens=DRAFTED) for exit in exits]
    if llm.recommended is not None:
        drafts.append(llm.drafter("early-exit"))
    alone = {f"exit {exit}": Way(f"exit {exit}", exit=exit) for exit in exits}
    drafted = {drafter_name(draft): Way(drafter_name(draft), draft) for draft in drafts}  # one may be recommended
    return [Way("plain"), *alone.values(), *drafted.values()]


def measure(llm: LLM, asked: argparse.Namespace) -> dict[str, Any]:
    """Quality of all, then speed of all."""
    task = topv2(asked.data).limited(asked.items)
    all_ways = ways(llm)
    exits = [way.exit for way in all_ways if way.exit is not None]
    results = {result.name: result for result in evaluate(llm, task, exits=exits, batch=64).results}
    for way in all_ways:
        if way.draft is not None:
            results[way.name] = evaluate(llm, task, plain=False, draft=way.draft, batch=64).results[0]
    plain = results["plain"].completions
    prompts = [item.prompt for item in task.limited(asked.timed).items]
    cells = bench(llm, prompts, all_ways, batch=1, repeat=asked.repeat, max_tokens=task.max_tokens)
    rows = [_row(results[cell.who.name], cell, plain) for cell in cells]
    settings = {"items": asked.items, "timed": asked.timed, "repeat": asked.repeat, "data": "TOPv2, eval split"}
    command = shlex.join(["python", "benchmarks/topv2_table.py", *sys.argv[1:]])
    return {**record.about("table", llm), "command": command, "settings": settings, "rows": rows}


def _row(result: Result, cell: Cell, plain: Any) -> dict[str, Any]:
    score = result.scores[ALL]["exact_match"]
    speed, speedup = cell.tokens_per_second["decode"], cell.speedup["decode"] if cell.speedup else None
    assert speed is not None
    return {
        "name": cell.who.name,
        "mode": cell.who.mode,
        "exact_match": {"mean": score.mean, "error": score.error},
        "identical": sum(a.tokens == b.tokens for a, b in zip(result.completions, plain, strict=True)),
        "acceptance": None if result.acceptance is None else result.acceptance.rate,
        "tokens_per_round": None if result.acceptance is None else result.acceptance.length,
        "ms_per_token": 1000 / speed.median,
        "speedup": None if speedup is None else speedup.record(),
        "timed_identical": cell.identical,
    }


def _short(commit: str) -> str:
    """The first digits of a commit, and whether files had changed since."""
    number, changed, word = commit.partition("+")
    return number[:12] + changed + word


def text(found: dict[str, Any]) -> str:
    """The table for people."""
    settings, machine, model = found["settings"], found["machine"], found["model"]
    lines = [
        "# The paper's TOPv2 table on the model of the package",
        "",
        f"{model['name']}: {model['layers']} layers of width {model['width']}, {model['parameters'] / 1e6:.1f} M "
        f"parameters, {model['dtype']}, greedy. Exact match and acceptance on {settings['items']:,} utterances spread "
        f"over the eval split; milliseconds a token and speedup (ratio of decode tokens/s within a repeat; median and "
        f"range of {settings['repeat']}) on {settings['timed']} of them, one at a time, all ways in turns.",
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {found['versions']['torch']}; layerskip "
        f"{_short(found['commit'] or '')}. `{found['command']}`",
        "",
        "| way | mode | exact match | identical to plain | acceptance | tokens/round | ms a token | speedup |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        score, ratio = row["exact_match"], row["speedup"]
        cells = [
            row["name"],
            row["mode"],
            f"{score['mean']:.1%} ± {100 * score['error']:.1f}",
            f"{row['identical']:,}",
            "" if row["acceptance"] is None else f"{row['acceptance']:.1%}",
            "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}",
            f"{row['ms_per_token']:.2f}",
            "" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The paper's (1.5 B, 24 layers, K = 8 on the GPU, 7 on the CPU):", "", *PAPER]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
