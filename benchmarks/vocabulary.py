"""A made-up language: words of letters, each one token, in a tokenizer that every engine reads (byte-level BPE).

A text of words parted by spaces encodes to one token per word, after BOS. Knows strings and ids, not their frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

BOS, EOS = 0, 1
FIRST_WORD = 2 + 256
"""Id of the first word: the special tokens and the bytes come before it."""
SPACE = "Ġ"
"""The space before a word, as byte-level BPE writes it."""


def words(count: int) -> list[str]:
    """Different words, the short ones first, so that a word without its last letter is a word as well, or none.

    Example:
        >>> words(28)[-3:]
        ['z', 'aa', 'ab']
    """
    return list(islice(_all_words(), count))


def _all_words() -> Iterator[str]:
    length = 1
    while True:
        yield from map("".join, product(ascii_lowercase, repeat=length))
        length += 1


def save_tokenizer(folder: Path, *, vocabulary: int) -> None:
    """Writes a tokenizer of so many tokens in Hugging Face's files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = words(vocabulary - FIRST_WORD)
    # a word joins a shorter word and a letter, so the only way to merge its letters leads to itself
    merges = [(SPACE + word[:-1], word[-1]) for word in known]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *(SPACE + word for word in known)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
