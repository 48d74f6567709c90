"""What something was run on, with which versions and by which command: so that a figure can be repeated.

Knows the machine, the packages and the checkout. Does not know what is recorded with them.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it stands on."""
    found = {"python": platform.python_version(), "layerskip": version("layerskip")}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def machine() -> dict[str, Any]:
    """What it runs on, without names that would lead to it; memory in bytes."""
    return {
        "system": platform.system(),
        "processor": _processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _processor() -> str | None:
    """The processor's model as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


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


def command_line() -> str:
    """The same as a shell reads it."""
    return shlex.join(command())
