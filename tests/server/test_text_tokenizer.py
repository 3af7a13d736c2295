"""Tokenizer: user text, special tokens, bytes, and the folders that it refuses."""

from __future__ import annotations

import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jamba_server.engine.errors import CheckpointError, RequestRejected
from jamba_server.server.text.tokenizer import Tokenizer
from tests.synthetic_tokenizer import FIRST_BYTE, build_tokenizer, special_ids, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, "jamba-1.5")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("reasoning")
    write_tokenizer(path, "reasoning")
    return Tokenizer.from_folder(path)


def changed(folder: Path, tmp_path: Path, change: dict[str, Any]) -> Path:
    """A copy of the folder whose tokenizer.json has other values for some keys."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change), encoding="utf-8")
    return tmp_path


def test_names_and_ids(tokenizer: Tokenizer, reasoning: Tokenizer) -> None:
    assert dict(tokenizer.special_tokens) == special_ids("jamba-1.5")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (reasoning.bos_token_id, reasoning.eos_token_id) == (1, 519)
    assert tokenizer.named_tokens["pad_token"] == "<|pad|>"
    assert tokenizer.is_special(518)
    assert not tokenizer.is_special(1800)
    assert not reasoning.is_special(541)  # <think> is added, but not special


@pytest.mark.parametrize("method", ["encode", "encode_with_ends"])
def test_a_long_text_does_not_hold_up_other_threads(tokenizer: Tokenizer, method: str) -> None:
    started, finished = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        getattr(tokenizer, method)("hello the world " * 20_000)
        finished.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # threads take turns only where one lets go of the interpreter
    try:
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        in_between = not finished.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert in_between


def test_bos_comes_from_the_post_processor_when_asked_for(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hello the", add_special_tokens=False)
    assert [tokenizer.token_text(id) for id in plain] == ["hello", " the"]
    assert tokenizer.encode("hello the") == [1, *plain]
    assert tokenizer.encode("") == [1]


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer, reasoning: Tokenizer) -> None:
    for text in ("<|startoftext|>", "a<|eom|><|bom|><|system|> b", "<tool_calls>[]</tool_calls>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert not any(tokenizer.is_special(id) for id in ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert reasoning.encode("<think><|im_end|>", add_special_tokens=False)[0] == 541
    assert 519 not in reasoning.encode("<think><|im_end|>", add_special_tokens=False)


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    space = tokenizer.encode(" ", add_special_tokens=False)
    assert [tokenizer.token_bytes(id) for id in space] == [b" "]
    assert [tokenizer.token_bytes(FIRST_BYTE + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_text(FIRST_BYTE + 0xF0) == "\ufffd"
    assert tokenizer.token_bytes(518) == b"<|eom|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""


@pytest.mark.parametrize("text", ["", "hello the xBC, 12", "tabs\t\r\n\x00", "שלום 中文 😀 é", "▁x"])
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")
    assert b"".join(tokenizer.token_bytes(id) for id in ids[1:]).decode() == text.replace("▁", " ")


def test_ends_count_characters(tokenizer: Tokenizer) -> None:
    ids, ends = tokenizer.encode_with_ends("hello é😀, the")
    assert ids == tokenizer.encode("hello é😀, the", add_special_tokens=False)
    assert ends == [5, 6, 7, 7, 8, 8, 8, 8, 9, 13]


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestRejected, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_threads_may_share_it(tokenizer: Tokenizer) -> None:
    texts = [f"<|eom|> hello {number} é" * 20 for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_byte_level_tokenizers_are_read(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end of text ✓|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "naïve 😀\n<|end of text ✓|>"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert sorted(tokenizer.token_bytes(id) for id in range(256)) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_text(256) == "<|end of text ✓|>"
    assert tokenizer.bos_token_id is None


def test_a_strip_decoder_drops_the_first_space_of_a_whole_text(folder: Path, tmp_path: Path) -> None:
    steps = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["decoder"]["decoders"]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    other = changed(folder, tmp_path, {"decoder": {"type": "Sequence", "decoders": [*steps, strip]}})
    tokenizer = Tokenizer.from_folder(other)
    ids = tokenizer.encode(" hello", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert tokenizer.token_text(ids[0]) == " hello"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Magic"}}', '{"decoder": 3}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}])
def test_other_decoders_are_named(folder: Path, tmp_path: Path, decoder: dict[str, Any] | None) -> None:
    other = changed(folder, tmp_path, {"decoder": decoder})
    with pytest.raises(CheckpointError, match=f"decoder of tokenizer.json is {decoder['type'] if decoder else 'miss'}"):
        Tokenizer.from_folder(other)


def test_special_tokens_that_swallow_spaces_are_refused(tmp_path: Path) -> None:
    raw = build_tokenizer("jamba-1.5")
    raw.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="'<mask>' has lstrip"):
        Tokenizer.from_folder(tmp_path)


def test_a_config_that_names_an_unknown_token(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path, {})
    (other / "tokenizer_config.json").write_text('{"bos_token": "<s>"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="bos_token '<s>'"):
        Tokenizer.from_folder(other)
    (other / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(other)
