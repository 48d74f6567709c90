"""What a command left behind, looked at as a user or a program would."""

import json
from typing import Any


def last_line(done: Any) -> dict[str, Any]:
    """The record that ends the output of a command that went well."""
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def refused(done: Any, message: str) -> None:
    """One line on standard error and nothing else, for what was asked wrongly."""
    assert (done.exit_code, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
