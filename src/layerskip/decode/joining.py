"""How rows come into a batch: a place in the cache, with as much of the prompt as the cache holds already, and the
rest run.

Knows prompts, the pool and prefixes; knows no drafts and no rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from layerskip.decode.logprobs import TokenLogprob, rank
from layerskip.decode.pool import Pool, common_prefix
from layerskip.decode.prefill import prefill
from layerskip.decode.randomness import new_seed
from layerskip.decode.request import Request
from layerskip.model.decoder import Decoder

WORTH_WAITING = 16
"""Tokens that a prompt about to be run must spare the next one for that one to wait for it."""

_keys = count()


@dataclass
class Row:
    """A sequence that decodes.

    Args:
        key: unique in the process.
        request: what it was asked for.
        ids: the tokens it knows.
        row: its row of the cache.
        seed: of its random numbers, below 2**63.
        limit: tokens it may know at most.
        prompt_logprobs: of its prompt, where asked for.
    """

    key: int
    request: Request
    ids: list[int]
    row: int
    seed: int
    limit: int
    prompt_logprobs: list[TokenLogprob] | None = None


def run_prompts(decoder: Decoder, pool: Pool, requests: Sequence[Request], *, depth: int, margin: int) -> list[Row]:
    """Runs every prompt but its last token; prompts that begin alike run their beginning once.

    Args:
        decoder: the model.
        pool: rows of its cache.
        requests: one per row.
        depth: layers to run.
        margin: slots that drafts need beyond a row's last token.

    Raises:
        CapacityError: the cache does not fit in memory. No row is taken then.
    """
    limits = [min(len(r.ids) + r.max_tokens, decoder.shape.context) for r in requests]
    pool.make_room(rows=len(requests), slots=max(limits) + margin)
    rows: list[Row] = []
    try:
        while len(rows) < len(requests):
            wave: list[Row] = []
            starts: list[int] = []
            for request, limit in list(zip(requests, limits, strict=True))[len(rows) :]:
                known = list(request.ids[:-1])
                earlier = wave if len(known) >= WORTH_WAITING else []
                coming = max((common_prefix(row.ids[:-1], known) for row in earlier), default=0)
                if coming >= WORTH_WAITING and coming > pool.shared(known, depth=depth):
                    break  # the next wave finds that much in the cache
                place, start = pool.claim(known, depth=depth, slots=limit + margin, reuse=not request.prompt_logprobs)
                seed = new_seed() if request.sampling.seed is None else request.sampling.seed
                wave.append(Row(next(_keys), request, list(request.ids), place, seed & (2**63 - 1), limit))
                rows.append(wave[-1])
                starts.append(start)
            _run_wave(decoder, pool, wave, starts, depth=depth)
    except BaseException:
        for row in rows:
            pool.give_back(row.row)
        raise
    return rows


def _run_wave(decoder: Decoder, pool: Pool, wave: Sequence[Row], starts: Sequence[int], *, depth: int) -> None:
    for row in wave:
        if row.request.prompt_logprobs:
            row.prompt_logprobs = []

    def each(indices: list[int], at: Tensor, hidden: Tensor) -> None:
        for b, i in enumerate(indices):
            row = wave[i]
            if row.prompt_logprobs is None:
                continue
            first = int(at[b, 0])
            following = row.ids[first + 1 : first + 1 + at.shape[1]]
            logits = decoder.logits(hidden[b, : len(following)])
            row.prompt_logprobs += rank(logits, following, row.request.logprobs or 0)

    known = [row.ids[:-1] for row in wave]
    prefill(
        decoder,
        pool.cache,
        rows=[row.row for row in wave],
        ids=known,
        starts=starts,
        depth=depth,
        each=each if any(row.request.prompt_logprobs for row in wave) else None,
    )
    for row, ids in zip(wave, known, strict=True):
        pool.hold(row.row, ids, depth=depth)
