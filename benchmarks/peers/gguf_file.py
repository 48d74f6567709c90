"""A Llama checkpoint folder as a GGUF file, the format of llama.cpp, with the same numbers.

Knows the names, the order of rotary rows and the metadata that llama.cpp reads. Runs nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip.errors import RequestError
from layerskip.model.checkpoint import read_config
from layerskip.model.shape import Shape

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_path(work: Path, *, dtype: str) -> Path:
    """Where the file of a checkpoint lies: where a later run finds it."""
    return work / f"{dtype}.gguf"


def write_gguf(folder: Path, path: Path, *, dtype: str) -> None:
    """Writes it, whole or not at all: matrices in the given element type, norms in float32.

    Args:
        folder: of a Llama checkpoint with plain rotary positions, its weights in one file, and a byte-level BPE
            tokenizer.json.
        path: of the file.
        dtype: "float32", "bfloat16", "float16" or "int8", which is Q8_0.

    Raises:
        RequestError: another architecture, or other rotary positions.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize
    from safetensors import safe_open

    shape = Shape.from_config(read_config(folder))
    if (shape.model_type, shape.rope.kind) != ("llama", "default"):
        raise RequestError(
            f"{folder} is a {shape.model_type} with {shape.rope.kind} rotary positions; only a Llama with plain ones "
            "is written as GGUF here"
        )
    unfinished = path.with_name(path.name + ".unfinished")
    writer = GGUFWriter(str(unfinished), "llama", use_temp_file=False)
    kinds = {
        "float32": LlamaFileType.ALL_F32,
        "float16": LlamaFileType.MOSTLY_F16,
        "bfloat16": LlamaFileType.MOSTLY_BF16,
        "int8": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(kinds[dtype])
    _write_shape(writer, shape)
    _write_tokenizer(writer, folder, shape)
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 -- a handle is no mapping
            tensor = _in_order(name, file.get_tensor(name), shape).contiguous()
            if tensor.dim() == 1 or dtype == "float32":
                writer.add_tensor(_renamed(name), tensor.float().numpy())
            elif dtype == "float16":
                writer.add_tensor(_renamed(name), tensor.half().numpy())
            elif dtype == "int8":
                bits = quantize(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
                writer.add_tensor(_renamed(name), bits, raw_dtype=GGMLQuantizationType.Q8_0)
            else:
                # numpy has no bfloat16: its bytes, with the type beside them
                raw = tensor.bfloat16().view(torch.uint8).numpy()
                writer.add_tensor(_renamed(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)


def _write_shape(writer: Any, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope.theta)
    writer.add_vocab_size(shape.vocab)


def _write_tokenizer(writer: Any, folder: Path, shape: Shape) -> None:
    """What the tokenizer has; ids beyond it are there and unused."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    special = {added["id"]: added["content"] for added in content["added_tokens"] if added["special"]}
    names = {i: token for token, i in model["vocab"].items()} | special
    normal, control, unused = 1, 3, 5
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in range(shape.vocab)])
    writer.add_token_types([control if i in special else normal if i in names else unused for i in range(shape.vocab)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    config = read_config(folder)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _renamed(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _in_order(name: str, tensor: Tensor, shape: Shape) -> Tensor:
    """llama.cpp turns neighbouring rows of queries and keys; Hugging Face's files hold them half a head apart."""
    heads = {"q_proj.weight": shape.heads, "k_proj.weight": shape.kv_heads}
    for end, count in heads.items():
        if name.endswith(end):
            return tensor.view(count, 2, shape.head_width // 2, -1).transpose(1, 2).reshape(tensor.shape)
    return tensor
