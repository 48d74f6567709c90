"""The Trainer: plain training where the recipe asks for nothing, the recipe where it asks, and runs that resume."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, Trainer, TrainingArguments

from layerskip.errors import NumericalError, RequestError
from layerskip.train.dropout import LayerDropout
from layerskip.train.exits import EarlyExits
from layerskip.train.trainer import LayerSkipConfig, LayerSkipTrainer

RECIPE: dict[str, Any] = {"dropout": 0.3, "curriculum": "rotational", "rotation": 3, "exit_scale": 1.0}


def rows(count: int = 48, length: int = 14) -> list[dict[str, Tensor]]:
    """Sequences that a small model learns quickly: each token is the last plus a step of its own."""
    found = []
    for i in range(count):
        ids = (torch.arange(length) * (1 + i % 3) + i) % 61
        labels = ids.clone()
        labels[:4] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 3e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }


def states(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_no_dropout_and_only_the_last_exit_is_plain_trainer_bit_for_bit(
    causal: Callable[..., Any], tmp_path: Path
) -> None:
    start = causal("llama").float()
    plain, ours = copy.deepcopy(start), copy.deepcopy(start)
    one = Trainer(plain, TrainingArguments(**settings(tmp_path)), train_dataset=rows())
    one.train()
    config = LayerSkipConfig(**settings(tmp_path), curriculum="last", dropout=0.0, loss_chunk=0)
    other = LayerSkipTrainer(ours, config, train_dataset=rows())
    other.train()
    assert same(states(plain), states(ours))
    assert not same(states(start), states(ours))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (one, other)]
    assert losses[0] == losses[1]


def test_it_logs_the_loss_of_every_exit_and_the_rates_of_dropout(causal: Callable[..., Any], tmp_path: Path) -> None:
    config = LayerSkipConfig(**settings(tmp_path, max_steps=60, logging_steps=30), **RECIPE)
    trainer = LayerSkipTrainer(causal("llama").float(), config, train_dataset=rows(), eval_dataset=rows(6))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    # exit 1 weighs nothing in the paper's formula, so it costs nothing and is not reported
    assert {key for key in logged[0] if key.startswith("exit_loss/")} == {f"exit_loss/{exit}" for exit in (2, 3, 4)}
    assert logged[1]["exit_loss/4"] < logged[0]["exit_loss/4"]
    rates = [logged[1].get(f"dropout_rate/{layer}", 0.0) for layer in range(4)]
    expected = [0.3 * (math.exp(layer * math.log(2) / 3) - 1) for layer in range(4)]
    assert rates == pytest.approx(expected, abs=0.08)
    assert logged[1]["tokens_per_second"] > 0
    metrics = trainer.evaluate()
    for exit in range(1, 5):
        assert 0 <= metrics[f"eval_exit_accuracy/{exit}"] <= 1
        assert 0 <= metrics[f"eval_exit_agreement/{exit}"] <= 1
    assert metrics["eval_exit_agreement/4"] == 1.0
    assert metrics["eval_loss"] == metrics["eval_exit_loss/4"]


def test_curriculum_and_draws_follow_the_steps_of_the_optimizer(
    causal: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[tuple[int, int, int]] = []
    exits: list[list[int]] = []

    def draw(self: LayerDropout, *, step: int, micro_step: int, total_steps: int) -> None:
        draws.append((step, micro_step, total_steps))
        begin_dropout(self, step=step, micro_step=micro_step, total_steps=total_steps)

    def learn(self: EarlyExits, weights: dict[int, float]) -> None:
        exits.append(sorted(weights))
        begin_exits(self, weights)

    begin_dropout, begin_exits = LayerDropout.begin, EarlyExits.begin
    monkeypatch.setattr(LayerDropout, "begin", draw)
    monkeypatch.setattr(EarlyExits, "begin", learn)
    config = LayerSkipConfig(**settings(tmp_path), **RECIPE)
    LayerSkipTrainer(causal("llama").float(), config, train_dataset=rows()).train()
    assert draws == [(step, micro, 6) for step in range(6) for micro in range(2)]
    # R = 3 of 4 layers: exits 1 and 4 (exit 1 weighs nothing), then 2 and 4, then 3 and 4; two batches a step
    assert exits == [each for each in [[4], [2, 4], [3, 4]] * 2 for _ in range(2)]


@pytest.mark.parametrize("references", [1, 2])
def test_an_anchor_holds_the_last_layer_near_its_references(
    causal: Callable[..., Any], tmp_path: Path, references: int
) -> None:
    folders = [str(tmp_path / f"reference-{seed}") for seed in range(references)]
    for seed, folder in enumerate(folders):
        causal("llama", seed=10 + seed).save_pretrained(folder)
    theirs = torch.stack([law(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders]).mean(0)
    far = {}
    for anchor in (0.0, 20.0):
        keys = {"anchor": anchor, "reference": folders if references > 1 else folders[0]} if anchor else {}
        config = LayerSkipConfig(**settings(tmp_path, max_steps=20), curriculum="last", **keys)
        model = causal("llama").float()
        LayerSkipTrainer(model, config, train_dataset=rows()).train()
        far[anchor] = float((theirs * (theirs.log() - law(model).log())).sum(-1).mean())
    assert far[20.0] < 0.5 * far[0.0]


def law(model: Any) -> Tensor:
    """What the last layer predicts on some rows, (tokens, V)."""
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().softmax(-1).flatten(0, 1)


def test_evaluation_is_by_token_and_what_the_model_says(causal: Callable[..., Any], tmp_path: Path) -> None:
    model = causal("llama").float()
    config = LayerSkipConfig(**settings(tmp_path, per_device_eval_batch_size=4), curriculum="last")
    uneven = [{name: value[: 14 - i] for name, value in row.items()} for i, row in enumerate(rows(3))]
    trainer = LayerSkipTrainer(model, config, eval_dataset=uneven, data_collator=lambda batch: _padded(batch))
    metrics = trainer.evaluate()
    total, count = 0.0, 0
    for row in uneven:
        with torch.no_grad():
            table = model.eval()(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        targets = row["labels"][1:]
        total -= sum(float(table[i, t]) for i, t in enumerate(targets.tolist()) if t != -100)
        count += int((targets != -100).sum())
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def _padded(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.stack([pad(row["input_ids"], (0, longest - len(row["input_ids"]))) for row in batch]),
        "labels": torch.stack([pad(row["labels"], (0, longest - len(row["labels"])), value=-100) for row in batch]),
    }


def test_a_run_that_was_cut_and_resumed_equals_one_that_was_not(causal: Callable[..., Any], tmp_path: Path) -> None:
    start = causal("llama").float()
    whole = copy.deepcopy(start)
    config = LayerSkipConfig(**settings(tmp_path / "whole", max_steps=8), **RECIPE, distillation=0.5)
    LayerSkipTrainer(whole, config, train_dataset=rows()).train()

    class Killed(Exception):
        pass

    class Cut(LayerSkipTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 5:
                raise Killed
            return super().training_step(*args, **kwargs)

    saving = settings(tmp_path / "cut", max_steps=8, save_strategy="steps", save_steps=2)
    config = LayerSkipConfig(**saving, **RECIPE, distillation=0.5)
    with pytest.raises(Killed):
        Cut(copy.deepcopy(start), config, train_dataset=rows()).train()
    resumed = copy.deepcopy(start)
    LayerSkipTrainer(resumed, config, train_dataset=rows()).train(resume_from_checkpoint=True)
    assert same(states(whole), states(resumed))


def test_gradient_checkpointing_changes_nothing(causal: Callable[..., Any], tmp_path: Path) -> None:
    start = causal("llama").float()
    models = [copy.deepcopy(start) for _ in range(2)]
    for model, on in zip(models, (False, True), strict=True):
        config = LayerSkipConfig(**settings(tmp_path, gradient_checkpointing=on), **RECIPE)
        LayerSkipTrainer(model, config, train_dataset=rows()).train()
    for name, tensor in states(models[0]).items():
        torch.testing.assert_close(tensor, states(models[1])[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_it_saves_is_an_ordinary_checkpoint(causal: Callable[..., Any], tmp_path: Path) -> None:
    model = causal("llama").float()
    config = LayerSkipConfig(**settings(tmp_path / "run"), **RECIPE)
    trainer = LayerSkipTrainer(model, config, train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(states(model), states(loaded))
    assert "forward" not in model.__dict__
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"
    from layerskip.model.checkpoint import load_decoder

    decoder = load_decoder(tmp_path / "saved")
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        hidden = decoder.run(decoder.embed(ids), torch.arange(14)[None], decoder.cache(rows=1, slots=14))
        torch.testing.assert_close(decoder.logits(hidden), model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(causal: Callable[..., Any], tmp_path: Path) -> None:
    model = causal("llama").float()

    class Breaks(LayerSkipTrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == 4:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)
            return super().training_step(model, *args, **kwargs)

    saving = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=8)
    with pytest.raises(NumericalError, match=r"the loss is not finite at or before step 6; .* resume from there"):
        Breaks(model, LayerSkipConfig(**saving, **RECIPE), train_dataset=rows()).train()
    kept = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    good = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(bool(tensor.isfinite().all()) for tensor in good.state_dict().values())


def test_logits_that_exits_cannot_share_are_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    granite = GraniteConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None, logits_scaling=2.0
    )
    with pytest.raises(RequestError, match="logits of GraniteForCausalLM are not its head"):
        LayerSkipTrainer(GraniteForCausalLM(granite), LayerSkipConfig(**settings(tmp_path)))


def test_a_loss_of_the_callers_own_is_refused_where_exits_are_learnt(
    causal: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="compute_loss_func computes another loss than that of the exits"):
        LayerSkipTrainer(causal("llama"), LayerSkipConfig(**settings(tmp_path), **RECIPE), compute_loss_func=len)
    plain = LayerSkipConfig(**settings(tmp_path), curriculum="last", label_smoothing_factor=0.1)
    LayerSkipTrainer(causal("llama"), plain, train_dataset=rows(8)).train()


def test_every_row_is_evaluated_whatever_training_leaves_out(causal: Callable[..., Any], tmp_path: Path) -> None:
    found = []
    for dropped in (False, True):
        args = LayerSkipConfig(
            **settings(tmp_path), **RECIPE, dataloader_drop_last=dropped, per_device_eval_batch_size=4
        )
        found.append(LayerSkipTrainer(causal("llama"), args, eval_dataset=rows(7)).evaluate()["eval_loss"])
        assert args.dataloader_drop_last is dropped
    assert found[0] == found[1]


def test_evaluation_after_training_computes_as_evaluation_within(causal: Callable[..., Any], tmp_path: Path) -> None:
    args = LayerSkipConfig(**settings(tmp_path), **RECIPE, bf16=True, eval_strategy="steps", eval_steps=6)
    trainer = LayerSkipTrainer(causal("llama").float(), args, train_dataset=rows(), eval_dataset=rows(8))
    trainer.train()
    within = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == within


def test_settings_outside_the_model_are_refused(causal: Callable[..., Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"rotation": 5, "curriculum": "rotational"}, r"rotational period 5 does not fit 4 layers; use 1\.\.4"),
        ({"dropout": 1.0}, "1"),
        ({"curriculum": "sideways"}, "unknown curriculum 'sideways'"),
        ({"distillation": 2.0}, "distillation 2.0"),
        ({"anchor": 1.0}, "an anchor needs a reference model"),
        (
            {"label_smoothing_factor": 0.1, "rotation": 3},
            "label_smoothing_factor computes another loss than that of the exits",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            LayerSkipTrainer(causal("llama"), LayerSkipConfig(**settings(tmp_path), **changes), train_dataset=rows(2))
