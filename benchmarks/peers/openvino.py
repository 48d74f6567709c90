"""OpenVINO GenAI, plain decoding. It builds its model from a GGUF file, offline.

Its reader takes matrices in float16 only. That holds the numbers of a bfloat16 checkpoint (what is smaller than 2^-14
loses digits), and the engine computes in the precision that is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.gguf_file import gguf_path, write_gguf
from benchmarks.peers.peer import FLOATS, Draft, PeerRun, missing

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}
_STORED = "float16"
_PROMPT = 2048
"""Tokens of a prompt that run in one pass."""


class OpenVino:
    """`LLMPipeline` on the CPU."""

    package = "openvino-genai"
    dtypes = FLOATS

    def __init__(self) -> None:
        self._pipeline: Any = None

    def available(self) -> str | None:
        """Whether it, and what writes GGUF files, are installed."""
        return missing(self.package) or missing("gguf")

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """Writes the GGUF file."""
        path = gguf_path(work, dtype=_STORED)
        if path.is_file():
            return False
        write_gguf(folder, path, dtype=_STORED)
        return True

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Builds and compiles the model."""
        from openvino_genai import LLMPipeline, SchedulerConfig

        scheduler = SchedulerConfig()
        scheduler.max_num_batched_tokens = _PROMPT
        # by itself the pipeline keeps earlier prompts, and a prompt seen before costs nothing
        scheduler.enable_prefix_caching = False
        hints = {"INFERENCE_PRECISION_HINT": _PRECISION[dtype], "INFERENCE_NUM_THREADS": threads}
        if dtype == "float32":  # else float16
            hints["KV_CACHE_PRECISION"] = _PRECISION[dtype]
        path = gguf_path(work, dtype=_STORED)
        self._pipeline = LLMPipeline(str(path), "CPU", scheduler_config=scheduler, **hints)

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """It has no early exit."""
        return []

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        import numpy
        from openvino import Tensor

        assert draft is None
        ids = Tensor(numpy.array([list(prompt)]))
        began = time.perf_counter()
        found = self._pipeline.generate(
            ids, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        total = time.perf_counter() - began
        return PeerRun(
            tokens=list(found.tokens[0]),
            first=found.perf_metrics.get_ttft().mean / 1000,
            first_tokens=1,
            total=total,
            rounds=new_tokens,
        )
