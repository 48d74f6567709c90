"""Hidden dropout and the average of the weights: what they do while training, and that nothing of them stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from layerskip.errors import RequestError
from layerskip.train.average import FILE, WeightAverage
from layerskip.train.hidden import HiddenDropout
from layerskip.train.trainer import LayerSkipConfig, LayerSkipTrainer
from tests.train.sequences import QUIET, rows

Causal = Callable[..., Any]


RECIPE: dict[str, Any] = {"dropout": 0.3, "curriculum": "rotational", "rotation": 3, "exit_scale": 1.0}


def states(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Kept(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **rest: Any) -> None:
        self.after.append(states(model))


def trainer(model: Any, folder: Path, **changes: Any) -> LayerSkipTrainer:
    kept = changes.pop("callbacks", [])
    steps = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 3e-3, "seed": 3}
    args = LayerSkipConfig(output_dir=str(folder), **{**QUIET, **RECIPE, **steps, **changes})
    return LayerSkipTrainer(model, args, train_dataset=rows(48), eval_dataset=rows(8), callbacks=kept)


# -- hidden dropout


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "gpt2"])
def test_a_rate_of_the_numbers_added_to_the_states_is_zero_in_training_only(causal: Causal, family: str) -> None:
    model = causal(family)
    plain = states(model)
    ids = torch.arange(24).view(2, 12)
    expected = model.eval()(input_ids=ids).logits
    seen: list[torch.Tensor] = []
    with HiddenDropout(model, rate=0.25):
        places = [model.get_input_embeddings(), *HiddenDropout(model, rate=0.25)._places[1:]]
        hooks = [place.register_forward_hook(lambda _, __, out: seen.append(_first(out))) for place in places]
        assert torch.equal(model(input_ids=ids).logits, expected)
        seen.clear()
        model.train()(input_ids=ids)
        for hook in hooks:
            hook.remove()
    assert len(seen) == 1 + 2 * 4
    for out in seen:
        assert 0.15 < float((out == 0).double().mean()) < 0.35
    assert torch.equal(model.eval()(input_ids=ids).logits, expected), "something of it stayed"
    assert same(plain, states(model))


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def test_it_keeps_the_mean(causal: Causal) -> None:
    embedding = (model := causal("llama")).get_input_embeddings()
    ids = torch.full((1, 20_000), 7)
    with HiddenDropout(model, rate=0.5):
        mean = embedding(ids).mean((0, 1))
    torch.testing.assert_close(mean, embedding.weight[7], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_refused(causal: Causal, rate: float) -> None:
    with pytest.raises(RequestError, match=f"hidden_dropout {rate} is not possible; use a number from 0 and below 1"):
        HiddenDropout(causal("llama"), rate=rate)


def test_layers_with_other_parts_are_refused(causal: Causal) -> None:
    with pytest.raises(RequestError, match="OPTDecoderLayer is not one attention and one feed-forward module"):
        HiddenDropout(causal("opt"), rate=0.1)


def test_the_trainer_trains_with_it(causal: Causal, tmp_path: Path) -> None:
    with_it, without = causal("llama").float(), causal("llama").float()
    trainer(with_it, tmp_path / "a", hidden_dropout=0.3).train()
    trainer(without, tmp_path / "b").train()
    assert not same(states(with_it), states(without))


# -- the average of the weights


def test_what_is_left_is_the_moving_average_of_the_steps(causal: Causal, tmp_path: Path) -> None:
    model, kept = causal("llama").float(), Kept()
    trainer(model, tmp_path, ema_decay=0.3, callbacks=[kept]).train()
    expected = kept.after[0]
    for step, after in enumerate(kept.after[1:], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * after[name] for name in after}
    for name, weight in states(model).items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert not same(expected, kept.after[-1])


def test_small_steps_count_in_16_bits_too(causal: Causal) -> None:
    model = causal("llama").bfloat16()
    average = WeightAverage(model, decay=0.999)
    weight = model.model.norm.weight
    expected = 1.0
    for step in range(2000):
        value = 1.0 if step < 1000 else 1.5
        torch.nn.init.constant_(weight, value)
        average.update()
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * value
        with average.applied():
            pass  # an evaluation on the way
    average.finish()
    assert 1.4 < expected < 1.5
    torch.testing.assert_close(weight.float(), torch.full_like(weight.float(), expected), atol=0.01, rtol=0)


def test_training_goes_on_from_the_steps_own_weights(causal: Causal, tmp_path: Path) -> None:
    averaged, plain = Kept(), Kept()
    watched = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer(causal("llama").float(), tmp_path / "a", ema_decay=0.9, callbacks=[averaged], **watched).train()
    trainer(causal("llama").float(), tmp_path / "b", callbacks=[plain]).train()
    assert all(same(one, other) for one, other in zip(averaged.after, plain.after, strict=True))


def test_the_average_is_what_is_evaluated(causal: Causal, tmp_path: Path) -> None:
    model = causal("llama").float()
    run = trainer(model, tmp_path, ema_decay=0.5, eval_strategy="steps", eval_steps=6)
    run.train()
    during = next(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(during, abs=1e-6)


def test_a_cut_run_resumes_its_average(causal: Causal, tmp_path: Path) -> None:
    whole, cut = causal("llama").float(), causal("llama").float()
    often = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}
    trainer(whole, tmp_path / "whole", **often).train()
    trainer(cut, tmp_path / "cut", **often).train()  # its checkpoint-4 is that of a run cut there
    assert (tmp_path / "cut" / "checkpoint-4" / FILE).is_file()
    resumed = causal("llama", seed=5).float()
    trainer(resumed, tmp_path / "cut", **often).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert same(states(whole), states(resumed))


def test_a_checkpoint_without_an_average_is_refused(causal: Causal, tmp_path: Path) -> None:
    trainer(causal("llama").float(), tmp_path, save_strategy="steps", save_steps=3).train()
    again = trainer(causal("llama").float(), tmp_path, ema_decay=0.9)
    with pytest.raises(RequestError, match=r"checkpoint-3 keeps no average of weights .* go on without ema_decay"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ema_decay": 1.0}, "ema_decay 1.0 is not possible; use a number from 0 and below 1"),
        ({"ema_decay": 0.9, "fully_shard": True}, "ema_decay averages whole weights, and these are sharded; leave it"),
        (
            {"ema_decay": 0.9, "load_best_model_at_end": True, "save_strategy": "best", "eval_strategy": "steps"},
            "leave load_best_model_at_end out",
        ),
    ],
)
def test_an_average_that_is_not_possible_is_refused(
    causal: Causal, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    extra = {"metric_for_best_model": "loss"} if "load_best_model_at_end" in changes else {}
    with pytest.raises(RequestError, match=reason):
        trainer(causal("llama").float(), tmp_path, **changes, **extra)
