"""Drafting with the target's own first layers (LayerSkip, Elhoushi et al., ACL 2024, section 4.3).

The draft's keys, values and states after layer exit-1 are the target's own, so verification goes on from them: no
layer processes a drafted position twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerskip.decode.controller import Controller, controller_for
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.decode.drafters.chain import draw_chain
from layerskip.errors import RequestError, check_whole
from layerskip.model.decoder import Decoder


class EarlyExit:
    """Drafts through the shared norm and head after layers 0..exit-1. Exact.

    Args:
        exit: layers that draft, at least 1 and fewer than the target decodes with.
        tokens: K, the most tokens drafted in a round.
        confidence: stop a draft after the first token where the exit's largest probability is below this; None never
            stops.

    Raises:
        RequestError: exit or tokens below 1, confidence outside (0, 1].
    """

    name = "early-exit"

    def __init__(self, exit: int, *, tokens: int = 4, confidence: float | None = None) -> None:
        check_whole("draft exit", exit)
        if exit < 1:
            raise RequestError(f"draft exit {exit} is not possible; use 1 or more layers")
        self.exit, self.confidence = exit, confidence
        self.controller: Controller = controller_for(tokens, confidence=confidence)

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

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Runs the first layers one token at a time; the last pass only brings the last token to the exit."""
        decoder, states = rows.decoder, []

        def run(token: Tensor, i: int) -> Tensor:
            states.append(
                decoder.run(
                    decoder.embed(token),
                    rows.at + i,
                    rows.cache,
                    0,
                    self.exit,
                    rows=rows.index,
                    limit=rows.longest + i,
                )
            )
            return states[-1]

        chain = draw_chain(rows, tokens, self.controller, step=lambda token, i: decoder.logits(run(token, i)))
        run(chain.tokens[:, -1:], chain.tokens.shape[1])
        return Draft(
            chain.tokens,
            proposals=chain.proposals,
            lengths=chain.lengths,
            hidden=torch.cat(states, 1),
            depth=self.exit,
        )

    def leave(self, key: int) -> None:
        """It keeps nothing of a row."""

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Tells the controller how much was kept."""
        for length, accepted in zip(draft.counts(), outcome.accepted, strict=True):
            self.controller.update(length, accepted)
