"""Drafting with a second, smaller model of the same tokenizer (Leviathan et al., 2023).

It keeps a cache of its own, which lags the text by what was accepted beyond its last pass and is caught up before it
drafts.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from layerskip.decode.controllers import Controller, controller_for
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.decode.drafters.chain import draw_chain
from layerskip.decode.pool import Pool, common_prefix
from layerskip.decode.prefill import prefill, row_index
from layerskip.errors import RequestError
from layerskip.model.decoder import Decoder


class Assistant:
    """Drafts with another decoder. Exact.

    Token ids must mean the same to both models: `LLM.assistant` compares the tokenizers. Vocabularies may be padded
    to different sizes.

    Args:
        decoder: the model that drafts.
        tokens: K, the most tokens drafted in a round; None is 4, or 16 where `length` is not fixed.
        confidence: stop a draft after the first token where its largest probability is below this; None never stops.
        length: "fixed", or a rule that finds the length while decoding: "thompson" or "gain" (see `controllers`).

    Raises:
        RequestError: tokens below 1, confidence outside (0, 1], no such rule, or a threshold beside one.
    """

    name = "assistant"

    def __init__(
        self,
        decoder: Decoder,
        *,
        tokens: int | None = None,
        confidence: float | None = None,
        length: str = "fixed",
    ) -> None:
        self.decoder, self.confidence, self.length = decoder, confidence, length
        self.controller: Controller = controller_for(tokens, confidence=confidence, length=length)
        self._pool = Pool(decoder.cache(rows=1, slots=64))
        self._lock = threading.Lock()  # one assistant may draft for several batches
        self._rows: dict[int, int] = {}  # key of a row of the batch -> row of our cache

    @property
    def tokens(self) -> int:
        """The most tokens drafted in a round."""
        return self.controller.tokens

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Raises RequestError where the target is on another device."""
        if decoder.device != self.decoder.device:
            raise RequestError(
                f"the assistant is on {self.decoder.device}, the model on {decoder.device}; use one device"
            )

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """Catches its cache up with every row, then runs one token at a time."""
        with self._lock:
            return self._propose(rows, tokens)

    def leave(self, key: int) -> None:
        """Gives the row's place in its cache back."""
        with self._lock:
            if key in self._rows:
                self._pool.give_back(self._rows.pop(key))

    def _propose(self, rows: Rows, tokens: int) -> Draft:
        index = self._catch_up(rows, tokens)

        def step(token: Tensor, i: int) -> Tensor:
            known = token.clamp(max=self.decoder.shape.vocab - 1)  # ids that only the target's padding has
            hidden = self.decoder.run(
                self.decoder.embed(known), rows.at + i, self._pool.cache, rows=index, limit=rows.longest + i
            )
            return resize(self.decoder.logits(hidden), rows.decoder.shape.vocab)

        chain = draw_chain(rows, tokens, self.controller.plan(len(rows.ids)), step=step)
        for key, ids, tail in zip(rows.keys, rows.ids, chain.tokens[:, :-1].tolist(), strict=True):
            self._pool.hold(self._rows[key], ids + tail, depth=self.decoder.shape.layers)
        return chain

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Tells the controller what became of the draft."""
        self.controller.learn(draft, outcome)

    def _catch_up(self, rows: Rows, count: int) -> slice | Tensor:
        """Makes every row's tokens but the last valid in our cache; returns our rows."""
        depth = self.decoder.shape.layers
        starts = []
        for key, ids in zip(rows.keys, rows.ids, strict=True):
            known, slots = ids[:-1], len(ids) + count
            if key in self._rows:
                starts.append(common_prefix(self._pool.rows[self._rows[key]].ids, known))
                self._pool.make_room(rows=0, slots=slots)
            else:
                self._rows[key], start = self._pool.claim(known, depth=depth, slots=slots)
                starts.append(start)
        ours = [self._rows[key] for key in rows.keys]
        top = self.decoder.shape.vocab - 1
        texts = [ids[:-1] for ids in rows.ids]
        if rows.decoder.shape.vocab > top + 1:  # ids that only the target's padding has
            texts = [[min(token, top) for token in ids] for ids in texts]
        prefill(self.decoder, self._pool.cache, rows=ours, ids=texts, starts=starts, depth=depth)
        for row, ids in zip(ours, rows.ids, strict=True):
            self._pool.hold(row, ids[:-1], depth=depth)
        return row_index(ours, self.decoder.device)


def resize(logits: Tensor, vocab: int) -> Tensor:
    """Cuts or fills the last dimension to `vocab`: padded vocabularies differ in ids that no text has."""
    if logits.shape[-1] >= vocab:
        return logits[..., :vocab]
    return F.pad(logits, (0, vocab - logits.shape[-1]), value=-torch.inf)
