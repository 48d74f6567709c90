"""What one way of decoding reaches: a run over all prompts, and the figures of several such runs.

Knows seconds, counts and their ratios. Does not know how a run comes about. The definitions, once for code, reports and
docs/bench.md:

- *decode* tokens/s: tokens over the seconds of the rounds. *end to end*: tokens over all seconds, prompts included.
- *speedup*: a run's tokens/s over those of plain decoding in the same repeat; then the median of these ratios.
- A figure of several runs is their median, with the lowest and the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.evaluate.record import Spread
from layerskip.llm.completion import Mode

PARTS = ("prompt", "draft", "verify", "rest", "text")
"""Where the seconds of a run go; together they are all of them."""


@dataclass(frozen=True)
class Measured:
    """One run over all prompts; ready for JSON through `asdict`.

    Args:
        tokens: emitted by all completions.
        differs_at: for each prompt, the first token that is not plain decoding's, or None; None for plain decoding.
        decode_tokens: those that `decode_seconds` brought.
        decode_seconds: of the rounds.
        total_seconds: from the first call to the last token.
        first_token: seconds to it, the median over the prompts.
        token_latency: 50th and 95th percentile, seconds; None where no completion has a second round.
        round_latency: the same of rounds without prompts.
        parts: seconds by `PARTS`; None where they are not known.
        acceptance: counts as JSON has them; None where nothing of ours drafts.
        weights_read: bytes read in the rounds; None where that is not known.
        peak_memory: bytes; None where that is not known.
    """

    tokens: int
    differs_at: Sequence[int | None] | None
    decode_tokens: int
    decode_seconds: float
    total_seconds: float
    first_token: float
    token_latency: Sequence[float] | None
    round_latency: Sequence[float] | None
    parts: Mapping[str, float] | None
    acceptance: Mapping[str, Any] | None
    weights_read: int | None
    peak_memory: int | None

    @property
    def rates(self) -> dict[str, float | None]:
        """Tokens/s, decode and end to end; decode is None where the prompts' passes brought all tokens."""
        decode = self.decode_tokens / self.decode_seconds if self.decode_seconds else None
        return {"decode": decode, "end_to_end": self.tokens / self.total_seconds}


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    Args:
        name: what reports call it.
        peer: whether somebody else's code decodes.
        mode: "exact", or "lossy" where fewer than all layers decide.
        exit: E, where its first layers draft, or decide.
        draft_tokens: K, where it drafts.
    """

    name: str
    peer: bool = False
    mode: Mode = "exact"
    exit: int | None = None
    draft_tokens: int | None = None


@dataclass(frozen=True)
class Cell:
    """A way of decoding at a batch size.

    Args:
        who: name, exit, draft length.
        batch: rows that decode side by side.
        tokens: emitted in a repeat; of the first one.
        identical: whether all texts of all repeats were plain decoding's; None for plain decoding.
        differs_at: of the first repeat that differs, else of the first.
        tokens_per_second: "decode" and "end_to_end"; None where a peer emitted nothing behind its first tokens.
        speedup: the same over plain decoding, paired; None for plain decoding.
        time_to_first_token: seconds.
        token_latency: "p50" and "p95", seconds.
        round_latency: the same.
        seconds: by `PARTS`.
        acceptance: of the first repeat.
        weights_read_per_second: bytes.
        bandwidth_share: of what the machine reads.
        peak_memory: bytes, the most of all repeats.
    """

    who: Contender
    batch: int
    tokens: int
    identical: bool | None
    differs_at: Sequence[int | None] | None
    tokens_per_second: Mapping[str, Spread | None]
    speedup: Mapping[str, Spread | None] | None
    time_to_first_token: Spread
    token_latency: Mapping[str, Spread] | None
    round_latency: Mapping[str, Spread] | None
    seconds: Mapping[str, Spread] | None
    acceptance: Mapping[str, Any] | None
    weights_read_per_second: Spread | None
    bandwidth_share: Spread | None
    peak_memory: int | None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.who.name

    def record(self) -> dict[str, Any]:
        """The same for JSON; plain decoding has no speedup."""
        values = {**asdict(self.who), **{k: v for k, v in vars(self).items() if k != "who"}}
        if self.speedup is None:
            del values["speedup"]
        return {key: _plain(value) for key, value in values.items()}


def cell(
    who: Contender,
    runs: Sequence[Measured],
    *,
    batch: int,
    plain: Sequence[Measured] | None,
    bandwidth: float | None = None,
) -> Cell:
    """The figures of several runs.

    Args:
        who: what ran.
        runs: one for each repeat, at least one.
        batch: rows that decoded side by side.
        plain: plain decoding in the same repeats; None where these runs are plain decoding.
        bandwidth: bytes/s of this machine; None leaves the share of it out.
    """
    first = runs[0]
    differing = [run for run in runs if run.differs_at is not None and any(at is not None for at in run.differs_at)]
    read = [run.weights_read / run.decode_seconds for run in runs if run.weights_read is not None]
    peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
    return Cell(
        who=who,
        batch=batch,
        tokens=first.tokens,
        identical=None if plain is None else not differing,
        differs_at=(differing or runs)[0].differs_at,
        tokens_per_second=_rates([run.rates for run in runs]),
        speedup=None if plain is None else _rates([_ratios(a, b) for a, b in zip(runs, plain, strict=True)]),
        time_to_first_token=Spread.of([run.first_token for run in runs]),
        token_latency=_pairs(runs, lambda run: run.token_latency),
        round_latency=_pairs(runs, lambda run: run.round_latency),
        seconds=_spreads([run.parts for run in runs if run.parts is not None]),
        acceptance=first.acceptance,
        weights_read_per_second=Spread.of(read) if read else None,
        bandwidth_share=Spread.of([rate / bandwidth for rate in read]) if read and bandwidth else None,
        peak_memory=max(peaks) if peaks else None,
    )


def _ratios(run: Measured, plain: Measured) -> dict[str, float | None]:
    mine, its = run.rates, plain.rates
    return {name: a / b if (a := mine[name]) and (b := its[name]) else None for name in mine}


def _rates(values: Sequence[Mapping[str, float | None]]) -> dict[str, Spread | None]:
    found: dict[str, Spread | None] = {}
    for name in values[0]:
        known = [rate for value in values if (rate := value[name]) is not None]
        found[name] = Spread.of(known) if len(known) == len(values) else None
    return found


def _spreads(values: Sequence[Mapping[str, float]]) -> dict[str, Spread] | None:
    return {name: Spread.of([value[name] for value in values]) for name in values[0]} if values else None


def _pairs(runs: Sequence[Measured], of: Callable[[Measured], Sequence[float] | None]) -> dict[str, Spread] | None:
    return _spreads([dict(zip(("p50", "p95"), pair, strict=True)) for run in runs if (pair := of(run)) is not None])


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value.record()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
