"""GSM8K: word problems whose answers are numbers.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from layerskip.errors import RequestError
from layerskip.evaluate.tasks.files import Hub, records
from layerskip.evaluate.tasks.task import Item, Task

_MARK = "####"
# a full stop begins a number (.5) unless it ends what stands before it, as in "Rs.500" and "is...18"
_NUMBER = re.compile(r"-?\$?(?:[0-9](?:[0-9]|,(?=[0-9]))*(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)")


def gsm8k(files: str | Path) -> Task:
    """Rows with `question` and `answer`, the answer's number behind ``####``.

    Args:
        files: JSON lines (a file, a folder, a pattern), or "hub" for openai/gsm8k.

    Raises:
        RequestError: the data are missing or malformed, or an answer has no number.
    """
    items = []
    for row in records(files, hub=Hub("openai/gsm8k", "main")):
        answer = row.optional("answer")
        wanted = None if answer is None else number(answer)
        if answer is not None and wanted is None:
            raise RequestError(f"{row.where}: the answer has no number behind {_MARK}; give it one")
        shown = None if answer is None else f" {answer}"
        items.append(Item(f"Question: {row.text('question')}\nAnswer:", wanted, shown=shown))
    return Task("gsm8k", tuple(items), score_number, 320, ("\nQuestion:",))


def number(text: str) -> Decimal | None:
    """The first number behind ``####``; where there is no such mark, the last number of the text.

    Example:
        >>> number("9 * 2 = 18 dollars. #### 1,018"), number("so it is $1.50 a day."), number("none")
        (Decimal('1018'), Decimal('1.50'), None)
        >>> number("it costs Rs.5.50"), number("the answer is...18"), number("half is .5")
        (Decimal('5.50'), Decimal('18'), Decimal('0.5'))
    """
    _, mark, behind = text.partition(_MARK)
    found = _NUMBER.findall(behind if mark else text)
    return Decimal(re.sub("[$,]", "", found[0] if mark else found[-1])) if found else None


def score_number(text: str, answer: Decimal) -> dict[str, float]:
    """1 where the text's number is the answer, 0 else; 18 and 18.00 are the same number."""
    return {"exact_match": float(number(text) == answer)}
