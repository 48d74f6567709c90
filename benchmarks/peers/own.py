"""This package: plain decoding, early-exit drafts, and drafts that it chooses itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.peer import Draft, PeerRun, missing
from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Auto, EarlyExit
from layerskip.evaluate.follow import fresh
from layerskip.llm import LLM, load


class Own:
    """`LLM.stream`; every run begins with an empty cache, but auto keeps what it has learnt, as in a program."""

    package = "layerskip"

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._autos: dict[int, Auto] = {}

    def available(self) -> str | None:
        """It is here."""
        return missing(self.package)

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """It reads the folder's own files."""
        return False

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads the folder."""
        torch.set_num_threads(threads)
        self._llm = load(folder, dtype=dtype, device="cpu", max_batch=1)

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """Every number of tokens."""
        return [Draft(exit, count) for count in tokens]

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        assert self._llm is not None
        drafter = None if draft is None else self._drafter(draft)
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

    def _drafter(self, draft: Draft) -> Drafter:
        if draft.auto:
            return self._autos.setdefault(draft.exit, Auto(exit=draft.exit))
        return EarlyExit(draft.exit, tokens=draft.tokens, confidence=draft.confidence)
