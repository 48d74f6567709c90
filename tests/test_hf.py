"""model.generate(custom_generate=hf.generate): what transformers would return, in fewer passes."""

import copy
import functools
import gc
import itertools
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
)
from transformers.generation import logits_process as theirs

from layerskip import Assistant, EarlyExit, Lookup, RequestError, hf
from layerskip.decode.batch import Batch
from layerskip.decode.request import Round
from layerskip.hf import asked
from layerskip.hf import models as served
from layerskip.model.decoder import Decoder

V, LAYERS, PAD, EOS = 28, 4, 0, 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # tokens 2..27

SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {},
}


def build(kind: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model whose exits often agree with it, and whose text does not just repeat itself."""
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        embedding = model.get_input_embeddings().weight.normal_(generator=generator)
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(0.4)
            layer.mlp.down_proj.weight.mul_(0.4)
        if not config.tie_word_embeddings:  # a token calls for another
            model.lm_head.weight.copy_(0.4 * embedding[torch.randperm(len(embedding), generator=generator)])
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": PAD, "</s>": EOS, **{letter: i + 2 for i, letter in enumerate(LETTERS)}}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")


def ragged(rows: int = 3, *, width: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Prompts padded on the left, with junk under the mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : (0, 4, width - 1, 2)[row % 4]] = 0
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


DRAFT = {"custom_generate": hf.generate, "draft_exit": 2, "draft_tokens": 4}


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Every round that is decoded from here on."""
    seen: list[Round] = []
    decode = Batch.round

    def record(batch: Batch) -> list[Round]:
        done = decode(batch)
        seen.extend(done)
        return done

    monkeypatch.setattr(Batch, "round", record)
    return seen


def accepted(rounds: list[Round]) -> int:
    return sum(done.accepted for done in rounds)


def same(model: Any, prompts: dict[str, Tensor], *, drafted: dict[str, Any] = DRAFT, **settings: Any) -> Tensor:
    """Asserts that drafting changes nothing; returns the sequences."""
    settings = {"max_new_tokens": 24, "pad_token_id": PAD, **settings}
    expected = model.generate(**prompts, **copy.deepcopy(settings))
    found = model.generate(**prompts, **settings, **drafted)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    return found


# -- greedy


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind: str, rounds: list[Round]) -> None:
    model, prompts = build(kind), ragged(4)
    for drafted in (
        {"draft_exit": 1, "draft_tokens": 1},
        {"draft_exit": 3, "draft_tokens": 6},
        {"draft_exit": 2, "draft_confidence": 0.5},
        {"draft_exit": 2},
        {"draft": Lookup(tokens=5)},
        {"draft": Assistant(hf.decoder_for(build(kind, num_hidden_layers=2)), tokens=3)},
        {"draft": EarlyExit(2, tokens=3)},
        {},
    ):
        rounds.clear()
        same(model, prompts, drafted={"custom_generate": hf.generate, **drafted})
        assert bool(accepted(rounds)) == bool(drafted)


def test_tied_weights(rounds: list[Round]) -> None:
    same(build(tie_word_embeddings=True), ragged(3))
    assert accepted(rounds)


def test_one_prompt_without_a_mask(model: Any, rounds: list[Round]) -> None:
    same(model, {"input_ids": ragged(1)["input_ids"]})
    assert accepted(rounds) > 6


def test_drafts_save_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verified, run = [], Decoder.run

    def count(
        self: Decoder, hidden: Tensor, at: Tensor, cache: Any, first: int = 0, last: Any = None, **rest: Any
    ) -> Any:
        if last in (None, LAYERS):
            verified.append(first)
        return run(self, hidden, at, cache, first, last, **rest)

    monkeypatch.setattr(Decoder, "run", count)
    same(model, ragged(1), max_new_tokens=40)
    assert verified[0] == 0  # the prompt
    assert set(verified[1:-1]) == {2}  # verification goes on from where the draft stopped
    assert len(verified) < 30


def test_pads_inside_a_prompt_are_masked_as_transformers_masks_them(model: Any) -> None:
    ids = ragged(2)["input_ids"]
    ids[0, 3], ids[1, 5] = PAD, PAD  # transformers infers a mask with gaps from these
    same(model, {"input_ids": ids}, eos_token_id=EOS)


def test_text_goes_on_past_the_context_as_in_transformers() -> None:
    model = build(max_position_embeddings=12)
    assert same(model, ragged(2)).shape == (2, 33)
    assert hf.decoder_for(model).shape.context == 12  # what is changed for one text is not the shared decoder


def test_num_return_sequences_are_rows_of_their_own(model: Any) -> None:
    torch.manual_seed(3)
    out = model.generate(
        **ragged(2), **DRAFT, do_sample=True, num_return_sequences=3, max_new_tokens=12, pad_token_id=PAD
    )
    assert out.shape == (6, 21)
    assert out[:, :9].tolist() == ragged(2)["input_ids"].repeat_interleave(3, 0).tolist()
    assert len({tuple(row) for row in out.tolist()}) == 6


# -- processors


class Alternate(LogitsProcessor):
    """Depends on the position and on the last token; works in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1] % 2 :: 2] -= 3.0
        scores.scatter_(1, input_ids[:, -1:], -math.inf)
        return scores


def allowed_by_row(batch: int, ids: Tensor) -> list[int]:
    return [2 + (int(ids[-1]) + step * (batch + 1)) % 26 for step in range(5)]


PROCESSED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(1, 14))},
    "min_length": {"min_length": 17, "eos_token_id": list(range(1, 14))},
    "bad_words_ids": {"bad_words_ids": [[5], [9, 12], [20], [3]]},
    "sequence_bias": {"sequence_bias": {(4,): 2.5, (17, 8): 9.0, (11,): -4.0}},
    "forced_eos_token_id": {"forced_eos_token_id": EOS, "eos_token_id": EOS},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": 6},
    "suppress_tokens": {"suppress_tokens": [3, 7, 8, 22]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 20))},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed_by_row},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "logits_processor": {"logits_processor": LogitsProcessorList([Alternate()])},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "min_new_tokens": 4},
}


@pytest.mark.parametrize("name", PROCESSED)
@pytest.mark.parametrize("draft", ["early-exit", "lookup"])
def test_processors_see_what_transformers_shows_them(model: Any, name: str, draft: str, rounds: list[Round]) -> None:
    drafted = DRAFT if draft == "early-exit" else {"custom_generate": hf.generate, "draft": Lookup()}
    plain = model.generate(**ragged(4), max_new_tokens=24, pad_token_id=PAD)
    out = same(model, ragged(4), drafted=drafted, **PROCESSED[name])
    assert accepted(rounds) or (draft, name) == ("lookup", "no_repeat_ngram_size")
    assert name == "renormalize_logits" or out.tolist() != plain.tolist(), "the processor did nothing"


def test_processors_of_a_batch_are_those_of_expanded_rows(model: Any) -> None:
    """Samples share the processor state of their prompt; top_k 1 makes sampling greedy."""
    for settings in (
        {"encoder_repetition_penalty": 2.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.7},
    ):
        same(model, ragged(2), do_sample=True, top_k=1, num_return_sequences=2, **settings)


class Grammar(LogitsProcessor):
    """Letters in alphabetical order, round and round; raises on any other text, as a grammar may."""

    def __init__(self, prompt: int, *, most: int, eos: int | None = None) -> None:
        self.prompt, self.most, self.eos = prompt, most, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for text, allowed in zip(input_ids[:, self.prompt :].tolist(), scores, strict=True):
            for before, token in itertools.pairwise(text):
                if token != 2 + (before - 1) % 26:
                    raise ValueError(f"{text} is not in the grammar")
            if self.eos in text or len(text) >= self.most:
                raise ValueError(f"{text} has ended")
            if text:
                allowed[[i for i in range(V) if i != 2 + (text[-1] - 1) % 26]] = -math.inf
        return scores


def test_processors_see_no_prefix_that_cannot_come(model: Any, rounds: list[Round]) -> None:
    """A copied draft may break a grammar, and any draft may run past the end; neither is shown to the processor."""
    letters = torch.tensor([*range(2, 28), *range(2, 9), 4, 11, 5])
    two = torch.stack((letters, letters.flip(0)))  # what the first row can copy the second cannot
    for draft in (Lookup(tokens=8), EarlyExit(1, tokens=8), Lookup(predicted=[4, 9, 9, *range(5, 28)])):
        drafted = {"custom_generate": hf.generate, "draft": draft}
        rounds.clear()
        grammar = LogitsProcessorList([Grammar(36, most=20)])
        out = same(model, {"input_ids": two}, drafted=drafted, logits_processor=grammar, max_new_tokens=20)
        assert accepted(rounds)
        for eos in out[0, 38:44].tolist():
            grammar = LogitsProcessorList([Grammar(36, most=20, eos=eos)])
            same(model, {"input_ids": two[:1]}, drafted=drafted, logits_processor=grammar, eos_token_id=eos)


def test_a_text_that_nothing_may_continue_is_an_error(model: Any) -> None:
    """transformers goes on with token 0, and fails in torch.multinomial where it samples."""
    refused("no token is allowed after 9 tokens", model, suppress_tokens=list(range(V)))


def test_an_error_beyond_the_end_of_a_row_does_not_matter(model: Any) -> None:
    """A row that is ahead of its batch may meet an error past its end, before the end is known."""

    class Full(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            third = not input_ids[0, :8].any()
            return scores.fill_(-math.inf) if third and input_ids.shape[1] >= 16 else scores

    refused("no token is allowed", model, ragged(4), max_new_tokens=9, logits_processor=[Full()])
    out = model.generate(
        **ragged(4),
        **DRAFT,
        max_new_tokens=9,
        pad_token_id=PAD,
        eos_token_id=EOS,
        logits_processor=[Full()],
        stopping_criteria=[StopAt(18, 18, 11, 18)],
    )
    assert out.shape == (4, 18)
    assert not out[2, 11:].any()


# -- ends


def words(model: Any, row: int = 0, rows: int = 3) -> list[int]:
    """What a row says greedily when nothing stops it."""
    out = model.generate(**ragged(rows), max_new_tokens=24, pad_token_id=PAD)
    return [int(token) for token in out[row, 9:]]


class StopAt(StoppingCriteria):
    """Ends a row when it has so many tokens, each row at another; remembers what it was shown."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.shown = lengths, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.shown.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= length for length in self.lengths])


class Guestbook(Lookup):
    """Copies, and notes which rows it drafted for and which of them left."""

    def __init__(self) -> None:
        super().__init__(tokens=3)
        self.came: set[int] = set()
        self.left: set[int] = set()

    def propose(self, rows: Any, tokens: int) -> Any:
        self.came.update(rows.keys)
        return super().propose(rows, tokens)

    def leave(self, key: int) -> None:
        self.left.add(key)
        super().leave(key)


def test_drafters_may_forget_rows_that_a_criterion_or_an_error_ends(model: Any) -> None:
    class Fails(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

    book = Guestbook()
    settings = {"max_new_tokens": 24, "pad_token_id": PAD, "custom_generate": hf.generate, "draft": book}
    model.generate(**ragged(3), **settings, stopping_criteria=[StopAt(12, 14, 16)])
    assert len(book.came) == 3
    with pytest.raises(ZeroDivisionError):
        model.generate(**ragged(3), **settings, stopping_criteria=[Fails()])
    assert len(book.came) == 6
    assert book.left == book.came


def test_any_of_several_eos_ids_ends_a_row_and_pads_fill_it(model: Any) -> None:
    text = words(model)
    for i in range(2, 9):
        out = same(model, ragged(3), eos_token_id=[text[i], words(model, 1)[4], -1, V + 5])
        assert PAD in out[:, 9:].tolist()[0] or out.shape[1] < 33
    same(model, ragged(3), eos_token_id=text[3], pad_token_id=None)  # padded with end of sequence


@pytest.mark.parametrize("most", range(1, 9))
def test_lengths_are_exact(model: Any, most: int) -> None:
    assert same(model, ragged(3), max_new_tokens=most).shape == (3, 9 + most)
    assert same(model, ragged(3), max_new_tokens=None, max_length=9 + most).shape == (3, 9 + most)


@pytest.mark.parametrize("eos", [None, EOS])
def test_a_criterion_ends_a_row_inside_an_accepted_block(model: Any, eos: int | None, rounds: list[Round]) -> None:
    """Without an end-of-sequence criterion rows go on until the last has ended; with one they are filled."""
    for lengths in ((10, 10, 10), (11, 18, 13), (12, 12, 21), (17, 11, 12)):
        plain, drafted = StopAt(*lengths), StopAt(*lengths)
        settings = {"max_new_tokens": 24, "pad_token_id": PAD, "eos_token_id": eos}
        expected = model.generate(**ragged(3), **settings, stopping_criteria=[plain])
        found = model.generate(**ragged(3), **settings, **DRAFT, stopping_criteria=[drafted])
        assert found.tolist() == expected.tolist()
        assert found.shape[1] == max(lengths)
        assert drafted.shown == plain.shown
    assert accepted(rounds)


def test_a_length_criterion_of_ones_own_wins_over_max_new_tokens(model: Any) -> None:
    for length in (11, 20):
        out = same(model, ragged(3), max_new_tokens=6, stopping_criteria=[MaxLengthCriteria(length)])
        assert out.shape == (3, length)


def test_rows_that_have_ended_are_not_decoded_on(model: Any, rounds: list[Round]) -> None:
    criteria = [StopAt(10, 33, 10)]
    model.generate(
        **ragged(3), **DRAFT, max_new_tokens=24, pad_token_id=PAD, eos_token_id=EOS, stopping_criteria=criteria
    )
    per_row = [sum(done.key == key for done in rounds) for key in sorted({done.key for done in rounds})]
    assert per_row[0] == per_row[2] == 1 < per_row[1]


def test_a_criterion_may_end_the_whole_batch_at_once(model: Any) -> None:
    class Any_(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            return bool((input_ids[:, 9:] == words_of_second[5]).any())

    words_of_second = words(model, 1)
    assert same(model, ragged(3), stopping_criteria=[Any_()], eos_token_id=EOS).shape[1] < 33


def test_a_criterion_may_read_scores(model: Any) -> None:
    class Sure(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            return scores[-1].softmax(-1).amax(-1) > 0.9

    settings = {
        "max_new_tokens": 24,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "stopping_criteria": [Sure()],
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(**ragged(3), **settings).sequences
    assert model.generate(**ragged(3), **settings, **DRAFT).sequences.tolist() == expected.tolist()


def test_max_time_ends_at_once(model: Any) -> None:
    out = model.generate(**ragged(2), **DRAFT, max_new_tokens=24, max_time=0.0, pad_token_id=PAD)
    assert out.shape == (2, 10)


def test_stop_strings(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    stops = ["".join(LETTERS[token - 2] for token in words(model, row)[5:7]) for row in (0, 1)]
    settings = {"max_new_tokens": 24, "pad_token_id": PAD, "eos_token_id": EOS}
    expected = model.generate(**ragged(2), **settings, stop_strings=stops, tokenizer=tokenizer)
    assert expected.shape[1] < 33
    bound = functools.partial(hf.generate, tokenizer=tokenizer)
    found = model.generate(
        **ragged(2), **settings, stop_strings=stops, tokenizer=tokenizer, custom_generate=bound, draft_exit=2
    )
    assert found.tolist() == expected.tolist()
    criterion = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
    found = model.generate(**ragged(2), **settings, **DRAFT, stopping_criteria=criterion)
    assert found.tolist() == expected.tolist()
    with pytest.raises(RequestError, match="stop_strings need the tokenizer"):
        model.generate(**ragged(2), **settings, **DRAFT, stop_strings=stops, tokenizer=tokenizer)


# -- what comes back


def test_scores_and_logits_are_those_of_transformers(model: Any) -> None:
    settings = {
        "max_new_tokens": 20,
        "pad_token_id": PAD,
        "eos_token_id": words(model, 1)[6],
        "repetition_penalty": 1.4,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = model.generate(**ragged(3), **settings)
    found = model.generate(**ragged(3), **settings, **DRAFT)
    assert type(found) is type(expected)
    assert found.sequences.tolist() == expected.sequences.tolist()
    stops = (found.sequences[:, 9:] == settings["eos_token_id"]).int()
    ended = (stops.cumsum(-1) - stops > 0).T  # after the end-of-sequence token
    assert bool(ended.any())
    for name in ("scores", "logits"):
        ours, wanted = torch.stack(found[name]), torch.stack(expected[name])
        assert ours.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(ours[~ended], wanted[~ended])
        assert not bool(ours[ended].any())
    assert not torch.equal(torch.stack(found.scores), torch.stack(found.logits))
    assert found.past_key_values is None
    ours = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    wanted = model.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(ours[~ended.T], wanted[~ended.T])


def test_logits_are_raw_though_a_processor_works_in_place(model: Any) -> None:
    """In transformers such a processor changes the logits that are returned; ours are the model's own."""

    class Copying(Alternate):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return super().__call__(input_ids, scores.clone())

    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**ragged(1), **settings, logits_processor=[Copying()])
    found = model.generate(**ragged(1), **settings, **DRAFT, logits_processor=[Alternate()])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert found.scores is None


def test_scores_are_the_targets_for_copied_drafts_too(model: Any, rounds: list[Round]) -> None:
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**ragged(1), **settings)
    found = model.generate(**ragged(1), **settings, custom_generate=hf.generate, draft=Lookup())
    assert accepted(rounds)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores))
    assert found.logits is None


class Recorder:
    """A streamer that notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append((value.device.type, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


def test_streamers_get_what_transformers_gives_them(model: Any) -> None:
    settings = {"max_new_tokens": 24, "pad_token_id": PAD, "eos_token_id": words(model)[6]}
    for rows in (1, 3):
        plain, drafted = Recorder(), Recorder()
        model.generate(**ragged(rows), **settings, streamer=plain)
        model.generate(**ragged(rows), **settings, streamer=drafted, **DRAFT)
        assert drafted.calls == plain.calls
        assert drafted.calls[-1] == "end"

        def wrapped(model: Any, input_ids: Tensor, **rest: Any) -> Any:
            return hf.generate(model, input_ids, draft=Lookup(), **rest)

        drafted = Recorder()
        model.generate(**ragged(rows), **settings, streamer=drafted, custom_generate=wrapped)
        assert drafted.calls == plain.calls


def test_a_streamer_in_a_thread_ends(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**ragged(1), **DRAFT, "streamer": streamer, "max_new_tokens": 15}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(words(model, rows=1)[:15])


def test_threads_may_share_a_model(model: Any) -> None:
    expected = [model.generate(**ragged(1, seed=seed), max_new_tokens=10 * seed).tolist() for seed in (1, 2, 3, 4)]
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        found[seed] = model.generate(**ragged(1, seed=seed), **DRAFT, max_new_tokens=10 * seed).tolist()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in (1, 2, 3, 4)] == expected


# -- sampling


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean."""
    expected = law * counts.sum()
    assert not bool(counts[law == 0].any()), "a sequence of probability 0 came up"
    cells, rest = expected >= 5, expected[expected < 5].sum()
    statistic = float(((counts - expected) ** 2 / expected)[cells].sum())
    if rest > 5:
        statistic += float((counts[~cells].sum() - rest) ** 2 / rest)
    freedom = int(cells.sum()) - 1 + int(rest > 5)
    return (statistic - freedom) / (2 * freedom) ** 0.5


WARPED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({"top_k": 0}, []),
    "warped": (
        {"repetition_penalty": 3.0, "temperature": 1.3, "top_k": 4, "top_p": 0.9},
        [
            theirs.RepetitionPenaltyLogitsProcessor(3.0),
            theirs.TemperatureLogitsWarper(1.3),
            theirs.TopKLogitsWarper(4),
            theirs.TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPED)
@pytest.mark.parametrize("draft", ["early-exit", "lookup"])
def test_sampled_text_has_the_law_of_transformers(name: str, draft: str, rounds: list[Round]) -> None:
    """Three tokens over five symbols: every sequence is enumerated, with transformers' forward and processors."""
    symbols, length, rows, calls = 5, 3, 200, 5
    model = build(vocab_size=symbols)
    settings, processors = WARPED[name]
    prompt = torch.tensor([[3, 1, 3]])

    law = torch.ones(1)
    ids = prompt
    for _ in range(length):
        with torch.no_grad():
            logits = model(ids).logits[:, -1].float()
        step = LogitsProcessorList(processors)(ids, logits).softmax(-1)
        law = (law[:, None] * step).flatten()
        ids = torch.cat((ids.repeat_interleave(symbols, 0), torch.arange(symbols).repeat(len(ids))[:, None]), 1)

    drafted: dict[str, Any] = (
        {"draft_exit": 1, "draft_tokens": 2}
        if draft == "early-exit"
        else {"draft": Lookup(tokens=2, predicted=model.generate(prompt, max_new_tokens=length)[0, -length:].tolist())}
    )
    counts = torch.zeros(symbols**length)
    torch.manual_seed(11)
    for _ in range(calls):
        out = model.generate(
            prompt, custom_generate=hf.generate, do_sample=True, num_return_sequences=rows, max_new_tokens=length,
            **settings, **drafted,
        )  # fmt: skip
        index = (out[:, -length:] * torch.tensor([symbols**2, symbols, 1])).sum(-1)
        counts += index.bincount(minlength=symbols**length)
    drafts = sum(len(done.drafted) for done in rounds)
    assert 0.05 * drafts < accepted(rounds) < 0.95 * drafts
    assert chi_square(counts, law) < 4


def test_sampling_repeats_under_manual_seed(model: Any) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        out: Tensor = model.generate(**ragged(3), **DRAFT, do_sample=True, max_new_tokens=16, pad_token_id=PAD)
        return out.tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    torch.manual_seed(1)
    first = model.generate(**ragged(3), **DRAFT, do_sample=True, max_new_tokens=16, pad_token_id=PAD)
    second = model.generate(**ragged(3), **DRAFT, do_sample=True, max_new_tokens=16, pad_token_id=PAD)
    assert first.tolist() == sample(1)
    assert second.tolist() != first.tolist()
    same_prompts = {"input_ids": ragged(1)["input_ids"].repeat(4, 1)}
    out = model.generate(**same_prompts, **DRAFT, do_sample=True, max_new_tokens=16)
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_greedy_decoding_draws_nothing(model: Any) -> None:
    state = torch.get_rng_state()
    model.generate(**ragged(2), **DRAFT, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_processors_may_keep_what_they_compute(model: Any) -> None:
    """What a processor keeps is an ordinary tensor, usable with gradients afterwards."""

    class Keeper(LogitsProcessor):
        kept: Tensor

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.kept = scores + 1
            return scores

    keeper = Keeper()
    model.generate(**ragged(1), **DRAFT, max_new_tokens=4, logits_processor=[keeper])
    assert not keeper.kept.is_inference()
    out = model.generate(**ragged(1), **DRAFT, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    assert not out.sequences.is_inference()
    assert not out.logits[0].is_inference()


# -- the weights


def test_weights_are_shared_and_changes_in_place_are_seen() -> None:
    model = build()
    decoder = hf.decoder_for(model)
    ours = {parameter.data_ptr() for parameter in decoder.parameters()}
    assert ours == {parameter.data_ptr() for parameter in model.parameters()}
    before = same(model, ragged(2))
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(-2)
    assert hf.decoder_for(model) is decoder
    assert same(model, ragged(2)).tolist() != before.tolist()


def test_the_decoder_is_built_anew_for_replaced_and_cast_weights() -> None:
    model = build()
    decoder = hf.decoder_for(model)
    weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(-weight.detach())
    replaced = hf.decoder_for(model)
    assert replaced is not decoder
    same(model, ragged(2))
    model.float()
    assert hf.decoder_for(model) is not replaced
    assert hf.decoder_for(model).dtype == torch.float32
    same(model, ragged(2))


def test_the_decoder_lives_as_long_as_the_model() -> None:
    model = build()
    decoder = weakref.ref(hf.decoder_for(model))
    model.generate(**ragged(1), **DRAFT, max_new_tokens=4)
    assert decoder() is not None
    del model
    gc.collect()
    assert decoder() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = build(dtype=torch.float64)
    inverse = copy.deepcopy(model.model.rotary_emb)
    model.to(dtype).model.rotary_emb = inverse  # as from_pretrained(dtype=...) leaves it
    drafted = {**DRAFT, "draft_exit": 1}
    assert same(model, ragged(1), drafted=drafted, max_new_tokens=8).dtype == torch.long


def test_the_model_is_left_as_it_was_and_is_not_run(model: Any) -> None:
    config, parameters = model.config.to_dict(), list(model.parameters())
    before = model.generate(**ragged(2), max_new_tokens=8, pad_token_id=PAD)
    hf.decoder_for(model)
    ran: list[nn.Module] = []
    modules = set(model.modules())
    handle = register_module_forward_hook(lambda module, args, out: ran.append(module) if module in modules else None)
    try:
        model.generate(**ragged(2), **DRAFT, max_new_tokens=8, pad_token_id=PAD)
    finally:
        handle.remove()
    assert not ran
    assert model.config.to_dict() == config
    assert model.config.num_hidden_layers == LAYERS
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.generate(**ragged(2), max_new_tokens=8, pad_token_id=PAD)
    assert after.tolist() == before.tolist()


def test_settings_about_transformers_own_loop_do_nothing(model: Any) -> None:
    expected = model.generate(**ragged(2), max_new_tokens=8, pad_token_id=PAD)
    for settings in ({"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        found = model.generate(**ragged(2), **DRAFT, max_new_tokens=8, pad_token_id=PAD, **settings)
        assert found.tolist() == expected.tolist()


def test_training_mode_and_harmless_hooks_are_served() -> None:
    model = build()
    model.enable_input_require_grads()  # a hook of transformers
    model(**ragged(1), output_hidden_states=True)  # installs transformers' recording hooks
    model.forward = torch.compile(model.forward, backend="eager")
    model.train()
    found = model.generate(**ragged(1), **DRAFT, max_new_tokens=8)
    assert found.tolist() == build().generate(**ragged(1), max_new_tokens=8).tolist()


# -- what is refused


def refused(message: str, model: Any, prompts: dict[str, Any] | None = None, **settings: Any) -> None:
    prompts = ragged(2) if prompts is None else prompts
    settings = {"max_new_tokens": 4, "pad_token_id": PAD, **DRAFT, **settings}
    with pytest.raises(RequestError, match=message) as caught:
        model.generate(**prompts, **settings)
    assert "\n" not in str(caught.value)


class Stand(nn.Module):
    """A stand-in of another class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


SETTINGS: dict[str, dict[str, Any]] = {
    "beam_search is not served; .* num_beams 3": {"num_beams": 3},
    "beam_sample is not served; .* num_beams 2": {"num_beams": 2, "do_sample": True},
    "contrastive_search is not served; .* penalty_alpha 0.6": {"penalty_alpha": 0.6, "top_k": 4},
    "assisted_generation is not served; .* prompt_lookup_num_tokens 3": {"prompt_lookup_num_tokens": 3},
    "assisted_generation is not served; .* assistant_early_exit 2": {"assistant_early_exit": 2},
    "dola_generation is not served; .* dola_layers high": {"dola_layers": "high"},
    "UnbatchedClassifierFreeGuidanceLogitsProcessor is not served: .*guidance_scale": {"guidance_scale": 1.5},
    "SynthIDTextWatermarkLogitsProcessor is not served": {
        "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])
    },
    "ClassifierFreeGuidanceLogitsProcessor is not served: it needs two rows": {
        "logits_processor": [theirs.ClassifierFreeGuidanceLogitsProcessor(2.0)]
    },
    "WhisperNoSpeechDetection is not served": {"logits_processor": [theirs.WhisperNoSpeechDetection(3, 1)]},
    "DiaClassifierFreeGuidanceLogitsProcessor is not served": {
        "logits_processor": [theirs.DiaClassifierFreeGuidanceLogitsProcessor(2.0)]
    },
    "DiaEOSChannelFilterLogitsProcessor is not served": {
        "logits_processor": [theirs.DiaEOSChannelFilterLogitsProcessor(2, 3)]
    },
    "DiaEOSDelayPatternLogitsProcessor is not served: it counts": {
        "logits_processor": [theirs.DiaEOSDelayPatternLogitsProcessor([0, 1], 3, 20)]
    },
    "cache_implementation 'quantized' is not served": {"cache_implementation": "quantized"},
    "cache_implementation 'offloaded' is not served": {"cache_implementation": "offloaded"},
    "output_attentions is not served, because": {"output_attentions": True},
    "output_hidden_states is not served, because": {"output_hidden_states": True, "return_dict_in_generate": True},
    "synced_gpus is not served": {"synced_gpus": True},
    "draft exit 4 is not below the 4 layers .* use 1..3": {"draft_exit": 4},
    "draft exit 0 is not possible": {"draft_exit": 0},
    "draft_exit 1.5 is not possible; use a whole number": {"draft_exit": 1.5},
    "draft_tokens True is not possible": {"draft_tokens": True},
    "drafting 0 tokens": {"draft_tokens": 0},
    "confidence 2.0 is not allowed": {"draft_confidence": 2.0},
    "draft_tokens needs draft_exit": {"draft_exit": None},
    "draft and draft_exit exclude each other": {"draft": Lookup()},
    "draft 'lookup' is not a drafter": {"draft": "lookup", "draft_exit": None, "draft_tokens": None},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_are_refused_by_name(model: Any, message: str) -> None:
    changes = SETTINGS[message]
    if "quantized" in message:  # transformers itself asks for a package before it calls us
        config = GenerationConfig(**changes)
        with pytest.raises(RequestError, match=message):
            asked.check_settings(config, synced=False)
        return
    refused(message, model, **copy.deepcopy(changes))


def test_assistants_of_transformers_are_refused(model: Any) -> None:
    refused(
        "assistant_model is not used here; .*draft_exit", model, ragged(1), assistant_model=build(num_hidden_layers=1)
    )


def test_prompts_are_refused_by_name(model: Any) -> None:
    ids, mask = ragged(2).values()
    refused("padding on the right", model, {"input_ids": ids, "attention_mask": mask.flip(1)})
    refused("position_ids do not count", model, {**ragged(2), "position_ids": torch.arange(9).repeat(2, 1)})
    refused("inputs_embeds is not served", model, {"inputs_embeds": model.get_input_embeddings()(ids)})
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    refused("past_key_values is not served", model, {"input_ids": ids, "past_key_values": cache})
    with pytest.raises(ValueError, match="must be 2D"):  # transformers' own
        model.generate(ids, attention_mask=torch.ones(2, 1, 9, 9), **DRAFT, max_new_tokens=2)
    four = {"attention_mask": torch.ones(2, 1, 9, 9)}
    with pytest.raises(RequestError, match=r"attention_mask has shape \(2, 1, 9, 9\); use \(2, 9\)"):
        asked.prompts(ids, four, windows=False)
    with pytest.raises(RequestError, match="the prompt has no tokens"):
        asked.prompts(ids[:, :0], {}, windows=False)
    with pytest.raises(RequestError, match="token_type_ids is not served"):
        asked.prompts(ids, {"token_type_ids": ids}, windows=False)
    gaps = torch.ones_like(ids)
    gaps[0, 3] = 0
    refused("attention_mask has gaps", build("mistral"), {"input_ids": ids, "attention_mask": gaps})
    same(model, {"input_ids": ids, "attention_mask": gaps})


def test_rows_that_end_need_a_pad(model: Any) -> None:
    from transformers import EosTokenCriteria

    refused("set pad_token_id", model, pad_token_id=None, stopping_criteria=[EosTokenCriteria([3])])


def test_dynamic_rope_ends_at_the_context() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(max_position_embeddings=16, rope_parameters=rope)
    same(model, ragged(2), max_new_tokens=7)
    refused("prompt and new tokens may come to 17, and past 16 dynamic rope", model, max_new_tokens=8)


def break_module(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = Stand(model.model.layers[1].mlp.up_proj)


def break_forward(model: Any) -> None:
    layer = model.model.layers[2]
    layer.forward = functools.partial(type(layer).forward, layer)


def break_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, out: out)


def break_pre_hook(model: Any) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, args: None)


def break_dropout(model: Any) -> None:
    model.config.attention_dropout = 0.1
    model.train()


def break_meta(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"))


def break_dtype(model: Any) -> None:
    model.model.layers[1].float()


def break_tensor(model: Any) -> None:
    class Packed(nn.Parameter):
        pass

    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = Packed(weight.detach())


def break_rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq.bfloat16())


def break_integers(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def break_quantization(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "none"}


def break_layers(model: Any) -> None:
    model.config.num_hidden_layers = 3


def break_activation(model: Any) -> None:
    model.config.hidden_act = "mish"


BROKEN: dict[str, Callable[[Any], None]] = {
    "model.layers.1.mlp.up_proj is a Stand, which no plain llama model has; merge adapters": break_module,
    "the forward of model.layers.2 was replaced": break_forward,
    "model.layers.0 has a forward hook, break_hook": break_hook,
    "model.norm has a forward hook, break_pre_hook": break_pre_hook,
    "the model is training, with attention_dropout 0.1": break_dropout,
    "model.layers.1.mlp.up_proj.weight is on the meta device": break_meta,
    "several dtypes: torch.float32, torch.float64": break_dtype,
    "model.layers.1.mlp.up_proj.weight is a Packed": break_tensor,
    "model.layers.1.mlp.up_proj.weight is torch.int8": break_integers,
    "rotary frequencies differ": break_rope,
    "quantised .quantization_config": break_quantization,
    "cannot be decoded here: .*have no place": break_layers,
    "hidden_act 'mish' is not supported": break_activation,
}


@pytest.mark.parametrize("message", BROKEN)
def test_models_are_refused_by_name(message: str) -> None:
    model = build()
    BROKEN[message](model)
    # straight to us: some of these transformers would not even prepare for
    with pytest.raises(RequestError, match=message) as caught:
        hf.decoder_for(model)
    assert "\n" not in str(caught.value)


def test_rounded_frequencies_are_refused_and_from_pretrained_rounds_none(tmp_path: Any) -> None:
    refused("rotary frequencies differ from its config's.*from_pretrained", build().to(torch.bfloat16))
    build().save_pretrained(tmp_path)
    hf.decoder_for(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_several_devices_are_refused() -> None:
    tensors = {"a": torch.zeros(1), "b": torch.zeros(1)}
    served._check_tensors(tensors)

    class Elsewhere:
        dtype, is_meta, device = torch.float32, False, "cuda:1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "Tensor", Elsewhere)
        tensors["b"] = Elsewhere()  # type: ignore[assignment]
        tensors["a"] = nn.Parameter(tensors["a"])
        with pytest.raises(RequestError, match="several devices: cpu, cuda:1"):
            served._check_tensors(tensors)


def test_other_architectures_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=8, n_layer=2, n_head=2))
    refused("model_type 'gpt2' is not supported; use llama, mistral, qwen2, qwen3", gpt2, draft_exit=1)
    small = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
    refused("t5 is an encoder-decoder; use a decoder of type llama, mistral", t5)


def test_a_model_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = build()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    refused("q_proj is a Linear, which no plain llama model has; merge adapters", adapted)
    same(adapted.merge_and_unload(), ragged(2))


def test_subclasses_with_the_same_forward_are_served() -> None:
    class Mine(LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    mine = Mine(LlamaConfig(**SIZES)).double().eval()
    same(mine, ragged(2), max_new_tokens=6)


def test_nan_logits_are_an_error() -> None:
    from layerskip import NumericalError

    model = build()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="layer 2"):
        model.generate(**ragged(2), **DRAFT, max_new_tokens=4, pad_token_id=PAD)


def test_importing_layerskip_does_not_import_this() -> None:
    import subprocess
    import sys

    code = "import sys, layerskip; print('layerskip.hf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_auto_gives_the_text_of_transformers(model: Any) -> None:
    ids = torch.tensor([[5, 9, 4, 7]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    found = model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=hf.generate, draft="auto")
    assert found.tolist() == expected.tolist()
    with pytest.raises(RequestError, match="draft 'autom' is not a drafter; use draft_exit, 'auto', or one such as"):
        model.generate(ids, custom_generate=hf.generate, draft="autom")
