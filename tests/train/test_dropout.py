"""Layer dropout: rates and draws against the formulas, the layers against a plain model with rows skipped by hand.

Run as a script, this file is one of two data-parallel processes (see `two_processes`).
"""

from __future__ import annotations

import copy
import doctest
import functools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerskip.errors import RequestError
from layerskip.train import rates as module
from layerskip.train.dropout import LayerDropout
from layerskip.train.rates import depth_profile, dropped_rows, rates, time_scale

ROWS, POSITIONS, LAYERS = 6, 10, 4
KEY = {"seed": 3, "step": 5, "micro_step": 1, "layer": 2, "rank": 0}


def close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    """float64 but for the norms and softmaxes that transformers computes in float32."""
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- rates ---


def test_examples_run() -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
    assert doctest.testmod(module).attempted >= 4


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        # 2^(l/(L-1)) - 1
        ("exponential", 5, (0.0, 2**0.25 - 1, 2**0.5 - 1, 2**0.75 - 1, 1.0)),
        (
            "exponential",
            8,
            (0.0, 0.1040895137, 0.2190136542, 0.3459001926, 0.4859942891, 0.6406707120, 0.8114473286, 1.0),
        ),
        ("linear", 5, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("uniform", 3, (1.0, 1.0, 1.0)),
        ("step", 4, (0.0, 0.0, 1.0, 1.0)),
        ("step", 5, (0.0, 0.0, 0.0, 1.0, 1.0)),
        ("exponential", 1, (1.0,)),
        ("linear", 1, (1.0,)),
        ("step", 1, (1.0,)),
        ("exponential", 2, (0.0, 1.0)),
    ],
)
def test_depth_profiles(kind: str, layers: int, expected: tuple[float, ...]) -> None:
    profile = depth_profile(kind, layers)
    assert profile == pytest.approx(expected, abs=1e-9)
    assert profile[-1] == 1.0


def test_the_profile_is_the_papers() -> None:
    for layer, scale in enumerate(depth_profile("exponential", 24)):
        assert scale == pytest.approx(math.exp(layer * math.log(2) / 23) - 1, abs=1e-12)


def test_time_scales() -> None:
    assert [time_scale("constant", step=step, total_steps=3) for step in range(3)] == [1.0, 1.0, 1.0]
    scales = [time_scale("exponential", step=step, total_steps=5) for step in range(5)]
    assert scales == pytest.approx([0, 2**0.25 - 1, 2**0.5 - 1, 2**0.75 - 1, 1], abs=1e-12)
    assert time_scale("exponential", step=0, total_steps=1) == 1.0


def test_rates_multiply() -> None:
    assert rates(5, p_max=0.1) == pytest.approx([0.0, 0.0189207115, 0.0414213562, 0.0681792831, 0.1])
    given = rates(3, p_max=0.2, depth="linear", time="exponential", step=2, total_steps=5)
    assert given == pytest.approx([0.0, 0.2 * 0.5 * (2**0.5 - 1), 0.2 * (2**0.5 - 1)])
    assert rates(3, p_max=0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rates(4, p_max=1.0), "p_max 1.0 is not possible; use 0"),
        (lambda: rates(4, p_max=-0.1), "p_max -0.1 is not possible"),
        (lambda: rates(4, p_max=math.nan), "p_max nan is not possible"),
        (lambda: rates(4, p_max=0.1, depth="liner"), "unknown depth profile 'liner'; .*did you mean 'linear'"),
        (lambda: rates(4, p_max=0.1, time="exp"), "unknown time profile 'exp'; use constant, exponential"),
        (lambda: depth_profile("uniform", 0), "0 layers are not possible"),
        (lambda: time_scale("exponential", step=5, total_steps=5), "step 5 is not inside a run of 5 steps; use 0..4"),
        (lambda: time_scale("constant", step=-1, total_steps=5), "step -1 is not inside"),
    ],
)
def test_settings_that_are_not_possible(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call()


# --- draws ---


def draw(rate: float = 0.5, rows: int = 64, **changes: int) -> list[int]:
    return dropped_rows(rate, rows, **{**KEY, **changes})


def test_a_draw_is_pinned() -> None:
    # A change here breaks the resuming of every run in progress.
    assert draw(rows=16) == [0, 2, 3, 4, 5, 7, 9, 12, 13, 14, 15]


def test_draws_depend_on_their_key_only() -> None:
    before = [draw(step=step) for step in range(20)]
    np.random.seed(0)
    torch.manual_seed(0)
    torch.rand(7)
    assert [draw(step=step) for step in reversed(range(20))] == before[::-1]
    for part in KEY:
        assert draw(**{part: KEY[part] + 1}) != draw(), part
    # parts cannot stand in for each other
    ones = [draw(**{**dict.fromkeys(KEY, 0), part: 1}) for part in KEY]
    assert len({tuple(rows) for rows in ones}) == len(KEY)
    assert draw(seed=2**40, step=0) != draw(seed=0, step=2**8)


def test_every_rank_drops_the_same_number_of_other_rows() -> None:
    for step in range(200):
        ranks = [draw(0.3, 8, step=step, rank=rank) for rank in range(4)]
        assert len({len(rows) for rows in ranks}) == 1
    assert len({tuple(draw(0.5, 16, rank=rank)) for rank in range(8)}) == 8
    # the second draw says nothing about the first
    together = [
        len(set(draw(0.5, 8, step=step, rank=0)) & set(draw(0.5, 8, step=step, rank=1))) for step in range(2000)
    ]
    assert np.mean(together) == pytest.approx(sum(math.comb(8, n) * n * n / 8 for n in range(9)) / 2**8, abs=0.1)


def test_the_ends_of_the_range() -> None:
    assert draw(0.0) == []
    assert draw(0.999999, 5) == [0, 1, 2, 3, 4]
    assert draw(0.5, 0) == []
    for step in range(50):
        rows = draw(step=step)
        assert rows == sorted(set(rows))
        assert set(rows) <= set(range(64))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# 99.9% quantiles by degrees of freedom
QUANTILE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}


def check_binomial(numbers: list[int], rate: float, rows: int) -> None:
    """Chi-square of how many rows dropped, with rare counts put together."""
    chance = [math.comb(rows, n) * rate**n * (1 - rate) ** (rows - n) for n in range(rows + 1)]
    expected = np.array(chance) * len(numbers)
    counts = np.bincount(numbers, minlength=rows + 1).astype(float)
    common = expected >= 5
    cells = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 1:
        cells, wanted = cells[:-1], wanted[:-1] + wanted[-1] / len(wanted[:-1])
    assert chi_square(cells, wanted) < QUANTILE[len(cells) - 1]


@pytest.mark.parametrize(
    ("depth", "time"), [("exponential", "constant"), ("linear", "exponential"), ("step", "constant")]
)
def test_rates_come_out_at_every_depth_and_time(depth: str, time: str) -> None:
    for step in (40, 99):
        for layer, rate in enumerate(rates(5, p_max=0.4, depth=depth, time=time, step=step, total_steps=100)):
            drawn = [draw(rate, 6, step=step, layer=layer, micro_step=micro) for micro in range(1500)]
            if not rate:
                assert drawn == [[]] * 1500
                continue
            check_binomial([len(rows) for rows in drawn], rate, 6)
            by_row = np.bincount([row for rows in drawn for row in rows], minlength=6)
            assert chi_square(by_row, np.full(6, by_row.sum() / 6)) < QUANTILE[5]


def test_each_part_of_the_key_gives_independent_draws() -> None:
    for part in ("seed", "step", "micro_step", "layer"):
        check_binomial([len(draw(0.3, 8, **{part: value})) for value in range(1500)], 0.3, 8)


# --- the layers ---


def inputs(scenario: str) -> dict[str, Any]:
    """A batch and what tells its positions apart."""
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, Any] = {"input_ids": torch.randint(61, (ROWS, POSITIONS), generator=generator)}
    causal = torch.ones(POSITIONS, POSITIONS).tril().bool()
    lengths = torch.tensor([10, 3, 7, 10, 5, 8])
    if scenario == "padded-left":
        batch["attention_mask"] = (torch.arange(POSITIONS) >= (POSITIONS - lengths)[:, None]).long()
    elif scenario == "padded-right":
        batch["attention_mask"] = (torch.arange(POSITIONS) < lengths[:, None]).long()
    elif scenario == "mask-4d":  # each row cut at its own place
        part = torch.arange(POSITIONS) >= lengths[:, None]
        same = part[:, :, None] == part[:, None, :]
        batch["position_ids"] = torch.arange(POSITIONS)[None]  # OPT would read them from the mask
        batch["attention_mask"] = additive((same & causal)[:, None])
    elif scenario == "mask-4d-shared":
        batch["position_ids"] = torch.arange(POSITIONS)[None]
        batch["attention_mask"] = additive(
            (causal & (torch.arange(POSITIONS) > 2)[:, None].eq(torch.arange(POSITIONS) > 2))[None, None]
        )
    elif scenario == "position-ids":
        batch["position_ids"] = torch.arange(POSITIONS) + torch.arange(ROWS)[:, None]
    elif scenario == "packed":
        position = torch.arange(POSITIONS).expand(ROWS, -1)
        batch["position_ids"] = torch.where(position < lengths[:, None], position, position - lengths[:, None])
        batch["use_cache"] = False  # with a cache, transformers does not look for packed rows
    return batch


SCENARIOS = (
    "plain",
    "padded-left",
    "padded-right",
    "mask-4d",
    "mask-4d-shared",
    "position-ids",
    "packed",
)


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)


def layers_of(model: Any) -> nn.ModuleList:
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == LAYERS)


def loss_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """A loss in which every row and position weighs differently."""
    logits = model(**batch).logits
    weights = torch.arange(logits[..., 0].numel()).view(logits.shape[:2]).sin()[..., None]
    loss: Tensor = (weights * logits.log_softmax(-1)[..., ::3]).sum()
    return loss


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **{name: value.clone() for name, value in found.items() if value is not None}}


def skip_by_hand(model: Any, dropped: list[list[int]]) -> list[Any]:
    """Hooks after which the plain model's layers do nothing to these rows."""

    def skip(rows: list[int], _: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        skipped = torch.zeros(output.shape[0], dtype=torch.bool)
        skipped[rows] = True
        return torch.where(skipped[:, None, None], given[0], output)

    return [
        layer.register_forward_hook(functools.partial(skip, rows))
        for layer, rows in zip(layers_of(model), dropped, strict=True)
    ]


def expected_draws(dropout: LayerDropout, *, step: int, micro_step: int = 0, rows: int = ROWS) -> list[list[int]]:
    given = rates(LAYERS, p_max=dropout.p_max, depth=dropout.depth)
    return [
        dropped_rows(rate, rows, seed=dropout.seed, step=step, micro_step=micro_step, layer=layer, rank=dropout.rank)
        for layer, rate in enumerate(given)
    ]


def started(model: Any, *, step: int = 2, **settings: Any) -> LayerDropout:
    """Installed and begun, by default with the same rate at every layer."""
    dropout = LayerDropout(model, **{"p_max": 0.5, "depth": "uniform", "seed": 1, **settings}).install()
    dropout.begin(step=step, micro_step=0, total_steps=100)
    return dropout


def test_the_step_used_here_drops_some_rows_everywhere(causal: Callable[..., Any]) -> None:
    draws = expected_draws(started(causal("llama")), step=2)
    assert all(0 < len(rows) < ROWS for rows in draws)
    assert len({tuple(rows) for rows in draws}) > 1


def mlp_calls(model: Any) -> list[int]:
    """Rows at each call of an MLP, gathered from now on."""
    seen: list[int] = []
    for layer in layers_of(model):
        part = layer.mlp if hasattr(layer, "mlp") else layer.fc1
        # before the call: a recomputation may stop early, inside it
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel() // POSITIONS // 32))
    return seen


def states_around(model: Any, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """What goes into each layer and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, output: seen.append((given[0].detach(), output.detach())))
        for layer in layers_of(model)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_dropping_is_skipping_the_layer(scenario: str, family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs(scenario), causal(family), causal(family)
    draws = expected_draws(started(model), step=2)
    skip_by_hand(plain, draws)
    found, wanted = gradients(model, batch), gradients(plain, batch)
    assert found.keys() == wanted.keys()
    close(found, wanted)
    assert torch.isfinite(found["loss"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scenario", ["padded-right", "mask-4d", "packed"])
def test_dropping_is_skipping_with_eager_attention(scenario: str, family: str, causal: Callable[..., Any]) -> None:
    batch, settings = inputs(scenario), {"attn_implementation": "eager"}
    model, plain = causal(family, **settings), causal(family, **settings)
    assert model.config._attn_implementation == "eager"
    skip_by_hand(plain, expected_draws(started(model), step=2))
    close(gradients(model, batch), gradients(plain, batch))


def test_dropped_rows_keep_every_bit(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family)
    draws = expected_draws(started(model), step=2)
    for rows, (before, after) in zip(draws, states_around(model, inputs("padded-left")), strict=True):
        changed = (before != after).flatten(1).any(1)
        assert [row for row in range(ROWS) if not changed[row]] == rows


def test_dropped_rows_are_not_computed(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family)
    calls = mlp_calls(model)
    draws = expected_draws(started(model), step=2)
    model(**inputs("plain"))
    assert calls == [ROWS - len(rows) for rows in draws]


def test_the_paper_rates_leave_the_first_layer_alone(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = started(model, depth="exponential", p_max=0.9)
    for step in range(20):
        dropout.begin(step=step, micro_step=0, total_steps=20)
        model(**inputs("plain"))
    seen = dropout.observed()
    assert [rows for rows, _ in seen] == [20 * ROWS] * LAYERS
    assert seen[0] == (120, 0)
    assert seen[1][1] < seen[2][1] < seen[3][1]


def test_kept_rows_equal_the_plain_forward(family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs("packed"), causal(family), causal(family)
    dropout = started(model, p_max=0.2)
    draws = expected_draws(dropout, step=2)
    never = [row for row in range(ROWS) if not any(row in rows for rows in draws)]
    assert 0 < len(never) < ROWS
    close(model(**batch).logits[never], plain(**batch).logits[never])


# --- one row at least runs ---


def test_where_all_rows_drop_gradients_are_zeros(family: str, causal: Callable[..., Any]) -> None:
    model, plain, batch = causal(family), causal(family), inputs("padded-right")
    batch = {name: value[:2] for name, value in batch.items()}
    dropout = started(model, p_max=0.6)
    step = next(step for step in range(99) if len(expected_draws(dropout, step=step, rows=2)[2]) == 2)
    draws = expected_draws(dropout, step=step, rows=2)
    dropout.begin(step=step, micro_step=0, total_steps=100)
    calls = mlp_calls(model)
    found = gradients(model, batch)
    assert calls[2] == 1
    for parameter in layers_of(model)[2].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    skip_by_hand(plain, draws)
    close(found, gradients(plain, batch))
    before, after = states_around(model, batch)[2]
    assert torch.equal(before, after)
    assert dropout.observed()[2] == (2, 2)


def test_an_infinite_output_that_does_not_count_leaves_no_trace(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = started(model, p_max=0.9)
    step = next(step for step in range(99) if len(expected_draws(dropout, step=step, rows=1)[1]) == 1)
    dropout.begin(step=step, micro_step=0, total_steps=100)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1.5e308)
    batch = {"input_ids": inputs("plain")["input_ids"][:1]}
    outputs = []
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
    found = gradients(model, batch)
    assert outputs[0].isinf().any()
    assert all(value.isfinite().all() for value in found.values())
    assert not any(value.any() for name, value in found.items() if "layers.1." in name)


# --- off is off ---


@pytest.mark.parametrize("settings", [{"p_max": 0.0}, {"time": "exponential"}], ids=["p_max", "time"])
def test_rate_0_changes_no_bit(settings: dict[str, Any], family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs("padded-left"), causal(family), causal(family)
    started(model, step=0, **settings)
    found, wanted = gradients(model, batch), gradients(plain, batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    cache = model(**batch).past_key_values
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [POSITIONS] * LAYERS


def test_p_max_0_needs_no_begin(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = LayerDropout(model, p_max=0).install()
    model(**inputs("plain"))
    assert dropout.observed() == ((0, 0),) * LAYERS


def test_evaluation_is_untouched(family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs("padded-left"), causal(family).eval(), causal(family).eval()
    dropout = LayerDropout(model, p_max=0.9, depth="uniform").install()  # and needs no begin
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **given), plain.generate(**batch, **given))
    assert dropout.observed() == ((0, 0),) * LAYERS


def test_training_without_begin_is_refused(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    LayerDropout(model, p_max=0.1).install()
    with pytest.raises(RequestError, match=r"does not know its step; call begin\(step="):
        model(**inputs("plain"))


# --- removed without a trace ---


def instance_state(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(name, sorted(part.__dict__)) for name, part in model.named_modules()]


def test_removing_leaves_no_trace(family: str, causal: Callable[..., Any], tmp_path: Path) -> None:
    model = causal(family)
    # what transformers changes by itself at the first call and the first save
    gradients(model, inputs("plain"))
    model.zero_grad()
    model.save_pretrained(tmp_path / "first")
    before, keys, pickled = instance_state(model), list(model.state_dict()), pickle.dumps(model)
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    model.save_pretrained(tmp_path / "before")
    dropout = started(model)
    assert list(model.state_dict()) == keys
    assert instance_state(model) != before
    gradients(model, inputs("plain"))
    model.zero_grad()
    model.save_pretrained(tmp_path / "while")
    dropout.remove()
    assert instance_state(model) == before
    assert list(model.state_dict()) == keys
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert pickle.dumps(model) == pickled
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        saved = [(tmp_path / folder / file).read_bytes() for folder in ("before", "while", "after")]
        assert saved[0] == saved[1] == saved[2]
    for layer in layers_of(model):
        assert layer.forward.__func__ is type(layer).forward
    plain = causal(family)
    assert torch.equal(model(**inputs("plain")).logits, plain(**inputs("plain")).logits)


def test_an_exception_inside_removes_too(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    before = instance_state(model)
    dropout = LayerDropout(model, p_max=0.1)
    with pytest.raises(RequestError, match="does not know its step"), dropout:
        model(**inputs("plain"))
    assert instance_state(model) == before
    dropout.remove()  # twice is once
    dropout.install()
    assert instance_state(model) != before
    dropout.remove()
    assert instance_state(model) == before


def test_a_forward_that_is_taken_is_refused(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = LayerDropout(model, p_max=0.1).install()
    for another in (dropout, LayerDropout(model, p_max=0.1)):
        with pytest.raises(RequestError, match="layer 0 has a replaced forward already"):
            another.install()
    another.remove()  # was never installed, and takes nothing away
    assert "forward" in model.model.layers[0].__dict__
    ours = model.model.layers[3].forward
    model.model.layers[3].forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RequestError, match="the forward of layer 3 was replaced after install"):
        dropout.remove()
    model.model.layers[3].forward = ours
    dropout.remove()
    model.model.layers[3].forward = ours
    with pytest.raises(RequestError, match="layer 3 has a replaced forward already"):
        dropout.install()
    assert "forward" not in model.model.layers[0].__dict__  # all or none


def test_a_copy_of_the_model_has_a_dropout_of_its_own(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = started(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    before = gradients(model, inputs("plain"))
    dropout.observed()
    assert not model_logits(other).any()
    assert dropout.observed() == ((0, 0),) * LAYERS
    close(gradients(model, inputs("plain")), before, 0)


def model_logits(model: Any) -> Tensor:
    logits: Tensor = model(**inputs("plain")).logits
    return logits


# --- draws of the layers ---


def test_draws_stay_until_the_next_begin(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = started(model)
    first = model_logits(model)
    assert torch.equal(model_logits(model), first)
    dropout.begin(step=2, micro_step=1, total_steps=100)
    second = model_logits(model)
    assert not torch.equal(second, first)
    resumed = causal("llama")
    started(resumed, step=2)
    assert torch.equal(model_logits(resumed), first)
    for change in ({"seed": 2}, {"rank": 1}, {"step": 3}):
        other = causal("llama")
        started(other, **change)
        assert not torch.equal(model_logits(other), first), change


def test_what_was_observed_is_what_was_drawn(causal: Callable[..., Any]) -> None:
    model = causal("qwen3")
    dropout = started(model, depth="linear", p_max=0.7)
    wanted = [0] * LAYERS
    for micro_step in range(3):
        dropout.begin(step=4, micro_step=micro_step, total_steps=9)
        model(**inputs("plain"))
        for layer, rate in enumerate(rates(LAYERS, p_max=0.7, depth="linear")):
            key = {"seed": 1, "step": 4, "micro_step": micro_step, "layer": layer, "rank": 0}
            wanted[layer] += len(dropped_rows(rate, ROWS, **key))
    assert wanted[0] == 0 < wanted[3]
    assert dropout.observed() == tuple((3 * ROWS, dropped) for dropped in wanted)
    assert dropout.observed() == ((0, 0),) * LAYERS


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        ({"step": 9, "micro_step": 0, "total_steps": 9}, "step 9 is not inside a run of 9 steps"),
        ({"step": 0, "micro_step": -1, "total_steps": 9}, "micro-step -1 is not possible"),
    ],
)
def test_steps_that_are_not_possible(begin: dict[str, int], message: str, causal: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=message):
        LayerDropout(causal("llama"), p_max=0.1).begin(**begin)


def test_models_and_settings_that_are_refused(causal: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=r"OPTDecoder drops whole layers itself \(layerdrop 0.1\)"):
        LayerDropout(causal("opt", layerdrop=0.1), p_max=0.1)
    model = causal("llama")
    for settings, message in (
        ({"p_max": 1.0}, "p_max 1.0"),
        ({"p_max": 0.1, "depth": "exp"}, "unknown depth"),
        ({"p_max": 0.1, "time": "linear"}, "unknown time"),
        ({"p_max": 0.1, "seed": -1}, "seed -1"),
        ({"p_max": 0.1, "rank": -1}, "rank -1"),
    ):
        with pytest.raises(RequestError, match=message):
            LayerDropout(model, **settings)


# --- caches, checkpointing, autocast ---


def test_the_cache_made_by_default_changes_nothing(family: str, causal: Callable[..., Any]) -> None:
    batch, model = inputs("padded-left"), causal(family)
    assert model.config.use_cache
    started(model)
    wanted = gradients(model, {**batch, "use_cache": False})
    found = gradients(model, batch)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    cache = model(**batch).past_key_values
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [0] * LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2", "pythia"])  # by name, by place, and by another name
def test_a_cache_with_content_is_refused(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family)
    batch = inputs("plain")
    cache = model(**batch).past_key_values
    dropout = started(model)
    # at any step, also one in which nothing drops
    dropout.begin(
        step=next(s for s in range(99) if not expected_draws(dropout, step=s)[0]), micro_step=0, total_steps=100
    )
    with pytest.raises(RequestError, match=r"layer 0 got a cache with content in training .*use_cache=False"):
        model(**batch, past_key_values=cache)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs("padded-left"), causal(family), causal(family)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    dropout, _ = started(model), started(plain)
    calls = mlp_calls(model)
    found, wanted = gradients(model, batch), gradients(plain, batch)
    assert found.keys() == wanted.keys()
    close(found, wanted, 1e-12)
    kept = [ROWS - len(rows) for rows in expected_draws(dropout, step=2)]
    assert calls[:LAYERS] == kept
    assert sorted(calls[LAYERS:]) == sorted(kept)  # once more on the way back
    assert dropout.observed() == tuple((ROWS, ROWS - rows) for rows in kept)


def test_checkpoint_wrappers_recompute_the_same_draw(causal: Callable[..., Any]) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    batch, model, plain = {**inputs("plain"), "use_cache": False}, causal("llama"), causal("llama")
    dropout, _ = started(model), started(plain)
    kind = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, kind))  # as accelerate does for FSDP2
    found, wanted = gradients(model, batch), gradients(plain, batch)
    close(list(found.values()), list(wanted.values()), 1e-12)
    assert dropout.observed() == tuple((ROWS, len(rows)) for rows in expected_draws(dropout, step=2))


def test_a_class_swapped_later_is_the_one_that_runs(causal: Callable[..., Any]) -> None:
    """As FSDP2 does: a forward kept from before would not checkpoint."""
    model = causal("llama")
    started(model)
    for layer in layers_of(model):
        layer.__class__ = type("Sharded", (type(layer),), {})
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = mlp_calls(model)
    gradients(model, inputs("plain"))
    assert len(calls) == 2 * LAYERS


def test_autocast(family: str, causal: Callable[..., Any]) -> None:
    batch, model, plain = inputs("padded-left"), causal(family).float(), causal(family).float()
    draws = expected_draws(started(model), step=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, batch)
        states = states_around(model, batch)
        skip_by_hand(plain, draws)
        wanted = gradients(plain, batch)
        plain_states = states_around(plain, batch)
    for rows, (before, after), (_, reference) in zip(draws, states, plain_states, strict=True):
        assert torch.equal(before[rows], after[rows])
        assert after.dtype == reference.dtype
    assert all(value.isfinite().all() for value in found.values())
    for name, value in wanted.items():
        scale = value.abs().max()
        assert (found[name] - value).abs().max() <= 0.05 * scale + 1e-3, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bfloat16_weights(family: str, causal: Callable[..., Any]) -> None:
    model = causal(family).bfloat16()
    draws = expected_draws(started(model), step=2)
    assert all(value.isfinite().all() for value in gradients(model, inputs("plain")).values())
    for rows, (before, after) in zip(draws, states_around(model, inputs("plain")), strict=True):
        assert torch.equal(before[rows], after[rows])
        assert after.dtype == torch.bfloat16


# --- what a layer may be given, and may return ---


def layer_call(causal: Callable[..., Any], *, rows: int = ROWS, **given: Any) -> tuple[Any, Tensor, list[int]]:
    """Layer 1 called alone: its output, its input, the rows it dropped."""
    model = causal("llama")
    dropout = started(model)
    hidden = torch.randn(rows, POSITIONS, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(POSITIONS).expand(rows, -1))
    output = model.model.layers[1](hidden, position_embeddings=rotary, **given)
    return output, hidden, expected_draws(dropout, step=2, rows=rows)[1]


class Returning:
    """A forward that returns more than the hidden states, in another dtype."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, str]:
        return hidden_states.bfloat16() + 1, "weights"


def test_a_tuple_comes_back_as_a_tuple_in_the_layers_dtype(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    draws = expected_draws(started(model), step=2)
    layer = model.model.layers[1]
    layer.__class__ = type("ReturningLayer", (Returning, type(layer)), {})
    hidden = torch.randn(ROWS, POSITIONS, 32, dtype=torch.float64)
    output, rest = layer(hidden_states=hidden)  # by name, too
    assert rest == "weights"
    assert output.dtype == torch.bfloat16
    wanted = hidden.bfloat16() + 1
    wanted[draws[1]] = hidden.bfloat16()[draws[1]]
    assert torch.equal(output, wanted)


def test_what_cannot_be_cut_by_rows_is_refused(causal: Callable[..., Any]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, q, k: q >= k, ROWS, None, POSITIONS, POSITIONS, device="cpu")
    for name, value, message in (
        (
            "attention_mask",
            block,
            "cannot take rows out of attention_mask, a BlockMask, in a batch of 6; use attn_impl",
        ),
        ("cu_seq_lens_q", torch.arange(4), r"out of cu_seq_lens_q, a tensor of shape \(4,\)"),
        ("cache_position", torch.arange(ROWS), r"out of cache_position, a tensor of shape \(6,\)"),
        ("alibi", torch.zeros(4 * ROWS, 1, POSITIONS), r"out of alibi, a tensor of shape \(24, 1, 10\)"),
        ("pair", (None, [torch.zeros(3, ROWS, 2)]), r"out of pair, a tensor of shape \(3, 6, 2\)"),
    ):
        with pytest.raises(RequestError, match=message):
            layer_call(causal, **{name: value})
    model = causal("llama")
    started(model)
    with pytest.raises(RequestError, match="layer 1 got hidden states of 2 dimensions"):
        model.model.layers[1](torch.zeros(ROWS, 32))


def test_a_mask_that_no_draw_has_met_is_refused_all_the_same(causal: Callable[..., Any]) -> None:
    model = causal("llama")
    dropout = started(model, p_max=1e-9)
    with pytest.raises(RequestError, match="out of extra"):
        model.model.layers[1](torch.zeros(ROWS, POSITIONS, 32), extra=torch.arange(4))
    assert dropout.observed()[1] == (ROWS, 0)


def test_what_is_the_same_for_all_rows_stays(causal: Callable[..., Any]) -> None:
    given = {
        "num_items_in_batch": torch.tensor(7),
        "position_ids": torch.arange(POSITIONS)[None],
        "attention_mask": torch.ones(1, 1, POSITIONS, POSITIONS).tril().bool(),
        "flag": True,
        "word": "sdpa",
        "scale": 0.5,
        "nothing": (None, [None]),
    }
    output, hidden, dropped = layer_call(causal, **given)
    changed = (output != hidden).flatten(1).any(1)
    assert [row for row in range(ROWS) if not changed[row]] == dropped


def test_a_mask_expanded_over_the_rows_is_not_copied(causal: Callable[..., Any]) -> None:
    masks: list[Tensor] = []
    model = causal("llama")
    started(model)
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    hidden = torch.randn(ROWS, POSITIONS, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(POSITIONS)[None])
    mask = torch.ones(1, 1, POSITIONS, POSITIONS).tril().bool()
    model.model.layers[1](hidden, position_embeddings=rotary, attention_mask=mask.expand(ROWS, -1, -1, -1))
    assert 0 < masks[0].shape[0] < ROWS
    assert masks[0].data_ptr() == mask.data_ptr()


def test_a_flattened_batch_of_one_row_may_bring_anything(causal: Callable[..., Any]) -> None:
    """Flash attention's packing is one row with its boundaries; where that row drops, it counts for nothing."""
    output, hidden, dropped = layer_call(causal, rows=1, cu_seq_lens_q=torch.tensor([0, 3, 10]))
    assert torch.equal(output, hidden) == (dropped == [0])


# --- PEFT ---


def test_lora_layers_train(causal: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(causal("llama"), LoraConfig(**settings)))
    model, plain = models
    skip_by_hand(plain, expected_draws(started(model), step=2))
    found, wanted = gradients(model, inputs("padded-left")), gradients(plain, inputs("padded-left"))
    assert found.keys() == wanted.keys()
    assert all("lora" in name for name in list(found)[1:])
    close(found, wanted)


# --- torch.compile ---


@pytest.mark.slow
def test_torch_compile_gives_the_same_gradients(causal: Callable[..., Any]) -> None:
    model, plain = causal("llama"), causal("llama")
    batch = {**inputs("plain"), "use_cache": False}
    dropout, other = started(model), started(plain)
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        for each in (dropout, other):
            each.begin(step=step, micro_step=0, total_steps=3)
        found, wanted = gradients(compiled, batch), gradients(plain, batch)
        close(list(found.values()), list(wanted.values()))


# --- two processes ---

WORLD, SHARE = 2, 4  # ranks, and rows of each


def worker(rank: int, folder: Path) -> dict[str, Any]:
    """What one rank saw: for DDP and FSDP2, over a step with some rows dropped and one where a layer loses all."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    reports = {way: data_parallel(rank, way) for way in ("ddp", "fsdp2")}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return reports


def data_parallel(rank: int, way: str) -> dict[str, Any]:
    from conftest import build  # the script's own folder
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, reference = build("llama"), build("llama")
    dropouts = [
        LayerDropout(part, p_max=0.5, depth="uniform", seed=1, rank=rank).install() for part in (model, reference)
    ]
    calls = mlp_calls(model)
    wrapped: Any = model
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in layers_of(model):
            fully_shard(layer)
        fully_shard(model)
    again = LayerDropout(wrapped, p_max=0.5, depth="uniform", seed=1, rank=rank)  # found through the wrapper
    report: dict[str, Any] = {
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "found": again._layers == dropouts[0]._layers,
        "steps": [],
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = {"input_ids": torch.randint(61, (SHARE, POSITIONS), generator=torch.Generator().manual_seed(rank))}
    for step in steps_of_interest():
        for dropout in dropouts:
            dropout.begin(step=step, micro_step=0, total_steps=100)
        calls.clear()
        found, wanted = gradients(wrapped, batch), gradients(reference, batch)
        worst = 0.0
        for value, mine in zip(list(found.values())[1:], list(wanted.values())[1:], strict=True):
            torch.distributed.all_reduce(mine)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            worst = max(worst, float((whole - mine / WORLD).abs().max())) if whole.isfinite().all() else math.inf
        optimizer.step()
        with torch.no_grad():  # the next step is compared from where this one led
            for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                theirs.copy_(ours.full_tensor() if isinstance(ours, DTensor) else ours)
        draws = [
            dropped_rows(0.5, SHARE, seed=1, step=step, micro_step=0, layer=layer, rank=rank) for layer in range(LAYERS)
        ]
        report["steps"].append(
            {"worst": worst, "dropped": dropouts[0].observed(), "draws": draws, "calls": list(calls)}
        )
    dropouts[0].remove()
    report["clean"] = not any("forward" in layer.__dict__ for layer in layers_of(model))
    return report


def steps_of_interest() -> list[int]:
    """A step where layers lose some rows, one where a layer loses all, and one more."""
    numbers = [
        [len(dropped_rows(0.5, SHARE, seed=1, step=step, micro_step=0, layer=layer, rank=0)) for layer in range(LAYERS)]
        for step in range(100)
    ]
    some = next(step for step, each in enumerate(numbers) if SHARE not in each and sum(each) > 1)
    every = next(step for step, each in enumerate(numbers) if SHARE in each and 1 in each)
    return [some, every, some]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The reports of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def check_ranks(reports: list[dict[str, Any]]) -> None:
    assert all(report["found"] and report["clean"] for report in reports)
    for ranks in zip(*(report["steps"] for report in reports), strict=True):
        assert all(each["worst"] < 1e-6 for each in ranks)  # the mean of what each rank has alone
        assert ranks[0]["dropped"] == ranks[1]["dropped"]
        for each in ranks:
            assert each["dropped"] == [[SHARE, len(rows)] for rows in each["draws"]]
    assert any(one["draws"] != other["draws"] for one, other in zip(*(r["steps"] for r in reports), strict=True))
    assert [SHARE, SHARE] in reports[0]["steps"][1]["dropped"]


@pytest.mark.slow  # two processes; test_distributed has two as well, which drop as many rows
def test_ddp(two_processes: list[dict[str, Any]]) -> None:
    reports = [report["ddp"] for report in two_processes]
    check_ranks(reports)
    for report in reports:
        assert not report["sharded"]
        assert all(len(each["calls"]) == LAYERS for each in report["steps"])


@pytest.mark.slow  # two processes; test_distributed has two as well, which drop as many rows
def test_fsdp2_with_gradient_checkpointing(two_processes: list[dict[str, Any]]) -> None:
    reports = [report["fsdp2"] for report in two_processes]
    check_ranks(reports)
    for report in reports:
        assert report["sharded"]
        for each in report["steps"]:
            rows = [max(SHARE - len(dropped), 1) for dropped in each["draws"]]
            assert each["calls"][:LAYERS] == rows
            assert len(each["calls"]) == 2 * LAYERS  # installed before sharding, it checkpoints still


if __name__ == "__main__":
    place = Path(sys.argv[2])
    (place / f"{sys.argv[1]}.json").write_text(json.dumps(worker(int(sys.argv[1]), place)))
    os._exit(0)  # torch's gloo threads now and then abort the interpreter on its way out
