"""Frames made of other frames are frames, say what their utterances say, and depend on the seed alone."""

import doctest
from collections import Counter
from collections.abc import Callable

import pytest

from layerskip.errors import RequestError
from layerskip.frames import frame_words, parse_tree, template
from layerskip.train.data import Document, Pair, augment, recombined, renamed

PAIRS = [
    Pair("wake me at 7", "[IN:CREATE_ALARM wake me [SL:DATE_TIME at 7 ] ]"),
    Pair("alarm for noon", "[IN:CREATE_ALARM alarm [SL:DATE_TIME for noon ] ]"),
    Pair("rain on Monday", "[IN:GET_WEATHER [SL:WEATHER_ATTRIBUTE rain ] [SL:DATE_TIME on Monday ] ]"),
    Pair(
        "tell Ann I eat at 8",
        "[IN:CREATE_REMINDER tell [SL:PERSON Ann ] [SL:TODO [IN:EAT I eat [SL:DATE_TIME at 8 ] ] ] ]",
    ),
    Pair("help", "[IN:HELP help ]"),
]
both = pytest.mark.parametrize("made_from", [recombined, renamed])


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(augment).failed == 0


@both
def test_what_is_made_is_well_formed_and_its_words_are_the_utterance(made_from: Callable[..., list[Pair]]) -> None:
    made = made_from(PAIRS, share=200, seed=3)
    assert len(made) > 20
    for pair in made:
        assert pair.prompt.split() == frame_words(pair.response.split())
        assert template(pair.response) in {template(given.response) for given in PAIRS}
        assert str(parse_tree(pair.response)) == pair.response


@both
def test_what_did_not_change_is_not_made_again(made_from: Callable[..., list[Pair]]) -> None:
    assert {pair.prompt for pair in made_from(PAIRS, share=50)}.isdisjoint(pair.prompt for pair in PAIRS)


@both
def test_the_seed_decides(made_from: Callable[..., list[Pair]]) -> None:
    assert made_from(PAIRS, share=3, seed=1) == made_from(PAIRS, share=3, seed=1)
    assert made_from(PAIRS, share=3, seed=1) != made_from(PAIRS, share=3, seed=2)


@both
def test_bad_requests(made_from: Callable[..., list[Pair]]) -> None:
    with pytest.raises(RequestError, match="share -1 of further pairs is not possible"):
        made_from(PAIRS, share=-1)
    with pytest.raises(RequestError, match="a Document has no frame"):
        made_from([Document("a text")], share=1)


def test_words_go_only_into_the_same_slot_of_the_same_intent() -> None:
    made = {pair.prompt for pair in recombined(PAIRS, share=50)}
    assert {"wake me for noon", "alarm at 7"} <= made
    assert not any("Monday" in prompt for prompt in made if not prompt.startswith("rain"))


def test_every_value_is_as_likely_however_often_it_occurs() -> None:
    at_9 = Pair("alarm at 9", "[IN:A alarm [SL:T at 9 ] ]")
    many = [Pair("alarm at 7", "[IN:A alarm [SL:T at 7 ] ]")] * 300 + [at_9]
    changed = Counter(pair.prompt for pair in recombined(many, share=4))
    assert 0.2 * len(many) * 4 < changed["alarm at 9"] < 0.3 * len(many) * 4  # half exchanged, half of these the other


def test_the_share_is_how_many_are_tried() -> None:
    pairs = [Pair(f"alarm at {n}", f"[IN:A alarm [SL:T at {n} ] ]") for n in range(400)]
    assert recombined(pairs, share=0) == []
    assert 60 < len(recombined(pairs, share=0.4)) < 100
    assert 350 < len(recombined(pairs, share=2)) < 450


def test_the_rarer_a_word_the_more_often_it_is_renamed() -> None:
    """10 / (10 + n): of words that occur once 10 in 11, of those that occur ten times one half, of others few."""
    names = ["".join(chr(ord("a") + (n // 5**k) % 5) for k in range(4)) for n in range(500)]
    pairs = [
        *(Pair(f"call {name}", f"[IN:CALL call [SL:NAME {name} ] ]") for name in names),
        *[Pair("call mother", "[IN:CALL call [SL:NAME mother ] ]")] * 10,
    ]
    made = [pair.prompt.split() for pair in renamed(pairs, share=30)]
    of_names = sum(name != "mother" for call, name in made if call == "call") / 30
    assert 0.85 * 500 < of_names < 0.95 * 500
    assert sum(call != "call" for call, _ in made) < 0.03 * 30 * len(pairs)
    kept = Counter(name for _, name in made)
    assert kept["mother"] < 30  # renamed with it, only "call" is left to change: a frame as it was is not made


def test_a_made_up_word_is_put_together_of_rare_ones_and_written_as_what_it_stands_for() -> None:
    pairs = [Pair("ask Nathaniel 45", "[IN:ASK ask [SL:NAME Nathaniel ] 45 ]")] * 3
    new = {tuple(pair.prompt.split()) for pair in renamed(pairs, share=200)}
    assert len(new) > 20
    for verb, name, number in new:
        assert number == "45"  # not a word
        assert verb[0].islower()
        assert verb == "ask" or verb[:2] in {"as", "na"}
        assert verb == "ask" or any(rare.endswith(verb[-2:]) for rare in ("ask", "nathaniel"))
        assert name[0].isupper() or name.islower()
    assert any(name.islower() for _, name, _ in new)
    assert any(name[0].isupper() for _, name, _ in new)


def test_a_word_has_one_name_wherever_it_stands() -> None:
    pairs = [Pair("call Ann and Ann", "[IN:CALL call [SL:NAME Ann ] and [SL:NAME Ann ] ]")]
    made = [pair.prompt.split() for pair in renamed(pairs, share=50)]
    assert len({words[1] for words in made}) > 1
    assert all(words[1] == words[3] for words in made)


def test_a_recipe_trains_on_them_beside_the_given_ones() -> None:
    from layerskip.train import experiment
    from layerskip.train.data import topv2_tokenizer
    from layerskip.train.recipe import read_recipe

    tokenizer = topv2_tokenizer(PAIRS, vocab_size=400)

    def count(**keys: float) -> int:
        rows, _ = experiment.rows(read_recipe("topv2-parser", overrides=keys), PAIRS, tokenizer)
        return len(rows)  # type: ignore[arg-type]

    further, names = len(recombined(PAIRS, share=80, seed=5)), len(renamed(PAIRS, share=7, seed=5))
    assert count(recombine=0, rename=0) == len(PAIRS)
    assert count(recombine=80, rename=0, seed=1, data_seed=5) == len(PAIRS) + further
    assert count(recombine=80, rename=0, seed=5) == len(PAIRS) + further > len(PAIRS)
    assert count(recombine=80, rename=7, seed=5) == len(PAIRS) + further + names > len(PAIRS) + further
    for key in ("recombine", "rename"):
        with pytest.raises(RequestError, match=rf"{key} -1\.0 is not possible"):
            read_recipe("topv2-parser", overrides={key: -1})
