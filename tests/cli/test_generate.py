"""`layerskip generate`: the text alone on standard output, what drafting brought on standard error."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.cli import app
from layerskip.decode import batch, joining
from tests.cli.outcome import refused

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
GREEN, YELLOW, RESET = "\x1b[32m", "\x1b[33m", "\x1b[0m"
NUMBER = r"\d+(?:\.\d+)?"


def parsed(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    record: dict[str, Any] = json.loads(result.stdout)
    return record


# -- the story of the real checkpoint


def test_story_is_exact(run: Any, stories: Path) -> None:
    done = run("generate", "", "-m", stories, "--max-tokens", 61)
    assert (done.exit_code, done.stdout) == (0, STORY + "\n")


@pytest.mark.parametrize("draft", ["early-exit:3", "lookup"])
def test_story_with_drafts_compares_as_identical(run: Any, stories: Path, draft: str) -> None:
    done = run("generate", "", "-m", stories, "--max-tokens", 61, "--draft", draft, "--compare")
    assert done.stdout == STORY + "\n"
    drafted, plain, speedup = done.stderr.splitlines()
    assert re.fullmatch(
        rf"61 tokens \(length\), {NUMBER} tokens/s decode, {NUMBER} tokens/s with the prompt; "
        "exact, float32, native weights; "
        rf"{draft} K=\d: \d+ rounds, acceptance {NUMBER}%, {NUMBER} tokens/round, "
        rf"draft {NUMBER} s, verify {NUMBER} s, rest {NUMBER} s",
        drafted,
    )
    assert re.fullmatch(rf"61 tokens .*; exact, float32, native weights; plain: 61 rounds, {NUMBER} s", plain)
    assert re.fullmatch(rf"speedup {NUMBER}x over plain decoding \(ratio of decode tokens/s\); identical", speedup)


# -- where the prompt comes from


@pytest.mark.parametrize("data", [b"a little", b"a little\n", b"a little\r\n"])
def test_standard_input_and_files_are_the_prompt_without_their_last_newline(
    run: Any, tiny_checkpoint: Path, tmp_path: Path, data: bytes
) -> None:
    said = run("generate", "a little", "-m", tiny_checkpoint, "--max-tokens", 5)
    piped = run("generate", "-", "-m", tiny_checkpoint, "--max-tokens", 5, input=data)
    (tmp_path / "prompt.txt").write_bytes(data)
    read = run("generate", "--file", tmp_path / "prompt.txt", "-m", tiny_checkpoint, "--max-tokens", 5)
    assert said.exit_code == piped.exit_code == read.exit_code == 0
    assert said.stdout == piped.stdout == read.stdout
    longer = run("generate", "-", "-m", tiny_checkpoint, "--max-tokens", 5, "--json", input=data + b"\n")
    kept = layerskip.load(tiny_checkpoint).encode(data.decode())  # only the last newline goes
    assert json.loads(longer.stdout)["prompt_tokens"] == len(kept)


def test_prompt_is_not_echoed(run: Any, tiny_checkpoint: Path) -> None:
    done = run("generate", "the lazy dog", "-m", tiny_checkpoint, "--max-tokens", 3)
    expected = layerskip.load(tiny_checkpoint).generate("the lazy dog", max_tokens=3)
    assert done.stdout == expected.text + "\n"


# -- settings reach the library


def test_settings_are_the_librarys(run: Any, tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint)
    token = llm.tokenizer.get_vocab()["Ġthe"]
    done = parsed(
        run(
            *("generate", "the dog", "-m", tiny_checkpoint, "--max-tokens", 12, "--min-tokens", 2, "--json"),
            *("--temperature", 0.8, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7, "-n", 2),
            *("--repetition-penalty", 1.1, "--presence-penalty", 0.2, "--frequency-penalty", 0.1),
            *("--logit-bias", "Ġthe=2.5", "--logit-bias", "5=-1", "--ban", "Ġdog", "--ban", 9, "--ignore-eos"),
            *("--stop", "zzz", "--stop", "=", "--logprobs", 2, "--dtype", "float64", "--device", "cpu"),
        )
    )
    sampling = layerskip.Sampling(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={token: 2.5, 5: -1.0},
        banned=[llm.tokenizer.get_vocab()["Ġdog"], 9],
        seed=7,
    )
    expected = layerskip.load(tiny_checkpoint, dtype="float64").generate(
        "the dog",
        sampling=sampling,
        n=2,
        max_tokens=12,
        min_tokens=2,
        ignore_eos=True,
        stop=["zzz", "="],
        logprobs=2,
    )
    assert [c["tokens"] for c in done["completions"]] == [c.tokens for c in expected]
    assert [c["text"] for c in done["completions"]] == [c.text for c in expected]
    assert [entry["logprob"] for entry in done["completions"][1]["logprobs"]] == pytest.approx(
        [entry.logprob for entry in expected[1].logprobs]
    )
    assert len(done["completions"][0]["logprobs"][0]["top"]) == 2
    assert done["settings"] == {
        **{name: value for name, value in vars(sampling).items() if name not in ("processors", "logit_bias")},
        "logit_bias": {str(token): 2.5, "5": -1.0},
        "max_tokens": 12,
        "min_tokens": 2,
        "stop": ["zzz", "="],
        "ignore_eos": True,
        "n": 2,
    }


def test_json_says_what_was_run(run: Any, tiny_checkpoint: Path) -> None:
    done = parsed(
        run(
            *("generate", "the dog", "-m", tiny_checkpoint, "--max-tokens", 30, "--json", "--compare", "--ignore-eos"),
            *("--draft", "early-exit:2", "--draft-tokens", 3, "--confidence", 0.01),
        )
    )
    assert done["model"] == str(tiny_checkpoint)
    assert (done["dtype"], done["device"].split(":")[0] in ("cpu", "cuda")) == ("float32", True)
    assert (done["mode"], done["exit"], done["tokens"], done["interrupted"]) == ("exact", 3, 30, False)
    assert done["draft"] == {"drafter": "early-exit:2", "tokens": 3, "confidence": 0.01}
    assert done["prompt_tokens"] == len(layerskip.load(tiny_checkpoint).encode("the dog"))
    [completion] = done["completions"]
    assert len(completion["tokens"]) == 30
    assert (completion["finish_reason"], completion["stop"], completion["logprobs"]) == ("length", None, None)
    assert completion["acceptance"]["num_emitted_tokens"] == done["acceptance"]["num_emitted_tokens"] == 30
    assert max(map(int, done["acceptance"]["acceptance_histogram"])) <= 3
    seconds, rates = done["seconds"], done["tokens_per_second"]
    assert seconds["decode"] == pytest.approx(seconds["draft"] + seconds["verify"] + seconds["rest"])
    assert 0 < seconds["decode"] < seconds["end_to_end"]
    assert rates["decode"] == pytest.approx(30 / seconds["decode"])
    assert rates["end_to_end"] == pytest.approx(30 / seconds["end_to_end"])
    compare = done["compare"]
    assert (compare["identical"], compare["differs_at"], compare["plain"]["tokens"]) == (True, [None], 30)
    plain = compare["plain"]["tokens_per_second"]["decode"]
    assert compare["speedup"] == pytest.approx(rates["decode"] / plain)


def test_rows_of_a_round_share_its_seconds(run: Any, tiny_checkpoint: Path) -> None:
    done = parsed(run("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 8, "-n", 4, "--json", "--ignore-eos"))
    each = [sum(c["acceptance"]["seconds"].values()) for c in done["completions"]]
    assert done["seconds"]["decode"] == pytest.approx(max(each))
    assert done["acceptance"]["num_spec_steps"] == 32


def test_exit_is_called_lossy(run: Any, tiny_checkpoint: Path) -> None:
    arguments = ("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 4, "--exit")
    assert "; lossy (exit 2 of 3), float32, native weights; plain: " in run(*arguments, 2).stderr
    assert "; exact, float32, native weights; plain: " in run(*arguments, 3).stderr
    done = parsed(run(*arguments, 2, "--json"))
    assert (done["mode"], done["exit"], done["draft"], done["compare"]) == ("lossy", 2, None, None)


@pytest.mark.parametrize("weights", ["int8", "int4-plain"])
def test_quantised_weights_are_said_to_be_lossy(run: Any, tiny_checkpoint: Path, weights: str) -> None:
    arguments = ("generate", "the cat", "-m", tiny_checkpoint, "--weights", weights, "--max-tokens", 12, "--ignore-eos")
    done = run(*arguments, "--draft", "early-exit:1", "--compare")
    assert (
        f"; exact, float32, {weights} weights (quantised: lossy against the checkpoint); early-exit:1 K=4: "
        in done.stderr
    )
    assert "; identical\n" in done.stderr
    assert json.loads(run(*arguments, "--json").stdout)["layout"] == weights


def test_assistant_drafts(run: Any, tiny_checkpoint: Path) -> None:
    done = run(
        *("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 9, "--ignore-eos"),
        *("--draft", f"assistant:{tiny_checkpoint}", "--draft-tokens", 2, "--compare"),
    )
    assert "K=2: 3 rounds, acceptance 100.0%, 3.00 tokens/round" in done.stderr
    assert done.stderr.endswith("identical\n")


# -- sampled


def test_seed_is_told_and_repeats_the_text(run: Any, tiny_checkpoint: Path) -> None:
    arguments = ("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 20, "--temperature", 1)
    first = run(*arguments)
    [seed] = re.findall(r"; seed (\d+)$", first.stderr.strip())
    again = run(*arguments, "--seed", seed)
    assert again.stdout == first.stdout
    assert "seed" not in again.stderr


def test_comparison_promises_no_more_than_is_so(run: Any, tiny_checkpoint: Path) -> None:
    arguments = ("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 20, "--temperature", 1, "--compare", "--draft")
    drawn, copied = run(*arguments, "early-exit:2"), run(*arguments, "lookup")
    assert drawn.stderr.endswith("; same law, different draws\n")
    assert copied.stderr.endswith("; identical\n")
    assert parsed(run(*arguments, "early-exit:2", "--json"))["compare"]["identical"] is None


def test_comparison_names_the_first_difference(
    run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_all(monkeypatch)
    done = run("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 20, "--draft", "early-exit:1", "--compare")
    assert re.search(r"; differs at token \d+; layerskip verify tells whether that is a tie$", done.stderr.strip())
    assert done.exit_code == 0


def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks verification: every drafted token is kept."""
    monkeypatch.setattr(batch, "verify_chosen", lambda own, drafted: [*drafted, own[len(drafted)]])


def test_neither_run_spares_the_other_its_prompt(
    run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, int]] = []
    prefill = joining.prefill

    def spy(*arguments: Any, **settings: Any) -> None:
        ran.append((settings["starts"][0], len(settings["ids"][0])))
        prefill(*arguments, **settings)

    monkeypatch.setattr(joining, "prefill", spy)
    arguments = ("--max-tokens", 2, "--draft", "early-exit:1", "--compare")
    run("generate", "the quick brown fox", "-m", tiny_checkpoint, *arguments)
    known = len(layerskip.load(tiny_checkpoint).encode("the quick brown fox")) - 1
    assert ran[-2:] == [(0, known), (0, known)]
    assert [length for _, length in ran[:-2]] == [0, 0]  # warming up runs one token of it


# -- several


def test_completions_are_separated(run: Any, tiny_checkpoint: Path) -> None:
    arguments = ("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 6, "--temperature", 1, "--seed", 3, "-n", 3)
    done = run(*arguments, "--draft", "early-exit:1")
    texts = [c["text"] for c in parsed(run(*arguments, "--draft", "early-exit:1", "--json"))["completions"]]
    assert done.stdout == "".join(f"--- {i}/3\n{text}\n" for i, text in enumerate(texts, 1))
    assert done.stderr.startswith("3 completions, 18 tokens (length), ")


# -- terminals


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Calls `layerskip` with a terminal as standard output; returns what it shows there."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in arguments])
        assert ended.value.code == 0
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:  # Linux reports the end of a terminal so
        pass
    os.close(master)
    return shown.decode().replace("\r\n", "\n")


def test_terminal_shows_accepted_green_and_own_yellow(
    run: Any, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    arguments = ("generate", "a", "-m", tiny_checkpoint, "--max-tokens", 9, "--ignore-eos")
    plain = on_a_terminal(monkeypatch, *arguments)
    assert "\x1b[3" not in plain
    drafting = (*arguments, "--draft", f"assistant:{tiny_checkpoint}", "--draft-tokens", 2)
    coloured = on_a_terminal(monkeypatch, *drafting)
    pieces = re.findall(r"\x1b\[(32|33)m(.*?)\x1b\[0m", coloured, flags=re.DOTALL)
    expected = []
    with (llm := layerskip.load(tiny_checkpoint)).stream(
        "a", draft=llm.assistant(tiny_checkpoint, tokens=2), max_tokens=9, ignore_eos=True
    ) as stream:
        for chunk in stream:
            expected += [("32", chunk.accepted_text), ("33", chunk.text[len(chunk.accepted_text) :])]
    assert pieces == [(colour, text) for colour, text in expected if text]
    assert {colour for colour, _ in pieces} == {"32", "33"}
    assert "".join(text for _, text in pieces) + "\n" == plain
    assert on_a_terminal(monkeypatch, *drafting, "--no-color") == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal(monkeypatch, *drafting) == plain


def test_story_on_a_terminal_has_both_colours(run: Any, monkeypatch: pytest.MonkeyPatch, stories: Path) -> None:
    shown = on_a_terminal(monkeypatch, "generate", "", "-m", stories, "--max-tokens", 61, "--draft", "early-exit:3")
    assert GREEN in shown
    assert YELLOW in shown
    assert re.sub(r"\x1b\[\d+m", "", shown) == STORY + "\n"


def test_a_terminal_obeys_no_control_characters_of_the_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip.cli.screen import Screen

    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        screen = Screen(no_color=True)
        screen.write("a\x1b[2J\x9b31m\tb\n")
    assert os.read(master, 100).decode() == "a␛[2J�31m\tb\r\n"
    os.close(master)


def test_a_pipe_gets_the_text_as_it_comes(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip.cli.screen import Screen

    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        Screen().write("a\x1b[2J")
        os.set_blocking(reading, False)
        assert os.read(reading, 100) == b"a\x1b[2J"  # unchanged: what is piped is the model's text
    os.close(reading)


# -- interrupts and closed pipes


def child(*arguments: object, **settings: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "layerskip", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have turned them off


def test_interrupt_keeps_what_was_written(copy: Any) -> None:
    folder = copy(max_position_embeddings=200_000)
    process = child("generate", "a", "-m", folder, "--max-tokens", 100_000, "--ignore-eos", preexec_fn=heed_interrupts)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert re.fullmatch(
        rb"\d+ tokens \(interrupted\), .*; exact, float32, native weights; plain: \d+ rounds, .* s\n", said
    )


def test_interrupted_json_is_whole(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = batch.Batch.round

    def interrupted(self: batch.Batch) -> Any:
        if interrupted.count == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        interrupted.count += 1  # type: ignore[attr-defined]
        return rounds(self)

    interrupted.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(batch.Batch, "round", interrupted)
    done = run("generate", "a", "-m", tiny_checkpoint, "--json", "--ignore-eos")
    assert done.exit_code == 130
    record = json.loads(done.stdout)
    assert (record["interrupted"], record["tokens"]) == (True, 3)
    assert record["completions"][0]["finish_reason"] is None


def test_closed_pipe_is_quiet(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    closed = os.fdopen(writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "stderr", sys.stderr)  # typer wraps both; the patch puts them back
        with pytest.raises(SystemExit) as ended:
            app(["generate", "a", "-m", str(tiny_checkpoint), "--ignore-eos"])
    assert ended.value.code == 1
    with contextlib.suppress(BrokenPipeError):
        closed.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("no_color", [True, False])
def test_statistics_are_dim_on_a_terminal_and_plain_where_asked(
    monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    from layerskip.cli.screen import Screen

    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        Screen(no_color=no_color).note("61 tokens")
        terminal.flush()
    assert os.read(master, 100).decode() == ("61 tokens\r\n" if no_color else "\x1b[2m61 tokens\x1b[0m\r\n")
    os.close(master)


# -- drafts that choose


def recommending(copy: Any) -> Path:
    folder: Path = copy("recommending", layerskip={"exit": 1, "draft_tokens": 3, "quality": {"agreement/1": 0.4}})
    return folder


CHOSE = re.compile(rf"auto: (early-exit:\d K={NUMBER}|lookup K={NUMBER}|plain) in \d+% of rounds.*; choosing took .*%")


def test_auto_is_the_default_where_an_exit_is_recommended(run: Any, copy: Any, tiny_checkpoint: Path) -> None:
    folder = recommending(copy)
    expected = layerskip.load(folder).generate("the dog", max_tokens=20).text + "\n"
    done = run("generate", "the dog", "-m", folder, "--max-tokens", 20, "--compare")
    assert done.stdout == expected
    drafted, chose, plain, speedup = done.stderr.splitlines()
    assert "; auto: " in drafted
    assert CHOSE.fullmatch(chose), chose
    assert plain.endswith(" s")
    assert speedup.endswith("identical")
    for words, draft in (([folder, "--draft", "none"], "plain"), ([folder, "--exit", 2], "plain")):
        [line] = run("generate", "the dog", "-m", *words, "--max-tokens", 5).stderr.splitlines()
        assert f"; {draft}: " in line
    [line] = run("generate", "the dog", "-m", tiny_checkpoint, "--max-tokens", 5).stderr.splitlines()
    assert "; plain: " in line


def test_auto_repeats_with_a_seed(run: Any, copy: Any) -> None:
    """What it chooses depends on the clock, the text does not; so a seed that was told repeats it."""
    arguments = ("generate", "the dog", "-m", recommending(copy), "--temperature", 0.9, "--seed", 3, "--max-tokens", 20)
    texts = {run(*arguments, "--draft", draft).stdout for draft in ("none", "auto", "auto")}
    assert len(texts) == 1
    done = parsed(run(*arguments, "--compare", "--json"))
    assert done["compare"]["identical"] is True
    assert done["draft"]["drafter"] == "auto"
    chosen = done["draft"]["chosen"]["rounds"].values()  # of this text, not of the warm-up
    assert sum(count["rounds"] for count in chosen) == done["acceptance"]["num_spec_steps"]


@pytest.mark.parametrize("draft", ["early-exit:1", "cascade:1", "early-exit", "cascade"])
@pytest.mark.parametrize("length", ["gain", "thompson"])
def test_draft_lengths_are_found(run: Any, copy: Any, draft: str, length: str) -> None:
    folder = recommending(copy)
    done = run("generate", "the dog", "-m", folder, "--draft", draft, "--draft-length", length, "--max-tokens", 12)
    assert done.stdout == layerskip.load(folder).generate("the dog", max_tokens=12).text + "\n"
    name = draft if ":" in draft else f"{draft}:1"
    assert f"; {name} K=16 {length}" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "auto:3"], "auto takes nothing after it, not '3'; write auto"),
        (["--draft", "auto", "--confidence", "0.5"], "auto finds by itself where to exit and how long to draft"),
        (["--draft", "lookup", "--draft-length", "gain"], "lookup copies and has no draft length; leave it out"),
        (["--draft", "cascade"], "recommends no exit; write cascade:3, say"),
        (["--draft", "cascade:x"], "cascade needs a number of layers, not 'x'; write cascade:3, say"),
        (
            ["--draft", "early-exit:1", "--draft-length", "gian"],
            "unknown draft length 'gian'; use fixed, thompson, gain",
        ),
        (["--draft", "early-exit:1", "--draft-length", "gain", "--confidence", "0.5"], "leave confidence 0.5 out"),
        (["--draft-length", "gain"], "--draft-length gain needs a drafter"),
    ],
)
def test_choices_that_make_no_sense_are_refused(
    run: Any, tiny_checkpoint: Path, options: list[str], message: str
) -> None:
    done = run("generate", "the dog", "-m", tiny_checkpoint, *options)
    refused(done, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compile", "--weights", "native"], "native weights are not compiled, only plain ones are"),
        (["--row-invariant", "--weights", "plain"], "plain weights are not row-invariant; use native, int8, int4"),
        (
            ["--row-invariant", "--dtype", "float64"],
            "plain weights are not row-invariant, and those that are cannot be here: the kernels know float32 and "
            "bfloat16, not float64",
        ),
    ],
)
def test_weights_that_cannot_do_what_is_asked_are_refused(
    run: Any, tiny_checkpoint: Path, options: list[str], message: str
) -> None:
    done = run("generate", "the dog", "-m", tiny_checkpoint, *options)
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_row_invariant_text_is_that_of_plain_decoding(run: Any, tiny_checkpoint: Path) -> None:
    asked = ["the dog", "-m", tiny_checkpoint, "--dtype", "bfloat16", "--row-invariant", "--max-tokens", 30]
    done = run("generate", *asked, "--draft", "early-exit:1", "--compare")
    assert "row-invariant: native weights are so by themselves, at no price" in done.stderr
    assert "; identical" in done.stderr


@pytest.mark.slow  # a minute of compiling
def test_compiled_text_is_that_of_plain_decoding(run: Any, tiny_checkpoint: Path) -> None:
    asked = ["the dog", "-m", tiny_checkpoint, "--dtype", "float32", "--compile", "--max-tokens", 12]
    done = run("generate", *asked, "--draft", "early-exit:1", "--compare")
    assert "graphs are compiled as they are first needed" in done.stderr
    assert re.search(r"plain weights, \d+ graphs compiled in [\d.]+ s", done.stderr)
    assert "; identical" in done.stderr
