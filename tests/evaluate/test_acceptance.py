"""Drafting measured: counts are those of generation, predictions are those of the cost model."""

import doctest
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import layerskip
from layerskip import LLM, EarlyExit
from layerskip.decode import guesses
from layerskip.decode.acceptance import Acceptance
from layerskip.decode.guesses import guess
from layerskip.errors import RequestError
from layerskip.evaluate import Item, Measurement, Task, acceptance, best, callback, measure
from layerskip.evaluate.acceptance import continuations, count, predict, rounds
from layerskip.evaluate.callback import AcceptanceCallback, default_exits

PROMPTS = ["the cat sat", "the dog", "a"]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64", device="cpu")


def test_counts_are_those_of_generation(llm: LLM) -> None:
    found = measure(llm, PROMPTS, exits=(1, 3), draft_tokens=(2, 5), max_tokens=23)
    assert [(each.exit, each.draft_tokens) for each in found] == [(1, 2), (1, 5), (3, 2), (3, 5)]
    plain = sum(len(llm.generate(prompt, max_tokens=23).tokens) for prompt in PROMPTS)  # type: ignore[union-attr]
    for each in found:
        counts = Acceptance()
        for prompt in PROMPTS:
            alone = llm.generate(prompt, draft=EarlyExit(each.exit, tokens=each.draft_tokens), max_tokens=23)
            counts.merge(alone.acceptance)  # type: ignore[union-attr]
        for name in ("rounds", "drafted", "accepted", "emitted", "drafted_at", "accepted_at", "by_length"):
            assert getattr(each.counts, name) == getattr(counts, name)
        assert each.counts.emitted == plain
        assert each.rate == counts.accepted / counts.drafted
        assert each.tokens_per_round == 1 + counts.accepted / counts.rounds
        assert each.emitted_per_round == plain / counts.rounds
        assert each.by_position == [a / b for a, b in zip(counts.accepted_at, counts.drafted_at, strict=True)]
        record = json.loads(json.dumps(each.record()))
        assert (record["exit"], record["draft_tokens"]) == (each.exit, each.draft_tokens)
        assert (record["rounds"], record["rate_by_position"]) == (counts.rounds, each.by_position)
        assert record["predicted_speedup"] == each.predicted_speedup
    assert found[0].rate < found[2].rate  # deeper exits know more


COUNTS = ("rounds", "drafted", "accepted", "emitted", "drafted_at", "accepted_at", "by_length")


def same_as_decoding(llm: LLM, prompts: list[Any], *, max_tokens: int, stop: tuple[str, ...] = ()) -> set[str | None]:
    """Every exit, several K and thresholds: what is counted is what decoding counts. Returns why the texts ended."""
    exits = range(1, llm.decoder.shape.layers)
    found = continuations(llm, prompts, exits=exits, max_tokens=max_tokens, stop=stop, beyond=8)
    ends: set[str | None] = set()
    past = 0
    for exit in exits:
        for tokens in (1, 3, 9):
            for confidence in (None, 0.1, 0.6):
                drafter = EarlyExit(exit, tokens=tokens, confidence=confidence)
                done = llm.generate(llm.encode_all(prompts), draft=drafter, max_tokens=max_tokens, stop=stop)
                assert isinstance(done, list)
                for text, real in zip(found, done, strict=True):
                    counts = count([text], exit=exit, tokens=tokens, confidence=confidence)
                    for name in COUNTS:
                        assert getattr(counts, name) == getattr(real.acceptance, name), (name, drafter.__dict__)
                    ends.add(real.finish_reason)
                    past += sum(
                        drafted > accepted + 1 and confidence is not None
                        for drafted, accepted, _ in rounds(
                            text.guesses[exit], most=text.most, tokens=tokens, confidence=confidence
                        )
                    )
    assert past  # drafts went on past a wrong token, by the exit's confidence there
    return ends


def test_counting_is_decoding_on_ragged_prompts(llm: LLM) -> None:
    prompts = [*PROMPTS, "the mat and the dog ran to the cat on the mat"]
    for rows in (4, 2):  # side by side, and one taking the place of another
        batch = LLM(llm.decoder, llm.tokenizer, eos=llm.eos, max_batch=rows)
        assert same_as_decoding(batch, prompts, max_tokens=21) == {"length"}


def test_counting_is_decoding_up_to_the_end_of_a_text(llm: LLM) -> None:
    plain = llm.generate(llm.encode_all(PROMPTS), max_tokens=40)
    assert isinstance(plain, list)
    # ends of several texts at several places, some of them drafted
    eos = [plain[0].tokens[17], plain[1].tokens[9], plain[2].tokens[30]]
    ending = LLM(llm.decoder, llm.tokenizer, eos=eos)
    assert "stop" in same_as_decoding(ending, PROMPTS, max_tokens=40)
    stop = str(llm.tokenizer.decode(plain[0].tokens[8:10]))
    assert "stop" in same_as_decoding(llm, PROMPTS, max_tokens=40, stop=(stop,))


def test_counting_is_decoding_to_the_end_of_the_context_and_in_windows(
    llm: LLM, tiny: Any, decoder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guesses, "BRANCHES", 5)  # wrong places in several parts
    decoder = decoder_of(tiny("qwen2-mixed", double=True, agree=0.3, max_position_embeddings=48))
    windowed = LLM(decoder, llm.tokenizer, eos=[3])
    prompts = [[5, 9, 11], [*range(2, 31)], [40]]
    assert "length" in same_as_decoding(windowed, prompts, max_tokens=64)


def test_guesses_are_those_of_each_exit(llm: LLM) -> None:
    prompt, text = llm.encode("the cat"), [11, 30, 45, 9]
    whole = llm.score_exits([*prompt, *text])
    found = guess(llm.decoder, prompt, text, exits=[1, 4])
    for each in found:
        score = whole[each.exit - 1]
        places = slice(len(prompt) - 1, None)
        assert each.right == [a == b for a, b in zip(score.predictions[places], text, strict=True)]
        assert len(each.sure) == len(text) + 1
        assert each.agreement == sum(each.right) / 4
        assert each.beyond == {}
    own = llm.generate([prompt], max_tokens=6)[0].tokens  # type: ignore[index]
    assert guess(llm.decoder, prompt, own, exits=[4])[0].agreement == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": [5]}, r"^exit 5 is not inside this 4-layer model; use 1\.\.4$"),
        ({"prompt": []}, r"^guesses need a prompt and a text after it"),
        ({"text": []}, r"^guesses need a prompt and a text after it"),
    ],
)
def test_what_cannot_be_guessed_is_refused(llm: LLM, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"prompt": [3], "text": [4], "exits": [1], **changes}
    with pytest.raises(RequestError, match=message):
        guess(llm.decoder, settings["prompt"], settings["text"], exits=settings["exits"])


def test_prediction_is_the_cost_model_by_hand(llm: LLM) -> None:
    shape = llm.decoder.shape
    layers = 4 * (2 * 32 * (32 + 16) + 3 * 32 * 64 + 2 * 32) + 32
    head = shape.vocab * 32 / (layers + shape.vocab * 32)
    counts = Acceptance(rounds=10, drafted=30, accepted=18, emitted=27)  # the end of a text cut one off
    for exit in (1, 2):
        cost = exit / 4 * (1 - head) + head  # of a drafted token
        assert predict(counts, shape, exit=exit) == pytest.approx(2.7 / (1 + 3 * cost))
    # a tied head is read like any other
    assert predict(counts, replace(shape, tied=True), exit=1) == predict(counts, shape, exit=1)
    [found] = measure(llm, PROMPTS, exits=[2], draft_tokens=[3], max_tokens=9)
    assert found.predicted_speedup == predict(found.counts, shape, exit=2)


def test_best_is_the_highest_prediction_above_plain() -> None:
    def at(exit: int, tokens: int, speedup: float) -> Measurement:
        return Measurement(exit, tokens, Acceptance(rounds=1, emitted=1), speedup)

    slow, plain = at(1, 4, 0.8), at(2, 1, 1.0)
    fast, equal, faster = at(2, 2, 1.1), at(3, 2, 1.1), at(3, 4, 1.3)
    assert best([slow, fast, equal]) is fast
    assert best([slow, faster, fast]) is faster
    assert best([slow, plain]) is None
    assert best([]) is None


def test_best_of_counts_by_hand(llm: LLM) -> None:
    """A head without weight: 4 layers, N / (1 + K E / 4)."""
    shape = replace(llm.decoder.shape, vocab=0)
    runs = [
        (1, 2, Acceptance(rounds=10, drafted=20, accepted=8, emitted=18)),  # 1.8 / 1.5 = 1.2
        (1, 4, Acceptance(rounds=10, drafted=40, accepted=12, emitted=22)),  # 2.2 / 2 = 1.1
        (2, 2, Acceptance(rounds=10, drafted=20, accepted=16, emitted=26)),  # 2.6 / 2 = 1.3
        (3, 4, Acceptance(rounds=10, drafted=40, accepted=38, emitted=48)),  # 4.8 / 4 = 1.2
    ]
    found = [Measurement(e, k, counts, predict(counts, shape, exit=e)) for e, k, counts in runs]
    assert [each.predicted_speedup for each in found] == pytest.approx([1.2, 1.1, 1.3, 1.2])
    assert best(found) is found[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": [1, 4]}, r"^draft exit 4 is not below the 4 layers the model decodes with; use 1\.\.3$"),
        ({"exits": [0]}, r"^draft exit 0 is not possible; use 1 or more layers$"),
        ({"draft_tokens": [0]}, r"^drafting 0 tokens a round is not possible"),
        ({"exits": []}, r"^nothing to measure; give at least one exit and one number of draft tokens$"),
        ({"prompts": []}, r"^no prompt given; give at least one$"),
        ({"max_tokens": 0}, r"^max_tokens 0 is not possible; use 1 or more$"),
    ],
)
def test_what_cannot_be_measured_is_refused(llm: LLM, changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"exits": [1], "draft_tokens": [2], "max_tokens": 4, **changes}
    with pytest.raises(RequestError, match=message):
        measure(llm, settings.pop("prompts", PROMPTS), **settings)


# --- while training goes on


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = [torch.arange(12) * (i % 3 + 1) % 61 + 2 for i in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def train(model: Any, tokenizer: Any, folder: Path, *callbacks: AcceptanceCallback) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(
        model,
        settings,
        data_collator=default_data_collator,
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def llama(checkpoint: Path) -> Any:
    # dropout, so that training draws random numbers in every step
    return AutoModelForCausalLM.from_pretrained(checkpoint, attention_dropout=0.2, dtype=torch.float32)


def drawing(text: str, answer: str) -> dict[str, float]:
    """A score that disturbs what training must find as it left it."""
    torch.rand(3)
    torch.set_num_threads(2)
    return {"length": float(len(text))}


def test_every_saved_checkpoint_is_measured_and_training_is_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    task = Task("lengths", (Item("the cat", ""), Item("a", "")), drawing, 8)
    measuring = AcceptanceCallback(PROMPTS, exits=[1, 2], draft_tokens=[1, 3], max_tokens=12, task=task)
    threads = torch.get_num_threads()
    trainer = train(llama(tiny_checkpoint), tokenizer, tmp_path / "measured", measuring)
    assert torch.get_num_threads() == threads
    plain = train(llama(tiny_checkpoint), tokenizer, tmp_path / "plain")
    for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)

    assert [entry["step"] for entry in measuring.measured] == [1, 2]
    logged = [entry for entry in trainer.state.log_history if "acceptance/1" in entry]
    assert logged == measuring.measured
    names = {f"{name}/{exit}" for name in ("acceptance", "tokens_per_round", "draft_tokens", "predicted_speedup")
             for exit in (1, 2)}  # fmt: skip
    assert set(logged[0]) == {*names, "lengths/length", "step"}
    saved = layerskip.load(tmp_path / "measured" / "checkpoint-2", dtype="float32", device="cpu")
    found = measure(saved, PROMPTS, exits=[1, 2], draft_tokens=[1, 3], max_tokens=12)
    for exit in (1, 2):
        chosen = max((each for each in found if each.exit == exit), key=lambda each: each.predicted_speedup)
        assert logged[1][f"acceptance/{exit}"] == chosen.rate
        assert logged[1][f"tokens_per_round/{exit}"] == chosen.tokens_per_round
        assert logged[1][f"draft_tokens/{exit}"] == chosen.draft_tokens
        assert logged[1][f"predicted_speedup/{exit}"] == chosen.predicted_speedup
    texts = [saved.generate(item.prompt, max_tokens=8).text for item in task.items]  # type: ignore[union-attr]
    assert logged[1]["lengths/length"] == sum(map(len, texts)) / 2
    # and once more when all is done
    state = torch.random.get_rng_state()
    final = measuring.final(tmp_path / "measured" / "checkpoint-2")
    assert [each.record() for each in final] == [each.record() for each in found]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_layerskip_does_not_load_is_told_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    measuring = AcceptanceCallback(PROMPTS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(GPT2LMHeadModel(config), tokenizer, tmp_path, measuring)
        assert measuring.final(tmp_path / "checkpoint-2") == []
        about = [str(each.message) for each in told if "acceptance is not measured" in str(each.message)]
    assert len(about) == 1
    assert "model_type 'gpt2' is not supported" in about[0]
    assert measuring.measured == []
    with pytest.warns(UserWarning, match="acceptance is not measured: .*'gpt2' is not supported"):
        assert AcceptanceCallback(PROMPTS).final(tmp_path / "checkpoint-2") == []


def test_a_measurement_that_fails_does_not_end_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    measuring = AcceptanceCallback(PROMPTS, exits=[9])
    with pytest.warns(UserWarning, match="acceptance is not measured: draft exit 9 is not below the 4 layers"):
        trainer = train(llama(tiny_checkpoint), tokenizer, tmp_path, measuring)
    assert trainer.state.global_step == 2
    assert measuring.measured == []
    with pytest.raises(RequestError, match="draft exit 9 is not below the 4 layers"):
        measuring.final(tmp_path / "checkpoint-2")


def test_only_the_main_process_measures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").symlink_to(tiny_checkpoint)
    measuring = AcceptanceCallback(PROMPTS, draft_tokens=[2], max_tokens=3)
    for main in (False, True):
        state = TrainerState(global_step=1, is_world_process_zero=main)
        measuring.on_save(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl())
        assert len(measuring.measured) == len(state.log_history) == main


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompts to measure acceptance with"),
        (PROMPTS, {"exits": []}, "no exits to measure acceptance with"),
        (PROMPTS, {"draft_tokens": ()}, "no draft_tokens to measure acceptance with"),
        (PROMPTS, {"exits": [0]}, "exit 0 is not possible; use 1 or more"),
        (PROMPTS, {"draft_tokens": [0]}, "draft tokens 0 is not possible; use 1 or more"),
        (PROMPTS, {"max_tokens": 1.5}, "max_tokens 1.5 is not possible; use a whole number"),
    ],
)
def test_a_callback_that_makes_no_sense_is_refused_at_once(
    prompts: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        AcceptanceCallback(prompts, **settings)


def test_the_exits_tried_by_default_are_inside_the_model() -> None:
    for layers in range(2, 80):
        assert all(1 <= exit < layers for exit in default_exits(layers))


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(acceptance) == doctest.TestResults(failed=0, attempted=6)
    assert doctest.testmod(callback) == doctest.TestResults(failed=0, attempted=1)
