"""Writes the tokenizer.json and the tokenizer_config.json that describe the vocabulary of a GGUF file."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from jamba_server.engine.gguf.merges import SPACE, Merge, find_merges
from jamba_server.engine.gguf.vocabulary import BYTE, CONTROL, USER_DEFINED, Vocabulary

# The template is searched for each piece that no merge makes, so this many characters are read at most.
_MAX_SEARCH: Final = 1 << 32
_CONTROL_NAME: Final = re.compile(r"<\|[^<>|\s]+\|>")


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """Returns the text of a tokenizer.json, as the library `tokenizers` reads it. Raises CheckpointError if the file
    does not tell how text is split into tokens."""
    if vocabulary.flag("add_eos_token", default=False):
        raise vocabulary.refusal(
            "tokenizer.ggml.add_eos_token", "this server adds no end token to prompts, after which nothing would follow"
        )
    merges = find_merges(vocabulary)
    prefixed = vocabulary.flag("add_space_prefix", default=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = vocabulary.unknown
    return msgspec.json.encode(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(vocabulary, merges),
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "pre_tokenizer": None,
            "post_processor": _post_processor(vocabulary),
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None if unknown is None else vocabulary.pieces[unknown],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": BYTE in vocabulary.types,
                "ignore_merges": False,
                "vocab": {piece: id for id, piece in enumerate(vocabulary.pieces)},
                "merges": merges,
            },
        }
    )


def tokenizer_config_json(vocabulary: Vocabulary) -> bytes:
    """Returns the text of a tokenizer_config.json, with the names of special tokens and the chat template."""
    return msgspec.json.encode({**vocabulary.special_names(), "chat_template": vocabulary.template})


def _added_tokens(vocabulary: Vocabulary, merges: list[Merge]) -> list[dict[str, Any]]:
    """Returns the tokens that are matched as a whole in a text: those that the file marks so, and those that the chat
    template writes although no merge makes them. Published files mark only a few of the latter."""
    made = {left + right for left, right in merges}
    template = vocabulary.template or ""
    searches = len(vocabulary.pieces) - len(made)
    if len(template) * searches > _MAX_SEARCH:
        rule = f"searching it for {searches:,} pieces that no merge makes would take too long"
        raise vocabulary.refusal("tokenizer.chat_template", rule)
    named = {vocabulary.bos, vocabulary.unknown, vocabulary.pad, *vocabulary.named_stops}
    tokens: list[dict[str, Any]] = []
    for id, piece in enumerate(vocabulary.pieces):
        kind = vocabulary.types[id]
        is_control = kind == CONTROL or id in named
        written = len(piece) > 1 and kind != BYTE and piece not in made and piece in template
        if is_control or kind == USER_DEFINED or written:
            # The text of a control token in a message is ordinary text. Tags such as <think> are not control tokens.
            special = is_control or (kind != USER_DEFINED and _CONTROL_NAME.fullmatch(piece) is not None)
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            tokens.append({"id": id, "content": piece, **flags, "special": special})
    return tokens


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Returns the post-processor that puts BOS before every text, or None if the file asks for no BOS."""
    bos = vocabulary.bos
    if bos is None or not vocabulary.flag("add_bos_token", default=True):
        return None
    name = vocabulary.pieces[bos]
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
