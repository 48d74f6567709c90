"""What goes into the loop and what comes out of it: requests, and what a row gained in a round.

Records of token ids; no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layerskip.decode.logprobs import TokenLogprob
from layerskip.decode.sampling import Sampling
from layerskip.errors import LayerSkipError, RequestError, check_whole


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Args:
        ids: the prompt, at least one token.
        max_tokens: exactly how many tokens at most.
        min_tokens: no end-of-sequence token before so many.
        eos: ids that end the text (they are emitted, and end it).
        sampling: how tokens are chosen.
        logprobs: None, or how many of the likeliest alternatives to report beside each token.
        prompt_logprobs: also report them for the prompt, as many alternatives.

    Raises:
        RequestError: no prompt token, max_tokens below 1, min_tokens outside 0..max_tokens, negative logprobs.
    """

    ids: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    eos: Sequence[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens", *(["logprobs"] if self.logprobs is not None else [])):
            check_whole(name, getattr(self, name))
        if not self.ids:
            raise RequestError("the prompt has no tokens; give at least one")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens {self.max_tokens} is not possible; use 1 or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is not possible; use 0..{self.max_tokens}")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(f"logprobs {self.logprobs} is not possible; use 0 or more")


@dataclass(frozen=True)
class Seconds:
    """Time of a round, which its rows share: drafting, verifying, and the rest."""

    draft: float
    verify: float
    rest: float


@dataclass(frozen=True)
class Round:
    """What one row gained in one round.

    Args:
        key: which row.
        tokens: the tokens emitted, in order.
        accepted: how many of them, from the first, were drafted.
        drafted: the tokens drafted (a tree's nodes in their order), kept or not.
        depths: the place of each drafted token within the draft, from 0.
        logprobs: per emitted token, where asked for.
        finish: None while the row goes on, else "stop" (end of sequence), "length", or "error".
        error: what went wrong, with finish "error".
        seconds: time of the round.
    """

    key: int
    tokens: list[int]
    accepted: int
    drafted: list[int]
    depths: list[int]
    logprobs: list[TokenLogprob] | None
    finish: str | None
    error: LayerSkipError | None
    seconds: Seconds


def cut(tokens: list[int], request: Request, known: int, limit: int) -> tuple[list[int], str | None]:
    """The tokens a row gains, ended at an end-of-sequence id or where it may know no more, and why it ends."""
    generated = known - len(request.ids)
    for i, token in enumerate(tokens):
        if token in request.eos and generated + i + 1 > request.min_tokens:
            return tokens[: i + 1], "stop"
        if known + i + 1 >= limit:
            return tokens[: i + 1], "length"
    return tokens, None
