"""What a command left behind, looked at as a user or a program would."""

import json
from typing import Any


def last_line(done: Any) -> dict[str, Any]:
    """The record that ends the output of a command that went well."""
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def refused(done: Any, *parts: str, status: int = 2) -> None:
    """One line on standard error and nothing else, for what was asked wrongly, or failed."""
    assert (done.exit_code, done.stdout) == (status, ""), done.output
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
