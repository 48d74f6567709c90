"""Two hundred requests of mixed lengths to one model: what is resident, and how often something was compiled.

    python -m benchmarks.growth --model FOLDER --draft auto
    python -m benchmarks.growth --compile --dtype float32 --draft early-exit --rows 1    # compiles for minutes

Prompts and answers of 1 to 96 tokens, one to `--rows` side by side, drawn anew with a seed; resident memory after every
twenty-fifth request, the kernels that were built and the graphs that torch compiled. The cache of the model keeps the
prompts that it has room for, as in use; what counts is that nothing goes on growing once it is full.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

import psutil
import torch
from torch._dynamo.utils import counters

from layerskip import Auto, EarlyExit, load
from layerskip.decode.draft import Drafter
from layerskip.llm import LLM

EVERY = 25


@dataclass(frozen=True)
class Held:
    """What there is after some requests: bytes that are resident, and graphs that torch compiled in this process."""

    bytes: int
    graphs: int

    @classmethod
    def now(cls) -> Held:
        """At this moment."""
        return cls(int(psutil.Process().memory_info().rss), int(counters["stats"].get("unique_graphs", 0)))


def serve(llm: LLM, *, draft: Drafter | None, requests: int, rows: int = 4, seed: int = 0) -> list[Held]:
    """What there is before the first request and after every twenty-fifth, of one to `rows` prompts each."""
    numbers, vocabulary = random.Random(seed), llm.decoder.shape.vocab
    longest = min(96, llm.decoder.shape.context // 2)
    found = [Held.now()]
    for count in range(1, requests + 1):
        prompts = [
            [numbers.randrange(vocabulary) for _ in range(numbers.randint(1, longest))]
            for _ in range(numbers.randint(1, min(rows, llm.max_batch)))
        ]
        llm.generate(prompts, draft=draft, max_tokens=numbers.randint(1, longest), ignore_eos=True)
        if count % EVERY == 0:
            found.append(Held.now())
    return found


def main() -> None:
    """Serves, and prints a line for every twenty-five requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; the parser of the package where left out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--compile", action="store_true", help="plain weights as graphs of torch.compile")
    parser.add_argument("--draft", choices=["auto", "early-exit", "none"], default="auto")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4, help="prompts side by side, at most")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    llm = load(asked.model, dtype=asked.dtype, weights=asked.weights, max_batch=asked.rows, compile=asked.compile)
    exit = llm.recommended.exit if llm.recommended is not None else max(1, llm.decoder.shape.layers // 4)
    drafters: dict[str, Drafter | None] = {"auto": Auto(exit=exit), "early-exit": EarlyExit(exit), "none": None}
    found = serve(llm, draft=drafters[asked.draft], requests=asked.requests, rows=asked.rows)
    for count, held in zip(range(0, asked.requests + 1, EVERY), found, strict=False):
        print(f"after {count:3} requests: {held.bytes / 2**20:8.1f} MiB resident, {held.graphs} graphs compiled")


if __name__ == "__main__":
    main()
