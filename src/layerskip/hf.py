"""The bridge to transformers: `model.generate(..., custom_generate=layerskip.hf.generate, draft_exit=3)`.

Knows what transformers prepares for a decoding loop (prompts, processors, stopping criteria, streamers), and which of
its models can be decoded here. Knows no acceptance rule: it is a loop over `Batch`.

Two things make the outcome that of transformers' own loop. *Columns*: rows advance by rounds of their own, but what
they emit is released column by column, so that criteria, streamers and scores see the batch that transformers would
show them. *Padded coordinates*: processors and criteria get the padded prompt in front of the tokens; only the decoder
sees rows without padding.

Sizes: B rows, P tokens of the padded prompt, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import logits_process as theirs
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerskip.decode.batch import Batch
from layerskip.decode.draft import Drafter
from layerskip.decode.drafters import EarlyExit
from layerskip.decode.pool import Pool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Sampling
from layerskip.errors import CheckpointError, LayerSkipError, RequestError
from layerskip.model.decoder import Decoder
from layerskip.model.names import DTYPES, decoder_from_tensors
from layerskip.model.rope import cos_sin
from layerskip.model.shape import SUPPORTED, Shape

__all__ = ["decoder_for", "generate"]


def generate(  # the parameters are those with which transformers calls a decoding loop, and our options
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_exit: int | None = None,
    draft_tokens: int | None = None,
    draft_confidence: float | None = None,
    draft: Drafter | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Decodes a transformers model with drafts. Exact: greedily the tokens of `model.generate`, sampled its law.

    Pass it to `model.generate` as `custom_generate`, with the options `draft_*` beside the usual ones. The decoder
    shares the model's weights; the model itself is neither run nor changed. Settings that say how transformers' own
    loop is to run without changing the text (`use_cache`, a static cache, chunked prefill, compilation) do nothing
    here.

    A logits processor of your own must depend on its arguments only: it runs once per row and drafted prefix, on (1, n)
    ids and (1, V) scores, and may see prefixes beyond the end that a criterion other than end of sequence and length
    will set. Sampled text is repeatable under `torch.manual_seed`; it is not the text transformers draws with that
    seed.

    Args:
        model: a CausalLM of transformers, of a supported architecture.
        input_ids: (B, P), prepared by transformers, as the three that follow.
        logits_processor: applied to every drafted prefix; includes the warpers of sampling.
        stopping_criteria: evaluated after every column of tokens.
        generation_config: read for `do_sample`, the token that pads, and what is returned.
        draft_exit: draft with layers 0..draft_exit-1; None drafts with `draft`, or not at all.
        draft_tokens: the most tokens drafted in a round; None is 4. Needs `draft_exit`.
        draft_confidence: stop a draft after the first token less sure than this; None never does. Needs `draft_exit`.
        draft: a drafter in place of an early exit, such as `layerskip.Lookup()`.
        stop_strings: as in transformers; they need the tokenizer.
        tokenizer: for `stop_strings`. transformers 5.23 keeps it to itself, so bind it:
            `custom_generate=functools.partial(layerskip.hf.generate, tokenizer=tokenizer)`.
        streamer: pass it to `model.generate` as usual; it gets a column when every unfinished row has reached it.
        synced_gpus: must be False.
        model_kwargs: the attention mask and the positions that follow from it; anything else is refused.

    Returns:
        The padded sequences (B, n). With `return_dict_in_generate` an output that holds them and, where asked for,
        `scores` and `logits`, with zeros for rows that had ended; its cache is None.

    Raises:
        RequestError: an option, setting, processor or model that cannot be served; the message names it.
        CapacityError: the cache does not fit in memory.
        NumericalError: the model's logits are NaN.
    """
    kept_back = _kept_back(model)
    if kept_back["assistant_model"] is not None:
        raise RequestError("assistant_model is not used here; use draft_exit=... or draft=layerskip.Assistant(...)")
    _check_settings(generation_config, synced=bool(synced_gpus or kept_back["synced_gpus"]))
    _check_processors(logits_processor)
    drafter = _drafter(draft_exit, draft_tokens, draft_confidence, draft)
    decoder = decoder_for(model)
    if stop_strings is not None:
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, _stop_strings(stop_strings, tokenizer)])
    prompts = _prompts(input_ids, model_kwargs, windows=any(decoder.shape.windows))
    ends = _ends(stopping_criteria, generation_config, length=input_ids.shape[1], vocab=decoder.shape.vocab)
    report = generation_config.return_dict_in_generate
    scores = () if report and generation_config.output_scores else None
    logits = () if report and generation_config.output_logits else None
    rows = [
        _Row(
            padded=input_ids[b].long(),
            prompt=prompt,
            processors=LogitsProcessorList(_for_row(each, b, rows=len(prompts)) for each in logits_processor),
            ends=ends,
            keep=scores is not None or logits is not None,
        )
        for b, prompt in enumerate(prompts)
    ]
    columns = _Columns(
        batch=_batch(decoder, prompts, drafter, most=ends.most),
        rows=rows,
        ends=ends,
        criteria=stopping_criteria,
        streamer=kept_back["streamer"] if streamer is None else streamer,
        scores=scores,
        logits=logits,
    )
    sequences = columns.run(input_ids, _requests(rows, sample=bool(generation_config.do_sample), dtype=decoder.dtype))
    if not report:
        return sequences
    output: Any = GenerateDecoderOnlyOutput  # annotated more narrowly than what transformers puts in
    result: GenerateDecoderOnlyOutput = output(sequences=sequences, scores=columns.scores, logits=columns.logits)
    return result


def decoder_for(model: PreTrainedModel) -> Decoder:
    """The decoder of a loaded transformers model. It shares the weights: what changes them in place changes both.

    It is kept as long as the model lives, and built anew when parameters were replaced, moved or cast.

    Raises:
        RequestError: an architecture that is not supported, or a model whose numbers are not those of plain weights on
            one device: quantised, adapted, sharded, offloaded, hooked or patched.
    """
    shape = _shape(model)
    _check_modules(model)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    _check_tensors(tensors)
    marks = {name: (t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for name, t in tensors.items()}
    shared = _shared.get(model)
    if shared is None or (shared.shape, shared.marks) != (shape, marks):
        _check_rope(model, shape)
        try:
            shared = _Shared(shape, marks, decoder_from_tensors(shape, tensors))
        except CheckpointError as error:
            raise RequestError(f"this model cannot be decoded here: {error}") from error
        _shared[model] = shared
    return shared.decoder


@dataclass(frozen=True)
class _Shared:
    """A decoder over a model's weights, and what the model was like when it was built."""

    shape: Shape
    marks: Mapping[str, tuple[object, ...]]
    decoder: Decoder


_shared: WeakKeyDictionary[PreTrainedModel, _Shared] = WeakKeyDictionary()


# -- models that cannot be decoded


def _shape(model: PreTrainedModel) -> Shape:
    kind, allowed = str(model.config.model_type), ", ".join(SUPPORTED)
    if getattr(model.config, "is_encoder_decoder", False):
        raise RequestError(f"{kind} is an encoder-decoder; only decoders are drafted for: {allowed}")
    if kind not in SUPPORTED:
        raise RequestError(f"model_type {kind!r} is not supported; use {allowed}")
    config = model.config.to_dict()
    if config.get("quantization_config"):
        raise RequestError("the model is quantised (quantization_config); load the unquantised weights")
    try:
        return Shape.from_config(config, source="the model's config")
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def _check_modules(model: PreTrainedModel) -> None:
    """Refuses what would run in `model(...)` but not here: other layers, patched forwards, hooks, dropout."""
    kind = model.config.model_type
    trusted = (f"transformers.models.{kind}.modeling_{kind}", "transformers.activations")
    for name, module in model.named_modules():
        place, own = name or "the model", type(module).forward
        if own.__module__ not in trusted and not own.__module__.startswith("torch.nn.modules."):
            raise RequestError(
                f"{place} is a {type(module).__name__}, which no plain {kind} model has; merge adapters into the "
                "weights (merge_and_unload), and load without quantisation and patches"
            )
        # a compiled forward gives the numbers of the one it was made from
        forward = vars(module).get("forward")
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        if forward is not None and getattr(forward, "__func__", None) is not own:
            raise RequestError(
                f"the forward of {place} was replaced, as accelerate does to place or offload a model, and would not "
                "run here; load the whole model on one device, without patches"
            )
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if getattr(hook, "__module__", None) not in _HARMLESS_HOOKS:
                hook_name = getattr(hook, "__qualname__", type(hook).__name__)
                raise RequestError(f"{place} has a forward hook, {hook_name}, which would not run here; remove it")
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if model.training and dropout:
        raise RequestError(f"the model is training, with attention_dropout {dropout}; call model.eval() first")


# transformers' own: one records outputs, the other lets gradients through frozen embeddings
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not plain floating point tensors of one type on one device."""
    for name, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            raise RequestError(f"{name} is a {type(tensor).__name__}; load it whole and unquantised")
        if tensor.is_meta:
            raise RequestError(f"{name} is on the meta device: offloaded, or never loaded; load it on one device")
        if tensor.dtype not in DTYPES:
            raise RequestError(f"{name} is {tensor.dtype}; load the unquantised weights")
    for what, values in (
        ("devices", {str(tensor.device) for tensor in tensors.values()}),
        ("dtypes", {str(tensor.dtype) for tensor in tensors.values()}),
    ):
        if len(values) > 1:
            raise RequestError(f"the model's parameters have several {what}: {', '.join(sorted(values))}; use one")


def _check_rope(model: PreTrainedModel, shape: Shape) -> None:
    """Refuses rotary frequencies that differ from the config's: at position 1 the angle is the frequency."""
    one = torch.ones(1, dtype=torch.long, device=model.device)
    found = model.get_submodule("model.rotary_emb")(torch.zeros(1, device=model.device), one[None])
    wanted = cos_sin(shape.rope, shape.head_width, one)
    if not all(torch.allclose(a[0], b, rtol=0, atol=1e-6) for a, b in zip(found, wanted, strict=True)):
        raise RequestError(
            "the model's rotary frequencies differ from its config's: model.to(dtype) and model.half() round them; "
            "give the dtype to from_pretrained instead"
        )


# -- settings that cannot be served


def _check_settings(config: GenerationConfig, *, synced: bool) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        given = [f"{name} {value}" for name, off in _MODES.items() if (value := getattr(config, name)) not in off]
        raise RequestError(f"{mode.value} is not served; for greedy search or sampling leave out {', '.join(given)}")
    if config.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
        raise RequestError(f"cache_implementation {config.cache_implementation!r} is not served; leave it out")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise RequestError(f"{name} is not served, because the model's own layers are not run; leave it out")
    if synced:
        raise RequestError("synced_gpus is not served: a sharded model cannot be decoded here; leave it out")


# settings that ask for another mode, and the values that do not
_MODES: Mapping[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
}


def _check_processors(processors: Sequence[object]) -> None:
    for processor in processors:
        for refused, reason in _REFUSED.items():
            if isinstance(processor, refused):
                raise RequestError(
                    f"{type(processor).__name__} is not served: it {reason}; drafts need processors that depend on the "
                    "ids and scores of a row only"
                )


_REFUSED: Mapping[type, str] = {
    theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor: "runs the model with a cache of its own (guidance_scale)",
    theirs.ClassifierFreeGuidanceLogitsProcessor: "needs two rows of scores for every sequence",
    theirs.SynthIDTextWatermarkLogitsProcessor: "remembers the contexts of past calls",
    theirs.WhisperNoSpeechDetection: "runs a model and remembers what it said",
    theirs.DiaClassifierFreeGuidanceLogitsProcessor: "needs two rows of scores for every sequence",
    theirs.DiaEOSChannelFilterLogitsProcessor: "takes rows for channels of one sequence",
    theirs.DiaEOSDelayPatternLogitsProcessor: "counts its calls",
}


# -- what transformers prepared


def _kept_back(model: PreTrainedModel) -> Mapping[str, Any]:
    """What the `model.generate` that leads here was given and does not hand on.

    transformers 5.23 passes a callable neither `streamer` nor `assistant_model`: a reader of the streamer would wait
    for ever, the assistant would be ignored in silence. They are named parameters of `generate`, so its frame has them.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: None if frame is None else frame.f_locals.get(name) for name in names}


def _drafter(exit: int | None, tokens: int | None, confidence: float | None, draft: Drafter | None) -> Drafter | None:
    options = {"draft_exit": exit, "draft_tokens": tokens, "draft_confidence": confidence}
    given = [name for name, value in options.items() if value is not None]
    if draft is not None:
        if given:
            raise RequestError(f"draft and {given[0]} exclude each other; a drafter carries its own settings")
        if not callable(getattr(draft, "propose", None)):
            raise RequestError(f"draft {draft!r} is not a drafter; use draft_exit, or one such as layerskip.Lookup()")
        return draft
    if exit is None:
        if given:
            raise RequestError(f"{given[0]} needs draft_exit, the layers that draft")
        return None
    for name in ("draft_exit", "draft_tokens"):
        if name in given and type(options[name]) is not int:
            raise RequestError(f"{name} {options[name]!r} is not possible; use a whole number")
    return EarlyExit(exit, tokens=4 if tokens is None else tokens, confidence=confidence)


def _stop_strings(stop_strings: str | list[str], tokenizer: PreTrainedTokenizerBase | None) -> StopStringCriteria:
    if tokenizer is None:
        raise RequestError(
            "stop_strings need the tokenizer, which transformers does not hand to custom_generate; bind it with "
            "custom_generate=functools.partial(layerskip.hf.generate, tokenizer=tokenizer)"
        )
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)


def _prompts(input_ids: Tensor, given: Mapping[str, Any], *, windows: bool) -> list[list[int]]:
    """The prompt of each row without its padding.

    Args:
        input_ids: (B, P).
        given: the model's arguments as transformers prepared them.
        windows: whether a layer sees a sliding window, which gaps inside a prompt would shift.
    """
    for name, value in given.items():
        if value is None or name in ("attention_mask", "position_ids", "use_cache", "logits_to_keep"):
            continue
        if name == "past_key_values" and not getattr(value, "_is_user_defined", False):
            continue  # made by transformers for a loop of its own
        raise RequestError(f"{name} is not served; give the whole prompt as input_ids, and leave it out")
    if not input_ids.shape[1]:
        raise RequestError("the prompt has no tokens; give at least one")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise RequestError(f"attention_mask has shape {tuple(mask.shape)}; use {tuple(input_ids.shape)}")
        kept = (mask != 0).to(input_ids.device)
    if not bool(kept[:, -1].all()):
        raise RequestError("attention_mask ends in 0, so there is padding on the right; pad the prompts on the left")
    if windows and bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise RequestError("attention_mask has gaps, which would shift sliding windows; mask padding on the left only")
    usual = kept.long().cumsum(-1) - 1
    if positions is not None and bool((kept & (positions.to(usual.device) != usual)).any()):
        raise RequestError("position_ids do not count the tokens that attention_mask keeps; leave them out")
    return [ids[row].tolist() for ids, row in zip(input_ids, kept, strict=True)]


def _for_row(processor: Any, row: int, *, rows: int) -> Any:
    """A processor that treats one row alone as the given one treats it within the batch."""
    own = copy.copy(processor)
    if isinstance(processor, theirs.RepetitionPenaltyLogitsProcessor):
        if isinstance(processor.prompt_ignore_length, Tensor):
            own.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
        return own
    if isinstance(processor, theirs.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
        return own
    # the samples of a prompt lie side by side
    if isinstance(processor, theirs.EncoderRepetitionPenaltyLogitsProcessor):
        prompt = row * len(processor.encoder_input_ids) // rows
        own.encoder_input_ids = processor.encoder_input_ids[prompt : prompt + 1]
        return own
    if isinstance(processor, theirs.EncoderNoRepeatNGramLogitsProcessor):
        own.generated_ngrams = [processor.generated_ngrams[row * processor.batch_size // rows]]
        own.batch_size = 1
        return own
    return processor


@dataclass(frozen=True)
class _Ends:
    """Where rows end.

    Args:
        most: new tokens at most.
        eos: ids that end a row.
        pad: what fills a row that has ended while others go on. None: all go on until the last has ended, as in
            transformers where no criterion is about end of sequence.
    """

    most: int
    eos: tuple[int, ...]
    pad: int | None


def _ends(criteria: Sequence[Any], config: GenerationConfig, *, length: int, vocab: int) -> _Ends:
    """What the criteria say of prompts of `length` padded tokens; ids outside the vocabulary never come."""
    limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    eos = [id for c in criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist() if 0 <= id < vocab]
    pad = None
    if any(hasattr(c, "eos_token_id") for c in criteria):  # the condition of transformers
        if config._pad_token_tensor is None:
            raise RequestError("rows that end need a token to fill them; set pad_token_id")
        pad = int(config._pad_token_tensor)
    return _Ends(max(min(limits, default=config.max_length or 0) - length, 1), tuple(eos), pad)


# -- the loop


@dataclass(frozen=True)
class _Said:
    """What the model said after a prefix, (1, V) float32 each: raw, and as the processors left it."""

    logits: Tensor
    scores: Tensor


class _Row:
    """A row: its tokens, and transformers' processors in transformers' coordinates.

    Args:
        padded: (P,) the padded prompt.
        prompt: the same without padding, as the decoder sees it.
        processors: for this row alone.
        ends: where it ends.
        keep: keep what the model said before each token.
    """

    def __init__(
        self, *, padded: Tensor, prompt: list[int], processors: LogitsProcessorList, ends: _Ends, keep: bool
    ) -> None:
        self.padded, self.prompt, self.processors, self.ends, self.keep = padded, prompt, processors, ends, keep
        self.tokens: list[int] = []
        self.said: list[_Said] = []
        self.error: LayerSkipError | None = None  # why no more tokens come
        # in this round: drafted prefix -> what was said after it, last by the target; None where no text goes on
        self._after: dict[tuple[int, ...], _Said | None] = {}

    def process(self, ids: Tensor, logits: Tensor) -> Tensor:
        """A processor for `Sampling`: ids (n,) without padding, logits (V,) -> scores (V,)."""
        start = len(self.prompt)
        drafted = tuple(ids[start + len(self.tokens) :].tolist())
        if self._dead(drafted):
            self._after[drafted] = None
            return logits
        # out of inference mode, so that processors may keep what they compute
        with torch.inference_mode(False), torch.no_grad():
            known = torch.cat((self.padded, ids[start:].to(self.padded.device)))[None]
            raw = logits.to(device=self.padded.device, dtype=torch.float32, copy=True)[None]
            said = raw.clone() if self.keep else raw  # a processor may work in place
            scores = self.processors(known, raw)  # type: ignore[arg-type]  # they ask for LongTensor
        self._after[drafted] = _Said(said, scores)
        return scores[0].to(device=logits.device, dtype=logits.dtype)

    def _dead(self, drafted: tuple[int, ...]) -> bool:
        """Whether no text goes on after a drafted prefix: a draft may copy what is forbidden, or run past an end.

        transformers never shows a processor such a prefix, and one that follows a grammar may raise on it.
        """
        if not drafted:
            return False
        if drafted[-1] in self.ends.eos or len(self.tokens) + len(drafted) >= self.ends.most:
            return True
        before = self._after.get(drafted[:-1])
        if before is None:
            return drafted[:-1] in self._after
        return bool(before.scores[0, drafted[-1]].isneginf())

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes what a round emitted."""
        if self.keep:
            for i in range(len(tokens)):
                said = self._after[tuple(tokens[:i])]
                assert said is not None, "text goes on after a prefix that was emitted"
                self.said.append(said)
        self.tokens += tokens
        self._after.clear()


def _batch(decoder: Decoder, prompts: Sequence[Sequence[int]], drafter: Drafter | None, *, most: int) -> Batch:
    """An empty batch that the prompts may join, each with `most` new tokens."""
    slots = max(map(len, prompts)) + most
    own = copy.copy(decoder)  # the same weights; a table of positions of its own, so that threads do not share one
    rope = decoder.shape.rope
    if rope.kind == "dynamic" and slots > rope.original_context:
        raise RequestError(
            f"prompt and new tokens may come to {slots}, and past {rope.original_context} dynamic rope depends on how "
            "transformers cuts a text into calls; ask for fewer new tokens"
        )
    if slots > decoder.shape.context:
        own.shape = replace(decoder.shape, context=slots + 1)  # transformers goes on past the context, with a warning
    return Batch(own, Pool(own.cache(rows=1, slots=1)), drafter=drafter)  # the cache grows as rows join


def _requests(rows: Sequence[_Row], *, sample: bool, dtype: torch.dtype) -> list[Request]:
    """What the batch is asked for; seeds come from torch's default generator, and only where something is drawn."""
    seeds = torch.randint(2**63 - 1, (len(rows),)).tolist() if sample else [0] * len(rows)
    requests = []
    for row, seed in zip(rows, seeds, strict=True):
        # transformers chooses by scores in float32
        needed = row.processors or row.keep or dtype == torch.float64
        sampling = Sampling(temperature=float(sample), seed=seed, processors=(row.process,) if needed else ())
        requests.append(Request(row.prompt, max_tokens=row.ends.most, eos=row.ends.eos, sampling=sampling))
    return requests


@dataclass
class _Columns:
    """The rows' tokens, released column by column as transformers emits them.

    Args:
        batch: decodes the rows, each at its own pace.
        rows: what they emit.
        ends: where they end.
        criteria: see every column, and may end rows too.
        streamer: gets every column.
        scores: () collects the processed scores of every column, None does not.
        logits: the same for raw logits.
    """

    batch: Batch
    rows: Sequence[_Row]
    ends: _Ends
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    _decoding: dict[int, int] = field(default_factory=dict)  # key in the batch -> row

    def run(self, sequences: Tensor, requests: Sequence[Request]) -> Tensor:
        """Continues padded prompts (B, P) until every row has ended; returns (B, n)."""
        self._decoding = {key: b for b, key in enumerate(self.batch.join(requests))}
        unfinished = torch.ones(len(self.rows), dtype=torch.bool, device=sequences.device)
        for column in count():
            running = [self.ends.pad is None or on for on in unfinished.tolist()]
            self._decode(column, running)
            self._collect(column, running)
            tokens = [row.tokens[column] if on else self.ends.pad for row, on in zip(self.rows, running, strict=True)]
            emitted = torch.tensor(tokens, device=sequences.device)
            sequences = torch.cat((sequences, emitted[:, None]), 1)
            unfinished = unfinished & ~self.criteria(sequences, self.scores)
            if self.streamer is not None:
                self.streamer.put(emitted.cpu())
            if not bool(unfinished.any()):
                break
        if self.streamer is not None:
            self.streamer.end()
        return sequences

    def _decode(self, column: int, running: Sequence[bool]) -> None:
        """Runs rounds until every running row has a token for this column; rows that ended leave."""
        for key, b in list(self._decoding.items()):
            if not running[b]:
                self.batch.leave(key)
                del self._decoding[key]
        while short := [row for row, on in zip(self.rows, running, strict=True) if on and len(row.tokens) <= column]:
            for row in short:
                if row.error is not None:
                    raise row.error
            assert self._decoding, "a criterion ends every row that the batch has ended"
            for done in self.batch.round():
                row = self.rows[self._decoding[done.key]]
                row.extend(done.tokens)
                row.error = done.error
                if done.finish:
                    del self._decoding[done.key]

    def _collect(self, column: int, running: Sequence[bool]) -> None:
        """Adds a column (B, V) of scores and logits; zeros for rows that have ended."""
        if self.scores is None and self.logits is None:
            return
        said = [row.said[column] if on else None for row, on in zip(self.rows, running, strict=True)]
        none = torch.zeros_like(next(s for s in said if s is not None).logits)
        if self.scores is not None:
            self.scores += (torch.cat([none if s is None else s.scores for s in said]),)
        if self.logits is not None:
            self.logits += (torch.cat([none if s is None else s.logits for s in said]),)
