"""Every command and every Python example of the README and the docs runs."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = "path/to/checkpoint"


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and place, text) of every fenced block in a language."""
    found = []
    for page in PAGES:
        for i, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)):
            found.append((f"{page.name}:{i}", match[1]))
    return found


def commands() -> list[tuple[str, str]]:
    """(page and place, line) of every `layerskip ...` line of a bash block, continuation lines joined."""
    return [
        (where, line)
        for where, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("layerskip ")
    ]


@pytest.mark.parametrize(("where", "line"), commands())
def test_every_command_runs(
    where: str, line: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerskip.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog ran\n")
    arguments = shlex.split(line.replace(PLACEHOLDER, str(tiny_checkpoint)))[1:]
    result = CliRunner().invoke(app, arguments, input="the cat\n")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_every_example_runs(where: str, text: str, tiny_checkpoint: Path) -> None:
    code = compile(text.replace(PLACEHOLDER, str(tiny_checkpoint)), where, "exec")
    exec(code, {})


def test_the_pages_hold_examples() -> None:
    assert len(commands()) >= 4
    assert len(blocks("python")) >= 2
