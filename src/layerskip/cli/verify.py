"""`layerskip verify`: the same prompts plainly and with a drafter, greedily, and what to make of a difference.

Greedy texts are equal token for token except where the two likeliest tokens tie within the rounding of the dtype:
wider passes round differently. So a difference counts by the gap between the two tokens' logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.drafting import DraftFlags, draft_record, label
from layerskip.cli.flags import ModelFlags, ShowFlags
from layerskip.cli.generate import dtype_name
from layerskip.cli.prompts import read_prompts
from layerskip.cli.screen import Screen, write_json
from layerskip.decode.acceptance import Acceptance
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.llm import LLM

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6,",
    "Dear Sir or Madam,\n\nI am writing to",
)
TIES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Gaps between logits that rounding explains: absolute in float64 and float32, else relative to logits above 1."""


def verify(
    *,
    model: ModelFlags,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='One prompt in each line, or .jsonl with "prompt" or "text"; a few are built in.',
            show_default=False,
        ),
    ] = None,
    draft: DraftFlags,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens generated for each prompt.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    show: ShowFlags,
) -> None:
    """Check that drafting does not change greedy text.

    Without --draft it is the early exit that the checkpoint recommends, or at a third of its layers, rounded.
    Exit status 1 if a text differs by more than a tie between two tokens.
    """
    texts = None if prompts is None else read_prompts(prompts)
    llm = model.load()
    from layerskip.evaluate.prompts import encode_prompts

    draft = with_default(draft, llm)
    drafter = draft.drafter(llm)
    screen = Screen(no_color=show.no_color)
    results = []
    asked = built_in(llm) if texts is None else texts
    for text, ids in zip(asked, encode_prompts(llm, asked), strict=True):
        results.append(check(llm, text, ids, drafter=drafter, max_tokens=max_tokens))
        if not json:
            screen.line(results[-1].line(), {"identical": "green", "tie": "yellow"}.get(results[-1].verdict, "red"))
    report = Report(results, label(draft.draft, drafter), dtype_name(llm), layout=llm.decoder.layout)
    if json:
        write_json({"model": llm.name, "draft": draft_record(draft, drafter), **report.record()})
    else:
        screen.line(report.line())
    if report.count("different"):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Divergence:
    """Where a drafted text leaves the plain one.

    Args:
        at: which generated token.
        plain: the plain text's token there and its spelling; None where that text ended.
        drafted: the same of the drafted text.
        gap: the plain model's logit of the one less that of the other; None where a text ended.
        tolerance: the largest gap that is a tie.
    """

    at: int
    plain: tuple[int, str] | None
    drafted: tuple[int, str] | None
    gap: float | None
    tolerance: float

    @property
    def tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap is not None and abs(self.gap) <= self.tolerance

    def line(self) -> str:
        """Where, which, how far apart."""
        plain, drafted = (repr(token[1]) if token else "the end" for token in (self.plain, self.drafted))
        gap = "" if self.gap is None else f"; logit gap {self.gap:.3g}, {'' if self.tie else 'not '}a tie within "
        return f"at token {self.at}: plain {plain}, drafted {drafted}{gap}{f'{self.tolerance:.3g}' if gap else ''}"


@dataclass(frozen=True)
class Result:
    """One prompt, decoded both ways."""

    prompt: str
    tokens: int
    divergence: Divergence | None
    acceptance: Acceptance

    @property
    def verdict(self) -> str:
        """identical, tie or different."""
        if self.divergence is None:
            return "identical"
        return "tie" if self.divergence.tie else "different"

    def line(self) -> str:
        """The result in one line."""
        prompt = self.prompt if len(self.prompt) <= 40 else self.prompt[:39] + "…"
        tokens = f"{self.tokens:>4} tokens"
        return f"{self.verdict:9}  {tokens}  {prompt!r}" + (f"  {self.divergence.line()}" if self.divergence else "")

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        found = self.divergence
        return {
            "prompt": self.prompt,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "divergence": None if found is None else {**vars(found), "tie": found.tie},
            "acceptance": self.acceptance.as_dict(),
        }


@dataclass(frozen=True)
class Report:
    """All prompts."""

    results: Sequence[Result]
    label: str
    dtype: str
    layout: str

    def count(self, verdict: str) -> int:
        """Prompts with this verdict."""
        return sum(result.verdict == verdict for result in self.results)

    def line(self) -> str:
        """The summary."""
        from layerskip.evaluate.record import held_as

        total = sum((result.acceptance for result in self.results), Acceptance())
        held = held_as({"dtype": self.dtype, "layout": self.layout})
        return (
            f"{len(self.results)} prompts: {self.count('identical')} identical, {self.count('tie')} tied, "
            f"{self.count('different')} different; {self.label}, {held}, acceptance {total.rate:.1%}"
        )

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "dtype": self.dtype,
            "layout": self.layout,
            "prompts": [result.record() for result in self.results],
            **{verdict: self.count(verdict) for verdict in ("identical", "tie", "different")},
        }


def with_default(draft: DraftFlags, llm: LLM) -> DraftFlags:
    """Early exit as the checkpoint recommends, or at a third of the layers, rounded, where no drafter is named.

    Raises:
        RequestError: "none" is named: plain decoding is what drafters are compared with.
    """
    if draft.named == "none":
        raise RequestError("verify compares a drafter with plain decoding; name one, such as --draft early-exit:3")
    if draft.named is not None:
        return draft
    third = max(1, round(llm.decoder.shape.layers / 3))
    return replace(draft, named="early-exit" if llm.recommended else f"early-exit:{third}")


def built_in(llm: LLM) -> list[str]:
    """A handful of prompts; the empty one too where there is a BOS token to begin with."""
    return [*([] if llm.tokenizer.bos_token_id is None else [""]), *PROMPTS]


def check(llm: LLM, prompt: str, ids: list[int], *, drafter: Drafter | None, max_tokens: int) -> Result:
    """Decodes a prompt plainly and with the drafter, each on a cache of its own."""
    from layerskip.evaluate.follow import fresh

    plain = fresh(llm).generate(ids, max_tokens=max_tokens)
    drafted = fresh(llm).generate(ids, max_tokens=max_tokens, draft=drafter)
    assert not isinstance(plain, list)
    assert not isinstance(drafted, list)
    return Result(prompt, len(plain.tokens), diverge(llm, ids, plain.tokens, drafted.tokens), drafted.acceptance)


def diverge(llm: LLM, ids: Sequence[int], plain: Sequence[int], drafted: Sequence[int]) -> Divergence | None:
    """Where two continuations of `ids` part, and how far apart the plain model's logits are there."""
    from layerskip.evaluate.contest import first_difference

    at = first_difference(plain, drafted)
    if at is None:
        return None
    one, other = (_spelt(llm, tokens, at) for tokens in (plain, drafted))
    tie = TIES[rounding(llm)]
    if one is None or other is None:
        return Divergence(at, one, other, None, tie)
    logits = plain_logits(llm, ids, plain[:at])
    a, b = logits[one[0]], logits[other[0]]
    if tie > TIES["float32"]:
        tie *= max(1.0, abs(a), abs(b))
    return Divergence(at, one, other, a - b, tie)


def _spelt(llm: LLM, tokens: Sequence[int], at: int) -> tuple[int, str] | None:
    return (tokens[at], str(llm.tokenizer.decode([tokens[at]]))) if at < len(tokens) else None


def rounding(llm: LLM) -> str:
    """The dtype whose rounding explains a tie. Of a position that torch rounds to 8 bits the last bit of what it is
    computed from may decide where it goes, and so about much more; the kernels compute the same bits every time."""
    name = dtype_name(llm)
    return "bfloat16" if llm.decoder.layout.endswith("-plain") and TIES[name] < TIES["bfloat16"] else name


def plain_logits(llm: LLM, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """The full model's raw logits after `ids` and `tokens`, bit for bit as plain decoding computes them: every token in
    a pass of its own. One wide pass rounds differently, in bfloat16 by more than the gap of a tie."""
    import torch

    from layerskip.decode.prefill import prefill

    decoder = llm.decoder
    with torch.inference_mode():
        cache = decoder.cache(rows=1, slots=len(ids) + len(tokens))
        prefill(decoder, cache, rows=[0], ids=[ids[:-1]], starts=[0], depth=decoder.shape.layers)
        for position, token in enumerate([ids[-1], *tokens], len(ids) - 1):
            hidden = decoder.embed(torch.tensor([[token]], device=decoder.device))
            at = torch.tensor([[position]], device=decoder.device)
            hidden = decoder.run(hidden, at, cache, limit=position + 1)
        logits: list[float] = decoder.logits(hidden)[0, 0].tolist()
    return logits
