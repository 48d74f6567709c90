"""TOPv2: utterances, and the frames they are parsed into.

Knows how a frame is written (``[IN:CREATE_ALARM Set an alarm [SL:DATE_TIME for 7 am ] ]``: an intent holds words and
slots, a slot holds words and intents, each closed by a token `` ]``), how to compare two of them, and a tokenizer in
which a frame is its utterance's own tokens with structure between them. Does not know files, batches or models.

Source: Chen et al., "Low-Resource Domain Adaptation for Compositional Task-Oriented Semantic Parsing", EMNLP 2020.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, decoders, pre_tokenizers, processors

from layerskip.errors import RequestError
from layerskip.train.data.examples import Example, Pair
from layerskip.train.data.tokenizers import WordVocabulary, as_fast, byte_level_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, PARSE = "<s>", "</s>", "<pad>", "<parse>"

_OPENING = re.compile(r"\[(IN|SL):([A-Z][A-Z_]*)")
_INSIDE = {"IN": "SL", "SL": "IN"}  # what may open inside what


@dataclass(frozen=True)
class Tree:
    """A frame or a part of it.

    Args:
        label: with its kind, such as ``IN:CREATE_ALARM`` or ``SL:DATE_TIME``.
        children: words and parts, in order.
    """

    label: str
    children: tuple[Tree | str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"[{self.label}", *map(str, self.children), "]"))


def parse_tree(text: str) -> Tree:
    """Reads a frame.

    Args:
        text: a frame; any white space separates its tokens.

    Returns:
        Its root, an intent; `str` of it is the frame with single spaces.

    Raises:
        RequestError: the brackets do not balance, a label is not one, or there is not exactly one root intent.

    Example:
        >>> parse_tree("[IN:GET_WEATHER weather [SL:DATE_TIME today ] ]").children
        ('weather', Tree(label='SL:DATE_TIME', children=('today',)))
    """
    open_parts: list[tuple[str, list[Tree | str]]] = []
    root: Tree | None = None
    for place, token in enumerate(text.split(), start=1):
        if root is not None:
            raise RequestError(f"token {place}, {token!r}, comes after the frame has ended; a frame is one intent")
        if token == "]":
            if not open_parts:
                raise RequestError(f"token {place} closes a bracket that nothing opened; a frame begins with [IN:")
            label, children = open_parts.pop()
            part = Tree(label, tuple(children))
            if open_parts:
                open_parts[-1][1].append(part)
            else:
                root = part
        elif token.startswith("["):
            _check_opening(token, place=place, inside=open_parts[-1][0] if open_parts else None)
            open_parts.append((token[1:], []))
        elif open_parts:
            open_parts[-1][1].append(token)
        else:
            raise RequestError(f"token {place}, {token!r}, is outside of any bracket; a frame begins with [IN:")
    if root is None:
        if open_parts:
            raise RequestError(f"{len(open_parts)} bracket(s) are never closed, the last one [{open_parts[-1][0]}")
        raise RequestError("there is no frame in an empty text; a frame begins with [IN:")
    return root


def well_formed(text: str) -> bool:
    """Whether `parse_tree` can read the text."""
    try:
        parse_tree(text)
    except RequestError:
        return False
    return True


def template(text: str) -> str:
    """The frame without its words: which intents and slots there are, and how they are nested.

    Args:
        text: a frame.

    Raises:
        RequestError: it is not well formed.

    Example:
        >>> template("[IN:GET_WEATHER weather [SL:DATE_TIME today ] ]")
        '[IN:GET_WEATHER [SL:DATE_TIME ] ]'
    """
    return str(_without_words(parse_tree(text)))


def exact_match(given: str, wanted: str) -> bool:
    """Whether two frames are the same text, white space aside: the measure of the TOPv2 papers."""
    return given.split() == wanted.split()


def _check_opening(token: str, *, place: int, inside: str | None) -> None:
    match = _OPENING.fullmatch(token)
    if match is None:
        raise RequestError(f"token {place}, {token!r}, opens neither an intent, [IN:NAME, nor a slot, [SL:NAME")
    allowed = "IN" if inside is None else _INSIDE[inside[:2]]
    if match[1] != allowed:
        where = "at the root" if inside is None else f"inside {inside}"
        raise RequestError(f"token {place}, {token!r}, stands {where}, where only [{allowed}: may open")


def _without_words(tree: Tree) -> Tree:
    return Tree(tree.label, tuple(_without_words(child) for child in tree.children if isinstance(child, Tree)))


# How the annotators of TOPv2 cut an utterance into the words of its frame, read off the train split: "4pm" is "4 pm",
# "tonight." is "tonight .", "today's" is "today 's", "9:30" is "9 : 30", and "don't", "a.m", "4.30pm", "10,000" stay.
_CUTS = "|".join(
    (
        r"\[(?:IN|SL):[A-Z_]+",  # an opening stays whole
        r"(?<![.;]\d)(?<![.;]\d\d)(?<=\d)(?=[aApP][mM](?!\p{L}))",  # 4|pm
        r"(?<=\p{L})['’][sS](?!\w)",  # today|'s
        r"(?<=\d)['’]",  # 6|'|oclock
        r"(?<!\S)['’](?![sS](?!\S))|['’](?!\S)",  # quotation marks around words
        r"\.+(?!\S)|\.(?=[?!,;:]+(?!\S))",  # the last full stop of a word
        r"(?<!\d),|,(?!\d\d\d)",
        r"(?<=\S);(?!\S)",
        r"[?!:\-/&\"()$#%>“”@\[\]]",
    )
)
# A text that ends with a closing bracket is a frame: it is cut where the spaces are and nowhere else.
_NOT_IN_A_FRAME = r"(?![\s\S]*\s\]\s*\z)"


def topv2_tokenizer(examples: Iterable[Example], *, vocab_size: int = 3072) -> PreTrainedTokenizerFast:
    """Trains the tokenizer of a parser: byte-level BPE inside words, one token for each opening and for ``]``.

    A word gets the same tokens in the utterance as in the frame: an utterance is cut into words as the frames of
    TOPv2 are, and every word, the first one too, carries its space in front. So parsing is copying tokens and putting
    structure between them. Frames with single spaces decode to themselves, whatever words are in them.

    ``tokenizer("set an alarm")`` is BOS, the utterance, `<parse>`: what a parser continues. ``tokenizer(utterance,
    frame)`` is a whole row for training, EOS included. It saves as an ordinary tokenizer folder.

    Args:
        examples: utterances as prompts, frames as responses.
        vocab_size: tokens at most; few examples may give fewer.

    Raises:
        RequestError: an example is not a pair; the vocabulary is too small for the bytes and the openings.
    """
    utterances: list[str] = []
    openings: set[str] = set()
    for example in _pairs(examples):
        utterances.append(example.prompt)
        openings.update(token for token in example.response.split() if _OPENING.fullmatch(token))
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"(?:{_CUTS}){_NOT_IN_A_FRAME}"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    vocabulary = byte_level_vocabulary(
        utterances,
        vocabulary=WordVocabulary(
            size=vocab_size,
            special=(BOS, EOS, PAD, PARSE),
            whole=tuple(f" {word}" for word in (*sorted(openings), "]")),
        ),
        words=words,
    )
    vocabulary.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {PARSE}",
        pair=f"{BOS} $A {PARSE} $B:0 {EOS}:0",
        special_tokens=[(token, vocabulary.token_to_id(token)) for token in (BOS, PARSE, EOS)],
    )
    # To the left, so that a batch of utterances can be continued.
    return as_fast(vocabulary, bos=BOS, eos=EOS, pad=PAD, padding_side="left", extra=(PARSE,))


@dataclass(frozen=True)
class Lengths:
    """Tokens per text: the mean, the 95th percentile and the maximum."""

    mean: float
    p95: int
    longest: int

    def __str__(self) -> str:
        return f"mean {self.mean:.1f}, p95 {self.p95}, max {self.longest}"


@dataclass(frozen=True)
class Statistics:
    """What a tokenizer makes of utterances and frames.

    Args:
        rows: pairs looked at.
        utterance: tokens of the utterances, with BOS and `<parse>`.
        frame: tokens of the frames, with EOS.
        used: token ids that occur.
        copied: share of rows whose frame is the utterance's tokens, in order, with structure between them.
        round_trip: share of frames that decode to themselves.
        unseen: share of the frames' words, repetitions counted, that `known` rows do not have; None without any.
    """

    rows: int
    utterance: Lengths
    frame: Lengths
    used: int
    copied: float
    round_trip: float
    unseen: float | None

    def __str__(self) -> str:
        unseen = "" if self.unseen is None else f"; {self.unseen:.2%} of their words unseen"
        return (
            f"{self.rows:,} rows; tokens per utterance: {self.utterance}; per frame: {self.frame}; "
            f"{self.used:,} token ids used; {self.copied:.2%} of the frames copy their utterance's tokens; "
            f"{self.round_trip:.2%} decode to themselves{unseen}"
        )


def topv2_statistics(
    tokenizer: PreTrainedTokenizerFast, examples: Iterable[Example], *, known: Iterable[Example] = ()
) -> Statistics:
    """Measures a tokenizer of `topv2_tokenizer` on pairs.

    Args:
        tokenizer: what to measure.
        examples: utterances with their frames.
        known: the pairs whose words count as seen, such as the train split.

    Raises:
        RequestError: there are no examples, or one is not a pair.
    """
    pairs = _pairs(examples)
    if not pairs:
        raise RequestError("there are no examples to measure the tokenizer on; give at least one pair")
    prompts = tokenizer([pair.prompt for pair in pairs])["input_ids"]
    frames = tokenizer([pair.response for pair in pairs], add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(frames, skip_special_tokens=True)
    structure = {index for token, index in tokenizer.get_vocab().items() if token[1:2] == "[" or token[1:] == "]"}
    copied = [
        prompt[1:-1] == [token for token in frame if token not in structure]
        for prompt, frame in zip(prompts, frames, strict=True)
    ]
    seen = {word for pair in _pairs(known) for word in _words(pair.response)}
    words = Counter(word for pair in pairs for word in _words(pair.response))
    return Statistics(
        rows=len(pairs),
        utterance=_lengths([len(prompt) for prompt in prompts]),
        frame=_lengths([len(frame) + 1 for frame in frames]),
        used=len({token for ids in (*prompts, *frames) for token in ids}),
        copied=float(np.mean(copied)),
        round_trip=float(np.mean([text == pair.response for text, pair in zip(decoded, pairs, strict=True)])),
        unseen=sum(count for word, count in words.items() if word not in seen) / words.total() if seen else None,
    )


def _pairs(examples: Iterable[Example]) -> list[Pair]:
    pairs = []
    for example in examples:
        if not isinstance(example, Pair):
            raise RequestError(
                f"a {type(example).__name__} has no frame; TOPv2 examples are pairs of utterance and frame"
            )
        pairs.append(example)
    return pairs


def _words(frame: str) -> list[str]:
    return [token for token in frame.split() if token != "]" and not token.startswith("[")]


def _lengths(counts: Sequence[int]) -> Lengths:
    return Lengths(float(np.mean(counts)), int(np.percentile(counts, 95)), max(counts))
