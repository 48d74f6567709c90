"""What the tests of the loop share: driving it, a drafter of trees, what transformers says, a chi-square test."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip.decode.batch import Batch
from layerskip.decode.draft import Draft, Drafter, Outcome, Rows
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request, Round
from layerskip.model.decoder import Decoder


def follows(counts: Tensor, law: Tensor, *, sigmas: float = 4.5) -> bool:
    """Whether `counts` may be draws from `law`, both (...), by Pearson's chi-square.

    A false alarm has the probability that a normal variable exceeds `sigmas`: 3.4e-6 at 4.5. The quantile is Wilson and
    Hilferty's (1931); outcomes expected fewer than 8 times are counted together.
    """
    counts, law = counts.flatten().double(), law.flatten().double()
    if counts[law == 0].any():
        return False
    expected = law / law.sum() * counts.sum()
    rare = expected < 8
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    used = expected > 0
    freedom = int(used.sum()) - 1
    if freedom < 1:
        return True
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + sigmas * math.sqrt(spread)) ** 3


@pytest.fixture(scope="session", name="follows")
def follows_fixture() -> Callable[..., bool]:
    """`follows(counts, law)`: whether counts may be draws from a law."""
    return follows


@dataclass
class Run:
    """What a batch produced: per request its tokens, why it ended, its rounds."""

    texts: list[list[int]] = field(default_factory=list)
    finishes: list[str | None] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)

    @property
    def drafted(self) -> int:
        return sum(len(r.drafted) for rounds in self.rounds for r in rounds)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for rounds in self.rounds for r in rounds)

    @property
    def logprobs(self) -> list[list[Any]]:
        return [[entry for r in rounds for entry in r.logprobs or ()] for rounds in self.rounds]


def finish(batch: Batch, keys: Sequence[int]) -> Run:
    """Runs rounds until the batch is empty; raises what a round reports."""
    rounds: dict[int, list[Round]] = {key: [] for key in keys}
    while len(batch):
        for done in batch.round():
            if done.error is not None:
                raise done.error
            rounds.setdefault(done.key, []).append(done)
    mine = [rounds[key] for key in keys]
    return Run([[t for r in rs for t in r.tokens] for rs in mine], [rs[-1].finish if rs else None for rs in mine], mine)


@pytest.fixture(scope="session", name="finish")
def finish_fixture() -> Callable[..., Run]:
    """`finish(batch, keys)`: what the rows of a batch produce until it is empty."""
    return finish


@pytest.fixture(scope="session")
def generate() -> Callable[..., Run]:
    """`generate(decoder, requests, drafter=..., pool=..., exit=...)`: requests side by side, to their ends."""

    def run(decoder: Decoder, requests: Sequence[Request], *, pool: Pool | None = None, **settings: Any) -> Run:
        batch = Batch(decoder, pool or Pool(decoder.cache(rows=1, slots=16)), **settings)
        return finish(batch, batch.join(requests))

    return run


def learn(after: dict[tuple[int, ...], list[int]], text: Sequence[int]) -> None:
    """Notes what follows each token and each pair of tokens, the latest last."""
    for end in range(1, len(text)):
        for words in (tuple(text[end - 1 : end]), tuple(text[max(end - 2, 0) : end])):
            after[words] = [*(t for t in after.get(words, []) if t != text[end]), text[end]]


class Tree:
    """Drafts a tree of what followed the last words before: deterministic, with the likelier sibling second.

    Args:
        tokens: nodes drafted in a round.
        corpus: tokens to learn successors from, beside each row's own.
        vocab: V.
        parents: the shape, by default a spine of second siblings: paths need slots that are not their positions.
        drifting: how successors are changed, so that some are wrong: every n-th prefix length; 0 never.
    """

    name = "tree"

    def __init__(
        self,
        corpus: Sequence[int],
        *,
        vocab: int,
        tokens: int = 7,
        parents: Sequence[int] = (0, 0, 2, 2, 4, 4, 6, 6, 8),
        drifting: int = 5,
    ) -> None:
        self.tokens, self.vocab, self.parents, self.drifting = tokens, vocab, list(parents), drifting
        self.after: dict[tuple[int, ...], list[int]] = {}
        learn(self.after, corpus)

    def check(self, decoder: Decoder, *, exit: int) -> None:
        assert decoder.shape.vocab == self.vocab

    def propose(self, rows: Rows, tokens: int) -> Draft:
        parents = self.parents[: min(tokens, self.tokens)]
        return Draft(
            torch.tensor([self._nodes(ids, parents) for ids in rows.ids]),
            parents=torch.tensor(parents, dtype=torch.long),
        )

    def leave(self, key: int) -> None:
        """It keeps nothing of a row."""

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        assert draft.parents is not None
        for row, path in enumerate(outcome.path):  # the path is one, from the root on, and what was emitted
            assert len(path) == outcome.accepted[row]
            assert [int(draft.parents[i]) for i in path] == [0, *(i + 1 for i in path[:-1])][: len(path)]
            assert draft.tokens[row, path].tolist() == outcome.emitted[row][: len(path)]

    def _nodes(self, ids: Sequence[int], parents: Sequence[int]) -> list[int]:
        after = dict(self.after)
        learn(after, ids)
        texts, depths, used = [list(ids[-2:])], [len(ids)], [0]
        for parent in parents:
            words = texts[parent]
            known = after.get(tuple(words)) or after.get(tuple(words[-1:]), [])
            rank, used[parent] = used[parent], used[parent] + 1
            likeliest = parents.count(parent) - 1 - rank  # the last sibling is the likeliest
            token = known[-1 - likeliest] if likeliest < len(known) else (words[-1] + rank + 1) % self.vocab
            if self.drifting and depths[parent] % self.drifting == 0:
                token = (token + 1) % self.vocab
            texts, depths, used = [*texts, [words[-1], token]], [*depths, depths[parent] + 1], [*used, 0]
        return [text[-1] for text in texts[1:]]


@pytest.fixture(scope="session")
def tree() -> type[Tree]:
    """A drafter of trees."""
    return Tree


@dataclass
class Target:
    """A model of transformers in float64, our decoder over it, an assistant that often agrees, and the right texts."""

    model: Any
    decoder: Decoder
    assistant: Decoder
    vocab: int
    drafters: dict[str, Callable[..., Drafter | None]]
    texts: dict[Any, list[int]] = field(default_factory=dict)

    def text(self, prompt: Sequence[int], tokens: int, *, eos: Sequence[int] = (), **settings: Any) -> list[int]:
        """What transformers generates greedily after the prompt; each is generated once."""
        key = (tuple(prompt), tokens, tuple(eos), *settings.items())
        if key not in self.texts:
            out = self.model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=list(eos) or None,
                pad_token_id=0,
                **settings,
            )
            self.texts[key] = out[0, len(prompt) :].tolist()
        return self.texts[key]


@pytest.fixture(scope="session")
def target_of(tiny: Callable[..., Any], decoder_of: Callable[[Any], Decoder]) -> Callable[..., Target]:
    """`target_of("llama")`: one `Target` per architecture and changes; some drafters know the texts after `prompts`."""
    from layerskip.decode.drafters import Assistant, EarlyExit, Lookup

    made: dict[str, Target] = {}

    def make(name: str, *, prompts: Sequence[Sequence[int]] = (), **changes: Any) -> Target:
        key = f"{name} {changes}"
        if key in made:
            return made[key]
        # few words, so that texts repeat themselves and copying pays
        settings = {"double": True, "agree": 0.35, "vocab_size": 24, **changes}
        model, noisy = tiny(name, **settings), tiny(name, **settings)
        noise = torch.Generator().manual_seed(1)
        for parameter in noisy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise, dtype=torch.float64), alpha=0.03)
        decoder, assistant, vocab = decoder_of(model), decoder_of(noisy), model.config.vocab_size
        target = Target(model, decoder, assistant, vocab, {})
        # texts of this model, after other prompts too: as a prediction of any one of them, partly right
        batch = Batch(decoder, Pool(decoder.cache(rows=8, slots=64)))
        others = [*prompts, *([i, 2 * i + 5] for i in range(8))]
        corpus = [token for text in finish(batch, batch.join([Request(p, 30) for p in others])).texts for token in text]
        target.drafters |= {
            "none": lambda tokens: None,
            "early exit": lambda tokens: EarlyExit(2, tokens=tokens),
            "late exit": lambda tokens: EarlyExit(3, tokens=tokens),
            "confident exit": lambda tokens: EarlyExit(2, tokens=tokens, confidence=0.4),
            "lookup": lambda tokens: Lookup(tokens=tokens),
            "predicted": lambda tokens: Lookup(tokens=tokens, predicted=corpus),
            "assistant": lambda tokens: Assistant(assistant, tokens=tokens),
            "tree": lambda tokens: Tree(corpus, vocab=vocab, tokens=tokens),
        }
        made[key] = target
        return target

    return make


@pytest.fixture(params=["early exit", "late exit", "confident exit", "lookup", "predicted", "assistant", "tree"])
def drafter_name(request: pytest.FixtureRequest) -> str:
    """Every kind of drafter by name, for `Target.drafters`."""
    return str(request.param)


@contextmanager
def counting(layers: Iterable[Any]) -> Iterator[list[int]]:
    """Counts the positions that pass each layer (ours, or one of transformers)."""
    counts: list[int] = []

    def count(index: int) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            counts[index] += arguments[0].shape[0] * arguments[0].shape[1]

        return hook

    handles = []
    for index, layer in enumerate(layers):
        counts.append(0)
        handles.append(layer.register_forward_hook(count(index)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="session", name="counting")
def counting_fixture() -> Callable[..., Any]:
    """`with counting(decoder.layers) as counts:` the positions that pass each layer."""
    return counting
