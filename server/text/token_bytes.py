"""Converts a token's spelling in the vocabulary to the bytes of the token's text.

Two kinds of vocabulary are read. In SentencePiece's, a marker stands for the space and `<0xNN>` for a single byte;
every Jamba checkpoint has this kind. In GPT-2's byte-level vocabulary, one printable character stands for each byte.
Once the bytes of every token are known, decoding is concatenation and does not depend on how the tokens arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from jamba_server.engine.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(msgspec.Struct, frozen=True):
    """The value of the key "decoder" in tokenizer.json. A decoder of the type Sequence contains other decoders."""

    type: str
    decoders: list[Decoder] = msgspec.field(default_factory=list["Decoder"])
    pattern: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    content: str = ""

    def steps(self) -> list[Decoder]:
        if self.type != "Sequence":
            return [self]
        return [step for decoder in self.decoders for step in decoder.steps()]


def bytes_reader(decoder: Decoder | None) -> Callable[[str], bytes]:
    """Returns a function that converts the spelling of a token to the bytes of its text.

    Raises CheckpointError for an unknown decoder.

    The steps `Fuse` (joins tokens) and `Strip` (drops the leading space of a text) are accepted and ignored here,
    because they do not change the bytes of a single token.
    """
    steps = decoder.steps() if decoder else []
    kinds = {step.type for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level
    foreign = kinds - {"Replace", "ByteFallback", "Fuse", "Strip"}
    replacements = [(step.pattern.get("String"), step.content) for step in steps if step.type == "Replace"]
    if foreign or "ByteFallback" not in kinds or any(pattern is None for pattern, _ in replacements):
        raise CheckpointError(
            f"The decoder of tokenizer.json is {' + '.join(step.type for step in steps) or 'missing'}; this server "
            "reads ByteLevel, or Replace (of a string) with ByteFallback, Fuse and Strip."
        )
    return lambda spelling: _byte_fallback(spelling, replacements)


def _byte_fallback(spelling: str, replacements: list[tuple[str | None, str]]) -> bytes:
    for pattern, content in replacements:
        spelling = spelling.replace(pattern or "", content)
    match = _BYTE_TOKEN.fullmatch(spelling)
    return bytes([int(match[1], 16)]) if match else spelling.encode()


def _byte_alphabet() -> dict[str, int]:
    """Returns a table from characters to bytes. In a vocabulary like GPT-2's, each character of a token's spelling
    encodes one byte.

    A printable Latin-1 character stands for its own byte; the other bytes have the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _byte_level(spelling: str) -> bytes:
    """Returns the bytes of a token in whose spelling each character encodes one byte, as in GPT-2's vocabulary.

    An added token may contain other characters; its bytes are then its UTF-8 form, as in the `tokenizers` library.
    """
    if all(char in _BYTE_OF_CHAR for char in spelling):
        return bytes(_BYTE_OF_CHAR[char] for char in spelling)
    return spelling.encode()
