"""Token ids to text while they are generated: incremental decoding, stop strings, and both for one row.

Knows how the decoders of tokenizers behave at the edges: a leading space that only the text before it brings out,
characters spread over several tokens, runs of byte tokens that are all broken while one character is open. Does
not know what a tokenizer is beyond `decode`, nor who generates the tokens, nor where the text goes.

One limit: where a tokenizer spells bytes as tokens of their own (byte fallback), a U+FFFD that is really meant and
is followed by another such character may be shown more than once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from layerskip.errors import RequestError

_BROKEN = "\ufffd"
# An unfinished UTF-8 sequence has at most three bytes, and a decoder writes at most one U+FFFD for each.
_OPEN = 3
# The tokens that stay as context: enough for an open character, few enough that decoding them again is cheap.
_KEEP = 8


class Tokenizer(Protocol):
    """What this file needs of a tokenizer; those of transformers have it."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """Turns a growing list of tokens into pieces of text, each as soon as no later token can change it.

    The text of the context and the pieces together are the text of all the tokens. A character that is spread over
    several tokens comes out whole; what cannot become a character any more comes out as U+FFFD. Special tokens are
    skipped. Each token costs the decoding of a few recent ones, however long the text.

    Args:
        tokenizer: anything with `decode`.
        context: the tokens before the first one pushed (the prompt); only the last few are read. With it, the first
            piece keeps the leading space that a SentencePiece tokenizer drops at the start of a text.

    Example:
        >>> class Bytes:
        ...     def decode(self, ids, /, *, skip_special_tokens, clean_up_tokenization_spaces):
        ...         return bytes(ids).decode(errors="replace")
        >>> detokenizer = Detokenizer(Bytes())
        >>> [detokenizer.push(byte) for byte in "né!".encode()[:4]]
        ['n', '', 'é', '!']
        >>> detokenizer.push(0xC3), detokenizer.flush()
        ('', '\ufffd')
    """

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Recent tokens, and the start of their text that has been handed out or belongs to the context.
        self._window: list[int] = []
        self._shown = ""
        # Places in the window where nothing was held back: the last one, and an older one where the next window
        # is to begin.
        self._clean = self._next = self._begin(context)

    def push(self, token: int) -> str:
        """Takes one token.

        Args:
            token: its id.

        Returns:
            The text that it settles; often the token's own text, sometimes "", sometimes that of earlier ones too.
        """
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            whole = self._shown.rstrip(_BROKEN)
            if whole != self._shown and text.startswith(whole):
                # The context ended inside a character, and this token has finished it.
                self._shown = whole
            else:
                # Byte fallback: while a character is open, the whole run of byte tokens is decoded as broken, also
                # what was handed out. So leave that out; byte tokens need no context.
                del self._window[: self._clean]
                self._clean, self._next, self._shown = 0, 0, ""
                text = self._decode(self._window)
        piece = self._settled(text[len(self._shown) :])
        self._shown += piece
        if held := len(text) - len(self._shown):
            if piece and len(self._window) - self._next >= 2 * _KEEP:
                self._cut_inside(held)
        else:
            self._clean = len(self._window)
            if self._clean - self._next >= _KEEP:
                self._cut()
        return piece

    def flush(self) -> str:
        """Ends the text.

        Returns:
            What was held back: "", or the U+FFFD of a character that the tokens left open.
        """
        text = self._decode(self._window)
        rest = text[len(self._shown) :]
        self._shown, self._clean = text, len(self._window)
        return rest

    def _begin(self, context: Sequence[int]) -> int:
        """Takes the end of the context as the window; returns the place in it up to which characters are whole.

        A window without text would lose the next leading space, and one that begins inside a character spoils the
        whole run of byte tokens: begin earlier. Where an open character at the end spoils it, keep only that.
        """
        for start in range(max(len(context) - _KEEP, 0), max(len(context) - 4 * _KEEP, 0) - 1, -1):
            self._window = list(context[start:])
            self._shown = self._decode(self._window)
            for end in range(len(self._window), max(len(self._window) - _OPEN, 1) - 1, -1):
                whole = self._decode(self._window[:end])
                if whole and not whole.endswith(_BROKEN):
                    if self._shown.startswith(whole):
                        return end
                    del self._window[:end]
                    self._shown = ""
                    return 0
        return len(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _settled(self, text: str) -> str:
        """The text without the end that may still become a character."""
        if len(self._window) - self._clean >= 4 * _KEEP:
            return text  # open for so long that only tokens without text can have followed
        end = text[-_OPEN:]
        return text[: len(text) - len(end) + len(end.rstrip(_BROKEN))]

    def _cut(self) -> None:
        """Forgets the tokens that the next ones no longer need, where nothing is held back."""
        if self._decode(self._window[self._next :]):
            del self._window[: self._next]
        else:
            del self._window[self._next :]  # special tokens only: those before them are the better context
        self._shown = self._decode(self._window)
        self._clean = self._next = len(self._window)

    def _cut_inside(self, held: int) -> None:
        """The same where byte-level tokens end inside a character, as they may for ever.

        UTF-8 finds its feet again after any cut, so the window may begin anywhere well before the open character.
        """
        del self._window[:-_KEEP]
        self._shown = self._decode(self._window)[:-held]
        self._clean = self._next = len(self._window)


class StopStrings:
    """Looks for stop strings in text that comes in pieces.

    The stop string that is complete first wins, and of those that are complete with the same character the longest;
    so the result does not depend on how the text is cut, and nothing has to be generated beyond the match to know it.

    Args:
        stops: the strings; may be empty, none of them may be.

    Raises:
        RequestError: a stop string is empty.

    Example:
        >>> search = StopStrings(["END"])
        >>> search.push("the E"), search.push("N"), search.push("Dless")
        (('the ', None), ('', None), ('', 'END'))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if "" in stops:
            raise RequestError("an empty stop string would end every text at once; leave it out")
        # The longest first, so that it wins among those that end at the same character.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, *, search: bool = True) -> tuple[str, str | None]:
        """Takes the next piece of the text.

        Args:
            text: the piece.
            search: whether a stop string may end inside this piece. One that ends later may begin in it either way.

        Returns:
            The text that is safe to show, and the stop string that ended it or None. Held back is the longest end
            of the text that begins a stop string. After a match: "" and the same stop string again.
        """
        if self._matched is not None:
            return "", self._matched
        buffer = self._held + text
        if search:
            # A stop string inside what was held would have been found there, had it been looked for.
            starts = ((buffer.find(stop, max(len(self._held) - len(stop) + 1, 0)), stop) for stop in self._stops)
            ends = [(start + len(stop), stop) for start, stop in starts if start >= 0]
            if ends:
                end, self._matched = min(ends, key=lambda found: found[0])
                self._held = ""
                return buffer[: end - len(self._matched)], self._matched
        longest = min(len(buffer), len(self._stops[0]) - 1) if self._stops else 0
        held = next((size for size in range(longest, 0, -1) if self._begins_a_stop(buffer[-size:])), 0)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], None

    def flush(self) -> str:
        """Ends the text.

        Returns:
            What was held back; no stop string came of it.
        """
        held, self._held = self._held, ""
        return held

    def _begins_a_stop(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a few tokens added to the text of a row.

    Args:
        text: the text that may be shown now.
        tokens: how many of the tokens count; fewer than were given when a stop string was complete before the last.
        stop: the stop string that ended the text, or None.
    """

    text: str
    tokens: int
    stop: str | None


class TextStream:
    """The text of one row: its tokens decoded, up to the first stop string.

    Args:
        tokenizer: anything with `decode`.
        prompt: the tokens before the generated ones; their text is not part of the stream.
        stops: stop strings.
        min_tokens: stop strings completed by the first `min_tokens` tokens are ordinary text, as in vLLM.

    Raises:
        RequestError: a stop string is empty.

    Example:
        >>> class Letters:
        ...     def decode(self, ids, /, *, skip_special_tokens, clean_up_tokenization_spaces):
        ...         return "".join(map(chr, ids))
        >>> stream = TextStream(Letters(), stops=["\\n\\n"])
        >>> stream.push([ord(letter) for letter in "one\\n"])
        Piece(text='one', tokens=4, stop=None)
        >>> stream.push([ord(letter) for letter in "two\\n\\nthree"])
        Piece(text='\\ntwo', tokens=5, stop='\\n\\n')
        >>> stream.text
        'one\\ntwo'
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, context=prompt)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._stop: str | None = None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All the text that was returned so far."""
        return "".join(self._parts)

    def push(self, tokens: Sequence[int]) -> Piece:
        """Takes the tokens of a round; those after the one that completes a stop string are dropped.

        Args:
            tokens: generated ids, in order.

        Returns:
            What they add. After a stop string: no text, no tokens, and the same stop string again.
        """
        parts: list[str] = []
        kept = 0
        for token in tokens:
            if self._stop is not None:
                break
            kept += 1
            self._tokens += 1
            parts.append(self._search(self._detokenizer.push(token)))
        return self._piece("".join(parts), tokens=kept)

    def flush(self) -> Piece:
        """Ends the text where no stop string did.

        Returns:
            What was held back, without tokens. `stop` is set if a stop string is complete only with that.
        """
        rest = "" if self._stop is not None else self._search(self._detokenizer.flush())
        return self._piece(rest + self._stops.flush(), tokens=0)

    def _search(self, text: str) -> str:
        safe, self._stop = self._stops.push(text, search=self._tokens > self._min_tokens)
        return safe

    def _piece(self, text: str, *, tokens: int) -> Piece:
        self._parts.append(text)
        return Piece(text=text, tokens=tokens, stop=self._stop)
