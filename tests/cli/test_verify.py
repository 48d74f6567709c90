"""`layerskip verify`: equal texts, ties, and differences that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip.cli.verify import PROMPTS, diverge, plain_logits
from layerskip.decode import batch


def test_story_checkpoint_is_verified(run: Any, stories: Path) -> None:
    done = run("verify", "-m", stories, "--max-tokens", 20)
    assert done.exit_code == 0
    *results, summary = done.stdout.splitlines()
    assert len(results) == len(PROMPTS) + 1  # the empty prompt too: there is a BOS token
    assert all(line.startswith("identical ") for line in results)
    assert summary.startswith("6 prompts: 6 identical, 0 tied, 0 different; early-exit:2 K=4, float32, acceptance ")


def test_named_drafter_and_json(run: Any, tiny_checkpoint: Path) -> None:
    arguments = ("--draft", "lookup", "--draft-tokens", 3, "--max-tokens", 12, "--dtype", "float64", "--json")
    done = run("verify", "-m", tiny_checkpoint, *arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["identical"], record["tie"], record["different"]) == (6, 0, 0)
    assert (record["dtype"], record["draft"]["drafter"], record["draft"]["tokens"]) == ("float64", "lookup", 3)
    assert [entry["prompt"] for entry in record["prompts"]] == ["", *PROMPTS]
    assert all(entry["divergence"] is None for entry in record["prompts"])


def test_prompts_of_files(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("\ufeffthe dog\n\n \nthe sun\r\n")  # with the mark that Windows writes
    (tmp_path / "records.jsonl").write_text('{"prompt": "the dog"}\n{"text": "the sun", "id": 4}\n\n')
    for name in ("plain.txt", "records.jsonl"):
        done = run("verify", "-m", tiny_checkpoint, "--prompts", tmp_path / name, "--max-tokens", 4, "--json")
        assert [entry["prompt"] for entry in json.loads(done.stdout)["prompts"]] == ["the dog", "the sun"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n\n", "holds no prompts; give one in each line"),
        ("bad.jsonl", '{"prompt": "a"}\nnot json', "bad.jsonl, line 2 is not JSON"),
        ("long.jsonl", f'{{"prompt": {"1" * 5000}}}', "long.jsonl, line 1 is not JSON"),
        ("none.jsonl", '{"answer": "a"}', "none.jsonl, line 1 has no prompt; it must be an object with a text under"),
        ("list.jsonl", "[1]", "list.jsonl, line 1 has no prompt"),
        ("none.jsonl", '{"prompt": 3}', "none.jsonl, line 1 has no prompt"),
        ("long.txt", "q" * 300, "the prompt has 300 tokens"),
    ],
)
def test_bad_prompts(run: Any, tiny_checkpoint: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    done = run("verify", "-m", tiny_checkpoint, "--prompts", tmp_path / name)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_broken_verification_is_found(run: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "verify_chosen", lambda own, drafted: [*drafted, own[len(drafted)]])
    done = run("verify", "-m", tiny_checkpoint, "--max-tokens", 10)
    assert done.exit_code == 1
    assert "different    10 tokens  'Once upon a time'  at token 0: plain " in done.stdout
    assert "not a tie within 0.0001" in done.stdout
    record = json.loads(run("verify", "-m", tiny_checkpoint, "--max-tokens", 10, "--json").stdout)
    assert record["different"] == 6
    assert record["prompts"][0]["divergence"]["gap"] > 1e-4


def test_gap_is_the_plain_models(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint, dtype="float64")
    done = llm.generate("the dog", max_tokens=6, logprobs=2)
    ids, tokens = llm.encode("the dog"), done.tokens
    (best, likely), (second, less) = done.logprobs[4].top
    assert tokens[4] == best
    found = diverge(llm, ids, tokens, [*tokens[:4], second, 7])
    assert (found.at, found.plain[0], found.drafted[0]) == (4, best, second)
    assert found.gap == pytest.approx(likely - less, abs=1e-9)
    assert not found.tie
    assert diverge(llm, ids, tokens, tokens) is None
    short = diverge(llm, ids, tokens, tokens[:3])
    assert (short.at, short.drafted, short.gap, short.tie) == (3, None, None, False)


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [("float64", 1e-10, 1e-8), ("float32", 5e-5, 5e-4), ("bfloat16", 2**-8, 2**-6), ("float16", 2**-11, 2**-9)],
)
def test_ties_are_within_the_rounding_of_the_dtype(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, inside: float, outside: float
) -> None:
    llm = layerskip.load(tiny_checkpoint, dtype=dtype)
    for gap, tie in (
        (inside, True),
        (-inside, True),
        (0.0, True),
        (outside, False),
        (-outside, False),
        (float("nan"), False),
    ):
        monkeypatch.setattr("layerskip.cli.verify.plain_logits", lambda *a, gap=gap: [0.5, 0.5 - gap])
        assert diverge(llm, [1], [0], [1]).tie is tie
    half = dtype in ("bfloat16", "float16")
    monkeypatch.setattr("layerskip.cli.verify.plain_logits", lambda *a: [16.0, 16.0 - 4 * outside])
    assert diverge(llm, [1], [0], [1]).tie is half  # relative to logits above 1 where there are few digits


def test_logits_are_those_of_plain_decoding_bit_for_bit(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint, dtype="bfloat16")
    ids = llm.encode("the quick brown fox")
    done = llm.generate(ids, max_tokens=40, ignore_eos=True, logprobs=1)
    for i in range(0, 40, 7):
        logits = torch.tensor(plain_logits(llm, ids, done.tokens[:i]))
        assert logits.log_softmax(-1)[done.tokens[i]].item() == done.logprobs[i].logprob
        assert logits.max() == logits[done.tokens[i]]


def test_one_layer_has_nothing_to_verify(run: Any, copy: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.1." not in name and ".layers.2." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    done = run("verify", "-m", folder)
    assert done.exit_code == 2
    assert "a model that decodes with 1 layer has no earlier exit to draft from" in done.stderr


def test_plain_decoding_is_not_compared_with_itself(run: Any, tiny_checkpoint: Path) -> None:
    done = run("verify", "-m", tiny_checkpoint, "--draft", "none")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: verify compares a drafter with plain decoding; name one, such as --draft early-exit:3\n"
    )
