"""Where exceptions become one line on standard error and an exit status.

2 for what was asked wrongly, 1 for what failed, 130 for an interrupt. Knows nothing of what the commands do.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from layerskip.errors import LayerSkipError, RequestError

_DEBUG = "layerskip.debug"


def remember_debug(context: typer.Context, asked: bool) -> bool:
    """The callback of --debug, before or after the command's name."""
    if asked:
        context.meta[_DEBUG] = True
    return asked


class Commands(TyperGroup):
    """The group of all commands; every exception ends here."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Runs a command and exits."""
        try:
            status = super().main(*args, **{"prog_name": "layerskip", **extra, "standalone_mode": False})
        except Exception as error:  # noqa: BLE001 -- the one boundary: users get a line, and --debug the traceback
            for line in lines(error):
                sys.stderr.write(line + "\n")
            sys.exit(exit_status(error))
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; with --debug, a traceback comes before the line."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.meta.get(_DEBUG) and not isinstance(error, typer.Exit | typer.Abort | typer.TyperException):
                traceback.print_exception(error)
            raise


# what typer's own messages leave unsaid
_HINTS = {
    "Got unexpected extra argument": "put a prompt of several words in quotes",
    "No such command": "use generate, chat, verify, inspect, train, eval, bench or tune",
    "No such option: -m": "options come after the command: layerskip generate -m ...",
}


def exit_status(error: Exception) -> int:
    """2 for what was asked wrongly, 130 for an interrupt, else 1."""
    if isinstance(error, typer.Abort):
        return 130
    if isinstance(error, typer.TyperException):
        return error.exit_code
    return 2 if isinstance(error, RequestError) else 1


def lines(error: Exception) -> list[str]:
    """What users are told: one line, and one per note."""
    if isinstance(error, typer.Abort):
        return ["interrupted"]
    if isinstance(error, typer.TyperException):
        message = one_line(error.format_message())  # empty where help was shown instead
        hint = next((hint for start, hint in _HINTS.items() if message.startswith(start)), "see --help")
        return [f"error: {message[:1].lower()}{message[1:].rstrip('.')} ({hint})"] if message else []
    if isinstance(error, LayerSkipError):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = "out of memory; ask for fewer tokens, fewer completions or a narrower --dtype"
    else:
        message = f"{type(error).__name__}: {error}; this was not foreseen: run with --debug to see where it comes from"
    return [f"error: {one_line(message)}", *(f"  {one_line(note)}" for note in getattr(error, "__notes__", ()))]


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())
