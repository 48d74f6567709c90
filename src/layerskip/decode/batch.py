"""The loop over rows of one cache: join, round, leave. Everything else that decodes is a loop over this.

Token ids in, token ids out: knows rows, drafts, laws and ends; knows no text and prints nothing. A row never depends
on its neighbours: what is drawn depends on its own seed and position, and attention reads its own slots.

Between rounds a row that knows n tokens has positions 0..n-2 in the cache, in every layer up to the target's depth. A
round runs token n-1 and the draft behind it, keeps a + 1 tokens, and leaves the same state with n + a + 1. What it
wrote beyond lies past every later query, so an exception or a closed stream in the middle of a draft leaves nothing
to repair.

Sizes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerskip.decode.draft import Draft, Drafter, Outcome, Rows
from layerskip.decode.joining import Row, run_prompts
from layerskip.decode.logprobs import TokenLogprob, rank
from layerskip.decode.numerics import diagnose
from layerskip.decode.pool import Pool
from layerskip.decode.prefill import row_index
from layerskip.decode.randomness import Purpose
from layerskip.decode.request import Request, Round, Seconds, cut
from layerskip.decode.sampling import Chosen, Law, Laws
from layerskip.decode.tree import node_depths, tree_mask
from layerskip.decode.verify import Uniforms, Verdict, verify_chain, verify_chosen, verify_tree
from layerskip.errors import LayerSkipError, RequestError, check_exit, check_ids
from layerskip.model.decoder import Decoder


@dataclass(frozen=True)
class _Scored:
    """The target at every node of a draft: its states (B, K + 1, D), raw logits and laws (B, K + 1, V)."""

    hidden: Tensor
    logits: Tensor
    target: Laws


@dataclass(frozen=True)
class _Found:
    """What a verification found for a row.

    Args:
        path: the drafted tokens kept, as indices into the draft.
        tokens: what the row may gain: the kept tokens and one more, up to the first law that broke.
        logits: (K + 1, V) raw, of every node of the row; a view, because few rounds need them.
        poisoned: whether a node of the row, kept or not, has logits that are not finite.
    """

    path: list[int]
    tokens: list[int]
    logits: Tensor
    poisoned: bool

    def chosen_by(self, count: int | None = None) -> Tensor:
        """(n, V) the raw logits that the kept tokens and the one more were chosen by; of the first `count`."""
        return self.logits[[0, *(node + 1 for node in self.path)][:count]]


class Batch:
    """Rows that decode side by side and come and go at round boundaries.

    Args:
        decoder: the target.
        pool: rows of its cache.
        drafter: what drafts; None decodes plainly.
        exit: depth of the target; less than all layers is plain early exit, which is lossy.

    Raises:
        RequestError: an exit outside the model, or a drafter that cannot serve it.
    """

    def __init__(
        self, decoder: Decoder, pool: Pool, *, drafter: Drafter | None = None, exit: int | None = None
    ) -> None:
        layers = decoder.shape.layers
        self.exit = layers if exit is None else exit
        check_exit(self.exit, layers=layers)
        if drafter is not None:
            if isinstance(drafter, type) or not hasattr(drafter, "propose"):  # a caller's mistake, named here
                raise RequestError(f"draft {drafter!r} is not a drafter; use one such as layerskip.EarlyExit(3)")
            drafter.check(decoder, exit=self.exit)
        self.decoder, self.pool, self.drafter = decoder, pool, drafter
        # a drafter of the caller's own need not have it
        self._watched = bool(getattr(drafter, "watches_plain", False))
        self._rows: list[Row] = []
        self._law: Law | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lossless(self) -> bool:
        """Whether the text has the law of the full model ("exact") rather than of an early exit ("lossy")."""
        return self.exit == self.decoder.shape.layers

    @torch.inference_mode()
    def join(self, requests: Sequence[Request]) -> list[int]:
        """Adds rows and runs their prompts, reusing the cache of prefixes that are held or shared.

        Returns:
            A key per request, unique in the process.

        Raises:
            RequestError: a prompt does not fit the context, or holds ids outside the vocabulary.
            CapacityError: the cache does not fit in memory. Nothing has joined then.
        """
        if not requests:
            return []
        for request in requests:
            self.check(request)
        margin = self.drafter.tokens if self.drafter is not None else 0
        joined = run_prompts(self.decoder, self.pool, requests, depth=self.exit, margin=margin)
        self._rows += joined
        self._law = None
        return [row.key for row in joined]

    def prompt_logprobs(self, key: int) -> list[TokenLogprob] | None:
        """Log-probabilities of a row's prompt tokens from the second on, where they were asked for."""
        return self._find(key).prompt_logprobs

    def leave(self, key: int) -> None:
        """Takes a row out; its cache stays held for prompts that continue it."""
        row = self._find(key)
        self._take_out(row)
        self.pool.hold(row.row, row.ids[:-1], depth=self.exit)
        self.pool.give_back(row.row)

    def close(self) -> None:
        """Takes every row out."""
        for row in list(self._rows):
            self.leave(row.key)

    @torch.inference_mode()
    def round(self) -> list[Round]:
        """Drafts and verifies once; every row gains between one and K + 1 tokens. Finished rows leave."""
        if not self._rows:
            return []
        began = time.perf_counter()
        rows = self._view(self._rows)
        room = [row.limit - len(row.ids) - 1 for row in self._rows]
        draft = Draft(rows.last[:, :0])
        if self.drafter is not None and max(room) > 0:
            draft = self.drafter.propose(rows, min(max(room), self.drafter.tokens)).within(room)
        drafted = time.perf_counter()
        scored = self._score(rows, draft)
        found = self._judge(rows, draft, scored)
        if draft.tokens.shape[1]:
            for b, again in self._undrafted([b for b, f in enumerate(found) if f.poisoned]):
                found[b] = again
        rounds, outcome = self._settle(rows, draft, scored, found)
        for row, done in zip(list(self._rows), rounds, strict=True):
            if done.error is not None:
                self._take_out(row)
                self.pool.forget(row.row)
            elif done.finish:
                self.leave(row.key)
        verified = time.perf_counter()
        # last, so that a drafter that fails here finds the rows in order
        if self.drafter is not None and (self._watched or draft.tokens.shape[1]):
            timed = replace(outcome, draft_seconds=drafted - began, verify_seconds=verified - drafted)
            self.drafter.observe(rows, draft, timed)
        seconds = Seconds(drafted - began, verified - drafted, time.perf_counter() - verified)
        return [replace(done, seconds=seconds) for done in rounds]

    # -- joining

    def check(self, request: Request) -> None:
        """Raises RequestError where `request` cannot be served."""
        shape = self.decoder.shape
        if len(request.ids) >= shape.context:
            raise RequestError(
                f"the prompt has {len(request.ids)} tokens; this model's context holds {shape.context}, "
                f"so use at most {shape.context - 1}"
            )
        check_ids((*request.ids, *request.eos), vocab=shape.vocab)
        Law([request.sampling], shape.vocab, ids=[request.ids])

    # -- one round

    def _view(self, rows: Sequence[Row]) -> Rows:
        device = self.decoder.device
        whole = len(rows) == len(self._rows)
        law = self._law if whole else None
        if law is None:
            law = Law(
                [row.request.sampling for row in rows],
                self.decoder.shape.vocab,
                ids=[row.ids for row in rows],
                stops=[row.request.eos for row in rows],
                floors=[len(row.request.ids) + row.request.min_tokens for row in rows],
                device=device,
            )
        if whole:
            self._law = law
        return Rows(
            decoder=self.decoder,
            cache=self.pool.cache,
            exit=self.exit,
            law=law,
            keys=[row.key for row in rows],
            ids=[row.ids for row in rows],
            starts=[len(row.request.ids) for row in rows],
            index=row_index([row.row for row in rows], device),
            last=torch.tensor([[row.ids[-1]] for row in rows], device=device),
            at=torch.tensor([[len(row.ids) - 1] for row in rows], device=device),
            seeds=torch.tensor([row.seed for row in rows], device=device),
        )

    def _score(self, rows: Rows, draft: Draft) -> _Scored:
        """Runs every node through the layers the draft has not run."""
        nodes = draft.tokens.shape[1] + 1
        at = rows.at + torch.arange(nodes, device=rows.at.device)
        slots, mask = None, None
        if draft.parents is not None:
            slots, at = at, rows.at + node_depths(draft.parents)
            mask = tree_mask(rows.at, draft.ancestors(), limit=rows.longest + nodes - 1)
        hidden = draft.hidden
        if hidden is None:
            hidden = self.decoder.embed(torch.cat((rows.last, draft.tokens), 1))
        hidden = self.decoder.run(
            hidden,
            at,
            rows.cache,
            draft.depth,
            self.exit,
            rows=rows.index,
            slots=slots,
            mask=mask,
            limit=rows.longest + nodes - 1,
        )
        logits = self.decoder.logits(hidden)
        if rows.law.largest:
            return _Scored(hidden, logits, Chosen.of(logits))
        return _Scored(hidden, logits, rows.law(logits, draft.tokens, draft.ancestors()))

    def _judge(self, rows: Rows, draft: Draft, scored: _Scored) -> list[_Found]:
        if isinstance(scored.target, Chosen) and draft.parents is None:
            return self._compare(draft, scored, scored.target)
        return self._read(draft, scored, self._verify(rows, draft, scored.target))

    def _compare(self, draft: Draft, scored: _Scored, target: Chosen) -> list[_Found]:
        """What `_verify` and `_read` find of a chain where laws choose: a token stays that is the chosen one, however
        it was drafted. Small models spend a fifth of a round on doing it with tensors."""
        nodes, found = draft.tokens.shape[1] + 1, []
        table = torch.cat((target.tokens, draft.tokens, target.broken), 1).tolist()
        for b, (row, length) in enumerate(zip(table, draft.counts(), strict=True)):
            own, drafted, broken = row[:nodes], row[nodes : 2 * nodes - 1], row[2 * nodes - 1 :]
            tokens = verify_chosen(own, drafted[:length])
            whole = next((i for i in range(len(tokens)) if broken[i]), len(tokens))
            poisoned = any(broken) and not bool(scored.logits[b].isfinite().all())
            found.append(_Found(list(range(len(tokens) - 1)), tokens[:whole], scored.logits[b], poisoned))
        return found

    def _verify(self, rows: Rows, draft: Draft, target: Laws) -> Verdict:
        drafted = draft.tokens.shape[1]
        token = rows.uniform(Purpose.TOKEN, drafted + 1)
        none = token[:, :0]
        drawn = draft.proposals is not None  # tokens that were chosen are matched with the target's draw
        uniforms = Uniforms(
            token=token,
            accept=rows.uniform(Purpose.ACCEPT, drafted) if drawn else none,
            residual=rows.uniform(Purpose.RESIDUAL, drafted) if drawn else none,
        )
        if draft.parents is None:
            assert isinstance(target, Tensor), "chosen tokens are compared"
            return verify_chain(
                target, draft.tokens, uniforms=uniforms, proposals=draft.proposals, lengths=draft.lengths
            )
        assert draft.proposals is None, "trees are verified by sample-and-match"
        depth = int(node_depths(draft.parents).max())
        verdict = verify_tree(target, draft.tokens, draft.parents, depth=depth, uniforms=uniforms)
        self._keep_path(rows, verdict)
        return verdict

    def _keep_path(self, rows: Rows, verdict: Verdict) -> None:
        """Moves the accepted nodes' keys and values to the slots of their positions."""
        steps = torch.arange(verdict.path.shape[1], device=verdict.path.device)
        target = rows.at + 1 + steps
        source = torch.where(steps < verdict.accepted[:, None], rows.at + 1 + verdict.path, target)
        self.pool.cache.gather(rows.index, source, target)

    def _read(self, draft: Draft, scored: _Scored, verdict: Verdict) -> list[_Found]:
        """Brings a verdict to the host: once a round, the loop waits for the device here."""
        kept = draft.tokens.gather(1, verdict.path) if draft.tokens.shape[1] else draft.tokens
        target = scored.target  # (B, K + 1): NaN logits, or a law with nothing left in it
        broken = target.broken if isinstance(target, Chosen) else target.sum(-1).isnan()
        table = torch.cat((verdict.accepted[:, None], verdict.token[:, None], verdict.path, kept, broken), 1).tolist()
        width, found = verdict.path.shape[1], []
        for b, (accepted, token, *rest) in enumerate(table):
            path, tokens, laws = rest[:accepted], rest[width : width + accepted], rest[2 * width :]
            nodes = [0, *(node + 1 for node in path)]
            poisoned = any(laws) and not bool(scored.logits[b].isfinite().all())
            # tokens drawn before the first broken law are good
            whole = next((i for i, node in enumerate(nodes) if laws[node]), len(nodes))
            found.append(_Found(path, [*tokens, token][:whole], scored.logits[b], poisoned))
        return found

    def _undrafted(self, rows: Sequence[int]) -> Iterator[tuple[int, _Found]]:
        """Runs rows again without their draft: a token that was only drafted may be what has no finite numbers.

        What holds one poisons the row's attention even where it is masked (0 x NaN), so it is wiped first. (A drawn
        draft is thrown away here because of a token it held: such a row keeps the target's law only for chosen drafts.
        A model with numbers like that is broken; this keeps its other tokens usable.)
        """
        if not rows:
            return
        for b in rows:
            self.pool.cache.clear(self._rows[b].row, first=len(self._rows[b].ids) - 1)
        view = self._view([self._rows[b] for b in rows])
        draft = Draft(view.last[:, :0])
        scored = self._score(view, draft)
        yield from zip(rows, self._judge(view, draft, scored), strict=True)

    def _settle(
        self, rows: Rows, draft: Draft, scored: _Scored, found: Sequence[_Found]
    ) -> tuple[list[Round], Outcome]:
        """Extends the rows by what was found."""
        depths = (node_depths(draft.parents) - 1).tolist()[1:] if draft.parents is not None else None
        rounds, outcome = [], Outcome(scored.target, scored.hidden, [], [], [])
        drafts = zip(self._rows, found, draft.tokens.tolist(), draft.counts(), strict=True)
        for row, fate, drafted, length in drafts:
            emitted, finish = cut(fate.tokens, row.request, len(row.ids), row.limit)
            error = None
            if not fate.tokens:
                error, finish = self._diagnose(row, fate.chosen_by()), "error"
            accepted = min(len(fate.path), len(emitted))
            logprobs = None
            if row.request.logprobs is not None:
                logprobs = rank(fate.chosen_by(len(emitted)), emitted, row.request.logprobs)
            row.ids += emitted
            outcome.accepted.append(accepted)
            outcome.path.append(fate.path[:accepted])
            outcome.emitted.append(emitted)
            where = list(range(length)) if depths is None else depths
            round = Round(
                row.key, emitted, accepted, drafted[:length], where, logprobs, finish, error, Seconds(0, 0, 0)
            )
            rounds.append(round)
        rows.law.extend(outcome.emitted)
        return rounds, outcome

    def _diagnose(self, row: Row, logits: Tensor) -> LayerSkipError:
        if not bool(logits.isnan().any() | (logits == torch.inf).any()):
            return RequestError(
                f"no token is allowed after {len(row.ids)} tokens: bans, biases or processors exclude them all"
            )
        return diagnose(self.decoder, row.ids, depth=self.exit)

    def _take_out(self, row: Row) -> None:
        self._rows.remove(row)
        self._law = None
        if self.drafter is not None:
            self.drafter.leave(row.key)

    def _find(self, key: int) -> Row:
        for row in self._rows:
            if row.key == key:
                return row
        raise RequestError(f"row {key} is not in this batch; it finished or left")
