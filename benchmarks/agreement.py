"""Makes a checkpoint whose first quarter of layers drafts a chosen number of tokens per round for the whole.

    python -m benchmarks.agreement 110m --output runs/checkpoints/110m

Random weights (`weights`); what the upper layers add is turned down until greedy early-exit drafts of K tokens yield N
tokens per round, counted by this package's own engine in float32 on the prompts that lie beside the weights. It is an
ordinary Hugging Face folder, with `prompts.txt` and with `controlled.json`, which says how it was made. The same seed
gives the same checkpoint on the same machine; on another one, sums that round differently may settle on another scale.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.texts import check_text, described, prompts
from benchmarks.vocabulary import BOS, EOS, save_tokenizer
from benchmarks.weights import SIZES, by_rank, random_weights, turned_down
from layerskip import environment
from layerskip.decode.acceptance import Acceptance
from layerskip.decode.drafters import EarlyExit
from layerskip.errors import RequestError
from layerskip.llm import DTYPES, LLM, Completion
from layerskip.llm.tokenizer import load_tokenizer
from layerskip.model.names import decoder_from_tensors
from layerskip.model.shape import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD, PROMPTS = "controlled.json", "prompts.txt"
BATCH = 64  # prompts in the file, so that as many rows can be decoded side by side
LEAST, MOST = 0.001, 1.0
"""Scales between which the one that is looked for lies."""
TRIES = 20


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint shall be.

    Args:
        size: name of its shape, one of `weights.SIZES`.
        tokens_per_round: N.
        tolerance: how far the counted N may be from it.
        draft_tokens: K.
        prompts: how many texts N is counted on.
        prompt_tokens: of each, BOS included.
        new_tokens: that each is continued by.
        seed: of weights and prompts.
        dtype: element type of the file; the weights hold the same numbers in float32 and bfloat16.

    Raises:
        RequestError: a value out of range.
    """

    size: str
    tokens_per_round: float = 3.7
    tolerance: float = 0.1
    draft_tokens: int = 4
    prompts: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 128
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise RequestError(f"unknown size {self.size!r}; use {', '.join(SIZES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise RequestError(f"dtype {self.dtype} cannot hold the weights as they are; use float32 or bfloat16")
        if not 1 < self.tokens_per_round < self.draft_tokens + 1:
            raise RequestError(
                f"{self.tokens_per_round} tokens per round are not possible with drafts of {self.draft_tokens}; "
                f"use more than 1 and less than {self.draft_tokens + 1}"
            )
        if self.tolerance <= 0 or min(self.prompts, self.prompt_tokens - 1, self.new_tokens) < 1:
            raise RequestError("prompts, new tokens and tolerance must be above 0, and a prompt needs 2 tokens")


@dataclass(frozen=True)
class Found:
    """A scale, and what the text is like with it.

    Args:
        scale: of what the upper layers add.
        tokens_per_round: N as counted.
        completions: of the prompts.
    """

    scale: float
    tokens_per_round: float
    completions: list[Completion]


def make(folder: Path, wanted: Wanted, *, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Makes the checkpoint, unless the folder holds it already.

    Returns:
        What is in its controlled.json.

    Raises:
        RequestError: the folder holds something else, no scale yields what is wanted, or the texts go in circles.
    """
    if (folder / RECORD).is_file():
        made: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if made["wanted"] != asdict(wanted):
            raise RequestError(f"{folder} holds a checkpoint that was made otherwise; choose another folder")
        return made
    if folder.exists():
        raise RequestError(f"{folder} is there and was not made by this program; choose another folder")
    size = SIZES[wanted.size]
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_tokenizer(unfinished, vocabulary=size.vocabulary)
    lines = prompts(size, count=max(wanted.prompts, BATCH), tokens=wanted.prompt_tokens - 1, seed=wanted.seed)
    (unfinished / PROMPTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    weights = random_weights(size, seed=wanted.seed)
    found, tried = settle(_counter(weights, load_tokenizer(unfinished), lines[: wanted.prompts], wanted, say), wanted)
    text = described([completion.tokens for completion in found.completions], size, seed=wanted.seed)
    check_text(text)
    made = {
        "wanted": asdict(wanted),
        "exit": size.exit,
        "scale": found.scale,
        "tokens_per_round": found.tokens_per_round,
        "tried": tried,
        "text": text,
        "commit": environment.revision(),
        "versions": environment.versions(),
    }
    _save(unfinished, turned_down(weights, size, scale=found.scale), made, wanted)
    os.replace(unfinished, folder)
    return made


def _counter(
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[str],
    wanted: Wanted,
    say: Callable[[str], object],
) -> Callable[[float], Found]:
    """What counts N at a scale, in float32."""
    size = SIZES[wanted.size]
    shape = Shape.from_config(size.config(dtype="float32"))
    drafter = EarlyExit(size.exit, tokens=wanted.draft_tokens)

    def count(scale: float) -> Found:
        decoder = decoder_from_tensors(shape, turned_down(weights, size, scale=scale))
        llm = LLM(decoder, tokenizer, max_batch=wanted.prompts)
        completions = llm.generate(lines, draft=drafter, max_tokens=wanted.new_tokens, ignore_eos=True)
        assert isinstance(completions, list)
        counts = Acceptance()
        for completion in completions:
            counts.merge(completion.acceptance)
        say(f"{wanted.size}: scale {scale:.5f} gives {counts.length:.3f} tokens per round")
        return Found(scale, counts.length, completions)

    return count


def settle(count: Callable[[float], Found], wanted: Wanted) -> tuple[Found, list[tuple[float, float]]]:
    """Halves the range of scales, by their logarithm, until N is near enough.

    N falls as the scale grows, apart from the luck of the texts: two scales next to each other continue a prompt
    differently. Near the end that luck decides, so every try counts anew until one is within the tolerance.

    Returns:
        What was found, and (scale, N) of every try.

    Raises:
        RequestError: no try was near enough.
    """
    low, high, tried = LEAST, MOST, []
    for _ in range(TRIES):
        found = count(math.sqrt(low * high))
        tried.append((found.scale, found.tokens_per_round))
        if abs(found.tokens_per_round - wanted.tokens_per_round) <= wanted.tolerance:
            return found, tried
        if found.tokens_per_round > wanted.tokens_per_round:
            low = found.scale
        else:
            high = found.scale
    raise RequestError(
        f"no scale gives {wanted.tokens_per_round} +- {wanted.tolerance} tokens per round in {TRIES} tries; the last "
        f"gave {tried[-1][1]:.3f}: use more prompts, or a wider tolerance"
    )


def _save(folder: Path, weights: Mapping[str, Tensor], made: Mapping[str, Any], wanted: Wanted) -> None:
    from safetensors.torch import save_file

    size = SIZES[wanted.size]
    stored = {name: tensor.to(DTYPES[wanted.dtype]) for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    recommended = {"layerskip": {"exit": size.exit, "draft_tokens": wanted.draft_tokens}}
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    for name, content in (
        ("config.json", size.config(dtype=wanted.dtype) | recommended),
        ("generation_config.json", generation),
        (RECORD, made),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def ranking(folder: Path) -> tuple[int, ...]:
    """The tokens of a checkpoint that was made here, the most frequent first; () for any other folder."""
    made = folder / RECORD
    if not made.is_file():
        return ()
    wanted = json.loads(made.read_text(encoding="utf-8"))["wanted"]
    return tuple(by_rank(SIZES[wanted["size"]], seed=wanted["seed"]).tolist())


def main() -> None:
    """Makes the checkpoint that the command line asks for."""
    defaults = Wanted("tiny")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", help=", ".join(SIZES))
    parser.add_argument("--output", type=Path, help="folder; runs/checkpoints/SIZE if left out")
    parser.add_argument("--tokens-per-round", type=float, default=defaults.tokens_per_round)
    parser.add_argument("--tolerance", type=float, default=defaults.tolerance)
    parser.add_argument("--draft-tokens", type=int, default=defaults.draft_tokens)
    parser.add_argument("--prompts", type=int, default=defaults.prompts)
    parser.add_argument("--prompt-tokens", type=int, default=defaults.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=defaults.new_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--dtype", default=defaults.dtype, help="bfloat16 or float32")
    asked = vars(parser.parse_args())
    folder = asked.pop("output") or Path("runs/checkpoints") / asked["size"]
    try:
        print(json.dumps(make(folder, Wanted(**asked))))
    except RequestError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
