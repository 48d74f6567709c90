"""Weights of 8 and 4 bits: what they stand for, the same products on every processor, and the same model in torch."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip import EarlyExit, load
from layerskip.errors import NumericalError
from layerskip.model.checkpoint import load_decoder
from layerskip.model.native import build
from layerskip.model.native.blocks import BLOCK, in_pieces
from layerskip.model.pack import stored_bytes
from layerskip.model.quantise import GROUP, Quantised, quantised, rounded

BITS = (8, 4)
LAYOUTS = ("int8", "int4", "int8-plain", "int4-plain")
PRODUCTS = Path(__file__).with_name("products.cpp")
FLAGS = ("-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
PROCESSORS = {
    "this": "-march=native",
    "without VNNI": "-march=native -mno-avx512vnni",
    "oldest": "-march=x86-64",
}
Products = Callable[[Tensor, Tensor, int], Tensor]


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["this", pytest.param("without VNNI", marks=pytest.mark.slow), "oldest"])
def products(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Products:
    """Products by the kernels, built for a kind of processor: (weight (O, I), positions (M, I), bits) -> (M, O)."""
    if request.param != "this" and platform.machine() != "x86_64":
        pytest.skip("builds for other x86-64 processors")
    out = tmp_path_factory.mktemp("products") / "products.so"
    flags = [*FLAGS, *PROCESSORS[request.param].split(), f"-I{build.SOURCE.parent}"]
    subprocess.run(["g++", str(PRODUCTS), "-o", str(out), *flags], check=True, capture_output=True)
    library = ctypes.CDLL(str(out))

    def multiply(weight: Tensor, x: Tensor, bits: int) -> Tensor:
        pieces, x = in_pieces(weight, bits), x.contiguous()
        sizes = BLOCK * pieces.shape[0], 64 * pieces.shape[1]
        found = torch.empty(x.shape[0], sizes[0])
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (pieces, x, found)]
        library.by_quantised(bits, places[0], *sizes, places[1], x.shape[1], x.shape[0], places[2])
        return found[:, : weight.shape[0]]

    return multiply


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [64, 32, 70, 97, 190])
def test_sums_of_whole_numbers_are_exact(products: Products, bits: int, inputs: int) -> None:
    most = 127 if bits == 8 else 7
    weight = torch.randint(-most, most + 1, (37, inputs), generator=torch.Generator().manual_seed(1)).float()
    x = torch.randint(-127, 128, (9, inputs), generator=torch.Generator().manual_seed(2)).float()
    weight[:, ::GROUP] = -127 if bits == 8 else -8  # so that the scale is one
    x[:, ::GROUP] = 127
    expected = (x.long() @ weight.long().T).float()  # below 2^24
    assert torch.equal(products(weight, x, bits), expected)
    assert torch.equal(torch.cat([products(weight, row[None], bits) for row in x]), expected)


@pytest.mark.parametrize("bits", BITS)
def test_a_product_has_the_same_bits_beside_any_number_of_others(products: Products, bits: int) -> None:
    weight, x = random(75, 210), random(13, 210, seed=3)
    together = products(weight, x, bits)
    for count in range(1, 13):
        assert torch.equal(products(weight, x[:count], bits), together[:count]), count
    assert torch.equal(products(weight[:16], x, bits), together[:, :16])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [20, 300])
def test_a_product_is_that_of_the_numbers_that_are_meant(products: Products, bits: int, inputs: int) -> None:
    linear = nn.Linear(inputs, 70, bias=False).requires_grad_(False)
    x = random(6, inputs) * torch.logspace(-3, 3, 6)[:, None]
    meant = Quantised([linear], bits).weight()
    expected = (rounded(x).double() @ meant.double().T).float()
    size = rounded(x).abs() @ meant.abs().T  # what rounding is measured by
    assert ((products(linear.weight, x, bits) - expected).abs() <= 1e-6 * size).all()


SAVE_LOGITS = """
import sys, torch
from pathlib import Path
from layerskip.model.checkpoint import load_decoder

found = []
for weights in ("int8", "int4"):
    decoder = load_decoder(Path(sys.argv[1]), dtype=torch.bfloat16, weights=weights)
    assert decoder.layout == weights
    ids = torch.arange(24)[None]
    hidden = decoder.run(decoder.embed(ids), ids, decoder.cache(rows=1, slots=24))
    found.append(decoder.logits(hidden))
torch.save(found, sys.argv[2])
"""
SIZES = {
    "vocab_size": 90, "hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.slow  # builds the kernels anew; test_native does so too, and compares int8 and int4 with torch there
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for a lesser x86-64 processor")
def test_what_the_processor_lacks_changes_no_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path / "model")
    found = []
    for flags in ("-O1", "-O1 -mno-avx512vnni"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CXXFLAGS": flags}
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        command = [sys.executable, "-c", SAVE_LOGITS, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
        subprocess.run(command, check=True, env=environment)
        found.append(torch.load(tmp_path / "logits.pt"))
    assert len(list(tmp_path.rglob("*.so"))) == 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert found[0][0].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_within_half_a_step(bits: int) -> None:
    weight = random(40, 83) * torch.logspace(-4, 4, 40)[:, None]
    weight[3] = 0
    linear = nn.Linear(83, 40, bias=False)
    linear.weight.data = weight
    numbers, scales = quantised(weight, bits)
    steps = scales.float().abs().repeat_interleave(GROUP, 1)[:, :83]
    error = (Quantised([linear], bits).weight() - weight).abs()
    if bits == 8:
        assert (error <= 0.5 * steps).all()
    else:  # what is the largest on the other side may be one step off
        assert (error <= 1.04 * steps).all()
        assert (error <= 0.5 * steps).float().mean() > 0.95
    assert numbers.dtype == torch.int8
    assert not error[3].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", [(16, 64), (33, 70), (5, 31), (100, 4097)])
def test_both_orders_hold_the_same_numbers(bits: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(sizes[1], sizes[0], bias=False).requires_grad_(False)
    linear.weight.copy_(random(*sizes))
    meant = Quantised([linear], bits)
    from layerskip.model import quantise

    monkeypatch.setattr(quantise, "_SLICE", 3000)  # a few outputs at a time
    pieces = in_pieces(linear.weight, bits)
    assert torch.equal(Quantised([linear], bits).numbers, meant.numbers)
    assert pieces.shape == (-(-sizes[0] // 16), -(-sizes[1] // 64), 64 + 128 * bits)
    scales = pieces[..., :64].contiguous().view(torch.bfloat16).unflatten(-1, (2, 16)).float()  # (O/16, I/64, 2, 16)
    quads = pieces[..., 64:].unflatten(-1, (2, -1, 16, 4))
    if bits == 4:
        quads = torch.cat((quads & 15, quads >> 4), 3)
    numbers = quads.float() - (128 if bits == 8 else 8)  # (O/16, I/64, 2, 8, 16, 4)
    weights = (numbers * scales[:, :, :, None, :, None]).permute(0, 4, 1, 2, 3, 5).flatten(2).flatten(0, 1)
    assert torch.equal(weights[: sizes[0], : sizes[1]], meant.weight())
    assert not weights[sizes[0] :].any()
    assert not weights[:, sizes[1] :].any()


def logits(folder: Path, weights: str, dtype: torch.dtype) -> Tensor:
    decoder = load_decoder(folder, dtype=dtype, weights=weights)
    assert decoder.layout == weights
    ids = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))
    hidden = decoder.run(decoder.embed(ids), torch.arange(24)[None], decoder.cache(rows=1, slots=24))
    return decoder.logits(hidden).float()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_and_torch_are_one_model(
    bits: int, dtype: torch.dtype, close: float, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, plain = (logits(tiny_checkpoint, f"int{bits}{form}", dtype) for form in ("", "-plain"))
    assert (kernels - plain).abs().max() < close * plain.abs().max()
    # and both are the checkpoint's with other weights: 8 bits of the positions change little
    from layerskip.model import pack

    def dequantised(module: nn.Module, layout: str) -> None:
        for child in module.modules():
            if isinstance(child, nn.Linear):
                child.weight.data = Quantised([child], bits).weight().to(dtype)

    with monkeypatch.context() as patch:
        patch.setattr("layerskip.model.checkpoint.pack", dequantised)
        patch.setattr("layerskip.model.decoder.pack", dequantised)
        meant = logits(tiny_checkpoint, "plain", dtype)
    assert pack.pack is not dequantised
    assert (kernels - meant).abs().max() < 0.1 * meant.abs().max()
    checkpoint = logits(tiny_checkpoint, "plain", dtype)
    assert (kernels - checkpoint).abs().max() > 1e-3 * checkpoint.abs().max()  # not the checkpoint's, that is


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_dtype_without_kernels_is_served_by_torch(dtype: str, tiny_checkpoint: Path) -> None:
    llm = load(tiny_checkpoint, dtype=dtype, weights="int8")
    assert llm.decoder.layout == "int8-plain"
    assert len(llm.generate("the cat", max_tokens=5, ignore_eos=True, draft=EarlyExit(1)).tokens) == 5


def test_bytes_are_those_of_numbers_and_scales(tiny_checkpoint: Path) -> None:
    shape = load_decoder(tiny_checkpoint).shape
    for weights, bits in (("int8-plain", 8.5), ("int4-plain", 4.5)):
        decoder = load_decoder(tiny_checkpoint, weights=weights)
        head = stored_bytes(decoder.head)
        assert head == shape.vocab * shape.width * bits / 8
        assert stored_bytes(load_decoder(tiny_checkpoint, weights=weights.removesuffix("-plain")).head) >= head


@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_told(weights: str, number: float, tiny_checkpoint: Path) -> None:
    llm = load(tiny_checkpoint, weights="plain")
    llm.decoder.layers[1].output.weight.data[3, 5] = number  # type: ignore[union-attr, index]
    llm.decoder.store(weights)
    with pytest.raises(NumericalError):
        llm.generate("the cat", max_tokens=3)
