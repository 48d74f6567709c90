"""The loop over rows whose tokens come out column by column, as criteria and streamers of transformers expect them.

Knows rows, processors in transformers' coordinates and ends; leaves drafting and acceptance to `Batch`.
Sizes: B rows, P tokens of the padded prompt, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from layerskip.decode.batch import Batch
from layerskip.decode.draft import Drafter
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Sampling
from layerskip.errors import LayerSkipError, RequestError
from layerskip.model.decoder import Decoder


def for_row(processor: Any, row: int, *, rows: int) -> Any:
    """A processor that treats one row alone as the given one treats it within the batch."""
    own = copy.copy(processor)
    if isinstance(processor, theirs.RepetitionPenaltyLogitsProcessor):
        if isinstance(processor.prompt_ignore_length, Tensor):
            own.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
        return own
    if isinstance(processor, theirs.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
        return own
    # the samples of a prompt lie side by side
    if isinstance(processor, theirs.EncoderRepetitionPenaltyLogitsProcessor):
        prompt = row * len(processor.encoder_input_ids) // rows
        own.encoder_input_ids = processor.encoder_input_ids[prompt : prompt + 1]
        return own
    if isinstance(processor, theirs.EncoderNoRepeatNGramLogitsProcessor):
        own.generated_ngrams = [processor.generated_ngrams[row * processor.batch_size // rows]]
        own.batch_size = 1
        return own
    return processor


@dataclass(frozen=True)
class Ends:
    """Where rows end.

    Args:
        most: new tokens at most.
        eos: ids that end a row.
        pad: what fills a row that has ended while others go on. None: all go on until the last has ended, as in
            transformers where no criterion is about end of sequence.
    """

    most: int
    eos: tuple[int, ...]
    pad: int | None


def ends(criteria: Sequence[Any], config: GenerationConfig, *, length: int, vocab: int) -> Ends:
    """What the criteria say of prompts of `length` padded tokens; ids outside the vocabulary never come."""
    limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    eos = [id for c in criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist() if 0 <= id < vocab]
    pad = None
    if any(hasattr(c, "eos_token_id") for c in criteria):  # the condition of transformers
        if config._pad_token_tensor is None:
            raise RequestError("rows that end need a token to fill them; set pad_token_id")
        pad = int(config._pad_token_tensor)
    return Ends(max(min(limits, default=config.max_length or 0) - length, 1), tuple(eos), pad)


@dataclass(frozen=True)
class _Said:
    """What the model said after a prefix, (1, V) float32 each: raw, and as the processors left it."""

    logits: Tensor
    scores: Tensor


class Row:
    """A row: its tokens, and transformers' processors in transformers' coordinates.

    Args:
        padded: (P,) the padded prompt.
        prompt: the same without padding, as the decoder sees it.
        processors: for this row alone.
        ends: where it ends.
        keep: keep what the model said before each token.
    """

    def __init__(
        self, *, padded: Tensor, prompt: list[int], processors: LogitsProcessorList, ends: Ends, keep: bool
    ) -> None:
        self.padded, self.prompt, self.processors, self.ends, self.keep = padded, prompt, processors, ends, keep
        self.tokens: list[int] = []
        self.said: list[_Said] = []
        self.error: LayerSkipError | None = None  # why no more tokens come
        # in this round: drafted prefix -> what was said after it, last by the target; None where no text goes on
        self._after: dict[tuple[int, ...], _Said | None] = {}

    def process(self, ids: Tensor, logits: Tensor) -> Tensor:
        """A processor for `Sampling`: ids (n,) without padding, logits (V,) -> scores (V,)."""
        start = len(self.prompt)
        drafted = tuple(ids[start + len(self.tokens) :].tolist())
        if self._dead(drafted):
            self._after[drafted] = None
            return logits
        # out of inference mode, so that processors may keep what they compute
        with torch.inference_mode(False), torch.no_grad():
            known = torch.cat((self.padded, ids[start:].to(self.padded.device)))[None]
            raw = logits.to(device=self.padded.device, dtype=torch.float32, copy=True)[None]
            said = raw.clone() if self.keep else raw  # a processor may work in place
            scores = self.processors(known, raw)  # type: ignore[arg-type]  # they ask for LongTensor
        self._after[drafted] = _Said(said, scores)
        return scores[0].to(device=logits.device, dtype=logits.dtype)

    def _dead(self, drafted: tuple[int, ...]) -> bool:
        """Whether no text goes on after a drafted prefix: a draft may copy what is forbidden, or run past an end.

        transformers never shows a processor such a prefix, and one that follows a grammar may raise on it.
        """
        if not drafted:
            return False
        if drafted[-1] in self.ends.eos or len(self.tokens) + len(drafted) >= self.ends.most:
            return True
        before = self._after.get(drafted[:-1])
        if before is None:
            return drafted[:-1] in self._after
        return bool(before.scores[0, drafted[-1]].isneginf())

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes what a round emitted."""
        if self.keep:
            for i in range(len(tokens)):
                said = self._after[tuple(tokens[:i])]
                assert said is not None, "text goes on after a prefix that was emitted"
                self.said.append(said)
        self.tokens += tokens
        self._after.clear()


def batch(decoder: Decoder, prompts: Sequence[Sequence[int]], drafter: Drafter | None, *, most: int) -> Batch:
    """An empty batch that the prompts may join, each with `most` new tokens."""
    slots = max(map(len, prompts)) + most
    own = copy.copy(decoder)  # the same weights; a table of positions of its own, so that threads do not share one
    rope = decoder.shape.rope
    if rope.kind == "dynamic" and slots > rope.original_context:
        raise RequestError(
            f"prompt and new tokens may come to {slots}, and past {rope.original_context} dynamic rope depends on how "
            "transformers cuts a text into calls; ask for fewer new tokens"
        )
    if slots > decoder.shape.context:
        own.shape = replace(decoder.shape, context=slots + 1)  # transformers goes on past the context, with a warning
    return Batch(own, Pool(own.cache(rows=1, slots=1)), drafter=drafter)  # the cache grows as rows join


def requests(rows: Sequence[Row], *, sample: bool, dtype: torch.dtype) -> list[Request]:
    """What the batch is asked for; seeds come from torch's default generator, and only where something is drawn."""
    seeds = torch.randint(2**63 - 1, (len(rows),)).tolist() if sample else [0] * len(rows)
    requests = []
    for row, seed in zip(rows, seeds, strict=True):
        # transformers chooses by scores in float32
        needed = row.processors or row.keep or dtype == torch.float64
        sampling = Sampling(temperature=float(sample), seed=seed, processors=(row.process,) if needed else ())
        requests.append(Request(row.prompt, max_tokens=row.ends.most, eos=row.ends.eos, sampling=sampling))
    return requests


@dataclass
class Columns:
    """The rows' tokens, released column by column as transformers emits them.

    Args:
        batch: decodes the rows, each at its own pace.
        rows: what they emit.
        ends: where they end.
        criteria: see every column, and may end rows too.
        streamer: gets every column.
        scores: () collects the processed scores of every column, None does not.
        logits: the same for raw logits.
    """

    batch: Batch
    rows: Sequence[Row]
    ends: Ends
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    _decoding: dict[int, int] = field(default_factory=dict)  # key in the batch -> row

    def run(self, sequences: Tensor, requests: Sequence[Request]) -> Tensor:
        """Continues padded prompts (B, P) until every row has ended; returns (B, n)."""
        try:
            self._decoding = {key: b for b, key in enumerate(self.batch.join(requests))}
            return self._columns(sequences)
        finally:
            self.batch.close()  # rows that a criterion ended, or an error: drafters keep something for each

    def _columns(self, sequences: Tensor) -> Tensor:
        unfinished = torch.ones(len(self.rows), dtype=torch.bool, device=sequences.device)
        for column in count():
            running = [self.ends.pad is None or on for on in unfinished.tolist()]
            self._decode(column, running)
            self._collect(column, running)
            tokens = [row.tokens[column] if on else self.ends.pad for row, on in zip(self.rows, running, strict=True)]
            emitted = torch.tensor(tokens, device=sequences.device)
            sequences = torch.cat((sequences, emitted[:, None]), 1)
            unfinished = unfinished & ~self.criteria(sequences, self.scores)
            if self.streamer is not None:
                self.streamer.put(emitted.cpu())
            if not bool(unfinished.any()):
                break
        if self.streamer is not None:
            self.streamer.end()
        return sequences

    def _decode(self, column: int, running: Sequence[bool]) -> None:
        """Runs rounds until every running row has a token for this column; rows that ended leave."""
        for key, b in list(self._decoding.items()):
            if not running[b]:
                self.batch.leave(key)
                del self._decoding[key]
        while short := [row for row, on in zip(self.rows, running, strict=True) if on and len(row.tokens) <= column]:
            for row in short:
                if row.error is not None:
                    raise row.error
            assert self._decoding, "a criterion ends every row that the batch has ended"
            for done in self.batch.round():
                row = self.rows[self._decoding[done.key]]
                row.extend(done.tokens)
                row.error = done.error
                if done.finish:
                    del self._decoding[done.key]

    def _collect(self, column: int, running: Sequence[bool]) -> None:
        """Adds a column (B, V) of scores and logits; zeros for rows that have ended."""
        if self.scores is None and self.logits is None:
            return
        said = [row.said[column] if on else None for row, on in zip(self.rows, running, strict=True)]
        none = torch.zeros_like(next(s for s in said if s is not None).logits)
        if self.scores is not None:
            self.scores += (torch.cat([none if s is None else s.scores for s in said]),)
        if self.logits is not None:
            self.logits += (torch.cat([none if s is None else s.logits for s in said]),)
