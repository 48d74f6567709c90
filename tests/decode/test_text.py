"""Text comes out once, whole and as early as it can; stop strings end it at the same place however it is cut."""

import copy
import doctest
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import layerskip.decode.text
from layerskip.decode.text import Detokenizer, Piece, StopStrings, TextStream
from layerskip.errors import RequestError

BROKEN = "\ufffd"
CORPUS = [
    "the cat sat on the mat and the dog sat on the cat",
    "le café est près de la forêt, où naît l'été",
    "中文字符很多，日本語の文字も多い",
    "🙂 🙃 👩‍👩‍👧 🇩🇪 ❤️",
    "Привет мир, как дела",
] * 4
SPECIAL = ["<s>", "</s>"]

# Text with what goes wrong: wide characters, joined emoji, combining marks, spaces, and any character at all. A
# U+FFFD that is really meant looks like a broken character to everyone; it has a test of its own.
ANY_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            [" ", "  ", "\n", "the", " cat", "é", "e\u0301", "中", "文字", "🙂", "👩‍👩‍👧", "🇩🇪", "\u200d", "ß"]
        ),
        st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN),
    ),
    max_size=40,
).map("".join)


def byte_level() -> PreTrainedTokenizerFast:
    """As in GPT-2 and Llama 3: tokens are strings of bytes and may begin and end inside a character."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2: whole characters, "▁" for a space, and a token for each byte of what is not in the vocabulary."""
    pieces = ["▁", "▁the", "▁cat", "the", "cat", "é", "中", *"abcdefghijklmnopqrstuvwxyz"]
    merges = []
    for piece in ("▁the", "▁cat", "the", "cat"):
        grown = piece[0]
        for letter in piece[1:]:
            merges.append((grown, letter))
            grown += letter
            pieces.append(grown)
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", *SPECIAL)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert isinstance(ids, list)
    return ids


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context=context)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_examples() -> None:
    assert doctest.testmod(layerskip.decode.text).failed == 0


def check_valid(tokenizer: PreTrainedTokenizerFast, text: str, *, cut: int) -> None:
    ids = encode(tokenizer, text)
    cut = min(cut, len(ids))
    # A prompt ends with a character; one that does not is another test.
    while cut < len(ids) and not decode(tokenizer, ids).startswith(decode(tokenizer, ids[:cut])):
        cut += 1
    while decode(tokenizer, ids[:cut]).endswith(BROKEN):
        cut += 1
    pieces = pieces_of(tokenizer, ids[cut:], context=ids[:cut])
    assert decode(tokenizer, ids[:cut]) + "".join(pieces) == decode(tokenizer, ids)
    assert not any(BROKEN in piece for piece in pieces)
    assert pieces[-1] == "", "a finished character was held back"


@each_tokenizer
@given(text=ANY_TEXT, cut=st.integers(0, 60))
@example(text="🙂🙃" * 12, cut=7)
@example(text="the cat the cat", cut=1)
@example(text=" " * 30 + "the", cut=5)
def test_the_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str, cut: int) -> None:
    check_valid(tokenizer, text, cut=cut)


@given(text=ANY_TEXT, cut=st.integers(0, 60))
def test_the_pieces_are_the_text_of_a_real_tokenizer(stories: Path, text: str, cut: int) -> None:
    check_valid(real(stories), text, cut=cut)


_REAL: dict[Path, PreTrainedTokenizerFast] = {}


def real(folder: Path) -> PreTrainedTokenizerFast:
    if folder not in _REAL:
        _REAL[folder] = AutoTokenizer.from_pretrained(folder)
    return _REAL[folder]


def test_the_tokenizers_are_hard_enough() -> None:
    """The text above must meet tokens inside characters, whole characters, and a space at the front of a token."""
    byte_tokens = encode(TOKENIZERS["byte level"], "🤖中文")
    assert any(BROKEN in decode(TOKENIZERS["byte level"], [token]) for token in byte_tokens)
    fallback = TOKENIZERS["byte fallback"]
    assert decode(fallback, encode(fallback, "中🙂")) == "中🙂"
    assert len(encode(fallback, "🙂")) == 5
    assert fallback.convert_ids_to_tokens(encode(fallback, "the cat")) == ["▁the", "▁cat"]


@each_tokenizer
def test_the_first_piece_keeps_its_space(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "the cat")
    assert (
        "".join(pieces_of(tokenizer, ids[1:], context=ids[:1]))
        == decode(tokenizer, ids)[len(decode(tokenizer, ids[:1])) :]
    )
    fallback = TOKENIZERS["byte fallback"]
    ids = encode(fallback, "the cat")
    assert pieces_of(fallback, ids[1:], context=ids[:1]) == [" cat", ""]
    # Many special tokens at the end of the prompt, as of a chat template, do not hide the text before them.
    special = fallback.convert_tokens_to_ids("</s>")
    assert pieces_of(fallback, ids[1:], context=[*ids[:1], *[special] * 20]) == [" cat", ""]


@each_tokenizer
def test_text_comes_as_early_as_it_can(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "the 中🤖é cat")
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for count, token in enumerate(ids, 1):
        shown += detokenizer.push(token)
        expected = decode(tokenizer, ids[:count]).rstrip(BROKEN)
        assert shown.startswith(expected), "a whole character was held back"


@each_tokenizer
def test_special_tokens_are_skipped_wherever_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    special = tokenizer.convert_tokens_to_ids("</s>")
    ids: list[int] = []
    for word in ("the", " cat 🤖", " the", "中"):
        ids += [special] * 12 + encode(tokenizer, word) + [special]
    text = decode(tokenizer, ids)
    assert "</s>" not in text
    assert "".join(pieces_of(tokenizer, ids)) == text


class Recorder:
    """A tokenizer that remembers how many tokens it was asked to decode."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.most = self.total = 0

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        self.most = max(self.most, len(ids))
        self.total += len(ids)
        return decode(self.tokenizer, ids)


@each_tokenizer
@given(data=st.data())
def test_any_tokens_are_held_for_a_bounded_time(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    any_token = st.integers(0, len(tokenizer) - 1)
    context = data.draw(st.lists(any_token, max_size=40))
    recorder = Recorder(tokenizer)
    detokenizer = Detokenizer(recorder, context=context)
    for token in data.draw(st.lists(any_token, max_size=80)):
        detokenizer.push(token)
        assert len(copy.copy(detokenizer).flush()) <= 3
    # Whatever came before, a text after it comes out.
    after = encode(tokenizer, " the cat é 中 🤖 the cat")
    shown = "".join(detokenizer.push(token) for token in after)
    assert shown.endswith(" é 中 🤖 the cat")
    assert detokenizer.flush() == ""
    assert recorder.most <= 80


@each_tokenizer
def test_the_cost_of_a_token_does_not_grow(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("the cat " * 300, "中🤖é" * 300):
        ids = encode(tokenizer, text)
        recorder = Recorder(tokenizer)
        detokenizer = Detokenizer(recorder, context=ids)
        for token in ids:
            detokenizer.push(token)
        assert recorder.total <= 30 * len(ids)


@each_tokenizer
def test_special_tokens_for_ever(tokenizer: PreTrainedTokenizerFast) -> None:
    """Also after an open character; and what follows is whole again."""
    special = tokenizer.convert_tokens_to_ids("</s>")
    opened = byte_tokens(tokenizer, "中")[:2]
    recorder = Recorder(tokenizer)
    detokenizer = Detokenizer(recorder)
    shown = [detokenizer.push(token) for token in [*byte_tokens(tokenizer, "中"), *opened, *[special] * 200]]
    assert "".join(shown) in ("中" + BROKEN, "中" + BROKEN * 2)
    assert recorder.most <= 80
    after = [detokenizer.push(token) for token in encode(tokenizer, "the 🤖 cat")]
    assert "".join(after).lstrip() == "the 🤖 cat"


def byte_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The text with one token for each byte."""
    if tokenizer is TOKENIZERS["byte fallback"]:
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    (letters, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [tokenizer.convert_tokens_to_ids(letter) for letter in letters]


@each_tokenizer
@pytest.mark.parametrize("length", range(1, 12))
def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    text = "é中🙂" * length
    expected = [piece for _ in range(length) for piece in ("", "é", "", "", "中", "", "", "", "🙂")]
    assert pieces_of(tokenizer, byte_tokens(tokenizer, text)) == [*expected, ""]
    # The same after a prompt that is cut anywhere: between characters, and inside one.
    everything = byte_tokens(tokenizer, text)
    for cut in range(len(everything) - 9):
        pieces = pieces_of(tokenizer, everything[cut:], context=everything[:cut])
        assert text.encode()[:cut].decode(errors="ignore") + "".join(pieces) == text


def test_tokens_that_never_end_with_a_character() -> None:
    """Neither is anything held back for ever, nor does a character break, nor is more decoded with time."""
    (letters, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("中")
    first, rest = letters[0], letters[1:]
    backend = Backend(models.BPE(vocab={first: 0, rest + first: 1, rest: 2, "<s>": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    recorder = Recorder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    detokenizer = Detokenizer(recorder)
    assert detokenizer.push(0) == ""
    assert [detokenizer.push(1) for _ in range(100)] == ["中"] * 100
    assert (detokenizer.push(2), detokenizer.flush()) == ("中", "")
    assert recorder.most <= 80
    # The same where the prompt ends inside a character.
    detokenizer = Detokenizer(recorder, context=[0, *[1] * 50])
    assert [detokenizer.push(1) for _ in range(50)] == ["中"] * 50


@each_tokenizer
def test_an_open_character_is_given_up(tokenizer: PreTrainedTokenizerFast) -> None:
    opened = byte_tokens(tokenizer, "🙂")[:2]
    text = "".join(pieces_of(tokenizer, [*encode(tokenizer, "the 中"), *opened, *encode(tokenizer, "the cat")]))
    assert text.replace(BROKEN, "") in ("the 中the cat", "the 中 the cat")
    assert BROKEN in text
    # At the end it comes with the flush, and a second flush has nothing.
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in opened] == ["", ""]
    assert set(detokenizer.flush()) == {BROKEN}
    assert detokenizer.flush() == ""


def test_a_replacement_character_that_is_meant_is_kept() -> None:
    tokenizer = TOKENIZERS["byte level"]
    for text in (f"a{BROKEN}", f"{BROKEN}中", f"{BROKEN * 6}a", f"the {BROKEN} cat"):
        assert "".join(pieces_of(tokenizer, encode(tokenizer, text))) == text
    prompt = encode(tokenizer, f"a{BROKEN}")
    assert "".join(pieces_of(tokenizer, encode(tokenizer, " cat"), context=prompt)) == " cat"


@given(ids=st.lists(st.integers(2, len(TOKENIZERS["byte level"]) - 1), max_size=80))
def test_byte_level_pieces_are_the_text_even_when_it_is_broken(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids)


STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Reads the whole text character by character; the first stop string to be complete wins, then the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=st.text("ab ", max_size=30), stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=12))
@example(text="abab ", stops=["abab", "b a"], cuts=[1, 2, 3])
@example(text="xab", stops=["b", "ab"], cuts=[2])
@example(text="a bb", stops=["a", "bb"], cuts=[])
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    search = StopStrings(stops)
    shown, matched = "", None
    for count, piece in enumerate(pieces, 1):
        safe, matched = search.push(piece)
        shown += safe
        if matched is not None:
            assert search.push("more") == ("", matched)
            break
        # Held back is what may become a stop string, and not one character more.
        sofar = "".join(pieces[:count])
        may_stop = [
            start
            for start in range(len(sofar))
            if any(stop.startswith(sofar[start:]) and stop != sofar[start:] for stop in stops)
        ]
        assert shown == sofar[: may_stop[0] if may_stop else len(sofar)]
    shown += search.flush()
    assert (shown, matched) == reference(text, stops)


def test_one_string_is_one_stop_string() -> None:
    assert StopStrings("END").push("the END") == ("the ", "END")


@pytest.mark.parametrize("stops", ["", [""], ["END", ""]])
def test_an_empty_stop_string_is_refused(stops: Sequence[str]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    with pytest.raises(RequestError, match="empty"):
        StopStrings(stops)
    with pytest.raises(RequestError, match="empty"):
        TextStream(tokenizer, stops=stops)


def test_stop_strings_begin_where_the_search_was_off() -> None:
    search = StopStrings(["bc", "xabcy"])
    assert search.push("xabc", search=False) == ("", None)
    assert search.push("z") == ("xabcz", None)
    assert search.push("b", search=False) == ("", None)
    assert search.push("c") == ("", "bc")


def rounds_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    rounds = []
    while ids:
        size = sizes[len(rounds) % len(sizes)]
        rounds.append(ids[:size])
        ids = ids[size:]
    return rounds


@each_tokenizer
@given(
    text=st.text("ab é🙂中", max_size=25),
    stops=st.lists(st.text("ab é🙂中", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    min_tokens=st.integers(0, 12),
)
def test_a_stream_is_the_same_in_any_rounds(
    tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str], sizes: list[int], min_tokens: int
) -> None:
    prompt, ids = encode(tokenizer, "the cat"), encode(tokenizer, text)
    # Token by token, on the text so far: the first token with which a stop string that may count is complete.
    whole = decode(tokenizer, prompt + ids)[len(decode(tokenizer, prompt)) :]
    detokenizer = Detokenizer(tokenizer, context=prompt)
    sofar, expected = "", (whole, len(ids), None)
    for count, token in enumerate(ids, 1):
        before = len(sofar)
        sofar += detokenizer.push(token)
        ends = [] if count <= min_tokens else range(before + 1, len(sofar) + 1)
        found = [(end, -len(stop), stop) for end in ends for stop in stops if sofar[:end].endswith(stop)]
        if found:
            end, minus_length, stop = min(found)
            expected = (sofar[: end + minus_length], count, stop)
            break
    stream = TextStream(tokenizer, prompt=prompt, stops=stops, min_tokens=min_tokens)
    pieces = [stream.push(tokens) for tokens in rounds_of(ids, sizes)]
    pieces.append(stream.flush())
    assert ("".join(p.text for p in pieces), sum(p.tokens for p in pieces), pieces[-1].stop) == expected
    assert stream.text == expected[0]


@each_tokenizer
def test_tokens_after_the_stop_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    before, after = encode(tokenizer, "cat\n\n"), encode(tokenizer, "cat\n\nthe dog")
    assert after[: len(before)] == before
    stream = TextStream(tokenizer, stops=["\n\n"])
    assert stream.push(after) == Piece(text="cat", tokens=len(before), stop="\n\n")
    assert stream.push(after) == stream.flush() == Piece(text="", tokens=0, stop="\n\n")
    assert stream.text == "cat"


def test_min_tokens_is_the_number_of_tokens_without_a_stop() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = encode(tokenizer, "uvwuvwuvw")[1:]
    assert tokenizer.convert_ids_to_tokens(ids) == list("uvwuvwuvw")
    for min_tokens, end in [(0, 3), (1, 3), (2, 3), (3, 6), (5, 6), (6, 9), (9, 9)]:
        stream = TextStream(tokenizer, stops=["vw"], min_tokens=min_tokens)
        piece = stream.push(ids)
        expected = ("uvwuvwuvw"[: end - 2], end, "vw") if min_tokens < 9 else ("uvwuvwuvw", 9, None)
        text = piece.text + stream.flush().text
        assert (text, piece.tokens, piece.stop) == expected, min_tokens


def test_what_is_held_for_a_stop_comes_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, stops=["END"])
    ids = [*encode(tokenizer, "the EN"), *byte_tokens(tokenizer, "中")[:1]]
    assert stream.push(ids) == Piece(text="the ", tokens=len(ids), stop=None)
    assert stream.flush() == Piece(text="EN" + BROKEN, tokens=0, stop=None)
    assert stream.text == "the EN" + BROKEN
