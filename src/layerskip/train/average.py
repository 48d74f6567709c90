"""Averages of weights, which generalise better than any one of what they average: of several models, of a run's steps.

Of steps it is an exponential moving average (Polyak and Juditsky, 1992; Izmailov et al., "Averaging Weights Leads to
Wider Optima", UAI 2018). Knows weights, and the file in a checkpoint that keeps their average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from layerskip.errors import RequestError

FILE = "average.safetensors"
"""What a checkpoint keeps the average in, beside the weights that training goes on from."""


@torch.no_grad()
def mean_weights(models: Sequence[tuple[str, nn.Module]]) -> nn.Module:
    """The first of several models, with the mean of all their weights.

    Trained from one start with other draws or settings, they are better so than one by one (Wortsman et al., "Model
    soups", ICML 2022).

    Args:
        models: each with what messages call it.

    Raises:
        RequestError: they are not of one shape.
    """
    (first, mean), *others = models
    weights = dict(mean.named_parameters())
    for count, (name, other) in enumerate(others, start=2):
        theirs = dict(other.named_parameters())
        if {key: weight.shape for key, weight in theirs.items()} != {key: w.shape for key, w in weights.items()}:
            raise RequestError(f"{name} is not of the shape of {first}, so their mean means nothing; name equal ones")
        for key, weight in weights.items():
            weight.lerp_(theirs[key], 1 / count)
    return mean


class WeightAverage(TrainerCallback):
    """average <- d average + (1 - d) weights after every step, with d = min(decay, (1 + n) / (10 + n)) at step n.

    The first steps count less that way: n is the number of steps averaged, so that the beginning is soon forgotten.

    Args:
        model: whose trained weights are averaged.
        decay: in [0, 1); 0.999 remembers the last thousand steps.

    Raises:
        RequestError: a decay out of range.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise RequestError(f"ema_decay {decay} is not possible; use a number from 0 and below 1")
        self.decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._average: dict[str, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now."""
        weights: list[Tensor] = list(self._weights.values())
        if not self._average:
            self._average = {name: _precise(weight.detach().clone()) for name, weight in self._weights.items()}
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(list(self._average.values()), [_precise(weight) for weight in weights], 1 - decay)
        self._steps += 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Takes in the weights after an optimizer step."""
        self.update()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average for weights, while it lasts; as it is where there is no average."""
        before = {name: self._weights[name].detach().clone() for name in self._average}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(before)

    def finish(self) -> None:
        """Leaves the model with the average for weights, for good."""
        self._put(self._average)
        self._average = {}

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self._weights[name].copy_(values)

    def save(self, folder: Path) -> None:
        """Writes the average into a checkpoint."""
        steps = {"steps": torch.tensor(self._steps)}
        save_file({name: weight.contiguous() for name, weight in self._average.items()} | steps, folder / FILE)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint's average.

        Raises:
            RequestError: the checkpoint keeps none, or that of other weights.
        """
        if not (folder / FILE).is_file():
            raise RequestError(f"{folder} keeps no average of weights ({FILE}); go on without ema_decay")
        saved = load_file(folder / FILE)
        self._steps = int(saved.pop("steps"))
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        if {name: weight.shape for name, weight in saved.items()} != shapes:
            raise RequestError(f"{folder / FILE} is the average of another model's weights; use its own checkpoint")
        # in the order of the weights: a file's is alphabetical
        self._average = {name: _precise(saved[name].to(weight.device)) for name, weight in self._weights.items()}


def _precise(weight: Tensor) -> Tensor:
    """In float32 at least: in 16 bits a thousandth of a change is no change, and the average would stand still."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
