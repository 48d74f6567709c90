"""What cannot be done is one line that says what to do, with the right exit status and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.cli.boundary import exit_status, lines
from layerskip.errors import CapacityError, CheckpointError, LayerSkipError, NumericalError, RequestError
from layerskip.model import cache
from tests.cli.outcome import refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--exit", "0"], ["exit 0 is not inside this 3-layer model; use 1..3"]),
        (["--exit", "4"], ["exit 4 is not inside this 3-layer model; use 1..3"]),
        (["--draft", "early-exit:3"], ["draft exit 3 is not below the 3 layers", "use 1..2"]),
        (["--draft", "early-exit:0"], ["draft exit 0 is not possible; use 1 or more layers"]),
        (["--draft", "early-exit"], ["recommends no exit; write early-exit:3, say"]),
        (["--draft", "early-exit:1", "--exit", "1"], ["no earlier exit to draft from; use no drafter"]),
        (["--draft", "early-exit:1", "--draft-tokens", "0"], ["drafting 0 tokens a round", "use 1 or more"]),
        (["--draft", "lookup", "--draft-tokens", "-1"], ["drafting -1 tokens a round", "use 1 or more"]),
        (["--draft-tokens", "4"], ["--draft-tokens 4 needs a drafter; add --draft"]),
        (["--confidence", "0.5"], ["--confidence 0.5 needs a drafter; add --draft"]),
        (["--draft", "lookup", "--confidence", "0.5"], ["lookup copies and has no confidence; leave it out"]),
        (["--draft", "early-exit:1", "--confidence", "2"], ["confidence 2.0 is not allowed", "at most 1"]),
        (["--draft", "early_exit:1"], ["unknown drafter 'early_exit'; use auto, none,", "did you mean 'early-exit'?"]),
        (["--draft", "lookup:3"], ["lookup takes nothing after it, not '3'"]),
        (["--draft", "assistant"], ["assistant needs a checkpoint; write assistant:PATH"]),
        (["--compare"], ["--compare sets a drafter against plain decoding; add --draft"]),
        (["--temperature", "-1"], ["temperature -1.0 is not allowed; use 0 (greedy) or more"]),
        (["--temperature", "nan"], ["temperature nan is not allowed"]),
        (["--top-p", "0"], ["top_p 0.0 is not allowed; use more than 0 and at most 1"]),
        (["--top-p", "1.5"], ["top_p 1.5 is not allowed; use more than 0 and at most 1"]),
        (["--top-k", "-1"], ["top_k -1 is not allowed"]),
        (["--min-p", "2"], ["min_p 2.0 is not allowed"]),
        (["--max-tokens", "0"], ["max_tokens 0 is not possible; use 1 or more"]),
        (["--max-tokens", "many"], ["invalid value for '--max-tokens'", "see --help"]),
        (["--min-tokens", "300"], ["min_tokens 300 is not possible; use 0..256"]),
        (["-n", "0"], ["n 0 is not possible; use 1 or more"]),
        (["--stop", ""], ["an empty stop string would end every text at once; leave it out"]),
        (["--logprobs", "2"], ["add --json"]),
        (["--logprobs", "-1", "--json"], ["logprobs -1 is not possible; use 0 or more"]),
        (["--ban", "320"], ["token 320 is outside the vocabulary; use 0..319"]),
        (["--ban", "therere"], ["token 'therere' is not in the vocabulary; give its id, or its spelling there"]),
        (["--logit-bias", "5"], ["--logit-bias 5 is not TOKEN=VALUE; write 42=-1.5, say"]),
        (["--logit-bias", "5=x"], ["--logit-bias 5=x is not TOKEN=VALUE"]),
        (["--logit-bias", "5=inf"], ["logit_bias inf of token 5 is not allowed"]),
        (["--dtype", "floot32"], ["unknown dtype 'floot32'", "did you mean 'float32'?"]),
        (["--device", "abacus"], ["unknown device 'abacus'; use auto, cpu or cuda"]),
        (["--tempature", "1"], ["no such option: --tempature", "--temperature"]),
        (["--file", "nowhere.txt"], ["both a prompt and --file are given; use one of them"]),
        (["more"], ["unexpected extra argument", "more", "put a prompt of several words in quotes"]),
    ],
    ids=" ".join,
)
def test_bad_option(run: Any, tiny_checkpoint: Path, arguments: list[str], parts: list[str]) -> None:
    refused(run("generate", "a", "-m", tiny_checkpoint, *arguments), *parts)


def test_the_spelling_of_a_token_is_suggested(run: Any, tiny_checkpoint: Path) -> None:
    vocabulary = layerskip.load(tiny_checkpoint).tokenizer.get_vocab()
    token = next(t for t in vocabulary if t.startswith("Ġ") and t != "Ġ" and t[1:] not in vocabulary)
    done = run("generate", "a", "-m", tiny_checkpoint, "--ban", token[1:])
    refused(done, f"token {token[1:]!r} is not in the vocabulary; give its id", f"did you mean {token!r}?")


def test_no_command_like_it(run: Any) -> None:
    refused(run("generat"), "no such command 'generat'", "did you mean 'generate'?".capitalize())


# -- prompts


def test_no_prompt(run: Any, tiny_checkpoint: Path) -> None:
    refused(run("generate", "-m", tiny_checkpoint), "no prompt: give a text, - for standard input, or --file")


def test_empty_prompt_without_bos(run: Any, copy: Callable[..., Path]) -> None:
    folder = copy()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(run("generate", "", "-m", folder), "the prompt is empty and this tokenizer has no BOS token", "give some")


def test_prompt_longer_than_the_context(run: Any, tiny_checkpoint: Path) -> None:
    done = run("generate", "q" * 300, "-m", tiny_checkpoint)
    refused(done, "the prompt has 300 tokens; this model's context holds 256, so use at most 255")
    warmed = run("generate", "q" * 300, "-m", tiny_checkpoint, "--draft", "lookup", "--compare")
    refused(warmed, "the prompt has 300 tokens")


def test_prompt_that_is_not_utf8(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bad = b"caf\xe9"
    done = run("generate", "-", "-m", tiny_checkpoint, input=bad)
    refused(done, "standard input is not UTF-8 text: byte 0xe9 at position 3", "convert it")
    (tmp_path / "latin.txt").write_bytes(bad)
    read = run("generate", "--file", tmp_path / "latin.txt", "-m", tiny_checkpoint)
    refused(read, f"{tmp_path}/latin.txt is not UTF-8 text: byte 0xe9 at position 3")
    refused(run("generate", "caf\udce9", "-m", tiny_checkpoint), "not valid text", "at character 3")


def test_no_such_file(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run("generate", "--file", tmp_path / "none.txt", "-m", tiny_checkpoint)
    refused(done, f"cannot read {tmp_path}/none.txt: No such file or directory")
    refused(run("inspect", "--file", tmp_path, "-m", tiny_checkpoint), "Is a directory")


# -- checkpoints


def test_folder_that_is_no_checkpoint(run: Any, tmp_path: Path) -> None:
    refused(run("generate", "a", "-m", tmp_path), "has no config.json; a checkpoint folder holds", status=1)
    refused(run("inspect", "-m", tmp_path / "none"), "no such folder", status=1)


def test_assistant_with_another_vocabulary(run: Any, tiny_checkpoint: Path, copy: Callable[..., Path]) -> None:
    other = copy("other")
    table = json.loads((other / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(table))
    done = run("generate", "a", "-m", tiny_checkpoint, "--draft", f"assistant:{other}")
    refused(done, "has another vocabulary: 2 of 320 tokens differ", "use a checkpoint with the same tokenizer")
    shutil.rmtree(other)
    refused(run("generate", "a", "-m", tiny_checkpoint, "--draft", f"assistant:{other}"), "no such folder", status=1)


def test_weights_that_are_not_numbers(run: Any, copy: Callable[..., Path]) -> None:
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run("generate", "a", "-m", folder)
    assert done.exit_code == 1
    assert done.stdout.strip() == ""
    assert done.stderr.startswith("error: the model's states are not finite from layer 1 (of 0..2) on")
    assert "check the checkpoint's weights" in done.stderr


# -- memory, and what nobody foresaw


def test_cache_that_does_not_fit(run: Any, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda device: 2**20)
    folder = copy(max_position_embeddings=200_000)
    done = run("generate", "a", "-m", folder, "--max-tokens", 100_000)
    assert done.exit_code == 1
    assert "a cache of 1 rows x 100001 positions needs 0.04 GiB, 0.00 GiB are free" in done.stderr
    assert "ask for fewer tokens or rows" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--debug", "generate", "a"], ["generate", "a", "--debug"]], ids=" ".join)
def test_debug_shows_where(run: Any, tiny_checkpoint: Path, arguments: list[str]) -> None:
    done = run(*arguments, "-m", tiny_checkpoint, "--exit", 9)
    assert done.exit_code == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "error: exit 9 is not inside this 3-layer model; use 1..3"


def test_debug_says_nothing_where_nothing_is_wrong(run: Any, tiny_checkpoint: Path) -> None:
    done = run("--debug", "generate", "a", "-m", tiny_checkpoint, "--max-tokens", 2)
    assert (done.exit_code, len(done.stderr.splitlines())) == (0, 1)
    assert "Traceback" not in run("generate", "--tempature", "--debug").stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x"), 2),
        (CheckpointError("x"), 1),
        (CapacityError("x"), 1),
        (NumericalError("x"), 1),
        (LayerSkipError("x"), 1),
        (MemoryError(), 1),
        (RuntimeError("x"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_status(error: Exception, status: int) -> None:
    assert exit_status(error) == status


def test_lines_of_errors() -> None:
    error = RequestError("two\nlines")
    error.add_note("and a hint")
    assert lines(error) == ["error: two lines", "  and a hint"]
    assert lines(MemoryError()) == [
        "error: out of memory; ask for fewer tokens, fewer completions or a narrower --dtype"
    ]
    [line] = lines(KeyError("x"))
    assert line == "error: KeyError: 'x'; this was not foreseen: run with --debug to see where it comes from"


def test_unforeseen_errors_are_a_line_too(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("disk on\nfire")

    monkeypatch.setattr("layerskip.llm.load", broken)
    refused(run("generate", "a", "-m", tiny_checkpoint), "RuntimeError: disk on fire", "run with --debug", status=1)
    monkeypatch.setattr("layerskip.llm.load", lambda *a, **k: [][1])
    assert "IndexError" in run("inspect", "-m", tiny_checkpoint, "--debug").stderr
