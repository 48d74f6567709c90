"""What an evaluation found, in tables: scores by group, tokens/s, what became of drafts, the curves of the exits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerskip.cli.screen import Screen

if TYPE_CHECKING:
    from layerskip.evaluate import Point, Quality, Result, Score


def show_quality(found: Quality, screen: Screen) -> None:
    """Everything, for people."""
    if found.curves is not None:
        count = found.curves[0].tokens
        columns = ("exit", "loss", "perplexity", "accuracy", "agreement")
        screen.table(
            [curve_row(point) for point in found.curves], columns=columns, title=f"{found.task.name}: {count:,} tokens"
        )
        return
    for group in found.results[0].scores:
        screen.table(score_rows(found, group), columns=("", *found.results[0].scores[group]), title=title(found, group))
    groups = [group for group in found.results[0].pace if group != "all"]
    if groups:
        screen.table(
            [group_row(found, group) for group in groups],
            columns=("tokens/s", "items", *(result.name for result in found.results)),
            title=f"{found.task.name}: {len(found.task.items):,} items, nothing is scored",
        )
    screen.table([speed_row(result) for result in found.results], columns=("", "mode", "tokens", "s", "tokens/s"))
    for result in found.results:
        if result.acceptance is not None:
            screen.line(drafted_line(result))


def title(found: Quality, group: str) -> str:
    """What a table is about: "topv2, unseen: 12 items"."""
    count = next(iter(found.results[0].scores[group].values())).count
    return f"{found.task.name}, {group}: {count:,} item{'' if count == 1 else 's'}"


def score_rows(found: Quality, group: str) -> list[tuple[str, ...]]:
    """The scores of a group, a row for each way of decoding."""
    return [(result.name, *map(percent, result.scores[group].values())) for result in found.results]


def percent(score: Score) -> str:
    """The mean with its standard error."""
    return f"{score.mean:.1%}" + ("" if score.error is None else f" ± {100 * score.error:.1f}")


def speed_row(result: Result) -> tuple[str, ...]:
    """What a way of decoding cost, prompts included."""
    rate = result.pace["all"].rate
    return (result.name, result.mode, f"{result.tokens:,}", f"{result.seconds:.1f}", f"{rate:.1f}")


def group_row(found: Quality, group: str) -> tuple[str, ...]:
    """Tokens/s of a group, prompts included, by way of decoding."""
    paces = [result.pace[group] for result in found.results]
    return (group, f"{paces[0].items:,}", *(f"{pace.rate:.1f}" for pace in paces))


def curve_row(point: Point) -> tuple[str, ...]:
    """What an exit predicts."""
    return (
        str(point.exit),
        f"{point.loss:.4f}",
        f"{point.perplexity:.4g}",
        f"{point.accuracy:.2%}",
        f"{point.agreement:.2%}",
    )


def drafted_line(result: Result) -> str:
    """What became of the drafts, and whether the texts are the plain ones."""
    record: dict[str, Any] = result.record()["acceptance"]
    return (
        f"{result.name}: {accepted(record)}; "
        f"{result.identical:,} of {len(result.completions):,} texts identical to plain ones"
    )


def accepted(counts: Mapping[str, Any]) -> str:
    """How much was accepted, of the counts in a record."""
    return (
        f"acceptance {counts['draft_acceptance_rate']:.1%}, "
        f"{counts['mean_acceptance_length']:.2f} tokens/round ({counts['emitted_per_round']:.2f} emitted)"
    )
