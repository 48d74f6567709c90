"""The command line: `layerskip COMMAND`. One file per command; what they share lies beside them.

Knows terminals, files and exit statuses; decides nothing about decoding. torch, transformers and `layerskip.llm` are
imported inside commands, so that help is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from layerskip import __version__
from layerskip.cli import bench, chat, evaluate, generate, inspect, report, train, tune, verify
from layerskip.cli.boundary import Commands, remember_debug
from layerskip.cli.flags import spread

__all__ = ["app", "main"]

app = typer.Typer(
    name="layerskip", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"layerskip {__version__}\n")
        raise typer.Exit


@app.callback(epilog="Exit status: 0 done, 1 failed, 2 asked for what cannot be, 130 interrupted.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", callback=remember_debug, is_eager=True, help="Show where an error comes from.")
    ] = False,
) -> None:
    """Early-exit inference and exact self-speculative decoding for Llama-family checkpoints."""


for _command in (generate.generate, chat.chat, verify.verify, inspect.inspect):
    app.command()(spread(_command))
app.command("train", context_settings=train.ANY_KEY)(spread(train.train))
app.command("eval")(spread(evaluate.evaluate))
app.command()(spread(bench.bench))
app.command()(spread(tune.tune))
app.command()(spread(report.report))


def main() -> None:
    """The entry point."""
    app()
