"""Builds kernels.cpp, with what it includes, where a compiler is found, once for each processor, and loads it.

Knows compilers and the folder where what was built is kept; does not know what the kernels do.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_LOCK = threading.Lock()


class Unavailable(Exception):
    """Why there are no kernels on this machine: one line."""


def library() -> ctypes.CDLL:
    """The kernels, built now where they are not there yet (ten to twenty seconds).

    Raises:
        Unavailable: no compiler was found, or it could not build them. Asked again, it says so again at once.
    """
    with _LOCK:
        found = _library()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def is_due() -> bool:
    """Whether `library` would have to build them first."""
    try:
        compiler = _compiler()
        return compiler is not None and not _place(compiler).exists()
    except (OSError, Unavailable):  # `library` says which
        return False


@functools.cache
def _library() -> ctypes.CDLL | str:
    compiler = _compiler()
    if compiler is None:
        return f"no C++ compiler was found (looked for {', '.join(_names())})"
    try:
        place = _place(compiler)
        if not place.exists():
            _build(compiler, place)
        return ctypes.CDLL(str(place))
    except Unavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the kernels could not be kept or loaded: {error}"
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not build the kernels: {(error.stderr.strip().splitlines() or ['no message'])[0]}"


def _compiler() -> str | None:
    return next((path for name in _names() if (path := shutil.which(name))), None)


def _names() -> tuple[str, ...]:
    wanted = os.environ.get("CXX")
    return (wanted,) if wanted else COMPILERS


@functools.cache
def _place(compiler: str) -> Path:
    """Where what this compiler builds of this source for this processor is kept."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, version, _processor(), *_flags()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise Unavailable("there is no home folder to keep the kernels in; set XDG_CACHE_HOME") from error
    return cache / "layerskip" / f"kernels-{name}.so"


def _processor() -> str:
    """What -march=native looks at."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in table.read_text().splitlines() if line.startswith(wanted)]
    return "\n".join(sorted(set(lines)))


def _flags() -> list[str]:
    """What the compiler is told; the later holds."""
    try:
        return [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *_openmp()]
    except ValueError as error:
        raise Unavailable(f"CXXFLAGS cannot be read: {error}") from error


def _openmp() -> list[str]:
    """torch's own OpenMP library: a second one would have threads of its own, which wait on the same cores."""
    own = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return [str(own), f"-Wl,-rpath,{own.parent}"] if sys.platform == "linux" and own.exists() else []


def _build(compiler: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        out = Path(folder) / place.name
        command = [compiler, str(SOURCE), "-o", str(out), *_flags()]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(out, place)  # whole or not at all: another process may be building as well
