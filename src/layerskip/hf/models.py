"""Which transformers models can be decoded here, and the decoder that shares their weights.

Knows architectures, modules and parameters; knows nothing of a call to `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip.errors import CheckpointError, RequestError
from layerskip.model.decoder import Decoder
from layerskip.model.names import DTYPES, decoder_from_tensors
from layerskip.model.rope import cos_sin
from layerskip.model.shape import SUPPORTED, Shape


def decoder_for(model: PreTrainedModel) -> Decoder:
    """The decoder of a loaded transformers model. It shares the weights: what changes them in place changes both.

    It is kept as long as the model lives, and built anew when parameters were replaced, moved or cast.

    Raises:
        RequestError: an architecture that is not supported, or a model whose numbers are not those of plain weights on
            one device: quantised, adapted, sharded, offloaded, hooked or patched.
    """
    shape = _shape(model)
    _check_modules(model)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    _check_tensors(tensors)
    marks = {name: (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for name, t in tensors.items()}
    shared = _shared.get(model)
    if shared is None or (shared.shape, shared.marks) != (shape, marks):
        _check_rope(model, shape)
        try:
            shared = _Shared(shape, marks, decoder_from_tensors(shape, tensors))
        except CheckpointError as error:
            raise RequestError(f"this model cannot be decoded here: {error}") from error
        _shared[model] = shared
    return shared.decoder


@dataclass(frozen=True)
class _Shared:
    """A decoder over a model's weights, and what the model was like when it was built."""

    shape: Shape
    marks: Mapping[str, tuple[object, ...]]
    decoder: Decoder


_shared: WeakKeyDictionary[PreTrainedModel, _Shared] = WeakKeyDictionary()


def _shape(model: PreTrainedModel) -> Shape:
    if getattr(model.config, "is_encoder_decoder", False):
        kinds = ", ".join(SUPPORTED)
        raise RequestError(f"{model.config.model_type} is an encoder-decoder; use a decoder of type {kinds}")
    config = model.config.to_dict()
    if config.get("quantization_config"):
        raise RequestError("the model is quantised (quantization_config); load the unquantised weights")
    try:
        return Shape.from_config(config, source="the model's config")
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def _check_modules(model: PreTrainedModel) -> None:
    """Refuses what would run in `model(...)` but not here: other layers, patched forwards, hooks, dropout."""
    kind = model.config.model_type
    trusted = (f"transformers.models.{kind}.modeling_{kind}", "transformers.activations")
    for name, module in model.named_modules():
        place, own = name or "the model", type(module).forward
        if own.__module__ not in trusted and not own.__module__.startswith("torch.nn.modules."):
            raise RequestError(
                f"{place} is a {type(module).__name__}, which no plain {kind} model has; merge adapters into the "
                "weights (merge_and_unload), and load without quantisation and patches"
            )
        # a compiled forward gives the numbers of the one it was made from
        forward = vars(module).get("forward")
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        if forward is not None and getattr(forward, "__func__", None) is not own:
            raise RequestError(
                f"the forward of {place} was replaced, as accelerate does to place or offload a model, and would not "
                "run here; load the whole model on one device, without patches"
            )
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if getattr(hook, "__module__", None) not in _HARMLESS_HOOKS:
                hook_name = getattr(hook, "__qualname__", type(hook).__name__)
                raise RequestError(f"{place} has a forward hook, {hook_name}, which would not run here; remove it")
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if model.training and dropout:
        raise RequestError(f"the model is training, with attention_dropout {dropout}; call model.eval() first")


# transformers' own: one records outputs, the other lets gradients through frozen embeddings
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not plain floating point tensors of one type on one device."""
    for name, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            raise RequestError(f"{name} is a {type(tensor).__name__}; load it whole and unquantised")
        if tensor.is_meta:
            raise RequestError(f"{name} is on the meta device: offloaded, or never loaded; load it on one device")
        if tensor.dtype not in DTYPES:
            raise RequestError(f"{name} is {tensor.dtype}; load the unquantised weights")
    for what, values in (
        ("devices", {str(tensor.device) for tensor in tensors.values()}),
        ("dtypes", {str(tensor.dtype) for tensor in tensors.values()}),
    ):
        if len(values) > 1:
            raise RequestError(f"the model's parameters have several {what}: {', '.join(sorted(values))}; use one")


def _check_rope(model: PreTrainedModel, shape: Shape) -> None:
    """Refuses rotary frequencies that differ from the config's: at position 1 the angle is the frequency."""
    one = torch.ones(1, dtype=torch.long, device=model.device)
    found = model.get_submodule("model.rotary_emb")(torch.zeros(1, device=model.device), one[None])
    wanted = cos_sin(shape.rope, shape.head_width, one)
    if not all(torch.allclose(a[0], b, rtol=0, atol=1e-6) for a, b in zip(found, wanted, strict=True)):
        raise RequestError(
            "the model's rotary frequencies differ from its config's: model.to(dtype) and model.half() round them; "
            "give the dtype to from_pretrained instead"
        )
