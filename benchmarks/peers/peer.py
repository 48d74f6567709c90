"""What an engine has to do to be measured: say whether it is here, load a folder, continue a prompt.

Knows token ids and seconds. Does not know engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """Self-speculation with early-exit drafts.

    Args:
        exit: E, layers that draft.
        tokens: K, the most tokens of a draft.
        confidence: stop a draft after a token whose probability is below this; None never stops.
        vocabulary: N, propose only so many tokens; None is all.
        head: what it drafts through: "own", or "int8" for a copy at 8 bits.
        auto: the engine chooses while it decodes, beginning with this exit.
    """

    exit: int
    tokens: int
    confidence: float | None = None
    vocabulary: int | None = None
    head: str = "own"
    auto: bool = False

    @property
    def name(self) -> str:
        """As reports call it: "early-exit:3 K=4", or "auto"."""
        if self.auto:
            return "auto"
        sure = "" if self.confidence is None else f" confidence={self.confidence:g}"
        narrow = "" if self.vocabulary is None else f" N={self.vocabulary}"
        coarse = "" if self.head == "own" else f" {self.head} head"
        return f"early-exit:{self.exit} K={self.tokens}{narrow}{coarse}{sure}"


@dataclass(frozen=True)
class PeerRun:
    """One prompt, continued.

    Args:
        tokens: new ids.
        first: seconds until the first of them were there.
        first_tokens: how many came then.
        total: seconds until all were.
        rounds: passes of the whole model, the prompt's included where it brought a token.
    """

    tokens: list[int]
    first: float
    first_tokens: int
    total: float
    rounds: int


FLOATS = ("bfloat16", "float32")
QUANTISED = "int8"
"""Weights of 8 bits and a scale for every 32 of them, which each engine makes from the folder's; keys, values and norms
are as it keeps them beside bfloat16."""


class Peer(Protocol):
    """An engine, in a process of its own."""

    package: str
    """That it comes with, as pip knows it."""

    dtypes: tuple[str, ...]
    """Element types of weights that it is measured with."""

    def available(self) -> str | None:
        """None where it can be used, else the reason why not."""
        ...

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """Writes into `work` what it reads instead of the folder's files; False where it is there, or not needed."""
        ...

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads a checkpoint, or what was prepared of it."""
        ...

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """The ways of self-speculation to try, with so many tokens a draft; none where it cannot."""
        ...

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt greedily by exactly so many tokens, past any end of text."""
        ...


def missing(package: str) -> str | None:
    """Why a package cannot be used: the reason that `available` gives."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"not installed; pip install {package}"
    return None
