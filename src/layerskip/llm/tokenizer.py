"""The tokenizer of a checkpoint folder, and the ids that end its texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.errors import CheckpointError
from layerskip.model import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, as transformers loads it.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in files):
        raise CheckpointError(f"{folder} has no tokenizer; it needs one of {', '.join(files)}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=_light_config(folder), local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    return tokenizer


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, *, vocab: int) -> list[int]:
    """Every end-of-sequence id that generation_config.json or config.json names, else the tokenizer's."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = checkpoint.read_json(folder / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not found and tokenizer.eos_token_id is not None:
        found = [int(tokenizer.eos_token_id)]
    # configurations name ids that the vocabulary has not (padding of another release): they cannot come up
    return sorted({int(token) for token in found if 0 <= int(token) < vocab})


def _light_config(folder: Path) -> PreTrainedConfig | None:
    """The model's configuration as transformers' plain class; None where the model's own class may be asked for.

    Left to find that class, transformers imports what models are made of: 80 MiB, and more time than the tokenizer.
    It counts only where the tokenizer does not name its own.
    """
    from transformers import PreTrainedConfig

    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        return None
    named = checkpoint.read_json(folder / "tokenizer_config.json")
    if "tokenizer_class" not in named or "auto_map" in named:
        return None
    config: PreTrainedConfig = PreTrainedConfig.from_dict(checkpoint.read_json(folder / "config.json"))
    return config
