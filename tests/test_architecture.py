"""The import rules of the house, and the public face."""

import doctest
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import layerskip
import layerskip.errors

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "LLM",
    "Assistant",
    "Auto",
    "CapacityError",
    "Cascade",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Drafter",
    "EarlyExit",
    "ExitScore",
    "LayerSkipError",
    "Lookup",
    "NumericalError",
    "RequestError",
    "Sampling",
    "Stream",
    "TokenLogprob",
    "__version__",
    "load",
}


def test_import_rules_hold() -> None:
    command = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    assert command, "lint-imports is not installed beside this Python; run: make test"
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_light() -> None:
    code = "import sys, layerskip; print(*{'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_are_the_documented_ones() -> None:
    assert set(layerskip.__all__) == PUBLIC
    assert len(layerskip.__all__) == len(PUBLIC)
    assert set(dir(layerskip)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves(name: str) -> None:
    value = getattr(layerskip, name)
    assert getattr(value, "__name__", name) == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lod'"):
        _ = layerskip.Lod


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("CheckpointError", ValueError),
        ("RequestError", ValueError),
        ("CapacityError", MemoryError),
        ("NumericalError", ArithmeticError),
    ],
)
def test_errors_are_also_builtin_ones(name: str, builtin: type[Exception]) -> None:
    error = getattr(layerskip, name)
    assert issubclass(error, layerskip.LayerSkipError)
    assert issubclass(error, builtin)
    assert str(error("exit 40")) == "exit 40"


def test_examples_in_errors_run() -> None:
    assert doctest.testmod(layerskip.errors) == doctest.TestResults(failed=0, attempted=2)
