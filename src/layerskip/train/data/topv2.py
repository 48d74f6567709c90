"""TOPv2: utterances, and the frames they are parsed into.

Knows a tokenizer in which a frame is its utterance's own tokens with structure between them; how a frame is written
is in `layerskip.frames`. Does not know files, batches or models.

Source: Chen et al., "Low-Resource Domain Adaptation for Compositional Task-Oriented Semantic Parsing", EMNLP 2020.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, decoders, pre_tokenizers, processors

from layerskip.errors import RequestError
from layerskip.frames import is_opening
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


def _pairs(examples: Iterable[Example]) -> list[Pair]:
    pairs = []
    for example in examples:
        if not isinstance(example, Pair):
            raise RequestError(
                f"a {type(example).__name__} has no frame; TOPv2 examples are pairs of utterance and frame"
            )
        pairs.append(example)
    return pairs
