"""Text in, text out: a checkpoint with its tokenizer.

Knows prompts, text and the ends of generation; leaves layers to `model` and rounds to `decode`. Prints nothing.

Threads: calls on one `LLM` from several threads, and streams read in turns, are safe. Rounds are serialised by a lock
and each call has rows of its own, so every call gets the text it would get alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerskip.decode.batch import Batch
from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import Assistant, Lookup
from layerskip.decode.drafters.shortlist import rank
from layerskip.decode.pool import Pool
from layerskip.decode.randomness import new_seed, sample_seed
from layerskip.decode.request import Request, Round
from layerskip.decode.sampling import Sampling
from layerskip.decode.scoring import ExitScore, Pair, score, score_continuations
from layerskip.decode.text import TextStream
from layerskip.decode.text import Tokenizer as TextTokenizer
from layerskip.errors import CapacityError, LayerSkipError, RequestError, check_whole
from layerskip.llm.completion import Chunk, Completion, Mode, Stream
from layerskip.llm.drafters import assistant, named
from layerskip.llm.prompts import Prompt, is_one, plain, stop_strings
from layerskip.llm.recommended import Recommended
from layerskip.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLM:
    """A loaded checkpoint that generates and scores text.

    Args:
        decoder: its layers.
        tokenizer: its tokenizer, as transformers loads it.
        eos: ids that end a text.
        name: what messages call it.
        max_batch: rows that decode side by side; further prompts wait for a row to finish.
        recommended: the draft its checkpoint recommends.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Sequence[int] = (),
        name: str = "model",
        max_batch: int = 16,
        recommended: Recommended | None = None,
    ) -> None:
        check_whole("max_batch", max_batch)
        if max_batch < 1:
            raise RequestError(f"max_batch {max_batch} is not possible; use 1 or more")
        self.decoder, self.tokenizer, self.eos, self.name = decoder, tokenizer, tuple(eos), name
        self.max_batch, self.recommended = max_batch, recommended
        self._pool: Pool | None = None
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        shape = self.decoder.shape
        return f"LLM({self.name!r}, {shape.layers} layers, {self.decoder.dtype}, {self.decoder.device})"

    # -- generation

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        draft: Drafter | str | None = None,
        exit: int | None = None,
        sampling: Sampling | None = None,
        n: int = 1,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> Completion | list[Completion]:
        """Generates to the end.

        Args:
            prompt: a text or its token ids, or a list of such.
            draft: what drafts: `EarlyExit(3)`, `Lookup()`, `Auto()`, `llm.assistant(path)`, or the same in words as on
                the command line ("auto", "early-exit:3", "lookup", "cascade:3", "assistant:PATH", which is loaded
                anew). None decodes plainly. Changes speed only.
            exit: stop after so many layers: plain early exit, lossy. None uses all layers.
            sampling: how tokens are chosen; None is greedy.
            n: samples per prompt.
            max_tokens: tokens generated at most; the context may end it sooner. The cache is made for all of them.
            min_tokens: neither end of sequence nor stop string before so many.
            stop: strings that end the text; they are left out of it.
            ignore_eos: go on after end of sequence.
            logprobs: report log-probabilities, with so many alternatives (0 for none).
            prompt_logprobs: report them for the prompt too.

        Returns:
            One completion for a single prompt with n=1, else a list in the order of the prompts, samples side by side.

        Raises:
            RequestError: an argument cannot be served.
            CapacityError: the cache does not fit in memory.
            NumericalError: the model's logits are not finite. The other rows are finished first; what there is of all
                of them is in the error's `completions`.
        """
        stream = self.stream(
            prompt,
            draft=draft,
            exit=exit,
            sampling=sampling,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        try:
            with stream:
                for _ in stream:
                    pass
        except LayerSkipError as error:
            error.completions = stream.completions
            raise
        return stream.completions[0] if n == 1 and is_one(plain(prompt)) else stream.completions

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        draft: Drafter | str | None = None,
        exit: int | None = None,
        sampling: Sampling | None = None,
        n: int = 1,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> Stream:
        """Generates round by round; arguments and errors are those of `generate`, and bad ones are refused here, at
        once.

        Returns:
            A `Stream` of chunks, one per row and round.
        """
        check_whole("n", n)
        if n < 1:
            raise RequestError(f"n {n} is not possible; use 1 or more samples")
        sampling = sampling or Sampling()
        requests = []
        if not isinstance(sampling, Sampling):
            raise RequestError(f"sampling {sampling!r} is not possible; use layerskip.Sampling(...)")
        for ids in self.encode_all(prompt):
            seed = new_seed() if sampling.seed is None else sampling.seed
            for sample in range(n):
                requests.append(
                    Request(
                        ids,
                        max_tokens,
                        min_tokens=min_tokens,
                        eos=() if ignore_eos else self.eos,
                        sampling=replace(sampling, seed=sample_seed(seed, sample)),
                        logprobs=logprobs,
                        prompt_logprobs=prompt_logprobs,
                    )
                )
        stops = stop_strings(stop)
        drafter = self.drafter(draft) if isinstance(draft, str) else self._with_ids(draft)
        with self._lock:
            if self._pool is None:
                self._pool = Pool(self.decoder.cache(rows=1, slots=64))
            batch = Batch(self.decoder, self._pool, drafter=drafter, exit=exit)
            for request in requests:
                batch.check(request)
        mode: Mode = "exact" if batch.lossless else "lossy"
        completions = [Completion(list(request.ids), mode) for request in requests]
        decoding = cast(TextTokenizer, self.tokenizer)  # given one sequence, it returns one text
        texts = [TextStream(decoding, prompt=request.ids, stops=stops, min_tokens=min_tokens) for request in requests]
        return Stream(self._rounds(batch, requests, texts, completions), completions)

    def _rounds(
        self,
        batch: Batch,
        requests: Sequence[Request],
        texts: Sequence[TextStream],
        completions: list[Completion],
    ) -> Iterator[Chunk]:
        waiting = deque(range(len(requests)))
        index: dict[int, int] = {}
        error: LayerSkipError | None = None
        try:
            while waiting or len(batch):
                chunks = []
                with self._lock:
                    for key, i in self._join(batch, waiting, requests):
                        index[key] = i
                        completions[i].prompt_logprobs = batch.prompt_logprobs(key)
                    for done in batch.round():
                        if done.error is not None:
                            error = error or done.error
                            completions[index[done.key]].finish_reason = "error"
                        else:
                            chunks.append(self._chunk(batch, done, index[done.key], texts[index[done.key]]))
                for chunk in chunks:
                    completions[chunk.index].add(chunk)
                yield from chunks
            if error is not None:
                raise error
        finally:
            with self._lock:
                batch.close()

    def _join(self, batch: Batch, waiting: deque[int], requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """Lets in as many of the waiting requests as there are rows and memory for; yields (key, request)."""
        room = min(len(waiting), self.max_batch - len(batch))
        while room:
            joining = [waiting[i] for i in range(room)]
            try:
                keys = batch.join([requests[i] for i in joining])
            except CapacityError:
                # fewer side by side; a single one waits for those that run
                if room == 1 and not len(batch):
                    raise
                room //= 2
                continue
            for key in keys:
                yield key, waiting.popleft()
            return

    def _chunk(self, batch: Batch, done: Round, index: int, text: TextStream) -> Chunk:
        """Turns a round into text; a stop string found ends the row there."""
        visible = done.tokens[:-1] if done.finish == "stop" else done.tokens  # an end-of-sequence id is no text
        first = text.push(visible[: done.accepted])
        second = text.push(visible[done.accepted :])
        kept, finish, stop = first.tokens + second.tokens, done.finish, second.stop
        accepted_text, rest = first.text, second.text
        if stop is not None:
            finish = "stop"
            if done.finish is None:
                batch.leave(done.key)
        elif done.finish:
            last = text.flush()
            kept, stop, rest = len(done.tokens), last.stop, rest + last.text
            finish = "stop" if stop is not None else done.finish
        tokens = done.tokens[:kept]
        return Chunk(
            index=index,
            text=accepted_text + rest,
            accepted_text=accepted_text,
            tokens=tokens,
            accepted=min(done.accepted, kept),
            drafted=done.drafted,
            depths=done.depths,
            logprobs=done.logprobs[:kept] if done.logprobs is not None else None,
            finish_reason=finish,
            stop=stop,
            seconds=(done.seconds.draft, done.seconds.verify, done.seconds.rest),
        )

    # -- prompts

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, with the special tokens the tokenizer adds; an empty text is BOS alone.

        Raises:
            RequestError: an empty prompt for a tokenizer without BOS, or a text that is not valid Unicode.
        """
        prompt = plain(prompt)
        if not isinstance(prompt, str):
            ids = [index(token) for token in prompt]
        else:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"the prompt is not valid text: {error.reason} at character {error.start}"
                ) from error
            ids = list(self.tokenizer(prompt)["input_ids"])
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise RequestError("the prompt is empty and this tokenizer has no BOS token to begin with; give some text")
        return ids

    def encode_all(self, prompt: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Token ids of one prompt or of several. Raises RequestError where there is none, or one cannot be encoded."""
        prompt = plain(prompt)
        if is_one(prompt):
            return [self.encode(prompt)]  # type: ignore[arg-type]  # is_one says so
        if not prompt:
            raise RequestError("no prompt given; give at least one")
        return [self.encode(one) for one in prompt]  # type: ignore[arg-type]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role": ..., "content": ...} each), ready for the assistant's turn.

        Raises:
            RequestError: the tokenizer has no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise RequestError(f"{self.name} has no chat template; generate from a plain prompt instead")
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise RequestError(f"the chat template of {self.name} refuses these messages: {error}") from error
        return list(ids)

    # -- scoring

    def score(self, text: Prompt, *, exit: int | None = None) -> ExitScore:
        """Log-likelihood of a text, token by token, at any exit.

        Raises:
            RequestError: an exit outside the model, or a text of fewer than two tokens or longer than the context.
        """
        exit = self.decoder.shape.layers if exit is None else exit
        return self.score_exits(text, exits=[exit])[0]

    def score_exits(self, text: Prompt, *, exits: Sequence[int] | None = None) -> list[ExitScore]:
        """`score` at several exits (None is all of them) in one pass."""
        ids = self.encode(text)
        with self._lock:
            return score(self.decoder, ids, exits=range(1, self.decoder.shape.layers + 1) if exits is None else exits)

    def score_continuations(self, pairs: Sequence[Pair], *, exit: int | None = None) -> list[ExitScore]:
        """Scores continuations after their contexts, `max_batch` of them side by side.

        Args:
            pairs: token ids of a context and of what continues it, each.
            exit: stop after so many layers; None uses all.

        Returns:
            For each pair the score of its continuation alone.

        Raises:
            RequestError: an exit outside the model, an empty context or continuation, or a pair that is too long.
            NumericalError: the model's logits are not finite.
            CapacityError: the cache does not fit in memory.
        """
        exit = self.decoder.shape.layers if exit is None else exit
        with self._lock:
            return score_continuations(self.decoder, pairs, exit=exit, rows=self.max_batch)

    # -- drafters

    def drafter(
        self,
        words: str,
        *,
        tokens: int | None = None,
        confidence: float | None = None,
        length: str | None = None,
        vocabulary: int | str | None = None,
        ranked: Sequence[int] | None = None,
        head: str | None = None,
    ) -> Drafter | None:
        """The drafter that words name: "auto", "none", "early-exit:E", "lookup", "cascade:E" or "assistant:PATH".

        Args:
            words: as on the command line; "early-exit" and "cascade" alone exit where the checkpoint recommends it.
            tokens: K, the most tokens drafted in a round; None is the drafter's own default.
            confidence: stop a draft where the drafter is less sure than this (early-exit, cascade and assistant).
            length: how long they draft: "fixed", "thompson" or "gain"; None is fixed.
            vocabulary: propose only so many tokens (early-exit, cascade and auto). "auto" is what the checkpoint
                recommends, else what fits into 1.5% of its weights, if that leaves out more than half; 0 is all; None
                is what the checkpoint recommends where it chooses the exit as well, else all.
            ranked: tokens by frequency for that, as from `rank`; None is what the checkpoint has.
            head: what they predict through (early-exit, cascade and auto): "own", or "int8", a copy at 8 bits, which
                takes native weights and all tokens. "auto" is what the checkpoint recommends, else own; None is the
                same where the checkpoint chooses the exit as well, else own. A recommended head is own where weights
                are not native or a vocabulary is asked for, and a recommended vocabulary steps back for "int8".

        Raises:
            RequestError: no such drafter, or a value out of range.
            CheckpointError: the assistant cannot be loaded.
        """
        return named(
            self,
            words,
            tokens=tokens,
            confidence=confidence,
            length=length,
            vocabulary=vocabulary,
            ranked=ranked,
            head=head,
        )

    def assistant(
        self,
        path_or_id: str | Path,
        *,
        tokens: int | None = None,
        confidence: float | None = None,
        length: str = "fixed",
    ) -> Assistant:
        """A drafter that runs a second checkpoint of the same tokenizer, in this model's precision and place.

        Raises:
            CheckpointError: it cannot be loaded.
            RequestError: its tokenizer differs, or a value is out of range.
        """
        return assistant(self, path_or_id, tokens=tokens, confidence=confidence, length=length)

    def rank(self, text: str) -> list[int]:
        """Token ids of a text, the most frequent first: for `ranked` of drafters with a draft vocabulary."""
        return rank(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_ids(self, draft: Drafter | None) -> Drafter | None:
        if isinstance(draft, Lookup) and isinstance(draft.predicted, str):
            ids = self.tokenizer(draft.predicted, add_special_tokens=False)["input_ids"]
            return Lookup(tokens=draft.tokens, ngram=draft.ngram, predicted=ids)
        return draft
