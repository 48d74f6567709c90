"""`layerskip tune`: which exit and how many drafted tokens are fastest here, predicted and measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from layerskip.cli.flags import ModelFlags, ShowFlags
from layerskip.cli.material import MaterialFlags
from layerskip.cli.screen import Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.evaluate.drafts import Grid
    from layerskip.llm import LLM

Record = Mapping[str, Any]


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
    tuning = Tuning(
        llm,
        encode_prompts(llm, wanted.prompts),
        grid.grid(llm),
        settings=settings,
        repeat=run.repeat,
        measure=run.measure,
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
        save(record, folder, screen)
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


def save(record: Record, folder: Path, screen: Screen) -> None:
    """Writes what a record recommends into a checkpoint, and says so."""
    from layerskip.evaluate.verdict import as_recommended, quality
    from layerskip.llm import recommend

    draft = as_recommended(record)
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


# --- tables


def show_record(record: Record, screen: Screen) -> None:
    """Acceptance by exit and position, the best predictions, what was measured, and the recommendation."""
    settings = record["settings"]
    screen.table(
        exit_rows(record["exits"]),
        columns=("exit", "agreement", *(f"pos {i + 1}" for i in positions(record["exits"]))),
        title=f"acceptance along {settings['items']} greedy texts ({settings['prompts']}), by place in the draft",
    )
    screen.table(
        [setting_row(each) for each in best_of_each(record["predicted"])],
        columns=("exit", "K", "confidence", "tokens/round", "predicted"),
        title="the best of each exit, predicted",
    )
    screen.table(
        [measured_row(each) for each in record["measured"]],
        columns=("setting (exact)", "tok/round", "predicted", "measured", "ratio"),
        title=f"speedup over plain decoding, batch {settings['batch']}, {settings['repeat']} paired runs",
    )
    screen.line(record["reason"])
    best = record["recommended"]
    if best is not None:
        screen.line(f"recommended: {flags_of(best)}")


def positions(exits: Sequence[Record]) -> list[int]:
    """The places that fit in a table, from 0."""
    most = max(len(each["rate_by_position"]) for each in exits)
    return [i for i in (0, 1, 2, 3, 5, 7, 11) if i < most]


def exit_rows(exits: Sequence[Record]) -> list[tuple[str, ...]]:
    """One row for each exit."""
    shown = positions(exits)
    return [
        (
            str(each["exit"]),
            f"{each['agreement']:.1%}",
            *(f"{each['rate_by_position'][i]:.1%}" if i < len(each["rate_by_position"]) else "" for i in shown),
        )
        for each in exits
    ]


def best_of_each(predicted: Sequence[Record]) -> list[Record]:
    """For each exit, the best without a threshold, and the best with one where that is better."""
    found: dict[tuple[int, bool], Record] = {}
    for each in sorted(predicted, key=lambda each: -float(each["speedup"])):
        key = each["exit"], each["confidence"] is None
        plain = found.get((each["exit"], True))
        if key not in found and not (plain is not None and not key[1]):
            found[key] = each
    return sorted(found.values(), key=lambda each: (each["exit"], each["confidence"] is not None))


def setting_row(each: Record) -> tuple[str, ...]:
    """A prediction."""
    confidence = "" if each["confidence"] is None else f"{each['confidence']:g}"
    rounded = f"{each['tokens_per_round']:.2f}", f"{each['speedup']:.2f}x"
    return (str(each["exit"]), str(each["draft_tokens"]), confidence, *rounded)


def measured_row(each: Record) -> tuple[str, ...]:
    """A prediction beside its measurement."""
    speedup = each["speedup"]
    return (
        setting_name(each),
        f"{each['tokens_per_round']:.2f}",
        f"{each['predicted']:.2f}x",
        f"{speedup['median']:.2f}x ({speedup['low']:.2f}..{speedup['high']:.2f})",
        f"{each['predicted'] / speedup['median']:.2f}",
    )


def setting_name(each: Record) -> str:
    """As the library names it."""
    from layerskip.evaluate.drafts import Setting

    return Setting(each["exit"], each["draft_tokens"], each["confidence"]).name


def flags_of(each: Record) -> str:
    """A setting as options of generate."""
    confidence = "" if each["confidence"] is None else f" --confidence {each['confidence']:g}"
    return f"--draft early-exit:{each['exit']} --draft-tokens {each['draft_tokens']}{confidence}"
