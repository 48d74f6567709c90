"""Where a transformers causal language model keeps its layers, its final norm and its head.

Found by structure, so that a model family needs no entry here. Knows nothing of training. Sizes: L layers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerskip.errors import RequestError

# What wrappers call the model they wrap: DDP and DeepSpeed, torch.compile, FSDP1.
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Parts:
    """The pieces early exits are built from; the model's own modules, not copies.

    Args:
        body: the module that runs the layers in its forward (hooks on it fire); gives what the head reads.
        layers: the L layers, in order.
        norm: what the body applies after the last layer; None where it applies nothing. A projection to a narrower head
            (OPT 350m) is part of it; after a norm, both are in an `nn.Sequential` outside the model's tree.
        head: (..., D) -> (..., V); call it, do not read its weight (see `head_is_adapted`).
    """

    body: nn.Module
    layers: nn.ModuleList
    norm: nn.Module | None
    head: nn.Module


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, DeepSpeed, torch.compile and PEFT wrappers, in any order.

    Raises:
        RequestError: there is none.
    """
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, PreTrainedModel):
        # PeftModel, recognised by its method: peft is an optional dependency
        base = getattr(type(inner), "get_base_model", None)
        children = dict(inner.named_children())
        inner = base(inner) if base else next((children[name] for name in _WRAPPED if name in children), None)
    if inner is None:
        raise RequestError(
            f"{type(model).__name__} is not a transformers model, nor a DDP, torch.compile or PEFT wrapper of one; "
            "give what AutoModelForCausalLM loads"
        )
    return inner


def parts(model: nn.Module) -> Parts:
    """The body, layers, final norm and head of a causal language model.

    Layers: the shallowest list of config.num_hidden_layers modules of one class. Norm: the child of the body all of
    whose parameters are (D,), or that has none and is of a class that also occurs inside a layer.

    Args:
        model: a transformers causal language model, plain or wrapped (DDP, FSDP2, DeepSpeed, torch.compile, PEFT).

    Raises:
        RequestError: one of them was not found, or more than one could be it; names the class and what was looked for.
    """
    causal = unwrap(model)
    name = type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        raise RequestError(f"{name} has an encoder; early exits need a decoder-only model")
    head = causal.get_output_embeddings()
    if head is None:
        raise RequestError(f"{name} has no output head; load it with AutoModelForCausalLM")
    body, layers = _layers(causal)
    return Parts(body=body, layers=layers, norm=_after_layers(body, layers, head, causal), head=head)


def head_is_adapted(parts: Parts) -> bool:
    """Whether the head is more than one weight: LoRA or another adapter sits in it.

    Called as a module such a head works for every exit. Code that reads `head.weight` (fused cross-entropy kernels)
    would read the frozen base weight only: wrong logits, and the adapter would never learn.
    """
    return any(True for _ in parts.head.children())


def ties_an_adapter(causal: PreTrainedModel) -> bool:
    """Whether an adapter sits in an embedding that is the head as well: merging it would change the head, which was
    trained without it."""
    embedding = causal.get_input_embeddings()
    return bool(causal.config.tie_word_embeddings) and callable(getattr(embedding, "merge", None))


@torch.no_grad()
def check_last_exit(model: nn.Module) -> None:
    """Runs four tokens to see that the model's logits are head(norm(last layer's output)), as every exit computes it.

    Families that scale their logits (Granite, Cohere) or cap them (Gemma 2) do more than that; a norm wrongly found, or
    missed, shows too. What the head reads is made large for that: a cap leaves the logits of a new model alone.
    Leaves training modes and random states as they are. For a model that is not sharded yet.

    Raises:
        RequestError: they are not.
    """
    causal, found = unwrap(model), parts(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    modes = {module: module.training for module in causal.modules()}
    hook = found.layers[-1].register_forward_hook(keep)
    larger = found.head.register_forward_pre_hook(lambda _, given: (100 * given[0], *given[1:]))
    try:
        device = next(found.head.parameters()).device
        tokens = torch.arange(4, device=device)[None] % causal.config.vocab_size
        expected = causal.eval()(input_ids=tokens, use_cache=False).logits
        logits = found.head(found.norm(seen[0]) if found.norm is not None else seen[0])
    finally:
        hook.remove()
        larger.remove()
        for module, mode in modes.items():
            module.training = mode
    if (logits - expected).abs().max() > 1e-3 * expected.abs().max():
        norm = type(found.norm).__name__ if found.norm is not None else "no norm"
        raise RequestError(
            f"the logits of {type(causal).__name__} are not its head ({type(found.head).__name__}) of the norm found "
            f"({norm}) of the last layer's output; its exits cannot share them, use another model family"
        )


def _layers(causal: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The list of layers and the module that holds it."""
    name, count = type(causal).__name__, getattr(causal.config, "num_hidden_layers", None)
    if not count:
        raise RequestError(f"the config of {name} has no num_hidden_layers; early exits need a plain decoder")
    found = [
        (path, module)
        for path, module in causal.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    depth = min((path.count(".") for path, _ in found), default=0)
    shallowest = [(path, module) for path, module in found if path.count(".") == depth]
    if len(shallowest) != 1:
        paths = ", ".join(path for path, _ in shallowest)
        raise RequestError(
            f"{name} has {f'more than one list ({paths})' if paths else 'no list'} of {count} layers of one class "
            "(config.num_hidden_layers); use a plain decoder such as Llama, Qwen, GPT-2, OPT or GPT-NeoX"
        )
    path, layers = shallowest[0]
    return causal.get_submodule(path.rpartition(".")[0]), layers


def _after_layers(body: nn.Module, layers: nn.ModuleList, head: nn.Module, causal: PreTrainedModel) -> nn.Module | None:
    """What the body applies between the last layer and the head."""
    width = causal.config.hidden_size
    inside = {type(module) for module in layers[0].modules()}
    children = list(body.children())
    norms = [child for child in children if child is not layers and _is_norm(child, inside, width)]
    if len(norms) > 1:  # one of them norms the embeddings (Bloom); modules are registered in the order they run
        norms = [child for child in norms if children.index(child) > children.index(layers)]
    if len(norms) > 1:
        raise RequestError(f"{type(causal).__name__} has {len(norms)} norms after its layers; exits can share one")
    norm = norms[0] if norms else None
    reads = getattr(head, "in_features", width)
    if reads == width:
        return norm
    # a projection to a narrower head (OPT 350m)
    sizes = {child: (getattr(child, "in_features", 0), getattr(child, "out_features", 0)) for child in children}
    projections = [child for child, size in sizes.items() if size == (width, reads)]
    if len(projections) != 1:
        raise RequestError(
            f"the head of {type(causal).__name__} reads {reads} channels and its layers give {width}; looked for one "
            f"projection between them in {type(body).__name__}, found {len(projections)}"
        )
    return projections[0] if norm is None else nn.Sequential(norm, projections[0])


def _is_norm(module: nn.Module, inside: set[type[nn.Module]], width: int) -> bool:
    # ds_shape: DeepSpeed ZeRO-3 leaves parameters empty and keeps their shape there
    shapes = {tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in module.parameters()}
    if not shapes:
        return type(module) in inside and not isinstance(module, nn.Dropout | nn.Identity)
    return shapes == {(width,)}
