"""Runs a recipe: builds it, resumes it where it was, trains, and leaves a folder that says what it is.

<output_dir>/checkpoint-N/    what a run resumes from
<output_dir>/                 the finished model: an ordinary Hugging Face folder with `config.layerskip`, a model
                              card (README.md) and provenance.json
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from layerskip import environment
from layerskip.errors import LayerSkipError, RequestError
from layerskip.train import experiment, provenance, saving
from layerskip.train.card import SETTINGS, card
from layerskip.train.data import Document, Example, Pair, Rows
from layerskip.train.estimate import Estimate, duration
from layerskip.train.parts import unwrap
from layerskip.train.recipe import Recipe
from layerskip.train.trainer import LayerSkipConfig, LayerSkipTrainer

Measure = Callable[[Path], Mapping[str, Any] | None]
"""Measures self-speculation on a finished folder: `exit` and `draft_tokens` to recommend (None where plain decoding is
faster), `prompts`, how many it was measured on, and `table`, rows of exit, draft_tokens, acceptance and
tokens_per_round. None where it cannot be measured."""

_PROMPT = 200  # letters of a document that begin a continuation

_HARMLESS = {
    "name", "description", "licence", "data_folder", "output_dir", "save_dtype", "acceptance_prompts",
    "acceptance_tokens", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "report_to",
    "run_name", "project", "trackio_space_id", "disable_tqdm", "save_steps", "save_strategy", "save_total_limit",
    "eval_steps", "eval_strategy", "eval_delay", "eval_on_start", "eval_data", "eval_rows", "eval_accumulation_steps",
    "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "dataloader_num_workers", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
}  # fmt: skip
"""Keys that may change between a run and its continuation: the weights do not depend on them."""


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        folder: the finished model.
        metrics: of the evaluation of what was saved; empty without evaluation data.
        measured: what `Measure` gave; None where nothing was measured.
        steps: optimizer steps in all.
        resumed_at: the step it went on from; None for a fresh start.
        seconds: of this call's training.
    """

    folder: Path
    metrics: dict[str, float]
    measured: Mapping[str, Any] | None
    steps: int
    resumed_at: int | None
    seconds: float


class Run:
    """A recipe, built and ready to train.

    Args:
        recipe: what to run.
        callbacks: transformers callbacks, such as a progress bar.
        tell: takes a line for people, on the first process only.

    Raises:
        RequestError: something in the recipe cannot be done, or `output_dir` holds another run.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe = recipe
        self.args = _arguments(recipe)
        self._first = self.args.process_index == 0
        self._tell = tell if self._first else lambda line: None
        self.folder = Path(str(self.args.output_dir))
        self.resume_from = _resumable(recipe, self.folder)
        self.examples = experiment.examples(recipe)
        if self.resume_from:
            _check_same_run(self.folder, self.examples.digests, processes=self.args.world_size)
        self._report_data()
        self.tokenizer = experiment.tokenizer(recipe, self.examples.learnt)
        model = experiment.model(recipe, self.tokenizer)
        evaluated = self.examples.evaluated
        learnt, left_out = experiment.rows(recipe, self.examples.learnt, self.tokenizer)
        checked = experiment.arranged(recipe, evaluated, self.tokenizer).rows if evaluated else None
        for rows in (learnt, checked) if checked is not None else (learnt,):
            _check_rows(rows, recipe, positions=getattr(unwrap(model).config, "max_position_embeddings", None))
        if left_out:
            self._tell(f"{left_out:,} examples longer than max_length {recipe.max_length} left out")
        with saving.writing(self.folder, kept="nothing was trained yet"), _as_asked():
            self.trainer = LayerSkipTrainer(
                model,
                self.args,
                train_dataset=learnt,
                eval_dataset=checked,
                data_collator=experiment.collator(recipe, model, self.tokenizer),
                processing_class=self.tokenizer,
                callbacks=list(callbacks),
            )
        for shown in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(shown)

    @property
    def prompts(self) -> list[str]:
        """What self-speculation is to be measured on: the first evaluation prompts, or beginnings of documents."""
        wanted = self.examples.evaluated[: self.recipe.acceptance_prompts]
        return [begin for begin in map(_beginning, wanted) if begin]

    def train(self, *, measure: Measure | None = None) -> Outcome:
        """Trains to the end, evaluates what is saved, and writes card and provenance.

        Args:
            measure: measures self-speculation when the model is finished; None leaves that out.

        Raises:
            NumericalError: the loss is no longer finite; the last checkpoint is from before.
            StorageError: something could not be written; the last complete checkpoint is still there.
        """
        self._tell(str(self.estimate()))
        started = self._provenance()
        if self._first:
            with saving.writing(self.folder, kept="nothing was trained yet"):
                provenance.write(self.folder, started)
        begin = time.perf_counter()

        def keep_hours() -> None:  # of what a checkpoint holds, in case this session is not the last
            started["sessions"][-1]["hours"] = (time.perf_counter() - begin) / 3600
            if self._first:
                with saving.writing(self.folder, kept=self.trainer.kept()):
                    provenance.write(self.folder, started)

        self.trainer.add_callback(_AfterSaving(keep_hours))
        with _as_asked():
            self.trainer.train(resume_from_checkpoint=str(self.resume_from) if self.resume_from else None)
        seconds = time.perf_counter() - begin
        state = self.trainer.state
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        _round_to(model, self.recipe.save_dtype)
        metrics = self.trainer.evaluate() if self.examples.evaluated else {}
        unwrap(model).config.use_cache = True
        _round_to(model, self.recipe.save_dtype, keep=True)
        self.trainer.save_model(_internal_call=True)  # not pushed before all of the folder is written
        resumed_at = self._done() if self.resume_from else None
        measured = self._finish(model, started, metrics, seconds, measure) if self._first else None
        self.trainer.accelerator.wait_for_everyone()
        return Outcome(self.folder, metrics, measured, state.global_step, resumed_at, seconds)

    def estimate(self) -> Estimate:
        """Seconds and bytes of what is still to do."""
        return self.trainer.estimate(done=self._done())

    def _report_data(self) -> None:
        found = self.examples
        lines = [f"{len(found.learnt):,} examples to learn, {len(found.evaluated):,} to evaluate on"]
        lines += [f"{found.skipped:,} malformed rows left out, such as:", *found.complaints] if found.skipped else []
        lines += [f"resuming from {self.resume_from}"] if self.resume_from else []
        for line in lines:
            self._tell(line)

    def _provenance(self) -> dict[str, Any]:
        before = provenance.load(self.folder) if self.resume_from else None
        return {
            "recipe": self.recipe.record(),
            "command": environment.command(),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "processes": self.args.world_size,
            "commit": environment.revision(),
            "data": self.examples.sha256,
            "digests": self.examples.digests,
            "examples": {"learnt": len(self.examples.learnt), "evaluated": len(self.examples.evaluated)},
            "parameters": self.trainer.parameters(),
            "sessions": [*(before or {}).get("sessions", []), {"from_step": self._done()}],
            "finished": False,
        }

    def _done(self) -> int:
        return int(self.resume_from.name.rsplit("-", 1)[1]) if self.resume_from else 0

    def _finish(
        self,
        model: nn.Module,
        started: dict[str, Any],
        metrics: dict[str, float],
        seconds: float,
        measure: Measure | None,
    ) -> Mapping[str, Any] | None:
        readable = self._plain_folder(model)
        measured = measure(readable) if measure else None
        started["sessions"][-1]["hours"] = seconds / 3600
        hours = sum(session.get("hours", 0.0) for session in started["sessions"])
        whole = started | {
            "finished": True,
            "run": {
                "steps": self.trainer.state.global_step,
                "passes": self.trainer.state.epoch,
                "hours": hours,
            },
            "metrics": metrics,
            "acceptance": measured,
        }
        kept = f"the model itself is in {self.folder}"
        with saving.writing(self.folder, kept=kept):
            text = card(
                provenance=whole,
                metrics=metrics,
                measured=measured,
                licence=self.recipe.licence,
                description=self.recipe.description,
            )
            for folder in {self.folder, readable}:
                saving.replace_text(folder / "README.md", text)
                _note_in_config(folder, self._settings(metrics, measured))
            provenance.write(self.folder, whole)
        self._tell(f"saved {readable} after {duration(seconds)}")
        if self.args.push_to_hub:
            self.trainer.push_folder()
        return measured

    def _plain_folder(self, model: nn.Module) -> Path:
        """A folder without adapters: the model's own, or a merged copy beside an adapter."""
        if not hasattr(model, "merge_and_unload"):
            return self.folder
        merged = self.folder / "merged"
        with saving.writing(merged, kept=f"the adapter is in {self.folder}"):
            adapted: Any = model
            whole = adapted.merge_and_unload()
            unfinished = saving.begin(self.folder)
            whole.save_pretrained(unfinished / "merged")
            self.tokenizer.save_pretrained(unfinished / "merged")
            saving.finish(unfinished, name="merged")
        return merged

    def _settings(self, metrics: Mapping[str, float], measured: Mapping[str, Any] | None) -> dict[str, Any]:
        """What `config.layerskip` holds."""
        record = self.recipe.record()
        quality = {
            name.removeprefix("eval_exit_"): value for name, value in metrics.items() if name.startswith("eval_exit_")
        }
        settings: dict[str, Any] = {"recipe": {name: record[name] for name in SETTINGS if name in record}}
        if measured:
            settings |= {"exit": measured.get("exit"), "draft_tokens": measured.get("draft_tokens")}
        return settings | ({"quality": quality} if quality else {})


class _AfterSaving(TrainerCallback):
    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._then()


def _beginning(example: Example) -> str | None:
    match example:
        case Pair(prompt):
            return prompt
        case Document(text):
            return text[:_PROMPT].rsplit(" ", 1)[0]
        case _:
            return None


def _arguments(recipe: Recipe) -> LayerSkipConfig:
    settings = {"output_dir": f"runs/{recipe.name}", "report_to": "none", "disable_tqdm": True, **recipe.training}
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun says
    if not several:
        settings.pop("ddp_backend", None)  # transformers would wait for a group of processes
    if not torch.accelerator.is_available():
        settings = {"use_cpu": True, **({"ddp_backend": "gloo"} if several else {}), **settings}
    if recipe.training.get("eval_strategy", "no") != "no" and not (recipe.eval_data or recipe.eval_share):
        raise RequestError("eval_strategy needs something to evaluate on; give eval_data or eval_share")
    try:
        return LayerSkipConfig(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise RequestError(" ".join(str(error).split())) from error


def _resumable(recipe: Recipe, folder: Path) -> Path | None:
    """The newest complete checkpoint of this recipe in its folder."""
    before = provenance.load(folder)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"output_dir {folder} is a file; choose a folder")
    numbers = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    saved = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))
    if before is None:
        if saved:
            raise RequestError(f"{folder} holds checkpoints of something else; choose another --output_dir")
        return None
    usual = {each.name: each.default for each in fields(LayerSkipConfig) if each.default is not MISSING}
    then, now = usual | before["recipe"], usual | json.loads(json.dumps(recipe.record()))
    for name in sorted((then.keys() | now.keys()) - _HARMLESS):
        if then.get(name) != now.get(name):
            raise RequestError(
                f"{folder} holds another run: its {name} is {then.get(name)!r}, now it is {now.get(name)!r}; choose "
                "another --output_dir, or remove that folder"
            )
    if before["finished"]:
        raise RequestError(f"{folder} is finished already; choose another --output_dir, or remove that folder")
    return saved[-1] if saved else None


def _check_same_run(folder: Path, digests: Mapping[str, str], *, processes: int) -> None:
    before = provenance.load(folder) or {}
    begun = before.get("processes", processes)
    if begun != processes:  # they share out the rows: more or fewer would learn others from here on
        raise RequestError(
            f"{folder} holds a run of {_processes(begun)}, now there {'is' if processes == 1 else 'are'} {processes}; "
            f"use torchrun --nproc-per-node {begun}, or choose another --output_dir"
        )
    for name, digest in before.get("digests", {}).items():
        if name not in _HARMLESS and digests.get(name) != digest:
            raise RequestError(
                f"{folder} holds a run on other {name}: its digest was {digest[:12]}, now it is "
                f"{digests.get(name, 'none')[:12]}; put the files back, or choose another --output_dir"
            )


def _processes(count: int) -> str:
    return f"{count} process" if count == 1 else f"{count} processes"


def _check_rows(rows: Any, recipe: Recipe, *, positions: int | None) -> None:
    """Raises RequestError where there are no rows, or rows with more positions than the model has."""
    longest = recipe.max_length or 0
    if isinstance(rows, Rows):
        if not len(rows):
            raise RequestError(
                f"no example is as short as max_length {recipe.max_length}, so none is left; raise max_length"
            )
        packed = recipe.batching == "packed"  # positions begin anew with each document of a row
        longest = int(max(row["position_ids"].max() for row in rows)) + 1 if packed else int(rows.lengths.max())
    if positions and longest > positions:
        raise RequestError(
            f"rows of {longest:,} tokens do not fit a model of {positions:,} positions; give max_length {positions}"
        )


@contextmanager
def _as_asked() -> Iterator[None]:
    """What transformers refuses late, and packages that are missing, as one error."""
    try:
        yield
    except LayerSkipError:
        raise
    except (ValueError, ImportError) as error:
        raise RequestError(" ".join(str(error).split())) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):  # of a schedule or an optimizer, from the recipe
            raise
        raise RequestError(" ".join(str(error).split())) from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # reporters
            raise
        raise RequestError(" ".join(str(error).split())) from error


def _round_to(model: nn.Module, dtype: str | None, *, keep: bool = False) -> None:
    """Rounds weights to what they are saved as; held as before unless `keep`, so that evaluation computes as it did."""
    if dtype is None:
        return
    narrow = getattr(torch, dtype)
    if keep:
        model.to(dtype=narrow)
        return
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(narrow))


def _note_in_config(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    if not path.is_file():  # an adapter's folder
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    saving.replace_text(path, json.dumps(config | {"layerskip": settings}, indent=2) + "\n")
