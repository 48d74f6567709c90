"""ONNX Runtime GenAI, plain decoding, in float32: what its CPU kernels take beside quantised weights.

Its model builder writes the graph from the checkpoint's folder, offline.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Draft, PeerRun, missing


class OnnxGenAI:
    """`Generator` on the CPU."""

    package = "onnxruntime-genai"
    dtypes = ("float32",)

    def __init__(self) -> None:
        self._model: Any = None

    def available(self) -> str | None:
        """Whether it, and what writes ONNX files, are installed."""
        return missing(self.package) or missing("onnx") or missing("onnx-ir")

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """Writes the graph and its weights."""
        path = _graph(work, dtype)
        if (path / "genai_config.json").is_file():
            return False
        asked = {"-i": folder, "-o": path, "-p": "fp32", "-e": "cpu", "-c": work / "onnx-cache"}
        words = [str(word) for pair in asked.items() for word in pair]
        # in a process of its own: what building takes is not the engine's memory
        done = subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", *words], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the model builder fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return True

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads the graph."""
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(_graph(work, dtype)))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = onnxruntime_genai.Model(config)

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """It has no early exit."""
        return []

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        import numpy
        from onnxruntime_genai import Generator, GeneratorParams

        assert draft is None
        tokens, first = list[int](), 0.0
        asked = GeneratorParams(self._model)
        asked.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
        generator = Generator(self._model, asked)
        given = numpy.array([list(prompt)], numpy.int32)
        began = time.perf_counter()
        generator.append_tokens(given)
        for _ in range(new_tokens):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or time.perf_counter() - began
            # an end of text, which it always stops at: told that it is given, it goes on
            if generator.is_done() and len(tokens) < new_tokens:
                generator.append_tokens(numpy.array([tokens[-1:]], numpy.int32))
        return PeerRun(tokens=tokens, first=first, first_tokens=1, total=time.perf_counter() - began, rounds=new_tokens)


def _graph(work: Path, dtype: str) -> Path:
    return work / f"onnx-{dtype}"
