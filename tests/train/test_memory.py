"""The memory of a training step: all exits cost hardly more than the last one, since no two hold logits at once."""

from collections.abc import Callable, Mapping
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layerskip.train.exits import EarlyExits
from layerskip.train.loss import Teachers

LAYERS, TOKENS, VOCABULARY = 6, 1024, 8192
LOGITS = 4 * TOKENS * VOCABULARY  # bytes of one exit's, 32 MiB; all activations of the layers are about as much
LAST, ALL = {LAYERS: 1.0}, dict.fromkeys(range(1, LAYERS + 1), 1 / LAYERS)


def peak(step: Callable[[], None]) -> int:
    """The most bytes that were held at a time beside what was there before: what the allocator gave and took back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    assert len(events) > 1000
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.fixture(scope="module")
def bytes_of() -> Callable[..., int]:
    """The peak of a forward and a backward pass with these exits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    ).train()
    ids = torch.randint(0, VOCABULARY, (TOKENS // 512, 512))

    def measure(weights: Mapping[int, float], *, chunk: int | None, **teachers: float) -> int:
        model.zero_grad(set_to_none=True)
        with EarlyExits(model, chunk=chunk, teachers=Teachers(**teachers)) as exits:
            exits.begin(weights)
            return peak(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())

    return measure


def test_what_is_measured_sees_logits(bytes_of: Callable[..., int]) -> None:
    assert bytes_of(LAST, chunk=None) > bytes_of(LAST, chunk=256) + LOGITS


def test_all_exits_take_hardly_more_than_the_last_one(bytes_of: Callable[..., int]) -> None:
    assert bytes_of(ALL, chunk=256) < 1.15 * bytes_of(LAST, chunk=256)


def test_distillation_takes_a_few_chunks_more(bytes_of: Callable[..., int]) -> None:
    chunk = LOGITS * 256 // TOKENS  # both distributions and what their divergence is made of
    assert bytes_of(ALL, chunk=256, distillation=0.5) < 1.15 * bytes_of(LAST, chunk=256) + 4 * chunk


def test_without_chunks_all_exits_hold_the_logits_of_one(bytes_of: Callable[..., int]) -> None:
    assert bytes_of(ALL, chunk=None) < 1.15 * bytes_of(LAST, chunk=None)
