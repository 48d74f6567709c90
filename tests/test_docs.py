"""Every command and every Python example of the README and the docs runs.

Training does too where its recipe is a block of the page, for two steps. A recipe that comes with the package is for
machines and data that are not here: it is read, with the line's keys, and not run.
"""

import re
import shlex
import shutil
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


def lines() -> list[tuple[str, str]]:
    """(page and place, line) of every line of a bash block, continuation lines joined."""
    return [
        (where, line)
        for where, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def commands() -> list[tuple[str, str]]:
    """(page and place, line) of every `layerskip ...` line that does not train."""
    return [
        (where, line)
        for where, line in lines()
        if line.startswith("layerskip ") and not line.startswith("layerskip train ")
    ]


def trainings() -> list[tuple[str, str]]:
    """(page and place, line) of every line that trains, a launcher's too."""
    return [(where, line) for where, line in lines() if "layerskip train " in line]


def recipes(folder: str = "") -> dict[str, str]:
    """The YAML blocks that begin with their file's name, as in `# stories.yaml`; those of a folder, as in
    `# tasks/colours.yaml`."""
    found = (re.match(rf"# ({folder}[^/\s]+\.yaml)\n", text) for _, text in blocks("yaml"))
    return {match[1]: match.string for match in found if match}


def lay_out(folder: Path) -> None:
    """Puts the files there that the pages show or speak of: prompts, tasks with their data, results."""
    (folder / "prompts.txt").write_text("the cat\nthe dog ran\n")
    shutil.copytree(ROOT / "tests" / "evaluate" / "records", folder / "results")
    data = (re.finditer(r"^`(\S+\.jsonl)`:\n\n```json\n(.*?)^```$", page.read_text(), re.M | re.S) for page in PAGES)
    shown = {match[1]: match[2] for matches in data for match in matches}
    for name, text in {**recipes("tasks/"), **shown}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(("where", "line"), commands())
def test_every_command_runs(
    where: str, line: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerskip.cli import app

    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    arguments = shlex.split(line.replace(PLACEHOLDER, str(tiny_checkpoint)))[1:]
    result = CliRunner().invoke(app, arguments, input="the cat\n")
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.mark.parametrize(("where", "line"), trainings())
def test_every_training_begins(
    where: str, line: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerskip.cli import app
    from layerskip.cli.train import overrides
    from layerskip.train.recipe import read_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories.txt").write_text(
        "<|endoftext|>".join(f"the cat {i} sat on the mat {i % 7}" for i in range(99))
    )
    for name, text in recipes().items():
        (tmp_path / name).write_text(text.replace(PLACEHOLDER, str(tiny_checkpoint)))
    arguments = shlex.split(line.partition("layerskip train ")[2].replace(PLACEHOLDER, str(tiny_checkpoint)))
    recipe = read_recipe(arguments[0], overrides=overrides(arguments[1:]))
    assert recipe.data
    if not line.startswith("layerskip ") or arguments[0] not in recipes():
        return
    result = CliRunner().invoke(app, ["train", *arguments, "--max_steps", "2"])
    assert result.exit_code == 0, result.output
    assert (Path(recipe.training.get("output_dir", f"runs/{recipe.name}")) / "README.md").is_file()


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize(("where", "text"), blocks("python"))
def test_every_example_runs(
    where: str, text: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    code = compile(text.replace(PLACEHOLDER, str(tiny_checkpoint)), where, "exec")
    exec(code, {})


def test_the_pages_hold_examples() -> None:
    assert len(commands()) >= 4
    assert len(blocks("python")) >= 2
    assert any(line.startswith("layerskip train ") for _, line in trainings())
