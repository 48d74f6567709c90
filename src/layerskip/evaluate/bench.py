"""Speed, compared fairly: plain decoding and every other way in one process, over the same prompts, in turns.

    bench(llm, prompts, [Way("early-exit:2 K=6", EarlyExit(2, tokens=6))], batch=1, repeat=3, max_tokens=64) -> [Cell]

Knows models, drafters and prompts. Does not know files, tables or peers. Tokens are counted as ids that were emitted.
Every run begins with an empty cache; prompts that begin alike share that beginning within a run, as they always do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerskip.decode.drafters import EarlyExit
from layerskip.errors import CapacityError, RequestError
from layerskip.evaluate.cell import Cell, Contender, Measured, cell
from layerskip.evaluate.contest import PLAIN, Contest, Settings, Step, Texts, at_least_one
from layerskip.evaluate.follow import follow, fresh
from layerskip.evaluate.prompts import encode_prompts
from layerskip.evaluate.ticks import Tick, read_ticks
from layerskip.evaluate.ways import Way, drawing
from layerskip.evaluate.weights import Weights
from layerskip.llm import LLM, Chunk, Stream
from layerskip.llm.prompts import Prompt


def bench(
    llm: LLM,
    prompts: Sequence[Prompt],
    ways: Sequence[Way],
    *,
    batch: int,
    repeat: int,
    max_tokens: int,
    ignore_eos: bool = False,
    warm_up: bool = True,
    see: Callable[[Step], None] | None = None,
) -> list[Cell]:
    """Measures ways of decoding against plain decoding.

    Args:
        llm: the model.
        prompts: texts or token ids, at least `batch` of them.
        ways: what to measure; plain decoding is put in front where it is not among them.
        batch: rows that decode side by side; one that ends makes room for the next prompt.
        repeat: runs of each way.
        max_tokens: tokens of each completion at most.
        ignore_eos: go on after end of sequence, so that all ways emit the same number of tokens.
        warm_up: run each way over the first `batch` prompts beforehand, unmeasured.
        see: called before each run.

    Returns:
        A cell for each way, in their order.

    Raises:
        RequestError: what cannot be measured; nothing has run then.
        CapacityError: so many rows do not fit in memory side by side.
        NumericalError: the model's logits are not finite.
    """
    at_least_one("repeat", repeat)
    contest = Contest(
        [Ours(llm, way) for way in with_plain(ways)],
        encode_prompts(llm, prompts),
        settings=Settings(batch, max_tokens, ignore_eos=ignore_eos),
        device=llm.decoder.device,
        see=see,
    )
    if warm_up:
        contest.warm_up()
    repeats = [contest.repeat(number) for number in range(repeat)]
    return cells(contest.who, repeats, batch=batch)


def cells(
    who: Sequence[Contender],
    repeats: Sequence[dict[str, Measured]],
    *,
    batch: int,
    bandwidth: float | None = None,
) -> list[Cell]:
    """The cells of finished repeats.

    Args:
        who: ran, plain decoding among them.
        repeats: runs by name.
        batch: rows that decoded side by side.
        bandwidth: bytes/s of this machine; None leaves the share of it out.
    """
    plain = [runs[PLAIN] for runs in repeats]
    return [
        cell(
            each,
            [runs[each.name] for runs in repeats],
            batch=batch,
            plain=None if each.name == PLAIN else plain,
            bandwidth=bandwidth,
        )
        for each in who
    ]


def with_plain(ways: Sequence[Way]) -> list[Way]:
    """The ways, plain decoding in front where it is not among them.

    Raises:
        RequestError: something else is called "plain", or plain decoding something else.
    """
    for way in ways:
        if (way.name == PLAIN) != way.plain:
            raise RequestError(f"{way.name!r} is not possible: plain decoding, and nothing else, is called {PLAIN!r}")
    return list(ways) if any(way.plain for way in ways) else [Way(PLAIN), *ways]


class Ours:
    """One of our ways as the contest runs it.

    Args:
        llm: the model.
        way: how it decodes.
    """

    def __init__(self, llm: LLM, way: Way) -> None:
        self.llm, self.way = llm, way
        self._weights = Weights.of(llm.decoder)

    @property
    def who(self) -> Contender:
        """What reports say of it."""
        draft, exit = self.way.draft, self.way.exit
        lossy = exit is not None and exit < self.llm.decoder.shape.layers
        return Contender(
            self.way.name,
            mode="lossy" if lossy else "exact",
            exit=draft.exit if isinstance(draft, EarlyExit) else exit,
            draft_tokens=None if draft is None else drawing(draft).tokens,
        )

    def check(self, prompts: Sequence[Sequence[int]], settings: Settings) -> None:
        """Raises RequestError where the drafter or a prompt cannot be served."""
        self._stream(prompts, settings)  # refuses at once; nothing runs before it is read

    def run(self, prompts: Sequence[Sequence[int]], settings: Settings) -> Texts:
        """Decodes all prompts as one continuous batch."""
        chunks: list[Chunk] = []
        run = follow(self._stream(prompts, settings), chunks.append)
        if run.interrupted:
            raise KeyboardInterrupt
        ticks = read_ticks(run.arrivals, chunks)
        check_side_by_side(ticks, rows=settings.batch, prompts=len(prompts))
        return Texts(
            [completion.tokens for completion in run.completions],
            ticks,
            run.total,
            counts=None if self.way.draft is None else run.acceptance,
            weights_read=self._weights.run(self.way, ticks),
        )

    def _stream(self, prompts: Sequence[Sequence[int]], settings: Settings) -> Stream:
        return fresh(self.llm, batch=settings.batch).stream(
            prompts,
            draft=self.way.draft,
            exit=self.way.exit,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            ignore_eos=settings.ignore_eos,
        )


def check_side_by_side(ticks: Sequence[Tick], *, rows: int, prompts: int) -> None:
    """Raises CapacityError where fewer rows decoded side by side than were asked for: a model whose cache does not fit
    lets prompts wait, which is no measurement of the batch."""
    left = prompts
    for tick in ticks:
        if len(tick.gained) < min(rows, left):
            raise CapacityError(
                f"batch {rows} does not fit in memory: {len(tick.gained)} rows decoded side by side; use "
                f"--batch {len(tick.gained)}, or fewer tokens"
            )
        left -= len(tick.finished)
