"""How well every exit predicts the tokens of texts: loss, accuracy and agreement with the last layer, exit by exit.

Knows texts, windows and counts. Does not know files, nor how a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerskip.decode.scoring import ExitScore, perplexity
from layerskip.errors import RequestError, check_exit
from layerskip.llm import LLM

WINDOW = 512
"""Tokens that are read at once, at most."""


@dataclass(frozen=True)
class Point:
    """One exit's part of the curves.

    Args:
        exit: E, layers used.
        loss: mean negative log-likelihood of a token, in nats.
        accuracy: share of tokens that are the exit's likeliest.
        agreement: share of places where the exit's likeliest token is the last layer's.
        tokens: tokens predicted.
    """

    exit: int
    loss: float
    accuracy: float
    agreement: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def exit_curves(
    llm: LLM, texts: Sequence[str], *, exits: Sequence[int] | None = None, window: int = WINDOW
) -> list[Point]:
    """Predicts every token of texts from those before it in its window, at every exit in one pass.

    A window begins with BOS where the tokenizer begins texts so; else with the last token of the window before.

    Args:
        llm: the model.
        texts: read one by one.
        exits: E, each from 1 to the number of layers; None is all of them. The last layer is always among the results.
        window: tokens that are read at once; less where the context is shorter.

    Returns:
        A point for each exit, in rising order.

    Raises:
        RequestError: an exit outside the model, a window of less than two tokens, texts without two tokens.
        NumericalError: an exit's logits are not finite.
        CapacityError: the cache does not fit in memory.
    """
    layers = llm.decoder.shape.layers
    asked = sorted({*(range(1, layers + 1) if exits is None else exits), layers})
    for exit in (asked[0], asked[-1]):
        check_exit(exit, layers=layers)
    if window < 2:
        raise RequestError(f"a window of {window} tokens predicts nothing; use 2 or more")
    sums = {exit: _Sums() for exit in asked}
    for text in texts:
        for ids in windows(llm, text, length=min(window, llm.decoder.shape.context)):
            scores = llm.score_exits(ids, exits=asked)
            for score in scores:
                sums[score.exit].add(score, ids, last=scores[-1])
    if not sums[layers].tokens:
        raise RequestError("the texts have nothing to predict; give at least two tokens")
    return [sums[exit].point(exit) for exit in asked]


def windows(llm: LLM, text: str, *, length: int) -> Iterator[list[int]]:
    """The tokens of a text in windows; together they predict every token once.

    Args:
        llm: whose tokenizer is used.
        text: any text; one without tokens has no windows.
        length: tokens of a window, 2 or more.
    """
    ids = llm.encode(text)
    bos = llm.tokenizer.bos_token_id
    begins = bos is not None and ids[0] == bos
    for at in range(1, len(ids), length - 1):
        ahead = ids[0] if begins else ids[at - 1]
        yield [ahead, *ids[at : at + length - 1]]


@dataclass
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    right: int = 0
    agreed: int = 0

    def add(self, score: ExitScore, ids: Sequence[int], *, last: ExitScore) -> None:
        self.tokens += len(score.predictions)
        self.loss -= score.total
        self.right += sum(a == b for a, b in zip(score.predictions, ids[1:], strict=True))
        self.agreed += sum(a == b for a, b in zip(score.predictions, last.predictions, strict=True))

    def point(self, exit: int) -> Point:
        return Point(exit, self.loss / self.tokens, self.right / self.tokens, self.agreed / self.tokens, self.tokens)
