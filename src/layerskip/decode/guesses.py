"""What every exit would draft along a known text, without drafting it.

One pass over the text, with the right tokens before every place, tells what each exit would guess there. A draft from
an early exit shares the target's cache and is right up to its first wrong token, so up to there it is made of these
guesses and no others. What a draft would say after its wrong token is run apart, all places of a text side by side.

Token ids in, numbers out; knows no rounds. Sizes: T tokens, W places, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip.decode.numerics import diagnose
from layerskip.decode.prefill import CHUNK, prefill
from layerskip.errors import RequestError, check_exit, check_ids
from layerskip.model.cache import Cache
from layerskip.model.decoder import Decoder

BRANCHES = 64
"""Wrong places whose drafts are followed side by side: bounds the memory of their slots and masks."""


@dataclass(frozen=True)
class Guesses:
    """One exit along the generated part of a text, n tokens.

    Args:
        exit: layers that guess.
        right: n; whether its likeliest token is the text's.
        sure: n + 1; the probability of its likeliest token there, and after the end of the text.
        beyond: for every wrong place, and for the end n: the probabilities of the tokens that a draft would go on with
            after the guess made there. Empty where that was not asked for.
    """

    exit: int
    right: list[bool]
    sure: list[float]
    beyond: dict[int, list[float]]

    @property
    def agreement(self) -> float:
        """Share of the tokens that it guesses."""
        return sum(self.right) / len(self.right)


@torch.inference_mode()
def guess(
    decoder: Decoder, prompt: Sequence[int], text: Sequence[int], *, exits: Sequence[int], beyond: int = 0
) -> list[Guesses]:
    """What every one of `exits` would draft along `text` after `prompt`.

    Numbers are those of a wide pass: in float64 those of drafting, in narrower types up to rounding.

    Args:
        decoder: the model.
        prompt: the tokens before the text, at least one.
        text: the n tokens to guess, at least one.
        exits: E, each 1 up to all layers.
        beyond: tokens that drafts are followed by after a wrong guess.

    Raises:
        RequestError: no prompt, no text, an id outside the vocabulary, or an exit outside the model.
        NumericalError: an exit's logits are not finite.
        CapacityError: no memory for the cache of this text.
    """
    layers, ids = decoder.shape.layers, [*prompt, *text]
    for exit in exits:
        check_exit(exit, layers=layers)
    if not prompt or not text:
        raise RequestError("guesses need a prompt and a text after it; give at least one token of each")
    check_ids(ids, vocab=decoder.shape.vocab)
    cache = decoder.cache(rows=1, slots=len(ids) + min(BRANCHES, len(text) + 1) * beyond)
    first = len(prompt) - 1  # the guess at a place is made at the token before it
    prefill(decoder, cache, rows=[0], ids=[ids[:first]], starts=[0], depth=max(exits))
    likeliest, sure = _along(decoder, cache, ids, first=first, exits=sorted(set(exits)))
    found = []
    for exit in exits:
        right = [a == b for a, b in zip(likeliest[exit], text, strict=False)]
        wrong = [place for place, ok in enumerate([*right, False]) if not ok]
        more: dict[int, list[float]] = {}
        for start in range(0, len(wrong) if beyond else 0, BRANCHES):
            places = wrong[start : start + BRANCHES]
            tokens = [likeliest[exit][place] for place in places]
            at = [len(prompt) + place for place in places]
            more |= zip(
                places, _beyond(decoder, cache, tokens, at, exit=exit, steps=beyond, length=len(ids)), strict=True
            )
        found.append(Guesses(exit, right, sure[exit], more))
    return found


def _along(
    decoder: Decoder, cache: Cache, ids: Sequence[int], *, first: int, exits: Sequence[int]
) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """By exit, the likeliest token after each of ids[first:] and its probability."""
    tokens = torch.tensor([list(ids)], device=decoder.device)
    likeliest: dict[int, list[int]] = {exit: [] for exit in exits}
    sure: dict[int, list[float]] = {exit: [] for exit in exits}
    for start in range(first, len(ids), CHUNK):
        end = min(start + CHUNK, len(ids))
        at = torch.arange(start, end, device=decoder.device)[None]
        hidden, depth = decoder.embed(tokens[:, start:end]), 0
        for exit in exits:
            hidden, depth = decoder.run(hidden, at, cache, depth, exit, limit=end), exit
            best = _best(decoder, hidden)
            if bool(best[1].isnan().any()):
                raise diagnose(decoder, ids, depth=exit)
            likeliest[exit] += best[0].tolist()
            sure[exit] += best[1].tolist()
    return likeliest, sure


def _beyond(
    decoder: Decoder, cache: Cache, tokens: Sequence[int], at: Sequence[int], *, exit: int, steps: int, length: int
) -> list[list[float]]:
    """For each of W tokens at positions `at`, the probabilities of the `steps` tokens that an exit drafts after it.

    The W drafts are branches of one row: each sees the text before its place and what it has drafted itself. Step s
    writes its W tokens into the slots from length + s W on, past the text of `length` tokens.
    """
    device, width = decoder.device, len(tokens)
    token, place = torch.tensor([list(tokens)], device=device), torch.tensor([list(at)], device=device)
    text = torch.arange(length, device=device) < place[0, :, None]  # (W, length)
    own = torch.eye(width, dtype=torch.bool, device=device)
    columns = []
    for step in range(steps):
        mask = torch.cat((text, own.repeat(1, step + 1)), 1)[None]
        slots = length + step * width + torch.arange(width, device=device)[None]
        hidden = decoder.run(decoder.embed(token), place + step, cache, 0, exit, slots=slots, mask=mask)
        token, sure = _best(decoder, hidden)
        token = token[None]
        columns.append(sure)
    rows: list[list[float]] = torch.stack(columns, 1).tolist()
    return rows


def _best(decoder: Decoder, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token (T,) after each state (1, T, D), and its probability (T,)."""
    logits = decoder.logits(hidden)[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # in float32, as a draft's controller sees it
    return logits.argmax(-1), logits.float().softmax(-1).amax(-1)
