"""lm-evaluation-harness on our models: its own transformers model gives the same, and exits and drafters keep apart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import layerskip
from layerskip import LLM, EarlyExit, Lookup
from layerskip.errors import RequestError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from layerskip.evaluate.harness import LayerSkipLM, Opened, open_tasks, run, settings

LONG = "the cat sat on the mat and the dog ran to the cat " * 36  # 432 tokens and more; the context holds 256


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path) -> Any:
    return HFLM(str(tiny_checkpoint), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def tasks(local_tasks: Path) -> Opened:
    return open_tasks(["choice", "writing", "reading"], folder=local_tasks)


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the dog ran to the cat"),
    ("the cat sat on ", "the mat"),  # a space at the end of the context belongs to the continuation
    ("", "the dog"),
    ("<s>the dog", " ran"),  # BOS is there already
    (LONG, " and the dog"),  # longer than the context: cut from the left
    ("the dog", " ran"),
]


def test_log_likelihoods_are_those_of_the_harness_itself(llm: LLM, theirs: Any) -> None:
    requests = asked("loglikelihood", PAIRS)
    ours, wanted = LayerSkipLM(llm, batch=3).loglikelihood(requests), theirs.loglikelihood(requests)
    for (total, greedy), (their_total, their_greedy) in zip(ours, wanted, strict=True):
        assert total == pytest.approx(their_total, rel=1e-5)
        assert greedy == their_greedy
    texts = asked("loglikelihood_rolling", [("the cat sat on the mat",), (LONG,), ("a",)])
    assert LayerSkipLM(llm).loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


def test_a_real_checkpoint_is_scored_as_the_harness_does(stories: Path) -> None:
    ours = LayerSkipLM(layerskip.load(stories, dtype="float32", device="cpu"))
    theirs = HFLM(str(stories), dtype="float32", device="cpu", batch_size=4)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 30
    pairs = [(story[:90], story[90:140]), (story[:90], " The dog ran."), ("Lily had a ", "ball."), ("", story[:60])]
    pairs.append((story, " One day"))
    wanted = theirs.loglikelihood(asked("loglikelihood", pairs))
    for (total, greedy), (their_total, their_greedy) in zip(
        ours.loglikelihood(asked("loglikelihood", pairs)), wanted, strict=True
    ):
        assert total == pytest.approx(their_total, rel=1e-5)
        assert greedy == their_greedy
    texts = asked("loglikelihood_rolling", [(story,), (story[:50],)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    writing = asked("generate_until", [(story[:length], {"until": ["."], "max_gen_toks": 24}) for length in (20, 90)])
    # theirs drops the space before the first word
    assert [text.lstrip() for text in ours.generate_until(writing)] == theirs.generate_until(writing)
    assert all(ours.generate_until(writing))


def test_what_greedy_decoding_writes_is_called_greedy(llm: LLM) -> None:
    text = llm.generate("the cat sat on", max_tokens=4)
    assert not isinstance(text, list)
    model = LayerSkipLM(llm)
    scored = [((None), text.prompt, text.tokens), (None, text.prompt, [*text.tokens[:-1], text.tokens[-1] ^ 1])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(scored)] == [True, False]


@pytest.mark.parametrize(
    "asking",
    [
        {"until": ["g"], "max_gen_toks": 12},
        {"max_new_tokens": 9},
        {"until": "t", "do_sample": False, "max_gen_toks": 20},
    ],
)
@pytest.mark.parametrize("drafter", [None, EarlyExit(2), Lookup()])
def test_texts_are_those_of_the_harness_itself(llm: LLM, theirs: Any, asking: dict[str, Any], drafter: Any) -> None:
    # theirs looks for BOS in the first context of a batch only
    contexts = [context for context, _ in PAIRS if context and not context.startswith("<s>")]
    requests = asked("generate_until", [(context, asking) for context in contexts])
    model = LayerSkipLM(llm, draft=drafter, batch=3)
    assert model.generate_until(requests) == theirs.generate_until(requests)
    assert model.tokens > 0
    assert (model.acceptance.drafted > 0) == (drafter is not None)


def test_results_are_those_of_the_harness_itself(llm: LLM, theirs: Any, tasks: Opened) -> None:
    from lm_eval.evaluator import evaluate

    found = run(LayerSkipLM(llm), tasks, name="plain")
    wanted = evaluate(theirs, tasks.loaded, log_samples=False)["results"]
    assert found.scores["choice"]["acc"].mean == wanted["choice"]["acc,none"]
    assert found.scores["choice"]["acc"].error == pytest.approx(wanted["choice"]["acc_stderr,none"])
    assert found.scores["choice"]["acc_norm"].mean == wanted["choice"]["acc_norm,none"]
    assert found.scores["writing"]["exact_match"].mean == wanted["writing"]["exact_match,none"]
    assert found.scores["reading"]["bits_per_byte"].mean == pytest.approx(
        wanted["reading"]["bits_per_byte,none"], rel=1e-5
    )
    assert found.scores["reading"]["bits_per_byte"].error is None
    assert found.scores["choice"]["acc"].count == 40
    assert (found.items, found.mode, found.exit, found.acceptance) == (52, "exact", 4, None)


@pytest.fixture(scope="module")
def echo(llm: LLM, local_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """What the model says itself is right for every second question; so a changed text changes the accuracy."""
    folder = tmp_path_factory.mktemp("echo")
    lines = (local_tasks / "writing.jsonl").read_text().splitlines()
    for i, line in enumerate(lines):
        question = json.loads(line)["question"]
        said = LayerSkipLM(llm).generate_until(asked("generate_until", [(question, {"max_gen_toks": 3})]))[0]
        lines[i] = json.dumps({"question": question, "answer": said if i % 2 else "nothing"})
    (folder / "echo.jsonl").write_text("\n".join(lines))
    task = (local_tasks / "writing.yaml").read_text().replace("writing", "echo").replace(str(local_tasks), str(folder))
    (folder / "echo.yaml").write_text(task.replace("until: ['g'], max_gen_toks: 12", "max_gen_toks: 3"))
    return open_tasks(["echo"], folder=folder)


def test_an_exit_changes_every_kind_of_task_and_a_drafter_none(llm: LLM, tasks: Opened, echo: Opened) -> None:
    plain, texts = run(LayerSkipLM(llm), tasks, name="plain"), run(LayerSkipLM(llm), echo, name="plain")
    early, early_texts = (run(LayerSkipLM(llm, exit=1), each, name="exit 1") for each in (tasks, echo))
    drafter = EarlyExit(2)
    drafted, drafted_texts = (run(LayerSkipLM(llm, draft=drafter), each, name="drafted") for each in (tasks, echo))
    assert (early.mode, early.exit, drafted.mode, drafted.exit) == ("lossy", 1, "exact", 4)
    assert early.scores["choice"]["acc"].mean != plain.scores["choice"]["acc"].mean
    assert early.scores["reading"]["bits_per_byte"].mean != plain.scores["reading"]["bits_per_byte"].mean
    assert texts.scores["echo"]["exact_match"].mean == 0.5
    assert early_texts.scores["echo"]["exact_match"].mean < 0.5
    assert drafted_texts.scores == texts.scores
    assert drafted.scores == plain.scores
    assert drafted.tokens == plain.tokens
    assert drafted.acceptance is not None
    assert drafted.acceptance["num_emitted_tokens"] == drafted.tokens
    assert drafted.acceptance["num_accepted_draft_tokens"] > 0
    record = drafted.record()
    assert record["scores"]["choice"]["acc"]["count"] == 40
    assert record["seconds"] > 0


def test_groups_limits_and_shots(llm: LLM, local_tasks: Path) -> None:
    found = run(LayerSkipLM(llm), open_tasks(["both"], folder=local_tasks), name="plain", limit=5, shots=2)
    assert set(found.scores) >= {"choice", "writing"}
    assert found.scores["choice"]["acc"].count == 5
    assert found.items == 10
    assert found.shots["choice"] == 2
    assert found.shots["writing"] == 0  # the task fixes it


def test_sampled_texts_can_be_repeated_and_asked_for_twice(llm: LLM) -> None:
    asking = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 12}
    requests = asked("generate_until", [("the cat", asking), ("the cat", asking)])
    first = LayerSkipLM(llm).generate_until(requests)
    assert first[0] != first[1]
    assert LayerSkipLM(llm).generate_until(requests) == first
    assert LayerSkipLM(llm, seed=5).generate_until(requests) != first
    assert LayerSkipLM(llm, draft=EarlyExit(1)).generate_until(requests)


def test_settings_of_generation() -> None:
    greedy = settings.read_settings({"until": ["x", ""], "temperature": 0.0, "top_p": 0.5, "num_beams": 1})
    assert (greedy.stops, greedy.max_tokens, greedy.sampling.temperature) == (("x",), 256, 0.0)
    assert settings.read_settings({"do_sample": True}).sampling.temperature == 1.0
    assert settings.read_settings({"temperature": 0.7, "top_k": 5}).sampling.top_k == 5
    with pytest.raises(RequestError, match="num_beams=4, which layerskip does not do; it knows until"):
        settings.read_settings({"num_beams": 4})
    with pytest.raises(RequestError, match="top_p 2 is not allowed"):
        settings.read_settings({"do_sample": True, "top_p": 2})


def test_a_chat_is_written_as_the_tokenizer_says(llm: LLM, theirs: Any, tasks: Opened) -> None:
    chat = [{"role": "user", "content": "the cat"}]
    model = LayerSkipLM(llm)
    assert model.apply_chat_template(chat) == theirs.apply_chat_template(chat) == "user: the cat\nassistant:"
    begun = theirs.apply_chat_template(chat, add_generation_prompt=False)
    assert model.apply_chat_template(chat, add_generation_prompt=False) == begun == "user: the cat"
    assert model.tokenizer_name
    plain = run(model, tasks, name="plain", limit=4)
    asked_so = run(LayerSkipLM(llm), tasks, name="plain", limit=4, chat=True)
    assert asked_so.items == plain.items


def test_a_model_without_a_template_says_so(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint)
    llm.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="has no chat template"):
        LayerSkipLM(llm).apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit": 5}, r"exit 5 is not inside this 4-layer model; use 1\.\.4"),
        ({"exit": 2, "draft": EarlyExit(1)}, "an exit is lossy, a drafter exact: use one"),
        ({"draft": EarlyExit(4)}, "draft exit 4 is not below the 4 layers"),
        ({"batch": 0}, "max_batch 0 is not possible"),
    ],
)
def test_models_that_cannot_be(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LayerSkipLM(llm, **options)


def test_a_drafter_for_log_likelihoods_alone_is_refused(llm: LLM, local_tasks: Path) -> None:
    opened = open_tasks(["choice", "reading"], folder=local_tasks)
    with pytest.raises(RequestError, match="choice, reading only compares log-likelihoods: nothing is generated"):
        run(LayerSkipLM(llm, draft=EarlyExit(2)), opened, name="drafted")
    for limit, shots, message in ((0, None, "limit 0 is not possible"), (None, -1, "shots -1 is not possible")):
        with pytest.raises(RequestError, match=message):
            run(LayerSkipLM(llm), opened, name="plain", limit=limit, shots=shots)


def test_more_text_than_the_context_holds_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="asks for 256 generated tokens; this model's context holds 256"):
        LayerSkipLM(llm).generate_until(asked("generate_until", [("the cat", {})]))
    with pytest.raises(RequestError, match=r"a continuation of \d+ tokens; this model's context holds 256"):
        LayerSkipLM(llm).loglikelihood(asked("loglikelihood", [("a", LONG)]))


def test_tasks_that_cannot_be_opened(local_tasks: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "no folder"), (tmp_path, "holds no task")):
        with pytest.raises(RequestError, match=message):
            open_tasks(["choice"], folder=folder)
    with pytest.raises(RequestError, match="no task of lm-evaluation-harness is named"):
        open_tasks([], folder=local_tasks)
    (tmp_path / "lost.yaml").write_text(
        f"task: lost\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(RequestError, match=r"task lost cannot be opened: .*none\.jsonl"):
        open_tasks(["lost"], folder=tmp_path)
    text = (local_tasks / "choice.yaml").read_text()
    (tmp_path / "unsafe.yaml").write_text(text.replace("task: choice", "task: unsafe") + "unsafe_code: true\n")
    with pytest.raises(RequestError, match="task unsafe runs generated code"):
        open_tasks(["unsafe"], folder=tmp_path)


@pytest.mark.slow
def test_a_misspelt_name_is_suggested(local_tasks: Path) -> None:
    """Slow: reading the harness's own index takes many seconds."""
    with pytest.raises(RequestError, match=r"unknown task 'arc_eazy': neither .* has it; did you mean 'arc_easy'"):
        open_tasks(["arc_eazy"], folder=local_tasks)
    with pytest.raises(RequestError, match="task arc_easy cannot be opened: "):
        open_tasks(["arc_easy"])  # no network here
