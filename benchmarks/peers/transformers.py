"""transformers: `generate`, and `generate` with `assistant_early_exit`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.peers.peer import FLOATS, Draft, PeerRun, missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIDENCE = 0.4
"""transformers' own threshold for ending a draft; tried beside none at all."""


class Arrivals:
    """A streamer that notes when tokens come. The first thing it is given is the prompt."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.found: list[tuple[float, int]] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes up the tokens of a round."""
        if not self._prompt:
            self.found.append((time.perf_counter() - self.began, value.numel()))
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """A `LlamaForCausalLM` in eager mode with its default attention."""

    package = "transformers"
    dtypes = FLOATS

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def available(self) -> str | None:
        """Whether it is installed."""
        return missing(self.package)

    def prepare(self, folder: Path, *, dtype: str, work: Path) -> bool:
        """It reads the folder's own files."""
        return False

    def load(self, folder: Path, *, dtype: str, threads: int, work: Path) -> None:
        """Loads the folder."""
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        settings = model.generation_config
        settings.eos_token_id = None  # nothing ends a text early
        settings.pad_token_id = 0
        settings.num_assistant_tokens_schedule = "constant"
        self._model = model

    def drafts(self, *, exit: int, tokens: Sequence[int]) -> list[Draft]:
        """Every number of tokens, with its own threshold for ending a draft and with none."""
        return [Draft(exit, count, confidence) for count in tokens for confidence in (None, CONFIDENCE)]

    def run(self, prompt: Sequence[int], *, new_tokens: int, draft: Draft | None = None) -> PeerRun:
        """Continues a prompt."""
        assert self._model is not None
        asked: dict[str, int] = {}
        if draft is not None:
            # the drafting side reads the model's settings, not the call's
            self._model.generation_config.num_assistant_tokens = draft.tokens
            self._model.generation_config.assistant_confidence_threshold = draft.confidence or 0.0
            asked["assistant_early_exit"] = draft.exit
        ids = torch.tensor([list(prompt)])
        streamer = Arrivals()
        with torch.inference_mode():
            out: torch.Tensor = self._model.generate(  # type: ignore[operator]  # a method, whatever its stubs say
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer,
                **asked,
            )
        total = time.perf_counter() - streamer.began
        first, first_tokens = streamer.found[0]
        return PeerRun(
            tokens=out[0, ids.shape[1] :].tolist(),
            first=first,
            first_tokens=first_tokens,
            total=total,
            rounds=len(streamer.found),
        )
