"""From a vocabulary entry to the bytes that it stands for.

Two families of decoders spell bytes in a vocabulary: SentencePiece's (a marker for the space, `<0xNN>` for a single
byte: every Jamba checkpoint), and GPT-2's byte level (each byte is one printable character). Knowing the bytes of
every token is what makes decoding a plain concatenation, independent of how the tokens arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from jamba_server.engine.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder(msgspec.Struct, frozen=True):
    """The "decoder" of tokenizer.json; a Sequence holds others."""

    type: str
    decoders: list[Decoder] = msgspec.field(default_factory=list["Decoder"])
    pattern: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    content: str = ""

    def steps(self) -> list[Decoder]:
        if self.type != "Sequence":
            return [self]
        return [step for decoder in self.decoders for step in decoder.steps()]


def bytes_reader(decoder: Decoder | None) -> Callable[[str], bytes]:
    """The function that gives a token's bytes from its spelling. Raises CheckpointError for other decoders.

    `Fuse` joins tokens and `Strip` drops a leading space of a whole text: neither changes a single token.
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
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest begin at U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _byte_level(spelling: str) -> bytes:
    """Added tokens with other characters are spelled as they are, as the `tokenizers` library has it."""
    if all(char in _BYTE_OF_CHAR for char in spelling):
        return bytes(_BYTE_OF_CHAR[char] for char in spelling)
    return spelling.encode()
