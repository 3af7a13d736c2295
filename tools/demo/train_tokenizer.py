"""Trains a small BPE tokenizer. The file tokenizer.json of this tokenizer has the same parts as the file of Jamba's
tokenizer, but fewer vocabulary entries.

The ids begin with the special tokens of Jamba 1.5 to 1.7 in their order. Then come 256 byte tokens, and then single
characters and merges learned from the text. A space is written "▁" and belongs to the word after it. Each digit is a
token of its own, and a newline is its byte token.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, EOM = "<|startoftext|>", "<|endoftext|>", "<|eom|>"
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|unk|>",
    "<|eom|>",
    "<|bom|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<documents>",
    "</documents>",
    "<tool_definitions>",
    "</tool_definitions>",
    "<active_output_modes>",
    "</active_output_modes>",
    "<citations>",
    "</citations>",
    "<tool_calls>",
    "</tool_calls>",
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# This pattern matches the units of a text. Each unit is a word or punctuation with the space before it, one digit, or
# one space. A BPE merge never joins pieces of two units.
_WORDS = r"▁?\p{L}+|[0-9]|▁?[^\p{L}0-9▁]+|▁"


def read_text(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file. A file with the suffix .xz is decompressed.

    Empty lines, and lines that consist of a special token, are left out.
    """
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            if (text := line.rstrip("\n")) and text not in SPECIAL_TOKENS:
                yield text


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a tokenizer. The argument `vocab_size` is the total number of vocabulary entries: special tokens, bytes,
    characters and merged pieces."""
    first_piece = len(SPECIAL_TOKENS) + len(BYTE_TOKENS)
    pieces, merges = _learn_merges(lines, vocab_size - first_piece)
    names = [*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces]
    assert len(names) == vocab_size == len(set(names)), "too little text for so many entries"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=merges,
            unk_token="<|unk|>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, names.index(BOS))]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
    return tokenizer


def _learn_merges(lines: Iterable[str], count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learns `count` vocabulary pieces from the text. Returns these pieces, and the BPE merges that form them, both in
    the order in which they were learned.

    The first pieces are the printable ASCII characters and "▁".
    """
    alphabet = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=count, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    learner.train_from_iterator(lines, trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]
