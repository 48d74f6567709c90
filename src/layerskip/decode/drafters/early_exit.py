"""Drafting with the target's own first layers (LayerSkip, Elhoushi et al., ACL 2024, section 4.3).

The draft's keys, values and states after layer exit-1 are the target's own, so verification goes on from them: no
layer processes a drafted position twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from layerskip.decode.controllers import Controller, Plan, controller_for
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.decode.drafters.chain import draw_chain, ended
from layerskip.decode.drafters.coarse import Coarse
from layerskip.decode.drafters.shortlist import Narrowed, narrowed
from layerskip.errors import RequestError, check_whole, suggest
from layerskip.model.decoder import Decoder
from layerskip.model.narrow import CoarseHead, NarrowHead
from layerskip.model.stop import Ends

HEADS = ("own", "int8")


class EarlyExit:
    """Drafts through the shared norm and head after layers 0..exit-1. Exact.

    Args:
        exit: layers that draft, at least 1 and fewer than the target decodes with.
        tokens: K, the most tokens drafted in a round; None is 4, or 16 where `length` is not fixed.
        confidence: stop a draft after the first token where the exit's largest probability is below this; None never
            stops.
        length: "fixed", or a rule that finds the length while decoding: "thompson" or "gain" (see `controllers`). They
            look at the clock, so with a seed, sampled text repeats in law only.
        vocabulary: N, propose only N tokens, the likeliest and those of the text, through a head of so many rows: for
            vocabularies so large that the head costs more than the first layers. None is all of them. Rows of a batch
            share what is proposed, so with a seed, sampled text then depends on its neighbours, in all but its law.
        ranked: tokens by frequency, the likeliest first, for `vocabulary` (see `LLM.rank`); those it leaves out follow
            by their ids.
        head: "own", or "int8": draft through a copy of the head at 8 bits, where the head costs much and no list of
            tokens is good enough. For native weights; takes its bytes.

    Raises:
        RequestError: exit, tokens or vocabulary below 1, confidence outside (0, 1], no such rule or head, a threshold
            beside a rule, a ranking without a vocabulary, or a vocabulary beside a head of 8 bits.
    """

    name = "early-exit"

    def __init__(
        self,
        exit: int,
        *,
        tokens: int | None = None,
        confidence: float | None = None,
        length: str = "fixed",
        vocabulary: int | None = None,
        ranked: Sequence[int] = (),
        head: str = "own",
    ) -> None:
        check_draft_exit(exit)
        self.exit, self.confidence, self.length = exit, confidence, length
        self.controller: Controller = controller_for(tokens, confidence=confidence, length=length)
        self.vocabulary, self.head, self.ranked = vocabulary, head, tuple(ranked)
        self._heads = heads(head, vocabulary, ranked)

    @property
    def tokens(self) -> int:
        """The most tokens drafted in a round."""
        return self.controller.tokens

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Raises RequestError where the draft would not exit before the target does."""
        if self.exit >= exit:
            raise RequestError(
                f"draft exit {self.exit} is not below the {exit} layers the model decodes with; use 1..{exit - 1}"
                if exit > 1
                else "a model that decodes with 1 layer has no earlier exit to draft from; use no drafter"
            )
        if self._heads is not None:
            self._heads.check(decoder)

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Runs the first layers one token at a time; the last pass only brings the last token to the exit."""
        head = None if self._heads is None else self._heads.head(rows)
        return draft_at(rows, tokens, self.controller.plan(len(rows.ids)), exit=self.exit, head=head)[0]

    def leave(self, key: int) -> None:
        """Forgets how far it followed the row's text."""
        if self._heads is not None:
            self._heads.leave(key)

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Tells the controller what became of the draft."""
        self.controller.learn(draft, outcome)


def check_draft_exit(exit: int) -> None:
    """Raises RequestError where it is no number of layers."""
    check_whole("draft exit", exit)
    if exit < 1:
        raise RequestError(f"draft exit {exit} is not possible; use 1 or more layers")


def heads(head: str, vocabulary: int | None, ranked: Sequence[int]) -> Narrowed | Coarse | None:
    """What an exit drafts through; None is the model's own head.

    Raises:
        RequestError: no such head, a vocabulary below 1 or beside a head of 8 bits, or a ranking without a vocabulary.
    """
    if head not in HEADS:
        raise RequestError(f"unknown draft head {head!r}; use {', '.join(HEADS)}{suggest(head, HEADS)}")
    if head == "int8" and vocabulary is not None:
        raise RequestError("a draft vocabulary has a head of its own; leave it or the head of 8 bits out")
    narrow = narrowed(vocabulary, ranked)
    return Coarse() if head == "int8" else narrow


def draft_at(
    rows: Rows,
    tokens: int,
    plan: Plan,
    *,
    exit: int,
    taps: Sequence[int] = (),
    head: NarrowHead | CoarseHead | None = None,
    matched: bool = False,
) -> tuple[Draft, dict[int, Tensor]]:
    """A draft of an exit, and the states of its nodes at other depths, for which no layer runs twice.

    Passes below the exit stop at the taps there on their way. For taps above it the nodes are run on as far: that is a
    part of the verification, which then begins deeper.

    Args:
        rows: to draft for.
        tokens: at most.
        plan: how many.
        exit: E.
        taps: depths below the target's, in ascending order, other than E.
        head: to draft by; None is the model's own.
        matched: as in `draw_chain`.

    Returns:
        The draft, and states (B, K + 1, D) by tap.
    """
    decoder, states = rows.decoder, dict[int, Tensor]()
    if rows.law.largest and not any(tap < exit for tap in taps):
        count = min(tokens, plan.length)
        ends = None if plan.stop is None else Ends(plan.stop, rows=len(rows.ids), count=count)
        drafted, hidden = decoder.draft(
            rows.last,
            rows.at,
            rows.cache,
            exit,
            count,
            rows=rows.index,
            limit=rows.longest,
            ends=ends,
            head=None if head is None else head.head,
            names=None if head is None else head.names,
        )
        hidden, depth = run_on(rows, hidden, exit, taps, states)
        return Draft(drafted, hidden=hidden, depth=depth, **ended(ends, drafted)), states
    predict = decoder.logits if head is None else partial(head.logits, decoder)
    stations = [*(tap for tap in taps if tap < exit), exit]
    passed: dict[int, list[Tensor]] = {station: [] for station in stations}

    def run(token: Tensor, i: int) -> Tensor:
        hidden, first, at = decoder.embed(token), 0, rows.at + i
        for last in stations:
            hidden = decoder.run(hidden, at, rows.cache, first, last, rows=rows.index, limit=rows.longest + i)
            passed[last].append(hidden)
            first = last
        return hidden

    chain = draw_chain(rows, tokens, plan, step=lambda token, i: predict(run(token, i)), matched=matched)
    run(chain.tokens[:, -1:], chain.tokens.shape[1])
    states = {station: torch.cat(parts, 1) for station, parts in passed.items()}
    hidden, depth = run_on(rows, states.pop(exit), exit, [tap for tap in taps if tap > exit], states)
    return replace(chain, hidden=hidden, depth=depth), states


def run_on(
    rows: Rows, hidden: Tensor, depth: int, taps: Sequence[int], states: dict[int, Tensor]
) -> tuple[Tensor, int]:
    """Runs a chain's nodes (B, K + 1, D) from `depth` to the last tap, noting their states at each.

    Returns:
        The states there, and how deep that is.
    """
    nodes = hidden.shape[1]
    slots = rows.at + torch.arange(nodes, device=rows.at.device) if taps else rows.at
    for tap in taps:
        hidden = rows.decoder.run(
            hidden, slots, rows.cache, depth, tap, rows=rows.index, limit=rows.longest + nodes - 1
        )
        states[tap], depth = hidden, tap
    return hidden, depth
