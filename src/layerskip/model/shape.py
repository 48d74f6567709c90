"""The shape of a Llama-family model, read from its config.json.

Knows the configuration keys of Hugging Face checkpoints, old and new, and the defaults of transformers'
LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config. Knows no tensors and opens no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerskip.errors import suggest
from layerskip.model.config import Reader
from layerskip.model.rope import Rope, read_rope

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and switches of a decoder: all that `Decoder` needs to build itself.

    Args:
        model_type: one of `SUPPORTED`.
        vocab: V, rows of the embedding and of the head.
        width: D, size of a hidden state.
        layers: L.
        heads: query heads in a layer.
        kv_heads: key and value heads in a layer; divides `heads`.
        head_width: size of one head.
        ffn_width: inner size of the MLP.
        eps: what RMSNorm adds to the mean square.
        rope: rotary positions.
        context: positions the model is made for: max_position_embeddings, times the factor where rope scaling
            stretches it.
        tied: the head shares the weight of the embedding.
        activation: of the MLP's gate; one of `ACTIVATIONS`, with swish spelt silu.
        query_key_value_bias: the query, key and value projections have a bias.
        output_bias: the attention's output projection has a bias.
        mlp_bias: the three MLP projections have a bias.
        query_key_norm: queries and keys pass an RMSNorm over the head width (Qwen3).
        windows: for each layer, how many positions a query sees, itself included: position p sees p - window
            + 1 .. p. None sees all.
    """

    model_type: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    eps: float
    rope: Rope
    context: int
    tied: bool
    activation: str
    query_key_value_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    windows: tuple[int | None, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> Shape:
        """Reads the shape from the contents of a config.json, as transformers 5 reads it.

        Args:
            config: the parsed file; both spellings are read (`rope_theta` and `rope_scaling`, or
                `rope_parameters`).
            source: what errors call it.

        Raises:
            CheckpointError: a key is missing, of the wrong type or asks for what is not supported; the
                message names it.
        """
        read = Reader(config, source)
        kind = _model_type(read)
        _refuse_unsupported(read)
        width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        layers = read.integer("num_hidden_layers")
        context = read.integer("max_position_embeddings", _CONTEXT[kind])
        kv_heads = read.optional_integer("num_key_value_heads", _KV_HEADS.get(kind)) or heads
        if heads % kv_heads:
            raise read.error(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        head_width = read.optional_integer("head_dim", 128 if kind == "qwen3" else None)
        if head_width is None:
            head_width, rest = divmod(width, heads)
            if rest:
                raise read.error(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        if head_width % 2:
            raise read.error(f"head_dim {head_width} is odd; rotary positions turn pairs, so it must be even")
        activation = read.text("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise read.error(
                f"hidden_act {activation!r} is not supported; use {allowed}{suggest(activation, ACTIVATIONS)}"
            )
        bias = read.flag("attention_bias") if kind in ("llama", "qwen3") else False
        rope = read_rope(read, context=context, head_width=head_width)
        return cls(
            model_type=kind,
            vocab=read.integer("vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            ffn_width=read.integer("intermediate_size"),
            eps=read.number("rms_norm_eps", 1e-6),
            rope=rope,
            context=rope.stretched(context),
            tied=read.flag("tie_word_embeddings"),
            activation="silu" if activation == "swish" else activation,
            query_key_value_bias=bias or kind == "qwen2",
            output_bias=bias,
            mlp_bias=read.flag("mlp_bias") if kind == "llama" else False,
            query_key_norm=kind == "qwen3",
            windows=_windows(read, kind, layers),
        )

    def parameters(self) -> dict[str, int]:
        """Number of parameters by part: embedding, attention, mlp, norms, head, total. A tied head counts
        0."""
        query, key_value = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = 2 * self.width * (query + key_value)
        attention += self.query_key_value_bias * (query + 2 * key_value) + self.output_bias * self.width
        mlp = 3 * self.width * self.ffn_width + self.mlp_bias * (2 * self.ffn_width + self.width)
        norms = 2 * self.width + self.query_key_norm * 2 * self.head_width
        parts = {
            "embedding": self.vocab * self.width,
            "attention": self.layers * attention,
            "mlp": self.layers * mlp,
            "norms": self.layers * norms + self.width,
            "head": 0 if self.tied else self.vocab * self.width,
        }
        return {**parts, "total": sum(parts.values())}

    def cache_bytes(self, rows: int, slots: int, itemsize: int) -> int:
        """Bytes of the keys and values of `rows` x `slots` positions, at `itemsize` bytes a number."""
        return 2 * self.layers * rows * slots * self.kv_heads * self.head_width * itemsize


# transformers' defaults for keys that a config.json may leave out. A null num_key_value_heads is one per
# query head.
_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


def _model_type(read: Reader) -> str:
    kind = read.text("model_type")
    if kind not in SUPPORTED:
        raise read.error(f"model_type {kind!r} is not supported; use {', '.join(SUPPORTED)}{suggest(kind, SUPPORTED)}")
    return kind


def _refuse_unsupported(read: Reader) -> None:
    """Settings that would change the numbers if they were passed over."""
    if read.get("quantization_config", None):
        raise read.error("quantization_config is set; only unquantised weights are loaded: use the original checkpoint")
    if read.get("per_layer_config", None):
        raise read.error("per_layer_config is set; all layers must have the same sizes")


def _windows(read: Reader, kind: str, layers: int) -> tuple[int | None, ...]:
    """Which layers slide: none in Llama; in Mistral all, and in Qwen the upper ones, unless `layer_types` says which.

    transformers' AutoModel takes a Mistral with `layer_types` for a Ministral, which reads them as Qwen does.
    """
    if kind == "llama":
        return (None,) * layers
    slides = kind == "mistral" or read.flag("use_sliding_window")
    window = read.optional_integer("sliding_window", 4096) if slides else None
    types = read.get("layer_types", None)
    if types is None:
        first = 0 if kind == "mistral" else read.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool):
            raise read.wrong("max_window_layers", first, "a whole number")
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(types, list | tuple) or len(types) != layers:
        raise read.error(f"layer_types must list one entry for each of the {layers} layers")
    for layer, name in enumerate(types):
        if name not in ("full_attention", "sliding_attention"):
            raise read.error(f"layer_types[{layer}] is {name!r}; use full_attention or sliding_attention")
    if window is None and "sliding_attention" in types:
        also = "" if kind == "mistral" else "use_sliding_window true and "
        raise read.error(f"layer_types has sliding_attention, so set {also}sliding_window")
    return tuple(window if name == "sliding_attention" else None for name in types)
