"""Whatever the model's shape, the drafter, the draft's length and the company: greedy text is plain decoding's."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerskip.decode.batch import Batch
from layerskip.decode.drafters import Assistant, EarlyExit, Lookup
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Sampling
from layerskip.model.decoder import Decoder
from layerskip.model.shape import Rope, Shape

ROPES = [
    Rope(kind="default", theta=1e4, original_context=48),
    Rope(kind="linear", theta=1e4, original_context=48, factor=3.0),
    Rope(kind="llama3", theta=1e4, original_context=8, factor=4.0),
    Rope(kind="yarn", theta=1e4, original_context=8, factor=6.0),
    Rope(kind="dynamic", theta=1e4, original_context=48, factor=2.0),
]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads, group, head_width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    layers = draw(st.integers(2, 5))
    width = draw(st.integers(3, 12))
    rope = draw(st.sampled_from(ROPES))
    return Shape(
        model_type="qwen3",
        vocab=draw(st.integers(2, 12)),
        width=width,
        layers=layers,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_width=max(head_width, 4) if rope.kind == "dynamic" else head_width,
        ffn_width=draw(st.integers(2, 16)),
        eps=1e-5,
        rope=rope,
        context=48,
        tied=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu", "relu"])),
        query_key_value_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        query_key_norm=draw(st.booleans()),
        windows=tuple(draw(st.lists(st.sampled_from([None, 1, 3, 6]), min_size=layers, max_size=layers))),
    )


def random_decoder(shape: Shape, seed: int) -> Decoder:
    decoder = Decoder(shape).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise * 0.7 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return decoder


@st.composite
def companies(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Rows, as (prompt length, tokens wanted, round in which it joins)."""
    return draw(st.lists(st.tuples(st.integers(1, 14), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=4))


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, 8))
    return [draw(st.integers(0, i)) for i in range(size)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    shape=shapes(),
    seed=st.integers(0, 1000),
    company=companies(),
    kind=st.sampled_from(["early exit", "confident exit", "lookup", "assistant", "tree"]),
    tokens=st.integers(1, 9),
    parents=trees(),
    sampled=st.booleans(),
    data=st.data(),
)
def test_text_never_depends_on_how_it_was_drafted(
    generate: Callable[..., Any],
    tree: Any,
    shape: Shape,
    seed: int,
    company: list[tuple[int, int, int]],
    kind: str,
    tokens: int,
    parents: list[int],
    sampled: bool,
    data: st.DataObject,
) -> None:
    """Greedily with any drafter; with a seed where drafts are deterministic."""
    decoder, generator = random_decoder(shape, seed), torch.Generator().manual_seed(seed)
    sampled = sampled and kind in ("lookup", "tree")
    requests = [
        Request(
            torch.randint(shape.vocab, (length,), generator=generator).tolist(),
            wanted,
            eos=[0] if wanted % 3 == 0 else [],
            sampling=Sampling(
                temperature=0.8 if sampled else 0.0,
                seed=row,
                repetition_penalty=1.3 if row % 2 else 1.0,
                frequency_penalty=0.2 if row % 3 == 1 else 0.0,
            ),
        )
        for row, (length, wanted, _) in enumerate(company)
    ]
    expected = [generate(decoder, [request]).texts[0] for request in requests]
    exit = data.draw(st.integers(1, shape.layers - 1), label="exit")
    drafter = {
        "early exit": lambda: EarlyExit(exit, tokens=tokens),
        "confident exit": lambda: EarlyExit(exit, tokens=tokens, confidence=0.6),
        "lookup": lambda: Lookup(tokens=tokens, ngram=2, predicted=expected[0] if seed % 2 else ()),
        "assistant": lambda: Assistant(random_decoder(shape, seed + seed % 2), tokens=tokens),
        "tree": lambda: tree(
            [*requests[0].ids, *expected[0]], vocab=shape.vocab, tokens=len(parents), parents=parents, drifting=seed % 4
        ),
    }[kind]()
    batch = Batch(decoder, Pool(decoder.cache(rows=1, slots=1)), drafter=drafter)
    texts: dict[int, list[int]] = {}
    rows: dict[int, int] = {}
    for time in range(4):
        joining = [row for row, (_, _, when) in enumerate(company) if when == time]
        rows |= dict(zip(batch.join([requests[row] for row in joining]), joining, strict=True))
        for done in batch.round():
            texts[rows[done.key]] = texts.get(rows[done.key], []) + done.tokens
    while len(batch):
        for done in batch.round():
            assert done.error is None
            texts[rows[done.key]] = texts.get(rows[done.key], []) + done.tokens
    assert [texts[row] for row in range(len(company))] == expected
