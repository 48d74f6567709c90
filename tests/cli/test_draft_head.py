"""`--draft-head`: on every command that drafts, found by tune, kept by a checkpoint, and own where it cannot be had."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import layerskip
from layerskip.cli.bench import WayFlags
from layerskip.evaluate import shortlists
from layerskip.evaluate.drafts import Setting
from layerskip.evaluate.shortlists import Narrow, candidates
from layerskip.llm import LLM, Recommended, recommend
from layerskip.model.checkpoint import read_config
from layerskip.model.native.blocks import Blocks
from tests.cli.outcome import last_line, refused

NATIVE = ("--dtype", "float32", "--device", "cpu", "--weights", "native")
PLAIN = ("--dtype", "float64", "--device", "cpu")
HEAD = ("--draft-head", "int8")


@pytest.fixture
def base(tmp_path: Path) -> tuple[Any, ...]:
    file = tmp_path / "prompts.txt"
    file.write_text("the dog\nOnce upon a time\n")
    return ("--prompts", file, "--max-tokens", 12, "--repeat", 2, "-m")


# --- options


@pytest.mark.parametrize("draft", ["early-exit:1", "cascade:1", "auto"])
def test_text_is_that_of_plain_decoding(run: Any, tiny_checkpoint: Path, draft: str) -> None:
    words = ("generate", "the fox", "-m", tiny_checkpoint, *NATIVE, "--draft", draft, *HEAD, "--max-tokens", 24)
    done = run(*words, "--compare")
    assert done.exit_code == 0, done.output
    assert " int8 head: " in done.stderr
    assert done.stderr.splitlines()[-1].endswith("; identical")
    record = json.loads(run(*words, "--compare", "--json").stdout)
    assert record["draft"]["head"] == "int8"
    assert record["compare"]["identical"] is True


def test_chat_and_verify(run: Any, tiny_checkpoint: Path) -> None:
    drafting = ("--draft", "early-exit:2", *HEAD)
    said = run("chat", "-m", tiny_checkpoint, *NATIVE, *drafting, "--max-tokens", 8, input="hello\n")
    assert "early-exit:2 K=4 int8 head: " in said.stderr
    done = run("verify", "-m", tiny_checkpoint, *NATIVE, *drafting, "--max-tokens", 20)
    assert done.exit_code == 0, done.output
    assert "early-exit:2 K=4 int8 head" in done.stdout


def test_eval(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x_eval.tsv").write_text(
        "domain\tutterance\tsemantic_parse\nalarm\tset an alarm\t[IN:CREATE_ALARM set an alarm ]\n"
    )
    data = ("--task", "topv2", "--data", tmp_path / "x_eval.tsv", "--json", *NATIVE)
    record = json.loads(run("eval", "-m", tiny_checkpoint, *data, "--draft", "early-exit:2", *HEAD).stdout)
    assert record["draft"] == {"drafter": "early-exit:2", "tokens": 4, "confidence": None, "head": "int8"}
    assert record["results"][1]["name"] == "early-exit:2 K=4 int8 head"
    assert record["results"][1]["identical"] == 1


def test_bench_takes_several_heads_beside_sizes(run: Any, base: tuple[Any, ...], tiny_checkpoint: Path) -> None:
    both = ("--draft", "early-exit:1", "--draft-vocabulary", "0,9", "--draft-head", "own, int8")
    record = last_line(run("bench", *base, tiny_checkpoint, *NATIVE, *both))
    names = ["plain", "early-exit:1 K=4", "early-exit:1 K=4 int8 head", "early-exit:1 K=4 N=9"]
    assert [cell["name"] for cell in record["cells"]] == names
    assert all(cell["identical"] for cell in record["cells"][1:])


NARROW = ("--draft-vocabulary", 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["early-exit:1", "int4"], "unknown draft head 'int4'; use own, int8, auto"),
        (["early-exit:1", "int8", *NARROW], "a draft vocabulary has a head of its own; leave it or the head of 8 bits"),
        (["lookup", "int8"], "lookup copies and has no choice of a draft head; leave it out"),
        (["assistant:x", "auto"], "assistant has a head of its own and has no choice of a draft head; leave it out"),
        (["none", "own"], "--draft-head own needs a drafter; add --draft early-exit:E, say, or leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Any, base: tuple[Any, ...], tiny_checkpoint: Path, options: list[Any], message: str
) -> None:
    words = ("--draft", options[0], "--draft-head", *options[1:])
    refused(run("generate", "the dog", "-m", tiny_checkpoint, *NATIVE, *words), message)
    refused(run("bench", *base, tiny_checkpoint, *NATIVE, *words), message)


def test_a_corpus_is_refused(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the dog")
    words = ("--draft", "early-exit:1", *HEAD, "--draft-corpus", tmp_path / "corpus.txt")
    refused(run("generate", "the", "-m", tiny_checkpoint, *NATIVE, *words), "a ranking of tokens is for a draft voc")


def test_other_weights_are_refused_where_it_is_named(run: Any, base: tuple[Any, ...], tiny_checkpoint: Path) -> None:
    words = (*PLAIN, "--draft", "early-exit:1", *HEAD)
    message = "a draft head of 8 bits is made from native weights, and these are plain; leave it out"
    refused(run("generate", "the dog", "-m", tiny_checkpoint, *words), message)
    refused(run("verify", "-m", tiny_checkpoint, *words), message)
    refused(run("bench", *base, tiny_checkpoint, *words), message)


# --- what a checkpoint recommends


def test_a_checkpoint_keeps_it(run: Any, copy: Any) -> None:
    folder = copy()
    advice = Recommended(1, 3, head="int8")
    recommend(folder, advice, quality={})
    assert layerskip.load(folder).recommended == advice
    assert read_config(folder)["layerskip"]["draft_head"] == "int8"
    words = ("generate", "the", "-m", folder, "--max-tokens", 8)
    for weights, head in ((NATIVE, " int8 head"), (PLAIN, "")):  # it was measured where there are kernels
        for drafting, named in (((), "auto"), (("--draft", "early-exit"), "early-exit:1 K=3")):
            done = run(*words, *weights, *drafting)
            assert done.exit_code == 0, done.output
            assert f"; {named}{head}: " in done.stderr
            assert len(done.stderr.splitlines()) == (2 if named == "auto" else 1)  # and nobody is told
    recommend(folder, Recommended(1, 3), quality={})
    assert layerskip.load(folder).recommended == Recommended(1, 3)
    assert "draft_head" not in read_config(folder)["layerskip"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_head": "int4"}, r"layerskip.draft_head is 'int4'; it must be own or int8, or left out"),
        ({"draft_head": ["int8"]}, r"layerskip.draft_head is \['int8'\]"),
        (
            {"draft_head": "int8", "draft_vocabulary": 9},
            "both a draft_vocabulary and a draft_head of 8 bits; leave one",
        ),
    ],
)
def test_what_is_kept_wrongly_is_refused(copy: Any, settings: dict[str, Any], message: str) -> None:
    folder = copy(layerskip={"exit": 1, "draft_tokens": 2, **settings})
    with pytest.raises(layerskip.CheckpointError, match=message):
        layerskip.load(folder)
    own = copy("own", layerskip={"exit": 1, "draft_tokens": 2, "draft_head": "own"})
    assert layerskip.load(own).recommended == Recommended(1, 2)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float32", weights="native")


def test_what_words_and_a_checkpoint_come_to(llm: LLM) -> None:
    def asked(words: str, **options: Any) -> tuple[str, int | None]:
        drafter: Any = llm.drafter(words, **options)
        return drafter.head, drafter.vocabulary

    llm.recommended = None
    for words in ("early-exit:2", "cascade:2", "auto"):
        assert asked(words) == asked(words, head="own") == asked(words, head="auto") == ("own", None)
        assert asked(words, head="int8") == asked(words, head="int8", vocabulary=0) == ("int8", None)
        assert asked(words, head="own", vocabulary=7) == ("own", 7)
    llm.recommended = Recommended(2, 3, head="int8")
    for words in ("early-exit", "cascade", "auto"):
        assert asked(words) == asked(words, head="auto") == asked(words, vocabulary=0) == ("int8", None)
        assert asked(words, head="own") == ("own", None)
        assert asked(words, vocabulary=7) == asked(words, vocabulary=7, head="auto") == ("own", 7)
    assert asked("early-exit:1") == ("own", None)  # who names an exit chooses for himself
    assert asked("early-exit:1", head="auto") == ("int8", None)
    llm.recommended = Recommended(2, 3, vocabulary=12, ranked=(9, 8))
    for words in ("early-exit", "cascade", "auto"):
        assert asked(words) == asked(words, head="own") == asked(words, head="auto") == ("own", 12)
        assert asked(words, head="int8") == ("int8", None)
    assert llm.drafter("lookup", head="own") is not None


def test_calls_share_one_copy(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words make a drafter anew for every call; quantising a large head each time would take longer than the text."""
    made, coarse = [], Blocks.coarse

    def counted(self: Blocks, bits: int) -> Blocks:
        made.append(bits)
        return coarse(self, bits)

    monkeypatch.setattr(Blocks, "coarse", counted)
    fresh = layerskip.load(llm.name, dtype="float32", weights="native")
    for _ in range(2):
        for words in ("early-exit:1", "auto"):
            fresh.generate("the dog", max_tokens=8, ignore_eos=True, draft=fresh.drafter(words, head="int8"))
    assert made == [8]


# --- tune

GRID = ("--exits", 1, "--draft-tokens", "2,4", "--confidence", "none", "--measure", 2)


def test_tune_finds_it_and_the_checkpoint_keeps_it(
    run: Any, base: tuple[Any, ...], lucky: Any, work: None, copy: Any
) -> None:
    """Exit 1 always agrees, and nearly so through 8 bits: a round of 4 x 2 + 1 + 6 seconds against 4 x 5 + 1 + 6."""
    folder = lucky(copy())
    done = run("tune", *base, folder, *NATIVE, *GRID, "--save")
    record = last_line(done)
    schema = json.loads((files("layerskip.evaluate") / "schemas" / "tune.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(record)
    [found] = record["narrow"]
    assert (found["draft_tokens"], found["head"], found["identical"]) == (4, "int8", True)
    assert "vocabulary" not in found
    assert found["gain"]["median"] > 1.2
    assert record["recommended"] == {
        "exit": 1,
        "draft_tokens": 4,
        "confidence": None,
        "head": "int8",
        "speedup": found["speedup"]["median"],
    }
    assert "; early-exit:1 K=4 int8 head is faster still: " in record["reason"]
    assert "a draft head of 8 bits, with early-exit:1 K=4" in done.stderr
    assert "or an int8 head: over plain decoding" in done.stdout
    assert "recommended: --draft early-exit:1 --draft-tokens 4 --draft-head int8" in done.stdout
    assert "config.json now recommends early-exit:1 K=4 int8 head; --draft early-exit takes it" in done.stderr
    assert read_config(folder)["layerskip"]["draft_head"] == "int8"
    ways = WayFlags().ways(layerskip.load(folder, dtype="float32", weights="native"))
    assert [way.name for way in ways] == ["plain", "early-exit:1 K=4 int8 head"]


def test_tune_tries_it_beside_sizes_and_not_where_none_are_wanted(
    run: Any, base: tuple[Any, ...], lucky: Any, work: None, copy: Any
) -> None:
    folder = lucky(copy())
    record = last_line(run("tune", *base, folder, *NATIVE, *GRID, "--draft-vocabulary", "1"))
    assert [(each.get("vocabulary"), each.get("head")) for each in record["narrow"]] == [(1, None), (None, "int8")]
    assert record["recommended"]["head"] == "int8"
    assert last_line(run("tune", *base, folder, *NATIVE, *GRID, "--draft-vocabulary", "none"))["narrow"] == []


def test_a_light_head_is_left_as_it_is(
    run: Any, base: tuple[Any, ...], lucky: Any, work: None, monkeypatch: pytest.MonkeyPatch, copy: Any
) -> None:
    """It is 57% of a draft step of one layer, and would be a sixth of one of seven."""
    folder = lucky(copy())
    shape = layerskip.load(folder).decoder.shape
    assert shortlists.heavy(shape, exit=1)
    assert not shortlists.heavy(shape, exit=7)
    monkeypatch.setattr(shortlists, "HEAVY", 0.6)
    assert last_line(run("tune", *base, folder, *NATIVE, *GRID))["narrow"] == []


def test_cheaper_drafts_may_be_longer() -> None:
    found = candidates(Setting(1, 4), [8, None], draft_tokens=[4, 6])
    assert [each.name.removeprefix("early-exit:1 ") for each in found] == [
        "K=4 N=8",
        "K=6 N=8",
        "K=4 int8 head",
        "K=6 int8 head",
    ]
    assert Narrow(Setting(1, 4), None).head == {"head": "int8"}
