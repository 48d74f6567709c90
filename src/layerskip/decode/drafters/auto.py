"""Drafting that chooses by itself, round by round: which exit drafts, how long, whether a copy is better, or nothing.

Looks at other exits in some rounds. For that no layer runs twice: passes stop on their way at the depths that are
looked at, and only heads are added. (DEL, arXiv 2504.05598, reads every exit in every round: with a large head that
would cost more than drafting saves.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from layerskip.decode.controllers import MOST
from layerskip.decode.controllers.choice import PLAIN, Decision
from layerskip.decode.controllers.fixed import check_tokens
from layerskip.decode.controllers.online import Online
from layerskip.decode.draft import Draft, Outcome, Rows
from layerskip.decode.drafters.cascade import copying_pays
from layerskip.decode.drafters.copies import Copies, Copy
from layerskip.decode.drafters.early_exit import check_draft_exit, draft_at, heads, run_on
from layerskip.decode.drafters.lookup import Lookup
from layerskip.decode.randomness import Purpose
from layerskip.decode.sampling import draw
from layerskip.errors import RequestError, check_number
from layerskip.model.decoder import Decoder
from layerskip.model.shape import Shape

_COPY = 1.1  # how much faster than drafting a copy has to look


@dataclass(frozen=True)
class AutoDraft(Draft):
    """A draft and how it came about.

    Args:
        decision: for the round.
        mind: whose decision.
        found: what could be copied.
        copies: whether it was.
        seen: by exit, what each row would have drafted at every node.
        looking: seconds of finding that out.
        choosing: seconds of deciding.
    """

    decision: Decision = field(default_factory=lambda: Decision(PLAIN))
    mind: Online | None = None
    found: Sequence[Copy] = ()
    copies: bool = False
    seen: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    looking: float = 0.0
    choosing: float = 0.0


@dataclass
class Count:
    """Rounds of one kind, and the tokens that they drafted."""

    rounds: int = 0
    drafted: int = 0


class Auto:
    """Chooses exit and draft length while it decodes, copies where that is faster, and decodes plainly where drafting
    does not pay, trying again from time to time. Exact.

    What it chooses depends on the clock. The text does not: tokens are drafted by the random numbers that the target
    draws by, and the target's draws decide, so with a seed, text is that of plain decoding. (In bfloat16 and float16
    choices may turn a tie, as drafting does.) One of it may serve several conversations, batches and threads; what it
    learnt in one helps the next.

    Args:
        tokens: the most drafted in a round.
        exit: to begin with; None finds one.
        guesses: acceptance by exit, where something is known beforehand.
        lookup: whether to copy as well.
        vocabulary: N, propose only N tokens, the likeliest and those of the text, as in `EarlyExit`. Only where text is
            greedy: draws match the target's by their place in the whole vocabulary.
        ranked: tokens by frequency, for `vocabulary`.
        head: "own", or "int8": draft through a copy of the head at 8 bits, as in `EarlyExit`.
        clock: seconds, for what choosing itself takes.

    Raises:
        RequestError: tokens, exit or vocabulary below 1, a guess outside 0..1, a ranking without a vocabulary, no such
            head, or a vocabulary beside a head of 8 bits.
    """

    name = "auto"
    watches_plain = True

    def __init__(
        self,
        *,
        tokens: int = MOST,
        exit: int | None = None,
        guesses: Mapping[int, float] | None = None,
        lookup: bool = True,
        vocabulary: int | None = None,
        ranked: Sequence[int] = (),
        head: str = "own",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens = check_tokens(tokens)
        if exit is not None:
            check_draft_exit(exit)
        for place, guess in (guesses or {}).items():
            check_number(f"acceptance of exit {place}", guess)
            if not 0 <= guess <= 1:
                raise RequestError(f"acceptance {guess} of exit {place} is not possible; use 0 to 1")
        self.exit, self.guesses = exit, dict(guesses or {})
        self.vocabulary, self.head, self.ranked = vocabulary, head, tuple(ranked)
        self._heads = heads(head, vocabulary, ranked)
        self.counts: dict[str, Count] = {}
        self._copies = Copies(Lookup(tokens=tokens)) if lookup else None
        self._minds: dict[tuple[Shape, int, bool], Online] = {}
        self._last: tuple[Shape, int, bool, Online] | None = None  # finding it by all of a shape takes microseconds
        self._clock, self._lock = clock, threading.Lock()
        self._chosen = "plain"

    def check(self, decoder: Decoder, *, exit: int) -> None:
        """Serves every decoder: one without an earlier exit is decoded plainly, or with copies.

        Raises:
            RequestError: a draft vocabulary that leaves nothing out, or a head that this decoder cannot have.
        """
        if self._heads is not None:
            self._heads.check(decoder)

    def propose(self, rows: Rows, tokens: int) -> Draft:
        """One kind of draft for all rows, or an empty one."""
        count = len(rows.ids)
        with self._lock:
            began, mind = self._clock(), self._mind(rows)
            decision = mind.decide(count)
            found = self._copies.find(rows, tokens) if self._copies is not None and decision.watched else []
            copies = bool(found) and self._copying_pays(mind, decision, found)
            notes: dict[str, Any] = {"mind": mind, "found": found, "choosing": self._clock() - began}
        if copies:
            assert self._copies is not None
            draft = self._copies.draft(rows, found)
            return AutoDraft(**vars(draft), decision=decision, copies=True, **notes)
        states: dict[int, Tensor] = {}
        predicts = decision.exit != PLAIN or decision.taps
        head = self._heads.head(rows) if self._heads is not None and predicts and self._fits(rows) else None
        predict = rows.decoder.logits if head is None else partial(head.logits, rows.decoder)
        if decision.exit != PLAIN:
            draft, states = draft_at(
                rows, tokens, decision.plan, exit=decision.exit, taps=decision.taps, head=head, matched=True
            )
        elif decision.taps:
            hidden, depth = run_on(rows, rows.decoder.embed(rows.last), 0, decision.taps, states)
            draft = Draft(rows.last[:, :0], hidden=hidden, depth=depth)
        else:
            draft = Draft(rows.last[:, :0])
        began = self._clock()
        seen = {tap: said(rows, draft, hidden, predict=predict) for tap, hidden in states.items()}
        looking = self._clock() - began if seen else 0.0
        return AutoDraft(**vars(draft), decision=decision, seen=seen, looking=looking, **notes)

    def leave(self, key: int) -> None:
        """Forgets what it keeps for the row."""
        if self._copies is not None:
            self._copies.lookup.leave(key)
        if self._heads is not None:
            self._heads.leave(key)

    def observe(self, rows: Rows, draft: Draft, outcome: Outcome) -> None:
        """Learns from the round."""
        with self._lock:
            began = self._clock()
            if not isinstance(draft, AutoDraft) or draft.mind is None:  # no room was left to draft
                mind, choosing = self._mind(rows), 0.0
                mind.learn(Decision(PLAIN), draft, outcome)
                self._count("plain", 0)
            else:
                mind, choosing = draft.mind, draft.choosing
                self._learn(mind, draft, outcome)
            spent = choosing + self._clock() - began
            mind.overhead += spent

    # -- what it does

    @property
    def choice(self) -> str:
        """What it did last: "early-exit:2", "lookup" or "plain"."""
        return self._chosen

    @property
    def overhead_seconds(self) -> float:
        """Seconds spent on choosing and on looking at other exits."""
        with self._lock:
            return sum(mind.overhead for mind in self._minds.values())

    @property
    def seconds(self) -> float:
        """Seconds of all rounds."""
        with self._lock:
            return sum(mind.seconds for mind in self._minds.values())

    def recount(self) -> None:
        """Begins to count rounds anew; what it learnt stays."""
        with self._lock:
            self.counts = {}

    def record(self) -> dict[str, Any]:
        """What it chose since `recount`, for JSON; seconds are of all its rounds."""
        with self._lock:
            counts = {name: vars(count).copy() for name, count in self.counts.items()}
        return {
            "choice": self.choice,
            "rounds": counts,
            "seconds": self.seconds,
            "overhead_seconds": self.overhead_seconds,
        }

    def line(self) -> str:
        """The same for people: "auto: early-exit:2 K=5.8 in 80% of rounds, plain in 20%; choosing took 0.9%"."""
        with self._lock:
            counts = sorted(self.counts.items(), key=lambda item: -item[1].rounds)
        total = sum(count.rounds for _, count in counts)
        if not total:
            return "auto: no rounds"
        parts = [
            name
            + (f" K={count.drafted / count.rounds:.1f}" if count.drafted else "")
            + f" in {count.rounds / total:.0%}"
            for name, count in counts
        ]
        parts[0] += " of rounds"
        share = self.overhead_seconds / self.seconds if self.seconds else 0.0
        return f"auto: {', '.join(parts)}; choosing took {share:.1%}"

    # -- parts

    def _mind(self, rows: Rows) -> Online:
        """What is known of models of this shape at this depth, drafting through this head."""
        shape, fits, last = rows.decoder.shape, self._fits(rows), self._last
        if last is not None and last[0] is shape and last[1:3] == (rows.exit, fits):
            return last[3]
        mind = self._minds.get((shape, rows.exit, fits))
        if mind is None:
            mind = self._minds[shape, rows.exit, fits] = Online(
                rows.exit,
                head=head_layers(shape) * (self._share(shape) if fits else 1.0),
                tokens=self.tokens,
                start=self.exit,
                guesses=self.guesses,
            )
        self._last = (shape, rows.exit, fits, mind)
        return mind

    def _fits(self, rows: Rows) -> bool:
        """Whether what it drafts through suits the rows: a list of tokens would move the others' places, by which draws
        match the target's."""
        return self.vocabulary is None or rows.law.greedy

    def _share(self, shape: Shape) -> float:
        """What the head that drafts weighs, as a share of the model's own."""
        if self.head == "int8":
            return 0.5  # of 16 bits; rounds are measured soon enough
        return 1.0 if self.vocabulary is None else self.vocabulary / shape.vocab

    def _copying_pays(self, mind: Online, decision: Decision, found: Sequence[Copy]) -> bool:
        width = max((len(copy.tokens) for copy in found), default=0)
        if not width or decision.token is None or self._copies is None:
            return False
        seconds = mind.copy_seconds(len(found), width)
        return seconds is not None and copying_pays(self._copies.expected(found), _COPY * seconds, token=decision.token)

    def _learn(self, mind: Online, draft: AutoDraft, outcome: Outcome) -> None:
        if self._copies is not None and draft.found:
            self._copies.learn(draft.found, outcome.emitted)
        if draft.copies:
            mind.learn_copy(draft, outcome)
            self._count("lookup", draft.tokens.shape[1])
            return
        if draft.seen:
            mind.look(draft.decision, draft.seen, draft, outcome, seconds=draft.looking)
        mind.learn(draft.decision, draft, outcome)
        exit = draft.decision.exit
        self._count("plain" if exit == PLAIN else f"early-exit:{exit}", draft.tokens.shape[1])

    def _count(self, name: str, drafted: int) -> None:
        count = self.counts.setdefault(name, Count())
        count.rounds += 1
        count.drafted += drafted
        self._chosen = name


def head_layers(shape: Shape) -> float:
    """What the head weighs, in layers.

    Example: a layer of 4 x 8 x 8 in attention and 3 x 8 x 16 in the MLP, a head of 8 x 64

        >>> from dataclasses import make_dataclass
        >>> sizes = {"vocab": 64, "width": 8, "heads": 2, "kv_heads": 2, "head_width": 4, "ffn_width": 16}
        >>> head_layers(make_dataclass("Sizes", sizes)(**sizes))
        0.8
    """
    attention = shape.head_width * (2 * shape.heads + 2 * shape.kv_heads)
    return shape.vocab / (attention + 3 * shape.ffn_width)


def said(rows: Rows, draft: Draft, hidden: Tensor, *, predict: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """The token that an exit would draft at every node of a chain, by the numbers that the target draws by.

    Args:
        rows: of the round.
        draft: of it.
        hidden: (B, K + 1, D) states of the nodes at the exit.
        predict: states -> logits.
    """
    logits = predict(hidden)
    if rows.law.greedy:  # bans and penalties may turn it; an estimate does without
        tokens: Tensor = logits.float().argmax(-1)
    else:
        law = rows.law(logits, draft.tokens, draft.ancestors())
        tokens = draw(law, rows.uniform(Purpose.TOKEN, hidden.shape[1]))
    found: list[list[int]] = tokens.tolist()
    return found
