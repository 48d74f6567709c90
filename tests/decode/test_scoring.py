"""Continuations are scored as whole texts are, whatever shares their batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerskip.decode import scoring
from layerskip.decode.scoring import score, score_continuations
from layerskip.errors import NumericalError, RequestError

CONTEXTS = ([1, 2, 3, 4, 5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7], [40, 41, 42], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3])
FOLLOWING = ([8, 9], [3, 1, 4, 1, 5, 9, 2, 6], [10], [5], [8, 9, 11], [4, 5, 6, 7, 8])
PAIRS = list(zip(CONTEXTS, FOLLOWING, strict=True))


@pytest.fixture
def decoder(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], architecture: str) -> Any:
    return decoder_of(tiny(architecture, double=True))


@pytest.mark.parametrize("exit", [2, 4])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_continuation_is_scored_as_the_end_of_its_text(decoder: Any, exit: int, rows: int) -> None:
    found = score_continuations(decoder, PAIRS, exit=exit, rows=rows)
    for (context, continuation), got in zip(PAIRS, found, strict=True):
        [whole] = score(decoder, [*context, *continuation], exits=[exit])
        assert got.exit == exit
        assert got.logprobs == pytest.approx(whole.logprobs[len(context) - 1 :], abs=1e-9)
        assert got.predictions == whole.predictions[len(context) - 1 :]


def test_long_continuations_are_read_in_pieces(
    tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny("llama", double=True))
    whole = score_continuations(decoder, PAIRS, exit=3, rows=6)
    monkeypatch.setattr(scoring, "CHUNK", 2)
    monkeypatch.setattr("layerskip.decode.prefill.CHUNK", 3)
    for one, other in zip(score_continuations(decoder, PAIRS, exit=3, rows=6), whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
        assert one.predictions == other.predictions


def test_a_shared_context_is_run_once(
    tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny("llama", double=True))
    ran: list[int] = []
    run = decoder.run
    monkeypatch.setattr(
        decoder, "run", lambda hidden, *a, **k: ran.append(hidden.shape[:2].numel()) or run(hidden, *a, **k)
    )
    score_continuations(decoder, [([1] * 50, [token]) for token in range(4)], exit=4, rows=4)
    assert sum(ran) == 49 + 4  # the context but its last token, and that in four rows


def test_the_last_token_is_not_run(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any]) -> None:
    decoder = decoder_of(tiny("llama"))
    context = decoder.shape.context
    [got] = score_continuations(decoder, [([1] * context, [2])], exit=4, rows=1)
    assert len(got.logprobs) == 1
    with pytest.raises(RequestError, match=f"a context of {context} tokens and its continuation of 2 do not fit"):
        score_continuations(decoder, [([1] * context, [2, 3])], exit=4, rows=1)


@pytest.mark.parametrize(
    ("pair", "exit", "message"),
    [
        (([], [1]), 4, "need one token each"),
        (([1], []), 4, "need one token each"),
        (([1], [2]), 5, r"exit 5 is not inside this 4-layer model; use 1\.\.4"),
        (([1], [2]), 0, "exit 0 is not inside"),
        (([1], [999999]), 4, "token 999999 is outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored(
    tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], pair: Any, exit: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        score_continuations(decoder_of(tiny("llama")), [pair], exit=exit, rows=1)


def test_nan_is_named(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any]) -> None:
    decoder = decoder_of(tiny("llama"))
    decoder.layers[2].gate_up.up.weight.data[:] = torch.nan
    assert score_continuations(decoder, PAIRS, exit=2, rows=4)
    with pytest.raises(NumericalError, match=r"from layer 2 \(of 0\.\.3\) on"):
        score_continuations(decoder, PAIRS, exit=4, rows=4)
