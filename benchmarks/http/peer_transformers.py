"""Times transformers' `generate` with one request after the other, for comparison with the server in `serving.py`.

The program reads one JSON object from standard input: `model`, `dtype`, `device`, `threads`, `load_format`, `requests`
(each with the token ids `prompt` and `max_tokens`) and `max_seconds`. It writes one JSON object to standard output: the
conditions, and for each request the times at which `generate` returned its tokens. Decoding is greedy and does not stop
at end-of-text, as in the server's run.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Arrivals(BaseStreamer):
    """Records the time at which `generate` streams each token. The first call of the method `put` passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times += [time.perf_counter()] * value.numel()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def load(job: dict[str, Any]) -> Any:
    device = job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = job["dtype"] if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    if job["load_format"] == "dummy":
        config = AutoConfig.from_pretrained(job["model"])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def generate(model: Any, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    arrivals = Arrivals()
    start = time.perf_counter()
    input_ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0, "streamer": arrivals}
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    num_tokens = output.shape[1] - len(prompt)
    if num_tokens != len(arrivals.times):
        raise RuntimeError(f"generate returned {num_tokens} tokens and streamed {len(arrivals.times)}")
    return {
        "start": start,
        "arrivals": arrivals.times,
        "end": arrivals.times[-1],
        "prompt_tokens": len(prompt),
        "output_tokens": num_tokens,
        "max_tokens": max_tokens,
    }


def main() -> None:
    job = json.load(sys.stdin)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    model = load(job)
    warm_up, *requests = job["requests"]
    generate(model, warm_up["prompt"], warm_up["max_tokens"])
    records: list[dict[str, Any]] = []
    deadline = time.perf_counter() + job["max_seconds"]
    for request in requests:
        if time.perf_counter() >= deadline:
            break
        records.append(generate(model, request["prompt"], request["max_tokens"]))
    conditions = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }
    json.dump({"conditions": conditions, "records": records}, sys.stdout)


if __name__ == "__main__":
    main()
