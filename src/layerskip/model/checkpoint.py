"""A Hugging Face checkpoint folder, or hub id, becomes a Decoder.

Knows which files a checkpoint has and how to read weights without holding them twice. Knows no layer of the
model (names.py maps the tensors) and no tokenizer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerskip.errors import CheckpointError, RequestError
from layerskip.model.decoder import Decoder
from layerskip.model.names import DTYPES, HEAD, Found, assign, empty_decoder, matched, tied_head_differs
from layerskip.model.pack import chosen, pack
from layerskip.model.rows import FileRows
from layerskip.model.shape import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = f"a checkpoint folder holds config.json, and {SINGLE} or {INDEX} with its shards"

# What is fetched from the hub: no pickled, GGUF or ONNX copies of the same weights.
_HUB_FILES = [
    *("config*.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "*.model", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json"),
    *("chat_template*", "draft_vocabulary.json"),
]
_NAMED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

MIB = 2**20
_SLICE = 64 * MIB  # read at a time
_MAPPED = 256 * MIB  # read before the file is reopened, which gives its mapped pages back
_SHARE = 16  # both are at most this part of the weights, so that small models stay within 1.2x as well


def find(path_or_id: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a checkpoint: the one given, or the hub's, downloaded unless it is cached.

    Args:
        path_or_id: a folder, or a hub id such as "org/name". An existing folder wins.
        revision: branch, tag or commit of a hub id.
        token: for private and gated hub models; None uses the stored login.

    Raises:
        CheckpointError: there is no such folder or model, it cannot be reached, or it is no checkpoint.
    """
    given = str(path_or_id)
    if not given:
        raise CheckpointError("no checkpoint given; name a folder or a hub id such as 'org/name'")
    folder = Path(os.path.expanduser(given))
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{given} is a folder and has no revision {revision!r}; leave revision out")
    elif folder.exists():
        raise CheckpointError(f"{given} is a file; {NEEDED}")
    elif isinstance(path_or_id, Path) or _looks_like_a_path(given):
        raise CheckpointError(f"no such folder: {given}; {NEEDED}")
    else:
        folder = _download(given, revision=revision, token=token)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{given} has no config.json; {NEEDED}")
    return folder


def _looks_like_a_path(given: str) -> bool:
    return given.startswith((".", "~", "/")) or given.count("/") > 1 or "\\" in given


def _download(name: str, *, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    # A dropped connection surfaces as the transport's error: a base of HfHubHTTPError, named differently by
    # version.
    transport = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *transport)
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_HUB_FILES))
    except errors.HFValidationError as error:
        reason = "it is neither a folder here nor a hub id such as 'org/name'"
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
    except errors.GatedRepoError as error:
        reason = "the model is gated; ask for access on its hub page, then give a token or `hf auth login`"
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder here, and no such model on the hub (a private one needs a token)"
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"cannot load {name!r}: it has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        wanted = "" if revision is None else f" at revision {revision!r}"
        reason = (
            f"no such folder here, not (or not wholly) in the cache{wanted}, and the hub cannot be reached "
            "or HF_HUB_OFFLINE is set"
        )
        raise CheckpointError(f"cannot load {name!r}: {reason}") from error
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot download {name!r}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, not UTF-8, not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; {NEEDED}")
    return read_json(path)


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: str | None = "plain",
) -> Decoder:
    """The decoder of a checkpoint folder.

    Memory peaks at 1.2 times the weights as loaded, also when they are converted: each parameter is allocated
    once and filled in slices straight from the file.

    Args:
        folder: holds config.json and safetensors files, single or sharded.
        dtype: element type to hold the weights in; None is the checkpoint's own: what config.json says, else
            the files.
        device: where to hold them.
        weights: how they are stored, one of `pack.LAYOUTS`; None is the fastest lossless layout.

    Returns:
        A decoder that needs no gradients.

    Raises:
        CheckpointError: the configuration is not supported, a file is missing, damaged or not safetensors, or
            a tensor is missing, left over, of the wrong shape, or quantised. Names the file and the tensor.
        RequestError: weights cannot be held as `dtype`, or not stored like that.
    """
    config = read_config(folder)
    shape = Shape.from_config(config, source=str(folder / "config.json"))
    found = _headers(folder)
    decoder = empty_decoder(shape)
    names = matched(decoder, found, source=str(folder))
    if dtype is None:
        dtype = _own_dtype(config, [found[name].dtype for name in names.values()], folder)
    elif dtype not in DTYPES:
        raise RequestError(f"weights cannot be held as {dtype}; use {', '.join(map(str, DTYPES))}")
    layout = chosen(weights, shape, dtype=dtype, device=torch.device(device))
    budget = max(MIB, min(_MAPPED, shape.parameters()["total"] * dtype.itemsize // _SHARE))
    for part, inside in _parts(decoder, names):
        _fill(decoder, {ours: names[ours] for ours in inside}, found, dtype=dtype, device=device, budget=budget)
        if part is not decoder:
            pack(part, layout)  # now, so that what is let go of makes room for the next part
    decoder.store(layout)
    if layout != "plain":
        if shape.tied:  # rows of it are read where they lie: beside the head a copy would be a second one
            name = names["embedding.weight"]
            table = _open(Path(found[name].where)).get_tensor(name)
            decoder.embedding.weight = nn.Parameter(table, requires_grad=False)
        if layout == "packed":  # an opaque tensor; a draft vocabulary needs rows of it
            name = names["embedding.weight" if shape.tied else "head.weight"]
            kind = found[name].dtype
            assert isinstance(kind, torch.dtype), "what cannot be read was refused"
            decoder.head_in_file = FileRows(Path(found[name].where), name, kind)
        _give_back()
    return decoder


def _parts(decoder: Decoder, names: Iterable[str]) -> Iterator[tuple[nn.Module, list[str]]]:
    """What is filled at a time, with the names of its parameters: every layer, then the rest."""
    rest = list(names)
    for i, layer in enumerate(decoder.layers):
        yield layer, [name for name in rest if name.startswith(f"layers.{i}.")]
    yield decoder, [name for name in rest if not name.startswith("layers.")]


def _fill(
    decoder: Decoder,
    names: Mapping[str, str],
    found: Mapping[str, Found],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    budget: int,
) -> None:
    """Reads some parameters (our name -> theirs), at most `budget` bytes of the file being mapped at a time."""
    sinks: dict[str, Callable[[int, Tensor], None]] = {}
    for ours, theirs in names.items():
        parameter = torch.empty(decoder.get_parameter(ours).shape, dtype=dtype, device=device)
        assign(decoder, ours, parameter)
        sinks[theirs] = _writer(parameter)
    if decoder.shape.tied and "embedding.weight" in names and HEAD in found and HEAD not in sinks:
        # Comes last: the embedding must be there to compare with.
        sinks[HEAD] = _comparer(decoder.embedding.weight, found[HEAD].where)
    for name, first, piece in _pieces(sinks, found, budget=budget):
        sinks[name](first, piece)


def _give_back() -> None:
    """Returns what was let go of to the system; the C library would keep as much as half of a small model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def _writer(parameter: Tensor) -> Callable[[int, Tensor], None]:
    def write(first: int, piece: Tensor) -> None:
        parameter[first : first + len(piece)].copy_(piece)

    return write


def _comparer(embedding: Tensor, where: str) -> Callable[[int, Tensor], None]:
    def compare(first: int, piece: Tensor) -> None:
        held = embedding[first : first + len(piece)]
        if held.shape != piece.shape or not torch.equal(held, piece.to(held.device, held.dtype)):
            raise tied_head_differs(where)

    return compare


def _pieces(names: Iterable[str], found: Mapping[str, Found], *, budget: int) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, rows) of each tensor in turn; a piece is valid until the next is asked for.

    Pages that were read stay mapped, and count as ours, until every tensor and handle over the file is gone.
    """
    file, path, mapped = None, None, 0
    for name in names:
        rows, first = found[name].size[0], 0
        while first < rows:
            if file is None or path != found[name].where or mapped >= budget:
                file, path, mapped = None, found[name].where, 0
                file = _open(Path(path))
            tensor = file.get_slice(name)
            row_bytes = max(1, _bytes(found[name]) // rows)
            count = max(1, min(_SLICE, budget) // row_bytes)
            piece: Tensor = tensor[first : first + count]
            mapped += piece.nbytes
            yield name, first, piece
            first += count
            del piece, tensor


def _bytes(tensor: Found) -> int:
    itemsize = tensor.dtype.itemsize if isinstance(tensor.dtype, torch.dtype) else 1
    return torch.Size(tensor.size).numel() * itemsize


def _own_dtype(config: Mapping[str, Any], dtypes: list[torch.dtype | str], folder: Path) -> torch.dtype:
    """What config.json says (`dtype`, or `torch_dtype` before version 5), else the type that holds every
    tensor."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        kinds = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype)]
        dtype = kinds[0]
        for other in kinds:
            dtype = torch.promote_types(dtype, other)
        return dtype
    allowed = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    plain = str(named).removeprefix("torch.")
    if plain not in allowed:
        config_file = folder / "config.json"
        raise CheckpointError(f"{config_file}: dtype {plain!r} is not supported; use {', '.join(allowed)}")
    return allowed[plain]


def _headers(folder: Path) -> dict[str, Found]:
    """Every tensor of the folder's safetensors files, without reading any of the numbers."""
    found: dict[str, Found] = {}
    for path in _weight_files(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 -- a handle is no mapping
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            found[name] = Found(tuple(tensor.get_shape()), _NAMED.get(kind, kind), str(path))
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or any(not isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to file names")
    for name, shard in shards.items():
        # The index is data from elsewhere: it may name files of this folder, and no others.
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{folder / INDEX}: shard {shard!r} (of {name}) is not in the folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _no_weights(folder: Path) -> str:
    for pattern, arguments in (("*.gguf", "folder, gguf_file=..."), ("*.bin", "folder")):
        others = sorted(path.name for path in folder.glob(pattern))
        if others:
            return (
                f"{folder} has no {SINGLE}; only safetensors is loaded, not {others[0]}: convert it with "
                f"transformers, AutoModelForCausalLM.from_pretrained({arguments}).save_pretrained(new_folder)"
            )
    return f"{folder} has no {SINGLE} and no {INDEX}; {NEEDED}"


def _open(path: Path) -> Any:
    """An open safetensors file; its handle has no type of its own to name."""
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(32).startswith(b"version https://git-lfs")
        reason = "a Git LFS pointer; run `git lfs pull`" if pointer else f"truncated or damaged: {error}"
        raise CheckpointError(f"{path}: not a whole safetensors file; {reason}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
