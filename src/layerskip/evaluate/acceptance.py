"""How well each exit drafts for the whole model, and what that should gain.

Knows exits, drafts and counts; predicts from the number of weights. Does not know clocks: what a draft gains on a
machine is measured there, against plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.drafters import EarlyExit
from layerskip.errors import RequestError
from layerskip.llm import LLM
from layerskip.model.shape import Shape


@dataclass(frozen=True)
class Measurement:
    """One exit, drafting so many tokens a round.

    Args:
        exit: E, layers that draft.
        draft_tokens: K.
        counts: over all rounds of all prompts.
        predicted_speedup: over plain decoding, from `predict`.
    """

    exit: int
    draft_tokens: int
    counts: Acceptance
    predicted_speedup: float

    @property
    def rate(self) -> float:
        """accepted / drafted."""
        return self.counts.rate

    @property
    def tokens_per_round(self) -> float:
        """1 + accepted / rounds, whatever the end of a text cut off."""
        return self.counts.length

    @property
    def emitted_per_round(self) -> float:
        """Tokens that became output, by round."""
        return self.counts.emitted / self.counts.rounds

    @property
    def by_position(self) -> list[float]:
        """The acceptance rate at each position of the draft."""
        pairs = zip(self.counts.accepted_at, self.counts.drafted_at, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "exit": self.exit,
            "draft_tokens": self.draft_tokens,
            "rounds": self.counts.rounds,
            "drafted": self.counts.drafted,
            "accepted": self.counts.accepted,
            "emitted": self.counts.emitted,
            "rate": self.rate,
            "tokens_per_round": self.tokens_per_round,
            "emitted_per_round": self.emitted_per_round,
            "rate_by_position": self.by_position,
            "predicted_speedup": self.predicted_speedup,
        }


def measure(
    llm: LLM, prompts: Sequence[str], *, exits: Iterable[int], draft_tokens: Iterable[int], max_tokens: int
) -> list[Measurement]:
    """Drafts the model's own greedy continuations of prompts, at every exit with every number of tokens.

    Args:
        llm: the model.
        prompts: what it continues.
        exits: E, each from 1 to one less than its layers.
        draft_tokens: K, each 1 or more.
        max_tokens: tokens of each continuation at most.

    Returns:
        A measurement for each exit and each K, in that order.

    Raises:
        RequestError: nothing to measure, an exit outside the model, a prompt that does not fit it.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
    """
    shape = llm.decoder.shape
    lengths = list(draft_tokens)
    drafters = [EarlyExit(exit, tokens=tokens) for exit in exits for tokens in lengths]
    if not drafters:
        raise RequestError("nothing to measure; give at least one exit and one number of draft tokens")
    for drafter in drafters:
        drafter.check(llm.decoder, exit=shape.layers)
    ids = llm.encode_all(prompts)
    found = []
    for drafter in drafters:
        counts = Acceptance()
        completions = llm.generate(ids, draft=drafter, max_tokens=max_tokens)
        assert isinstance(completions, list)
        for completion in completions:
            counts.merge(completion.acceptance)
        found.append(Measurement(drafter.exit, drafter.tokens, counts, predict(counts, shape, exit=drafter.exit)))
    return found


def best(measurements: Iterable[Measurement]) -> Measurement | None:
    """The measurement of the highest predicted speedup, the first of equals; None where plain decoding is as fast."""
    faster = [each for each in measurements if each.predicted_speedup > 1]
    return max(faster, key=lambda each: each.predicted_speedup, default=None)


def predict(counts: Acceptance, shape: Shape, *, exit: int) -> float:
    """The speedup over plain decoding where every pass costs what reading its weights costs, whatever its rows.

    A drafted token costs c = e (1 - h) + h of a plain step, with e = E / L its share of the layers and h the head's
    share of the weights that a step reads (layers, norms, head). A round costs a plain step and its drafts: the early
    layers of its last token and the late layers of all its tokens make one whole pass. So

        speedup = emitted / (rounds + c drafted),

    which is N / (1 + K c) where every round emits N tokens and drafts K: the walltime improvement of Leviathan et al.,
    "Fast Inference from Transformers via Speculative Decoding", ICML 2023, theorem 3.8, with N as counted rather than
    from a mean acceptance. Emitted tokens count, so the ends of short texts are paid for.

    Args:
        counts: of the drafter; at least one round.
        shape: of the model.
        exit: E.

    Example:
        Half of the layers, a head that weighs nothing, two of four tokens kept in each round: 3 / (1 + 4 x 0.5).

        >>> from layerskip.evaluate.acceptance import _speedup
        >>> counts = Acceptance(rounds=10, drafted=40, accepted=20, emitted=30)
        >>> _speedup(counts, depth=0.5, head=0.0), _speedup(counts, depth=0.5, head=0.2)
        (1.0, 0.8823529411764706)
    """
    parts = shape.parameters()
    head = shape.vocab * shape.width  # a tied head is read as well
    head_share = head / (parts["attention"] + parts["mlp"] + parts["norms"] + head)
    return _speedup(counts, depth=exit / shape.layers, head=head_share)


def _speedup(counts: Acceptance, *, depth: float, head: float) -> float:
    return counts.emitted / (counts.rounds + counts.drafted * (depth * (1 - head) + head))
