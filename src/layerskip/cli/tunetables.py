"""What `layerskip tune` prints: tables of a finished record. Knows figures; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerskip.cli.screen import Screen

Record = Mapping[str, Any]


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
    if record.get("narrow"):  # older records have none
        screen.table(
            [narrow_row(each) for each in record["narrow"]],
            columns=("setting (exact)", "tok/round", "measured", "gain"),
            title="with a draft vocabulary of N tokens, or an int8 head: over plain decoding, over the same without",
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


def narrow_row(each: Record) -> tuple[str, ...]:
    """A draft vocabulary, or a head of 8 bits, that was measured."""
    spreads = (f"{s['median']:.2f}x ({s['low']:.2f}..{s['high']:.2f})" for s in (each["speedup"], each["gain"]))
    return (setting_name(each), f"{each['tokens_per_round']:.2f}", *spreads)


def setting_name(each: Record) -> str:
    """As the library names it."""
    from layerskip.evaluate.drafts import Setting
    from layerskip.evaluate.shortlists import Narrow

    setting = Setting(each["exit"], each["draft_tokens"], each["confidence"])
    if each.get("vocabulary") or each.get("head"):
        return Narrow(setting, each.get("vocabulary")).name
    return setting.name


def flags_of(each: Record) -> str:
    """A setting as options of generate."""
    confidence = "" if each["confidence"] is None else f" --confidence {each['confidence']:g}"
    size = f" --draft-vocabulary {each['vocabulary']}" if each.get("vocabulary") else ""
    head = f" --draft-head {each['head']}" if each.get("head") else ""
    return f"--draft early-exit:{each['exit']} --draft-tokens {each['draft_tokens']}{confidence}{size}{head}"
