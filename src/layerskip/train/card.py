"""The model card: what a trained model is, from measured figures only.

Knows Markdown; is given every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SETTINGS = (
    "name",
    "dropout",
    "dropout_depth",
    "dropout_time",
    "curriculum",
    "rotation",
    "exit_scale",
    "distillation",
    "anchor",
    "hidden_dropout",
    "ema_decay",
    "muon",
)
"""The keys of a recipe that say how exits were trained."""


def card(
    *,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, float],
    measured: Mapping[str, Any] | None,
    licence: str | None,
    description: str,
) -> str:
    """A README.md with the front matter of the hub.

    Args:
        provenance: of the run, complete.
        metrics: of the last evaluation; may be empty.
        measured: what self-speculation got: `exit`, `draft_tokens` and `table`; None where it was not measured.
        licence: as the hub names it.
        description: the recipe's.
    """
    recipe = provenance["recipe"]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {licence}"] if licence else []
    front += ["tags:", "- layerskip", "- early-exit", "- self-speculative-decoding", "---"]
    sections = [
        "\n".join(front),
        f"# {recipe['name']}",
        description.strip() or "Trained with layer dropout and the early-exit loss (LayerSkip, Elhoushi et al., 2024).",
        _use(measured),
        _exits(metrics),
        _speculation(measured),
        _training(provenance),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(measured: Mapping[str, Any] | None) -> str:
    draft = " --draft early-exit" if measured and measured.get("exit") else ""
    return (
        "An ordinary transformers checkpoint. With layerskip its first layers draft and the rest verify: the same "
        f'text in fewer passes.\n\n```bash\nlayerskip generate "..." --model THIS_FOLDER{draft}\n```'
    )


def _exits(metrics: Mapping[str, float]) -> str:
    exits = sorted(int(name.rsplit("/", 1)[1]) for name in metrics if name.startswith("eval_exit_loss/"))
    if not exits:
        return ""
    lines = [
        "## Quality at every exit",
        "",
        "Per learnt token of the evaluation data, with the right tokens before it; agreement is with the last layer.",
        "",
        "| exit | loss | accuracy | agreement |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {exit} | {metrics[f'eval_exit_loss/{exit}']:.4f} | {metrics[f'eval_exit_accuracy/{exit}']:.2%} "
        f"| {metrics[f'eval_exit_agreement/{exit}']:.2%} |"
        for exit in exits
    ]
    return "\n".join(lines)


def _speculation(measured: Mapping[str, Any] | None) -> str:
    if not measured or not measured.get("table"):
        return ""
    table: Sequence[Mapping[str, float]] = measured["table"]
    lines = [
        "## Self-speculation",
        "",
        f"Greedy continuations of {measured['prompts']} evaluation prompts; exact: the text is that of plain decoding. "
        "Tokens per round: 1 + accepted / rounds.",
        "",
        "| exit | drafted per round | acceptance | tokens per round |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['exit']} | {row['draft_tokens']} | {row['acceptance']:.1%} | {row['tokens_per_round']:.2f} |"
        for row in table
    ]
    if measured.get("exit"):
        lines += ["", f"Recommended: exit {measured['exit']}, {measured['draft_tokens']} drafted tokens."]
    else:
        lines += ["", "By these figures plain decoding is faster: no setting is recommended."]
    return "\n".join(lines)


def _training(provenance: Mapping[str, Any]) -> str:
    recipe, run, versions = provenance["recipe"], provenance["run"], provenance["versions"]
    settings = ", ".join(f"{word} {recipe[word]}" for word in SETTINGS[1:] if word in recipe)
    return "\n".join(
        [
            "## Training",
            "",
            f"{run['steps']:,} steps, {run['passes']:.2f} passes over the data, {run['hours']:.2f} hours on "
            f"{provenance['processes']} process(es); {provenance['parameters']:,} parameters. "
            f"Recipe: {settings or 'plain'}.",
            "",
            f"torch {versions['torch']}, transformers {versions['transformers']}, layerskip {versions['layerskip']}. "
            "`provenance.json` has the whole recipe, the hashes of the data, all versions and the commit.",
        ]
    )
