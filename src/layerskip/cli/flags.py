"""Options that several commands share, as dataclasses: their help, and what they mean.

A command takes a group as one parameter; `spread` turns it into the options of its fields. Every field's default is
what the command line shows. Ranges are checked where the values are used, so messages are the library's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from layerskip.cli.boundary import remember_debug
from layerskip.errors import RequestError, check_exit, suggest

if TYPE_CHECKING:
    from layerskip.decode.sampling import Sampling
    from layerskip.llm import LLM

_model = partial(Option, rich_help_panel="Model")
_sampling = partial(Option, rich_help_panel="Sampling")
_end = partial(Option, rich_help_panel="Ending")
_show = partial(Option, rich_help_panel="Showing")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer reads it: every parameter that is a dataclass becomes options, one for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if not is_dataclass(hint):
            parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = hint
        options = get_type_hints(hint, include_extras=True)
        for f in fields(hint):
            parameters.append(
                inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=_default(f), annotation=options[f.name])
            )

    def spread_command(**values: Any) -> None:
        built = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**values, **built)

    spread_command.__name__, spread_command.__doc__ = command.__name__, command.__doc__
    spread_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
    return spread_command


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


@dataclass(frozen=True)
class ModelFlags:
    """Which checkpoint, and how it is held."""

    model: Annotated[
        str | None,
        _model(
            "--model",
            "-m",
            metavar="PATH_OR_ID",
            help="Checkpoint folder or hub id; without it, the parser in the package.",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[
        str,
        _model(help="How weights are held: auto (as in the checkpoint), float64, float32, bfloat16, float16."),
    ] = "auto"
    weights: Annotated[
        str,
        _model(
            help="How weights are stored: auto (the fastest lossless), plain, packed (oneDNN), native (own kernels); "
            "or int8, int4: quantised, lossy against the checkpoint."
        ),
    ] = "auto"
    compiled: Annotated[
        bool,
        _model(
            "--compile",
            help="Run plain weights as graphs of torch.compile, each compiled when it is first needed: for what the "
            "kernels do not serve, such as GPUs.",
        ),
    ] = False
    row_invariant: Annotated[
        bool,
        _model(
            "--row-invariant",
            help="Only with weights (native, int8, int4) whose drafted text is plain text to the bit, in bfloat16 too.",
        ),
    ] = False
    device: Annotated[str, _model(help="auto (a GPU where there is one), cpu, cuda.")] = "auto"
    revision: Annotated[str | None, _model(help="Branch, tag or commit of a hub id.")] = None

    def load(self) -> LLM:
        """The model and its tokenizer. Raises what `layerskip.load` raises."""
        import typer

        from layerskip.llm import load
        from layerskip.model.native import build
        from layerskip.model.pack import KERNELS, no_kernels

        if self.weights in ("auto", *KERNELS) and not self.compiled and build.is_due():
            typer.echo("building the kernels for this processor, once; ten to twenty seconds ...", err=True)
        llm = load(
            self.model,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            weights=self.weights,
            compile=self.compiled,
            row_invariant=self.row_invariant,
        )
        here = llm.decoder
        if here.quantised:
            line = f"{here.layout} weights are quantised: lossy against the checkpoint; drafts are exact for them"
            why = no_kernels(here.shape, here.dtype, here.device) if here.layout != self.weights else None
            typer.echo(line + (f"; computed by torch, slowly: {why}" if why else ""), err=True)
        if self.row_invariant:
            typer.echo(f"row-invariant: {here.layout} weights are so by themselves, at no price", err=True)
        if self.compiled:
            typer.echo("graphs are compiled as they are first needed, each for some seconds to a minute", err=True)
        return llm


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen. The fields are those of `Sampling`."""

    temperature: Annotated[float, _sampling(help="0 is greedy.")] = 0.0
    top_k: Annotated[int, _sampling(help="Keep the k likeliest tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, _sampling(help="Keep the likeliest tokens that reach this probability.")] = 1.0
    min_p: Annotated[float, _sampling(help="Drop tokens below this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[float, _sampling(help="Above 1: tokens already there become less likely.")] = 1.0
    presence_penalty: Annotated[float, _sampling(help="Off the logit of a token already there.")] = 0.0
    frequency_penalty: Annotated[float, _sampling(help="The same for each time it is there.")] = 0.0
    logit_bias: Annotated[
        list[str],
        _sampling(
            metavar="TOKEN=VALUE",
            help="Added to a token's logit (id, or as the vocabulary spells it); repeatable.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    ban: Annotated[
        list[str],
        _sampling(metavar="TOKEN", help="A token never produced; repeatable.", show_default=False),
    ] = field(default_factory=list)
    seed: Annotated[int | None, _sampling(help="Makes sampled text repeatable.", show_default=False)] = None

    def sampling(self, llm: LLM) -> Sampling:
        """The same for the library. Raises RequestError for values out of range and tokens the vocabulary has not."""
        from layerskip.decode.sampling import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(_bias(llm, words) for words in self.logit_bias),
            banned=[_token(llm, word) for word in self.ban],
            seed=self.seed,
        )


def _bias(llm: LLM, words: str) -> tuple[int, float]:
    token, sign, number = words.rpartition("=")  # a token may itself hold a "="
    try:
        value = float(number if sign else "")
    except ValueError as error:
        raise RequestError(f"--logit-bias {words} is not TOKEN=VALUE; write 42=-1.5, say") from error
    return _token(llm, token), value


def _token(llm: LLM, word: str) -> int:
    if word.isdecimal():
        return int(word)
    vocabulary = llm.tokenizer.get_vocab()
    if word not in vocabulary:
        hint = suggest(word, [token for token in vocabulary if word and word in token])
        raise RequestError(f"token {word!r} is not in the vocabulary; give its id, or its spelling there{hint}")
    return int(vocabulary[word])


@dataclass(frozen=True)
class EndFlags:
    """When a text ends. The fields are arguments of `LLM.stream`."""

    max_tokens: Annotated[int, _end(metavar="N", help="Tokens generated at most.")] = 256
    min_tokens: Annotated[int, _end(metavar="N", help="No end before so many.")] = 0
    stop: Annotated[
        list[str],
        _end(metavar="TEXT", help="A text that ends it, left out; repeatable.", show_default=False),
    ] = field(default_factory=list)
    ignore_eos: Annotated[bool, _end("--ignore-eos", help="Go on after end of sequence.")] = False


@dataclass(frozen=True)
class ShowFlags:
    """How results are shown."""

    no_color: Annotated[bool, _show("--no-color", help="Plain text on a terminal too; so does NO_COLOR.")] = False
    debug: Annotated[
        bool,
        _show("--debug", callback=remember_debug, is_eager=True, help="Show where an error comes from."),
    ] = False


def read_exits(words: str, *, layers: int) -> list[int]:
    """The exits that "all" or "2,4" mean, rising; the last layer where it is asked for. Raises RequestError."""
    if words == "all":
        return list(range(1, layers + 1))
    parts = words.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise RequestError(f"--exit {words} is not possible; use all, or numbers of layers such as 2,4")
    exits = sorted({int(part) for part in parts})
    for exit in exits:
        check_exit(exit, layers=layers)
    return exits
