"""The acceptance rules' theorem, without a model: what comes out has exactly the target's law.

A *world* here is a target law for every prefix of at most three tokens over a tiny vocabulary. Drafts are verified many
thousands of times side by side; what they emit is continued by drawing from the world, and the joint law of the first
three tokens is compared with the world's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from layerskip.decode.sampling import draw
from layerskip.decode.verify import Uniforms, Verdict, node_depths, verify_chain, verify_tree

V, N = 4, 200_000


@dataclass
class World:
    """For each prefix length 0, 1, 2 a law for every prefix, (V^length, V); a prefix is a number in base V."""

    laws: list[Tensor]

    def joint(self) -> Tensor:
        """The law of the first three tokens, (V, V, V)."""
        first, second, third = self.laws
        return (first[0][:, None] * second)[..., None] * third.reshape(V, V, V)

    def continued(self, emitted: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
        """Counts (V, V, V) of the first three tokens, where row b emitted `count` (N,) tokens of `emitted` (N, 3)."""
        prefix = torch.zeros(len(emitted), dtype=torch.long)
        for i, law in enumerate(self.laws):
            fresh = draw(law[prefix], torch.rand(len(emitted), generator=generator))
            prefix = prefix * V + torch.where(i < count, emitted[:, i], fresh)
        return prefix.bincount(minlength=V**3)


def make_world(kind: str, generator: torch.Generator) -> World:
    def laws(count: int) -> Tensor:
        law = torch.rand(count, V, generator=generator) ** 2 + 0.02
        if kind == "zeros":
            law[torch.arange(count), torch.randint(V, (count,), generator=generator)] = 0
            law[torch.arange(count), torch.randint(V, (count,), generator=generator)] = 0
        if kind == "low half":
            law[:, V // 2 :] = 0
        if kind == "high half":
            law[:, : V // 2] = 0
        return law / law.sum(-1, keepdim=True)

    return World([laws(V**length) for length in range(3)])


def emitted_by(verdict: Verdict, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What each row emits, (N, at least 3), of which `count` (N,) tokens count."""
    path = tokens.gather(1, verdict.path)
    out = torch.cat((path, path.new_zeros(len(path), 4)), 1)
    out.scatter_(1, verdict.accepted[:, None], verdict.token[:, None])
    return out, verdict.accepted + 1


def numbers(count: int, generator: torch.Generator) -> Uniforms:
    def fresh(width: int) -> Tensor:
        return torch.rand(N, width, generator=generator)

    return Uniforms(token=fresh(count + 1), accept=fresh(count), residual=fresh(count))


def drawn_chain(
    world: World, draft: World, count: int, generator: torch.Generator, *, chosen: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Draft tokens (N, count), target laws (N, count + 1, V) and the law each position was drawn from.

    A token at a position in `chosen` is a function of its prefix.
    """
    prefix = torch.zeros(N, dtype=torch.long)
    tokens, target, proposals = [], [world.laws[0][prefix]], []
    for i in range(count):
        q = draft.laws[i][prefix]
        token = draw(q, torch.rand(N, generator=generator))
        if i in chosen:
            token = (prefix * 7 + i) % V
        tokens.append(token)
        proposals.append(None if i in chosen else q)
        prefix = prefix * V + token
        if i + 1 < 3:
            target.append(world.laws[i + 1][prefix])
    if len(target) == count:  # the law after three tokens is not looked at
        target.append(torch.full((N, V), 1 / V))
    return torch.stack(tokens, 1), torch.stack(target, 1), proposals


PAIRS = [("any", "any"), ("zeros", "any"), ("any", "zeros"), ("zeros", "zeros"), ("low half", "high half")]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kinds", [*PAIRS, ("same", "same")], ids=" from ".join)
def test_rejection_has_the_target_law(follows: Callable[..., bool], kinds: tuple[str, str], count: int) -> None:
    generator = torch.Generator().manual_seed(7 * count)
    world = make_world(kinds[0], generator)
    draft = world if kinds[1] == "same" else make_world(kinds[1], generator)
    tokens, target, proposals = drawn_chain(world, draft, count, generator)
    verdict = verify_chain(target, tokens, uniforms=numbers(count, generator), proposals=proposals)
    assert follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())
    if kinds[1] == "same":
        assert (verdict.accepted == count).all()
    if kinds == ("low half", "high half"):
        assert (verdict.accepted == 0).all()


def test_rejection_accepts_as_often_as_the_laws_overlap(follows: Callable[..., bool]) -> None:
    generator = torch.Generator().manual_seed(3)
    world, draft = make_world("any", generator), make_world("any", generator)
    tokens, target, proposals = drawn_chain(world, draft, 1, generator)
    verdict = verify_chain(target, tokens, uniforms=numbers(1, generator), proposals=proposals)
    overlap = torch.minimum(world.laws[0][0], draft.laws[0][0]).sum()
    assert follows(verdict.accepted.bincount(minlength=2), torch.stack((1 - overlap, overlap)))


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 2), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_chosen_and_drawn_positions_mix(follows: Callable[..., bool], chosen: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(11)
    world, draft = make_world("any", generator), make_world("zeros", generator)
    tokens, target, proposals = drawn_chain(world, draft, 3, generator, chosen=chosen)
    uniforms = numbers(3, generator)
    verdict = verify_chain(target, tokens, uniforms=uniforms, proposals=proposals)
    assert follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())
    assert len(verdict.accepted.unique()) == 4
    if len(chosen) == 3:  # no law at all says the same as no proposals
        same = verify_chain(target, tokens, uniforms=uniforms)
        assert torch.equal(same.accepted, verdict.accepted)
        assert torch.equal(same.token, verdict.token)


@pytest.mark.parametrize("chosen", [(), (1,)], ids=["drawn", "mixed"])
@pytest.mark.parametrize("stop", ["any length", "after an unsure token", "by the token itself"])
def test_ragged_lengths_keep_the_law(follows: Callable[..., bool], stop: str, chosen: tuple[int, ...]) -> None:
    """A row may stop for any reason found in its draft, as long as what was drafted is kept."""
    generator = torch.Generator().manual_seed(5)
    world, draft = make_world("zeros", generator), make_world("any", generator)
    tokens, target, proposals = drawn_chain(world, draft, 3, generator, chosen=chosen)
    if stop == "any length":
        lengths = torch.randint(4, (N,), generator=generator)
    elif stop == "after an unsure token":
        lengths = 1 + 2 * (draft.laws[1][tokens[:, 0]].amax(-1) > 0.5)
    else:
        lengths = 1 + tokens[:, 0] % 2
    verdict = verify_chain(target, tokens, uniforms=numbers(3, generator), proposals=proposals, lengths=lengths)
    assert (verdict.accepted <= lengths).all()
    assert (verdict.accepted == lengths).any()
    assert follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())


def test_a_rule_that_discards_what_it_drew_is_caught(follows: Callable[..., bool]) -> None:
    """Has this file the power to see a wrong rule? A draft shortened by the token just drawn is one."""
    generator = torch.Generator().manual_seed(5)
    world, draft = make_world("any", generator), make_world("any", generator)
    tokens, target, proposals = drawn_chain(world, draft, 2, generator)
    unsure = draft.laws[0][0][tokens[:, 0]] < draft.laws[0][0].median()
    lengths = torch.where(unsure, 0, 2)
    verdict = verify_chain(target, tokens, uniforms=numbers(2, generator), proposals=proposals, lengths=lengths)
    assert not follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())


def test_a_slightly_wrong_proposal_law_is_caught(follows: Callable[..., bool]) -> None:
    """q must be the very law that was drawn from."""
    generator = torch.Generator().manual_seed(5)
    world, draft = make_world("any", generator), make_world("any", generator)
    tokens, target, proposals = drawn_chain(world, draft, 1, generator)
    wrong = [0.9 * q + 0.1 / V for q in proposals if q is not None]
    verdict = verify_chain(target, tokens, uniforms=numbers(1, generator), proposals=wrong)
    assert not follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())


def plainly(world: World, uniforms: Uniforms) -> Tensor:
    """What plain decoding emits with these numbers, (N, 3)."""
    prefix, out = torch.zeros(N, dtype=torch.long), []
    for i, law in enumerate(world.laws):
        out.append(draw(law[prefix], uniforms.token[:, i]))
        prefix = prefix * V + out[-1]
    return torch.stack(out, 1)


def agrees_with_plain(verdict: Verdict, tokens: Tensor, world: World, uniforms: Uniforms) -> bool:
    emitted, count = emitted_by(verdict, tokens)
    counted = torch.arange(3) < count[:, None]
    return bool((emitted[:, :3] == plainly(world, uniforms))[counted].all())


@pytest.mark.parametrize("count", [1, 2])
def test_sample_and_match_on_a_chain_is_plain_decoding(follows: Callable[..., bool], count: int) -> None:
    """Not the law alone: with the same numbers the very tokens."""
    generator = torch.Generator().manual_seed(count)
    world, draft = make_world("zeros", generator), make_world("any", generator)
    tokens, target, _ = drawn_chain(world, draft, count, generator)
    uniforms = numbers(count, generator)
    uniforms = Uniforms(torch.rand(N, 3, generator=generator), uniforms.accept, uniforms.residual)
    chain = Uniforms(uniforms.token[:, : count + 1], uniforms.accept, uniforms.residual)
    verdict = verify_chain(target, tokens, uniforms=chain)
    assert agrees_with_plain(verdict, tokens, world, uniforms)
    assert follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())
    assert len(verdict.accepted.unique()) == count + 1


@pytest.mark.parametrize("seed", range(6))
def test_sample_and_match_on_a_tree_is_plain_decoding(follows: Callable[..., bool], seed: int) -> None:
    """Random trees of depth at most 2, siblings that repeat included, with tokens of each row's own."""
    generator = torch.Generator().manual_seed(seed)
    world = make_world("any" if seed % 2 else "zeros", generator)
    parents, depths = [], [0]
    for i in range(3 + seed):
        allowed = [node for node in range(i + 1) if depths[node] < 2]
        parents.append(allowed[int(torch.randint(len(allowed), (1,), generator=generator))])
        depths.append(depths[parents[-1]] + 1)
    tokens = torch.randint(V, (N, len(parents)), generator=generator)
    codes = [torch.zeros(N, dtype=torch.long)]
    for i, parent in enumerate(parents):
        codes.append(codes[parent] * V + tokens[:, i])
    target = torch.stack([world.laws[depth][code] for depth, code in zip(depths, codes, strict=True)], 1)
    uniforms = Uniforms(torch.rand(N, 3, generator=generator), torch.empty(N, 0), torch.empty(N, 0))
    verdict = verify_tree(target, tokens, torch.tensor(parents), depth=max(depths), uniforms=uniforms)
    assert node_depths(torch.tensor(parents)).tolist() == depths
    assert agrees_with_plain(verdict, tokens, world, uniforms)
    assert follows(world.continued(*emitted_by(verdict, tokens), generator), world.joint())
    # a kept path descends from the root
    node = torch.zeros(N, dtype=torch.long)
    for step in range(verdict.path.shape[1]):
        kept = step < verdict.accepted
        assert (torch.tensor(parents)[verdict.path[:, step]] == node)[kept].all()
        node = torch.where(kept, verdict.path[:, step] + 1, node)
    assert len(verdict.accepted.unique()) == max(depths) + 1


def test_a_tree_keeps_the_longest_path_that_matches() -> None:
    """Every child that can be matched is: acceptance ends only where no child holds the draw."""
    target = torch.eye(V)[[3, 0, 2, 1, 1]][None]
    tokens, parents = torch.tensor([[1, 3, 3, 2]]), torch.tensor([0, 0, 2, 2])
    half = torch.full((1, 5), 0.5)
    verdict = verify_tree(target, tokens, parents, depth=2, uniforms=Uniforms(half, half, half))
    assert (verdict.accepted.tolist(), verdict.path.tolist(), verdict.token.tolist()) == ([2], [[1, 3]], [1])


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "chosen"])
def test_greedy_laws_keep_the_matching_prefix_and_correct_it(drawn: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    best, tokens = torch.randint(2, (500, 4), generator=generator), torch.randint(2, (500, 3), generator=generator)
    uniforms = Uniforms(*(torch.rand(500, width, generator=generator) for width in (4, 3, 3)))
    proposals = [torch.eye(2)[tokens[:, i]] for i in range(3)] if drawn else None
    verdict = verify_chain(torch.eye(2)[best], tokens, uniforms=uniforms, proposals=proposals)
    for row in range(500):
        same = (best[row, :3] == tokens[row]).tolist()
        accepted = same.index(False) if False in same else 3
        assert verdict.accepted[row] == accepted
        assert verdict.token[row] == best[row, accepted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_without_anything_left_falls_back_to_the_target(
    follows: Callable[..., bool], dtype: torch.dtype
) -> None:
    """Rounding may leave q a hair above p everywhere; a token then turned down is drawn from p."""
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=dtype).expand(N, V)
    q = p * (1 + 1e-3)
    token = torch.zeros(N, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    uniforms = Uniforms(torch.zeros(N, 2), torch.full((N, 1), 1 - 2.0**-24), torch.rand(N, 1, generator=generator))
    verdict = verify_chain(torch.stack((p, p), 1), token, uniforms=uniforms, proposals=[q])
    assert (verdict.accepted == 0).all()
    assert follows(verdict.token.bincount(minlength=V), p[0])


def test_impossible_tokens_are_never_kept() -> None:
    """Whatever the number drawn, 0 included, and however small the proposal's probability."""
    p = torch.tensor([[0.0, 1.0]]).repeat(3, 2, 1)
    q = torch.tensor([[1.0, 0.0], [1e-30, 1.0], [1e-45, 1.0]])
    zero = torch.zeros(3, 2)
    verdict = verify_chain(p, torch.zeros(3, 1, dtype=torch.long), uniforms=Uniforms(zero, zero, zero), proposals=[q])
    assert (verdict.accepted.tolist(), verdict.token.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_equal_laws_keep_everything() -> None:
    """Even with the largest number there is, and for probabilities far below its resolution."""
    p = torch.tensor([[1e-30, 1e-10, 0.5, 0.5]]).expand(4, V)
    top = torch.full((4, 2), 1 - 2.0**-24)
    tokens = torch.arange(V)[:, None]
    verdict = verify_chain(torch.stack((p, p), 1), tokens, uniforms=Uniforms(top, top, top), proposals=[p])
    assert verdict.accepted.tolist() == [1, 1, 1, 1]


def test_an_empty_draft_is_a_plain_draw() -> None:
    target, uniforms = torch.eye(V)[None, 2:3], torch.zeros(1, 1)
    none = torch.zeros(1, 0, dtype=torch.long)
    for verdict in (
        verify_chain(target, none, uniforms=Uniforms(uniforms, uniforms[:, :0], uniforms[:, :0])),
        verify_tree(target, none, none[0], depth=0, uniforms=Uniforms(uniforms, uniforms[:, :0], uniforms[:, :0])),
    ):
        assert (verdict.accepted.tolist(), verdict.token.tolist(), verdict.path.shape) == ([0], [2], (1, 0))
