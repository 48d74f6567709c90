"""`layerskip chat`: the conversation goes through the template, is kept, and is not run twice."""

import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.cli import app, chat
from layerskip.decode import batch, joining

SETTINGS = ("--max-tokens", 6, "--ignore-eos")


def answers(folder: Path, *questions: str, system: str | None = None) -> list[str]:
    """What the library says to the same questions."""
    llm = layerskip.load(folder)
    said = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for question in questions:
        said.append({"role": "user", "content": question})
        done = llm.generate(llm.apply_chat_template(said), max_tokens=6, ignore_eos=True)
        said.append({"role": "assistant", "content": done.text})
        texts.append(done.text)
    return texts


def test_piped_conversation(run: Any, tiny_checkpoint: Path) -> None:
    done = run("chat", "-m", tiny_checkpoint, *SETTINGS, input="hello\n\n  \nthe dog\n")
    assert done.exit_code == 0
    assert done.stdout == "".join(f"{text}\n" for text in answers(tiny_checkpoint, "hello", "the dog"))
    first, second = done.stderr.splitlines()
    assert re.fullmatch(r"6 tokens \(length\), .*; exact, float32, native weights; plain: 6 rounds, .* s", first)
    assert second.startswith("6 tokens (length), ")


def test_system_draft_reset_and_quit(run: Any, tiny_checkpoint: Path) -> None:
    said = "hello\n/reset\nhello\n/quit\nnot said\n"
    done = run("chat", "-m", tiny_checkpoint, *SETTINGS, "--system", "Be brief.", "--draft", "lookup", input=said)
    [text] = answers(tiny_checkpoint, "hello", system="Be brief.")
    assert done.stdout == f"{text}\n{text}\n"
    assert "lookup K=8" in done.stderr


def test_conversation_is_not_run_twice(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []
    prefill = joining.prefill

    def spy(*arguments: Any, **settings: Any) -> None:
        ran.append((settings["starts"][0], len(settings["ids"][0])))
        prefill(*arguments, **settings)

    monkeypatch.setattr(joining, "prefill", spy)
    run("chat", "-m", tiny_checkpoint, *SETTINGS, input="the quick brown fox\nthe dog\n")
    (start, first), (again, second) = ran
    assert start == 0
    assert first <= again < second


def test_no_chat_template(run: Any, stories: Path) -> None:
    done = run("chat", "-m", stories, input="hello\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* has no chat template; generate from a plain prompt instead\n", done.stderr)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"/rest\n", "error: no command /rest; use /reset, /quit; did you mean '/reset'?"),
        (b"x" * 300, "error: the prompt has "),
        (b"\xff\n", "error: line 1 of standard input is not UTF-8 text: byte 0xff at position 0"),
    ],
    ids=["command", "context", "bytes"],
)
def test_piped_mistakes_end_it(run: Any, tiny_checkpoint: Path, said: bytes, message: str) -> None:
    done = run("chat", "-m", tiny_checkpoint, *SETTINGS, input=said)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_a_full_context_names_the_way_out(run: Any, tiny_checkpoint: Path) -> None:
    done = run("chat", "-m", tiny_checkpoint, *SETTINGS, input="hello\n" + "x" * 300)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].strip() == "/reset begins a new conversation"


def test_terminal(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Mistakes and interrupts do not end a conversation at a terminal; Ctrl-D does."""
    typed = iter(["hello", "/rest", KeyboardInterrupt, "slow", "the dog", EOFError])

    def read(sign: str) -> str:
        assert sign == "> "
        value = next(typed)
        if isinstance(value, str):
            return value
        raise value

    turn = chat.Conversation.turn

    def interrupted(self: chat.Conversation, message: str, screen: Any) -> None:
        if message == "slow":
            raise KeyboardInterrupt
        turn(self, message, screen)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat.Conversation, "turn", interrupted)
    master, slave = pty.openpty()
    with os.fdopen(slave) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", terminal)
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in ("chat", "-m", tiny_checkpoint, *SETTINGS)])
    os.close(master)
    assert ended.value.code == 0
    shown = capfd.readouterr()
    first, second = answers(tiny_checkpoint, "hello", "the dog")
    assert shown.out == f"{first}\n\n{second}\n\n"
    assert "no command /rest" in shown.err


def test_interrupted_answer_stays_said(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = batch.Batch.round
    count = iter(range(100))

    def interrupted(self: batch.Batch) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return rounds(self)

    monkeypatch.setattr(batch.Batch, "round", interrupted)
    done = run("chat", "-m", tiny_checkpoint, *SETTINGS, input="hello\nthe dog\n")
    assert done.exit_code == 130
    [text] = answers(tiny_checkpoint, "hello")
    assert text.startswith(done.stdout.rstrip("\n"))
    assert "3 tokens (interrupted)" in done.stderr
