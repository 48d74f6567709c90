"""This package: plain decoding, early-exit drafts, and drafts that it chooses itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.agreement import ranking
from benchmarks.peers.peer import FLOATS, QUANTISED, Draft, PeerRun, missing
from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Auto, EarlyExit
from layerskip.decode.drafters.shortlist import fitting
from layerskip.evaluate.follow import fresh
from layerskip.llm import LLM, load

EXITS = (1, 2, 3, 4, 6, 8)


class Own:
    """`LLM.stream`; every run begins with an empty cache. Drafters stay, with what they learnt, as in a program."""

    package = "layerskip"
    dtypes = (*FLOATS, QUANTISED)

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._drafters: dict[Draft, Drafter] = {}
        self._ranked: Sequence[int] = ()

    def available(self) -> str | None:
        """It is here."""
        return missing(self.package)

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """It reads the folder's own files."""
        return False

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads the folder."""
        torch.set_num_threads(threads)
        self._ranked = ranking(folder)
        if dtype == QUANTISED:
            self._llm = load(folder, dtype="bfloat16", weights=QUANTISED, device="cpu", max_batch=1)
        else:
            self._llm = load(folder, dtype=dtype, device="cpu", max_batch=1)

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """A grid of exits (`EXITS`, up to half of the layers) and numbers of tokens.

        Where a shortlist leaves most of the vocabulary out, the grid is through a head of 8 bits; from `exit` also
        through the own head, that shortlist and a longer one.
        """
        assert self._llm is not None
        decoder = self._llm.decoder
        exits = sorted({exit, *(each for each in EXITS if 2 * each <= decoder.shape.layers)})
        if 4 * fitting(decoder.shape) > decoder.shape.vocab:
            return [Draft(each, count) for each, count in product(exits, tokens)]
        sizes = (None, fitting(decoder.shape), decoder.shape.vocab // 4)
        found = [Draft(exit, count, vocabulary=size) for size in sizes for count in tokens]
        head = "int8" if decoder.layout == "native" else "own"
        grid = [Draft(each, count, head=head) for each, count in product(exits, tokens)]
        return found + [draft for draft in grid if draft not in found]

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        assert self._llm is not None
        if draft is not None and draft not in self._drafters:
            self._drafters[draft] = _drafter(draft, self._ranked)
        drafter = None if draft is None else self._drafters[draft]
        llm = fresh(self._llm)
        began = time.perf_counter()
        arrivals = []
        with llm.stream(list(prompt), draft=drafter, max_tokens=new_tokens, ignore_eos=True) as stream:
            for chunk in stream:
                arrivals.append((time.perf_counter() - began, len(chunk.tokens)))
        total = time.perf_counter() - began
        return PeerRun(
            tokens=stream.completions[0].tokens,
            first=arrivals[0][0],
            first_tokens=arrivals[0][1],
            total=total,
            rounds=len(arrivals),
        )


def _drafter(draft: Draft, by_frequency: Sequence[int]) -> Drafter:
    ranked = by_frequency if draft.vocabulary else ()
    if draft.auto:
        return Auto(exit=draft.exit, vocabulary=draft.vocabulary, ranked=ranked, head=draft.head)
    return EarlyExit(
        draft.exit,
        tokens=draft.tokens,
        confidence=draft.confidence,
        vocabulary=draft.vocabulary,
        ranked=ranked,
        head=draft.head,
    )
