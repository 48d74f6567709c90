"""Tokenizers made from scratch: byte-level BPE over any text.

Knows the `tokenizers` library and how its result becomes an ordinary Hugging Face tokenizer. Does not know where texts
come from; what is special about TOPv2 is in `topv2`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from layerskip.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    whole_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which writes any text and reads it back unchanged.

    The same texts give the same tokenizer. BOS goes in front of every text; EOS is left to who ends one.

    Args:
        texts: what to learn from.
        vocab_size: tokens at most; short texts may give fewer.
        special_tokens: BOS, EOS and PAD in this order, then any others; decoding skips them when asked to.
        whole_tokens: strings that are one token wherever they occur, and are ordinary text when decoded.

    Raises:
        RequestError: there are fewer than three special tokens, a token is empty or given twice, or the vocabulary is
            too small for the 256 bytes and these tokens.
    """
    if len(special_tokens) < 3:
        raise RequestError(f"special_tokens {tuple(special_tokens)} are too few; give BOS, EOS and PAD in this order")
    bos, eos, pad, *extra = special_tokens
    _check_tokens((*special_tokens, *whole_tokens))
    tokenizer = byte_level_vocabulary(
        texts,
        vocabulary=WordVocabulary(size=vocab_size, special=tuple(special_tokens), added=tuple(whole_tokens)),
        words=pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:0", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return as_fast(tokenizer, bos=bos, eos=eos, pad=pad, extra=tuple(extra))


@dataclass(frozen=True, kw_only=True)
class WordVocabulary:
    """What a vocabulary is made of, besides the 256 bytes and what is merged from them.

    Args:
        size: tokens at most.
        special: special tokens; they get the ids from 0.
        whole: words, as the pre-tokenizer cuts them, that are one token each; a leading space is part of the word.
        added: strings that are one token wherever they occur, also inside words.
    """

    size: int
    special: tuple[str, ...]
    whole: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def byte_level_vocabulary(
    texts: Iterable[str], *, vocabulary: WordVocabulary, words: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    """Trains the merges inside words; the caller sets a decoder and a post-processor.

    Args:
        texts: what to learn from.
        vocabulary: its size, and the tokens that are not learnt.
        words: cuts a text into words and writes their bytes as letters (ends with `ByteLevel`).

    Raises:
        RequestError: the size leaves no room for the 256 bytes and the given tokens.
    """
    given = len(vocabulary.special) + len(vocabulary.whole) + len(vocabulary.added)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary.size < len(alphabet) + given:
        raise RequestError(
            f"vocab_size {vocabulary.size} is too small for {len(alphabet)} bytes and {given} given tokens; "
            f"use {len(alphabet) + given} or more"
        )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    special = [AddedToken(token, special=True, normalized=False) for token in vocabulary.special]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size - len(vocabulary.whole) - len(vocabulary.added),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(_without(texts, vocabulary.added), trainer)
    learnt = json.loads(learner.to_str())["model"]
    ids: dict[str, int] = learnt["vocab"]
    for word in vocabulary.whole:
        ids.setdefault(_spelled(word), len(ids))
    # A word that is in the vocabulary is that token, though no merges lead to it.
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=[(left, right) for left, right in learnt["merges"]], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = words
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.added])
    return tokenizer


def as_fast(
    tokenizer: Tokenizer,
    *,
    bos: str,
    eos: str,
    pad: str,
    extra: Sequence[str] = (),
    padding_side: Literal["left", "right"] = "right",
) -> PreTrainedTokenizerFast:
    """Makes it a tokenizer of transformers, which loads with AutoTokenizer and returns no token_type_ids.

    Args:
        tokenizer: with its decoder and post-processor.
        bos: begins a text.
        eos: ends one.
        pad: fills batches.
        extra: other special tokens.
        padding_side: where batches are filled.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=list(extra),
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _check_tokens(tokens: Sequence[str]) -> None:
    if "" in tokens:
        raise RequestError("a token cannot be the empty string; leave it out")
    if twice := sorted({token for token in tokens if list(tokens).count(token) > 1}):
        raise RequestError(f"token {twice[0]!r} is given twice; each special or whole token has one place")


def _without(texts: Iterable[str], cut: Sequence[str]) -> Iterable[str]:
    """The texts in pieces between the given strings, which are not to be learnt from."""
    for text in texts:
        pieces = [text]
        for token in cut:
            pieces = [part for piece in pieces for part in piece.split(token)]
        yield from pieces


def _spelled(word: str) -> str:
    """The word in the letters that byte-level BPE writes bytes as."""
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(part for part, _ in bytes_as_letters.pre_tokenize_str(word))
