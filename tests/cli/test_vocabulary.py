"""`--draft-vocabulary` and `--draft-corpus`: on every command that drafts, found by tune, kept by a checkpoint."""

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

import layerskip
from layerskip.decode.drafters.shortlist import fitting
from layerskip.evaluate.bench import bench
from layerskip.evaluate.drafts import Setting
from layerskip.evaluate.record import Spread
from layerskip.evaluate.shortlists import Gained, Narrow, best, candidates, remark, sizes
from layerskip.evaluate.ways import Way
from layerskip.evaluate.weights import Weights
from layerskip.llm import Recommended, recommend
from layerskip.model.checkpoint import read_config
from tests.cli.outcome import last_line, refused

TEXT = "the dog and the fox and the dog\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Any, ...]:
    file = tmp_path / "prompts.txt"
    file.write_text("the dog\nOnce upon a time\n")
    return ("--prompts", file, "--max-tokens", 12, "--repeat", 2, "--dtype", "float64", "--device", "cpu", "-m")


# --- options


@pytest.mark.parametrize("draft", ["early-exit:1", "cascade:1", "auto"])
@pytest.mark.parametrize("size", ["9", "auto"])
def test_generated_text_is_that_of_plain_decoding(
    run: Any, tiny_checkpoint: Path, corpus: Path, draft: str, size: str
) -> None:
    llm = layerskip.load(tiny_checkpoint)
    options = ("--draft", draft, "--draft-vocabulary", size, "--draft-corpus", corpus, "--max-tokens", 20)
    done = run("generate", "the fox", "-m", tiny_checkpoint, *options)
    assert done.stdout == llm.generate("the fox", max_tokens=20).text + "\n"
    count = 9 if size == "9" else fitting(llm.decoder.shape)
    assert f" N={count}: " in done.stderr.splitlines()[0]
    record = json.loads(run("generate", "the fox", "-m", tiny_checkpoint, *options, "--json").stdout)
    assert record["draft"]["vocabulary"] == count


def test_a_corpus_decides_what_is_proposed(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A list of the text's own tokens proposes what the whole vocabulary does; one of others less."""
    llm = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    text = llm.generate("the fox", max_tokens=30, ignore_eos=True).text
    rates = []
    for corpus in (text, "".join(c for c in "zqjxkvwZQJXKVW" if c not in text)):
        file = tmp_path / "corpus.txt"
        file.write_text(corpus)
        # as many as the text has, so none comes in by its id
        size = len({*llm.rank(text)})
        options = ("--draft", "early-exit:2", "--draft-vocabulary", size, "--draft-corpus", file, "--max-tokens", 30)
        done = run(
            "generate", "the fox", "-m", tiny_checkpoint, *options, "--json", "--ignore-eos", "--dtype", "float64"
        )
        rates.append(json.loads(done.stdout)["acceptance"]["draft_acceptance_rate"])
    assert rates[0] > rates[1]


def test_chat_and_verify(run: Any, tiny_checkpoint: Path) -> None:
    drafting = ("--draft", "early-exit:2", "--draft-vocabulary", 9)
    chat = ("chat", "-m", tiny_checkpoint, "--max-tokens", 12, "--ignore-eos")
    said = [run(*chat, *words, input="hello\n/reset\nthe dog\nand the fox\n") for words in ((), drafting)]
    assert said[0].stdout == said[1].stdout
    assert said[1].stderr.count(" N=9: ") == 3
    done = run("verify", "-m", tiny_checkpoint, *drafting, "--max-tokens", 20, input="the dog")
    assert done.exit_code == 0, done.output
    assert "early-exit:2 K=4 N=9" in done.output


def test_eval(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x_eval.tsv").write_text(
        "domain\tutterance\tsemantic_parse\nalarm\tset an alarm\t[IN:CREATE_ALARM set an alarm ]\n"
    )
    data = ("--task", "topv2", "--data", tmp_path / "x_eval.tsv", "--dtype", "float64", "--json")
    done = run("eval", "-m", tiny_checkpoint, *data, "--draft", "early-exit:2", "--draft-vocabulary", 9)
    record = json.loads(done.stdout)
    assert record["draft"] == {"drafter": "early-exit:2", "tokens": 4, "confidence": None, "vocabulary": 9}
    assert record["results"][1]["name"] == "early-exit:2 K=4 N=9"
    assert record["results"][1]["identical"] == 1


def test_bench_takes_several_sizes(run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, corpus: Path) -> None:
    sizes = ("--draft", "early-exit:1", "--draft-vocabulary", "0,9,32", "--draft-corpus", corpus)
    record = last_line(run("bench", *base, tiny_checkpoint, *sizes))
    names = ["plain", "early-exit:1 K=4", "early-exit:1 K=4 N=9", "early-exit:1 K=4 N=32"]
    assert [cell["name"] for cell in record["cells"]] == names
    assert all(cell["identical"] for cell in record["cells"][1:])


def test_bench_does_not_go_on_with_another_ranking(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "results"
    sizes = ("--draft", "early-exit:1", "--draft-vocabulary", 9, "--draft-corpus", corpus, "--output", folder)
    corpus.write_text("the quick fox")
    assert run("bench", *base, tiny_checkpoint, *sizes).exit_code == 0
    corpus.write_text("zzz xxx")
    refused(
        run("bench", *base, tiny_checkpoint, *sizes),
        f"{folder}/bench.json was measured with another settings; choose another --output",
    )


def test_a_run_does_not_help_the_next(tiny_checkpoint: Path) -> None:
    """What a text brought into the list is gone when it is measured again."""
    llm = layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")
    way = Way("narrow", layerskip.EarlyExit(2, tokens=3, vocabulary=120, ranked=range(2, 122)))
    rates = []
    for repeat in (1, 3):
        cell = bench(llm, ["the dog"], [way], batch=1, repeat=repeat, max_tokens=30, ignore_eos=True, warm_up=False)[1]
        assert cell.acceptance is not None
        rates.append(cell.acceptance["draft_acceptance_rate"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["early-exit:1", "-3"], "a draft vocabulary of -3 tokens is not possible; use 1 or more"),
        (
            ["early-exit:1", "320"],
            "a draft vocabulary of 320 is not below this model's 320 tokens; use 1..319, or leave",
        ),
        (["auto", "320"], "a draft vocabulary of 320 is not below this model's 320 tokens"),
        (
            ["early-exit:1", "many"],
            "--draft-vocabulary many is not possible; use auto, a number of tokens, or 0 for all",
        ),
        (["lookup", "9"], "lookup copies and has no draft vocabulary; leave it out"),
        (["assistant:x", "9"], "assistant has a head of its own and has no draft vocabulary; leave it out"),
        (["none", "9"], "--draft-vocabulary 9 needs a drafter; add --draft early-exit:E, say, or leave it out"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, options: list[str], message: str
) -> None:
    words = ("--draft", options[0], "--draft-vocabulary", options[1])
    refused(run("generate", "the dog", "-m", tiny_checkpoint, *words), message)
    refused(run("bench", *base, tiny_checkpoint, *words), message)


def test_corpora_that_make_no_sense_are_refused(run: Any, tiny_checkpoint: Path, corpus: Path) -> None:
    early = ("generate", "the dog", "-m", tiny_checkpoint, "--draft", "early-exit:1", "--draft-corpus")
    refused(run(*early, corpus), "a ranking of tokens is for a draft vocabulary; give its size too, or leave it out")
    refused(run(*early, corpus.parent / "none", "--draft-vocabulary", 9), "cannot read")
    corpus.write_bytes(b"\xff")
    refused(run(*early, corpus, "--draft-vocabulary", 9), "is not UTF-8 text")


def test_a_narrow_head_is_read_by_its_rows() -> None:
    weights = Weights((10, 10, 10, 10), 80, 8)
    assert weights.round(Way("narrow", layerskip.EarlyExit(1, vocabulary=2)), drafted=3) == 120 + 3 * (10 + 20)
    assert weights.round(Way("whole", layerskip.EarlyExit(1)), drafted=3) == 120 + 3 * (10 + 80)


# --- what a checkpoint recommends


def test_a_checkpoint_keeps_size_and_ranking(run: Any, copy: Any) -> None:
    folder = copy()
    advice = Recommended(1, 3, vocabulary=12, ranked=(300, 7))
    recommend(folder, advice, quality={})
    assert layerskip.load(folder).recommended == advice
    assert read_config(folder)["layerskip"]["draft_vocabulary"] == 12
    for words, named in ((["--draft", "early-exit"], "early-exit:1 K=3 N=12"), ([], "auto N=12")):
        done = run("generate", "the", "-m", folder, *words, "--max-tokens", 8)
        assert f"; {named}: " in done.stderr
    done = run("generate", "the", "-m", folder, "--draft", "early-exit", "--draft-vocabulary", 0, "--max-tokens", 8)
    assert "; early-exit:1 K=3: " in done.stderr
    recommend(folder, Recommended(1, 3), quality={})
    assert layerskip.load(folder).recommended == Recommended(1, 3)
    assert not (folder / "draft_vocabulary.json").exists()


@pytest.mark.parametrize(
    ("config", "ranked", "message"),
    [
        (0, None, r"layerskip.draft_vocabulary is 0; it must be a whole number from 1 on"),
        ("many", None, r"layerskip.draft_vocabulary is 'many'"),
        (9, '{"ranked": [1, -2]}', r"draft_vocabulary.json has no list of token ids under ranked"),
        (9, '{"ranked": 3}', r"draft_vocabulary.json has no list of token ids"),
        (9, "[3]", r"draft_vocabulary.json"),
    ],
)
def test_what_is_kept_wrongly_is_refused(copy: Any, config: Any, ranked: str | None, message: str) -> None:
    folder = copy(layerskip={"exit": 1, "draft_tokens": 2, "draft_vocabulary": config})
    if ranked is not None:
        (folder / "draft_vocabulary.json").write_text(ranked)
    with pytest.raises(layerskip.CheckpointError, match=message):
        layerskip.load(folder)


# --- tune


GRID = ("--exits", 1, "--draft-tokens", "2,4", "--confidence", "none", "--measure", 2)


def test_tune_finds_the_size_and_the_checkpoint_keeps_it(
    run: Any, base: tuple[Any, ...], lucky: Any, work: None, tmp_path: Path, copy: Any
) -> None:
    """With a corpus of what the model writes 40 tokens are nearly as good as all, and 2 are not."""
    folder = lucky(copy())
    llm = layerskip.load(folder, dtype="float64", device="cpu")
    ids = [i for done in llm.generate(["the dog", "Once upon a time"], max_tokens=12) for i in done.tokens]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(llm.tokenizer.decode(ids))
    options = ("--draft-vocabulary", "2,40", "--draft-corpus", corpus, "--save", "--output", tmp_path / "results")
    done = run("tune", *base, folder, *GRID, *options)
    record = last_line(done)
    schema = json.loads((files("layerskip.evaluate") / "schemas" / "tune.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(record)
    assert [(each["draft_tokens"], each["vocabulary"]) for each in record["narrow"]] == [(4, 2), (4, 40)]
    assert all(each["identical"] for each in record["narrow"])
    few, enough = record["narrow"]
    assert few["tokens_per_round"] < enough["tokens_per_round"]
    assert enough["gain"]["median"] > 1.2  # a round of 4 x 5 + 1 + 6 against 4 x 1.5 + 1 + 6, for nearly as many tokens
    assert record["recommended"]["vocabulary"] == 40
    assert record["recommended"]["speedup"] == enough["speedup"]["median"]
    assert "; early-exit:1 K=4 N=40 is faster still: " in record["reason"]
    assert "recommended: --draft early-exit:1 --draft-tokens 4 --draft-vocabulary 40" in done.stdout
    assert "with a draft vocabulary of N tokens" in done.stdout
    assert "config.json now recommends early-exit:1 K=4 N=40" in done.stderr
    advice = layerskip.load(folder).recommended
    assert advice is not None
    assert (advice.vocabulary, advice.ranked) == (40, tuple(llm.rank(corpus.read_text())[:40]))
    again = run("tune", *base, folder, *GRID, *options)
    assert "is finished: nothing is measured" in again.stderr
    corpus.write_text("another text")
    refused_line = run("tune", *base, folder, *GRID, *options).stderr.splitlines()[-1]
    assert "tune.json has other settings, prompts or weights" in refused_line


def test_tune_leaves_the_head_whole_where_that_is_faster(
    run: Any, base: tuple[Any, ...], lucky: Any, work: None, copy: Any
) -> None:
    folder = lucky(copy())
    record = last_line(run("tune", *base, folder, *GRID, "--draft-vocabulary", "1"))
    assert [each["gain"]["median"] < 1 for each in record["narrow"]] == [True]
    assert "vocabulary" not in record["recommended"]
    assert "N=1 gains nothing sure" in record["reason"]
    # a vocabulary of 320 is too small to be narrowed unasked
    assert last_line(run("tune", *base, folder, *GRID, "--draft-vocabulary", "auto"))["narrow"] == []


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("0", "a draft vocabulary of 0 tokens is not possible; use 1 or more"),
        ("320", "a draft vocabulary of 320 is not below this model's 320 tokens"),
        ("many", "--draft-vocabulary many is not possible; use whole numbers"),
    ],
)
def test_sizes_that_tune_refuses(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, size: str, message: str
) -> None:
    refused(run("tune", *base, tiny_checkpoint, *GRID, "--draft-vocabulary", size), message)


def shape(**of: int) -> Any:
    return SimpleNamespace(parameters=lambda: {name: of[name] for name in ("attention", "mlp", "total")}, **of)


def test_sizes_fit_into_the_memory() -> None:
    large = shape(attention=int(1.7e8), mlp=int(8.1e8), total=int(1.24e9), vocab=128_256, width=2048, layers=16)
    assert sizes(large, exit=4) == [2048, 4096, 8192]
    assert all(size * large.width < 0.015 * large.total for size in sizes(large, exit=4))
    middle = shape(attention=int(2.8e7), mlp=int(5.7e7), total=int(1.1e8), vocab=32_000, width=768, layers=12)
    assert sizes(middle, exit=3) == [512, 1024, 2048]
    small = shape(attention=int(1e6), mlp=int(3e6), total=int(5e6), vocab=1100, width=192, layers=12)
    assert sizes(small, exit=2) == [256]
    deep = shape(attention=int(8e8), mlp=int(6e9), total=int(7e9), vocab=32_000, width=4096, layers=32)
    assert sizes(deep, exit=16) == []  # the head is a 26th of a draft step
    assert sizes(shape(attention=1, mlp=1, total=10**6, vocab=320, width=32, layers=4), exit=1) == []


def test_the_size_that_gains_most_is_taken() -> None:
    def found(size: int, *gain: float) -> Gained:
        narrow = Narrow(Setting(1, 4), size)
        return Gained(narrow, Spread.of([2.0]), Spread.of(gain), 3.0, True)

    slow, doubtful, sure, fast = found(1, 0.9, 1), found(2, 0.98, 1.02), found(3, 1.01, 1.02), found(4, 0.99, 1.1, 1.2)
    assert best([slow, doubtful]) is None
    assert best([slow, sure, doubtful]) is sure
    assert best([sure, fast]) is fast
    assert remark([]) == ""
    assert remark([slow, fast]) == "; early-exit:1 K=4 N=4 is faster still: 1.10x (0.99..1.20) of that"
    assert [each.vocabulary for each in candidates(Setting(1, 4), [8, 16], draft_tokens=[4])] == [8, 16]
