"""Ids to text in pieces: only whole characters, and the same text for every cut."""

from __future__ import annotations

import itertools

import pytest

from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.tokenizer import Tokenizer
from tests.synthetic_tokenizer import FIRST_BYTE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "jamba-1.5")
    return Tokenizer.from_folder(folder)


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE + byte for byte in data]


def streamed(detokenizer: Detokenizer, pieces: list[list[int]]) -> list[str]:
    return [detokenizer.push(piece) for piece in pieces] + [detokenizer.finish()]


def cuts(ids: list[int]) -> list[list[list[int]]]:
    """Yields every way to cut `ids` into pieces."""
    ways: list[list[list[int]]] = []
    for marks in itertools.product((False, True), repeat=len(ids) - 1):
        pieces = [[ids[0]]]
        for number, mark in zip(ids[1:], marks, strict=True):
            if mark:
                pieces.append([number])
            else:
                pieces[-1].append(number)
        ways.append(pieces)
    return ways


def test_an_emoji_comes_when_its_last_byte_comes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(ids) == 6
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    assert streamed(detokenizer, [[id] for id in ids]) == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize(
    "data",
    [
        b"ok\xf0\x9f\x98\x80",
        b"\xf0\x9f\x98A",  # cut short by an ASCII letter
        b"\xf0\x9f\x98",  # cut short by the end
        b"\xc0\xafx",  # overlong
        b"\xed\xa0\x80",  # a surrogate
        b"\xf5\x80\x80\x80",  # beyond Unicode
        b"\xe4\xb8\xe4\xb8\xad",  # begun twice
        b"\x80\xbf\xfe",
    ],
)
def test_every_cut_of_any_bytes_decodes_as_python_replaces(tokenizer: Tokenizer, data: bytes) -> None:
    ids = byte_ids(data)
    wanted = data.decode("utf-8", "replace")
    for pieces in cuts(ids):
        assert "".join(streamed(Detokenizer(tokenizer, skip_special_tokens=False), pieces)) == wanted
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted


def test_every_cut_of_a_text_with_special_tokens(tokenizer: Tokenizer) -> None:
    eom, assistant = tokenizer.special_tokens["<|eom|>"], tokenizer.special_tokens["<|assistant|>"]
    text_ids = tokenizer.encode(" é", add_special_tokens=False)
    ids = [assistant, *text_ids, *byte_ids(b"\xe4"), eom, *byte_ids(b"\xb8\xad")]
    for skip, wanted in ((False, "<|assistant|> é\ufffd<|eom|>\ufffd\ufffd"), (True, " é中")):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == wanted
        for pieces in cuts(ids):
            assert "".join(streamed(Detokenizer(tokenizer, skip_special_tokens=skip), pieces)) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(" hello the", "hello the"), ("  two", " two"), ("hello", "hello"), (" ", ""), ("\n x", "\n x")],
)
def test_one_leading_space_is_stripped_once(tokenizer: Tokenizer, text: str, wanted: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for pieces in cuts(ids):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, strip_leading_space=True)
        assert "".join(streamed(detokenizer, pieces)) == wanted


def test_a_skipped_special_token_is_not_the_start_of_the_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_tokens["<|bom|>"], *tokenizer.encode(" hello", add_special_tokens=False)]
    stripped = Detokenizer(tokenizer, skip_special_tokens=True, strip_leading_space=True)
    assert "".join(streamed(stripped, [ids])) == "hello"
    kept = Detokenizer(tokenizer, skip_special_tokens=False, strip_leading_space=True)
    assert "".join(streamed(kept, [ids])) == "<|bom|> hello"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    assert detokenizer.push([tokenizer.vocab_size, 10**6]) + detokenizer.finish() == ""
