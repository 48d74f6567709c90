"""`layerskip chat`: a conversation through the tokenizer's chat template."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip.cli.boundary import lines
from layerskip.cli.drafting import DraftFlags, account, label
from layerskip.cli.flags import EndFlags, ModelFlags, SamplingFlags, ShowFlags
from layerskip.cli.generate import held, show_run
from layerskip.cli.prompts import decode, without_newline
from layerskip.cli.screen import Screen
from layerskip.errors import RequestError, suggest

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.decode.sampling import Sampling
    from layerskip.llm import LLM

COMMANDS = ("/reset", "/quit")


def chat(
    *,
    model: ModelFlags,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told first.", show_default=False)
    ] = None,
    draft: DraftFlags,
    sampling: SamplingFlags,
    end: EndFlags,
    show: ShowFlags,
) -> None:
    """Talk with a model that has a chat template.

    One line is one message, from the terminal or a pipe.
    /reset begins anew, /quit or Ctrl-D ends, Ctrl-C cuts an answer short.
    """
    llm = model.load()
    screen = Screen(no_color=show.no_color)
    draft = draft.or_auto(llm)
    drafter = draft.drafter(llm)
    talk = Conversation(llm, system, drafter, label(draft.draft, drafter), sampling.sampling(llm), end)
    talk.check()
    interactive = sys.stdin.isatty()
    for message in messages(interactive):
        if message == "/quit":
            return
        try:
            talk.turn(message, screen)
        except RequestError as error:
            if not interactive:
                raise
            for line in lines(error):
                screen.note(line)
        except KeyboardInterrupt:
            if not interactive:
                raise


@dataclass
class Conversation:
    """What was said, and how to go on."""

    llm: LLM
    system: str | None
    drafter: Drafter | None
    label: str
    sampling: Sampling
    end: EndFlags
    said: list[dict[str, str]] = field(default_factory=list)

    def check(self) -> None:
        """Raises RequestError now rather than after the first question where the template will not do."""
        self._ids("Hello")

    def turn(self, message: str, screen: Screen) -> None:
        """One message and its answer, or a command.

        Raises:
            RequestError: no such command, or the conversation no longer fits. It stays as it was.
            KeyboardInterrupt: the answer was cut short; what was said so far stays said.
        """
        if re.fullmatch(r"/\w+", message):
            if message not in COMMANDS:
                raise RequestError(f"no command {message}; use {', '.join(COMMANDS)}{suggest(message, COMMANDS)}")
            self.said.clear()
            return
        try:
            stream = self.llm.stream(self._ids(message), draft=self.drafter, sampling=self.sampling, **asdict(self.end))
        except RequestError as error:
            if self.said:
                error.add_note("/reset begins a new conversation")
            raise
        run = show_run(stream, screen, drafting=self.drafter is not None)
        self.said += [
            {"role": "user", "content": message},
            {"role": "assistant", "content": run.completions[0].text},
        ]
        screen.note(run.line(label=self.label, mode=f"exact, {held(self.llm)}"))
        if (chosen := account(self.drafter)) is not None:
            screen.note(chosen)
        if run.interrupted:
            raise KeyboardInterrupt

    def _ids(self, message: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.llm.apply_chat_template([*system, *self.said, {"role": "user", "content": message}])


def messages(interactive: bool) -> Iterator[str]:
    """Lines that are not blank, from a terminal with a prompt sign or from a pipe without."""
    for line in _typed() if interactive else _piped():
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() its line editing
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # the line typed so far is dropped
        except EOFError:
            sys.stdout.write("\n")
            return


def _piped() -> Iterator[str]:
    for number, data in enumerate(sys.stdin.buffer, 1):
        yield without_newline(decode(data, f"line {number} of standard input"))
