"""`layerskip generate`: continues a text, and says what drafting brought."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.compare import Comparison, compare_with_plain
from layerskip.cli.drafting import DraftFlags, account, draft_record, label
from layerskip.cli.flags import EndFlags, ModelFlags, SamplingFlags, ShowFlags
from layerskip.cli.prompts import File, read_text, text_argument
from layerskip.cli.screen import ACCEPTED, OWN, Screen, write_json
from layerskip.errors import RequestError

if TYPE_CHECKING:
    from layerskip.decode.draft import Drafter
    from layerskip.decode.logprobs import TokenLogprob
    from layerskip.decode.sampling import Sampling
    from layerskip.evaluate.follow import Run
    from layerskip.llm import LLM, Chunk, Completion, Stream


def generate(
    prompt: Annotated[str | None, text_argument("PROMPT")] = None,
    *,
    file: File = None,
    model: ModelFlags,
    draft: DraftFlags,
    exit: Annotated[
        int | None,
        typer.Option(metavar="E", help="Stop after E layers: plain early exit, lossy.", show_default=False),
    ] = None,
    sampling: SamplingFlags,
    end: EndFlags,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Completions of the prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json: log-probabilities and N alternatives.", show_default=False),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Then decode plainly too, and compare.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    show: ShowFlags,
) -> None:
    """Continue a text.

    Text goes to standard output, statistics to standard error.
    On a terminal accepted drafts are green, the full model's own tokens yellow.
    """
    text = read_text(prompt, file)
    if text is None:
        raise RequestError("no prompt: give a text, - for standard input, or --file")
    if logprobs is not None and not json:
        raise RequestError("log-probabilities are part of the JSON; add --json, or leave --logprobs out")
    llm = model.load()
    draft = draft.or_auto(llm) if exit is None else draft
    if compare and draft.draft == "none":
        raise RequestError("--compare sets a drafter against plain decoding; add --draft auto, say")
    from layerskip.evaluate.follow import follow

    task = Task(llm, llm.encode(text), exit, _seeded(sampling.sampling(llm)), end, n, logprobs)
    drafter = draft.drafter(llm)
    if compare:
        task.warm_up(drafter)
        account(drafter)  # what it chose there is nobody's business
    screen = Screen(no_color=show.no_color)
    words = label(draft.draft, drafter)
    if json:
        run = follow(task.start(drafter))
    else:
        run = show_run(task.start(drafter), screen, drafting=drafter is not None)
        screen.note(run.line(label=words, mode=task.mode) + _seed_note(sampling, task.sampling))
        if (chosen := account(drafter)) is not None:
            screen.note(chosen)
    comparison = compare_with_plain(task, run, drafter) if compare and not run.interrupted else None
    if json:
        write_json(task.record(run, draft_record(draft, drafter), comparison))
    elif comparison is not None:
        screen.note(comparison.plain.line(label="plain", mode=task.mode))
        screen.note(comparison.line())
    if run.interrupted or (comparison is not None and comparison.plain.interrupted):
        raise typer.Exit(130)


@dataclass(frozen=True)
class Task:
    """What is to be generated: everything but the drafter."""

    llm: LLM
    ids: list[int]
    exit: int | None
    sampling: Sampling
    end: EndFlags
    n: int
    logprobs: int | None

    def start(self, drafter: Drafter | None) -> Stream:
        """Begins, with nothing cached from before."""
        from layerskip.evaluate.follow import fresh

        return fresh(self.llm).stream(
            self.ids,
            draft=drafter,
            exit=self.exit,
            sampling=self.sampling,
            n=self.n,
            logprobs=self.logprobs,
            **asdict(self.end),
        )

    def warm_up(self, drafter: Drafter | None) -> None:
        """A few rounds of either kind, so that neither measurement pays for the first use of anything."""
        from layerskip.evaluate.follow import fresh

        self.start(drafter)  # refuses what cannot be served before anything is run
        for each in (drafter, None):
            fresh(self.llm).generate(self.ids[:1], draft=each, exit=self.exit, max_tokens=8, ignore_eos=True)

    @property
    def mode(self) -> str:
        """Exact or lossy, and how the weights are held."""
        layers = self.llm.decoder.shape.layers
        lossy = self.exit is not None and self.exit < layers
        return f"{f'lossy (exit {self.exit} of {layers})' if lossy else 'exact'}, {held(self.llm)}"

    def record(self, run: Run, draft: dict[str, Any] | None, comparison: Comparison | None) -> dict[str, Any]:
        """All of it, for JSON."""
        settings = {name: value for name, value in vars(self.sampling).items() if name != "processors"}
        return {
            "model": self.llm.name,
            "dtype": dtype_name(self.llm),
            "layout": self.llm.decoder.layout,
            "device": str(self.llm.decoder.device),
            "mode": run.completions[0].mode,
            "exit": self.exit or self.llm.decoder.shape.layers,
            "draft": draft,
            "settings": {**settings, **asdict(self.end), "n": self.n},
            "prompt_tokens": len(self.ids),
            "completions": [_completion(completion) for completion in run.completions],
            **run.record(),
            "compare": None if comparison is None else comparison.record(),
        }


def show_run(stream: Stream, screen: Screen, *, drafting: bool) -> Run:
    """Writes the text as it comes; several completions grow side by side, so they are written at the end."""
    from layerskip.evaluate.follow import follow

    several = len(stream.completions) > 1
    chunks: dict[int, list[Chunk]] = {}

    def see(chunk: Chunk) -> None:
        if several:
            chunks.setdefault(chunk.index, []).append(chunk)
        else:
            _write(chunk, screen, drafting)

    try:
        run = follow(stream, see)
    except Exception:
        screen.end_line()
        raise
    for i in range(len(run.completions) if several else 0):
        screen.line(f"--- {i + 1}/{len(run.completions)}", "dim")
        for chunk in chunks.get(i, []):
            _write(chunk, screen, drafting)
        screen.end_text()
    if not several:
        screen.end_text()
    return run


def _write(chunk: Chunk, screen: Screen, drafting: bool) -> None:
    screen.write(chunk.accepted_text, ACCEPTED)
    screen.write(chunk.text.removeprefix(chunk.accepted_text), OWN if drafting else None)


def _seeded(sampling: Sampling) -> Sampling:
    """A seed of its own where text is drawn, so that it can be told and the text repeated; short, as it is typed."""
    if sampling.temperature == 0 or sampling.seed is not None:
        return sampling
    from layerskip.decode.randomness import new_seed

    return replace(sampling, seed=new_seed() >> 31)


def _seed_note(given: SamplingFlags, used: Sampling) -> str:
    return f"; seed {used.seed}" if used.seed != given.seed else ""


def held(llm: LLM) -> str:
    """How its weights are held, for people."""
    from layerskip.model.quantise import note

    graphs = "" if llm.decoder.compiled is None else f", {llm.decoder.compiled}"
    return f"{dtype_name(llm)}, {llm.decoder.layout} weights{note(llm.decoder.layout)}{graphs}"


def dtype_name(llm: LLM) -> str:
    """float32 and the like."""
    return str(llm.decoder.dtype).removeprefix("torch.")


def _completion(completion: Completion) -> dict[str, Any]:
    logprobs = None if completion.logprobs is None else [_logprob(entry) for entry in completion.logprobs]
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "stop": completion.stop,
        "mode": completion.mode,
        "logprobs": logprobs,
        "acceptance": completion.acceptance.as_dict(),
    }


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, logprob in entry.top]
    return {"token": entry.token, "logprob": entry.logprob, "top": top}
