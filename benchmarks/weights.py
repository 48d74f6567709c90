"""Random Llama weights whose text uses its tokens as a language does, and whose upper layers can be turned down.

Knows sizes and tensors by their Hugging Face names. Does not know what is decoded with them, nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.vocabulary import BOS, EOS, FIRST_WORD
from benchmarks.zipf import deviations, law

LOGIT = 12.0
"""About where the largest logit lies; the runner-up then lies a nat or two below it, as in trained models."""
EMBEDDING = 0.02
"""Scale of the embedding."""


@dataclass(frozen=True)
class Size:
    """The shape of a checkpoint, with a tied head.

    Args:
        layers: L.
        width: D.
        heads: query heads.
        kv_heads: key and value heads.
        ffn_width: width inside the MLP.
        vocabulary: V.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocabulary: int

    @property
    def exit(self) -> int:
        """E, the layers that draft: a quarter of all."""
        return self.layers // 4

    def config(self, *, dtype: str, context: int = 2048) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.ffn_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "dtype": dtype,
        }


SIZES = {
    "tiny": Size(layers=8, width=64, heads=4, kv_heads=2, ffn_width=128, vocabulary=512),
    "15m": Size(layers=8, width=288, heads=6, kv_heads=6, ffn_width=768, vocabulary=4096),
    "110m": Size(layers=12, width=768, heads=12, kv_heads=12, ffn_width=2048, vocabulary=32000),
    "1.2b": Size(layers=16, width=2048, heads=32, kv_heads=8, ffn_width=8192, vocabulary=128256),
}


def random_weights(size: Size, *, seed: int) -> dict[str, Tensor]:
    """float32 tensors of every layer at full strength, the numbers rounded to what bfloat16 holds.

    - Row v of the embedding, which is the head too, has the length for which token v leads as often as its rank says
      (`zipf.deviations`): final states point in any direction, so the logits are centred normal numbers.
    - Each layer adds about `sqrt(D)` times the embedding, so a state hardly tells the last token's own row: without
      that a tied head would answer every token with itself.
    - Queries and keys are twice as large as usual, so that every position attends to a few earlier ones and the next
      token depends on all of the text; a random model falls into loops otherwise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, gain: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return _rounded(drawn.mul_(gain / math.sqrt(columns)))

    head_width = size.width // size.heads
    key_value = size.kv_heads * head_width
    write = 1.5 * EMBEDDING * math.sqrt(size.width)
    lengths = torch.empty(size.vocabulary)
    lengths[by_rank(size, seed=seed)] = deviations(law(size.vocabulary)).float()
    embedding = torch.randn(size.vocabulary, size.width, generator=generator)
    tensors = {"model.embed_tokens.weight": _rounded(embedding.mul_(EMBEDDING * lengths[:, None]))}
    for layer in range(size.layers):
        named = {
            "self_attn.q_proj": normal(size.width, size.width, 2.0),
            "self_attn.k_proj": normal(key_value, size.width, 2.0),
            "self_attn.v_proj": normal(key_value, size.width, 1.0),
            "self_attn.o_proj": normal(size.width, size.width, write),
            "mlp.gate_proj": normal(size.ffn_width, size.width, 2.0),
            "mlp.up_proj": normal(size.ffn_width, size.width, 1.0),
            "mlp.down_proj": normal(size.width, size.ffn_width, write),
            "input_layernorm": torch.ones(size.width),
            "post_attention_layernorm": torch.ones(size.width),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in named.items()}
    final = torch.full((size.width,), LOGIT / (EMBEDDING * math.sqrt(size.width)))
    return tensors | {"model.norm.weight": _rounded(final)}


def by_rank(size: Size, *, seed: int) -> Tensor:
    """(V,) the tokens of `random_weights` from the most to the least frequent: words in drawn order, then the rest."""
    drawn = torch.randperm(size.vocabulary - FIRST_WORD, generator=torch.Generator().manual_seed(seed))
    return torch.cat((drawn + FIRST_WORD, torch.arange(FIRST_WORD).flip(0)))


def turned_down(tensors: Mapping[str, Tensor], size: Size, *, scale: float) -> dict[str, Tensor]:
    """The weights with what layers E and above add multiplied by a scale; the others are shared, not copied."""
    ends = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    names = [f"model.layers.{layer}.{end}" for layer in range(size.exit, size.layers) for end in ends]
    return {**tensors, **{name: _rounded(tensors[name] * scale) for name in names}}


def _rounded(tensor: Tensor) -> Tensor:
    """In float32, with numbers that bfloat16 holds: a model is then the same in both."""
    return tensor.bfloat16().float()
