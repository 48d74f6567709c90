"""`layerskip inspect`: sizes that are right, and what each exit makes of a text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip.cli.inspect import Costs, shape_rows, size
from layerskip.decode.scoring import perplexity


def test_story_checkpoint(run: Any, stories: Path) -> None:
    done = run("inspect", "-m", stories)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for row in (
        "kind llama",
        "layers 5",
        "width 64",
        "heads 8 of width 8, 4 for keys and values",
        "vocabulary 512 tokens, head tied to the embedding",
        "context 512 tokens",
        "weights 1015.75 KiB as float32, native weights",
        "read per token 1016.00 KiB of weights, 1.25 KiB per cached position",
        "total 260,032 100.0%",
        "exit nats/token perplexity agrees with exit 5",
    ):
        assert row in lines
    exits = [line.split() for line in lines if line[:1].isdigit()]
    assert [row[0] for row in exits] == ["1", "2", "3", "4", "5"]
    losses = [float(row[1]) for row in exits]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1
    assert exits[-1][-1] == "100.0%"


def test_json_is_the_same_in_numbers(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the lazy dog sleeps\n")
    record = json.loads(run("inspect", "--file", tmp_path / "text.txt", "-m", tiny_checkpoint, "--json").stdout)
    llm = layerskip.load(tiny_checkpoint)
    scores = llm.score_exits("the lazy dog sleeps")
    assert [entry["exit"] for entry in record["exits"]] == [1, 2, 3]
    assert [entry["loss"] for entry in record["exits"]] == pytest.approx([score.loss for score in scores])
    assert record["exits"][0]["perplexity"] == pytest.approx(math.exp(scores[0].loss))
    assert record["exits"][0]["agreement"] == scores[0].agreement(scores[2])
    assert record["text_tokens"] == len(llm.encode("the lazy dog sleeps"))
    assert record["shape"]["layers"] == 3
    plain = layerskip.load(tiny_checkpoint, weights="plain")
    assert record["parameters"]["total"] == sum(p.numel() for p in plain.decoder.parameters())
    assert (record["model"], record["dtype"]) == (str(tiny_checkpoint), "float32")


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_bytes(tiny_checkpoint: Path, dtype: str, width: int) -> None:
    llm = layerskip.load(tiny_checkpoint, dtype=dtype)
    parts = llm.decoder.shape.parameters()
    costs = Costs.of(llm.decoder)
    assert costs.weights == parts["total"] * width
    assert costs.read_per_token == (parts["total"] - parts["embedding"] + 32) * width  # head apart: one row of 32 read
    assert costs.cache_per_position == 3 * 2 * 2 * 8 * width  # layers, keys and values, heads, head width


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4-plain", 4.5)])
def test_quantised_weights_are_compared_with_the_checkpoint(
    run: Any, stories: Path, tmp_path: Path, weights: str, bits: float
) -> None:
    text = "Once there was a little dog. He liked to play with his ball in the park. One day the ball was gone."
    (tmp_path / "text.txt").write_text(text)
    command = ("inspect", "-m", stories, "--file", tmp_path / "text.txt", "--weights", weights)
    done = run(*command, "--json")
    record = json.loads(done.stdout)
    assert f"{weights} weights are quantised: lossy against the checkpoint; drafts are exact for them\n" in done.stderr
    quantised, checkpoint = (layerskip.load(stories, weights=each).score(text) for each in (weights, None))
    found = record["quantised"]
    assert record["layout"] == weights
    assert found["tokens"] == record["text_tokens"] - 1
    assert found["loss"] == pytest.approx(quantised.loss, abs=1e-5)
    assert found["checkpoint_loss"] == pytest.approx(checkpoint.loss, abs=1e-5)
    assert found["agreement"] == pytest.approx(quantised.agreement(checkpoint))
    assert found["perplexity"] == pytest.approx(math.exp(quantised.loss - checkpoint.loss), rel=1e-4)
    assert 0 < found["divergence"] < (0.01 if bits > 8 else 1)
    assert record["bytes"]["bits_per_weight"] == pytest.approx(bits, rel=0.08)  # the MLP of 172 is filled up
    assert (
        record["bytes"]["read_per_token"]
        < layerskip.load(stories, weights="plain").decoder.shape.parameters()["total"] * 2
    )
    table = run(*command)
    assert f"float32, {weights} weights (quantised:" in " ".join(table.stdout.split())
    assert f"{found['agreement']:.1%} of the likeliest are the same" in " ".join(table.stdout.split())


def test_lossless_weights_are_compared_with_nothing(run: Any, tiny_checkpoint: Path) -> None:
    done = run("inspect", "-m", tiny_checkpoint, "--json")
    assert json.loads(done.stdout)["quantised"] is None
    assert "quantised" not in run("inspect", "-m", tiny_checkpoint).output


def test_windows_and_rope_are_shown(tiny_checkpoint: Path) -> None:
    from dataclasses import replace

    shape = layerskip.load(tiny_checkpoint).decoder.shape
    other = replace(shape, windows=(None, 64, 64), rope=replace(shape.rope, kind="linear", factor=4.0))
    rows = dict(shape_rows(other))
    assert rows["sliding window"] == "64 tokens in 2 layers"
    assert rows["rope"] == "linear, factor 4, theta 10000"
    assert "sliding window" not in dict(shape_rows(shape))


def test_a_text_too_short_or_too_long(run: Any, tiny_checkpoint: Path) -> None:
    short, long = (run("inspect", text, "-m", tiny_checkpoint) for text in ("", "q" * 300))
    assert (short.exit_code, long.exit_code) == (2, 2)
    assert short.stderr == "error: the text has 1 tokens; to be scored it needs 2..256\n"
    assert long.stderr == "error: the text has 300 tokens; to be scored it needs 2..256\n"


def test_losses_without_a_number_are_null(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerskip.decode.scoring import ExitScore

    scores = [ExitScore(1, [math.nan], [1]), ExitScore(2, [-1000.0], [1]), ExitScore(3, [-1.0], [2])]
    monkeypatch.setattr(layerskip.LLM, "score_exits", lambda self, text: scores)
    exits = json.loads(run("inspect", "-m", tiny_checkpoint, "--json").stdout)["exits"]
    assert [entry["loss"] for entry in exits] == [None, 1000.0, 1.0]
    assert [entry["perplexity"] for entry in exits] == [None, None, pytest.approx(math.e)]
    assert "nan" in run("inspect", "-m", tiny_checkpoint).stdout


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1280, 3 * 2**30, 2**42)] == [
        "0 bytes",
        "1023 bytes",
        "1.25 KiB",
        "3.00 GiB",
        "4.00 TiB",
    ]
    assert perplexity(1e6) == math.inf
