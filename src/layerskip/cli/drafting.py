"""The options of drafting, and what reports call a drafter.

Knows words and drafters. What they mean is the library's: `LLM.drafter`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from layerskip.cli.prompts import read_file
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.llm import LLM

_DRAFT = "Drafting (changes speed only)"
_draft = partial(Option, rich_help_panel=_DRAFT)
head_option = partial(
    Option,
    help="What drafts predict through: int8, a copy of the head at 8 bits, for native weights and all tokens; own; or "
    "auto, what the checkpoint recommends.",
    show_default=False,
)
corpus_option = partial(
    Option, metavar="FILE", help="A text whose commonest tokens a draft vocabulary takes first.", show_default=False
)


@dataclass(frozen=True)
class DraftFlags:
    """What drafts, and how much."""

    named: Annotated[
        str | None,
        _draft(
            "--draft",
            metavar="DRAFTER",
            help="auto (finds exit and length while it decodes), early-exit:E (the first E layers; without :E what the "
            "checkpoint recommends), lookup (copies from the context), cascade:E (copies, else the exit), "
            "assistant:PATH (a smaller checkpoint of the same tokenizer) or none.",
            show_default=False,
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        _draft(
            metavar="K",
            help="Tokens drafted in a round; 4, for lookup 8. The most, where the length is found: 16.",
            show_default=False,
        ),
    ] = None
    draft_length: Annotated[
        str | None,
        _draft(
            metavar="RULE",
            help="fixed, or found while decoding: thompson (by draws from the acceptance rate) or gain (as long as the "
            "next token should pay).",
            show_default=False,
        ),
    ] = None
    confidence: Annotated[
        float | None,
        _draft(metavar="P", help="End a draft where its likeliest token is less likely than this.", show_default=False),
    ] = None
    draft_vocabulary: Annotated[
        str | None,
        _draft(
            metavar="N|auto|0",
            help="Propose only N tokens, the commonest and those of the text: for vocabularies so large that the head "
            "costs more than the first layers. auto is what the checkpoint recommends, or 1.5% of its size; 0 is all.",
            show_default=False,
        ),
    ] = None
    draft_head: Annotated[str | None, head_option(metavar="own|int8|auto", rich_help_panel=_DRAFT)] = None
    draft_corpus: Annotated[Path | None, corpus_option(rich_help_panel=_DRAFT)] = None

    @property
    def draft(self) -> str:
        """The drafter in words; "none" where none was named."""
        return self.named or "none"

    def drafter(self, llm: LLM) -> Drafter | None:
        """The drafter, None for plain decoding. Raises what `LLM.drafter` raises."""
        drafter = llm.drafter(
            self.draft,
            tokens=self.draft_tokens,
            confidence=self.confidence,
            length=self.draft_length,
            vocabulary=None if self.draft_vocabulary is None else vocabulary(self.draft_vocabulary),
            ranked=None if self.draft_corpus is None else llm.rank(read_file(self.draft_corpus)),
            head=self.draft_head,
        )
        if drafter is None:
            refuse_options(self, "draft_tokens", "draft_length", "confidence", *NARROW)
        return drafter

    def or_auto(self, llm: LLM) -> DraftFlags:
        """With "auto" where no drafter is named and the checkpoint recommends an exit."""
        free = self.named is None and self.confidence is None and self.draft_length is None
        return replace(self, named="auto") if free and llm.recommended else self


NARROW = ("draft_vocabulary", "draft_head", "draft_corpus")
"""Options for what drafts predict through."""


def refuse_options(flags: object, *names: str) -> None:
    """Raises RequestError, where nothing drafts, for the first of these options that was given."""
    for name in names:
        value = getattr(flags, name)
        if value is not None:
            option = f"--{name.replace('_', '-')} {value}"
            raise RequestError(f"{option} needs a drafter; add --draft early-exit:E, say, or leave it out")


def vocabulary(words: str) -> int | str:
    """The size that "2048" means; "auto" is itself. Raises RequestError for other words."""
    if words == "auto":
        return words
    try:
        return int(words)
    except ValueError as error:
        raise RequestError(
            f"--draft-vocabulary {words} is not possible; use auto, a number of tokens, or 0 for all"
        ) from error


def label(words: str, drafter: Drafter | None) -> str:
    """What reports call a way of decoding: "early-exit:3 K=4", or "plain"."""
    from layerskip.evaluate.ways import drafter_name

    return "plain" if drafter is None else drafter_name(drafter, words=words)


def account(drafter: Drafter | None) -> str | None:
    """What a drafter that chooses has chosen, in a line, and begins to count anew; None for the others."""
    from layerskip.decode.drafters import Auto

    if not isinstance(drafter, Auto):
        return None
    line = drafter.line()
    drafter.recount()
    return line


def confidence(drafter: Drafter) -> float | None:
    """Where its drafts end: as asked, or as the checkpoint recommends."""
    from layerskip.evaluate.ways import drawing

    found: float | None = getattr(drawing(drafter), "confidence", None)  # not every drafter has one
    return found


def draft_record(flags: DraftFlags, drafter: Drafter | None) -> dict[str, Any] | None:
    """What drafts, for JSON."""
    from layerskip.decode.drafters import Auto
    from layerskip.evaluate.ways import drawing, with_exit

    if drafter is None:
        return None
    chosen = {"chosen": drafter.record()} if isinstance(drafter, Auto) else {}
    named = {
        "drafter": with_exit(flags.draft, drafter),
        "tokens": drawing(drafter).tokens,
        "confidence": confidence(drafter),
    }
    found: dict[str, Any] = {} if flags.draft_length is None else {"length": flags.draft_length}
    size = getattr(drafter, "vocabulary", None)  # a checkpoint may recommend this too; not every drafter has it
    found |= {} if size is None else {"vocabulary": size}
    head = getattr(drafter, "head", "own")  # and this
    found |= {} if head == "own" else {"head": head}
    return {**named, **found, **chosen}
