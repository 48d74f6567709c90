"""Following a stream to its end, with the time it takes. Knows chunks and seconds; shows nothing itself.

*decode* tokens/s counts the seconds of the rounds; *with the prompt* also counts running the prompt, that is all
seconds from the first call to the last token. Loading a model counts in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.llm import LLM, Chunk, Completion, Stream


@dataclass(frozen=True)
class Arrival:
    """A chunk that came in.

    Args:
        index: the completion it belongs to.
        seconds: since the first call.
        tokens: how many it brought.
    """

    index: int
    seconds: float
    tokens: int


@dataclass
class Run:
    """Completions of one call and what they cost.

    Args:
        completions: as `LLM.stream` gives them.
        draft: seconds spent drafting; rows of a round share them, so they are counted once.
        verify: seconds spent verifying.
        rest: seconds spent on everything else in the rounds.
        total: seconds from the first call to the last token.
        interrupted: whether Ctrl-C ended it.
        arrivals: for every chunk, the completion it belongs to, the second it came in, and its tokens.
    """

    completions: list[Completion]
    draft: float = 0.0
    verify: float = 0.0
    rest: float = 0.0
    total: float = 0.0
    interrupted: bool = False
    arrivals: list[Arrival] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def decode(self) -> float:
        """Seconds of all rounds."""
        return self.draft + self.verify + self.rest

    @property
    def decode_rate(self) -> float:
        """Tokens/s of the rounds alone."""
        return self.tokens / self.decode if self.decode else 0.0

    @property
    def total_rate(self) -> float:
        """Tokens/s with the prompt."""
        return self.tokens / self.total if self.total else 0.0

    @property
    def acceptance(self) -> Acceptance:
        """Counts over all completions, with the seconds of the rounds."""
        total = Acceptance()
        for completion in self.completions:
            total.merge(completion.acceptance)
        total.draft_seconds, total.verify_seconds, total.rest_seconds = self.draft, self.verify, self.rest
        return total

    def line(self, *, label: str, mode: str) -> str:
        """The statistics in one line.

        Args:
            label: the way of decoding.
            mode: exact or lossy, and the dtype.
        """
        counts = self.acceptance
        parts = [
            f"{self._size()}, {self.decode_rate:.1f} tokens/s decode, {self.total_rate:.1f} tokens/s with the prompt",
            mode,
            f"{label}: {counts.rounds} rounds",
        ]
        if label == "plain":
            return "; ".join(parts) + f", {self.decode:.2f} s"
        return "; ".join(parts) + (
            f", acceptance {counts.rate:.1%}, {counts.length:.2f} tokens/round, "
            f"draft {self.draft:.2f} s, verify {self.verify:.2f} s, rest {self.rest:.2f} s"
        )

    def _size(self) -> str:
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        if len(self.completions) > 1:
            tokens = f"{len(self.completions)} completions, {tokens}"
        reasons = {completion.finish_reason or "" for completion in self.completions}
        reason = "interrupted" if self.interrupted else reasons.pop() if len(reasons) == 1 else ""
        return f"{tokens} ({reason})" if reason else tokens

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "tokens": self.tokens,
            "acceptance": self.acceptance.as_dict(),
            "seconds": {
                "draft": self.draft,
                "verify": self.verify,
                "rest": self.rest,
                "decode": self.decode,
                "end_to_end": self.total,
            },
            "tokens_per_second": {"decode": self.decode_rate, "end_to_end": self.total_rate},
            "interrupted": self.interrupted,
        }


def follow(stream: Stream, see: Callable[[Chunk], None] = lambda chunk: None) -> Run:
    """Takes a stream to its end, or to Ctrl-C, calling `see` with every chunk."""
    run = Run(stream.completions)
    shared: tuple[float, float, float] | None = None
    began = time.perf_counter()
    try:
        with stream:
            for chunk in stream:
                if chunk.seconds != shared:  # rows of one round carry the same three numbers
                    shared = chunk.seconds
                    run.draft, run.verify, run.rest = (
                        run.draft + shared[0],
                        run.verify + shared[1],
                        run.rest + shared[2],
                    )
                run.arrivals.append(Arrival(chunk.index, time.perf_counter() - began, len(chunk.tokens)))
                see(chunk)
    except KeyboardInterrupt:
        run.interrupted = True
    run.total = time.perf_counter() - began
    return run


def fresh(llm: LLM, *, batch: int | None = None) -> LLM:
    """The same weights with an empty cache, so that one measurement does not spare the next its prompt.

    Args:
        llm: the model.
        batch: rows that decode side by side; None is the model's own.

    Raises:
        RequestError: fewer than one row.
    """
    rows = llm.max_batch if batch is None else batch
    return LLM(llm.decoder, llm.tokenizer, eos=llm.eos, name=llm.name, max_batch=rows, recommended=llm.recommended)
