"""What every engine continues: ids of prompts, and by how many tokens each.

Knows text files and tokenizers. Does not know engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.agreement import PROMPTS
from layerskip.errors import RequestError
from layerskip.llm import load
from layerskip.llm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Question:
    """A prompt.

    Args:
        prompt: its ids.
        new_tokens: that every engine continues it by.
    """

    prompt: list[int]
    new_tokens: int


def questions(
    folder: Path, *, file: Path | None, count: int, new_tokens: int, until_end: bool = False
) -> list[Question]:
    """The first prompts of a file, one a line.

    Args:
        folder: of the checkpoint.
        file: with the prompts; None is the checkpoint's own prompts.txt.
        count: how many of them at most.
        new_tokens: for each.
        until_end: fewer where this package's plain decoding ends the text sooner, so that all engines do the same.

    Raises:
        RequestError: there is no file, no prompt in it, or too much for the model's context.
    """
    place = folder / PROMPTS if file is None else file
    if not place.is_file():
        raise RequestError(f"no prompts in {place}; give a file with one a line")
    lines = [line for line in place.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    if not lines:
        raise RequestError(f"{place} holds no prompts; write one a line")
    tokenizer = load_tokenizer(folder)
    prompts = [list(tokenizer(line)["input_ids"]) for line in lines]
    if not until_end:
        return [Question(prompt, new_tokens) for prompt in prompts]
    found = load(folder, device="cpu").generate(prompts, max_tokens=new_tokens)
    assert isinstance(found, list)
    return [Question(prompt, len(one.tokens)) for prompt, one in zip(prompts, found, strict=True)]
