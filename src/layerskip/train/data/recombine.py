"""More frames from the frames there are: the words of a slot exchanged for those that the same slot has elsewhere.

Data recombination (Jia and Liang, "Data Recombination for Neural Semantic Parsing", ACL 2016) for TOPv2's slots. Knows
no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from layerskip.errors import RequestError
from layerskip.frames import frame_words, word_slots
from layerskip.train.data.examples import Example, Pair

Kind = tuple[str, str]  # the intent a slot stands in, and the slot
_EXCHANGED = 0.5  # chance that a slot's words are exchanged


def recombined(examples: Iterable[Example], *, share: float, seed: int = 0) -> list[Pair]:
    """Makes further pairs of utterance and frame.

    A slot that holds words only gets, half of the time, words that this slot of this intent has in another frame; every
    value is as likely as another, however often it occurs. The utterance is the frame's words.

    Args:
        examples: pairs of utterance and frame, the frame with all of the utterance's words.
        share: further pairs for each given one, on average; those in which nothing was exchanged are left out.
        seed: another one makes others.

    Raises:
        RequestError: the share is negative, or an example is not a pair.

    Example:
        >>> pairs = [Pair("wake me at 7", "[IN:CREATE_ALARM wake me [SL:DATE_TIME at 7 ] ]"),
        ...          Pair("alarm for noon", "[IN:CREATE_ALARM alarm [SL:DATE_TIME for noon ] ]")]
        >>> sorted({made.prompt for made in recombined(pairs, share=40)})
        ['alarm at 7', 'wake me for noon']
    """
    if share < 0:
        raise RequestError(f"share {share} of recombined examples is not possible; use 0 or more")
    frames = []
    for example in examples:
        if not isinstance(example, Pair):
            raise RequestError(f"a {type(example).__name__} has no frame; only pairs of utterance and frame recombine")
        frames.append(example.response.split())
    values: dict[Kind, dict[str, None]] = {}
    for frame in frames:
        for kind, begin, end in word_slots(frame):
            values.setdefault(kind, {})[" ".join(frame[begin:end])] = None
    choices = {kind: list(found) for kind, found in values.items()}
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
    made = (_exchanged(frame, choices, draws) for frame in _several(frames, share, draws))
    return [Pair(" ".join(frame_words(frame)), " ".join(frame)) for frame in made if frame is not None]


def _several(frames: Sequence[list[str]], share: float, draws: np.random.Generator) -> Iterator[list[str]]:
    for frame in frames:
        for _ in range(int(share) + (draws.random() < share % 1)):
            yield frame


def _exchanged(frame: Sequence[str], choices: dict[Kind, list[str]], draws: np.random.Generator) -> list[str] | None:
    """The frame with other words in some slots; None where nothing changed."""
    parts: list[str] = []
    done = 0
    for kind, begin, end in sorted(word_slots(frame), key=lambda slot: slot[1]):
        parts += frame[done:begin]
        exchange = draws.random() < _EXCHANGED
        parts += choices[kind][int(draws.integers(len(choices[kind])))].split() if exchange else frame[begin:end]
        done = end
    parts += frame[done:]
    return parts if parts != list(frame) else None
