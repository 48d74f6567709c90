"""One small random model of each family that training is promised for."""

from collections.abc import Callable
from typing import Any

import pytest

# Small enough for a moment, with as many heads, layers and widths as it takes to notice a wrong axis.
LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 12}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "opt": ("OPT", OPT),
    # norms after each block, none at the end, embeddings narrower than the layers (OPT 350m)
    "opt-350m": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-post-norm": ("OPT", {**OPT, "do_layer_norm_before": False}),
    "opt-projected": ("OPT", {**OPT, "word_embed_proj_dim": 16}),
    "gpt-neox": ("GPTNeoX", {**NEOX, "use_parallel_residual": False}),
    "pythia": ("GPTNeoX", {**NEOX, "rotary_pct": 0.25, "use_parallel_residual": True}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family by name, for `causal` and what is built on it."""
    return str(request.param)


def build(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in float64, in training mode; the same arguments give the same numbers."""
    import torch
    import transformers

    kind, settings = FAMILIES[family]
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    # no special tokens: what a test feeds is all there is
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**ends, **settings, **changes})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}{head}")(config).double().train()
        for parameter in model.parameters():
            # spread out, so that layers, norms and biases all matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def causal() -> Callable[..., Any]:
    """`build`: a random model, `causal("mistral", num_hidden_layers=3)`."""
    return build
