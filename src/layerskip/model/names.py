"""What Hugging Face calls our parameters, and how tensors become the parameters of a decoder.

Knows both naming schemes and what a complete set of tensors looks like. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerskip.errors import CheckpointError
from layerskip.model.decoder import Decoder
from layerskip.model.shape import Shape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_LISTED = 3  # names spelt out in an error


@dataclass(frozen=True)
class Found:
    """A tensor that a checkpoint offers.

    Args:
        size: its sizes.
        dtype: its element type; the checkpoint's own name where torch has none that we load.
        where: the file it is in, for errors.
    """

    size: tuple[int, ...]
    dtype: torch.dtype | str
    where: str


def tensor_names(shape: Shape) -> dict[str, str]:
    """Our parameter name -> Hugging Face name, for every parameter. A tied head has no name of its own.

    Example:
        tensor_names(shape)["layers.3.query_key_value.query.weight"] == "model.layers.3.self_attn.q_proj.weight"
    """
    names = {"embedding.weight": EMBEDDING}
    biased = {
        "self_attn.q_proj": shape.query_key_value_bias,
        "self_attn.k_proj": shape.query_key_value_bias,
        "self_attn.v_proj": shape.query_key_value_bias,
        "self_attn.o_proj": shape.output_bias,
        "mlp.gate_proj": shape.mlp_bias,
        "mlp.up_proj": shape.mlp_bias,
        "mlp.down_proj": shape.mlp_bias,
    }
    for layer in range(shape.layers):
        for ours, theirs in _LAYER.items():
            if ours in ("query_norm", "key_norm") and not shape.query_key_norm:
                continue
            for kind in ("weight", "bias") if biased.get(theirs, False) else ("weight",):
                names[f"layers.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    names["norm.weight"] = "model.norm.weight"
    if not shape.tied:
        names["head.weight"] = HEAD
    return names


_LAYER = {
    "attention_norm": "input_layernorm",
    "query_key_value.query": "self_attn.q_proj",
    "query_key_value.key": "self_attn.k_proj",
    "query_key_value.value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate_up.gate": "mlp.gate_proj",
    "gate_up.up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def decoder_from_tensors(shape: Shape, tensors: Mapping[str, Tensor]) -> Decoder:
    """A decoder over tensors that exist already: nothing is copied, so a change to them is a change to it.

    Args:
        shape: what the tensors must fit.
        tensors: Hugging Face name -> tensor, such as a transformers model's `state_dict()`.

    Returns:
        A decoder on the tensors' device, in their dtype, that needs no gradients.

    Raises:
        CheckpointError: a tensor is missing, left over, of the wrong shape or not floating point, or a tied
            head differs.
    """
    decoder = empty_decoder(shape)
    found = {name: Found(tuple(t.shape), t.dtype, "the given tensors") for name, t in tensors.items()}
    for ours, theirs in matched(decoder, found, source="the given tensors").items():
        assign(decoder, ours, tensors[theirs].detach())
    if shape.tied and HEAD in tensors:
        held, head = decoder.embedding.weight, tensors[HEAD]
        if head.data_ptr() != held.data_ptr() and not torch.equal(head.to(held.device, held.dtype), held):
            raise tied_head_differs("the given tensors")
    return decoder


def empty_decoder(shape: Shape) -> Decoder:
    """A decoder whose parameters have sizes but no memory yet."""
    with torch.device("meta"):
        return Decoder(shape)


def assign(decoder: Decoder, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter called `name`; a tied head follows the embedding."""
    module, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if decoder.shape.tied:
        decoder.head.weight = decoder.embedding.weight


def matched(decoder: Decoder, found: Mapping[str, Found], *, source: str) -> dict[str, str]:
    """Our parameter name -> the tensor to fill it from, once all that was found is known to fit.

    Args:
        decoder: says which parameters there are, and their sizes.
        found: Hugging Face name -> what there is.
        source: where it was found, for errors.

    Raises:
        CheckpointError: names the tensors that are missing, left over, of the wrong shape or not floating
            point.
    """
    shape = decoder.shape
    names = tensor_names(shape)
    if shape.tied and EMBEDDING not in found and HEAD in found:
        names["embedding.weight"] = HEAD  # a tied pair may be saved under either name
    missing = [name for name in names.values() if name not in found]
    if missing:
        count = f"{len(missing)} of {len(names)} tensors are missing"
        raise CheckpointError(f"{source}: {count}: {_listed(missing)}")
    wanted = {*names.values(), HEAD} if shape.tied else {*names.values()}
    extra = [name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(
            f"{source}: {len(extra)} tensors have no place in a {shape.model_type} decoder "
            f"with this config.json: {_listed(sorted(extra))}"
        )
    if shape.tied and HEAD in found and found[HEAD].size != (shape.vocab, shape.width):
        raise tied_head_differs(found[HEAD].where)
    for ours, theirs in names.items():
        tensor, size = found[theirs], tuple(decoder.get_parameter(ours).shape)
        if tensor.size != size:
            raise CheckpointError(f"{tensor.where}: {theirs} has shape {tensor.size}; config.json makes it {size}")
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.where}: {theirs} is {_plain(tensor.dtype)}; only unquantised weights are loaded "
                f"({', '.join(map(_plain, DTYPES))})"
            )
    return names


def tied_head_differs(where: str) -> CheckpointError:
    """transformers would leave such a pair untied, so sharing one of the two would change the numbers."""
    return CheckpointError(
        f"{where}: config.json ties the head to the embedding, but {HEAD} and {EMBEDDING} differ; "
        "set tie_word_embeddings false to use both"
    )


def _plain(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
