"""A model as lm-evaluation-harness sees it: log-likelihoods at any exit, and generation with any drafter.

Knows requests of the harness and their truncation, which are as in its own transformers models. Does not know tasks
or metrics.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from layerskip.decode.acceptance import Acceptance
from layerskip.decode.draft import Drafter
from layerskip.errors import RequestError, check_exit
from layerskip.evaluate.follow import follow, fresh
from layerskip.evaluate.harness.settings import MAX_TOKENS, Generation, read_settings
from layerskip.llm import LLM

Scored = tuple[Any, list[int], list[int]]
"""What was asked, and the tokens of a context and of its continuation."""


class LayerSkipLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no annotations
    """A model for `lm_eval.simple_evaluate(model=...)`.

    An exit changes what every task measures: it is lossy. A drafter changes the speed of generation only: it is exact,
    and log-likelihoods do not use it.

    Args:
        llm: the model.
        exit: score and generate with so many layers; None uses all.
        draft: what drafts where texts are generated.
        batch: rows side by side; None is the model's own.
        seed: of sampled texts; the same text asked for twice is drawn twice.

    Raises:
        RequestError: an exit outside the model, an exit and a drafter together, or a drafter that cannot serve it.

    Attributes:
        tokens: generated so far.
        seconds: spent on scoring and generating so far.
        acceptance: of the drafter, so far.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        exit: int | None = None,
        draft: Drafter | None = None,
        batch: int | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        layers = llm.decoder.shape.layers
        if exit is not None and draft is not None:
            raise RequestError("both an exit and a drafter are given; an exit is lossy, a drafter exact: use one")
        if exit is not None:
            check_exit(exit, layers=layers)
        if draft is not None:
            draft.check(llm.decoder, exit=layers)
        self.llm = fresh(llm, batch=batch)
        self.exit = None if exit == layers else exit
        self.draft, self.seed = draft, seed
        self.tokenizer = llm.tokenizer
        self.tokens, self.seconds, self.acceptance = 0, 0.0, Acceptance()

    @property
    def mode(self) -> str:
        """exact or lossy."""
        return "exact" if self.exit is None else "lossy"

    # -- tokens

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        end = self.tokenizer.eos_token_id
        return int(end) if end is not None else self.llm.eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text: BOS, else the end of another text."""
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens of a context."""
        return self.llm.decoder.shape.context

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return MAX_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps prepared requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds unless it begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return [*map(int, self.tokenizer.encode(string, add_special_tokens=add_special_tokens))]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Raises RequestError where the tokenizer has no template, or refuses it."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise RequestError(f"{self.llm.name} has no chat template; leave --chat-template out")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in chat_history],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except TemplateError as error:
            raise RequestError(f"the chat template of {self.llm.name} refuses these messages: {error}") from error

    # -- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-likelihood in nats, and whether greedy decoding would write it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **settings: Any) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = []
        step = 16 * self.llm.max_batch  # so that a bar moves
        began = time.perf_counter()
        with _bar(len(pairs), "scoring") as bar:
            for start in range(0, len(pairs), step):
                part = pairs[start : start + step]
                scores = self.llm.score_continuations(part, exit=self.exit)
                answers += [(s.total, s.predictions == wanted) for (_, wanted), s in zip(part, scores, strict=True)]
                bar.update(len(part))
        self.seconds += time.perf_counter() - began
        for (asked, _, _), answer in zip(requests, answers, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Leaves out the beginning of a context that is too long; the last token is predicted, not run."""
        most = self.max_length + 1 - len(continuation)
        if most < 1:
            raise RequestError(
                f"a task has a continuation of {len(continuation)} tokens; this model's context holds {self.max_length}"
            )
        return context[-most:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each text its log-likelihood in nats; texts longer than the context are scored in windows of it."""
        windows: list[Scored] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    # -- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """For each (context, settings) the text that follows.

        Raises:
            RequestError: settings that cannot be served, or that leave no room for a context.
        """
        texts: dict[int, str] = {}
        with _bar(len(requests), "generating") as bar:
            for settings, draw, group in _alike(requests):
                generation = read_settings(settings)
                contexts = [requests[i].args[0] for i in group]
                texts |= zip(group, self._generate(contexts, generation, seed=self.seed + draw, bar=bar), strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generate(self, contexts: list[str], generation: Generation, *, seed: int, bar: tqdm[Any]) -> list[str]:
        room = self.max_length - generation.max_tokens
        if room < 1:
            raise RequestError(
                f"a task asks for {generation.max_tokens} generated tokens; this model's context holds "
                f"{self.max_length} with the prompt, so use a task whose max_gen_toks is below that"
            )
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # those side by side are of similar length
        stream = self.llm.stream(
            [prompts[i] for i in order],
            draft=self.draft,
            exit=self.exit,
            sampling=replace(generation.sampling, seed=seed),
            max_tokens=generation.max_tokens,
            stop=generation.stops,
        )
        done = follow(stream, see=lambda chunk: bar.update(chunk.finish_reason is not None) and None)
        if done.interrupted:
            raise KeyboardInterrupt
        self.tokens, self.seconds = self.tokens + done.tokens, self.seconds + done.total
        self.acceptance.merge(done.acceptance)
        found = dict(zip(order, done.completions, strict=True))
        return [found[i].text for i in range(len(prompts))]


def _alike(requests: Sequence[Instance]) -> Iterator[tuple[Mapping[str, Any], int, list[int]]]:
    """(settings, draw, requests) of those that can be generated together.

    A text that is asked for again, as tasks with repeats do, belongs to the next draw: equal seeds would give equal
    texts.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    before: dict[tuple[str, str], int] = defaultdict(int)
    for i, request in enumerate(requests):
        context, settings = request.args
        key = json.dumps(settings, sort_keys=True, default=str)
        groups[key, before[context, key]].append(i)
        before[context, key] += 1
    for (_, draw), group in groups.items():
        yield requests[group[0]].args[1], draw, group


def _bar(total: int, what: str) -> tqdm[Any]:
    """A bar for somebody who watches; nothing where standard error is not a terminal."""
    return tqdm(total=total, desc=what, disable=not sys.stderr.isatty())
