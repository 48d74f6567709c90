"""The records of a folder as a page: what was measured beside what is aimed at.

    python -m benchmarks.table benchmarks/results

Knows the records of `side_by_side`, and the targets. Measures nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import OWN
from layerskip.evaluate.record import read

PAGE = "side-by-side.md"
SIZES = ("15m", "110m", "1.2b", "shipped")
ORDER = {name: i for i, name in enumerate(SIZES)}


@dataclass(frozen=True)
class Target:
    """A ratio of decode tokens/s that is aimed at.

    Args:
        ours: kind of our decoding: "plain", "early exit" (with a fixed number of tokens) or "auto".
        peer: against this engine.
        theirs: kind of its decoding.
        goals: (must, aim) by checkpoint; an aim that is missing is the must.
    """

    ours: str
    peer: str
    theirs: str
    goals: Mapping[str, tuple[float, ...]]

    @property
    def name(self) -> str:
        """The row's heading."""
        ours = "self-speculative" if self.ours == "early exit" else self.ours
        return f"{ours} / {'own' if self.peer == OWN else self.peer} {self.theirs}"


def _same(*goal: float) -> dict[str, tuple[float, ...]]:
    return dict.fromkeys(("15m", "110m", "1.2b"), goal)


def _sizes(*goals: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    return dict(zip(("15m", "110m", "1.2b"), goals, strict=True))


TARGETS = {
    "bfloat16": [
        Target("plain", "transformers", "plain", _sizes((2.6, 3.5), (1.9, 2.4), (2.4, 2.8))),
        Target("early exit", "transformers", "plain", _sizes((4, 6), (3, 4.2), (3.4, 4.8)) | {"shipped": (5, 8)}),
        Target("early exit", "transformers", "early exit", _sizes((2.5, 3.5), (2.6, 3.5), (2.6, 3.5))),
        Target("early exit", "llama.cpp", "plain", _sizes((0.9, 1.2), (1.25, 1.6), (1.2, 1.6))),
        Target("early exit", "openvino-genai", "plain", {"110m": (1.2, 1.6), "1.2b": (1.2, 1.5)}),
        Target("early exit", OWN, "plain", _sizes((1.6, 2), (1.6, 1.85), (1.45, 1.7)) | {"shipped": (1.9, 2.4)}),
        Target("auto", OWN, "early exit", _same(0.95, 1) | {"shipped": (0.95, 1)}),
    ],
    "float32": [
        Target("plain", "transformers", "plain", _same(2.3)),
        Target("early exit", "transformers", "plain", _same(3) | {"shipped": (5, 8)}),
        Target("early exit", "transformers", "early exit", {}),
        Target("early exit", "llama.cpp", "plain", {"110m": (0.9, 1.2)}),
        Target("early exit", "onnxruntime-genai", "plain", {"110m": (0.9, 1.2)}),
        Target("early exit", "openvino-genai", "plain", {}),
        Target("early exit", OWN, "plain", {"shipped": (1.9, 2.4)}),
    ],
}
TARGETS["int8"] = [
    Target("early exit", "llama.cpp", "plain", {"110m": (1, 1.3), "1.2b": (1, 1.3)}),
    Target("early exit", OWN, "plain", {}),
    Target("auto", OWN, "early exit", {}),
]
BANDWIDTH = {"bfloat16": {"110m": (0.4, 0.5), "1.2b": (0.75, 0.9)}}


def write_table(folder: Path) -> Path:
    """Writes side-by-side.md from every record of the folder."""
    records = [read(path) for path in sorted(folder.glob("side-by-side-*.json"))]
    records.sort(key=lambda record: (ORDER.get(record["model"]["name"], len(ORDER)), record["model"]["name"]))
    path = folder / PAGE
    path.write_text(page(records), encoding="utf-8")
    return path


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    lines = [
        "# Beside other engines",
        "",
        "Ratios of decode tokens/s (after the first tokens of each prompt), batch 1, greedy: the median over the "
        "rounds, with the least and the most of them; in brackets what must be reached and what is aimed at. Every "
        "ratio is of two ways in the same round, on the same prompts, with the same number of tokens. Self-speculation "
        "is exact, and with native weights its text is plain decoding's to the bit in bfloat16 too; another engine "
        "rounds otherwise, and a text that differs from some token on has its own tokens per round.",
    ]
    for dtype in TARGETS:
        of_dtype = [record for record in records if record["model"]["dtype"] == dtype]
        if of_dtype:
            lines += ["", f"## {dtype}", "", *_overview(of_dtype, dtype)]
    for record in records:
        lines += ["", *_details(record)]
    return "\n".join(lines) + "\n"


def _overview(records: Sequence[Mapping[str, Any]], dtype: str) -> list[str]:
    names = [record["model"]["name"] for record in records]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for target in TARGETS[dtype]:
        cells = [_cell(_found(record, target), target.goals.get(record["model"]["name"])) for record in records]
        lines.append(f"| {target.name} | " + " | ".join(cells) + " |")
    shares = [
        _cell(record["bandwidth_share"], BANDWIDTH.get(dtype, {}).get(record["model"]["name"])) for record in records
    ]
    lines.append("| plain: share of the memory bandwidth | " + " | ".join(shares) + " |")
    return lines


def _found(record: Mapping[str, Any], target: Target) -> Mapping[str, Any] | None:
    """The ratio that a target is about; None where the engine was skipped."""
    results = {result["name"]: result for result in record["results"]}
    for each in record["ratios"]:
        ours, theirs = results[each["of"]], results[each["against"]]
        if (ours["kind"], theirs["peer"], theirs["kind"]) == (target.ours, target.peer, target.theirs):
            found: Mapping[str, Any] = each["decode"]
            return found
    return None


def _cell(found: Mapping[str, Any] | None, goal: Sequence[float] | None) -> str:
    aim = "" if not goal else f" ({' / '.join(f'{value:g}' for value in goal)})"
    if found is None:
        return f"not measured{aim}"
    verdict = "" if not goal else " **below**" if found["median"] < goal[0] else " met"
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]{aim}{verdict}"


def _details(record: Mapping[str, Any]) -> list[str]:
    model, settings, machine = record["model"], record["settings"], record["machine"]
    asked = record["questions"]
    lines = [
        f"## {model['name']}, {model['dtype']}",
        "",
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers of width {model['width']}, vocabulary "
        f"{model['vocabulary']:,}; {len(record['rounds'])} of {settings['pairs']} rounds of {len(asked)} prompts of "
        f"{_range([one['prompt'] for one in asked])} tokens, continued by {_range([one['new'] for one in asked])}; "
        f"{settings['threads']} threads. Recommended exit {settings['exit']}.",
    ]
    if tried := [trial["draft"] for trial in record["trials"].get(OWN, ())]:
        exits, counts = (sorted({draft[part] for draft in tried}) for part in ("exit", "tokens"))
        lines.append(
            f"Our own fixed draft is the fastest of {len(tried)} that were tried: exits {', '.join(map(str, exits))}; "
            f"K = {', '.join(map(str, counts))}."
        )
    if record["controlled"]:
        made = record["controlled"]
        lines.append(
            f"Made to yield {made['wanted']['tokens_per_round']} tokens per round at K = "
            f"{made['wanted']['draft_tokens']}; counted in float32: {made['tokens_per_round']:.3f}."
        )
    lines += ["", "| | decode tokens/s | with the prompt | first token, ms | tokens per round | same text |"]
    lines.append("|---|---|---|---|---|---|")
    for result in record["results"]:
        rates = result["tokens_per_second"]
        cells = [
            _spread(rates["decode"], digits=1),
            _spread(rates["end_to_end"], digits=1),
            f"{result['time_to_first_token']['median'] * 1000:.1f}",
            f"{result['tokens_per_round']:.2f}",
            _identical(result),
        ]
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [_memory(peer, loaded, model) for peer, loaded in record["loaded"].items()]
    lines += [f"- {peer} skipped: {reason}" for peer, reason in record["skipped"].items()]
    lines += [
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + f"; commit {record['commit']}.",
        "",
        f"```\n{record['command']}\n```",
    ]
    return lines


def _memory(peer: str, loaded: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """A line on an engine's memory; what it has imported before it loads does not count."""
    before = loaded["memory"]["before"]["now"]
    end = loaded["memory"].get("end", loaded["memory"]["after"])
    most = "" if end["peak"] is None else f", at most {(end['peak'] - before) / 2**20:.0f}"
    return (
        f"- {peer}: loaded in {loaded['seconds']:.1f} s; {(end['now'] - before) / 2**20:.0f} MiB more than before it "
        f"loaded{most}; the weights of a step are {model['step_bytes'] / 2**20:.0f} MiB"
    )


def _spread(found: Mapping[str, Any], *, digits: int) -> str:
    return f"{found['median']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _identical(result: Mapping[str, Any]) -> str:
    if result["identical"] is None:
        return "-"
    if result["identical"]:
        return "yes"
    places = [place for place in result["differs_at"] if place is not None]
    total = len(result["differs_at"])
    return f"{total - len(places)} of {total}; first differs at token {min(places)}" if places else "not in every round"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


if __name__ == "__main__":
    print(f"wrote {write_table(Path(sys.argv[1]))}")
