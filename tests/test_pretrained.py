"""The model in the package: it is there, complete, small enough, and what every command uses."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import layerskip
from layerskip.pretrained import DEFAULT, embedded

ROOT = Path(__file__).resolve().parents[1]
FOLDER = embedded()
UTTERANCES = [
    "set an alarm for 7 am tomorrow and remind me to call mom",
    "will it rain in Seattle this weekend",
    "play some jazz",
    "how long is my drive to work",
    "start a timer for 10 minutes",
    "text Ann that I am late",
    "concerts in Austin on Friday",
    "remind me to buy milk",
    "what's the weather",
]


@pytest.fixture(scope="module")
def llm() -> layerskip.LLM:
    return layerskip.load(dtype="float32")


def test_the_folder_is_an_ordinary_checkpoint_with_card_licence_and_provenance() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert model.config.num_hidden_layers >= 12
    assert len(tokenizer) <= model.config.vocab_size
    card = (FOLDER / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card
    assert "CC BY-SA 4.0" in " ".join(card.split())
    assert "Creative Commons Attribution-ShareAlike 4.0" in (FOLDER / "LICENSE").read_text()
    provenance = json.loads((FOLDER / "provenance.json").read_text())
    assert provenance["finished"]
    assert provenance["data"]


def test_it_is_small_enough_to_come_along() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 16 * 2**20


def test_every_opening_is_one_token_and_the_utterance_is_all_a_user_types(llm: layerskip.LLM) -> None:
    vocabulary = llm.tokenizer.get_vocab()
    openings = {"[IN:CREATE_ALARM", "[SL:DATE_TIME", "[IN:GET_WEATHER"}
    tables = ROOT.parent / "shared" / "data" / "topv2"  # all there are, where the data is at hand
    openings |= {
        opening for table in tables.glob("*_train.tsv") for opening in re.findall(r"\[\w+:\w+", table.read_text())
    }
    for opening in openings:
        [token] = llm.tokenizer(f" {opening}", add_special_tokens=False)["input_ids"]
        assert token in vocabulary.values()
    ids = llm.encode("set an alarm")
    assert llm.tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<s>", "<parse>"]


def test_it_parses_and_drafts_for_itself_exactly(llm: layerskip.LLM) -> None:
    from layerskip.frames import well_formed

    plain = llm.generate(UTTERANCES, max_tokens=96)
    drafted = llm.generate(UTTERANCES, max_tokens=96, draft="early-exit")
    assert isinstance(plain, list)
    assert isinstance(drafted, list)
    assert [one.tokens for one in plain] == [one.tokens for one in drafted]
    assert sum(well_formed(one.text) for one in plain) >= len(UTTERANCES) - 1
    rounds = sum(one.acceptance.rounds for one in drafted)
    assert 1 + sum(one.acceptance.accepted for one in drafted) / rounds >= 3


def test_it_recommends_an_exit_and_draft_tokens(llm: layerskip.LLM) -> None:
    drafter = llm.drafter("early-exit")
    settings = json.loads((FOLDER / "config.json").read_text())["layerskip"]
    assert isinstance(drafter, layerskip.EarlyExit)
    assert (drafter.exit, drafter.tokens) == (settings["exit"], settings["draft_tokens"])
    assert drafter.exit < llm.decoder.shape.layers


def test_commands_use_it_where_no_model_is_named() -> None:
    from layerskip.cli import app

    done = CliRunner().invoke(app, ["generate", "set an alarm for 7 am", "--dtype", "float32", "--json"])
    record = json.loads(done.stdout)
    assert record["model"] == DEFAULT
    [completion] = record["completions"]
    assert completion["text"].strip() == "[IN:CREATE_ALARM set an alarm [SL:DATE_TIME for 7 am ] ]"
    talk = CliRunner().invoke(app, ["chat", "--dtype", "float32"], input="set an alarm for 7 am\n")
    assert "[IN:CREATE_ALARM" in talk.stdout


def test_the_wheel_would_hold_it() -> None:
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert any(FOLDER.is_relative_to(ROOT / package) for package in packages)


def test_a_recommendation_that_is_none_is_refused_on_use(tiny_checkpoint: Path) -> None:
    with pytest.raises(layerskip.RequestError, match="recommends no exit; write early-exit:3, say"):
        layerskip.load(tiny_checkpoint).generate("a", draft="early-exit")


@pytest.mark.parametrize(
    "settings", ["text", {"exit": 0, "draft_tokens": 4}, {"exit": 2}, {"exit": 2.5, "draft_tokens": 1}]
)
def test_a_recommendation_that_makes_no_sense_is_told(tiny_checkpoint: Path, tmp_path: Path, settings: object) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layerskip": settings}))
    with pytest.raises(layerskip.CheckpointError, match="layerskip"):
        layerskip.load(folder)
