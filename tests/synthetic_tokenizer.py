"""Tokenizers with the layout of the two Jamba families, small enough to build in a test.

Special ids, byte tokens and the comma are where `tokenizer.json` of the real checkpoints has them; above them stand
single characters and a few merges instead of 64 thousand pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, processors

Family = Literal["jamba-1.5", "reasoning"]

FIRST_RESERVED, LAST_RESERVED = 516, 1539
FIRST_BYTE = 1544
FIRST_PIECE = 1800

_CORE = {"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|unk|>": 3}
_JAMBA_1_5 = (
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
_REASONING = {
    "<|im_start|>": 518,
    "<|im_end|>": 519,
    "<tool_call>": 531,
    "</tool_call>": 532,
    "<tool_response>": 539,
    "</tool_response>": 540,
    "<think>": 541,
    "</think>": 542,
}
# In the order of their priority. "▁" is the space.
_MERGES = ["t h", "th e", "▁ the", "h e", "l l", "he ll", "hell o", "▁ hello", "i n", "B C", "x BC"]


def special_ids(family: Family) -> dict[str, int]:
    """Tokens of the family beside the reserved ones, special or not."""
    if family == "jamba-1.5":
        return _CORE | {token: 518 + number for number, token in enumerate(_JAMBA_1_5)}
    return _CORE | _REASONING


def build_tokenizer(family: Family) -> tokenizers.Tokenizer:
    names = {number: token for token, number in special_ids(family).items()}
    names |= {number: f"<|mask_{number - 4}|>" for number in range(4, 516)}
    names |= {516 + k: names.get(516 + k, f"<|reserved_{k}|>") for k in range(LAST_RESERVED - FIRST_RESERVED + 1)}
    names |= {1540: "<|PRE|>", 1541: "<|MID|>", 1542: "<|SUF|>", 1543: ","}
    names |= {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    characters = [chr(code) for code in range(0x21, 0x7F) if chr(code) != ","] + ["▁"]
    pieces = characters + [merge.replace(" ", "") for merge in _MERGES]
    vocab = {token: number for number, token in names.items()}
    vocab |= {piece: FIRST_PIECE + number for number, piece in enumerate(pieces)}
    merges = [(left, right) for left, right in (merge.split() for merge in _MERGES)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<|unk|>", byte_fallback=True, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair=None, special_tokens=[("<|startoftext|>", 1)]
    )
    for token in special_ids(family):
        if family == "reasoning" and token == "<|endoftext|>":
            continue  # as in the real file: an entry of the vocabulary and nothing more
        special = family == "jamba-1.5" or token.startswith("<|")
        added = tokenizers.AddedToken(token, normalized=False, special=special)
        tokenizer.add_special_tokens([added]) if special else tokenizer.add_tokens([added])
    return tokenizer


def write_tokenizer(folder: Path, family: Family, *, chat_template: str | None = None) -> None:
    """tokenizer.json and tokenizer_config.json of a checkpoint folder."""
    (folder / "tokenizer.json").write_text(build_tokenizer(family).to_str(), encoding="utf-8")
    config: dict[str, object] = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>" if family == "jamba-1.5" else "<|im_end|>",
        "unk_token": "<|unk|>",
        "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "special": True},
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
