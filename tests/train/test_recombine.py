"""Recombined frames are frames, say what their utterances say, and depend on the seed alone."""

import doctest
from collections import Counter

import pytest

from layerskip.errors import RequestError
from layerskip.frames import parse_tree, template
from layerskip.train.data import Document, Pair, recombine, recombined

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


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(recombine).failed == 0


def test_what_is_made_is_well_formed_and_its_words_are_the_utterance() -> None:
    made = recombined(PAIRS, share=200, seed=3)
    assert len(made) > 20
    for pair in made:
        words = [token for token in pair.response.split() if token != "]" and token[0] != "["]
        assert pair.prompt.split() == words
        assert template(pair.response) in {template(given.response) for given in PAIRS}
        assert str(parse_tree(pair.response)) == pair.response


def test_words_go_only_into_the_same_slot_of_the_same_intent() -> None:
    made = {pair.prompt for pair in recombined(PAIRS, share=50)}
    assert {"wake me for noon", "alarm at 7"} <= made
    assert not any("Monday" in prompt for prompt in made if not prompt.startswith("rain"))
    assert made.isdisjoint(pair.prompt for pair in PAIRS)  # nothing exchanged is nothing new


def test_every_value_is_as_likely_however_often_it_occurs() -> None:
    many = [Pair("alarm at 7", "[IN:A alarm [SL:T at 7 ] ]")] * 300 + [Pair("alarm at 9", "[IN:A alarm [SL:T at 9 ] ]")]
    changed = Counter(pair.prompt for pair in recombined(many, share=4))
    assert 0.2 * len(many) * 4 < changed["alarm at 9"] < 0.3 * len(many) * 4  # half exchanged, half of these the other


def test_the_seed_decides() -> None:
    assert recombined(PAIRS, share=3, seed=1) == recombined(PAIRS, share=3, seed=1)
    assert recombined(PAIRS, share=3, seed=1) != recombined(PAIRS, share=3, seed=2)


def test_the_share_is_how_many_are_tried() -> None:
    pairs = [Pair(f"alarm at {n}", f"[IN:A alarm [SL:T at {n} ] ]") for n in range(400)]
    assert recombined(pairs, share=0) == []
    assert 60 < len(recombined(pairs, share=0.4)) < 100
    assert 350 < len(recombined(pairs, share=2)) < 450


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match="share -1 of recombined examples is not possible"):
        recombined(PAIRS, share=-1)
    with pytest.raises(RequestError, match="a Document has no frame"):
        recombined([Document("a text")], share=1)


def test_a_recipe_trains_on_them_beside_the_given_ones() -> None:
    from layerskip.train import experiment
    from layerskip.train.data import topv2_tokenizer
    from layerskip.train.recipe import read_recipe

    tokenizer = topv2_tokenizer(PAIRS, vocab_size=400)
    plain, _ = experiment.rows(read_recipe("topv2-parser"), PAIRS, tokenizer)
    more, _ = experiment.rows(read_recipe("topv2-parser", overrides={"recombine": 80, "seed": 5}), PAIRS, tokenizer)
    assert len(plain) == len(PAIRS)  # type: ignore[arg-type]
    assert len(more) == len(PAIRS) + len(recombined(PAIRS, share=80, seed=5)) > len(PAIRS)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"recombine -1\.0 is not possible"):
        read_recipe("topv2-parser", overrides={"recombine": -1})
