"""What generation gives back: chunks round by round, and completions that add them up.

Records and their sums; no tensors, no decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.logprobs import TokenLogprob

Mode = Literal["exact", "lossy"]


@dataclass(frozen=True)
class Chunk:
    """What one completion gained in one round.

    Args:
        index: which completion, in the order of the prompts, the n samples of a prompt side by side.
        text: text that became certain; may be empty while a character or a possible stop string is open.
        accepted_text: the leading part of `text` that came with accepted drafted tokens; the rest is the model's own
            token.
        tokens: ids emitted.
        accepted: how many of them were drafted.
        drafted: ids drafted in this round, kept or not.
        depths: the place of each drafted id within the draft, from 0.
        logprobs: per token, where asked for.
        finish_reason: None while it goes on; "stop" or "length" in the last chunk.
        stop: the stop string that ended it.
        seconds: seconds of the round spent in draft, verify and rest; its rows share them.
    """

    index: int
    text: str
    accepted_text: str
    tokens: list[int]
    accepted: int
    drafted: list[int]
    depths: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    stop: str | None
    seconds: tuple[float, float, float]


@dataclass
class Completion:
    """What was generated for one prompt.

    Args:
        prompt: ids of the prompt.
        text: the text; prompt text and this one read on without a seam.
        tokens: ids generated, an ending end-of-sequence id included.
        finish_reason: "stop" (end of sequence or stop string) or "length"; "error" for a row that failed, None for
            what was interrupted.
        stop: the stop string that ended it.
        logprobs: the model's own log-probabilities of the tokens, where asked for: raw, before temperature and
            penalties.
        prompt_logprobs: the same for the prompt from its second token on.
        acceptance: counts and seconds of its rounds.
        mode: "exact" where the text has the law of the full model, "lossy" for plain early exit.
    """

    prompt: list[int]
    mode: Mode
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)

    def add(self, chunk: Chunk) -> None:
        """Takes up what one round brought."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.finish_reason, self.stop = chunk.finish_reason, chunk.stop
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + chunk.logprobs
        self.acceptance.add(
            drafted=len(chunk.drafted),
            accepted=chunk.accepted,
            emitted=len(chunk.tokens),
            drafted_depths=chunk.depths,
        )
        draft, verify, rest = chunk.seconds
        self.acceptance.draft_seconds += draft
        self.acceptance.verify_seconds += verify
        self.acceptance.rest_seconds += rest


class Stream(Iterator[Chunk]):
    """Rounds of one call, as chunks. Iterate it; `completions` holds what has come so far.

    Closing it, or an exception while it runs, leaves the model usable.
    """

    def __init__(self, chunks: Iterator[Chunk], completions: list[Completion]) -> None:
        self.completions = completions
        self._chunks = chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends generation now and frees its rows."""
        self._chunks.close()  # type: ignore[attr-defined]  # always the generator of LLM.stream

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
