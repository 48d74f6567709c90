"""Layers, norm and head are found by structure, in every family and through every wrapper."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from layerskip.errors import RequestError
from layerskip.train.parts import Parts, check_last_exit, head_is_adapted, parts, unwrap

# family -> where its body, layers and norm are, read off the source of transformers
PLACES = {
    "llama": ("model", "model.layers", "model.norm"),
    "mistral": ("model", "model.layers", "model.norm"),
    "qwen2": ("model", "model.layers", "model.norm"),
    "qwen3": ("model", "model.layers", "model.norm"),
    "gpt2": ("transformer", "transformer.h", "transformer.ln_f"),
    "opt": ("model.decoder", "model.decoder.layers", "model.decoder.final_layer_norm"),
    "opt-350m": ("model.decoder", "model.decoder.layers", "model.decoder.project_out"),
    "opt-post-norm": ("model.decoder", "model.decoder.layers", None),
    "gpt-neox": ("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "pythia": ("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_parts_of_a_family(name: str, causal: Callable[..., Any]) -> None:
    model = causal(name)
    found = parts(model)
    body, layers, norm = (model.get_submodule(place) if place else None for place in PLACES[name])
    assert found.body is body
    assert found.layers is layers
    assert found.norm is norm
    assert found.head is model.lm_head


def test_a_projection_after_the_norm_is_part_of_it(causal: Callable[..., Any]) -> None:
    model = causal("opt-projected")
    norm = parts(model).norm
    assert isinstance(norm, nn.Sequential)
    assert list(norm) == [model.model.decoder.final_layer_norm, model.model.decoder.project_out]
    assert not any(module is norm for module in model.modules())


def last_exit(model: Any, found: Parts, tokens: torch.Tensor) -> torch.Tensor:
    states: list[Any] = []
    hook = found.layers[-1].register_forward_hook(lambda _, __, output: states.append(output))
    model(input_ids=tokens)
    hook.remove()
    state = states[0]
    return found.head(found.norm(state) if found.norm is not None else state)


def test_the_head_of_the_norm_of_the_last_state_is_the_models_own(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family)
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(last_exit(model, parts(model), tokens), model(input_ids=tokens).logits)
    check_last_exit(model)


def test_a_hook_on_the_body_sees_what_the_head_reads(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family)
    found, outputs = parts(model), []
    found.body.register_forward_hook(lambda _, __, output: outputs.append(output.last_hidden_state))
    logits = model(input_ids=torch.arange(10).view(2, 5)).logits
    assert torch.equal(found.head(outputs[0]), logits)


@pytest.mark.parametrize("trainable", [{}, {"modules_to_save": ["norm"]}], ids=["adapters", "norm-too"])
def test_peft_is_unwrapped(trainable: dict[str, Any], causal: Callable[..., Any]) -> None:
    model = causal("llama")
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, **trainable))
    found = parts(wrapped)
    assert unwrap(wrapped) is model
    assert found.layers is model.model.layers
    assert found.norm is model.model.norm
    check_last_exit(wrapped)


def test_torch_compile_is_unwrapped(causal: Callable[..., Any]) -> None:
    model = causal("gpt2")
    assert parts(torch.compile(model)).layers is model.transformer.h


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_around_peft_is_unwrapped(causal: Callable[..., Any]) -> None:
    model = causal("pythia")
    wrapped = nn.parallel.DistributedDataParallel(get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)))
    assert unwrap(wrapped) is model
    assert parts(wrapped).norm is model.gpt_neox.final_layer_norm


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    ],
    ids=["plain", "lora", "saved"],
)
def test_an_adapted_head_is_told_and_works_as_a_module(
    settings: dict[str, Any], adapted: bool, causal: Callable[..., Any]
) -> None:
    model = get_peft_model(causal("llama"), LoraConfig(r=2, init_lora_weights=False, **settings))
    found, tokens = parts(model), torch.arange(10).view(2, 5)
    assert head_is_adapted(found) is adapted
    logits = model(input_ids=tokens).logits
    assert torch.equal(last_exit(model, found, tokens), logits)
    # what reading the weight would do, and why head_is_adapted is asked
    weight = getattr(found.head, "base_layer", found.head).weight
    states = parts(model).body(input_ids=tokens).last_hidden_state
    assert torch.allclose(states @ weight.T, logits) is ("lm_head" not in settings["target_modules"])


def test_a_norm_on_the_embeddings_is_not_taken_for_the_last() -> None:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=3, n_head=4)
    model = transformers.BloomForCausalLM(config)
    assert parts(model).norm is model.transformer.ln_f


def test_a_norm_without_weights_is_found() -> None:
    config = transformers.OlmoConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=None,
    )
    model = transformers.OlmoForCausalLM(config)
    assert parts(model).norm is model.model.norm
    assert not list(model.model.norm.parameters())


def test_dropout_is_not_taken_for_a_norm(causal: Callable[..., Any]) -> None:
    model = causal("gpt2")
    model.transformer.ln_f = nn.Identity()
    assert parts(model).norm is None
    check_last_exit(model)


def test_a_shape_that_zero_3_keeps_elsewhere_is_read(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert parts(model).norm is model.model.norm


def test_deeper_lists_of_as_many_modules_are_not_the_layers(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.model.norms = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Tanh(), nn.Linear(2, 2)])
    assert parts(model).layers is model.model.layers


def test_what_is_not_a_causal_language_model_is_refused(causal: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match="Linear is not a transformers model"):
        parts(nn.Linear(2, 2))
    with pytest.raises(RequestError, match="Sequential is not a transformers model"):
        parts(nn.Sequential(causal("llama")))
    with pytest.raises(RequestError, match="LlamaModel has no output head; load it with AutoModelForCausalLM"):
        parts(causal("llama").model)
    settings = {"vocab_size": 61, "d_model": 32, "num_layers": 2, "d_ff": 32, "num_heads": 2, "d_kv": 16}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))
    with pytest.raises(RequestError, match="T5ForConditionalGeneration has an encoder"):
        parts(t5)


def test_layers_that_cannot_be_told_are_refused(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    model.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(RequestError, match=r"more than one list \(model\.layers, model\.others\) of 4 layers"):
        parts(model)
    model = causal("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(RequestError, match="LlamaForCausalLM has no list of 3 layers of one class"):
        parts(model)
    model.config = transformers.PreTrainedConfig()
    with pytest.raises(RequestError, match="LlamaForCausalLM has no num_hidden_layers"):
        parts(model)


def test_norms_and_projections_that_cannot_be_told_are_refused(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    model.model.second = nn.LayerNorm(32)
    with pytest.raises(RequestError, match="LlamaForCausalLM has 2 norms after its layers"):
        parts(model)
    model = causal("opt-350m")
    model.model.decoder.project_out = None
    with pytest.raises(RequestError, match="reads 16 channels and its layers give 32; looked for one projection"):
        parts(model)


def test_logits_that_are_more_than_norm_and_head_are_refused(causal: Callable[..., Any]) -> None:
    settings = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings, **heads, logits_scaling=2.0))
    with pytest.raises(RequestError, match="logits of GraniteForCausalLM are not its head"):
        check_last_exit(granite)
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings, **heads, head_dim=8))
    with pytest.raises(RequestError, match="logits of Gemma2ForCausalLM are not its head"):
        check_last_exit(gemma)  # capped at 30, where those of new weights are far below
    model = causal("llama")
    model.model.norm.weight = nn.Parameter(torch.ones(31))  # as if the norm were not one
    model.model.norm.forward = lambda states: 2 * states
    with pytest.raises(RequestError, match="no norm"):
        check_last_exit(model)


def test_looking_changes_nothing(causal: Callable[..., Any]) -> None:
    model = causal("gpt2", resid_pdrop=0.5)
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = len(model.transformer.h[-1]._forward_hooks)
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_last_exit(model)
    assert [module.training for module in model.modules()] == modes
    assert len(model.transformer.h[-1]._forward_hooks) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
