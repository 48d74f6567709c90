"""How well each exit drafts for the whole model, and what that should gain.

The model continues its prompts plainly, once. Self-speculation shares cache and weights, so along that text a draft is
right where the exit guesses the text, up to its first wrong token: from the guesses at every place, the rounds of
every exit, every K and every threshold follow by counting.

Knows exits, drafts and counts; predicts from the number of weights. Does not know clocks: what a draft gains on a
machine is measured there, against plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.controllers import controller_for
from layerskip.decode.drafters import EarlyExit
from layerskip.decode.guesses import Guesses, guess
from layerskip.errors import RequestError
from layerskip.llm import LLM
from layerskip.llm.prompts import Prompt
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


@dataclass(frozen=True)
class Continuation:
    """What the model generated greedily for a prompt, and what every exit would have drafted there.

    Args:
        most: tokens that it may generate at most.
        guesses: by exit, along what it generated.
    """

    most: int
    guesses: Mapping[int, Guesses]


def continuations(
    llm: LLM,
    prompts: Sequence[Prompt],
    *,
    exits: Sequence[int],
    max_tokens: int,
    stop: Sequence[str] = (),
    beyond: int = 0,
) -> list[Continuation]:
    """Continues prompts greedily, and looks at every exit along the way.

    Args:
        llm: the model.
        prompts: what it continues.
        exits: E, each from 1 to one less than its layers.
        max_tokens: tokens of each continuation at most.
        stop: strings that end a continuation.
        beyond: how many tokens to follow a draft past its first wrong one; rounds with a confidence need K - 1.

    Raises:
        RequestError: an exit outside the model, a prompt that does not fit it.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are not finite.
    """
    for exit in exits:
        EarlyExit(exit).check(llm.decoder, exit=llm.decoder.shape.layers)
    completions = llm.generate(llm.encode_all(prompts), max_tokens=max_tokens, stop=stop)
    assert isinstance(completions, list)
    found = []
    for completion in completions:
        guesses = guess(llm.decoder, completion.prompt, completion.tokens, exits=exits, beyond=beyond)
        most = min(max_tokens, llm.decoder.shape.context - len(completion.prompt))
        found.append(Continuation(most, {each.exit: each for each in guesses}))
    return found


def rounds(
    guesses: Guesses, *, most: int, tokens: int, confidence: float | None = None
) -> Iterator[tuple[int, int, int]]:
    """The rounds in which `EarlyExit(guesses.exit, tokens=tokens, confidence=confidence)` decodes this text greedily.

    Args:
        guesses: of the exit along the text.
        most: tokens that the text might have had; a round leaves the last of them to the verification.
        tokens: K.
        confidence: a draft ends after the first token that its exit is less sure of; None never ends it.

    Returns:
        For every round, the tokens drafted, accepted and emitted.

    Example:
        Six tokens, the fourth guessed wrong, the last one being the end of the text.

        >>> text = Guesses(1, [True, True, True, False, True, True], [0.9, 0.9, 0.4, 0.8, 0.9, 0.9, 0.5],
        ...                {3: [0.9, 0.2, 0.9], 6: [0.5, 0.5, 0.5]})
        >>> list(rounds(text, most=9, tokens=4)), list(rounds(text, most=6, tokens=2))
        ([(4, 3, 4), (4, 2, 2)], [(2, 2, 3), (2, 0, 1), (1, 1, 2)])
        >>> list(rounds(text, most=9, tokens=4, confidence=0.5))
        [(3, 3, 4), (4, 2, 2)]
    """
    at, length = 0, len(guesses.right)
    while at < length:
        count = min(tokens, most - at - 1)
        end = min(at + count, length)
        wrong = next((place for place in range(at, end) if not guesses.right[place]), end)
        if confidence is not None:
            sure = [*guesses.sure[at : wrong + 1], *guesses.beyond.get(wrong, ())][:count]
            assert len(sure) == count, "follow drafts for K - 1 tokens past their first wrong one"
            count = next((i + 1 for i, each in enumerate(sure) if each < confidence), count)
        accepted = min(count, wrong - at)
        emitted = min(accepted + 1, length - at)
        yield count, accepted, emitted
        at += emitted


def count(texts: Iterable[Continuation], *, exit: int, tokens: int, confidence: float | None = None) -> Acceptance:
    """The counts of drafting these texts with `EarlyExit(exit, tokens=tokens, confidence=confidence)`, greedily.

    They are those of decoding, each text by itself or side by side: exactly in float64, in narrower types up to
    rounding.
    """
    counts = Acceptance()
    for text in texts:
        for drafted, accepted, emitted in rounds(
            text.guesses[exit], most=text.most, tokens=tokens, confidence=confidence
        ):
            counts.add(drafted=drafted, accepted=accepted, emitted=emitted)
    return counts


def measure(
    llm: LLM, prompts: Sequence[str], *, exits: Iterable[int], draft_tokens: Iterable[int], max_tokens: int
) -> list[Measurement]:
    """How the model's own greedy continuations of prompts would be drafted, at every exit with every number of tokens.

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
    depths, lengths = list(exits), list(draft_tokens)
    for tokens in lengths:
        controller_for(tokens, confidence=None)
    if not depths or not lengths:
        raise RequestError("nothing to measure; give at least one exit and one number of draft tokens")
    texts = continuations(llm, prompts, exits=depths, max_tokens=max_tokens)
    found = []
    for exit in depths:
        for tokens in lengths:
            counts = count(texts, exit=exit, tokens=tokens)
            found.append(Measurement(exit, tokens, counts, predict(counts, llm.decoder.shape, exit=exit)))
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
        >>> _speedup(counts, cost=0.5), _speedup(counts, cost=0.6)
        (1.0, 0.8823529411764706)
    """
    return _speedup(counts, cost=share(shape, exit=exit))


def share(shape: Shape, *, exit: int) -> float:
    """The weights that a drafted token reads, as a share of those of a plain step: e (1 - h) + h, as in `predict`."""
    parts = shape.parameters()
    head = shape.vocab * shape.width  # a tied head is read as well
    head_share = head / (parts["attention"] + parts["mlp"] + parts["norms"] + head)
    return exit / shape.layers * (1 - head_share) + head_share


def _speedup(counts: Acceptance, *, cost: float) -> float:
    return counts.emitted / (counts.rounds + counts.drafted * cost)
