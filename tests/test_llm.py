"""The library as a user meets it: text in, text out, on a real checkpoint folder."""

import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip
from layerskip import (
    LLM,
    CapacityError,
    CheckpointError,
    Completion,
    EarlyExit,
    Lookup,
    NumericalError,
    RequestError,
    Sampling,
)
from layerskip.model import cache as cache_module

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)
PROMPTS = ["the cat sat", "the", "a dog ran to the mat and", "the cat the cat the cat the", "x", "on", "to the dog", ""]


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype="float64")


def one(completion: Completion | list[Completion]) -> Completion:
    assert isinstance(completion, Completion)
    return completion


def many(completions: Completion | list[Completion]) -> list[Completion]:
    assert isinstance(completions, list)
    return completions


def test_the_story_is_told_and_every_drafter_tells_the_same(stories: Path) -> None:
    llm = layerskip.load(stories)
    assert one(llm.generate("", max_tokens=61)).text == STORY
    for draft in ("early-exit:3", "lookup", f"assistant:{stories}"):
        told = one(llm.generate("", max_tokens=61, draft=draft))
        assert told.text == STORY
        assert told.acceptance.accepted > 0


def test_text_and_ids_are_those_of_transformers_generate(llm: LLM, tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    for prompt in PROMPTS[:4]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=1)[0]
        told = one(llm.generate(prompt, max_tokens=40, draft=EarlyExit(2, tokens=3)))
        assert told.prompt + told.tokens == expected.tolist()
        assert prompt + told.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("draft", [None, EarlyExit(1), EarlyExit(2, tokens=7, confidence=0.5), Lookup()])
def test_a_batch_of_eight_ragged_prompts_gives_each_row_the_text_it_gets_alone(
    llm: LLM, draft: EarlyExit | Lookup | None
) -> None:
    together = many(llm.generate(PROMPTS, draft=draft, max_tokens=24))
    for prompt, completion in zip(PROMPTS, together, strict=True):
        alone = one(llm.generate(prompt, max_tokens=24))
        assert (completion.tokens, completion.text) == (alone.tokens, alone.text)


def test_more_prompts_than_rows_wait_their_turn(tiny_checkpoint: Path) -> None:
    narrow = layerskip.load(tiny_checkpoint, dtype="float64", max_batch=2)
    wide = layerskip.load(tiny_checkpoint, dtype="float64")
    queued = many(narrow.generate(PROMPTS, max_tokens=9, draft="early-exit:2"))
    assert [c.tokens for c in queued] == [c.tokens for c in many(wide.generate(PROMPTS, max_tokens=9))]
    assert narrow._pool is not None
    assert narrow._pool.cache.rows == 2


def test_samples_of_one_prompt_differ_and_repeat_with_their_seed(llm: LLM) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    first = many(llm.generate("the cat", n=4, sampling=sampling, max_tokens=12))
    again = many(llm.generate("the cat", n=4, sampling=sampling, max_tokens=12, draft=Lookup(tokens=3)))
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert len({tuple(c.tokens) for c in first}) == 4
    unseeded = Sampling(temperature=1.0)
    assert (
        one(llm.generate("the cat", sampling=unseeded, max_tokens=12)).tokens
        != one(llm.generate("the cat", sampling=unseeded, max_tokens=12)).tokens
    )


def test_a_stop_string_ends_the_text_before_it_and_its_round_after_it(llm: LLM) -> None:
    free = one(llm.generate("the cat", max_tokens=30))
    middle = free.text[8:11]
    for draft in (None, EarlyExit(2, tokens=7), Lookup(predicted=free.text)):
        stopped = one(llm.generate("the cat", max_tokens=30, stop=middle, draft=draft))
        assert stopped.text == free.text[: free.text.index(middle)]
        assert (stopped.finish_reason, stopped.stop) == ("stop", middle)
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]
        assert stopped.acceptance.emitted == len(stopped.tokens) < 30
    late = one(llm.generate("the cat", max_tokens=30, stop=middle, min_tokens=30))
    assert late.text == free.text


@pytest.mark.parametrize("limit", range(1, 12))
def test_max_tokens_is_exact(llm: LLM, limit: int) -> None:
    free = one(llm.generate("the cat", max_tokens=30))
    cut = one(llm.generate("the cat", max_tokens=limit, draft=Lookup(tokens=5, predicted=free.text)))
    assert (cut.tokens, cut.finish_reason) == (free.tokens[:limit], "length")


def test_end_of_sequence_ends_the_text_and_is_no_part_of_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    free = one(layerskip.load(tiny_checkpoint).generate("the cat", max_tokens=30))
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "ends")
    # one id in each place: both must end the text
    first, second = free.tokens[9], free.tokens[14]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [second]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    llm = layerskip.load(folder)
    assert set(llm.eos) == {first, second}
    end = min(free.tokens.index(first), free.tokens.index(second))
    for draft in (None, EarlyExit(2, tokens=7), Lookup(tokens=7, predicted=free.text)):
        told = one(llm.generate("the cat", max_tokens=30, draft=draft))
        assert (told.tokens, told.finish_reason) == (free.tokens[: end + 1], "stop")
        assert told.text == llm.tokenizer.decode(free.tokens[:end])
        assert one(llm.generate("the cat", max_tokens=30, draft=draft, ignore_eos=True)).tokens == free.tokens
        assert len(one(llm.generate("the cat", max_tokens=30, min_tokens=20, draft=draft)).tokens) >= 20


def test_a_stream_yields_rounds_whose_text_adds_up(llm: LLM) -> None:
    whole = one(llm.generate("the cat", max_tokens=40))
    with llm.stream("the cat", max_tokens=40, draft=EarlyExit(2, tokens=5)) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.tokens] == whole.tokens
    assert any(chunk.accepted and chunk.accepted_text for chunk in chunks)
    assert all(len(chunk.tokens) <= chunk.accepted + 1 for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"


def test_a_closed_stream_and_an_exception_leave_the_model_usable(llm: LLM) -> None:
    expected = one(llm.generate("the cat", max_tokens=20)).tokens
    stream = llm.stream(["the cat", "a dog"], max_tokens=20, draft=EarlyExit(2))
    next(stream)
    stream.close()
    assert llm._pool is not None
    assert not any(row.taken for row in llm._pool.rows)

    class Fails(EarlyExit):
        def observe(self, rows, draft, outcome):  # type: ignore[no-untyped-def]
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        llm.generate("the cat", max_tokens=20, draft=Fails(2))
    assert not any(row.taken for row in llm._pool.rows)
    assert one(llm.generate("the cat", max_tokens=20, draft=EarlyExit(2))).tokens == expected


def test_two_streams_read_in_turns_do_not_mix(llm: LLM) -> None:
    expected = [one(llm.generate(p, max_tokens=20)).text for p in ("the cat", "a dog")]
    shared = EarlyExit(2)
    streams = [llm.stream(p, max_tokens=20, draft=shared) for p in ("the cat", "a dog")]
    while True:
        turns = [next(stream, None) for stream in streams]
        if not any(turns):
            break
    assert [stream.completions[0].text for stream in streams] == expected


def test_threads_on_one_model_get_the_right_text(llm: LLM) -> None:
    expected = {p: one(llm.generate(p, max_tokens=25)).tokens for p in PROMPTS}
    wrong: list[str] = []

    def work(prompts: list[str]) -> None:
        wrong.extend(
            p for p in prompts if one(llm.generate(p, max_tokens=25, draft="early-exit:2")).tokens != expected[p]
        )

    threads = [threading.Thread(target=work, args=(PROMPTS[i::2] * 3,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_next_turn_runs_only_what_is_new(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    run = llm.decoder.run

    def counting(hidden, at, cache, first=0, last=None, **rest):  # type: ignore[no-untyped-def]
        passes.append(hidden.shape[0] * hidden.shape[1])
        return run(hidden, at, cache, first, last, **rest)

    monkeypatch.setattr(llm.decoder, "run", counting)
    first = one(llm.generate("the cat sat on the mat and the dog", max_tokens=20))
    turn = [*first.prompt, *first.tokens, 9, 10, 11]
    passes.clear()
    second = one(llm.generate(turn, max_tokens=5))
    # the last token of the first turn was never run, then the three new ones but the last, then five rounds
    assert sum(passes) == 1 + 2 + 5
    monkeypatch.undo()
    assert (
        second.tokens == one(layerskip.LLM(llm.decoder, llm.tokenizer, eos=llm.eos).generate(turn, max_tokens=5)).tokens
    )


@pytest.mark.parametrize("draft", [None, EarlyExit(2, tokens=3), Lookup()])
def test_logprobs_are_the_models_own_whatever_drafts_and_penalises(llm: LLM, draft: EarlyExit | Lookup | None) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3, seed=3)
    told = one(
        llm.generate("the cat sat", max_tokens=12, draft=draft, sampling=sampling, logprobs=3, prompt_logprobs=True)
    )
    exits = llm.score([*told.prompt, *told.tokens])
    assert told.logprobs is not None
    assert told.prompt_logprobs is not None
    reported = [*told.prompt_logprobs, *told.logprobs]
    assert [entry.token for entry in reported] == [*told.prompt, *told.tokens][1:]
    assert [entry.logprob for entry in reported] == pytest.approx(exits.logprobs, abs=1e-9)
    assert [entry.top[0][0] for entry in reported] == exits.predictions
    assert all(len(entry.top) == 3 for entry in reported)


def test_a_score_is_the_log_likelihood_at_the_exit_asked_for(llm: LLM, tiny_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    ids = torch.tensor([llm.encode("the cat sat on the mat")])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for exit, scored in enumerate(llm.score_exits("the cat sat on the mat"), start=1):
        # transformers hands out the last state with the final norm already applied
        normed = states[exit] if exit == 4 else model.model.norm(states[exit])
        table = model.lm_head(normed).log_softmax(-1)[0, :-1]
        expected = table.gather(-1, ids[0, 1:, None]).sum().item()
        assert scored.total == pytest.approx(expected, rel=1e-6)
        assert scored.loss == pytest.approx(-expected / (ids.shape[1] - 1), rel=1e-6)
    assert scored.agreement(scored) == 1.0
    with pytest.raises(RequestError, match=r"exit 5 is not inside this 4-layer model; use 1\.\.4"):
        llm.score("the cat", exit=5)


def test_plain_early_exit_is_labelled_lossy_and_does_not_spoil_what_follows(llm: LLM) -> None:
    exact = one(llm.generate("the cat sat", max_tokens=20))
    early = one(llm.generate("the cat sat", max_tokens=20, exit=1))
    assert (exact.mode, early.mode) == ("exact", "lossy")
    assert early.tokens != exact.tokens
    # the lossy call left only the first layer filled; an exact one must not read beyond it
    assert one(llm.generate("the cat sat", max_tokens=20)).tokens == exact.tokens
    assert one(llm.generate("the cat sat", max_tokens=20, exit=3, draft="early-exit:1")).tokens == (
        one(llm.generate("the cat sat", max_tokens=20, exit=3)).tokens
    )


def test_a_chat_goes_through_the_template(llm: LLM) -> None:
    ids = llm.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert llm.tokenizer.decode(ids) == "user: the cat\nassistant:"
    assert one(llm.generate(ids, max_tokens=3)).prompt == ids


def test_a_tokenizer_model_alone_is_enough(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=276, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "sentencepiece")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "tokenizer.model", folder)
    llm = layerskip.load(folder)
    ids = llm.encode("the cat")
    assert llm.tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert one(llm.generate("the cat", max_tokens=5, draft="early-exit:2")).tokens


def test_bad_requests_say_what_is_allowed(llm: LLM, tiny_checkpoint: Path) -> None:
    def refused(message: str, **arguments: object) -> None:
        with pytest.raises(RequestError, match=message):
            llm.generate(**{"prompt": "the cat", **arguments})  # type: ignore[arg-type]

    refused(r"exit 0 is not inside this 4-layer model; use 1\.\.4", exit=0)
    refused(r"exit 40 is not inside this 4-layer model; use 1\.\.4", exit=40)
    refused(r"draft exit 4 is not below the 4 layers the model decodes with; use 1\.\.3", draft="early-exit:4")
    refused(r"draft exit 0 is not possible", draft="early-exit:0")
    refused(r"unknown drafter 'early-exot'; .* did you mean 'early-exit'", draft="early-exot:3")
    refused(r"early-exit needs a number of layers", draft="early-exit:three")
    refused(r"assistant needs a checkpoint", draft="assistant")
    refused(r"no prompt given", prompt=[])
    refused(r"not valid text", prompt="\ud800")
    refused(r"context holds 256, so use at most 255", prompt=[2] * 256)
    refused(r"token 9999 is outside the vocabulary; use 0\.\.", prompt=[9999])
    refused(r"max_tokens 0 is not possible", max_tokens=0)
    refused(r"min_tokens 300 is not possible; use 0\.\.256", min_tokens=300)
    refused(r"n 0 is not possible", n=0)
    refused(r"logprobs -1 is not possible", logprobs=-1)
    refused(r"empty stop string", stop=[""])
    refused(r"token 9999 is outside the vocabulary", sampling=Sampling(banned=[9999]))
    refused(r"predicted token 9999 is outside the vocabulary", draft=Lookup(predicted=[9999]))
    with pytest.raises(RequestError, match=r"unknown dtype 'float31'; .* did you mean"):
        layerskip.load(tiny_checkpoint, dtype="float31")
    with pytest.raises(RequestError, match="unknown device 'potato'"):
        layerskip.load(tiny_checkpoint, device="potato")


def test_an_empty_prompt_is_bos_or_an_error(llm: LLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert llm.encode("") == [0]
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "nobos")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match="this tokenizer has no BOS token"):
        layerskip.load(folder).generate("")


def test_an_assistant_with_another_vocabulary_is_refused(llm: LLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"</s>"', '"<end>"'))
    with pytest.raises(RequestError, match=r"has another vocabulary: \d+ of \d+ tokens differ"):
        llm.assistant(folder)
    assert one(llm.generate("the cat", draft=llm.assistant(tiny_checkpoint, tokens=3), max_tokens=9)).tokens == (
        one(llm.generate("the cat", max_tokens=9)).tokens
    )


def test_a_folder_without_a_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer; it needs one of"):
        layerskip.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded"):
        layerskip.load(folder)


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
def test_the_tokenizer_is_the_one_that_transformers_loads(
    tiny_checkpoint: Path, tmp_path: Path, named: str | None
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "named")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    mine, theirs = layerskip.load(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    assert type(mine) is type(theirs)
    assert [mine(text).input_ids for text in PROMPTS] == [theirs(text).input_ids for text in PROMPTS]
    assert (mine.eos_token_id, mine.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_loading_leaves_out_what_training_needs(tiny_checkpoint: Path) -> None:
    """Which is most of what importing takes, in seconds and in memory."""
    code = "import sys, layerskip; layerskip.load(sys.argv[1]).generate('the cat'); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code, tiny_checkpoint], capture_output=True, text=True, check=True)
    assert not {"accelerate", "torch._dynamo", "transformers.modeling_utils"} & set(done.stdout.split())


def test_a_cache_that_does_not_fit_says_what_would(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = layerskip.load(tiny_checkpoint)
    monkeypatch.setattr(cache_module, "free_bytes", lambda device: 100_000)
    with pytest.raises(CapacityError, match=r"needs .* GiB, .* GiB are free; .* would fit"):
        llm.generate(PROMPTS, max_tokens=200)
    assert one(llm.generate("the cat", max_tokens=5)).tokens


def test_nan_weights_are_named_with_the_layer_where_they_begin(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint)
    llm.decoder.layers[2].down.weight.data[0, 0] = math.nan
    for draft in (None, "early-exit:1", "lookup"):
        with pytest.raises(NumericalError, match=r"not finite from layer 2 \(of 0\.\.3\) on, at position 0"):
            llm.generate("the cat", max_tokens=5, draft=draft)


def test_a_text_with_every_token_banned_is_an_error_that_says_so(llm: LLM) -> None:
    everything = Sampling(banned=range(llm.decoder.shape.vocab))
    with pytest.raises(RequestError, match="no token is allowed after"):
        llm.generate("the cat", sampling=everything, max_tokens=5)


def test_a_processor_with_nothing_to_say_after_the_end_does_not_spoil_the_end(llm: LLM) -> None:
    """A grammar allows nothing after the end of sequence, and a draft may run past it."""
    free = one(llm.generate("the cat", max_tokens=12)).tokens
    start = len(llm.encode("the cat"))

    def grammar(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        done = ids[start:].tolist()
        wanted = [*free[:6], llm.eos[0]]
        mask = torch.full_like(logits, -torch.inf)
        if len(done) < len(wanted):
            mask[wanted[len(done)]] = 0.0
        return logits + mask

    told = one(
        llm.generate(
            "the cat",
            max_tokens=12,
            sampling=Sampling(processors=[grammar]),
            draft=Lookup(tokens=9, predicted=[*free[:6], llm.eos[0], *free[6:]]),
        )
    )
    assert (told.tokens, told.finish_reason) == ([*free[:6], llm.eos[0]], "stop")
    assert told.acceptance.accepted == 7


def test_one_failing_row_costs_the_others_nothing(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint)
    right = one(llm.generate("the cat", max_tokens=8))
    unused = next(t for t in range(2, 200) if t not in [*right.prompt, *right.tokens])
    llm.decoder.embedding.weight.data[unused] = math.nan
    with pytest.raises(NumericalError, match="from the embedding on, at position 1") as caught:
        llm.generate([[0, unused, 5], "the cat"], max_tokens=8, draft="early-exit:2")
    failed, good = caught.value.completions
    assert isinstance(failed, Completion)
    assert isinstance(good, Completion)
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    assert (good.finish_reason, good.tokens) == ("length", right.tokens)


def test_nan_is_named_when_scoring_too(tiny_checkpoint: Path) -> None:
    llm = layerskip.load(tiny_checkpoint, weights="plain")
    llm.decoder.layers[2].gate_up.up.weight.data[:] = math.nan
    assert math.isfinite(llm.score("the cat sat", exit=2).loss)
    with pytest.raises(NumericalError, match=r"from layer 2 \(of 0\.\.3\) on"):
        llm.score("the cat sat")


def test_prompts_come_as_people_have_them(llm: LLM) -> None:
    ids = llm.encode("the cat")
    expected = one(llm.generate(ids, max_tokens=4)).tokens
    tensor = torch.tensor(ids)
    assert one(llm.generate(tensor, max_tokens=4)).tokens == expected  # type: ignore[arg-type]
    assert one(llm.generate(tensor.numpy(), max_tokens=4)).tokens == expected  # type: ignore[arg-type]
    assert one(llm.generate(list(tensor.numpy()), max_tokens=4)).tokens == expected
    assert [c.tokens for c in many(llm.generate(tensor[None], max_tokens=4))] == [expected]  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r'the prompt is a mapping, as tokenizers return; .* \["input_ids"\]'):
        llm.generate(llm.tokenizer("the cat"))
    for wrong in (None, 3, b"the cat", [1.5, 2.5], [None]):
        with pytest.raises(RequestError, match="the prompt is a"):
            llm.generate(wrong)  # type: ignore[arg-type]


def test_arguments_of_another_kind_are_named(llm: LLM) -> None:
    for arguments, message in (
        ({"draft": 3}, "draft 3 is not a drafter; use one such as"),
        ({"draft": EarlyExit}, "is not a drafter"),
        ({"max_tokens": None}, "max_tokens None is not possible; use a whole number"),
        ({"max_tokens": 2.5}, "max_tokens 2.5"),
        ({"exit": "3"}, "exit '3' is not possible"),
        ({"n": 1.5}, "n 1.5"),
        ({"logprobs": True}, "logprobs True"),
        ({"sampling": {"temperature": 1}}, r"use layerskip.Sampling\(\.\.\.\)"),
        ({"stop": 5}, "stop 5 is not possible; use a text, or a list of texts"),
        ({"stop": [1]}, r"stop \[1\] is not possible"),
        ({"stop": b"x"}, "stop b'x' is not possible"),
        ({"prompt": [1, [2]]}, "a list of neither texts nor token ids"),
        ({"sampling": Sampling(processors=[lambda ids, logits: None])}, "returned None; return the logits of all"),  # type: ignore[arg-type,return-value]
        ({"sampling": Sampling(processors=[lambda ids, logits: logits[1:]])}, "return the logits of all"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(**{"prompt": "the cat", **arguments})  # type: ignore[arg-type]
    for make, message in (
        (lambda: EarlyExit(2.5), "draft exit 2.5"),  # type: ignore[arg-type]
        (lambda: EarlyExit(2, tokens="4"), "draft tokens '4'"),  # type: ignore[arg-type]
        (lambda: EarlyExit(2, confidence="high"), "confidence 'high' is not possible; use a number"),  # type: ignore[arg-type]
        (lambda: Sampling(temperature=None), "temperature None"),  # type: ignore[arg-type]
        (lambda: Sampling(top_k=2.5), "top_k 2.5"),  # type: ignore[arg-type]
        (lambda: Sampling(seed="a"), "seed 'a'"),  # type: ignore[arg-type]
        (lambda: Sampling(banned=5), "banned 5 is not possible; use a list of token ids"),  # type: ignore[arg-type]
        (lambda: Sampling(banned="x"), "banned 'x' is not possible"),  # type: ignore[arg-type]
        (lambda: Sampling(banned=[1.0]), "token 1.0 is not possible"),  # type: ignore[list-item]
        (lambda: Sampling(logit_bias={"3": 1.0}), "token '3'"),  # type: ignore[dict-item]
        (lambda: Sampling(logit_bias={3: "x"}), "logit_bias of token 3 'x'"),  # type: ignore[dict-item]
        (lambda: Sampling(logit_bias=[1]), r"logit_bias \[1\] is not possible; use a mapping"),  # type: ignore[arg-type]
        (lambda: Sampling(processors=len), "processors .* is not possible; use a list of functions"),  # type: ignore[arg-type]
        (lambda: EarlyExit(2, length=None), "unknown draft length None"),  # type: ignore[arg-type]
        (lambda: layerskip.load(dtype=5), "unknown dtype 5"),  # type: ignore[arg-type]
        (lambda: layerskip.load(weights=5), "unknown weights 5"),  # type: ignore[arg-type]
        (lambda: layerskip.load(max_batch="4"), "max_batch '4'"),  # type: ignore[arg-type]
        (lambda: layerskip.load(device="meta"), "device meta holds no numbers"),
        (lambda: layerskip.load(device="xpu"), "device xpu is not here"),
        (lambda: llm.score([1, -1]), "token -1 is outside the vocabulary"),
        (lambda: llm.score("the cat", exit="3"), "exit '3' is not possible"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RequestError, match=message):
            make()
    assert one(llm.generate("the cat", max_tokens=3, stop=None)).tokens
    known = one(llm.generate("the cat", max_tokens=3)).tokens
    assert one(llm.generate("the cat", max_tokens=3, stop={"§"}, sampling=Sampling(banned={max(known) + 1}))).tokens  # type: ignore[arg-type]


def test_memory_too_small_for_all_rows_at_once_serves_them_in_turns(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = layerskip.load(tiny_checkpoint)
    wanted = [c.tokens for c in many(layerskip.load(tiny_checkpoint).generate(PROMPTS, max_tokens=100))]
    row = llm.decoder.shape.cache_bytes(1, 200, 4)

    def free(_: object) -> int:
        held = llm._pool.cache if llm._pool is not None else None
        return 3 * row - (llm.decoder.shape.cache_bytes(held.rows, held.slots + 1, 4) if held is not None else 0)

    monkeypatch.setattr(cache_module, "free_bytes", free)
    assert [c.tokens for c in many(llm.generate(PROMPTS, max_tokens=100))] == wanted
    # rows of past calls give way to one long request
    assert len(one(llm.generate("the cat", max_tokens=240, ignore_eos=True)).tokens) == 240


def test_two_streams_that_share_a_drafter_do_not_undo_its_work(
    llm: LLM, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = llm.assistant(tiny_checkpoint, tokens=2)
    positions: list[int] = []
    run = assistant.decoder.run

    def counting(hidden, at, *rest, **more):  # type: ignore[no-untyped-def]
        positions.append(hidden.shape[0] * hidden.shape[1])
        return run(hidden, at, *rest, **more)

    monkeypatch.setattr(assistant.decoder, "run", counting)
    prompts = ["the cat sat on the mat and the dog ran " * 3, "a dog and the cat " * 6]
    expected = [one(llm.generate(p, max_tokens=30)).text for p in prompts]
    alone = 0
    for prompt in prompts:
        llm.generate(prompt, max_tokens=30, draft=assistant)
        alone, positions = alone + sum(positions), positions
        positions.clear()
    other = llm.assistant(tiny_checkpoint, tokens=2)
    monkeypatch.setattr(other.decoder, "run", counting)
    streams = [llm.stream(p, max_tokens=30, draft=other) for p in prompts]
    while any([next(stream, None) for stream in streams]):  # noqa: C419  # every stream takes its turn
        pass
    assert [stream.completions[0].text for stream in streams] == expected
    assert sum(positions) <= alone + 4
    assert not any(row.taken for row in other._pool.rows)
