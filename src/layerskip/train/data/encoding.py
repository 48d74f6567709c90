"""Examples to token rows: what a model reads, and which of it is learnt.

Knows tokenizers, where a text ends, and what to do with one that is too long. Does not know where examples come from,
nor how rows share a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from layerskip.errors import RequestError
from layerskip.train.data.examples import Chat, Document, Example, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a token that is read but not learnt, as in torch and transformers."""

Ids = npt.NDArray[np.int32]
Row = dict[str, Ids]
"""`input_ids` and `labels`, and `position_ids` where several documents share the row; each a vector of one length."""

_AT_ONCE = 1024  # examples in one call of the tokenizer
_PIECE = 1 << 20  # letters of a document in one text; longer ones take much memory in the tokenizer


class Rows(Dataset[Row]):
    """Token rows in a few flat arrays, as a dataset for `Trainer`.

    Args:
        rows: each with the same keys.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        columns: dict[str, list[Ids]] = {"input_ids": [], "labels": []}
        for row in rows:
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
        lengths = [len(values) for values in columns["input_ids"]]
        self._ends = np.cumsum([0, *lengths])
        empty = np.zeros(0, np.int32)
        self._flat = {name: np.concatenate([empty, *values], dtype=np.int32) for name, values in columns.items()}
        assert {len(values) for values in self._flat.values()} == {self._ends[-1]}

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        begin, end = self._ends[index], self._ends[index + 1]
        return {name: values[begin:end] for name, values in self._flat.items()}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._ends)

    @property
    def learnt(self) -> int:
        """Tokens with a label."""
        return int((self._flat["labels"] != IGNORE).sum())


@dataclass(frozen=True)
class Encoded:
    """Examples as rows.

    Args:
        rows: in the order of the examples.
        dropped: prompts with responses that were too long and left out.
        cut: documents that were too long and became several rows.
    """

    rows: Rows
    dropped: int
    cut: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How rows are made.

    Args:
        max_length: tokens of a row at most; None for any number. A longer document becomes several rows.
        too_long: what a prompt with a longer response is: an error, or left out and counted.
        train_on_prompt: whether prompts are learnt too.

    Raises:
        RequestError: max_length is below 2, or too_long is neither "error" nor "drop".
    """

    max_length: int | None = None
    too_long: Literal["error", "drop"] = "error"
    train_on_prompt: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise RequestError(f"max_length {self.max_length} leaves nothing to predict; use 2 or more")
        if self.too_long not in ("error", "drop"):
            raise RequestError(f"too_long {self.too_long!r} is not one of 'error', 'drop'; use one of them")


def encode(examples: Iterable[Example], *, tokenizer: PreTrainedTokenizerBase, limits: Limits | None = None) -> Encoded:
    """Turns examples into rows that end with EOS.

    A prompt gets what the tokenizer puts around a text (BOS, and what separates prompt from response where the
    tokenizer has such a token), a response nothing but EOS behind it. Both are tokenised on their own, so a space
    between them has to be in one of them. A conversation is written by the tokenizer's chat template.

    Args:
        examples: documents, pairs or chats.
        tokenizer: with an EOS token.
        limits: how long rows may be, and what is learnt.

    Raises:
        RequestError: the tokenizer has no EOS token, or no usable chat template for a chat; rows are too long.
    """
    limits = limits or Limits()
    rows: list[Row] = []
    too_long: list[int] = []
    cut = 0
    for row, whole in encode_each(examples, tokenizer=tokenizer, limits=limits):
        length = len(row["input_ids"])
        if limits.max_length is None or length <= limits.max_length:
            rows.append(row)
        elif whole:
            too_long.append(length)
        else:
            rows += _chunks(row, length=limits.max_length)
            cut += 1
    if too_long and limits.too_long == "error":
        total = len(rows) + len(too_long)
        raise RequestError(
            f"{len(too_long):,} of {total:,} rows are longer than max_length {limits.max_length} (the longest has "
            f"{max(too_long):,} tokens) and a response cannot be cut; raise max_length, or leave them out with "
            "too_long='drop'"
        )
    return Encoded(Rows(rows), dropped=len(too_long), cut=cut)


def encode_each(
    examples: Iterable[Example], *, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> Iterator[tuple[Row, bool]]:
    """The rows of `encode`, one by one and of any length.

    Args:
        examples: any number of them; read as the rows are.
        tokenizer: with an EOS token.
        limits: only `train_on_prompt` counts.

    Yields:
        A row, and whether it has to stay whole: True for what has a prompt.

    Raises:
        RequestError: the tokenizer has no EOS token, or no usable chat template for a chat.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise RequestError("the tokenizer has no EOS token, so no text could ever end; set tokenizer.eos_token")
    waiting = iter(examples)
    while group := list(islice(waiting, _AT_ONCE)):
        texts = [_segments(example, tokenizer) for example in group]
        ids = iter(_tokenise([segment for segments in texts for segment in segments], tokenizer))
        for example, segments in zip(group, texts, strict=True):
            found = [(segment, next(ids)) for segment in segments]
            parts = _with_one_end(found, eos=eos, chat=isinstance(example, Chat))
            yield _row(parts, everything=limits.train_on_prompt), not isinstance(example, Document)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Text that is tokenised on its own.

    Args:
        text: the text.
        learnt: whether its tokens get labels.
        begins: whether it gets what the tokenizer puts around a text.
    """

    text: str
    learnt: bool
    begins: bool


def _segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[_Segment]:
    match example:
        case Document(text):
            return [_Segment(piece, True, begins=not place) for place, piece in enumerate(_pieces(text))]
        case Pair(prompt, response):
            return [_Segment(prompt, False, begins=True), _Segment(response, True, begins=False)]
        case Chat():
            return _written_by_template(example, tokenizer)


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text before the first word of a line, where hardly any tokenizer joins letters."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = begin + _PIECE
        while (end := text.rfind("\n", begin, end)) > begin and text[end + 1].isspace():
            pass
        end = end + 1 if end > begin else begin + _PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _written_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[_Segment]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RequestError("the tokenizer has no chat template to write messages with; give prompt and response")
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
    segments: list[_Segment] = []
    written = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for upto, learnt in ((place, False), (place + 1, True)):
            if not upto:  # nobody spoke before the assistant; templates refuse an empty conversation
                continue
            try:
                text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=not learnt)
            except TemplateError as error:
                raise RequestError(f"the chat template refuses a conversation: {error}; {_shown(messages)}") from error
            assert isinstance(text, str)
            if not text.startswith(written):
                raise RequestError(
                    f"the chat template rewrites earlier turns when turn {place + 1} comes, so what the assistant "
                    "said cannot be told from the rest; give prompt and response"
                )
            segments.append(_Segment(text[len(written) :], learnt, begins=False))
            written = text
    return segments


def _shown(messages: Sequence[Mapping[str, str]]) -> str:
    roles = ", ".join(message["role"] for message in messages)
    return f"its roles are {roles}, and it begins {messages[0]['content'][:40]!r}"


def _tokenise(segments: Sequence[_Segment], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = [[]] * len(segments)
    for begins in (True, False):
        # What is empty gets no tokens, unless something is put around it.
        places = [
            place for place, segment in enumerate(segments) if segment.begins is begins and (begins or segment.text)
        ]
        for call in _calls(places, segments):
            texts = [segments[place].text for place in call]
            made = tokenizer(texts, add_special_tokens=begins, return_attention_mask=False, verbose=False)["input_ids"]
            for place, tokens in zip(call, made, strict=True):
                ids[place] = tokens
    return ids


def _calls(places: Sequence[int], segments: Sequence[_Segment]) -> Iterator[list[int]]:
    """Groups texts so that what the tokenizer keeps of them at once stays small."""
    call: list[int] = []
    letters = 0
    for place in places:
        call.append(place)
        letters += len(segments[place].text)
        if letters >= _PIECE:
            yield call
            call, letters = [], 0
    if call:
        yield call


_Part = tuple[_Segment, list[int]]


def _with_one_end(parts: Sequence[_Part], *, eos: int, chat: bool) -> list[_Part]:
    """Puts EOS behind the last part and nowhere else: some tokenizers put it behind every text they begin.

    A chat template has its own way to end a turn; what follows its EOS (often a new line) stays there.
    """
    *before, (end, ids) = parts
    ended = eos in ids if chat else ids[-1:] == [eos]
    ahead = [(part, tokens[:-1] if part.begins and tokens[-1:] == [eos] else tokens) for part, tokens in before]
    return [*ahead, (end, ids if ended else [*ids, eos])]


def _row(parts: Sequence[_Part], *, everything: bool) -> Row:
    ids = [token for _, tokens in parts for token in tokens]
    labels = [token if part.learnt or everything else IGNORE for part, tokens in parts for token in tokens]
    return {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}


def _chunks(row: Row, *, length: int) -> Iterator[Row]:
    """Consecutive parts; a last one of a single token has nothing to predict and is left out."""
    for begin in range(0, len(row["input_ids"]) - 1, length):
        yield {name: values[begin : begin + length] for name, values in row.items()}
