"""The checkpoint that ships with the package: complete, small, and readable by others than us."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from jamba_server.engine.model_config import load_model_config
from jamba_server.server.demo import DESCRIPTION, demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.detokenizer import Detokenizer
from jamba_server.server.text.tokenizer import Tokenizer

FOLDER = demo_folder()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    found = ChatTemplate.from_folder(FOLDER, tokenizer)
    assert found is not None
    return found


def test_it_is_small_and_says_what_it_is() -> None:
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "__init__.py",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) < 64_000_000
    assert DESCRIPTION.startswith("demonstration")
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "no assistant" in card
    assert "CDLA-Sharing-1.0" in card


def test_it_has_every_structural_element_of_jamba_mini() -> None:
    config = load_model_config(FOLDER)
    assert config.attention_layers == (4,)
    assert [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)] == [1, 3, 5, 7]
    assert 1 < config.num_experts_per_tok < config.num_experts
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 4096
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == config.num_parameters()


def test_transformers_loads_it_completely_and_it_knows_how_stories_begin(tokenizer: Tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import JambaForCausalLM

        loaded: Any = JambaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
        ids = tokenizer.encode("Once upon a time, there was a little girl named Lily.")
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert [key for key, names in report.items() if names] == []
    nats = -scores[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    assert nats < 1.5, "random weights give 8.3, the logarithm of the vocabulary"


def test_ids_agree_between_the_files(tokenizer: Tokenizer) -> None:
    config = load_model_config(FOLDER)
    special = tokenizer.special_tokens
    assert tokenizer.vocab_size == config.vocab_size
    assert config.eos_token_ids == (special["<|endoftext|>"], special["<|eom|>"])
    assert (config.bos_token_id, config.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
    defaults = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert tuple(defaults["eos_token_id"]) == config.eos_token_ids


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a fox.\n\nThe end", "  12 + 34", "héllo 😀 中文 \x00\x7f"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.special_tokens["<|unk|>"] not in ids
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    assert "".join(detokenizer.push([id]) for id in ids) + detokenizer.finish() == text


def test_words_are_pieces_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.token_text(id) for id in tokenizer.encode("Once upon a time 123", add_special_tokens=False)]
    assert pieces == ["Once", " upon", " a", " time", " ", "1", "2", "3"]


def test_the_reply_begins_with_the_space_that_the_template_owns(template: ChatTemplate) -> None:
    chat = template.render([{"role": "user", "content": "Hi"}])
    assert chat.text == "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|>"
    assert chat.strip_leading_space
    assert chat.prompt_ids[0] == 1
    assert chat.prompt_ids.count(1) == 1


def test_the_folder_is_found_wherever_the_process_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (demo_folder() / "config.json").is_file()
