"""Help, version and the entry points: instant, and without torch."""

import subprocess
import sys
from typing import Any

import pytest

import layerskip
from layerskip.cli import app

COMMANDS = ("generate", "chat", "verify", "inspect", "train", "eval", "bench", "tune", "report")


@pytest.mark.parametrize(
    "words", ["--help", "generate --help", "verify --help", "train --help", "bench --help", "tune --help", "--version"]
)
def test_help_imports_nothing_heavy(words: str) -> None:
    code = (
        "import atexit, sys; from layerskip.cli import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'layerskip.llm'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules))))\n"
        f"sys.argv[1:] = {words.split()}; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_an_unknown_command_names_those_there_are(run: Any) -> None:
    done = run("finetune")
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert all(command in line for command in COMMANDS)


def test_python_m_layerskip() -> None:
    command = [sys.executable, "-m", "layerskip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"layerskip {layerskip.__version__}\n"


def test_no_arguments_show_help(run: Any) -> None:
    done = run()
    assert done.exit_code == 2
    assert all(command in done.output for command in COMMANDS)
    assert "error: " not in done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    from typer.main import get_command

    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert [p.name for p in parameters if not p.help] == []
    subject = {"train": "recipe", "report": "folder"}.get(command, "model")
    assert {subject, "debug", "no_color"} <= {p.name for p in parameters}


OPTIONS = """
    --file --model -m --draft --draft-tokens --draft-length --draft-vocabulary --draft-head --draft-corpus --confidence
    --exit --max-tokens --min-tokens --temperature --top-k --top-p --min-p --repetition-penalty --presence-penalty
    --frequency-penalty --logit-bias --ban --stop --ignore-eos --logprobs --seed -n --dtype --weights --compile
    --row-invariant --device --revision --compare --json --no-color --debug
"""


def test_the_options_of_generate_are_the_documented_ones() -> None:
    from typer.main import get_command

    parameters = get_command(app).commands["generate"].params  # type: ignore[attr-defined]
    assert sorted(o for p in parameters for o in p.opts if o.startswith("-")) == sorted(OPTIONS.split())
