"""From logits to the target law, and draws from a law.

Knows settings, prefixes and probabilities; knows no model. The target law is fixed here, once, for every position:
what a drafter proposes never enters it. Sizes: B rows, T positions scored, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip.errors import RequestError, check_ids, check_number, check_whole

_FEW = 256  # tokens that nearly always hold more than top_p

Processor = Callable[[Tensor, Tensor], Tensor]
"""(token ids so far (n,), logits (V,)) -> logits (V,). Must depend on its arguments only: it runs once per drafted
prefix."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Applied in transformers' order and meaning: logit bias, repetition, presence and frequency penalties, banned
    tokens, your processors; then temperature, top-k, top-p, min-p. Penalties see the prompt, what was generated, and
    the drafted prefix.

    Args:
        temperature: 0 is greedy (a one-hot law); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it, in (0, 1]; ties with its last
            one stay.
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
        repetition_penalty: > 1 makes tokens already present less likely (Keskar et al., 2019: positive logits are
            divided, negative ones multiplied).
        presence_penalty: subtracted once from the logit of a token already present.
        frequency_penalty: subtracted from a token's logit for each time it is present.
        logit_bias: token id -> what is added to its logit.
        banned: token ids that are never produced.
        seed: makes the text repeatable; None draws one. The same prompt with the same seed gives the same text, also
            twice in one batch: ask for several with `n`.
        processors: functions (ids so far, logits) -> logits, run for every drafted prefix.

    Raises:
        RequestError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned: Sequence[int] = ()
    seed: int | None = None
    processors: Sequence[Processor] = ()

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise RequestError(f"{name} {getattr(self, name)} is not allowed; use {allowed}")

        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name))
        check_whole("top_k", self.top_k)
        if self.seed is not None:
            check_whole("seed", self.seed)
        need(0 <= self.temperature < math.inf, "temperature", "0 (greedy) or more")
        need(self.top_k >= 0, "top_k", "0 (all tokens) or more")
        need(0 < self.top_p <= 1, "top_p", "more than 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "0 to 1")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "more than 0 (1 is none)")
        need(math.isfinite(self.presence_penalty), "presence_penalty", "a finite number (0 is none)")
        need(math.isfinite(self.frequency_penalty), "frequency_penalty", "a finite number (0 is none)")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias {self.logit_bias!r} is not possible; use a mapping of token ids to numbers")
        for name, kind in (("banned", "token ids"), ("processors", "functions")):
            if not isinstance(getattr(self, name), Collection) or isinstance(getattr(self, name), str | bytes):
                raise RequestError(f"{name} {getattr(self, name)!r} is not possible; use a list of {kind}")
        for token in (*self.banned, *self.logit_bias):
            check_whole("token", token)
        for token, bias in self.logit_bias.items():
            check_number(f"logit_bias of token {token}", bias)
            if math.isnan(bias) or bias == math.inf:
                raise RequestError(f"logit_bias {bias} of token {token} is not allowed; use a number below infinity")

    @property
    def counts_tokens(self) -> bool:
        """Whether the law depends on which tokens the prefix holds."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Chosen:
    """Laws with all probability on one token each, held as those tokens: what temperature 0 leaves.

    Args:
        tokens: (B, T).
        broken: (B, T) bool, where the largest logit is not finite: no law is there.
    """

    tokens: Tensor
    broken: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Chosen:
        """The first of the largest logits (B, T, V) at each place."""
        largest, tokens = logits.max(-1)
        return cls(tokens, ~largest.isfinite())

    def dense(self, vocab: int) -> Tensor:
        """The same laws as (B, T, V) probabilities; where there is none its place holds NaN."""
        ones = torch.where(self.broken, torch.nan, 1.0)[..., None]
        return torch.zeros(*self.tokens.shape, vocab, device=ones.device).scatter_(-1, self.tokens[..., None], ones)


Laws = Tensor | Chosen
"""Probabilities (B, T, V), or the tokens that have all of them."""


class Law:
    """The target laws of a batch's rows: what each next token is drawn from, given its prefix.

    Holds the settings of B rows as tensors and, where penalties ask for it, the counts of tokens in each row.

    Args:
        samplings: one per row.
        vocab: V.
        ids: the tokens each row knows (prompt and generated).
        stops: per row, end-of-sequence ids, banned while the prefix is shorter than `floors`.
        floors: per row, the length below which `stops` are banned.
        device: where logits will be.

    Raises:
        RequestError: a token id in a bias or ban is outside the vocabulary.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        vocab: int,
        *,
        ids: Sequence[Sequence[int]],
        stops: Sequence[Sequence[int]] | None = None,
        floors: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samplings, self.vocab, self.device = list(samplings), vocab, torch.device(device)
        self.ids = ids
        self.stops = stops if stops is not None else [()] * len(self.samplings)
        self.floors = floors if floors is not None else [0] * len(self.samplings)
        self.greedy = all(s.temperature == 0 for s in self.samplings)
        self._columns: dict[str, Tensor] = {}
        self._bias = self._static_bias()
        self._counts = self._count() if any(s.counts_tokens for s in self.samplings) else None
        self._processed = any(s.processors for s in self.samplings)
        drawn = [s for s in self.samplings if s.temperature]
        self._top_k = min(max((s.top_k for s in drawn), default=0), vocab)
        self._top_p, self._min_p = any(s.top_p < 1 for s in drawn), any(s.min_p for s in drawn)

    def __call__(self, logits: Tensor, drafted: Tensor, ancestors: Tensor) -> Laws:
        """The laws at T prefixes of every row.

        Args:
            logits: (B, T, V) raw.
            drafted: (B, K) tokens drafted beyond the ids each row knows.
            ancestors: (T, K) or (B, T, K) bool: which drafted tokens belong to the prefix of each position.

        Returns:
            (B, T, V) probabilities, float32 (float64 for float64 logits); `Chosen` where every row is greedy.

        Example:
            >>> law = Law([Sampling(temperature=1.0, frequency_penalty=1000.0)], 3, ids=[[0]])
            >>> drafted, ancestors = torch.tensor([[1]]), torch.tensor([[False], [True]])
            >>> law(torch.zeros(1, 2, 3), drafted, ancestors)
            tensor([[[0.0000, 0.5000, 0.5000],
                     [0.0000, 0.0000, 1.0000]]])
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if ancestors.dim() == 2:
            ancestors = ancestors.expand(logits.shape[0], -1, -1)
        if self._bias is not None:
            logits = logits + self._bias.to(logits.dtype)
        if self._counts is not None:
            logits = self._penalise(logits, self._counts, drafted, ancestors)
        if any(len(ids) < floor for ids, floor in zip(self.ids, self.floors, strict=True)):
            logits = self._ban_stops(logits, ancestors)
        if self._processed:
            logits = self._process(logits, drafted, ancestors)
        if self.greedy:
            return Chosen.of(logits)
        return self._shape(logits)

    @property
    def largest(self) -> bool:
        """Whether every row takes the token of its largest raw logit, here and at every prefix from here on."""
        plain = self.greedy and self._bias is None and self._counts is None and not self._processed
        return plain and not any(len(ids) < floor for ids, floor in zip(self.ids, self.floors, strict=True))

    def extend(self, emitted: Sequence[Sequence[int]]) -> None:
        """Notes the tokens each row emitted (the caller extends `ids` itself)."""
        if self._counts is not None:
            for counts, tokens in zip(self._counts, emitted, strict=True):
                for token in tokens:
                    counts[token] += 1

    def _column(self, name: str) -> Tensor:
        """One setting of every row, (B, 1, 1) float64: rounded where it is used, as a Python number would be."""
        if name not in self._columns:
            values = [float(getattr(s, name)) for s in self.samplings]
            self._columns[name] = torch.tensor(values, dtype=torch.float64, device=self.device)[:, None, None]
        return self._columns[name]

    def _static_bias(self) -> Tensor | None:
        if not any(s.logit_bias or s.banned for s in self.samplings):
            return None
        bias = torch.zeros(len(self.samplings), 1, self.vocab, device=self.device)
        for row, s in enumerate(self.samplings):
            for token, value in [*s.logit_bias.items(), *((t, -math.inf) for t in s.banned)]:
                check_ids([token], vocab=self.vocab)
                bias[row, 0, token] += value
        return bias

    def _count(self) -> Tensor:
        rows = [torch.tensor(ids, dtype=torch.long).bincount(minlength=self.vocab) for ids in self.ids]
        return torch.stack(rows).to(self.device)

    def _penalise(self, logits: Tensor, counts: Tensor, drafted: Tensor, ancestors: Tensor) -> Tensor:
        seen = counts[:, None].expand(-1, logits.shape[1], -1).to(logits.dtype)
        if drafted.shape[1]:
            index = drafted[:, None].expand(-1, logits.shape[1], -1)  # (B, T, K)
            seen = seen.scatter_add(2, index, ancestors.to(logits.dtype))
        present = seen > 0
        factor = self._column("repetition_penalty").to(logits.dtype)
        penalised = torch.where(logits < 0, logits * factor, logits / factor)
        logits = torch.where(present, penalised, logits)
        presence = self._column("presence_penalty").to(logits.dtype)
        frequency = self._column("frequency_penalty").to(logits.dtype)
        return logits - presence * present - frequency * seen

    def _ban_stops(self, logits: Tensor, ancestors: Tensor) -> Tensor:
        logits = logits.clone()
        for row, (ids, stops, floor) in enumerate(zip(self.ids, self.stops, self.floors, strict=True)):
            short = len(ids) + ancestors[row].sum(-1) < floor  # (T,)
            for token in stops:
                logits[row, :, token] = torch.where(short, -torch.inf, logits[row, :, token])
        return logits

    def _process(self, logits: Tensor, drafted: Tensor, ancestors: Tensor) -> Tensor:
        logits = logits.clone()
        for row, s in enumerate(self.samplings):
            known = torch.tensor(self.ids[row], dtype=torch.long, device=logits.device)
            for t in range(logits.shape[1]) if s.processors else ():
                prefix = torch.cat((known, drafted[row][ancestors[row, t]]))
                for processor in s.processors:
                    found = processor(prefix, logits[row, t])
                    if not isinstance(found, Tensor) or found.shape != logits[row, t].shape:
                        raise RequestError(
                            f"processor {processor!r} returned {getattr(found, 'shape', found)!r}; return the logits "
                            f"of all {self.vocab} tokens"
                        )
                    logits[row, t] = found
        return logits

    def _shape(self, logits: Tensor) -> Tensor:
        """Temperature, then top-k, top-p, min-p, each over what the one before it left."""
        temperature = self._column("temperature").to(logits.dtype)
        # shifted to a largest score of 0, so that a tiny temperature gives -inf and never inf - inf
        scores = (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1)
        if self._top_k:
            scores = self._cut_top_k(scores)
        if self._top_p:
            scores = self._cut_top_p(scores)
        if self._min_p:  # the largest score is 0
            scores = scores.masked_fill(scores < self._column("min_p").log().to(scores.dtype), -torch.inf)
        law = scores.softmax(-1)
        if any(s.temperature < 1e-30 for s in self.samplings):  # far below float32's range it is 0 as well
            law = torch.where(temperature > 0, law, Chosen.of(logits).dense(self.vocab).to(law.dtype))
        return law

    def _cut_top_k(self, scores: Tensor) -> Tensor:
        top_k = self._column("top_k").long().clamp(max=self.vocab)
        likeliest = scores.topk(self._top_k).values
        least = likeliest.gather(-1, (top_k - 1).clamp(min=0).expand(-1, scores.shape[1], -1))
        return scores.masked_fill((scores < least) & (top_k > 0), -torch.inf)  # ties with the k-th stay in

    def _cut_top_p(self, scores: Tensor) -> Tensor:
        """Keeps the likeliest tokens up to the one with which their probabilities reach top_p, and ties with it.

        Sorting a whole vocabulary takes longer than a small model's pass, and few tokens hold nearly all: where it
        costs nothing to ask, only those are sorted. Their sums are the same, so the law is.
        """
        law = scores.softmax(-1)
        top_p = self._column("top_p").to(scores.dtype)
        widths = (_FEW, self.vocab) if scores.device.type == "cpu" and self.vocab > _FEW else (self.vocab,)
        for width in widths:
            likeliest = law.topk(width).values
            sums = likeliest.cumsum(-1)
            if width == self.vocab or bool(((sums[..., -1:] >= top_p) | (top_p == 1)).all()):
                break
        last = (sums < top_p).sum(-1, keepdim=True).clamp(max=width - 1)
        return scores.masked_fill((law < likeliest.gather(-1, last)) & (top_p < 1), -torch.inf)


def draw(law: Laws, uniform: Tensor) -> Tensor:
    """Draws a token from each law by inverting its cumulative distribution.

    Args:
        law: (..., V) non-negative weights; they need not sum to one. `Chosen` laws give their tokens.
        uniform: (...) numbers in [0, 1).

    Returns:
        (...) token ids; a token of weight zero is never drawn.

    Example:
        >>> draw(torch.tensor([0.0, 0.25, 0.0, 0.75]), torch.tensor(0.3))
        tensor(3)
    """
    if isinstance(law, Chosen):
        return law.tokens
    sums = law.cumsum(-1)
    target = uniform[..., None].to(sums.dtype) * sums[..., -1:]
    # rounding may lift the target to the total itself; the first slot that reaches the total has weight
    last = (sums < sums[..., -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums, target, right=True), last)[..., 0]
