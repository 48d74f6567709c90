"""Checkpoints saved by transformers load with the same numbers; damaged ones are named; memory stays in bounds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from layerskip.errors import CheckpointError, RequestError
from layerskip.model import checkpoint
from layerskip.model.checkpoint import find, load_decoder, read_config, read_json
from layerskip.model.decoder import Decoder
from layerskip.model.names import decoder_from_tensors, tensor_names
from layerskip.model.shape import Shape

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
Rewrite = Callable[[dict[str, torch.Tensor]], object]


def model(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **settings}))
    for parameter in built.parameters():  # biases start at zero and norms at one: tell them apart
        torch.nn.init.normal_(parameter)
    return built  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Rewrite) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


def assert_same(decoder: Decoder, theirs: PreTrainedModel) -> None:
    state = theirs.state_dict()
    names = tensor_names(decoder.shape)
    assert set(names) == {name for name, _ in decoder.named_parameters()}
    for ours, name in names.items():
        parameter = decoder.get_parameter(ours)
        assert torch.equal(parameter, state[name].to(parameter.dtype)), ours
        assert not parameter.requires_grad
    assert not any(tensor.is_meta for tensor in [*decoder.parameters(), *decoder.buffers()])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saves_loads_equal(kind: str, tied: bool, sharded: bool, tmp_path: Path) -> None:
    theirs = model(kind, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() is not sharded
    decoder = load_decoder(tmp_path)
    assert_same(decoder, theirs)
    assert (decoder.head.weight is decoder.embedding.weight) is tied


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    theirs = model(kind)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.2)
    theirs.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float64)
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        expected = theirs.double()(tokens).logits
        cache = decoder.cache(rows=1, slots=16)
        hidden = decoder.run(decoder.embed(tokens), torch.arange(12)[None], cache)
        torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=1e-5)


def test_slices_and_reopening_leave_no_gaps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MIB", 700)  # a few rows a slice, many reopenings
    monkeypatch.setattr(checkpoint, "_SHARE", 10**9)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN: it might hold the freed weights of another model
    try:
        assert_same(load_decoder(folder), model())
    finally:
        torch.use_deterministic_algorithms(False)


def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(tmp_path: Path) -> None:
    theirs = model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    assert load_decoder(tmp_path).dtype == torch.bfloat16
    change_config(tmp_path, dtype="float32")
    assert load_decoder(tmp_path).dtype == torch.float32
    change_config(tmp_path, dtype="drop", torch_dtype="float16")
    assert load_decoder(tmp_path).dtype == torch.float16
    change_config(tmp_path, torch_dtype="drop")
    assert load_decoder(tmp_path).dtype == torch.bfloat16
    wide = load_decoder(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    assert_same(wide, theirs)
    change_config(tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match=r"config.json: dtype 'int8' is not supported; use bfloat16, float16"):
        load_decoder(tmp_path)
    with pytest.raises(RequestError, match=r"weights cannot be held as torch.int8; use torch.bfloat16"):
        load_decoder(tmp_path, dtype=torch.int8)


def test_mixed_dtypes_are_held_in_the_type_that_holds_all(folder: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].to(torch.bfloat16)

    rewrite(folder, narrow)
    change_config(folder, dtype="drop")
    assert load_decoder(folder).dtype == torch.float32


def test_tensors_become_a_decoder_without_a_copy() -> None:
    for tied in (False, True):
        theirs = model(tie_word_embeddings=tied)
        decoder = decoder_from_tensors(Shape.from_config(theirs.config.to_dict()), theirs.state_dict())
        assert_same(decoder, theirs)
        assert (decoder.head.weight is decoder.embedding.weight) is tied
        with torch.no_grad():
            theirs.model.layers[1].mlp.up_proj.weight[0, 0] = 123.0
        assert decoder.layers[1].gate_up.up.weight[0, 0] == 123.0


def test_tensors_that_do_not_fit_are_named() -> None:
    theirs = model()
    shape, state = Shape.from_config(theirs.config.to_dict()), dict(theirs.state_dict())
    norm = state.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"given tensors: 1 of 30 tensors are missing: model.norm.weight$"):
        decoder_from_tensors(shape, state)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(4,\); config.json makes it \(32,\)"):
        decoder_from_tensors(shape, {**state, "model.norm.weight": norm[:4]})
    with pytest.raises(CheckpointError, match=r"model.norm.weight is int64; only unquantised"):
        decoder_from_tensors(shape, {**state, "model.norm.weight": norm.long()})
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in a llama decoder .*: x$"):
        decoder_from_tensors(shape, {**state, "model.norm.weight": norm, "x": norm})


def test_a_tied_head_may_be_saved_too_or_alone(tmp_path: Path) -> None:
    theirs = model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    embedding = theirs.state_dict()["model.embed_tokens.weight"].clone()
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert_same(load_decoder(tmp_path), theirs)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert_same(load_decoder(tmp_path), theirs)


@pytest.mark.parametrize("head", [torch.zeros(96, 32), torch.zeros(95, 32), torch.zeros(())])
def test_a_tied_head_that_differs_is_refused(head: torch.Tensor, tmp_path: Path) -> None:
    theirs = model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    message = r"lm_head.weight and model.embed_tokens.weight differ; set tie_word_embeddings false"
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)
    state = {**theirs.state_dict(), "lm_head.weight": head}
    with pytest.raises(CheckpointError, match=message):
        decoder_from_tensors(Shape.from_config(theirs.config.to_dict()), state)


def test_old_rotary_buffers_are_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert_same(load_decoder(folder), model())


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


NORM = "model.norm.weight"
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_layer, r"saved: 9 of 30 tensors are missing: model.layers.1.\S+, \S+, \S+ and 6 more$"),
        (lambda t: t.pop(NORM), r"saved: 1 of 30 tensors are missing: model.norm.weight$"),
        (
            lambda t: t.update({f"extra.{i}": torch.ones(1) for i in range(5)}),
            r"saved: 5 tensors have no place in a llama decoder with this config.json: extra.0, \S+, \S+ and 2 more",
        ),
        (
            lambda t: t.update({UP: torch.ones(48, 31)}),
            r"model.safetensors: \S+up_proj.weight has shape \(48, 31\); config.json makes it \(48, 32\)",
        ),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), r"model.norm.weight is I8; only unquantised"),
        (
            lambda t: t.update({UP: torch.ones(48, 32).to(torch.float8_e4m3fn)}),
            r"model.safetensors: model.layers.2.mlp.up_proj.weight is F8_E4M3; only unquantised weights are loaded",
        ),
    ],
)
def test_wrong_tensors_are_named(change: Rewrite, message: str, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (slice(0, -100), "truncated or damaged: .*not fully covered"),
        (slice(0, 50), "truncated or damaged"),
        (slice(0, 0), "truncated or damaged"),
    ],
)
def test_a_truncated_file_is_named(keep: slice, message: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(CheckpointError, match=rf"model.safetensors: not a whole safetensors file; {message}"):
        load_decoder(folder)


def test_what_is_no_safetensors_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file; a Git LFS pointer; run `git lfs pull`"):
        load_decoder(folder)
    path.write_bytes(b"PK\x03\x04 a zip file, as pickled checkpoints are")
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file; truncated or damaged"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"only safetensors is loaded, not pytorch_model.bin: .*from_pretrained\(folder\)"),
        ("model-Q4_K.gguf", r"only safetensors is loaded, not model-Q4_K.gguf: .*gguf_file="),
        (None, r"has no model.safetensors and no model.safetensors.index.json; a checkpoint folder holds config.json"),
    ],
)
def test_a_folder_without_safetensors_says_what_to_do(name: str | None, message: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    if name:
        (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        load_decoder(folder)


def test_an_index_that_does_not_fit_its_folder(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path, max_shard_size="20KB")
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = index["weight_map"][NORM]
    (tmp_path / shard).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=rf"index.json: shard '{shard}' \(of \S+\) is not in the folder"):
        load_decoder(tmp_path)
    (tmp_path / "away").rename(tmp_path / shard)
    index_file.write_text(json.dumps({"weight_map": {NORM: f"../{tmp_path.name}/{shard}"}}))
    with pytest.raises(CheckpointError, match=r"shard '\.\./.*is not in the folder"):
        load_decoder(tmp_path)
    for broken in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {NORM: 3}}):
        index_file.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"index.json: weight_map must map tensor names to file names"):
            load_decoder(tmp_path)
    only = {name: file for name, file in index["weight_map"].items() if file == shard}
    index_file.write_text(json.dumps({"weight_map": only}))
    with pytest.raises(CheckpointError, match=r"of 30 tensors are missing"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', r"config.json: not valid JSON: .*line 1 column"),
        (b"", r"config.json: not valid JSON"),
        (b'{"a": "\xff"}', r"config.json: not UTF-8 text: .* at byte 7"),
        (b"[1]", r"config.json: holds a JSON list; it must be an object"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(content: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json; a checkpoint folder holds config.json, and model"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent.json: cannot be read: No such file"):
        read_json(tmp_path / "absent.json")


def test_find_gives_an_existing_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(folder) == find(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert find("saved") == Path("saved")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("~/saved") == folder
    with pytest.raises(CheckpointError, match=r"saved is a folder and has no revision 'main'; leave revision out"):
        find(folder, revision="main")


def test_find_refuses_what_is_no_folder(tmp_path: Path) -> None:
    for absent in (tmp_path / "absent", "./absent", "../absent", "/absent", "~/absent", "a/b/c", "a\\b", "~nobody/x"):
        with pytest.raises(CheckpointError, match="no such folder: "):
            find(absent)
    (tmp_path / "file.gguf").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"file.gguf is a file; a checkpoint folder holds config.json"):
        find(tmp_path / "file.gguf")
    with pytest.raises(CheckpointError, match=r"has no config.json; a checkpoint folder holds"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint given"):
        find("")


def test_find_uses_the_hub_cache_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    assert find("org/name") == repository / "snapshots" / ("0" * 40)
    assert load_decoder(find("org/name")).shape.vocab == 96
    with pytest.raises(
        CheckpointError, match=r"'org/name': .*not \(or not wholly\) in the cache at revision 'v2', and"
    ):
        find("org/name", revision="v2")
    with pytest.raises(
        CheckpointError, match=r"cannot load 'org/other': no such folder here, .*HF_HUB_OFFLINE is set$"
    ):
        find("org/other")
    with pytest.raises(CheckpointError, match=r"cannot load 'org/na me': it is neither a folder here nor a hub id"):
        find("org/na me")


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    error = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError), "cannot load 'org/name': the model is gated; ask for access"),
        (
            hub_error(errors.RepositoryNotFoundError),
            "cannot load 'org/name': no such folder here, and no such model on",
        ),
        (hub_error(errors.RevisionNotFoundError), "cannot load 'org/name': it has no revision 'r1'"),
        (hub_error(errors.HfHubHTTPError), "cannot download 'org/name': first line$"),
        (errors.HfHubHTTPError.__bases__[0]("connection reset"), "cannot download 'org/name': connection reset"),
        (OSError("no space left"), "cannot download 'org/name': no space left"),
    ],
)
def test_hub_failures_are_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fail(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        find("org/name", revision="r1", token="secret")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert (asked["name"], asked["revision"], asked["token"]) == ("org/name", "r1", "secret")
    assert "*.bin" not in asked["allow_patterns"]


# Few layers and a large embedding: the worst case for a loader that takes a tensor at a time. About 320 MB.
LARGE: dict[str, Any] = {
    "vocab_size": 100_000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip

MEASURE = """
import sys, torch
from pathlib import Path
from layerskip.model.checkpoint import load_decoder

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

load_decoder(Path(sys.argv[1]))  # a small one: what the first load brings in for good is no part of the weights
before = peak()
decoder = load_decoder(Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
print(peak() - before, sum(p.nbytes for p in decoder.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(**LARGE, tie_word_embeddings=True).save_pretrained(folder)
    shape = Shape.from_config({"model_type": "llama", **LARGE, "tie_word_embeddings": True})
    with torch.device("meta"):
        decoder = Decoder(shape)
    names = tensor_names(shape)
    tensors = {theirs: torch.ones(decoder.get_parameter(ours).shape) for ours, theirs in names.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_within_a_fifth_of_the_weights(dtype: str, large: Path, folder: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(folder), str(large), dtype]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, weights = map(int, done.stdout.split())
    assert weights > 140e6
    assert weights < growth < 1.2 * weights
