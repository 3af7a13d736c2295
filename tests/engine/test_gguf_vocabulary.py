"""The tokenizer that is made of the vocabulary in a GGUF file."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.checkpoint import open_checkpoint, read_object
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.gguf.merges import find_merges
from jamba_server.engine.gguf.reader import read_gguf
from jamba_server.engine.gguf.vocabulary import Vocabulary
from jamba_server.engine.model_config import load_model_config
from jamba_server.llm import LLM
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "gguf" / "vocabulary.json").read_text(encoding="utf-8"))
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6
FRONT = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# As published files have it: only the ids that the converter knows are marked as control tokens.
FRONT_TYPES = [CONTROL, CONTROL, NORMAL, CONTROL, NORMAL, CONTROL, NORMAL, NORMAL]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def vocabulary(learnt: list[str], **changes: Any) -> dict[str, Any]:
    """The metadata of a vocabulary with these learnt pieces after the special ones, a late one and the bytes."""
    pieces = [*FRONT, "assistant", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-1000.0] * len(pieces),
        "tokenizer.ggml.token_type": [*FRONT_TYPES, NORMAL, *[BYTE] * 256, *[NORMAL] * len(learnt)],
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata | {f"tokenizer.{key}": value for key, value in changes.items()}


LEARNT = [piece for piece in VECTORS["pieces"] if piece != "assistant"]


def write(folder: Path, metadata: dict[str, Any]) -> Path:
    save_tiny(folder, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    return write_gguf(folder / "model.gguf", folder, vocabulary=metadata)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf"), vocabulary(LEARNT))


def test_merges_of_equal_scores_are_those_of_the_published_tokenizer(path: Path) -> None:
    merges = find_merges(Vocabulary(read_gguf(path)))
    assert [list(merge) for merge in merges] == VECTORS["merges"]


def test_the_template_and_the_special_tokens(path: Path) -> None:
    tokenizer = Tokenizer.from_folder(path)
    template = ChatTemplate.from_folder(path, tokenizer)
    assert template is not None
    assert template.source == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 5, 0)
    assert set(tokenizer.special_tokens.values()) == {0, 1, 3, 4, 5}, "control tokens, and <|im_start|> of the template"
    assert tokenizer.tags == {"<think>": 6}, "the template does not write </think>"
    start, content = tokenizer.encode("<|im_start|>", add_special_tokens=False), [4, 4]
    assert start != [4], "the name of a control token in a text is ordinary text"
    chat = template.render([{"role": "user", "content": "<|im_start|> a"}])
    assert chat.prompt_ids[:2] == [1, 4]
    assert chat.prompt_ids.count(4) == len(content)
    assert chat.prompt_ids[-1] == 6
    assert load_model_config(path).eos_token_ids == (5, 2), "<|endoftext|> ends a reply, too"


def test_text_is_split_and_joined(path: Path) -> None:
    tokenizer = Tokenizer.from_folder(path)
    for text in ("the assistant is there", " a   b\n\t\u00e9 \U0001f600", "", "    "):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert tokenizer.encode("the assistant")[-2:] != tokenizer.encode("assistant")[1:]


def llama_cpp(text: str, scores: dict[str, float]) -> list[str]:
    """Splits a text as llama.cpp does: of all neighbours that form a piece, those with the highest score are merged,
    the leftmost first."""
    parts = list(text.replace(" ", "\u2581"))
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_scores_that_differ_say_what_is_merged_first(tmp_path: Path) -> None:
    rng = random.Random(0)
    ranks = list(range(len(LEARNT)))
    rng.shuffle(ranks)
    metadata = vocabulary(LEARNT)
    metadata["tokenizer.ggml.scores"][-len(LEARNT) :] = [-float(rank) for rank in ranks]
    tokenizer = Tokenizer.from_folder(write(tmp_path, metadata))
    pieces = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(pieces, metadata["tokenizer.ggml.scores"], strict=True))
    for _ in range(50):
        text = "".join(rng.choices(LEARNT, k=12)).replace("\u2581", " ")
        assert [pieces[id] for id in tokenizer.encode(text)[1:]] == llama_cpp(text, scores)


def test_a_space_in_front_and_no_bos(tmp_path: Path) -> None:
    changes = {"ggml.add_space_prefix": True, "ggml.add_bos_token": False}
    tokenizer = Tokenizer.from_folder(write(tmp_path, vocabulary(LEARNT, **changes)))
    ids = tokenizer.encode("the")
    assert ids == tokenizer.encode("the") != [1]
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "pieces": ({"ggml.tokens": [1, 2, 3]}, "tokens is an array of 3 elements; an array of strings is expected"),
    "text types": ({"ggml.token_type": ["a"]}, "token_type is an array of 1 elements; a whole number for each of"),
    "kind": ({"ggml.model": "gpt2"}, r'tokenizer\.ggml\.model is "gpt2"; this server reads vocabularies of the kind'),
    "types": ({"ggml.token_type": [1, 2]}, r"token_type is an array of 2 elements; a whole number for each of \d+"),
    "scores": ({"ggml.scores": [1.0]}, "scores is an array of 1 elements; a number for each of"),
    "not finite": ({"ggml.scores": [float("nan")] * (len(LEARNT) + 265)}, "finite numbers are expected"),
    "end token": ({"ggml.add_eos_token": True}, "add_eos_token is true; this server adds no end token"),
    "flag": ({"ggml.add_bos_token": 1}, "add_bos_token is 1; true or false is expected"),
    "long template": ({"chat_template": "x" * 10_000_000}, "has 10,000,000 characters; at most 1,048,576"),
    "template": ({"chat_template": 1}, r"tokenizer\.chat_template is 1; a string is expected"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_vocabulary_is_refused(kind: str, tmp_path: Path) -> None:
    changes, words = WRONG[kind]
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.from_folder(write(tmp_path, vocabulary(LEARNT, **changes)))


@pytest.mark.parametrize(
    ("learnt", "words"),
    [
        ([*LEARNT, "qqzz"], r'the piece "qqzz" \(id \d+\) is not made of earlier ones, .* with --tokenizer\.'),
        ([*LEARNT, "in"], 'the piece "in" is there twice'),
        ([*LEARNT, "q" * 129], "a piece has 129 characters; at most 128"),
    ],
)
def test_an_unknown_order_is_refused(learnt: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.from_folder(write(tmp_path, vocabulary(learnt)))


def test_a_tokenizer_of_another_folder(path: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path, vocab_size=4100)
    plain = write_gguf(tmp_path / "model.gguf", tmp_path)
    llm = LLM(plain, tokenizer=str(demo_folder()), threads=1, max_num_seqs=1)
    [reply] = llm.generate("Once upon a time", max_tokens=2)
    assert reply.prompt == Tokenizer.from_folder(demo_folder()).encode("Once upon a time")


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = write_gguf(tmp_path / "model.gguf", tmp_path)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.has("tokenizer.json")
    assert read_object(checkpoint, "tokenizer_config.json") is None
    with pytest.raises(CheckpointError, match=r"model\.gguf has no tokenizer\.json"):
        Tokenizer.from_folder(path)
