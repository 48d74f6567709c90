"""Programs: HumanEval and MBPP. What the model writes is run against the tests, in the sandbox; nothing else counts.

Sources: Chen et al., "Evaluating Large Language Models Trained on Code", 2021; Austin et al., "Program Synthesis with
Large Language Models", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerskip.evaluate import sandbox
from layerskip.evaluate.tasks.files import Hub, Record, records
from layerskip.evaluate.tasks.task import Item, Task

_FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of the paper; the body has been indented so far
_BEGIN, _DONE = "[BEGIN]", "[DONE]"


@dataclass(frozen=True)
class Check:
    """The program around a text.

    Args:
        before: what the text continues.
        after: the tests.
    """

    before: str
    after: str

    def program(self, text: str) -> str:
        """The whole program."""
        return f"{self.before}{text}\n{self.after}\n"


def humaneval(files: str | Path) -> Task:
    """HumanEval: rows with `prompt`, `test`, `entry_point`, and `canonical_solution` for shots.

    Args:
        files: JSON lines (a file, a folder, a pattern), or "hub" for openai/openai_humaneval.

    Raises:
        RequestError: the data are missing or malformed.
    """
    items = []
    for row in records(files, hub=Hub("openai/openai_humaneval")):
        prompt, test = row.text("prompt"), row.optional("test")
        check = None if test is None else Check(prompt, f"{test}\ncheck({row.text('entry_point')})")
        items.append(Item(prompt, check, shown=row.optional("canonical_solution")))
    return Task(
        "humaneval",
        tuple(items),
        score_program,
        512,
        _FUNCTION_ENDS,
        between="\n\n",
        executes=True,
        ready=sandbox.check,
    )


def mbpp(files: str | Path) -> Task:
    """MBPP: rows with `text` (or `prompt`), `test_list`, and `code` for shots.

    The prompt is the paper's; it names the tests, or nobody could know what the function is called.

    Args:
        files: JSON lines (a file, a folder, a pattern), or "hub" for google-research-datasets/mbpp.

    Raises:
        RequestError: the data are missing or malformed.
    """
    items = []
    for row in records(files, hub=Hub("google-research-datasets/mbpp", "full")):
        code = row.optional("code")
        shown = None if code is None else f"\n{_lines(code)}\n{_DONE}"
        items.append(Item(_asked(row), _tests(row), shown=shown))
    return Task("mbpp", tuple(items), score_program, 512, (_DONE,), executes=True, ready=sandbox.check)


def score_program(text: str, answer: Check) -> dict[str, float]:
    """1 where the program passes its tests, 0 else: pass@1 of a single greedy text.

    Raises:
        RequestError: there is no sandbox here.
    """
    return {"pass@1": float(sandbox.run(answer.program(text)).passed)}


def _asked(row: Record) -> str:
    tests = "\n".join(row.texts("test_list"))
    wanted = f"You are an expert Python programmer, and here is your task: {row.text('text', 'prompt').strip()}"
    return f"{wanted} Your code should pass these tests:\n\n{tests}\n{_BEGIN}"


def _tests(row: Record) -> Check | None:
    tests = row.texts("test_list")
    setup = row.values.get("test_setup_code") or ""
    return Check("", "\n".join((setup, *row.texts("test_imports"), *tests))) if tests else None


def _lines(code: str) -> str:
    return code.replace("\r\n", "\n").strip("\n")
