"""Folders that are complete or not there: written beside their place, then renamed.

Knows files, why they could not be written, and when a `Trainer` writes some; knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from layerskip.errors import StorageError

# a dropped connection is the transport's error, a base of the hub's that is named differently by its versions
_REFUSED = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)

UNFINISHED = ".unfinished"
"""The folder in an output folder where what is being saved lies until it is complete."""


@contextmanager
def writing(folder: Path, *, kept: str) -> Iterator[None]:
    """Turns the many ways in which a disk refuses into one error.

    Args:
        folder: what is written.
        kept: what the user still has, for the message.

    Raises:
        StorageError: something in it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save and safetensors have errors of their own for a full disk
        reason = _reason(error)
        if reason is None:
            raise
        raise StorageError(
            f"{folder} could not be written: {reason}; {kept}; mend that, then run the same command again"
        ) from error


def _reason(error: BaseException) -> str | None:
    """What the system said, None for an error that is not about storage."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    for name in ("No space left on device", "File too large", "Disk quota exceeded", "Read-only file system"):
        if name in text:
            return name
    if isinstance(error, SafetensorError) or "PytorchStreamWriter" in text or "inline_container" in text:
        return os.strerror(errno.ENOSPC) + f", or so it seems ({' '.join(text.split())[:80]})"
    return None


def begin(output: Path) -> Path:
    """An empty folder for what is about to be saved into `output`; a killed run's remains go."""
    unfinished = output / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def finish(unfinished: Path, *, name: str | None) -> None:
    """Moves what is complete to its place: as a folder of that name, or file by file where there is none.

    Args:
        unfinished: from `begin`.
        name: of the folder inside `unfinished`, which replaces one of this name beside it; None moves every file.
    """
    output = unfinished.parent
    if name is not None:
        old = output / name
        if old.exists():
            shutil.rmtree(old)
        os.replace(unfinished / name, old)
    else:
        for path in unfinished.iterdir():
            if path.is_dir() and (output / path.name).exists():
                shutil.rmtree(output / path.name)
            os.replace(path, output / path.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class CompleteSaves(Trainer):
    """A `Trainer` whose checkpoints, and whose finished folder, are complete or not there."""

    _unfinished: Path | None = None  # where a checkpoint lies until it is complete

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished) if self._unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_before_saving()
        output = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with writing(output / name, kept=self.kept()):
            if self.args.should_save:
                begin(output)
            self.accelerator.wait_for_everyone()
            self._unfinished = output / UNFINISHED
            try:
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    self.save_beside(output / UNFINISHED / name)
            finally:
                self._unfinished = None
            self.accelerator.wait_for_everyone()
            self._complete(output, name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(output / name))

    def _complete(self, output: Path, name: str) -> None:
        """Gives a checkpoint its name once every rank has written its part, and lets old ones go."""
        best = output / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or best.name == name):
            self.state.best_model_checkpoint = str(best)
        if not self.args.should_save:
            return
        unfinished = output / UNFINISHED
        self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))  # with the place of the best
        finish(unfinished, name=name)
        rotate_checkpoints(
            output_dir=str(output),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing while the checkpoint is unfinished; `_save_checkpoint` pushes it when it is complete."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as an ordinary folder; what is there already is replaced when all of it is written."""
        if self._unfinished:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        output = Path(str(output_dir or self.args.output_dir))
        with writing(output, kept=self.kept()):
            if self.args.should_save:
                begin(output)
            self.accelerator.wait_for_everyone()
            super().save_model(str(output / UNFINISHED), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish(output / UNFINISHED, name=None)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_folder(self) -> None:
        """Uploads the output folder as it is, without checkpoints. (`push_to_hub` saves the model and a card of its
        own, over what was written beside the weights.) On one rank only.

        Raises:
            StorageError: it could not be uploaded; the folder is as it was.
        """
        self._finish_current_push()
        folder = str(self.args.output_dir)
        try:
            HfApi().upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=folder,
                commit_message="End of training",
                token=self.args.hub_token,
                ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
                revision=self.args.hub_revision,
            )
        except _REFUSED as error:
            raise StorageError(
                f"{folder} could not be uploaded to {self.hub_model_id}: {' '.join(str(error).split())}; the model is "
                f"complete there: hf upload {self.hub_model_id} {folder}"
            ) from error

    def check_before_saving(self) -> None:
        """Raises where the model is not worth a checkpoint. For trainers that can tell."""

    def save_beside(self, checkpoint: Path) -> None:
        """Adds to a checkpoint what a resumed run needs and `Trainer` does not know. On one rank only."""

    def kept(self) -> str:
        """What is safe if the run stops now, for messages."""
        output = Path(str(self.args.output_dir))
        saved = sorted(output.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime) if output.exists() else []
        return f"the last complete checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before"
