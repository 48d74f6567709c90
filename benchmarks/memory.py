"""Resident memory of generating, above a Python that has torch loaded, beside what weights and cache weigh.

    python -m benchmarks.memory shipped 15m 110m 1.2b --dtype bfloat16

Every way has processes of its own: one loads the checkpoint and continues one prompt, and says after each step what is
resident (pages of files that are mapped and were read count as well). Seven of each, in turns; medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PLAIN = "plain"
WAYS = (PLAIN, "early-exit", "early-exit, shortlist", "early-exit, head of 8 bits", "auto")
STEPS = ("loaded", "generated")


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def in_this_process(folder: str, text: str, way: str, *, dtype: str, new_tokens: int) -> dict[str, int]:
    """Loads and generates once; what imports and later steps bring in must not be here before."""
    import torch

    torch.set_num_threads(2)
    torch.ones(64, 64) @ torch.ones(64, 64)
    idle = resident()
    import layerskip
    from layerskip.decode.drafters.shortlist import fitting
    from layerskip.model.pack import stored_bytes

    llm = layerskip.load(folder, dtype=dtype, device="cpu", max_batch=1)
    found = {"loaded": resident() - idle}
    name, _, with_what = way.partition(", ")
    asked: dict[str, Any] = {"head": "own", "vocabulary": 0}
    if with_what == "shortlist":
        asked["vocabulary"] = fitting(llm.decoder.shape)
    elif with_what:
        asked["head"] = "int8"
    draft = None if name == PLAIN else llm.drafter(name, **asked)
    llm.generate(text, draft=draft, max_tokens=new_tokens, ignore_eos=True)
    found["generated"] = resident() - idle
    assert llm._pool is not None
    cache = llm._pool.cache
    held = sum(part.nbytes for part in (*cache.keys, *cache.values))
    return found | {"weights": stored_bytes(llm.decoder), "cache": held}


def measure(folder: Path, text: str, *, dtype: str, new_tokens: int, repeat: int) -> dict[str, Any]:
    """Medians of every way, bytes."""
    turns: dict[str, list[dict[str, int]]] = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way, found in turns.items():
            asked = [str(folder), text, way, dtype, str(new_tokens)]
            call = [sys.executable, "-m", "benchmarks.memory", "--in-this-process", *asked]
            found.append(json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout))
    ways = {way: {step: median(turn[step] for turn in found) for step in STEPS} for way, found in turns.items()}
    return {part: turns[PLAIN][0][part] for part in ("weights", "cache")} | {"ways": ways}


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    weigh = found["weights"] + found["cache"]
    plain = found["ways"][PLAIN]["generated"]
    told = [
        f"{found['model']['name']}, {found['model']['dtype']}: weights {found['weights'] / 2**20:.0f} MiB, cache "
        f"{found['cache'] / 2**20:.0f} MiB",
        "",
        "| way | MiB loaded | MiB when it has generated | of weights and cache | more than plain |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, steps in found["ways"].items():
        loaded, done = (steps[step] / 2**20 for step in STEPS)
        more = steps["generated"] / plain - 1
        told.append(f"| {way} | {loaded:.0f} | {done:.0f} | {done * 2**20 / weigh:.2f} | {more:+.1%} |")
    return told


def main() -> None:
    """Measures what the command line names."""
    if sys.argv[1:2] == ["--in-this-process"]:
        folder, text, way, dtype, new_tokens = sys.argv[2:]
        print(json.dumps(in_this_process(folder, text, way, dtype=dtype, new_tokens=int(new_tokens))))
        return
    from benchmarks.agreement import PROMPTS
    from benchmarks.side_by_side import SHIPPED, checkpoint
    from layerskip import load
    from layerskip.evaluate import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help=f"sizes of `agreement`, {SHIPPED} or a folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    for word in asked.checkpoints:
        name, folder, file = checkpoint(word, asked.work / "checkpoints")
        text = (file or folder / PROMPTS).read_text(encoding="utf-8").splitlines()[0]
        llm = load(folder, dtype=asked.dtype, device="cpu", max_batch=1)
        found = record.about("memory", llm)
        found |= {"command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]])}
        found["model"] |= {"name": name, "dtype": asked.dtype}
        del llm
        found |= measure(folder, text, dtype=asked.dtype, new_tokens=asked.new_tokens, repeat=asked.repeat)
        record.write(asked.output / f"memory-{name}-{asked.dtype}.json", found)
        print("\n".join([*lines(found), ""]), flush=True)


if __name__ == "__main__":
    main()
