"""Where a model comes from: what was run, on what, with which versions.

Written when a run begins, completed when it ends; lies beside the weights as `provenance.json`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from layerskip.errors import RequestError

NAME = "provenance.json"
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of Python, of this package and of what training stands on."""
    found = {"python": platform.python_version(), "layerskip": version("layerskip")}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def machine() -> dict[str, Any]:
    """What it runs on, without names that would lead to it."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def revision() -> str | None:
    """The git commit of this package's sources, with "+changes" where they differ; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # a wheel inside somebody else's checkout has no commit of its own
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if git("status", "--porcelain", ".") else commit


def command() -> list[str]:
    """The command line, its program without the folder it lies in."""
    program = Path(sys.argv[0]).name
    return ["layerskip" if program == "__main__.py" else program, *sys.argv[1:]]


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / (NAME + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / NAME)


def load(folder: Path) -> dict[str, Any] | None:
    """What is written there; None where nothing is.

    Raises:
        RequestError: it is not what `write` writes.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}; remove it, or choose another output_dir") from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise RequestError(f"{path} was not written by layerskip train; choose another output_dir")
    return content
