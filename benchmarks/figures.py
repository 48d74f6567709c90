"""What is made of the rounds: medians with their spread, and ratios of two ways within one round.

Knows the record of `side_by_side`. Does not know engines, nor targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.contest import PLAIN, Way
from benchmarks.peers import OWN
from layerskip import environment
from layerskip.evaluate.record import Spread

Turn = Mapping[str, Any]
"""What a way took in one round, from `contest.measured`."""

PACKAGES = {
    "llama.cpp": ("llama-cpp-python", "gguf"),
    "openvino-genai": ("openvino-genai", "openvino", "gguf"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime"),
}


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Of this package, of what it stands on, and of the engines that are installed."""
    found = environment.versions()
    for peer in peers:
        for package in PACKAGES.get(peer, ()):
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # the engine will be skipped, and says so
                continue
    return found


def decode_rate(turn: Turn) -> float:
    """Tokens/s after the first tokens of each prompt."""
    return float(turn["decode_tokens"] / turn["decode_seconds"])


def whole_rate(turn: Turn) -> float:
    """Tokens/s with the prompts."""
    return float(turn["tokens"] / turn["seconds"])


RATES = {"decode": decode_rate, "end_to_end": whole_rate}


def summary(record: Mapping[str, Any], ways: Sequence[Way]) -> dict[str, Any]:
    """The results by way, the ratios of our ways to the others, and plain decoding's share of the memory bandwidth.

    A way counts where it took part in every round.
    """
    rounds = [each["ways"] for each in record["rounds"]]
    there = [way for way in ways if all(way.name in each for each in rounds)]
    turns = {way: [each[way.name] for each in rounds] for way in there}
    read = [
        decode_rate(turn) * record["model"]["step_bytes"] / each["bandwidth"]
        for turn, each in zip(turns[PLAIN], record["rounds"], strict=True)
    ]
    return {
        "results": [result(way, turns[way]) for way in there],
        "ratios": [
            ratio(ours, theirs, turns)
            for ours in there
            for theirs in there
            if ours.peer == OWN and ours is not theirs and (theirs.peer != OWN or theirs == PLAIN or is_auto(ours))
        ],
        "bandwidth_share": Spread.of(read).record(),
    }


def is_auto(way: Way) -> bool:
    """Whether it chooses its drafts itself."""
    return way.draft is not None and way.draft.auto


def result(way: Way, turns: Sequence[Turn]) -> dict[str, Any]:
    """A way's figures over all rounds."""
    differs = [turn["differs_at"] for turn in turns]
    return {
        "name": way.name,
        "peer": way.peer,
        "kind": "plain" if way.draft is None else "auto" if way.draft.auto else "early exit",
        "exit": None if way.draft is None else way.draft.exit,
        "draft_tokens": None if way.draft is None else way.draft.tokens,
        "confidence": None if way.draft is None else way.draft.confidence,
        "draft_head": None if way.draft is None else way.draft.head,
        "draft_vocabulary": None if way.draft is None else way.draft.vocabulary,
        "tokens": turns[0]["tokens"],
        "tokens_per_second": {name: Spread.of([rate(turn) for turn in turns]).record() for name, rate in RATES.items()},
        "time_to_first_token": Spread.of([turn["first_seconds"] for turn in turns]).record(),
        "tokens_per_round": sum(turn["tokens"] for turn in turns) / sum(turn["rounds"] for turn in turns),
        "identical": None if way == PLAIN else all(place is None for one in differs for place in one),
        "differs_at": None if way == PLAIN else differs[0],
    }


def ratio(ours: Way, theirs: Way, turns: Mapping[Way, Sequence[Turn]]) -> dict[str, Any]:
    """How many times as fast one way is as another: tokens/s over tokens/s, of each round."""
    pairs = list(zip(turns[ours], turns[theirs], strict=True))
    return {
        "of": ours.name,
        "against": theirs.name,
        **{name: Spread.of([rate(a) / rate(b) for a, b in pairs]).record() for name, rate in RATES.items()},
    }
