"""Target laws against transformers' own processors, and the numbers that draw from them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from layerskip.decode.draft import Draft
from layerskip.decode.randomness import Purpose, new_seed, sample_seed, uniform
from layerskip.decode.sampling import Chosen, Law, Laws, Sampling, draw
from layerskip.errors import RequestError

V = 40


def dense(law: Laws) -> Tensor:
    """Probabilities."""
    return law.dense(V) if isinstance(law, Chosen) else law


def by_transformers(
    logits: Tensor, ids: Sequence[int], s: Sampling, *, prompt: int = 0, floor: int = 0, stops: Sequence[int] = ()
) -> Tensor:
    """The law (V,) after `ids` as generate() makes it: its processors, in its order.

    Presence and frequency penalties, which it lacks, come beside the repetition penalty.
    """
    scores, known = logits[None].clone(), torch.tensor([list(ids)])
    if s.logit_bias:
        bias = [[[token], float(value)] for token, value in s.logit_bias.items()]
        scores = theirs.SequenceBiasLogitsProcessor(bias)(known, scores)
    if s.repetition_penalty != 1:
        scores = theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(known, scores)
    for token in ids:
        scores[0, token] -= s.frequency_penalty
    for token in set(ids):
        scores[0, token] -= s.presence_penalty
    if floor and stops:
        short = theirs.MinNewTokensLengthLogitsProcessor(prompt, floor - prompt, list(stops), device="cpu")
        scores = short(known, scores)
    if s.banned:
        scores = theirs.SuppressTokensLogitsProcessor(list(s.banned), device="cpu")(known, scores)
    for processor in s.processors:
        scores[0] = processor(known[0], scores[0])
    if s.temperature == 0:
        return dense(Chosen.of(scores[0]))
    for warper in (
        theirs.TemperatureLogitsWarper(s.temperature),
        *([theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []),
        *([theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []),
        *([theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []),
    ):
        scores = warper(known, scores)
    return scores[0].softmax(-1)


def even_only(prefix: Tensor, logits: Tensor) -> Tensor:
    """Forbids the parity of the last token: depends on the drafted prefix."""
    return logits.masked_fill(torch.arange(len(logits)) % 2 == prefix[-1] % 2, -torch.inf)


SETTINGS: dict[str, Sampling] = {
    "greedy": Sampling(),
    "plain": Sampling(temperature=1.0),
    "cool": Sampling(temperature=0.3),
    "hot": Sampling(temperature=5.0),
    "top-k": Sampling(temperature=1.3, top_k=5),
    "top-k 1": Sampling(temperature=1.3, top_k=1),
    "top-k beyond the vocabulary": Sampling(temperature=1.3, top_k=1000),
    "top-p": Sampling(temperature=0.9, top_p=0.8),
    "top-p tiny": Sampling(temperature=0.9, top_p=0.001),
    "min-p": Sampling(temperature=1.1, min_p=0.1),
    "min-p 1": Sampling(temperature=1.1, min_p=1.0),
    "all three": Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
    "repetition": Sampling(temperature=1.0, repetition_penalty=1.7),
    "repetition below 1": Sampling(temperature=1.0, repetition_penalty=0.6),
    "greedy with repetition": Sampling(repetition_penalty=2.5),
    "presence": Sampling(temperature=1.0, presence_penalty=0.9),
    "frequency": Sampling(temperature=1.0, frequency_penalty=0.4),
    "negative penalties": Sampling(temperature=1.0, presence_penalty=-0.5, frequency_penalty=-0.3),
    "bias": Sampling(temperature=1.0, logit_bias={3: 2.5, 7: -4.0, 0: 0.5}),
    "infinite bias": Sampling(temperature=1.0, logit_bias={3: -float("inf")}),
    "bans": Sampling(temperature=1.0, banned=[1, 2, 3, 39]),
    "processor": Sampling(temperature=1.0, processors=[even_only]),
    "greedy processor": Sampling(processors=[even_only]),
    "everything": Sampling(
        temperature=0.8,
        top_k=15,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={5: 3.0},
        banned=[9, 11],
        processors=[even_only],
    ),
}
PROMPTS = [[1, 5, 5, 9, 30], [2], [7, 7, 7, 1], [3, 4, 5, 6, 7, 8, 9, 10]]
CHAIN = Draft(torch.tensor([[5, 11, 5, 4], [2, 2, 39, 0], [1, 7, 8, 3], [3, 3, 3, 20]]))
TREE = replace(CHAIN, parents=torch.tensor([0, 0, 2, 3]))


def prefixes(draft: Draft, row: int) -> list[list[int]]:
    """The drafted tokens before each node's next token, found by climbing to the root."""
    parents = [0, 1, 2, 3] if draft.parents is None else draft.parents.tolist()
    out: list[list[int]] = [[]]
    for token, parent in zip(draft.tokens[row].tolist(), parents, strict=True):
        out.append([*out[parent], token])
    return out


def random_logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, V, generator=generator, dtype=dtype) * 2.5 + 0.5


def check(given: Laws, draft: Draft, logits: Tensor, samplings: Sequence[Sampling], **how: Any) -> None:
    law = dense(given)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for row, s in enumerate(samplings):
        for node, prefix in enumerate(prefixes(draft, row)):
            extra = {name: value[row] for name, value in how.items()}
            expected = by_transformers(logits[row, node], PROMPTS[row] + prefix, s, **extra)
            torch.testing.assert_close(law[row, node], expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(law[row, node] > 0, expected > 0)


@pytest.mark.parametrize("draft", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("name", SETTINGS)
def test_laws_equal_transformers(name: str, draft: Draft) -> None:
    samplings = [SETTINGS[name]] * 4
    for seed in range(3):
        logits = random_logits(seed)
        law = Law(samplings, V, ids=PROMPTS)(logits, draft.tokens, draft.ancestors())
        check(law, draft, logits, samplings)


@pytest.mark.parametrize("flat", [0.01, 3.0], ids=["flat", "peaked"])
def test_laws_over_many_tokens_equal_transformers_whether_a_few_hold_most_or_not(flat: float) -> None:
    samplings = [Sampling(temperature=1.0, top_p=top_p) for top_p in (0.3, 0.9, 0.999, 1.0)]
    logits = torch.randn(4, 1, 3000, generator=torch.Generator().manual_seed(0)) * flat
    none = torch.zeros(4, 0, dtype=torch.long)
    law = dense(Law(samplings, 3000, ids=PROMPTS)(logits, none, none[:1, :0].bool()))
    for row, s in enumerate(samplings):
        expected = by_transformers(logits[row, 0], PROMPTS[row], s)
        torch.testing.assert_close(law[row, 0], expected, atol=1e-6, rtol=1e-4)
        # sums of thousands of equal numbers round at the border
        assert abs(int((law[row, 0] > 0).sum()) - int((expected > 0).sum())) <= 1
        alone = Law([s], 3000, ids=[PROMPTS[row]])(logits[row : row + 1], none[:1], none[:1, :0].bool())
        assert torch.equal(dense(alone)[0], law[row])


def test_tokens_as_likely_as_the_last_of_top_p_stay() -> None:
    law = Law([Sampling(temperature=1.0, top_p=0.5)], 4, ids=[[0]])
    none = torch.zeros(1, 0, dtype=torch.long)
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()[None, None]
    kept = dense(law(logits, none, none.bool()))
    torch.testing.assert_close(kept[0, 0], torch.tensor([0.4, 0.2, 0.2, 0.2]))


@pytest.mark.parametrize("draft", [CHAIN, TREE], ids=["chain", "tree"])
def test_rows_of_a_batch_keep_their_own_settings(draft: Draft) -> None:
    names, ancestors = list(SETTINGS), draft.ancestors()
    for i in range(len(names)):
        samplings = [SETTINGS[names[(i + 5 * row) % len(names)]] for row in range(4)]
        logits = random_logits(i)
        law = Law(samplings, V, ids=PROMPTS)(logits, draft.tokens, ancestors)
        check(law, draft, logits, samplings)
        for row in range(4):  # and a row's law is the one it has alone
            alone = Law(samplings[row : row + 1], V, ids=PROMPTS[row : row + 1])
            mine = alone(logits[row : row + 1], draft.tokens[row : row + 1], ancestors)
            assert torch.equal(dense(mine)[0], dense(law)[row])


def test_low_precision_logits_give_single_precision_laws() -> None:
    logits = random_logits(0, torch.bfloat16)
    law = Law([SETTINGS["everything"]] * 4, V, ids=PROMPTS)(logits, CHAIN.tokens, CHAIN.ancestors())
    assert law.dtype == torch.float32
    check(law, CHAIN, logits, [SETTINGS["everything"]] * 4)


def test_double_logits_give_double_laws() -> None:
    logits = random_logits(0, torch.float64)
    law = Law([SETTINGS["everything"]] * 4, V, ids=PROMPTS)(logits, CHAIN.tokens, CHAIN.ancestors())
    assert law.dtype == torch.float64
    check(law, CHAIN, logits, [SETTINGS["everything"]] * 4)


@pytest.mark.parametrize("draft", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling()], ids=["sampled", "greedy"])
def test_stops_are_banned_up_to_the_floor_drafts_included(sampling: Sampling, draft: Draft) -> None:
    logits = random_logits(1)
    logits[..., [4, 6]] += 6.0  # what would stop is likely
    stops, floors, starts = [[4, 6], [4], [], [6]], [7, 2, 100, 12], [4, 1, 2, 8]
    law = Law([sampling] * 4, V, ids=PROMPTS, stops=stops, floors=floors)
    out = dense(law(logits, draft.tokens, draft.ancestors()))
    check(out, draft, logits, [sampling] * 4, prompt=starts, floor=floors, stops=stops)
    assert out[0, 0, 4] == 0
    assert out[0, -1, [4, 6]].sum() > 0 or draft is TREE


def test_penalties_follow_the_text_as_it_grows() -> None:
    ids = [[1, 2], [3]]
    samplings = [Sampling(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2), Sampling(temperature=1.0)]
    law, none = Law(samplings, V, ids=ids), torch.zeros(2, 0, dtype=torch.long)
    for emitted in ([[1, 1, 7], [2]], [[7], []], [[], [4, 4]]):
        for known, tokens in zip(ids, emitted, strict=True):
            known += tokens
        law.extend(emitted)
        logits = random_logits(len(ids[0]))[:2, :1]
        fresh = Law(samplings, V, ids=ids)
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        assert torch.equal(law(logits, none, nothing), fresh(logits, none, nothing))


@pytest.mark.parametrize("draft", [CHAIN, TREE], ids=["chain", "tree"])
def test_processors_see_every_drafted_prefix(draft: Draft) -> None:
    seen: list[list[int]] = []

    def record(prefix: Tensor, logits: Tensor) -> Tensor:
        assert logits.shape == (V,)
        assert prefix.dtype == torch.long
        seen.append(prefix.tolist())
        return logits

    samplings = [Sampling(processors=[record]), Sampling(), Sampling(temperature=1.0, processors=[record]), Sampling()]
    Law(samplings, V, ids=PROMPTS)(random_logits(0), draft.tokens, draft.ancestors())
    assert sorted(seen) == sorted(PROMPTS[row] + prefix for row in (0, 2) for prefix in prefixes(draft, row))


def test_processors_run_in_order_after_penalties_and_before_temperature() -> None:
    def double(prefix: Tensor, logits: Tensor) -> Tensor:
        return logits * 2

    def cap(prefix: Tensor, logits: Tensor) -> Tensor:
        return logits.clamp(max=3.0)

    sampling = Sampling(temperature=2.0, presence_penalty=1.0, processors=[double, cap])
    logits = torch.tensor([[[1.0, 2.0, 4.0]]])
    law = Law([sampling], 3, ids=[[2]])(logits, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0).bool())
    expected = torch.tensor([2.0, 3.0, 3.0]).div(2).softmax(-1)  # 2 x 1, 2 x 2 capped, 2 x (4 - 1) capped
    torch.testing.assert_close(law[0, 0], expected)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_temperature_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    for extra in ({}, {"top_k": 10, "top_p": 0.9, "min_p": 0.1}):
        samplings = [Sampling(temperature=temperature, **extra)] * 4
        logits = random_logits(0, dtype) * 30
        law = Law(samplings, V, ids=PROMPTS)(logits, CHAIN.tokens, CHAIN.ancestors())
        assert torch.equal(law, dense(Chosen.of(logits)).to(dtype))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert Chosen.of(logits).dense(4).tolist() == [0, 1, 0, 0]
    assert int(logits.argmax()) == 1  # what transformers does


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, "all -inf"])
def test_without_a_law_there_is_nan_and_not_a_token(sampling: Sampling, broken: float | str) -> None:
    """What the loop looks for to report broken weights, or settings that exclude every token."""
    logits = random_logits(0)[:2, :1]
    if broken == "all -inf":
        logits[0] = -torch.inf
    else:
        logits[0, 0, 7] = broken
    law = Law([sampling] * 2, V, ids=PROMPTS[:2])
    out = dense(law(logits, torch.zeros(2, 0, dtype=torch.long), torch.zeros(1, 0).bool()))
    assert out[0].sum().isnan()
    torch.testing.assert_close(out[1].sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, r"temperature -0\.1 is not allowed; use 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature nan is not allowed"),
        ({"temperature": float("inf")}, "temperature inf is not allowed"),
        ({"top_k": -1}, r"top_k -1 is not allowed; use 0 \(all tokens\) or more"),
        ({"top_p": 0.0}, r"top_p 0\.0 is not allowed; use more than 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p 1\.1 is not allowed"),
        ({"min_p": -0.1}, r"min_p -0\.1 is not allowed; use 0 to 1"),
        ({"min_p": 1.5}, r"min_p 1\.5 is not allowed"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty 0\.0 is not allowed; use more than 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf is not allowed; use a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan is not allowed; use a finite number"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias nan of token 3 is not allowed"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias inf of token 3 is not allowed; use a number below infinity"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**setting)


@pytest.mark.parametrize("setting", [{"banned": [V]}, {"banned": [-1]}, {"logit_bias": {V: 1.0}}])
def test_tokens_outside_the_vocabulary_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"is outside the vocabulary; use 0\.\.39"):
        Law([Sampling(**setting)], V, ids=[[1]])


def test_draws_follow_the_law(follows: Callable[..., bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(V, generator=generator) ** 3
    weights[[0, 5, 6, V - 1]] = 0
    for scale in (1.0, 1e-20, 1e20):  # weights need not sum to one
        tokens = draw((weights * scale).expand(200_000, V), torch.rand(200_000, generator=generator))
        assert follows(tokens.bincount(minlength=V), weights)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 0.3, 1.0, 7.0]), min_size=1, max_size=12).filter(any),
    number=st.sampled_from([0.0, 2.0**-24, 0.25, 0.5, 0.9, 1 - 2.0**-24]),
    double=st.booleans(),
)
def test_a_token_of_weight_zero_is_never_drawn(weights: list[float], number: float, double: bool) -> None:
    law = torch.tensor(weights, dtype=torch.float64 if double else torch.float32)
    token = int(draw(law, torch.tensor(number)))
    assert law[token] > 0
    before, total = float(law.double()[:token].sum()), float(law.double().sum())
    assert before / total <= number + 1e-6
    assert number - 1e-6 <= (before + float(law[token])) / total


SEEDS = torch.tensor([0, 1, 2, 12345, 2**63 - 1])


def test_numbers_are_what_they_always_were() -> None:
    """Seeded text is repeatable across versions and machines."""
    found = uniform(torch.tensor([0, 1234]), torch.tensor([[0], [17]]), Purpose.TOKEN)
    assert [float(x) * 2**24 for x in found[:, 0]] == [2327157, 1939634]
    with_offset = uniform(torch.tensor([1234]), torch.tensor([[17]]), Purpose.RESIDUAL, offset=3)
    assert float(with_offset) * 2**24 == 2074094


def test_numbers_do_not_depend_on_what_is_asked_beside_them() -> None:
    positions = torch.arange(50).expand(5, -1)
    whole = uniform(SEEDS, positions, Purpose.DRAFT, offset=torch.arange(50))
    for row in range(5):
        for start, stop in ((0, 3), (7, 8), (20, 50)):
            steps = torch.arange(start, stop)
            part = uniform(SEEDS[row : row + 1], steps[None], Purpose.DRAFT, offset=steps)
            assert torch.equal(part[0], whole[row, start:stop])


def test_numbers_are_uniform(follows: Callable[..., bool]) -> None:
    """Along positions, along seeds and along offsets, neighbouring ones included."""
    n = 100_000
    line, zero = torch.arange(n), torch.zeros(1, 1, dtype=torch.long)
    series = {
        "positions": uniform(SEEDS[:1], line[None], Purpose.TOKEN),
        "seeds": uniform(line, zero.expand(n, 1), Purpose.TOKEN),
        "distant seeds": uniform(line * 2**40, zero.expand(n, 1), Purpose.TOKEN),
        "offsets": uniform(SEEDS[:1], zero.expand(1, n), Purpose.DRAFT, offset=line),
        "residuals": uniform(SEEDS[3:4], line[None], Purpose.RESIDUAL, offset=1),
    }
    for name, numbers in series.items():
        assert numbers.dtype == torch.float32
        assert 0 <= numbers.min() < 1e-3
        assert 0.999 < numbers.max() < 1
        scaled = numbers.flatten() * 256
        assert follows(scaled.long().bincount(minlength=256), torch.ones(256)), name
        assert follows((scaled.frac() * 64).long().bincount(minlength=64), torch.ones(64)), name


def test_numbers_of_different_purpose_position_seed_and_offset_are_independent(follows: Callable[..., bool]) -> None:
    n = 60_000
    seeds, at = torch.arange(300), torch.arange(200).expand(300, -1)
    first = uniform(seeds, at, Purpose.TOKEN).flatten()
    others = {
        "next position": uniform(seeds, at + 1, Purpose.TOKEN),
        "position after": uniform(seeds, at + 2, Purpose.TOKEN),
        "next seed": uniform(seeds + 1, at, Purpose.TOKEN),
        "draft": uniform(seeds, at, Purpose.DRAFT),
        "draft with its offset": uniform(seeds, at, Purpose.DRAFT, offset=torch.arange(1, 201)),
        "accept": uniform(seeds, at, Purpose.ACCEPT),
        "residual": uniform(seeds, at, Purpose.RESIDUAL),
        "residual with offset 1": uniform(seeds, at, Purpose.RESIDUAL, offset=1),
        "position and purpose traded": uniform(seeds, at + 1, Purpose.DRAFT),
    }
    for name, other in others.items():
        cells = (first * 12).long() * 12 + (other.flatten() * 12).long()
        assert len(cells) == n
        assert follows(cells.bincount(minlength=144), torch.ones(144)), name
    draft = uniform(seeds, at, Purpose.ACCEPT, offset=1).flatten()
    again = uniform(seeds, at, Purpose.ACCEPT, offset=2).flatten()
    assert follows(((draft * 12).long() * 12 + (again * 12).long()).bincount(minlength=144), torch.ones(144))


def test_samples_of_one_request_have_seeds_of_their_own() -> None:
    seeds = {sample_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(200)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(77, 0) == 77
    assert sample_seed(77, 1) == sample_seed(77, 1) != sample_seed(77, 2)


def test_fresh_seeds_differ() -> None:
    seeds = {new_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
