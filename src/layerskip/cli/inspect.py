"""`layerskip inspect`: what a checkpoint is, what a token costs, how well each exit predicts a text, and what
quantising changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerskip.cli.flags import ModelFlags, ShowFlags
from layerskip.cli.generate import dtype_name, held
from layerskip.cli.material import UTTERANCES
from layerskip.cli.prompts import File, read_text, text_argument
from layerskip.cli.screen import Screen, write_json

if TYPE_CHECKING:
    from layerskip.decode.scoring import ExitScore
    from layerskip.evaluate.fidelity import Fidelity
    from layerskip.llm import LLM
    from layerskip.model.decoder import Decoder
    from layerskip.model.shape import Shape

SENTENCE = "Once upon a time, there was a little girl who loved to play outside with her friends."


def inspect(
    text: Annotated[str | None, text_argument("TEXT")] = None,
    *,
    file: File = None,
    model: ModelFlags,
    json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    show: ShowFlags,
) -> None:
    """Show a checkpoint: its shape, its size, and how well each exit predicts a text.

    Without a text the exits are scored on a short English sentence. With --weights int8 or int4 the model is also
    compared with its checkpoint, on the text; without one the parser in the package on frames of everyday requests.
    """
    given = read_text(text, file, what="text")
    llm = model.load()
    scored = SENTENCE if given is None else given
    costs, scores = Costs.of(llm.decoder), llm.score_exits(scored)
    lost = compared(llm, model, given) if llm.decoder.quantised else None
    if json:
        write_json({**record(llm, costs, scores), "quantised": None if lost is None else lost.record()})
        return
    screen = Screen(no_color=show.no_color)
    rows = [] if lost is None else [costs.bits_row(), *fidelity_rows(lost)]
    screen.table([("model", llm.name), *shape_rows(llm.decoder.shape), *costs.rows(held(llm)), *rows])
    parts = llm.decoder.shape.parameters()
    share: list[tuple[str, ...]] = [
        (part, f"{count:,}", f"{count / parts['total']:.1%}") for part, count in parts.items()
    ]
    screen.table(share, columns=("part", "parameters", "share"))
    layers = llm.decoder.shape.layers
    screen.table(exit_rows(scores), columns=("exit", "nats/token", "perplexity", f"agrees with exit {layers}"))
    screen.line(f"exits on {len(scores[0].logprobs) + 1} tokens: {_short(scored)!r}")
    if layers > 1:
        screen.line(f"decoding plainly at an exit below {layers} is lossy; drafting from one is exact")


def compared(llm: LLM, model: ModelFlags, text: str | None) -> Fidelity:
    """A quantised model beside its checkpoint."""
    from layerskip.evaluate.fidelity import fidelity

    checkpoint = replace(model, weights="auto").load()
    if text is not None or model.model is not None:
        return fidelity(llm, checkpoint, [llm.encode(SENTENCE if text is None else text)])
    with checkpoint.stream(UTTERANCES, max_tokens=64) as stream:
        for _ in stream:
            pass
    return fidelity(llm, checkpoint, [[*answer.prompt, *answer.tokens] for answer in stream.completions])


def fidelity_rows(lost: Fidelity) -> list[tuple[str, str]]:
    """What quantising changes, as a table."""
    return [
        ("beside the checkpoint", f"on {lost.tokens} tokens, {lost.agreement:.1%} of the likeliest are the same"),
        ("", f"{lost.loss:.4f} nats/token instead of {lost.checkpoint_loss:.4f}, perplexity x {lost.perplexity:.4f}"),
        ("", f"KL(checkpoint || quantised) {lost.divergence:.6f} nats"),
    ]


@dataclass(frozen=True)
class Costs:
    """Bytes.

    Args:
        weights: all parameters, a tied head once; quantised ones, and the embedding beside a tied head, as stored.
        read_per_token: what a step of plain decoding reads of them: layers, norms and head, one row of the embedding.
        cache_per_position: keys and values of a position in every layer; a step reads those of all before it too.
        bits_per_weight: of the linear layers.
    """

    weights: int
    read_per_token: int
    cache_per_position: int
    bits_per_weight: float

    @classmethod
    def of(cls, decoder: Decoder) -> Costs:
        """Counts them."""
        shape, size = decoder.shape, decoder.dtype.itemsize
        row, weights = shape.width * size, shape.parameters()["total"] * size
        embedding, cache = 0 if shape.tied else shape.vocab * row, shape.cache_bytes(1, 1, size)
        if not decoder.quantised:
            return cls(weights, weights - embedding + row, cache, 8.0 * size)
        from layerskip.model.pack import stored_bytes

        stored, table = stored_bytes(decoder), stored_bytes(decoder.embedding)
        norms = shape.parameters()["norms"]
        linear = 8 * (stored - table - norms * size)
        count = shape.parameters()["total"] - norms - shape.vocab * shape.width * (not shape.tied)
        return cls(stored, stored - table + row, cache, linear / count)

    def bits_row(self) -> tuple[str, str]:
        """Bits of a weight as a row."""
        return ("bits per weight", f"{self.bits_per_weight:.2f}, scales included, the embedding not")

    def rows(self, held: str) -> list[tuple[str, str]]:
        """The same as a table."""
        return [
            ("weights", f"{size(self.weights)} as {held}"),
            (
                "read per token",
                f"{size(self.read_per_token)} of weights, {size(self.cache_per_position)} per cached position",
            ),
        ]


def shape_rows(shape: Shape) -> list[tuple[str, str]]:
    """Sizes and switches as a table."""
    windows = [window for window in shape.windows if window is not None]
    rope = shape.rope.kind if shape.rope.factor == 1 else f"{shape.rope.kind}, factor {shape.rope.factor:g}"
    return [
        ("kind", shape.model_type),
        ("layers", str(shape.layers)),
        ("width", str(shape.width)),
        ("heads", f"{shape.heads} of width {shape.head_width}, {shape.kv_heads} for keys and values"),
        ("MLP", f"{shape.ffn_width} wide, {shape.activation}"),
        ("vocabulary", f"{shape.vocab} tokens, head {'tied to' if shape.tied else 'apart from'} the embedding"),
        ("rope", f"{rope}, theta {shape.rope.theta:g}"),
        ("context", f"{shape.context} tokens"),
        *([("sliding window", f"{max(windows)} tokens in {len(windows)} layers")] if windows else []),
    ]


def exit_rows(scores: Sequence[ExitScore]) -> list[tuple[str, ...]]:
    """One row for each exit."""
    return [(str(s.exit), f"{s.loss:.4f}", f"{s.perplexity:.2f}", f"{s.agreement(scores[-1]):.1%}") for s in scores]


def record(llm: LLM, costs: Costs, scores: Sequence[ExitScore]) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "model": llm.name,
        "dtype": dtype_name(llm),
        "layout": llm.decoder.layout,
        "device": str(llm.decoder.device),
        "shape": asdict(llm.decoder.shape),
        "parameters": llm.decoder.shape.parameters(),
        "bytes": asdict(costs),
        "text_tokens": len(scores[0].logprobs) + 1,
        "exits": [
            {"exit": s.exit, "loss": s.loss, "perplexity": s.perplexity, "agreement": s.agreement(scores[-1])}
            for s in scores
        ],
    }


def size(count: int) -> str:
    """Bytes in a unit that leaves few digits.

    Example:
        >>> size(1280), size(3 * 2**30)
        ('1.25 KiB', '3.00 GiB')
    """
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.2f} {unit}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
