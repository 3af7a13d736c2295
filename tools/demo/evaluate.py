"""Measures the loss of a running server on held-out stories, and compares it with the loss of a 5-gram model.

    jamba serve &
    python tools/demo/evaluate.py --data FOLDER --url http://127.0.0.1:8000

The log-probabilities come from /v1/completions with `echo` and `logprobs`. Each held-out story is a prompt of its own
after <|startoftext|>. Its tokens and the <|endoftext|> after it are scored.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
import httpx
from ngram import NGram
from tokenizers import Tokenizer

ORDER = 5
DEMO = Path(__file__).resolve().parents[2] / "server" / "demo"
CLIENTS = 8  # largest number of requests that wait for a reply at the same time


def encoded(tokenizer: Tokenizer, stories: list[str]) -> list[list[int]]:
    texts = [data.BOS + story + data.EOS for story in stories]
    return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]


def served_nats(url: str, documents: list[list[int]]) -> float:
    """Returns the negative log-likelihood in nats, summed over all tokens except the first token of each document.

    It is computed from the prompt's log-probabilities that the server returns.
    """
    with httpx.Client(base_url=url, timeout=120) as client:

        def score(ids: list[int]) -> float:
            body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
            reply = client.post("/v1/completions", json=body)
            reply.raise_for_status()
            scores: list[float | None] = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
            prompt = scores[1 : len(ids)]
            if scores[0] is not None or len(prompt) != len(ids) - 1:
                raise ValueError(f"{len(ids)} tokens were sent, {len(scores)} scored; the first must have no score")
            return -sum(value for value in prompt if value is not None)

        with ThreadPoolExecutor(CLIENTS) as pool:
            return sum(pool.map(score, documents))


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of a running server and of a 5-gram model.")
    parser.add_argument("--data", type=Path, required=True, help="folder with " + ", ".join(data.FILES))
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="address of a server that runs the demonstration model"
    )
    parser.add_argument("--tokenizer", type=Path, default=DEMO / "tokenizer.json", help="the model's tokenizer.json")
    arguments = parser.parse_args()
    text = data.read(arguments.data)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    held_out = encoded(tokenizer, text.held_out)
    bits = sum(len(story.encode()) for story in text.held_out) * math.log(2)
    served = served_nats(arguments.url, held_out) / bits
    print(f"{len(held_out)} stories, {sum(map(len, held_out)):,} tokens")
    print(f"served: {served:.4f} bits per byte", flush=True)
    counted = NGram(encoded(tokenizer, text.stories), order=ORDER, vocab_size=tokenizer.get_vocab_size())
    print(f"{ORDER}-gram, Kneser-Ney, on the same split: {counted.nats(held_out) / bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
