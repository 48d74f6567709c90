"""The decoder's logits against transformers', for every architecture and every way the loop drives it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from layerskip.model.cache import Cache
from layerskip.model.decoder import Decoder

LENGTH = 40
CONTEXT = 16  # of the dynamic rope, which changes beyond it


@dataclass
class Case:
    """A text, and what transformers says of it: logits (T, V), states after each of 0..L-1 layers (T, D)."""

    model: Any
    decoder: Decoder
    ids: Tensor
    logits: Tensor
    states: list[Tensor]

    def cache(self, rows: int = 1, slots: int = LENGTH) -> Cache:
        return self.decoder.cache(rows=rows, slots=slots)

    def run(self, ids: Tensor, start: int, cache: Cache, **how: Any) -> Tensor:
        """States (T, D) of `ids` (T,) from position `start` on."""
        at = torch.arange(start, start + len(ids))[None]
        return self.decoder.run(self.decoder.embed(ids[None]), at, cache, **how)[0]

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        # transformers takes norms and rotations in float32 at any precision, so float64 agrees to about 1e-5
        bound = 3e-5 if theirs.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.fixture(scope="module")
def case_of(tiny: Callable[..., Any], decoder_of: Callable[[Any], Decoder]) -> Callable[..., Case]:
    made: dict[tuple[str, bool], Case] = {}

    def make(name: str, *, double: bool = True) -> Case:
        if (name, double) not in made:
            changes = {"max_position_embeddings": CONTEXT} if name == "llama-dynamic" else {}
            model = tiny(name, double=double, **changes)
            ids = torch.randint(64, (LENGTH,), generator=torch.Generator().manual_seed(5))
            logits, states = reference(model, ids, stepwise=name == "llama-dynamic")
            made[name, double] = Case(model, decoder_of(model), ids, logits, states)
        return made[name, double]

    return make


@torch.no_grad()
def reference(model: Any, ids: Tensor, *, stepwise: bool = False) -> tuple[Tensor, list[Tensor]]:
    # dynamic rope depends on the size of the call: one token at a time is how a text is decoded
    cache, outs = DynamicCache(config=model.config), []
    for piece in ids.split(1 if stepwise else len(ids)):
        outs.append(model(piece[None], past_key_values=cache, output_hidden_states=True))
    states = [torch.cat([out.hidden_states[i][0] for out in outs]) for i in range(len(outs[0].hidden_states) - 1)]
    return torch.cat([out.logits[0] for out in outs]), states


@pytest.fixture
def case(architecture: str, case_of: Callable[..., Case]) -> Case:
    return case_of(architecture)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("piece", [LENGTH, 7, 1], ids=["whole", "in pieces", "token by token"])
def test_logits_equal_transformers(architecture: str, case_of: Callable[..., Case], double: bool, piece: int) -> None:
    case = case_of(architecture, double=double)
    cache, states = case.cache(), []
    for start in range(0, LENGTH, piece):
        states.append(case.run(case.ids[start : start + piece], start, cache))
    logits = case.decoder.logits(torch.cat(states))
    assert logits.dtype == (torch.float64 if double else torch.float32)
    case.close(logits, case.logits)


def test_references_are_not_degenerate(case: Case) -> None:
    """Extreme logits would hide mistakes: no token is certain, and positions differ."""
    largest = case.logits.softmax(-1).amax(-1)
    assert largest.mean() < 0.9
    assert len(case.logits.argmax(-1).unique()) > LENGTH // 5


def test_reading_more_slots_than_are_written_changes_nothing(case: Case) -> None:
    cache = case.cache(slots=64)
    case.close(case.decoder.logits(case.run(case.ids[:30], 0, cache, limit=50)), case.logits[:30])
    case.close(case.decoder.logits(case.run(case.ids[30:31], 30, cache, limit=64)), case.logits[30:31])


def test_ragged_rows_equal_the_same_rows_alone(case: Case) -> None:
    """Three rows at places of their own, in calls as wide as the longest piece; shorter pieces are padded."""
    texts = [case.ids, case.ids[3:20], case.ids[9:33]]
    expected = [reference(case.model, text, stepwise=case.decoder.shape.rope.kind == "dynamic")[0] for text in texts]
    done, logits, cache = [0, 0, 0], [[], [], []], case.cache(rows=3)
    for sizes in [(5, 2, 9), (1, 1, 1), (11, 3, 2), (4, 11, 4), (1, 0, 8), (18, 0, 0)]:
        width = max(sizes)
        tokens, at = torch.zeros(2, 3, width, dtype=torch.long)
        for row, size in enumerate(sizes):
            tokens[row, :size] = texts[row][done[row] : done[row] + size]
            at[row] = done[row] + torch.arange(width)  # padding lies past the row's tokens, and past the cache
        out = case.decoder.logits(case.decoder.run(case.decoder.embed(tokens), at, cache))
        for row, size in enumerate(sizes):
            logits[row].append(out[row, :size])
            done[row] += size
    assert done == [40, 17, 24]
    for ours, theirs in zip(logits, expected, strict=True):
        case.close(torch.cat(ours), theirs)


def test_every_exit_equals_the_hidden_state_through_norm_and_head(case: Case) -> None:
    layers = case.decoder.shape.layers
    for depth in range(1, layers + 1):
        hidden = case.run(case.ids, 0, case.cache(), last=depth)
        with torch.no_grad():
            theirs = case.logits if depth == layers else case.model.lm_head(case.model.model.norm(case.states[depth]))
        case.close(case.decoder.logits(hidden), theirs)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_two_spans_make_the_whole(case: Case, depth: int) -> None:
    """The upper layers may lag: the lower ones run token by token, then the upper ones run all that is new at once."""
    cache, at = case.cache(), torch.arange(LENGTH)[None]
    case.run(case.ids[:10], 0, cache)
    for start in (10, 17, 31):
        stop = {10: 17, 17: 31, 31: 40}[start]
        drafted = [case.run(case.ids[i : i + 1], i, cache, last=depth) for i in range(start, stop)]
        hidden = case.decoder.run(torch.cat(drafted)[None], at[:, start:stop], cache, depth)
        case.close(case.decoder.logits(hidden)[0], case.logits[start:stop])


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 1])], ids=["slice", "tensor"])
def test_rows_are_chosen_and_the_others_untouched(case: Case, rows: slice | Tensor) -> None:
    cache = case.cache(rows=4)
    before = [tensor.normal_().clone() for tensor in (*cache.keys, *cache.values)]
    texts = torch.stack((case.ids, case.ids.flip(0)))
    at = torch.arange(LENGTH).repeat(2, 1)
    for span in (slice(0, 30), slice(30, 31), slice(31, 40)):
        hidden = case.decoder.run(case.decoder.embed(texts[:, span]), at[:, span], cache, rows=rows)
        case.close(case.decoder.logits(hidden[0]), case.logits[span])
    mine = torch.arange(4)[rows].tolist()
    for old, new in zip(before, [*cache.keys, *cache.values], strict=True):
        for row in range(4):
            assert torch.equal(old[row], new[row]) == (row not in mine)


@pytest.mark.parametrize("depth", [2, 4], ids=["early exit", "all layers"])
def test_a_rejected_draft_is_invisible(case: Case, depth: int) -> None:
    cache = case.cache()
    case.run(case.ids[:20], 0, cache)
    for start in range(20, 30, 2):
        case.run(case.ids.flip(0)[:9], start, cache, last=depth)  # 9 tokens that are not the text
        hidden = case.run(case.ids[start : start + 2], start, cache, limit=LENGTH)
        case.close(case.decoder.logits(hidden), case.logits[start : start + 2])


PARENTS = [0, 0, 2, 2, 4, 1, 6]
"""The parent node of drafted tokens 0.., node i + 1 being token i: paths 1-6-7, 2-3, 2-4-5."""
PATHS = {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 4, 5], 6: [1, 6], 7: [1, 6, 7]}


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])], ids=["first rows", "rows tensor"])
def test_each_node_of_a_tree_equals_its_path_as_a_chain(case: Case, rows: Tensor | None) -> None:
    """Nodes lie in slots of their own, apart from their positions; each sees the text and its ancestors."""
    nodes, roots = len(PARENTS) + 1, [25, 13]
    cache = case.cache(rows=3)
    where = [0, 1] if rows is None else rows.tolist()
    for row, root in zip(where, roots, strict=True):
        case.run(case.ids[:root], 0, cache, rows=slice(row, row + 1))
    tokens = torch.randint(64, (2, nodes), generator=torch.Generator().manual_seed(3))
    depths = torch.tensor([0, *(len(PATHS[node]) for node in range(1, nodes))])
    at, slots = torch.tensor(roots)[:, None] + depths, torch.tensor(roots)[:, None] + torch.arange(nodes)
    mask = torch.zeros(2, nodes, max(roots) + nodes, dtype=torch.bool)
    for i, root in enumerate(roots):
        for node in range(nodes):
            mask[i, node, : root + 1] = True
            mask[i, node, [root + n for n in PATHS.get(node, [])]] = True
    hidden = case.decoder.run(case.decoder.embed(tokens), at, cache, rows=rows, slots=slots, mask=mask)
    logits = case.decoder.logits(hidden)
    dynamic = case.decoder.shape.rope.kind == "dynamic"
    for i, root in enumerate(roots):
        for node in range(nodes):
            path = torch.cat((case.ids[:root], tokens[i, [0, *PATHS.get(node, [])]]))
            case.close(logits[i, node], reference(case.model, path, stepwise=dynamic)[0][-1])
        # the path 2-4-5 is kept: its keys and values move to the slots of their positions, and the text goes on
        kept = torch.tensor([[2, 4, 5]]) + root
        cache.gather(slice(where[i], where[i] + 1), kept, root + torch.arange(1, 4)[None])
        more = case.run(case.ids[:5], root + 4, cache, rows=slice(where[i], where[i] + 1))
        text = torch.cat((case.ids[:root], tokens[i, [0, 2, 4, 5]], case.ids[:5]))
        case.close(case.decoder.logits(more), reference(case.model, text, stepwise=dynamic)[0][-5:])


def test_positions_past_the_cache_harm_nobody(case: Case) -> None:
    """Padding goes to a slot that nobody reads, also beside tokens that take the last slots there are."""
    cache = case.cache(rows=2, slots=12)
    texts = torch.stack((case.ids[:12], case.ids[20:32]))
    second, _ = reference(case.model, texts[1], stepwise=case.decoder.shape.rope.kind == "dynamic")
    case.decoder.run(case.decoder.embed(texts[:, :7]), torch.arange(7).repeat(2, 1), cache)
    at = torch.tensor([[7, 8, 9, 10], [7, 12, 13, 500]])  # the second row has one token and three of padding
    tokens = torch.cat((texts[:1, 7:11], texts[1:, [7, 3, 3, 3]]))
    first = case.decoder.logits(case.decoder.run(case.decoder.embed(tokens), at, cache))
    case.close(first[0], case.logits[7:11])
    case.close(first[1, 0], second[7])
    at = torch.tensor([[11, 12, 12, 13, 14], [8, 9, 10, 11, 12]])
    tokens = torch.cat((texts[:1, [11, 3, 3, 3, 3]], texts[1:, [8, 9, 10, 11, 3]]))
    last = case.decoder.logits(case.decoder.run(case.decoder.embed(tokens), at, cache))
    case.close(last[0, 0], case.logits[11])
    case.close(last[1, :4], second[8:])
    again = case.run(case.ids[11:12], 11, cache, rows=slice(0, 1))
    case.close(case.decoder.logits(again), case.logits[11:12])


def test_a_row_that_held_nan_is_usable_after_clear(case: Case) -> None:
    cache = case.cache(rows=2)
    broken = torch.full((1, 12, case.decoder.shape.width), torch.nan, dtype=case.decoder.dtype)
    case.decoder.run(broken, torch.arange(12)[None], cache, rows=slice(1, 2))
    case.run(case.ids[:20], 0, cache, rows=slice(0, 1))
    cache.clear(1)
    # token by token with more slots read than written: what lies beyond must not poison it
    for i in range(12):
        hidden = case.run(case.ids[i : i + 1], i, cache, rows=slice(1, 2), limit=LENGTH)
        case.close(case.decoder.logits(hidden), case.logits[i : i + 1])
    case.close(case.decoder.logits(case.run(case.ids[20:], 20, cache, rows=slice(0, 1))), case.logits[20:])


def test_one_decoder_serves_caches_of_any_size(case: Case) -> None:
    """The table of rotations is shared and grows; a small cache after a large one, and back."""
    for slots in (LENGTH, 200, 41):
        case.close(case.decoder.logits(case.run(case.ids, 0, case.cache(slots=slots))), case.logits)
