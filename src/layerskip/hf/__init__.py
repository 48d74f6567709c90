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

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerskip.decode.draft import Drafter
from layerskip.errors import RequestError
from layerskip.hf import asked
from layerskip.hf import columns as loop
from layerskip.hf.models import decoder_for

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
    draft: Drafter | str | None = None,
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
        draft: a drafter in place of an early exit, such as `layerskip.Lookup()`, or "auto", which chooses by itself.
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
    kept_back = asked.kept_back(model)
    if kept_back["assistant_model"] is not None:
        raise RequestError("assistant_model is not used here; use draft_exit=... or draft=layerskip.Assistant(...)")
    asked.check_settings(generation_config, synced=bool(synced_gpus or kept_back["synced_gpus"]))
    asked.check_processors(logits_processor)
    drafter = asked.drafter(draft_exit, draft_tokens, draft_confidence, draft)
    decoder = decoder_for(model)
    if stop_strings is not None:
        stopping_criteria = StoppingCriteriaList([*stopping_criteria, asked.stop_criteria(stop_strings, tokenizer)])
    prompts = asked.prompts(input_ids, model_kwargs, windows=any(decoder.shape.windows))
    ends = loop.ends(stopping_criteria, generation_config, length=input_ids.shape[1], vocab=decoder.shape.vocab)
    report = generation_config.return_dict_in_generate
    scores = () if report and generation_config.output_scores else None
    logits = () if report and generation_config.output_logits else None
    rows = [
        loop.Row(
            padded=input_ids[b].long(),
            prompt=prompt,
            processors=LogitsProcessorList(loop.for_row(each, b, rows=len(prompts)) for each in logits_processor),
            ends=ends,
            keep=scores is not None or logits is not None,
        )
        for b, prompt in enumerate(prompts)
    ]
    columns = loop.Columns(
        batch=loop.batch(decoder, prompts, drafter, most=ends.most),
        rows=rows,
        ends=ends,
        criteria=stopping_criteria,
        streamer=kept_back["streamer"] if streamer is None else streamer,
        scores=scores,
        logits=logits,
    )
    sequences = columns.run(
        input_ids, loop.requests(rows, sample=bool(generation_config.do_sample), dtype=decoder.dtype)
    )
    if not report:
        return sequences
    output: Any = GenerateDecoderOnlyOutput  # annotated more narrowly than what transformers puts in
    result: GenerateDecoderOnlyOutput = output(sequences=sequences, scores=columns.scores, logits=columns.logits)
    return result
