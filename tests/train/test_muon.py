"""Muon for the layers' matrices: what a step does to which weights, and that schedules and checkpoints hold for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerskip.errors import RequestError
from layerskip.train.muon import with_muon
from layerskip.train.parts import parts
from layerskip.train.trainer import LayerSkipConfig, LayerSkipTrainer
from tests.train.sequences import QUIET, rows

Causal = Callable[..., Any]

STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 6,
    "seed": 3,
    "learning_rate": 1e-2,
    "curriculum": "last",
}


def trainer(model: Any, folder: Path, **changes: Any) -> LayerSkipTrainer:
    args = LayerSkipConfig(output_dir=str(folder), **{**QUIET, **STEPS, **changes})
    return LayerSkipTrainer(model, args, train_dataset=rows(48))


def trained(model: Any, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    trainer(model, folder, **changes).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_turns_matrices_of_layers_and_leaves_the_rest_to_the_other_optimizer(
    causal: Causal, tmp_path: Path, family: str
) -> None:
    first: dict[str, Any] = {"max_steps": 1, "lr_scheduler_type": "constant"}
    model = causal(family).float()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    matrices = {weight for layer in parts(model).layers for weight in layer.parameters() if weight.ndim == 2}
    names = {name for name, weight in model.named_parameters() if weight in matrices}
    assert len(names) >= 4 * 4
    after = trained(model, tmp_path / "a", muon=True, **first)
    plain = trained(causal(family).float(), tmp_path / "b", **first)
    for name, weight in before.items():
        if name not in names:
            torch.testing.assert_close(after[name], plain[name], rtol=0, atol=0, msg=name)
            continue
        # an orthogonal matrix, but for what five iterations leave of that, times what makes it as large as AdamW's
        size = torch.linalg.svdvals(after[name] - weight) / (1e-2 * 0.2 * max(weight.shape) ** 0.5)
        known = size[size > 0.05]  # directions that had a gradient
        assert len(known) >= len(size) // 3, name
        assert 0.5 < float(known.median()) < 1.3, name
        assert float(size.max()) < 1.4, name


def test_the_schedule_moves_both(causal: Causal, tmp_path: Path) -> None:
    model = causal("llama").float()
    run = trainer(model, tmp_path, muon=True, lr_scheduler_type="linear")
    run.train()
    ended = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    assert run.optimizer is not None
    run.optimizer.step()
    assert all(torch.equal(weight, ended[name]) for name, weight in model.named_parameters()), "it ends at 0"


def test_it_learns(causal: Causal, tmp_path: Path) -> None:
    run = trainer(causal("llama").float(), tmp_path, muon=True, max_steps=30, logging_steps=1)
    run.train()
    losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]


def test_resumed_is_as_if_never_stopped(causal: Causal, tmp_path: Path) -> None:
    whole = trained(causal("llama").float(), tmp_path / "whole", muon=True)
    trainer(causal("llama").float(), tmp_path / "cut", muon=True, save_strategy="steps", save_steps=4).train()
    model = causal("llama").float()
    trainer(model, tmp_path / "cut", muon=True).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_what_is_not_possible_is_refused(causal: Causal, tmp_path: Path) -> None:
    frozen = causal("llama").float()
    for layer in parts(frozen).layers:
        layer.requires_grad_(False)
    with pytest.raises(RequestError, match="none of them is trained; leave muon out"):
        trainer(frozen, tmp_path, muon=True).train()
    galore = (torch.optim.AdamW, {"lr": 1e-3, "params": []})  # as transformers gives optimizers that choose weights
    with pytest.raises(RequestError, match="not possible beside this optim; use adamw_torch"):
        with_muon(causal("llama"), rest=galore, decayed=[], learning_rate=1e-3, weight_decay=0.0)
