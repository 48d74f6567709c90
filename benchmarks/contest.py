"""Engines in turns on the same prompts: what each took, round by round.

Knows engines by name, ways of decoding and seconds. Does not know files, nor what is made of the figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import OWN, Draft, PeerRun, peer
from benchmarks.questions import Question
from benchmarks.worker import PeerFailed, Worker

SETTLE = 0.2
"""Seconds of rest before each engine's turn: the threads of the one before it spin on for a while."""
TRIAL = ((1, 8), (2, 3), (6, 3))
"""Turns of a trial, and how many drafts it leaves: first all have a turn, the fastest eight two more, the fastest three
six more. A few percent are not seen at once on a machine that others use as well."""
ENOUGH = 60.0
"""Seconds of a trial after which a draft has no more turns: what takes long is not disturbed much."""


@dataclass(frozen=True)
class Way:
    """An engine, and how it decodes.

    Args:
        peer: name of the engine.
        draft: None for plain decoding.
    """

    peer: str
    draft: Draft | None = None

    @property
    def name(self) -> str:
        """As reports call it: "layerskip early-exit:3 K=4"."""
        return f"{self.peer} {'plain' if self.draft is None else self.draft.name}"


PLAIN = Way(OWN)


@dataclass
class Contest:
    """Running engines.

    Args:
        workers: by name.
        questions: what they continue.
        skipped: names of engines that are not running, and why.
    """

    workers: dict[str, Worker]
    questions: Sequence[Question]
    skipped: dict[str, str]

    def close(self) -> None:
        """Ends all of them."""
        for worker in self.workers.values():
            worker.close()

    def fail(self, name: str, error: PeerFailed) -> None:
        """Goes on without an engine. Raises the error where it is our own."""
        if name == OWN:
            raise error
        self.skipped[name] = str(error)
        self.workers.pop(name).close()

    def trials(self, *, exit: int, draft_tokens: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        """Every way of drafting of every engine on all prompts, in turns, after a warm-up of each.

        Returns:
            By engine: the draft and its decode tokens/s, the fastest first; those that were left out early come last.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for name, worker in list(self.workers.items()):
            try:
                drafts = [Draft(**draft) for draft in worker.ask("drafts", exit=exit, tokens=list(draft_tokens))]
                ways = [Way(name, draft) for draft in drafts]
                rates: dict[Way, list[float]] = {way: [] for way in ways}
                spent = dict.fromkeys(ways, 0.0)
                first = self.questions[0]
                for way in ways:
                    self.ask(way, replace(first, new_tokens=min(first.new_tokens, 16)))
                for turns, left in TRIAL:
                    for _, way in product(range(turns), ways):
                        if spent[way] < ENOUGH:
                            turn = measured([self.ask(way, question) for question in self.questions])
                            rates[way].append(turn["decode_tokens"] / turn["decode_seconds"])
                            spent[way] += turn["seconds"]
                    ways = sorted(ways, key=lambda way: -median(rates[way]))[:left]
            except PeerFailed as error:
                self.fail(name, error)
                continue
            ranked = ways + [way for way in rates if way not in ways]
            if ranked:
                found[name] = [
                    {"draft": asdict(way.draft), "tokens_per_second": median(rates[way])}
                    for way in ranked
                    if way.draft is not None
                ]
        return found

    def ask(self, way: Way, question: Question) -> PeerRun:
        """One prompt. Raises PeerFailed."""
        return self.workers[way.peer].run(question.prompt, new_tokens=question.new_tokens, draft=way.draft)

    def warm(self, ways: Iterable[Way]) -> None:
        """Runs each way once on the first prompt."""
        for way in ways:
            self._turn(way, self.questions[:1])

    def round(self, ways: Sequence[Way], *, number: int) -> dict[str, dict[str, Any]]:
        """All prompts by each way, one way after the other, another one first in every round.

        Returns:
            By way: what it took, and for each prompt the place from which its text differs from our own plain one.
        """
        start = number % len(ways)
        turns = {way: self._turn(way, self.questions) for way in (*ways[start:], *ways[:start])}
        plain = turns[PLAIN]
        assert plain is not None
        return {
            way.name: measured(runs) | {"differs_at": [differs(a, b) for a, b in zip(plain, runs, strict=True)]}
            for way in ways
            if (runs := turns[way]) is not None
        }

    def _turn(self, way: Way, questions: Sequence[Question]) -> list[PeerRun] | None:
        """None where its engine has failed, now or before."""
        if way.peer not in self.workers:
            return None
        time.sleep(SETTLE)
        try:
            return [self.ask(way, question) for question in questions]
        except PeerFailed as error:
            self.fail(way.peer, error)
            return None


def measured(runs: Sequence[PeerRun]) -> dict[str, Any]:
    """What prompts took together. Decoding begins when the first tokens of a prompt are there, and they do not
    count."""
    return {
        "tokens": sum(len(run.tokens) for run in runs),
        "seconds": sum(run.total for run in runs),
        "decode_tokens": sum(len(run.tokens) - run.first_tokens for run in runs),
        "decode_seconds": sum(run.total - run.first for run in runs),
        "first_seconds": sum(run.first for run in runs) / len(runs),
        "rounds": sum(run.rounds for run in runs),
    }


def differs(one: PeerRun, other: PeerRun) -> int | None:
    """The first place where two texts differ; None where they are the same."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def start(
    names: Sequence[str],
    folder: Path,
    *,
    dtype: str,
    threads: int,
    work: Path,
    say: Callable[[str], object],
) -> tuple[dict[str, Worker], dict[str, str], dict[str, Any]]:
    """Starts the engines that are here and can load the checkpoint.

    Returns:
        Workers by name; the reason by name for the others; and for each worker the seconds of loading, and its memory
        before and after, in bytes.

    Raises:
        PeerFailed: our own engine cannot load it.
    """
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    loaded: dict[str, Any] = {}
    for name in names:
        engine = peer(name)
        reason = engine.available() or (None if dtype in engine.dtypes else f"not measured with weights of {dtype}")
        if reason is None:
            say(f"loading {name}")
            try:
                workers[name], loaded[name] = _load(name, folder, dtype=dtype, threads=threads, work=work)
            except PeerFailed as error:
                if name == OWN:
                    raise
                reason = str(error)
        if reason is not None:
            say(f"skipping {name}: {reason}")
            skipped[name] = reason
    return workers, skipped, loaded


def _load(name: str, folder: Path, *, dtype: str, threads: int, work: Path) -> tuple[Worker, dict[str, Any]]:
    """An engine with the checkpoint loaded, and what that took. Raises PeerFailed."""
    place = {"folder": str(folder), "dtype": dtype, "work": str(work)}
    worker = Worker(name, threads=threads, log=work / f"{name}.log")
    try:
        if worker.ask("prepare", **place):
            worker.close()  # what it needed for that shall not count as the engine's memory
            worker = Worker(name, threads=threads, log=work / f"{name}.log")
        before = worker.ask("memory")
        seconds = worker.ask("load", threads=threads, **place)
        return worker, {"seconds": seconds, "memory": {"before": before, "after": worker.ask("memory")}}
    except PeerFailed:
        worker.close()
        raise
