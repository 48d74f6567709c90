"""The same task without a drafter: how much faster drafting was, and whether the text is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.cli.generate import Task
    from layerskip.decode.draft import Drafter
    from layerskip.evaluate.follow import Run


@dataclass(frozen=True)
class Comparison:
    """A drafted and a plain run of one task.

    Args:
        plain: the plain run.
        speedup: ratio of decode tokens/s; None where nothing was decoded.
        comparable: whether the same tokens are promised; tokens drawn from a drafter's law have the same law only.
        differs: per completion, the first token that differs, or None.
    """

    plain: Run
    speedup: float | None
    comparable: bool
    differs: list[int | None]

    def line(self) -> str:
        """The result in one line."""
        if self.plain.interrupted or self.speedup is None:
            return "speedup unknown: plain decoding was interrupted"
        return f"speedup {self.speedup:.2f}x over plain decoding (ratio of decode tokens/s); {self._texts()}"

    def _texts(self) -> str:
        if not self.comparable:
            return "same law, different draws"
        found = [(i, at) for i, at in enumerate(self.differs) if at is not None]
        if not found:
            return "identical"
        which = f" of completion {found[0][0] + 1}" if len(self.differs) > 1 else ""
        return f"differs at token {found[0][1]}{which}; layerskip verify tells whether that is a tie"

    def record(self) -> dict[str, Any]:
        """The same for JSON; identical is null where it is not promised."""
        same = all(at is None for at in self.differs) if self.comparable and not self.plain.interrupted else None
        return {
            "plain": self.plain.record(),
            "speedup": self.speedup,
            "speedup_of": "tokens_per_second.decode",
            "identical": same,
            "differs_at": self.differs,
        }


def compare_with_plain(task: Task, drafted: Run, drafter: Drafter | None) -> Comparison:
    """Decodes the task plainly and sets both side by side."""
    from layerskip.evaluate.contest import first_difference
    from layerskip.evaluate.follow import follow

    plain = follow(task.start(None))
    pairs = zip(drafted.completions, plain.completions, strict=True)
    return Comparison(
        plain,
        drafted.decode_rate / plain.decode_rate if plain.decode_rate else None,
        # copied tokens are chosen, not drawn, and those of auto are matched, so the target's own draws decide
        task.sampling.temperature == 0 or drafter is None or drafter.name in ("lookup", "auto"),
        [first_difference(a.tokens, b.tokens) for a, b in pairs],
    )
