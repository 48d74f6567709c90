"""Where the time of a round goes, and what the cost model makes of it.

    python -m benchmarks.rounds 15m 110m shipped --dtype bfloat16 --output benchmarks/results/rounds

Plain decoding and self-speculation take turns on the same prompts, with a watch on what the loop calls. What no watch
can see from outside is split by timing parts alone, with the same positions: a draft's head, and the attention over the
slots in use (a span over them, less a span over none). Python is what is left of a round.

The cost model predicts the speedup from parts that are timed alone, in the same run: N tokens a round, against

    K (draft layers + head) + draft layers + other layers over K + 1 positions + head over K + 1 positions
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.questions import Question, questions
from benchmarks.side_by_side import SHIPPED, checkpoint
from layerskip import EarlyExit
from layerskip.decode.sampling import Chosen, Law
from layerskip.evaluate import record
from layerskip.evaluate.follow import fresh
from layerskip.evaluate.record import Spread
from layerskip.llm import LLM, load
from layerskip.model.decoder import Decoder

PARTS = ("draft layers", "draft head", "verify layers", "verify head", "attention", "sampling", "Python")


class Watch:
    """Seconds spent in what the loop calls, while it is on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._kept: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Watch:
        for owner, name in (
            *((Decoder, name) for name in ("run", "logits", "draft")),
            (Law, "__call__"),
            (Chosen, "of"),
        ):
            called = vars(owner)[name]
            self._kept.append((owner, name, called))
            watched = self._watched(name, getattr(owner, name))
            setattr(owner, name, staticmethod(watched) if isinstance(called, classmethod) else watched)
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, called in self._kept:
            setattr(owner, name, called)

    def _watched(self, name: str, called: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return called(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return watched


def decode(llm: LLM, asked: Sequence[Question], draft: EarlyExit | None) -> dict[str, Any]:
    """Continues every prompt; seconds of the rounds after the first of each, tokens in them, and what they were for."""
    seconds, tokens, rounds, parts = 0.0, 0, 0, dict[str, float]()
    with Watch() as watch:
        for one in asked:
            stream = fresh(llm).stream(one.prompt, draft=draft, max_tokens=one.new_tokens, ignore_eos=True)
            with stream:
                chunks = iter(stream)
                next(chunks)
                before, began = dict(watch.seconds), time.perf_counter()
                for chunk in chunks:
                    tokens, rounds = tokens + len(chunk.tokens), rounds + 1
                seconds += time.perf_counter() - began
            for name, spent in watch.seconds.items():
                parts[name] = parts.get(name, 0.0) + spent - before.get(name, 0.0)
    return {"seconds": seconds, "tokens": tokens, "rounds": rounds, "parts": parts}


def alone(llm: LLM, *, exit: int, count: int, context: int, repeat: int = 30) -> dict[str, float]:
    """Seconds of single parts, each timed by itself: medians, the parts in turns."""
    decoder, shape = llm.decoder, llm.decoder.shape
    cache = decoder.cache(rows=1, slots=context + count + 1)

    def span(first: int, last: int, positions: int, *, slots: int) -> Callable[[], object]:
        at = torch.arange(slots, slots + positions)[None]
        hidden = decoder.embed(torch.ones(1, positions, dtype=torch.long))
        return lambda: decoder.run(hidden, at, cache, first, last, limit=slots + positions)

    def head(positions: int) -> Callable[[], object]:
        hidden = decoder.embed(torch.ones(1, positions, dtype=torch.long))
        return lambda: decoder.logits(hidden)

    timed = {
        "plain layers": span(0, shape.layers, 1, slots=context),
        "draft layers": span(0, exit, 1, slots=context),
        "draft layers, no slots": span(0, exit, 1, slots=0),
        "verify layers": span(exit, shape.layers, count + 1, slots=context),
        "verify layers, no slots": span(exit, shape.layers, count + 1, slots=0),
        "head": head(1),
        "verify head": head(count + 1),
    }
    found: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for number in range(repeat + 3):
            for name, call in timed.items():
                began = time.perf_counter()
                call()
                if number >= 3:
                    found[name].append(time.perf_counter() - began)
    return {name: median(each) for name, each in found.items()}


def split(turn: dict[str, Any], parts: dict[str, float], *, count: int) -> dict[str, float]:
    """Seconds of a round by what they were for; the attention is taken out of the layers."""
    spent = {name: seconds / turn["rounds"] for name, seconds in turn["parts"].items()}
    layers = (count + 1) * parts["draft layers"]
    drafted = spent.get("draft", 0.0)
    draft_layers = drafted * layers / (layers + count * parts["head"])
    shares = {
        name: max(0.0, 1.0 - parts[f"{name}, no slots"] / parts[name]) for name in ("draft layers", "verify layers")
    }
    found = {
        "draft layers": draft_layers * (1.0 - shares["draft layers"]),
        "draft head": drafted - draft_layers,
        "verify layers": spent["run"] * (1.0 - shares["verify layers"]),
        "verify head": spent["logits"],
        "attention": draft_layers * shares["draft layers"] + spent["run"] * shares["verify layers"],
        "sampling": max(spent.get("__call__", 0.0), spent.get("of", 0.0)),  # a law that chooses is one inside the other
    }
    return found | {"Python": turn["seconds"] / turn["rounds"] - sum(found.values())}


def measure(llm: LLM, asked: Sequence[Question], *, exit: int, count: int, pairs: int) -> dict[str, Any]:
    """The record's figures of one model."""
    draft = EarlyExit(exit, tokens=count)
    for one in (None, draft):
        decode(llm, asked[:1], one)  # what only the first call does
    ratios, agreements, splits, steps, lengths = [], [], [], [], []
    context = round(sum(len(one.prompt) + one.new_tokens / 2 for one in asked) / len(asked))
    for _ in range(pairs):
        plain, drafted = decode(llm, asked, None), decode(llm, asked, draft)
        parts = alone(llm, exit=exit, count=count, context=context)
        length = drafted["tokens"] / drafted["rounds"]
        step = parts["plain layers"] + parts["head"]
        cost = count * (parts["draft layers"] + parts["head"]) + parts["draft layers"]
        cost += parts["verify layers"] + parts["verify head"]
        ratios.append(drafted["tokens"] / drafted["seconds"] * plain["seconds"] / plain["tokens"])
        agreements.append(ratios[-1] / (length * step / cost))
        splits.append(split(drafted, parts, count=count))
        steps.append(plain["seconds"] / plain["rounds"])
        lengths.append(length)
    return {
        "exit": exit,
        "draft_tokens": count,
        "tokens_per_round": median(lengths),
        "plain_step": Spread.of(steps).record(),
        "round": {part: Spread.of([one[part] for one in splits]).record() for part in PARTS},
        "speedup": Spread.of(ratios).record(),
        "of_predicted": Spread.of(agreements).record(),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    whole = sum(found["round"][part]["median"] for part in PARTS)
    first = (
        f"{found['model']['name']}, {found['model']['dtype']}, {found['model']['weights']} weights: exit "
        f"{found['exit']}, K = {found['draft_tokens']}, {found['tokens_per_round']:.2f} tokens a round; plain step "
        f"{found['plain_step']['median'] * 1e3:.3f} ms, round {whole * 1e3:.3f} ms; speedup "
        f"{found['speedup']['median']:.2f}, {found['of_predicted']['median']:.2f} of what the cost model predicts"
    )
    table = ["", "| part of a round | ms | share |", "|---|---:|---:|"]
    for part in PARTS:
        seconds = found["round"][part]["median"]
        table.append(f"| {part} | {seconds * 1e3:.3f} | {seconds / whole:.0%} |")
    return [first, *table]


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help=f"sizes of `agreement`, {SHIPPED} or a folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--items", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, help="K; what the checkpoint recommends if left out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rounds"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.output.mkdir(parents=True, exist_ok=True)
    for word in asked.checkpoints:
        name, folder, file = checkpoint(word, asked.work / "checkpoints")
        llm = load(folder, dtype=asked.dtype, weights=asked.weights, device="cpu", max_batch=1)
        prompts = questions(
            folder, file=file, count=asked.items, new_tokens=asked.new_tokens, until_end=name == SHIPPED
        )
        if llm.recommended is None:
            parser.exit(2, f"{folder} recommends no exit; run `layerskip tune --save` on it\n")
        count = asked.draft_tokens or llm.recommended.draft_tokens
        found = record.about("rounds", llm)
        found |= {"command": shlex.join(["python", "-m", "benchmarks.rounds", *sys.argv[1:]])}
        found["model"] |= {"name": name, "dtype": asked.dtype, "weights": llm.decoder.layout}
        found |= measure(llm, prompts, exit=llm.recommended.exit, count=count, pairs=asked.pairs)
        record.write(asked.output / f"rounds-{name}-{asked.dtype}-{llm.decoder.layout}.json", found)
        print("\n".join([*lines(found), ""]), flush=True)


if __name__ == "__main__":
    main()
