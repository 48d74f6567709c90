"""Shapes read from config.json against transformers' own configuration and model objects."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from layerskip.errors import CheckpointError
from layerskip.model.rope import ROPES, Rope
from layerskip.model.shape import SUPPORTED, Shape

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}

# What a config.json says beyond SIZES; None takes a key out.
SAID: dict[str, dict[str, Any]] = {
    "nothing": {"num_key_value_heads": None},
    "sizes": {},
    "null kv heads": {"num_key_value_heads": "null"},
    "head_dim": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "eps and context": {"rms_norm_eps": 1e-5, "max_position_embeddings": 777},
    "old rope theta": {"rope_theta": 500000.0},
    "whole theta": {"rope_theta": 1000000},
    "old rope theta, null scaling": {"rope_theta": 500000.0, "rope_scaling": None},
    "old rope type": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "old llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "old yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
    "new rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "new rope, theta outside": {"rope_theta": 3e5, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "theta inside wins": {"rope_theta": 3e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
    "scaling wins": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
    },
    "original outside wins": {
        "original_max_position_embeddings": 300,
        "rope_parameters": {"rope_type": "llama3", **LLAMA3},
    },
    "yarn without original": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    "window": {"sliding_window": 16},
    "null window": {"sliding_window": "null"},
    "window unused": {"sliding_window": 16, "use_sliding_window": False},
    "window, upper layers": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
    "window, all layers": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
    "window, default split": {"sliding_window": 16, "use_sliding_window": True},
    "layer types": {
        "sliding_window": 16,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "layer types and head_dim": {"sliding_window": 8, "head_dim": 8, "layer_types": ["full_attention"] * 4},
    "layer types full": {"layer_types": ["full_attention"] * 4},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}

# transformers refuses such a null for Mistral only, and cannot build one with layer_types but no head_dim.
REFUSED = [("mistral", "null kv heads"), ("mistral", "layer types"), ("mistral", "layer types full")]
CASES = [(kind, name) for kind in SUPPORTED for name in SAID if (kind, name) not in REFUSED]


def said(kind: str, name: str) -> dict[str, Any]:
    config = {"model_type": kind, **SIZES, **SAID[name]}
    if name == "nothing" and kind != "llama":  # the default number of key and value heads must divide
        config["num_attention_heads"] = 32
    dropped = {key for key, value in SAID[name].items() if value is None}
    return {k: None if v == "null" else v for k, v in config.items() if k not in dropped}


def expected_windows(model: Any) -> tuple[int | None, ...]:
    """The window in force in each layer, as transformers' modelling code takes it."""
    config = model.config
    if config.model_type == "llama":
        return (None,) * config.num_hidden_layers
    if config.model_type == "mistral":  # with layer_types it is a Ministral
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(layer.self_attn.sliding_window for layer in model.model.layers)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_shape_equals_what_transformers_builds(kind: str, name: str, tmp_path: Path) -> None:
    config = said(kind, name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = Shape.from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs, layer = model.config, model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert (shape.vocab, shape.width) == tuple(model.model.embed_tokens.weight.shape)
    assert shape.layers == len(model.model.layers)
    assert shape.head_width == attention.head_dim
    assert shape.heads * shape.head_width == attention.q_proj.out_features
    assert shape.kv_heads * shape.head_width == attention.k_proj.out_features
    assert shape.ffn_width == mlp.up_proj.out_features
    assert shape.eps == layer.input_layernorm.variance_epsilon
    if shape.rope.kind in ("default", "llama3"):
        assert shape.context == theirs.max_position_embeddings
    assert shape.tied == theirs.tie_word_embeddings
    assert shape.activation == theirs.hidden_act
    biases = [attention.q_proj.bias is not None, attention.o_proj.bias is not None, mlp.up_proj.bias is not None]
    assert [shape.query_key_value_bias, shape.output_bias, shape.mlp_bias] == biases
    assert shape.query_key_norm == hasattr(attention, "q_norm")
    assert shape.windows == expected_windows(model)
    expected = theirs.rope_parameters
    assert shape.rope.kind == expected["rope_type"]
    assert shape.rope.theta == expected["rope_theta"]
    assert shape.rope.factor == expected.get("factor", 1.0)
    scaled = shape.rope.kind in ("llama3", "yarn")
    original = expected["original_max_position_embeddings"] if scaled else theirs.max_position_embeddings
    assert shape.rope.original_context == original


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_transformers_writes_reads_back(kind: str, name: str, tmp_path: Path) -> None:
    config = said(kind, name)
    CONFIGS[kind](**{key: value for key, value in config.items() if key != "model_type"}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert Shape.from_config(written) == Shape.from_config(config)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_count_what_transformers_counts(kind: str, tied: bool) -> None:
    sizes = {**SIZES, "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes))
    parts = Shape.from_config({"model_type": kind, **sizes}).parameters()
    assert list(parts) == ["embedding", "attention", "mlp", "norms", "head", "total"]
    theirs = dict(model.named_parameters())
    assert parts["total"] == sum(p.numel() for p in theirs.values()) == sum(list(parts.values())[:-1])
    assert parts["mlp"] == sum(p.numel() for n, p in theirs.items() if ".mlp." in n)
    assert parts["norms"] == sum(p.numel() for n, p in theirs.items() if "norm" in n)
    assert parts["head"] == (0 if tied else 96 * 64)


def test_cache_bytes() -> None:
    shape = Shape.from_config({"model_type": "llama", **SIZES})
    assert shape.cache_bytes(3, 100, 2) == 2 * 4 * 3 * 100 * 2 * 8 * 2


def test_nested_rope_that_is_equal_everywhere() -> None:
    one = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    nested = {"full_attention": one, "sliding_attention": dict(one)}
    shape = Shape.from_config({"model_type": "qwen3", **SIZES, "rope_parameters": nested})
    assert shape.rope == Rope(kind="linear", theta=5e4, factor=2.0, original_context=32768)


def test_the_context_is_what_the_scaling_stretches_it_to() -> None:
    def context(positions: int, **rope: Any) -> int:
        config = {"model_type": "llama", **SIZES, "max_position_embeddings": positions, "rope_parameters": rope}
        return Shape.from_config(config).context

    assert context(4096, rope_type="linear", factor=4.0) == 16384
    assert context(4096, rope_type="dynamic", factor=2.0) == 8192
    # YaRN checkpoints name either the original length or the stretched one
    assert context(32768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert context(131072, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072
    assert context(131072, rope_type="llama3", **LLAMA3) == 131072


def test_swish_is_silu() -> None:
    assert Shape.from_config({"model_type": "llama", **SIZES, "hidden_act": "swish"}).activation == "silu"


def test_yarn_and_llama3_settings_are_kept() -> None:
    yarn = {
        "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512, "beta_fast": 30, "beta_slow": 2,
        "attention_factor": 0.5, "mscale": 0.7, "mscale_all_dim": 0.8, "truncate": False,
    }  # fmt: skip
    rope = Shape.from_config({"model_type": "llama", **SIZES, "rope_parameters": yarn}).rope
    assert rope == Rope(
        kind="yarn", theta=10000.0, original_context=512, factor=4.0, beta_fast=30.0, beta_slow=2.0,
        attention_factor=0.5, mscale=0.7, mscale_all_dim=0.8, truncate=False,
    )  # fmt: skip
    llama3 = {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2, "high_freq_factor": 5.0}
    rope = Shape.from_config({"model_type": "llama", **SIZES, "rope_parameters": llama3}).rope
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_context) == (2.0, 5.0, 512)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "lama"},
        "model_type 'lama' is not supported; use llama, mistral, qwen2, qwen3; did you mean 'llama'",
    ),
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; use llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None; it must be a string"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is set"),
    ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config is set"),
    ({"hidden_act": "silo"}, "hidden_act 'silo' is not supported; use silu, .*did you mean 'silu'"),
    ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a positive whole number"),
    ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a positive whole number"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 8"),
    ({"num_attention_heads": 6, "num_key_value_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
    ({"head_dim": 7}, "head_dim 7 is odd"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a positive number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a positive number"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object"),
    ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported; use default, linear"),
    ({"rope_scaling": {"type": "yarm", "factor": 2}}, "rope type 'yarm' is not supported.*did you mean 'yarn'"),
    ({"rope_scaling": {"type": "linear"}}, "required key 'rope_scaling.factor' is missing"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor is -1; it must be a positive number"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'rope_parameters.low_freq_factor' is missing"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "dynamic rope is not defined for head_dim 2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1"),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "rope_parameters.partial_rotary_factor is 0.25; it must be 1",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
        "rope_parameters differs between full_attention and sliding_attention",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Shape.from_config({"model_type": "llama", **SIZES, **change}, source="folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", *SIZES])
def test_a_missing_key_is_named(key: str) -> None:
    config = {"model_type": "llama", **SIZES}
    del config[key]
    if key == "num_key_value_heads":
        assert Shape.from_config(config).kv_heads == 8
        return
    with pytest.raises(CheckpointError, match=f"required key '{key}' is missing"):
        Shape.from_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must list one entry for each of the 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, r"layer_types\[0\] is 'linear_attention'; use full_attention or"),
        ({"layer_types": ["sliding_attention"] * 4}, "so set use_sliding_window true and sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0; it must be a positive whole"),
        ({"use_sliding_window": True, "max_window_layers": 1.5}, "max_window_layers is 1.5; it must be a whole"),
    ],
)
def test_windows_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Shape.from_config({"model_type": "qwen2", **SIZES, **change})


def test_mistral_layer_types_choose_the_layers() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    config = {"model_type": "mistral", **SIZES, "sliding_window": 8, "layer_types": types}
    assert Shape.from_config(config).windows == (None, 8, None, 8)
    with pytest.raises(CheckpointError, match="layer_types has sliding_attention, so set sliding_window"):
        Shape.from_config({**config, "sliding_window": None})


def test_every_rope_kind_has_a_case() -> None:
    configs = [{**SAID[name], "model_type": "llama", **SIZES} for name in SAID if name != "nothing"]
    assert {Shape.from_config({k: v for k, v in c.items() if v != "null"}).rope.kind for c in configs} == set(ROPES)
