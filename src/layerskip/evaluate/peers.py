"""Hugging Face's own generation over the same checkpoint, as others that run in turns with ours.

Knows transformers' `generate`. Does not know how ours decodes, nor what is compared.

- `transformers`: greedy `generate`, in groups of `batch` prompts padded on the left; a group waits for its longest.
- `transformers-early-exit`: `generate(assistant_early_exit=E)`, LayerSkip as transformers has it: batch 1 only.

Tokens are the ids that `generate` emitted, up to and with end of sequence; what pads a finished row is none. A streamer
notes when they came.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from layerskip.errors import CheckpointError, RequestError, suggest
from layerskip.evaluate.cell import Contender
from layerskip.evaluate.contest import Settings, Texts
from layerskip.evaluate.ticks import Tick
from layerskip.llm import LLM

TRANSFORMERS, EARLY_EXIT = "transformers", "transformers-early-exit"
PEERS = (TRANSFORMERS, EARLY_EXIT)


def check_peers(names: Sequence[str]) -> None:
    """Raises RequestError for a name that is no peer's."""
    for name in names:
        if name not in PEERS:
            raise RequestError(f"unknown peer {name!r}; use {' or '.join(PEERS)}{suggest(name, PEERS)}")


class Transformers:
    """The checkpoint as transformers loads it; its peers share the one model.

    Args:
        folder: the checkpoint.
        llm: the same as we hold it: its dtype, its place, its ends of sequence.

    Raises:
        CheckpointError: transformers cannot load it.
    """

    def __init__(self, folder: Path, llm: LLM) -> None:
        self.eos, self.context = list(llm.eos), llm.decoder.shape.context
        self.device = llm.decoder.device
        with quiet():
            try:
                model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=llm.decoder.dtype)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(f"transformers cannot load {folder}: {reason}") from error
        self.model = model.to(self.device).eval()

    def limitation(self, settings: Settings, longest: int) -> str | None:
        """Why `generate` cannot be compared with these settings, in one line; None where it can.

        Args:
            settings: what all have in common.
            longest: tokens of the longest prompt.
        """
        if settings.stop:
            return "generate stops at strings elsewhere, so tokens would not be those of the same text"
        if longest + settings.max_tokens > self.context:
            return (
                f"generate goes on past the context of {self.context} tokens, and the longest prompt has {longest}; "
                f"use --max-tokens {self.context - longest} or less"
            )
        return None

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Settings, clock: Clock, *, exit: int | None
    ) -> list[list[int]]:
        """Decodes one group side by side, greedily; returns the tokens of each."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        eos = [] if settings.ignore_eos else self.eos
        clock.begin(len(prompts), eos)
        with torch.inference_mode():
            self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                streamer=clock,
                max_new_tokens=settings.max_tokens,
                eos_token_id=eos or None,
                assistant_early_exit=exit,
            )
        return clock.tokens

    @contextlib.contextmanager
    def configured(self, draft_tokens: int | None) -> Iterator[None]:
        """Greedy generation and nothing else that the checkpoint asks for, such as sampling.

        How much to draft is read from the model's own settings, whatever the call says: so many tokens a round, without
        the schedule and the confidence stop that transformers has by default.
        """
        config = GenerationConfig(do_sample=False, pad_token_id=0)
        if draft_tokens is not None:
            config.num_assistant_tokens = draft_tokens
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
        before, layers = self.model.generation_config, self.model.config.num_hidden_layers
        self.model.generation_config = config
        try:
            with quiet():
                yield
        finally:
            self.model.generation_config = before
            self.model.config.num_hidden_layers = layers  # an early exit that is interrupted leaves the model cut


class Peer:
    """One of transformers' ways.

    Args:
        engine: the model.
        who: what reports say of it; where it has an exit, its first layers draft.
    """

    def __init__(self, engine: Transformers, who: Contender) -> None:
        self.engine, self._who = engine, who

    @property
    def who(self) -> Contender:
        """What reports say of it."""
        return self._who

    def limitation(self, prompts: Sequence[Sequence[int]], settings: Settings) -> str | None:
        """Why it cannot be compared with these settings, in one line; None where it can."""
        if self.who.exit is not None and settings.batch > 1:
            return f"transformers drafts for one row only, not for a batch of {settings.batch}"
        return self.engine.limitation(settings, max(map(len, prompts)))

    def check(self, prompts: Sequence[Sequence[int]], settings: Settings) -> None:
        """Raises RequestError where it cannot be compared."""
        reason = self.limitation(prompts, settings)
        if reason is not None:
            raise RequestError(f"{self.who.name} cannot run: {reason}")

    def run(self, prompts: Sequence[Sequence[int]], settings: Settings) -> Texts:
        """Decodes all prompts in groups of `settings.batch`."""
        clock = Clock()
        tokens: list[list[int]] = []
        with self.engine.configured(self.who.draft_tokens):
            for first in range(0, len(prompts), settings.batch):
                group = prompts[first : first + settings.batch]
                tokens += self.engine.generate(group, settings, clock, exit=self.who.exit)
        return Texts(tokens, clock.ticks, clock.ticks[-1].ended)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and advice: they would be timed, and stand between results."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def plain(engine: Transformers) -> Peer:
    """Plain greedy generation."""
    return Peer(engine, Contender(TRANSFORMERS, peer=True))


def early_exit(engine: Transformers, *, exit: int, draft_tokens: int) -> Peer:
    """Drafts with the first layers, always so many tokens."""
    name = f"{EARLY_EXIT}:{exit} K={draft_tokens}"
    return Peer(engine, Contender(name, peer=True, exit=exit, draft_tokens=draft_tokens))


class Clock(BaseStreamer):
    """Notes what `generate` emits, and when.

    Args:
        now: the clock.

    Attributes:
        ticks: its steps so far, over all groups.
        tokens: what each row of the group emitted.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._zero = now, now()
        self._eos: frozenset[int] = frozenset()
        self._open: set[int] = set()
        self._first, self._prompt, self._new, self._began = 0, True, True, 0.0
        self.ticks: list[Tick] = []
        self.tokens: list[list[int]] = []

    def begin(self, rows: int, eos: Sequence[int]) -> None:
        """A new group of rows, which end with any of `eos`."""
        self._first += len(self.tokens)
        self.tokens = [[] for _ in range(rows)]
        self._open = set(range(rows))
        self._eos, self._prompt, self._new = frozenset(eos), True, True
        self._began = self._now() - self._zero

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then what every step emits: one token for each row, or several for a single one."""
        if self._prompt:
            self._prompt = False
            return
        rows = value.tolist() if value.dim() > 1 else [[token] for token in value.tolist()]
        gained: dict[int, int] = {}
        for row in sorted(self._open):
            kept = self._kept(rows[row])
            self.tokens[row] += kept
            gained[self._first + row] = len(kept)
        ended = frozenset(row for row in self._open if self.tokens[row][-1] in self._eos)
        self._open -= ended
        if gained:
            came = self._now() - self._zero
            new = frozenset(gained) if self._new else frozenset()
            finished = frozenset(self._first + row for row in ended)
            self.ticks.append(Tick(self._began, came, gained, new, finished))
            self._began, self._new = came, False

    def end(self) -> None:
        """Nothing is left to do."""

    def _kept(self, tokens: list[int]) -> list[int]:
        for place, token in enumerate(tokens, 1):
            if token in self._eos:
                return tokens[:place]
        return tokens
