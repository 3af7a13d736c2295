"""Writes the trained demonstration model as a checkpoint in Hugging Face's format, with a model card.

    python tools/demo/export.py --data FOLDER --trained FOLDER --template server/demo/chat_template.jinja --out FOLDER

--trained is the folder that train.py has written. The figures and samples in the card come from this project's engine,
which loads the new checkpoint. Its held-out loss must agree with that of the training code to 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
from evaluate import ORDER, encoded
from model import Jamba, Shape
from ngram import NGram
from train_tokenizer import SPECIAL_TOKENS

from jamba_server.engine.quantization import FORMATS
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM

STORY = "Tell me a story about a dog and a ball."
GREETING = "Hi, how are you?"
REQUESTS = (
    STORY,
    "Tell me a story about a cat.",
    "Write a short story about a bird and a tree.",
    "Tell me a story about a boat and the sea.",
    "Tell me a story.",
    "Please tell me a story about a girl and a cake.",
    "Can you tell me a story about a bear?",
    GREETING,
    "What is your name?",
    "Thank you!",
)
CACHE = 1 << 26  # size of the engine's KV cache in bytes
TEMPERATURE = 0.3  # default temperature of the model, low enough that stories keep to their subject
# largest allowed relative difference (a fraction) between the held-out loss of the engine and that of the training code
TOLERANCE = 0.005


def config(shape: Mapping[str, int]) -> dict[str, Any]:
    """Returns the content of config.json as a dictionary, with the keys that transformers reads."""
    ids = {name: SPECIAL_TOKENS.index(f"<|{text}|>") for name, text in (("pad", "pad"), ("bos", "startoftext"))}
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "torch_dtype": "bfloat16",
        **shape,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "use_cache": True,
        "pad_token_id": ids["pad"],
        "bos_token_id": ids["bos"],
        "eos_token_id": [SPECIAL_TOKENS.index(data.EOS), SPECIAL_TOKENS.index(data.EOM)],
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(saved: Mapping[str, Any], tokenizer: Path, template: Path, out: Path) -> int:
    """Writes all files of the checkpoint except the model card. Returns the number of parameters."""
    model = Jamba(Shape(**saved["shape"]))
    model.load_state_dict(saved["average"])
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.tensors()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors creates files that other users are not allowed to read
    values = config(saved["shape"])
    write_json(out / "config.json", values)
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", ids | {"do_sample": True, "temperature": TEMPERATURE})
    named = {"bos_token": data.BOS, "eos_token": data.EOS, "unk_token": "<|unk|>", "pad_token": "<|pad|>"}
    rest = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | named | rest)
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    if template.resolve() != (out / "chat_template.jinja").resolve():
        shutil.copyfile(template, out / "chat_template.jinja")
    return sum(weight.numel() for weight in weights.values())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of a text. The text already contains <|startoftext|>, so the tokenizer does not add this
    token."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def load(folder: Path, **settings: Any) -> LLM:
    sizes = {"max_num_seqs": 16, "kv_cache_memory_bytes": CACHE, "state_cache_memory_bytes": 0}
    return LLM(folder, enable_prefix_caching=False, **sizes, **settings)


def held_out_nats(llm: LLM, documents: list[list[int]]) -> float:
    """Returns the negative log-likelihood in nats, summed over all tokens except the first token of each document."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    total = 0.0
    for completion in llm.generate([*documents], params):
        scored = [entry for entry in completion.prompt_logprobs if entry is not None]
        assert len(scored) == len(completion.prompt) - 1
        total -= sum(entry.logprob for entry in scored)
    return total


def answer(llm: LLM, tokenizer: Tokenizer, request: str, temperature: float, seed: int) -> str:
    """Generates a reply to a request. Returns the request and the reply as Markdown for the model card. The leading
    space of the reply is removed."""
    prompt = encode(tokenizer, data.chat([request]) + "<|bom|><|assistant|>")
    (completion,) = llm.generate([prompt], SamplingParams(max_tokens=400, temperature=temperature, seed=seed))
    how = f"seed {seed}" if temperature else "greedy"
    cut = "" if completion.finish_reason == "stop" else ", cut at 400 tokens"
    return f"**{request}** ({how}{cut})\n\n> " + completion.text.strip().replace("\n", "\n> ")


def samples(llm: LLM, tokenizer: Tokenizer) -> Iterator[str]:
    yield answer(llm, tokenizer, STORY, 0.0, 0)
    for number, request in enumerate(REQUESTS, 1):
        yield answer(llm, tokenizer, request, 0.7, number)


CARD = Path(__file__).with_name("card.md")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the trained demonstration checkpoint.")
    parser.add_argument("--data", type=Path, required=True, help="folder with " + ", ".join(data.FILES))
    parser.add_argument("--trained", type=Path, required=True, help="folder that train.py has written")
    parser.add_argument("--template", type=Path, required=True, help="chat template to copy into the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    saved = torch.load(arguments.trained / "best.pt", weights_only=True)
    out: Path = arguments.out
    parameters = write_checkpoint(saved, arguments.trained / "tokenizer.json", arguments.template, out)
    text = data.read(arguments.data)
    size = sum(len(story.encode()) for story in text.held_out) * math.log(2)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    documents = encoded(tokenizer, text.held_out)
    llm = load(out)
    bits, trained = held_out_nats(llm, documents) / size, saved["best"]
    counted = NGram(encoded(tokenizer, text.stories), order=ORDER, vocab_size=tokenizer.get_vocab_size())
    losses = {name: held_out_nats(load(out, quantization=name), documents) / size for name in FORMATS}
    log = [json.loads(line) for line in (arguments.trained / "log.jsonl").read_text().splitlines()]
    step = saved["step"]
    card = CARD.read_text(encoding="utf-8").format(
        **saved["shape"],
        parameters=parameters,
        megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        steps=step,
        tokens=saved["tokens"] / 1e6,
        epochs=f"pass {saved['position'][0] + 1} over the data",
        minutes=round(next(line["seconds"] for line in log if line["step"] == step) / 60),
        bits=bits,
        **losses,
        counted=counted.nats(documents) / size,
        order=ORDER,
        trained=trained,
        chat=data.CHAT_STORIES,
        books=data.BOOK_SHARE,
        samples="\n\n".join(samples(llm, tokenizer)),
        log="\n".join(
            f"| {line['step']:,} | {line['tokens']:,} | {line['held_out_bits_per_byte']:.4f} |" for line in log
        ),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out bits per byte: engine {bits:.4f}, training {trained:.4f}, {losses}")
    if abs(bits / trained - 1) > TOLERANCE:
        sys.exit(f"the engine's loss differs from the training code's by more than {TOLERANCE:.1%}")


if __name__ == "__main__":
    main()
