"""Texts in the made-up language: prompts drawn from its law, and how far generated ones follow it.

Knows ranks and token ids. Does not know how a text was generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.vocabulary import FIRST_WORD, words
from benchmarks.weights import Size, by_rank
from benchmarks.zipf import expected_distinct, expected_share, law
from layerskip.errors import RequestError

DISTINCT_FLOOR = 0.5
"""Of the different tokens that independent draws would give: a text with fewer goes in circles."""


def prompts(size: Size, *, count: int, tokens: int, seed: int) -> list[str]:
    """Texts of so many words, BOS not counted, drawn from the law of the language."""
    ranked = by_rank(size, seed=seed)[: size.vocabulary - FIRST_WORD]
    known = words(size.vocabulary - FIRST_WORD)
    frequencies = law(size.vocabulary)[: len(ranked)]
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.multinomial(frequencies, count * tokens, replacement=True, generator=generator)
    ids = (ranked[drawn] - FIRST_WORD).view(count, tokens).tolist()
    return [" ".join(known[i] for i in line) for line in ids]


def described(texts: Sequence[Sequence[int]], size: Size, *, seed: int) -> dict[str, float]:
    """What generated texts are like beside independent draws from the law.

    Args:
        texts: token ids, the same number in each.
        size: of the model.
        seed: of its weights.

    Returns:
        distinct: different tokens by text, as a share of its tokens.
        least_distinct, mean_distinct: different tokens beside those of independent draws, of the worst text and on
            average.
        frequent, frequent_by_law: the share of the most frequent hundredth of the vocabulary.
        common, common_by_law: of its most frequent quarter.
    """
    probabilities = law(size.vocabulary)
    rank = torch.argsort(by_rank(size, seed=seed))
    found = rank[torch.tensor(texts)]  # (texts, tokens)
    expected = expected_distinct(probabilities, draws=found.shape[1])
    distinct = [len(set(text)) for text in found.tolist()]
    hundredth, quarter = max(1, size.vocabulary // 100), size.vocabulary // 4
    return {
        "distinct": sum(distinct) / found.numel(),
        "least_distinct": min(distinct) / expected,
        "mean_distinct": sum(distinct) / len(distinct) / expected,
        "frequent": float((found < hundredth).float().mean()),
        "frequent_by_law": expected_share(probabilities, ranks=hundredth),
        "common": float((found < quarter).float().mean()),
        "common_by_law": expected_share(probabilities, ranks=quarter),
    }


def check_text(text: Mapping[str, float]) -> None:
    """Raises RequestError where one of the texts goes in circles."""
    if text["least_distinct"] < DISTINCT_FLOOR:
        raise RequestError(
            f"a text has only {text['least_distinct']:.0%} of the different tokens that independent draws would have: "
            "it goes in circles; choose another seed"
        )
