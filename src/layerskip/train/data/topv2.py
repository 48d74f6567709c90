"""TOPv2: utterances, and the frames they are parsed into.

Knows a tokenizer in which a frame is its utterance's own tokens with structure between them; how a frame is written
is in `layerskip.frames`. Does not know files, batches or models.

Source: Chen et al., "Low-Resource Domain Adaptation for Compositional Task-Oriented Semantic Parsing", EMNLP 2020.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, decoders, pre_tokenizers, processors

from layerskip.errors import RequestError
from layerskip.frames import frame_words, is_opening
from layerskip.train.data.examples import Example, Pair
from layerskip.train.data.tokenizers import WordVocabulary, as_fast, byte_level_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, PARSE = "<s>", "</s>", "<pad>", "<parse>"

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
        openings.update(token for token in example.response.split() if is_opening(token))
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
    parser = as_fast(vocabulary, bos=BOS, eos=EOS, pad=PAD, padding_side="left", extra=(PARSE,))
    # A conversation with a parser is its last utterance.
    parser.chat_template = (
        f"{{{{ bos_token }}}}{{{{ messages[-1]['content'] }}}}{{% if add_generation_prompt %}}{PARSE}{{% endif %}}"
    )
    return parser


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
    seen = {word for pair in _pairs(known) for word in frame_words(pair.response.split())}
    words = Counter(word for pair in pairs for word in frame_words(pair.response.split()))
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


def _lengths(counts: Sequence[int]) -> Lengths:
    return Lengths(float(np.mean(counts)), int(np.percentile(counts, 95)), max(counts))
