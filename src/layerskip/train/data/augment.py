"""More frames from the frames there are: with the words of other frames in their slots, or with made-up words.

`recombined` is data recombination (Jia and Liang, "Data Recombination for Neural Semantic Parsing", ACL 2016) for the
slots of TOPv2. `renamed` is for words that have not been seen: one that occurs once is learnt by heart, so a model from
scratch has no occasion to learn what an unknown word may be from what stands around it. Knows no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from layerskip.errors import RequestError
from layerskip.frames import frame_words, is_opening, word_slots
from layerskip.train.data.examples import Example, Pair

Kind = tuple[str, str]  # the intent a slot stands in, and the slot
_EXCHANGED = 0.5  # chance that a slot's words are exchanged
_HALF = 10  # a word that occurs n times is renamed with the chance _HALF / (_HALF + n)
_RARE = 3  # made-up words are made of those that occur at most this often
_LOWER = 0.2  # chance that all of a renamed frame is in lower case: names are written so by many


def recombined(examples: Iterable[Example], *, share: float, seed: int = 0) -> list[Pair]:
    """Makes further pairs of utterance and frame, with other frames' words in their slots.

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
    frames = _frames(examples, share=share)
    values: dict[Kind, dict[str, None]] = {}
    for frame in frames:
        for kind, begin, end in word_slots(frame):
            values.setdefault(kind, {})[" ".join(frame[begin:end])] = None
    choices = {kind: list(found) for kind, found in values.items()}
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
    return [
        _pair(made) for frame in _several(frames, share, draws) if (made := _exchanged(frame, choices, draws)) != frame
    ]


def renamed(examples: Iterable[Example], *, share: float, seed: int = 0) -> list[Pair]:
    """Makes further pairs of utterance and frame, with made-up words in the place of rare ones.

    A word that occurs n times is renamed with the chance 10 / (10 + n), wherever it stands in a frame; words with other
    signs than letters stay. A made-up word is the beginning of one rare word and the end of another, capitalised as the
    word in whose place it comes. One frame in five is put into lower case. The utterance is the frame's words.

    Args:
        examples: pairs of utterance and frame, the frame with all of the utterance's words.
        share: further pairs for each given one, on average; those in which nothing changed are left out.
        seed: another one makes others.

    Raises:
        RequestError: the share is negative, or an example is not a pair.

    Example:
        >>> names = ("Nathaniel", "Gabriella", "Mischa", "Ahoskie")
        >>> pairs = [Pair(f"1 2 {name}", f"[IN:CREATE_CALL 1 2 [SL:CONTACT {name} ] ]") for name in names]
        >>> [made.prompt for made in renamed(pairs, share=1)]
        ['1 2 Miscathaniel', '1 2 mishaniel', '1 2 Ahosella']
    """
    frames = _frames(examples, share=share)
    counts = Counter(word for frame in frames for word in frame_words(frame) if word.isalpha())
    rare = [word for word, count in counts.items() if count <= _RARE and len(word) > 2]
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 2))))
    if not rare:
        return []
    return [
        _pair(made)
        for frame in _several(frames, share, draws)
        if (made := _with_names(frame, counts, rare, draws)) != frame
    ]


def _frames(examples: Iterable[Example], *, share: float) -> list[list[str]]:
    if share < 0:
        raise RequestError(f"share {share} of further pairs is not possible; use 0 or more")
    frames = []
    for example in examples:
        if not isinstance(example, Pair):
            raise RequestError(f"a {type(example).__name__} has no frame; only pairs of utterance and frame have one")
        frames.append(example.response.split())
    return frames


def _several(frames: Sequence[list[str]], share: float, draws: np.random.Generator) -> Iterator[list[str]]:
    for frame in frames:
        for _ in range(int(share) + (draws.random() < share % 1)):
            yield frame


def _pair(frame: Sequence[str]) -> Pair:
    return Pair(" ".join(frame_words(frame)), " ".join(frame))


def _exchanged(frame: Sequence[str], choices: dict[Kind, list[str]], draws: np.random.Generator) -> list[str]:
    """The frame with other words in some slots."""
    parts: list[str] = []
    done = 0
    for kind, begin, end in sorted(word_slots(frame), key=lambda slot: slot[1]):
        parts += frame[done:begin]
        exchange = draws.random() < _EXCHANGED
        parts += choices[kind][int(draws.integers(len(choices[kind])))].split() if exchange else frame[begin:end]
        done = end
    return [*parts, *frame[done:]]


def _with_names(
    frame: Sequence[str], counts: Counter[str], rare: Sequence[str], draws: np.random.Generator
) -> list[str]:
    """The frame with made-up words for some of its own, the same one wherever a word stands."""
    lower = draws.random() < _LOWER
    names: dict[str, str] = {}
    for word in dict.fromkeys(frame_words(frame)):
        rename = word.isalpha() and draws.random() < _HALF / (_HALF + counts[word])
        name = _made_up(word, rare, draws) if rename else word
        names[word] = name.lower() if lower else name
    return [part if is_opening(part) else names.get(part, part) for part in frame]


def _made_up(word: str, rare: Sequence[str], draws: np.random.Generator) -> str:
    first, last = (rare[int(draws.integers(len(rare)))] for _ in range(2))
    name = first[: int(draws.integers(2, len(first)))] + last[int(draws.integers(1, len(last) - 1)) :]
    return name.capitalize() if word[0].isupper() else name.lower()
