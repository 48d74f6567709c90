"""`layerskip tune`: which exit and how many drafted tokens are fastest here, predicted and measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from layerskip.cli.drafting import corpus_option
from layerskip.cli.flags import ModelFlags, ShowFlags
from layerskip.cli.material import MaterialFlags
from layerskip.cli.prompts import read_file
from layerskip.cli.screen import Screen, write_json
from layerskip.cli.tunetables import Record, setting_name, show_record
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.evaluate.drafts import Grid
    from layerskip.llm import LLM


@dataclass(frozen=True)
class GridFlags:
    """What is tried."""

    exits: Annotated[
        str, Option(metavar="all|E[,E..]", help="Exits to draft from; all is every one below the last layer.")
    ] = "all"
    draft_tokens: Annotated[
        str, Option(metavar="K[,K..]", help="Tokens drafted in a round; 1..12 is each of them.")
    ] = "1..12"
    confidence: Annotated[
        str,
        Option(
            metavar="none|P[,P..]",
            help="Thresholds tried beside none: a draft ends where its likeliest token is less likely.",
        ),
    ] = "0.4,0.6,0.8"

    draft_vocabulary: Annotated[
        str,
        Option(
            metavar="auto|none|N[,N..]",
            help="Sizes of a draft vocabulary, tried with the best setting; auto is a few, where the head is heavy. "
            "There a head of 8 bits is tried as well, except with none.",
        ),
    ] = "auto"
    draft_corpus: Annotated[
        Path | None,
        corpus_option(),
    ] = None

    def sizes(self) -> list[int] | None:
        """Of draft vocabularies; None is auto. Raises RequestError for what is no list of numbers."""
        words = self.draft_vocabulary
        return None if words == "auto" else [] if words == "none" else numbers("--draft-vocabulary", words)

    def ranked(self, llm: LLM) -> list[int]:
        """Tokens by frequency. Raises RequestError where the corpus cannot be read."""
        return [] if self.draft_corpus is None else llm.rank(read_file(self.draft_corpus))

    def grid(self, llm: LLM) -> Grid:
        """The same for the library. Raises RequestError for what is no list of numbers."""
        from layerskip.evaluate.drafts import Grid

        layers = llm.decoder.shape.layers
        # a model of one layer has none: its first is refused with the reason
        exits = list(range(1, max(layers, 2))) if self.exits == "all" else numbers("--exits", self.exits)
        thresholds = [] if self.confidence == "none" else probabilities("--confidence", self.confidence)
        return Grid(exits, numbers("--draft-tokens", self.draft_tokens), thresholds)


@dataclass(frozen=True)
class TuneFlags:
    """How much is measured, and where it is kept."""

    batch: Annotated[int, Option(metavar="N", help="Rows that decode side by side.")] = 1
    max_tokens: Annotated[int, Option(metavar="N", help="Tokens of each continuation at most.")] = 64
    repeat: Annotated[int, Option(metavar="N", help="Runs of each setting that is measured.")] = 5
    measure: Annotated[int, Option(metavar="N", help="Settings that are measured.")] = 8
    save: Annotated[
        bool, Option("--save", help="Write the recommendation into the checkpoint's config.json.", show_default=False)
    ] = False
    output: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="Keep tune.json there after every part, and draw tune.png; the same settings go on with it.",
            show_default=False,
        ),
    ] = None
    json: Annotated[bool, Option("--json", help="One JSON object and nothing else.")] = False


def tune(*, model: ModelFlags, material: MaterialFlags, grid: GridFlags, run: TuneFlags, show: ShowFlags) -> None:
    """Find the fastest draft for a checkpoint on this machine: acceptance times cost, then measured.

    Whatever is recommended is exact: it changes speed only. Tables come first, and one line of JSON last.
    """
    wanted = material.load(model.model)
    folder = writable_checkpoint(model.model) if run.save else None
    from layerskip.cli.benchtables import Progress
    from layerskip.evaluate.contest import Settings
    from layerskip.evaluate.prompts import encode_prompts
    from layerskip.evaluate.tune import Tuning

    settings = Settings(run.batch, run.max_tokens, wanted.stop)
    llm = model.load()
    screen = Screen(no_color=show.no_color)
    progress = Progress(screen, repeat=run.repeat)
    ranked = grid.ranked(llm)
    tuning = Tuning(
        llm,
        encode_prompts(llm, wanted.prompts),
        grid.grid(llm),
        settings=settings,
        repeat=run.repeat,
        measure=run.measure,
        vocabulary=grid.sizes(),
        ranked=ranked,
        source=wanted.source,
        folder=run.output,
        tell=screen.note,
        see=progress,
    )
    with progress:
        record = tuning.run()
    if run.output is not None:
        draw(record, run.output / "tune.png", screen)
    if not run.json:
        show_record(record, screen)
    if folder is not None:
        save(record, folder, screen, ranked=ranked)
    write_json(dict(record))


def numbers(name: str, words: str) -> list[int]:
    """The whole numbers of "1,4" and "1..12,16", each once, in their order.

    Raises:
        RequestError: something else is among them; names the option.

    Example:
        >>> numbers("--draft-tokens", "1..3, 6")
        [1, 2, 3, 6]
    """
    found: list[int] = []
    for part in words.split(","):
        first, dots, last = (word.strip() for word in part.partition(".."))
        if not first.isdecimal() or bool(dots) != last.isdecimal() or (dots and int(last) < int(first)):
            raise RequestError(f"{name} {words} is not possible; use whole numbers such as 2,4,6 or 1..12")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def probabilities(name: str, words: str) -> list[float]:
    """The numbers of "0.5,0.8", each once. Raises RequestError where something else is among them."""
    try:
        return list(dict.fromkeys(float(word) for word in words.split(",")))
    except ValueError as error:
        raise RequestError(f"{name} {words} is not possible; use none, or numbers such as 0.5,0.8") from error


def writable_checkpoint(model: str | None) -> Path:
    """The folder whose config.json `--save` writes, before anything is measured.

    Raises:
        RequestError: it is not a folder of the user's own.
    """
    if model is None:
        raise RequestError("--save writes into a checkpoint folder, not into the package; name a copy with -m")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise RequestError(f"--save writes into a checkpoint folder, and {model} is none; download it, and name that")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"--save cannot write into {folder}; copy the checkpoint to a place of your own")
    return folder


def save(record: Record, folder: Path, screen: Screen, *, ranked: Sequence[int] = ()) -> None:
    """Writes what a record recommends into a checkpoint, with the ranking it was measured with, and says so."""
    from layerskip.evaluate.verdict import as_recommended, quality
    from layerskip.llm import recommend

    draft = as_recommended(record, ranked=ranked)
    recommend(folder, draft, quality=quality(record))
    what = (
        "no draft any more" if draft is None else f"{setting_name(record['recommended'])}; --draft early-exit takes it"
    )
    screen.note(f"{folder}/config.json now recommends {what}")


def draw(record: Record, path: Path, screen: Screen) -> None:
    """Draws the map of speedups, where matplotlib is there. Raises StorageError where the place cannot be written."""
    try:
        from layerskip.evaluate.report.figures import speedup_map
        from layerskip.evaluate.report.pictures import write_png
    except RequestError as error:
        screen.note(f"{path} is not drawn: {error}")
        return
    write_png(speedup_map(record), path)
    screen.note(f"{path} shows the speedups over exits and draft lengths")
