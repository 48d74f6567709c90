"""Weights prepacked for the CPU: the same numbers, the same laws, and no second copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip.errors import RequestError
from layerskip.model.checkpoint import load_decoder, read_config
from layerskip.model.pack import Fan, Packed, PackedFan, chosen
from layerskip.model.shape import Shape

KINDS = ("llama", "mistral", "qwen2", "qwen3")
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


def saved(folder: Path, kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def logits(folder: Path, weights: str, dtype: torch.dtype, tokens: torch.Tensor) -> torch.Tensor:
    decoder = load_decoder(folder, dtype=dtype, weights=weights)
    assert decoder.layout == weights
    at = torch.arange(tokens.shape[1])[None]
    hidden = decoder.run(decoder.embed(tokens), at, decoder.cache(rows=1, slots=tokens.shape[1]))
    return decoder.logits(hidden)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_the_same_numbers(kind: str, tied: bool, tmp_path: Path) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    saved(tmp_path, kind, tie_word_embeddings=tied, **extra)
    tokens = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.06)):
        plain = logits(tmp_path, "plain", dtype, tokens)
        for weights in ("packed", "native"):
            off = (plain - logits(tmp_path, weights, dtype, tokens)).abs() / plain.abs().max()
            assert off.max() < close, (kind, dtype, weights)


def test_the_layout_is_chosen_by_device_and_dtype(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape.from_config(read_config(tiny_checkpoint))
    assert chosen(None, shape, dtype=torch.bfloat16, device=CPU) == "native"
    assert chosen("auto", shape, dtype=torch.float64, device=CPU) == "plain"
    assert chosen("plain", shape, dtype=torch.bfloat16, device=CPU) == "plain"
    assert chosen(None, shape, dtype=torch.bfloat16, device=torch.device("cuda")) == "plain"
    assert chosen(None, replace(shape, head_width=256), dtype=torch.bfloat16, device=CPU) == "packed"
    assert chosen("int8", shape, dtype=torch.bfloat16, device=CPU) == "int8"
    assert chosen("int4", shape, dtype=torch.float16, device=CPU) == "int4-plain"
    assert chosen("int8", replace(shape, head_width=256), dtype=torch.bfloat16, device=CPU) == "int8-plain"
    assert chosen("int4", shape, dtype=torch.bfloat16, device=torch.device("cuda")) == "int4-plain"
    assert chosen("int8-plain", shape, dtype=torch.bfloat16, device=CPU) == "int8-plain"
    with pytest.raises(RequestError, match=r"weights cannot be native: .* heads up to 128 wide, not 256; use auto"):
        chosen("native", replace(shape, head_width=256), dtype=torch.bfloat16, device=CPU)
    with pytest.raises(RequestError, match=r"weights cannot be packed: .*float64; use auto"):
        chosen("packed", shape, dtype=torch.float64, device=CPU)
    with pytest.raises(RequestError, match=r"unknown weights 'pack'; use auto, plain, packed, native, int8, int4,"):
        chosen("pack", shape, dtype=torch.float32, device=CPU)


def test_layers_over_one_input_become_one_weight() -> None:
    fan = Fan(8, {"a": 3, "b": 5}, bias=True)
    packed = PackedFan([part for part in fan.children() if isinstance(part, nn.Linear)])
    x = torch.randn(2, 4, 8)
    for ours, theirs in zip(packed(x), fan(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not list(packed.parameters())


def test_nothing_plain_is_left(tiny_checkpoint: Path) -> None:
    decoder = load_decoder(tiny_checkpoint, weights="packed")
    assert not [module for module in decoder.modules() if isinstance(module, nn.Linear | Fan)]
    assert sum(isinstance(module, Packed) for module in decoder.modules()) == 4 * 4 + 1


LARGE: dict[str, Any] = {
    "vocab_size": 100_000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip

MEASURE = """
import json, os, sys, torch
from pathlib import Path
from layerskip.model.checkpoint import load_decoder

def memory(kind):
    status = Path("/proc/self/status").read_text()
    return int(status.split(kind + ":")[1].split()[0]) * 1024

small, large = map(Path, sys.argv[1:3])
for weights in sys.argv[3:]:
    if os.fork():  # what was imported is there already, and every layout begins where the others did
        assert os.wait()[1] == 0
        continue
    load_decoder(small, weights=weights)  # what the first load brings in for good is no part of the weights
    before, peak = memory("RssAnon"), memory("VmHWM")
    decoder = load_decoder(large, weights=weights)
    decoder.embed(torch.arange(100)[None])
    print(json.dumps([weights, memory("RssAnon") - before, memory("VmHWM") - peak]), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_a_tied_head_is_held_once_and_loading_needs_little_more(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LARGE))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model.save_pretrained(tmp_path)
    weights = 2 * Shape.from_config(read_config(tmp_path)).parameters()["total"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert weights > 140e6
    shares = {"packed": 1, "native": 1, "int8": 8.5 / 16, "int4": 4.5 / 16, "int8-plain": 8.5 / 16}
    command = [sys.executable, "-c", MEASURE, str(tiny_checkpoint), str(tmp_path), *shares]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [layout for layout, *_ in found] == list(shares)
    for layout, held, peak in found:
        share = shares[layout]
        assert share * weights < held < 1.1 * share * weights, layout
        # the checkpoint's own, mapped, and what is made of it; what is between is less than a second copy of either
        assert share == 1 or peak < (1.2 + share) * weights, (layout, peak / weights)
