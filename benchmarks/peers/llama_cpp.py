"""llama.cpp by way of llama-cpp-python, plain decoding.

Drives the C functions themselves: the package's own loop in Python copies the logits of every step.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.gguf_file import gguf_path, write_gguf
from benchmarks.peers.peer import FLOATS, QUANTISED, Draft, PeerRun, missing

_FLOAT32 = 0  # GGML_TYPE_F32
_NO_FLASH = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED


class LlamaCpp:
    """One model with one context on the CPU."""

    package = "llama-cpp-python"
    dtypes = (*FLOATS, QUANTISED)

    def __init__(self) -> None:
        self._library: Any = None
        self._context: Any = None
        self._sampler: Any = None

    def available(self) -> str | None:
        """Whether it, and what writes GGUF files, are installed."""
        return missing(self.package) or missing("gguf")

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """Writes the GGUF file."""
        path = gguf_path(work, dtype=dtype)
        if path.is_file():
            return False
        write_gguf(folder, path, dtype=dtype)
        return True

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads the GGUF file; keys and values are float32 where the weights are, else float16, its own default."""
        import llama_cpp

        llama_cpp.llama_backend_init()
        path = gguf_path(work, dtype=dtype)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = 0  # the model's own
        settings.n_threads = settings.n_threads_batch = threads
        if dtype == "float32":
            settings.type_k = settings.type_v = _FLOAT32
            settings.flash_attn_type = _NO_FLASH  # which would compute in float16
        context = llama_cpp.llama_init_from_model(model, settings) if model else None
        if not context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._library, self._context = llama_cpp, context
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """It has no early exit."""
        return []

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        assert draft is None
        library, context, tokens, first = self._library, self._context, [], 0.0
        library.llama_memory_clear(library.llama_get_memory(context), True)
        began = time.perf_counter()
        given = (ctypes.c_int32 * len(prompt))(*prompt)
        for _ in range(new_tokens):
            status = library.llama_decode(context, library.llama_batch_get_one(given, len(given)))
            if status:
                raise RuntimeError(f"llama_decode gave {status}")
            tokens.append(library.llama_sampler_sample(self._sampler, context, -1))
            first = first or time.perf_counter() - began
            given = (ctypes.c_int32 * 1)(tokens[-1])
        return PeerRun(tokens=tokens, first=first, first_tokens=1, total=time.perf_counter() - began, rounds=new_tokens)
