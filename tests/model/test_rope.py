"""Cosines and sines against transformers' own rotary embedding, for every way of stretching the context."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from layerskip.model.rope import Rope, cos_sin
from layerskip.model.shape import Shape

CONTEXT, WIDTH, HEADS = 64, 64, 4

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3 shorter": {**LLAMA3, "original_max_position_embeddings": 24, "rope_theta": 500000.0},
    "llama3 other": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.5, "factor": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn long": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "yarn betas": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 4, "beta_slow": 2.0},
    "yarn untruncated": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    "yarn attention": {"rope_type": "yarn", "factor": 3.0, "attention_factor": 0.75},
    "yarn mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn by ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "yarn same bounds": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 12.0, "beta_slow": 12.0},
}
DYNAMIC: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic 1.1": {"rope_type": "dynamic", "factor": 1.1, "rope_theta": 50000.0},
    "dynamic, original ignored": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8},
}


def both(settings: dict[str, Any]) -> tuple[Rope, LlamaRotaryEmbedding]:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(settings)))
    config = {**sizes, "model_type": "llama", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return Shape.from_config({**config, "rope_parameters": settings}).rope, theirs


@pytest.mark.parametrize("name", ROPES)
def test_static_kinds_equal_transformers(name: str) -> None:
    rope, theirs = both(ROPES[name])
    positions = torch.tensor([0, 1, 2, 15, 16, 17, 63, 64, 100, 1000, 30000, 131071])
    cos, sin = cos_sin(rope, WIDTH // HEADS, positions)
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[None])
    assert cos.shape == (len(positions), WIDTH // HEADS)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, expected_cos[0])
    assert torch.equal(sin, expected_sin[0])


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_equals_transformers_one_token_a_step(name: str) -> None:
    rope, theirs = both(DYNAMIC[name])
    positions = torch.arange(3 * CONTEXT)
    cos, sin = cos_sin(rope, WIDTH // HEADS, positions)
    for p in positions:
        expected_cos, expected_sin = theirs(torch.zeros(1), p[None, None])
        torch.testing.assert_close(cos[p], expected_cos[0, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(sin[p], expected_sin[0, 0], rtol=0, atol=2e-5)


def test_dynamic_is_the_default_within_the_context_and_differs_beyond() -> None:
    dynamic, default = both(DYNAMIC["dynamic"])[0], both(ROPES["default"])[0]
    positions = torch.arange(2 * CONTEXT)
    stretched, plain = cos_sin(dynamic, 16, positions)[1], cos_sin(default, 16, positions)[1]
    torch.testing.assert_close(stretched[:CONTEXT], plain[:CONTEXT], rtol=0, atol=2e-5)
    assert ((stretched[CONTEXT:] - plain[CONTEXT:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("name", [*ROPES, *DYNAMIC])
def test_a_position_does_not_depend_on_its_neighbours(name: str) -> None:
    rope, _ = both((ROPES | DYNAMIC)[name])
    positions = torch.tensor([200, 3, 64, 3, 63])
    cos, sin = cos_sin(rope, 16, positions)
    for i, p in enumerate(positions):
        one_cos, one_sin = cos_sin(rope, 16, p[None])
        torch.testing.assert_close(cos[i], one_cos[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(sin[i], one_sin[0], rtol=0, atol=2e-5)


def test_values_by_hand() -> None:
    cos, sin = cos_sin(Rope(kind="default", theta=100.0, original_context=8), 4, torch.tensor([3]))
    angles = [3.0, 0.3, 3.0, 0.3]  # theta^0 = 1 and theta^(-1/2) = 0.1, halves paired
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles])
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles])
