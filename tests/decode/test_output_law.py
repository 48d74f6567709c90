"""The second law: sampled text has exactly the target's law, end to end.

A random model over six words generates three tokens, thousands of times; the joint law of the three is known from
transformers' logits and processors on every prefix. Every drafter must leave it alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from layerskip.decode.batch import Batch
from layerskip.decode.drafters import Assistant, EarlyExit, Lookup
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Sampling

V, LENGTH = 6, 3
PROMPT = [1]  # short, so that joining costs little
ROWS, TIMES = 128, 64  # samples of a case: 8192
SEEDS = (1, 20_000_000, 2**61)
# what is drawn and may be turned down runs with every seed; what is matched is plain decoding's text, seed by seed
CASES = [(name, seed) for name in ("early exit", "confident exit", "assistant") for seed in SEEDS]
CASES += [(name, SEEDS[0]) for name in ("none", "lookup", "tree")]

SETTINGS = {
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.4},
}


@torch.no_grad()
def next_law(model: Any, ids: Sequence[int], settings: dict[str, float]) -> Tensor:
    """What transformers draws the next token from; it has no frequency penalty, which is taken off here."""
    known = torch.tensor([list(ids)])
    scores = model(known).logits[:, -1].float()
    if "repetition_penalty" in settings:
        scores = theirs.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(known, scores)
    scores = scores - settings.get("frequency_penalty", 0.0) * known[0].bincount(minlength=V)
    scores = theirs.TemperatureLogitsWarper(settings["temperature"])(known, scores)
    if "top_p" in settings:
        scores = theirs.TopPLogitsWarper(settings["top_p"])(known, scores)
    return scores[0].softmax(-1)


def joint_law(model: Any, settings: dict[str, float]) -> Tensor:
    """The law of the next three tokens, (V, V, V)."""
    law = torch.ones(1)
    for length in range(LENGTH):
        prefixes = torch.cartesian_prod(*[torch.arange(V)] * length).reshape(-1, length).tolist() if length else [[]]
        following = [next_law(model, PROMPT + prefix, settings) for prefix in prefixes]
        law = (law.reshape(-1, 1) * torch.stack(following)).flatten()
    return law.reshape(V, V, V)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any]) -> Any:
    return tiny("llama", vocab_size=V, num_hidden_layers=3, seed=2)


@pytest.fixture(scope="module")
def make(tiny: Callable[..., Any], decoder_of: Callable[[Any], Any], tree: Any) -> dict[str, Callable[[], Any]]:
    assistant = decoder_of(tiny("llama", vocab_size=V, num_hidden_layers=1, seed=2))
    return {
        "none": lambda: None,
        "early exit": lambda: EarlyExit(2, tokens=2),
        "confident exit": lambda: EarlyExit(1, tokens=3, confidence=0.5),
        "lookup": lambda: Lookup(tokens=2, ngram=1, predicted=[3, 4, 4, 0]),
        "assistant": lambda: Assistant(assistant, tokens=2),
        "tree": lambda: tree([1, 5, 4, 1, 3, 3, 0, 1], vocab=V, tokens=7, parents=(0, 0, 2, 2, 1, 4, 4), drifting=0),
    }


@pytest.fixture(scope="module", params=SETTINGS)
def expected(request: pytest.FixtureRequest, model: Any) -> tuple[dict[str, float], Tensor]:
    settings = SETTINGS[request.param]
    return settings, joint_law(model, settings)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_joint_law_of_the_text_is_the_targets(
    model: Any,
    make: dict[str, Callable[[], Any]],
    expected: tuple[dict[str, float], Tensor],
    decoder_of: Callable[[Any], Any],
    follows: Callable[..., bool],
    name: str,
    seed: int,
) -> None:
    settings, law = expected
    decoder, drafter = decoder_of(model), make[name]()
    counts, drafted, accepted = torch.zeros(V, V, V), 0, 0
    for time in range(TIMES):
        batch = Batch(decoder, Pool(decoder.cache(rows=ROWS, slots=16)), drafter=drafter)
        samplings = [Sampling(**settings, seed=seed + time * ROWS + row) for row in range(ROWS)]
        keys = batch.join([Request(PROMPT, LENGTH, sampling=sampling) for sampling in samplings])
        texts: dict[int, list[int]] = {key: [] for key in keys}
        while len(batch):
            for done in batch.round():
                texts[done.key] += done.tokens
                drafted, accepted = drafted + len(done.drafted), accepted + done.accepted
        index = torch.tensor(list(texts.values())).T
        counts.index_put_(tuple(index), torch.ones(ROWS), accumulate=True)
    assert follows(counts, law)
    if name != "none":
        assert 0.05 * drafted < accepted < 0.95 * drafted
