"""`layerskip bench`: the speed of drafters against plain decoding and others, in turns, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from layerskip.cli.drafting import (
    NARROW,
    confidence,
    corpus_option,
    head_option,
    label,
    refuse_options,
    vocabulary,
)
from layerskip.cli.flags import ModelFlags, ShowFlags, read_exits
from layerskip.cli.material import MaterialFlags
from layerskip.cli.prompts import read_file
from layerskip.cli.screen import Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.evaluate.ways import Way
    from layerskip.llm import LLM


@dataclass(frozen=True)
class WayFlags:
    """What is compared with plain decoding."""

    drafts: Annotated[
        list[str],
        Option(
            "--draft",
            metavar="DRAFTER",
            help="auto, early-exit:E, lookup, cascade:E, assistant:PATH, or none; repeatable. Without it, the exit "
            "that the checkpoint recommends.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    exit: Annotated[
        str | None,
        Option(metavar="all|E[,E..]", help="Also stop after E layers (lossy), at each of these.", show_default=False),
    ] = None
    draft_tokens: Annotated[
        str | None,
        Option(
            metavar="K[,K..]",
            help="Tokens drafted in a round: every drafter with each of these; else what is recommended, or 4, for "
            "lookup 8.",
            show_default=False,
        ),
    ] = None
    confidence: Annotated[
        float | None,
        Option(metavar="P", help="End a draft where its likeliest token is less likely than this.", show_default=False),
    ] = None
    draft_vocabulary: Annotated[
        str | None,
        Option(
            metavar="N|auto|0[,N..]",
            help="Propose only N tokens: every drafter with each of these. auto is what the checkpoint recommends, or "
            "1.5% of its size; 0 is all.",
            show_default=False,
        ),
    ] = None
    draft_head: Annotated[str | None, head_option(metavar="own|int8|auto[,..]")] = None
    draft_corpus: Annotated[Path | None, corpus_option()] = None
    peers: Annotated[
        list[str],
        Option(
            "--peer",
            metavar="NAME",
            help="transformers (Hugging Face's generate), or transformers-early-exit (its assistant_early_exit, batch "
            "1 only); repeatable.",
            show_default=False,
        ),
    ] = field(default_factory=list)

    def ways(self, llm: LLM) -> list[Way]:
        """Plain decoding, each exit, and each drafter with each number of tokens. Raises what `LLM.drafter` raises."""
        from layerskip.evaluate.contest import PLAIN
        from layerskip.evaluate.ways import Way

        counts = [None] if self.draft_tokens is None else whole_numbers("--draft-tokens", [self.draft_tokens])
        sizes = [None] if self.draft_vocabulary is None else [*map(vocabulary, self.draft_vocabulary.split(","))]
        heads = [None] if self.draft_head is None else [word.strip() for word in self.draft_head.split(",")]
        ranked = None if self.draft_corpus is None else llm.rank(read_file(self.draft_corpus))
        found = [Way(PLAIN)]
        if self.exit is not None:
            layers = llm.decoder.shape.layers
            exits = read_exits(self.exit, layers=layers)
            found += [Way(f"exit {exit}", exit=exit) for exit in exits if exit < layers]
        for words in self.drafts or ([] if self.exit else ["early-exit"]):
            for count, size, head in product(counts, sizes, heads):
                if size and head == "int8" and 0 in sizes:
                    continue  # that head has all tokens: it is a way of its own beside the sizes
                drafter = llm.drafter(
                    words,
                    tokens=count,
                    confidence=self.confidence,
                    vocabulary=size,
                    ranked=None if size == 0 else ranked,
                    head=head,
                )
                if drafter is not None:
                    sure = confidence(drafter)
                    stops = "" if sure is None else f" P={sure:g}"
                    found.append(Way(label(words, drafter) + stops, drafter))
        if all(way.draft is None for way in found):
            refuse_options(self, "draft_tokens", "confidence", *NARROW)
        return found


@dataclass(frozen=True)
class RunFlags:
    """How much is measured, and where it is kept."""

    batch: Annotated[
        list[str],
        Option(metavar="N[,N..]", help="Rows that decode side by side, else 1; repeatable.", show_default=False),
    ] = field(default_factory=list)
    repeat: Annotated[int, Option(metavar="N", help="Runs of each; figures are their medians.")] = 3
    max_tokens: Annotated[
        int | None,
        Option(metavar="N", help="Tokens of each completion at most; what the task asks, or 128.", show_default=False),
    ] = None
    ignore_eos: Annotated[
        bool, Option("--ignore-eos", help="Go on after end of sequence: all emit the same number of tokens.")
    ] = False
    threads: Annotated[
        int | None, Option(metavar="N", help="Threads that compute; else as many as torch takes.", show_default=False)
    ] = None
    output: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="Keep bench.json there after every repeat; the same command goes on with it.",
            show_default=False,
        ),
    ] = None


def bench(*, model: ModelFlags, ways: WayFlags, material: MaterialFlags, run: RunFlags, show: ShowFlags) -> None:
    """Measure how fast drafters are, against plain decoding in the same process.

    All decode the same prompts greedily, in turns. Tables come first, and one line of JSON last.
    """
    batches = whole_numbers("--batch", run.batch or ["1"])
    wanted = material.load(model.model)
    from layerskip.cli.benchrun import Plan, measure
    from layerskip.cli.benchtables import show_record
    from layerskip.evaluate.contest import Settings, at_least_one
    from layerskip.evaluate.peers import check_peers
    from layerskip.evaluate.prompts import encode_prompts

    check_peers(ways.peers)
    at_least_one("repeat", run.repeat)
    tokens = (wanted.max_tokens or 128) if run.max_tokens is None else run.max_tokens
    settings = [Settings(batch, tokens, wanted.stop, run.ignore_eos) for batch in batches]
    if run.threads is not None:
        use_threads(run.threads)
    llm = model.load()
    plan = Plan(llm, model, ways.ways(llm), ways.peers, wanted.source, encode_prompts(llm, wanted.prompts), settings)
    screen = Screen(no_color=show.no_color)
    record = measure(plan, repeat=run.repeat, output=run.output, screen=screen)
    show_record(record, screen)
    write_json(record)


def whole_numbers(name: str, words: Sequence[str]) -> list[int]:
    """The numbers of "1,4" and "16", each once, in their order.

    Raises:
        RequestError: something else is among them; names the option.

    Example:
        >>> whole_numbers("--batch", ["1,4", "16"])
        [1, 4, 16]
    """
    parts = [part.strip() for word in words for part in word.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RequestError(f"{name} {' '.join(words)} is not possible; use whole numbers such as 1,4,16")
    return list(dict.fromkeys(int(part) for part in parts))


def use_threads(count: int) -> None:
    """Lets torch compute with so many. Raises RequestError for fewer than one."""
    import torch

    from layerskip.evaluate.contest import at_least_one

    torch.set_num_threads(at_least_one("threads", count))
