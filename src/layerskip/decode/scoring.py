"""How well an exit predicts what is known: a text at every exit in one pass, or many continuations side by side.

Token ids in, numbers out. Sizes: T tokens, D width, V vocabulary, n states read together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decode.numerics import diagnose
from layerskip.decode.prefill import CHUNK, prefill
from layerskip.errors import RequestError, check_exit, check_ids
from layerskip.model.decoder import Decoder


@dataclass(frozen=True)
class ExitScore:
    """What one exit makes of a text, or of a continuation.

    Args:
        exit: layers used.
        logprobs: natural log-probability of every token given those before it: of a text all but the first, of a
            continuation all.
        predictions: the exit's likeliest token in each of these places.
    """

    exit: int
    logprobs: list[float]
    predictions: list[int]

    @property
    def total(self) -> float:
        """Log-likelihood of the text, in nats."""
        return math.fsum(self.logprobs)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return -self.total / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def agreement(self, other: ExitScore) -> float:
        """Share of places in which both exits predict the same token."""
        same = sum(a == b for a, b in zip(self.predictions, other.predictions, strict=True))
        return same / len(self.predictions)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that has no number."""
    return math.exp(loss) if not loss > 700 else math.inf


@torch.inference_mode()
def score(decoder: Decoder, ids: Sequence[int], *, exits: Sequence[int]) -> list[ExitScore]:
    """Scores `ids` at every one of `exits`.

    Raises:
        RequestError: fewer than two tokens, more than the context, an id outside the vocabulary, or an exit outside
            the model.
        NumericalError: an exit's logits are not finite; says where that begins.
        CapacityError: no memory for the cache of this text.
    """
    context = decoder.shape.context
    for exit in exits:
        check_exit(exit, layers=decoder.shape.layers)
    if not 2 <= len(ids) <= context:
        raise RequestError(f"the text has {len(ids)} tokens; to be scored it needs 2..{context}")
    check_ids(ids, vocab=decoder.shape.vocab)
    cache = decoder.cache(rows=1, slots=len(ids))
    tokens = torch.tensor([list(ids)], device=decoder.device)
    logprobs: dict[int, list[float]] = {exit: [] for exit in exits}
    predictions: dict[int, list[int]] = {exit: [] for exit in exits}
    for start in range(0, len(ids) - 1, CHUNK):
        end = min(start + CHUNK, len(ids) - 1)
        at = torch.arange(start, end, device=decoder.device)[None]
        hidden, depth = decoder.embed(tokens[:, start:end]), 0
        following = tokens[0, start + 1 : end + 1]
        for exit in sorted(set(exits)):
            hidden = decoder.run(hidden, at, cache, depth, exit, limit=end)
            depth = exit
            found, likeliest = _read(decoder, hidden[0], following)
            if any(map(math.isnan, found)):
                raise diagnose(decoder, ids, depth=exit)
            logprobs[exit] += found
            predictions[exit] += likeliest
    return [ExitScore(exit, logprobs[exit], predictions[exit]) for exit in exits]


Pair = tuple[Sequence[int], Sequence[int]]
"""A context and what continues it, as token ids; neither is empty."""


def score_continuations(decoder: Decoder, pairs: Sequence[Pair], *, exit: int, rows: int) -> list[ExitScore]:
    """Scores every continuation after its context, `rows` of them side by side.

    A context that several continuations share is run once for those that share a batch; the head is applied to
    continuations only.

    Args:
        decoder: the model.
        pairs: contexts and continuations; the last token is predicted and not run, so both together may have one
            token more than the model's context.
        exit: layers used.
        rows: continuations side by side at most.

    Returns:
        A score of the continuation alone for each pair, in order.

    Raises:
        RequestError: an exit outside the model, an empty context or continuation, an id outside the vocabulary, or a
            pair that is too long.
        NumericalError: the logits are not finite; says where that begins.
        CapacityError: no memory for the cache of so many rows.
    """
    check_exit(exit, layers=decoder.shape.layers)
    most = decoder.shape.context + 1
    for context, continuation in pairs:
        if not context or not continuation:
            raise RequestError("a context and its continuation need one token each at least; give both")
        if len(context) + len(continuation) > most:
            raise RequestError(
                f"a context of {len(context)} tokens and its continuation of {len(continuation)} do not fit: "
                f"together they may have {most}; leave out the beginning of the context"
            )
        check_ids((*context, *continuation), vocab=decoder.shape.vocab)
    # longest first, equal contexts side by side
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), tuple(pairs[i][0]), -len(pairs[i][1])))
    found: dict[int, ExitScore] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        found |= zip(batch, _score_batch(decoder, [pairs[i] for i in batch], exit=exit), strict=True)
    return [found[i] for i in range(len(pairs))]


@torch.inference_mode()
def _score_batch(decoder: Decoder, pairs: Sequence[Pair], *, exit: int) -> list[ExitScore]:
    ids = [[*context, *continuation[:-1]] for context, continuation in pairs]
    cache = decoder.cache(rows=len(pairs), slots=max(map(len, ids)))
    scores = [ExitScore(exit, [], []) for _ in pairs]

    def read(sequences: list[int], at: Tensor, hidden: Tensor) -> None:
        # hidden (B, T, D) begins, in each row, with the state that predicts the next token not yet scored
        left = [pairs[i][1][len(scores[i].logprobs) :][: hidden.shape[1]] for i in sequences]
        states = torch.cat([hidden[row, : len(tokens)] for row, tokens in enumerate(left)])  # (n, D)
        following = torch.tensor([token for tokens in left for token in tokens], device=decoder.device)
        logprobs, predictions = _read(decoder, states, following)
        for i, tokens in zip(sequences, left, strict=True):
            scores[i].logprobs.extend(logprobs[: len(tokens)])
            scores[i].predictions.extend(predictions[: len(tokens)])
            del logprobs[: len(tokens)], predictions[: len(tokens)]

    first: dict[tuple[int, ...], int] = {}  # the row that runs a context
    for row, (context, _) in enumerate(pairs):
        first.setdefault(tuple(context), row)
    heads = [context[:-1] for context in first]
    prefill(decoder, cache, rows=list(first.values()), ids=heads, starts=[0] * len(heads), depth=exit)
    for row, (context, _) in enumerate(pairs):
        if (source := first[tuple(context)]) != row:
            cache.copy_prefix(source, row, length=len(context) - 1)
    starts = [len(context) - 1 for context, _ in pairs]
    prefill(decoder, cache, rows=range(len(pairs)), ids=ids, starts=starts, depth=exit, each=read)
    for known, score_ in zip(ids, scores, strict=True):
        if any(map(math.isnan, score_.logprobs)):
            raise diagnose(decoder, known, depth=exit)
    return scores


def _read(decoder: Decoder, states: Tensor, following: Tensor) -> tuple[list[float], list[int]]:
    """Log-probabilities of tokens `following` (n,) at `states` (n, D), and the likeliest tokens there.

    A log-probability is nan where the logits of its state are not finite.
    """
    logprobs: list[float] = []
    predictions: list[int] = []
    for hidden, tokens in zip(states.split(CHUNK), following.split(CHUNK), strict=True):  # bounds the memory of (n, V)
        logits = decoder.logits(hidden)
        table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logprobs += table.gather(-1, tokens[:, None])[:, 0].tolist()
        predictions += table.argmax(-1).tolist()
    return logprobs, predictions
