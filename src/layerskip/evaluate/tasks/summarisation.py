"""Summaries of news: CNN/DailyMail (several sentences) and XSum (one), scored by ROUGE.

The prompt is that of LayerSkip's published code: "Article: ...", a new line, "Summary:".

Sources: See et al., "Get To The Point: Summarization with Pointer-Generator Networks", ACL 2017; Narayan et al., "Don't
Give Me the Details, Just the Summary!", EMNLP 2018; Lin, "ROUGE: A Package for Automatic Evaluation of Summaries",
2004.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from layerskip.errors import RequestError
from layerskip.evaluate.tasks.files import Hub, records
from layerskip.evaluate.tasks.task import Item, Task

METRICS = ("rouge1", "rouge2", "rougeL")
_STOP = ("\nArticle:", "\n\n")


def cnn_dm(files: str | Path) -> Task:
    """CNN/DailyMail: rows with `article` and `highlights`.

    Args:
        files: JSON lines (a file, a folder, a pattern), or "hub" for abisee/cnn_dailymail 3.0.0.

    Raises:
        RequestError: the data are missing or malformed.
    """
    hub = Hub("abisee/cnn_dailymail", "3.0.0")
    return _task("cnn_dm", files, hub=hub, fields=("article", "highlights"), max_tokens=128)


def xsum(files: str | Path) -> Task:
    """XSum: rows with `document` and `summary`.

    Args:
        files: JSON lines (a file, a folder, a pattern), or "hub" for EdinburghNLP/xsum.

    Raises:
        RequestError: the data are missing or malformed.
    """
    hub = Hub("EdinburghNLP/xsum")
    return _task("xsum", files, hub=hub, fields=("document", "summary"), max_tokens=64)


def _task(name: str, files: str | Path, *, hub: Hub, fields: tuple[str, str], max_tokens: int) -> Task:
    article, summary = fields
    items = []
    for row in records(files, hub=hub):
        wanted = row.optional(summary)
        shown = None if wanted is None else " " + " ".join(wanted.split())
        items.append(Item(f"Article: {row.text(article)}\nSummary:", wanted, shown=shown))
    return Task(name, tuple(items), score_summary, max_tokens, _STOP, ready=_rouge)


def score_summary(text: str, answer: str) -> dict[str, float]:
    """The F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (of the whole text), words stemmed, as `rouge-score` has them."""
    found = _rouge().score(answer, text)
    return {metric: float(found[metric].fmeasure) for metric in METRICS}


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise RequestError("scoring summaries needs the rouge-score package; pip install 'layerskip[eval]'") from error
    return RougeScorer(METRICS, use_stemmer=True)
