"""Incremental text equals the tokenizer's own decoding of the whole list, for every kind of decoder."""

from __future__ import annotations

import codecs
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from layerskip.decode.text import StopStrings, TextStream, encode_prompt, final_text
from layerskip.errors import UserError

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BYTE_LEVEL, SENTENCEPIECE = ["byte_level"], ["metaspace", "llama"]
PYTHON = ["byt5", "per_byte"]
KINDS = [*BYTE_LEVEL, *SENTENCEPIECE, *PYTHON]


class PerByteTokenizer(ByT5Tokenizer):
    """Show each byte of an unfinished character as its own U+FFFD, as the sentencepiece library does."""

    def convert_tokens_to_string(self, tokens):
        codecs.register_error("per_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))
        in_bytes = [t.encode() if t in self.get_added_vocab() else bytes([ord(t)]) for t in tokens]
        return b"".join(in_bytes).decode("utf-8", errors="per_byte")


def byte_symbols() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


@cache
def tokenizer_of(kind: str):
    """A tiny tokenizer: `byte_level` as GPT-2, `llama` and `metaspace` with byte fallback, or in Python."""
    if kind in PYTHON:
        return (ByT5Tokenizer if kind == "byt5" else PerByteTokenizer)(extra_ids=0)
    if kind == "byte_level":
        symbols = byte_symbols()
        f0, x9f, x98 = symbols[0xF0], symbols[0x9F], symbols[0x98]
        # Merges that end in the middle of a character are what real vocabularies have.
        merges = [(f0, x9f), (f0 + x9f, x98), ("a", "b"), ("ab", "c"), (symbols[0x20], f0), ("E", "N")]
        pieces = symbols + ["".join(pair) for pair in merges]
        model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
        decoder = decoders.ByteLevel()
    else:
        merges = [("▁", "a"), ("a", "b"), ("ab", "c"), ("▁", "▁"), ("E", "N")]
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "▁", *"abcEND[]", "世", "\ufffd"]
        pieces += ["".join(pair) for pair in merges]
        model = models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
        ends = {
            "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
            "llama": [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ],
        }
        decoder = decoders.Sequence(ends[kind])
    fast = Tokenizer(model)
    fast.decoder = decoder
    fast.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "byte_level"
        else pre_tokenizers.Metaspace(split=False)
    )
    fast.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<|other|>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


def byte_tokens(kind: str, *values: int) -> list[int]:
    return [value + 3 * (kind in PYTHON) for value in values]


def encoded(kind: str, text: str) -> list[int]:
    return tokenizer_of(kind).encode(text, add_special_tokens=False)


def decoded(kind: str, tokens: list[int], skip_special_tokens: bool = True) -> str:
    return tokenizer_of(kind).decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def cut(text: str, stop: list[str]) -> str:
    return text[: min((text.index(string) for string in stop if string in text), default=None)]


characters = st.one_of(
    st.sampled_from("abcEND  \n世界é🙂👩\u200d🚀\u0301\ufffd"), st.characters(exclude_categories=["Cs"])
)


def token_lists(kind: str) -> st.SearchStrategy[list[int]]:
    """Text, raw bytes and arbitrary tokens (special ones too) in turn."""
    part = st.one_of(
        st.text(characters, max_size=8).map(lambda text: encoded(kind, text)),
        st.lists(
            st.sampled_from(byte_tokens(kind, 0xFF, 0x80, 0xE2, 0x82, 0xAC, 0xED, 0xF0, 0x20)), max_size=8
        ),
        st.lists(st.integers(0, len(tokenizer_of(kind)) - 1), max_size=8),
    )
    return st.lists(part, max_size=8).map(lambda parts: [token for tokens in parts for token in tokens])


stops = st.lists(st.text(characters.filter(lambda c: c != "\ufffd"), min_size=1, max_size=3), max_size=3)


def streamed(kind: str, tokens: list[int], sizes: list[int], stop: list[str], skip: bool = True) -> str:
    stream, parts, at = TextStream(tokenizer_of(kind), stop, skip), [], 0
    for size in [*sizes, len(tokens)]:
        parts.append(stream.push(tokens[at : at + size]))
        at += size
    return "".join(parts) + stream.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_stream_joins_to_the_decoded_text(kind):
    @given(token_lists(kind), st.lists(st.integers(0, 5), max_size=40), stops, st.booleans())
    @settings(max_examples=40, deadline=None)
    @example(encoded(kind, "ab 🙂" * 12), [1] * 200, [], True)
    @example(byte_tokens(kind, 0xF0, 0x9F, 0x41, *[0xE2, 0x82, 0xAC] * 9), [1] * 40, [], True)
    def check(tokens, sizes, stop, skip):
        text = decoded(kind, tokens, skip)
        assert streamed(kind, tokens, sizes, stop, skip) == cut(text, stop)
        if skip:
            assert final_text(tokenizer_of(kind), tokens, stop) == cut(text, stop)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_stop_is_found_at_the_earliest_token(kind):
    @given(token_lists(kind), stops, st.data())
    @settings(max_examples=30, deadline=None)
    def check(tokens, stop, data):
        text = decoded(kind, tokens).replace("\ufffd", "")
        if text:  # a stop string that does occur, at a random place
            start = data.draw(st.integers(0, len(text) - 1))
            stop = [*stop, text[start : start + data.draw(st.integers(1, 6))]]
        watch = StopStrings(tokenizer_of(kind), stop)
        for end in range(1, len(tokens) + 1):
            contained = any(string in decoded(kind, tokens[:end]) for string in stop)
            assert watch.push(tokens[end - 1]) == contained
            if contained:
                break

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_stop_string_across_three_tokens_is_found_at_the_third(kind):
    tokens = [token for text in "cEND" for token in encoded(kind, text)[-1:]]
    watch = StopStrings(tokenizer_of(kind), ["END"])
    assert [watch.push(token) for token in tokens] == [False, False, False, True]
    stream = TextStream(tokenizer_of(kind), ["END"])
    assert [stream.push([token]) for token in tokens] == ["c", "", "", ""]
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_stop_string_inside_a_token_cuts_that_token(kind):
    abc = encoded(kind, "aabc")[-1]
    assert decoded(kind, [abc]) == "abc"
    watch = StopStrings(tokenizer_of(kind), ["b"])
    assert watch.push(abc)
    assert watch.push(abc), "a stop string once found stays found"
    stream = TextStream(tokenizer_of(kind), ["b"])
    assert stream.push([abc]) == "a"
    assert stream.push([abc]) + stream.finish() == ""


def test_possible_start_of_a_stop_string_is_released_when_it_turns_out_otherwise():
    tokenizer = tokenizer_of("byte_level")
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(byte_tokens("byte_level", ord(c))) for c in "aEEN"] == ["a", "", "E", ""]
    assert stream.finish() == "EN"
    assert TextStream(tokenizer, ["END"]).finish() == ""


def test_longer_stop_string_that_began_earlier_wins():
    tokens = byte_tokens("byte_level", *b"xabcy")
    for sizes in ([], [1] * 5, [3]):
        assert streamed("byte_level", tokens, sizes, ["b", "abc"]) == "x"
        assert streamed("byte_level", tokens, sizes, ["b", "abd"]) == "xa"


@pytest.mark.parametrize("kind", KINDS)
def test_unfinished_character_is_held_until_its_last_byte(kind):
    stream, before, face = (
        TextStream(tokenizer_of(kind)),
        encoded(kind, "世a"),
        byte_tokens(kind, *"🙂".encode()),
    )
    assert "".join([stream.push([token]) for token in before + face[:3]]) == decoded(kind, before)
    assert stream.push(face[3:]) + stream.finish() == "🙂"
    unfinished = TextStream(tokenizer_of(kind))
    assert unfinished.push(byte_tokens(kind, 0xF0, 0x9F)) == ""
    assert unfinished.finish() == decoded(kind, byte_tokens(kind, 0xF0, 0x9F))


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_invalid_bytes_do_not_stall_the_stream(kind):
    stream, num_seen = TextStream(tokenizer_of(kind)), 0
    for num_pushed in range(1, 60):
        num_seen += len(stream.push(byte_tokens(kind, 0xFF)))
        assert num_seen >= num_pushed - 3


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_valid_byte_run_waits_until_nothing_can_invalidate_it(kind):
    """The fallback decoder turns a whole run into U+FFFD for one bad byte, so "€" is not final before the run
    is: serving engines that release it early disagree with the tokenizer afterwards."""
    euro, a = byte_tokens(kind, *"€".encode()), encoded(kind, "aa")[-1:]
    stream = TextStream(tokenizer_of(kind))
    assert stream.push(a + euro) == "a"
    assert stream.push(a) == "€a"
    assert stream.push(euro * 20 + byte_tokens(kind, 0xFF)) + stream.finish() == "\ufffd" * 61
    watch = StopStrings(tokenizer_of(kind), ["€€"])
    assert [watch.push(token) for token in a + euro * 2][-2:] == [False, True]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_leading_space_is_dropped_only_at_the_start_of_the_text(kind):
    tokens = encoded(kind, "a a") * 9
    assert streamed(kind, tokens, [1] * len(tokens), []) == " ".join(["a"] * 18)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_tokens_past_the_vocabulary_are_no_context(kind):
    """A model's padded vocabulary has ids the tokenizer does not know; a window of nothing else would make the
    next token look like the first, and its space would vanish."""
    a, padding = encoded(kind, "a"), len(tokenizer_of(kind))
    tokens = a + [padding] * 20 + a
    assert streamed(kind, tokens, [1] * len(tokens), []) == "a a"


def test_stop_string_does_not_match_a_leading_byte_that_the_decoder_strips():
    watch = StopStrings(tokenizer_of("llama"), [" A"])
    assert not any(watch.push(token) for token in byte_tokens("llama", *b" A"))


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_special_tokens_are_skipped_unless_asked_for(kind):
    a, special = (
        encoded(kind, "a"),
        [tokenizer_of(kind).convert_tokens_to_ids(t) for t in ("<s>", "<|other|>")],
    )
    assert streamed(kind, special + a + special * 20, [1] * 50, []) == "a"
    assert "<|other|>" in streamed(kind, special + a, [1] * 5, [], skip=False)
    split = [special[0], *byte_tokens(kind, 0xE2), special[1], *byte_tokens(kind, 0x82, 0xAC), *a]
    assert streamed(kind, split, [1] * 9, []).startswith("€")
    spoilt = [*byte_tokens(kind, *"€".encode()), special[1], *byte_tokens(kind, 0xFF)]
    assert streamed(kind, spoilt, [1] * 9, []) == decoded(kind, spoilt)


class CountingTokenizer:
    """Pass everything on and note how many tokens each call of `decode` is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, tokens, **options):
        self.sizes.append(len(tokens))
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
@pytest.mark.parametrize("text", ["ab 世 c", b"\xff", b"\xe2\x82", b"\xe2\x82\xac"])
def test_cost_per_token_does_not_grow_with_the_text(kind, text):
    """A run of valid fallback bytes is decoded twice in all: when it begins and when it ends."""
    part = encoded(kind, text) if isinstance(text, str) else byte_tokens(kind, *text)
    counting = CountingTokenizer(tokenizer_of(kind))
    stream, watch, tokens = TextStream(counting, ["never"]), StopStrings(counting, ["never"]), part * 200
    joined = "".join([stream.push([token]) for token in tokens if not watch.push(token)]) + stream.finish()
    assert joined == decoded(kind, tokens)
    assert sum(counting.sizes) < 50 * len(tokens)


def test_empty_stop_string_is_refused_and_a_lone_string_is_one_stop():
    tokenizer = tokenizer_of("byte_level")
    for use in (StopStrings, TextStream, lambda tokenizer, stop: final_text(tokenizer, [], stop)):
        with pytest.raises(UserError, match="empty"):
            use(tokenizer, ["a", ""])
    assert final_text(tokenizer, encoded("byte_level", "a bab"), "ba") == "a "
    assert not StopStrings(tokenizer, []).push(0)


@pytest.fixture
def chat_tokenizer():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("byte_level").backend_tokenizer, bos_token="<s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_prompt_is_plain_unless_it_is_messages_or_chat_is_asked_for(chat_tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    templated = chat_tokenizer.encode("[user]hi[assistant]")
    for chat in (None, False):
        assert encode_prompt(chat_tokenizer, "hi", chat) == chat_tokenizer.encode("hi")
    assert encode_prompt(chat_tokenizer, "hi", True) == templated
    for chat in (None, False, True):
        assert encode_prompt(chat_tokenizer, messages, chat) == templated
    assert type(encode_prompt(chat_tokenizer, messages, None)) is list


def test_plain_prompt_gets_the_special_tokens_the_tokenizer_adds():
    tokenizer = tokenizer_of("byt5")
    assert encode_prompt(tokenizer, "hi", None) == [*encoded("byt5", "hi"), tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no messages"),
        ([{"content": "hi"}], "message 0 has no text under 'role'"),
        ([{"role": "user", "content": "hi"}, {"role": "user"}], "message 1 has no text under 'content'"),
        ([{"role": "user", "content": None}], "'content'"),
        (["hi"], "message 0"),
        ({"role": "user", "content": "hi"}, "message 0"),
        ([{"role": "system", "content": "hi"}], "no system role"),
    ],
)
def test_malformed_messages_are_refused(chat_tokenizer, prompt, message):
    with pytest.raises(UserError, match=message):
        encode_prompt(chat_tokenizer, prompt, None)


def test_missing_tokenizer_or_template_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"(?s)no tokenizer.*tokenizer\.json"):
        encode_prompt(None, "hi", None)
    for prompt in ("hi", [{"role": "user", "content": "hi"}]):
        with pytest.raises(UserError, match=r"(?s)no chat template.*--no-chat"):
            encode_prompt(tokenizer_of("byte_level"), prompt, True)


def test_empty_prompt_is_the_start_token_or_refused(chat_tokenizer):
    assert encode_prompt(chat_tokenizer, "", None) == [chat_tokenizer.bos_token_id]
    chat_tokenizer.bos_token = None
    with pytest.raises(UserError, match="empty"):
        encode_prompt(chat_tokenizer, "", None)
