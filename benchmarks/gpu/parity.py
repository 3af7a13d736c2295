"""Runs the part `parity` of the GPU check: compares this engine's tokens and log-probabilities with those of
transformers, on tiny checkpoints.

In float32, every greedy token must be the argmax of transformers' logits over the whole prompt and reply, and every
log-probability must be close to transformers'. In bfloat16, the two libraries round in different orders. So both are
compared with transformers in float32, and this engine's error is limited by a multiple of transformers' own error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch
import transformers

from benchmarks.gpu.record import Job, Record
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM, Completion

BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: Mapping[str, dict[str, Any]] = {
    "experts": BASE,
    "dense, tied, one KV head": BASE
    | {"num_experts": 1, "num_experts_per_tok": 1, "num_key_value_heads": 1, "tie_word_embeddings": True},
    # This configuration has the same sizes as AI21's checkpoint Jamba-tiny-dev.
    "0.3 billion": BASE
    | {"vocab_size": 65536, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 8, "attn_layer_period": 8}
    | {"attn_layer_offset": 4, "mamba_dt_rank": 32},
}
LENGTHS, NEW_TOKENS = (1, 17, 64, 300), 16
# largest allowed difference between this engine's log-probability and transformers' log-probability of the same token,
# both computed in float32
FLOAT32_LIMIT = 1e-3
# Largest allowed ratio of two root-mean-square errors of log-probabilities computed in bfloat16: this engine's error
# divided by transformers' error.
BFLOAT16_LIMIT = 2.0
SETTINGS: Mapping[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 64 << 20,
}


def run(job: Job, record: Record) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record.start_run(job)
    # The first model also runs without graphs and without asynchronous scheduling. If only the usual run fails, one of
    # these two is the cause.
    plain = msgspec.structs.replace(job, options=job.options | {"enforce_eager": True, "async_scheduling": False})
    names = list(MODELS) if job.device == "cuda" else list(MODELS)[:1]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            wanted = [job.key(name, "float32"), job.key(name, "bfloat16")]
            eager = job.key(name, "float32", "without graphs") if name == names[0] else None
            if all(key in record.rows for key in (*wanted, eager) if key):
                continue
            model = make_model(Path(folder), MODELS[name]).to(job.device)
            record.cell(wanted[0], partial(float32, job, folder, model))
            record.cell(wanted[1], partial(bfloat16, job, folder, model))
            if eager is not None:
                record.cell(eager, partial(float32, plain, folder, model))


def make_model(folder: Path, config: dict[str, Any]) -> Any:
    """Creates a model with random weights, and saves it in the folder `folder` in float32.

    The weights are drawn again here, because with transformers' own random weights all logits are nearly equal.
    """
    torch.manual_seed(0)
    model: Any = transformers.JambaForCausalLM(transformers.JambaConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model


def generate(job: Job, folder: str, dtype: str) -> list[Completion]:
    """Generates greedy replies to random prompts, one prompt of each length in LENGTHS. The result includes the
    log-probability of each token in the prompts and the replies."""
    llm = LLM(folder, device=job.device, dtype=dtype, **{**SETTINGS, **job.options})
    random = Random(0)
    prompts: list[list[int]] = [
        [random.randrange(3, llm.core.info.vocab_size) for _ in range(length)] for length in LENGTHS
    ]
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0, seed=1
    )
    return llm.generate(prompts, params)


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Returns transformers' log-probability of every vocabulary entry at each position of `tokens` except the first
    position. The result is a float32 array [len(tokens) - 1, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def ours(completion: Completion, device: Any) -> torch.Tensor:
    """Returns the log-probability that this engine has computed for each token of the prompt and the reply, except the
    prompt's first token."""
    prompt = [entry.logprob for entry in completion.prompt_logprobs[1:] if entry is not None]
    return torch.tensor([*prompt, *(entry.logprob for entry in completion.logprobs)], device=device)


def float32(job: Job, folder: str, model: Any) -> dict[str, Any]:
    """Compares this engine's tokens and log-probabilities with those of transformers, both in float32.

    `different` counts replies that differ from transformers' greedy replies, which can happen if two logits are nearly
    equal. The test passes only if each such token is within the limit of transformers' best log-probability.
    """
    worst, below, different = 0.0, 0.0, 0
    for completion in generate(job, folder, "float32"):
        tokens = [*completion.prompt, *completion.token_ids]
        expected = logprobs(model, tokens)
        theirs = expected.gather(1, torch.tensor(tokens[1:], device=expected.device)[:, None])[:, 0]
        worst = max(worst, (theirs - ours(completion, expected.device)).abs().max().item())
        gap = (expected.max(-1).values - theirs)[len(completion.prompt) - 1 :].max().item()
        different += gap > 0
        below = max(below, gap)
    passed = worst <= FLOAT32_LIMIT and below <= FLOAT32_LIMIT
    return {"replies": len(LENGTHS), "different": different, "worst": worst, "limit": FLOAT32_LIMIT, "passed": passed}


def bfloat16(job: Job, folder: str, model: Any) -> dict[str, Any]:
    """Returns two root-mean-square errors of log-probabilities computed in bfloat16: the error of this engine, and the
    error of transformers.

    The errors are differences from the log-probabilities that transformers computes in float32.
    """
    half: Any = transformers.JambaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.to(job.device).eval()
    squares: dict[str, list[torch.Tensor]] = {"ours": [], "transformers": []}
    for completion in generate(job, folder, "bfloat16"):
        tokens = [*completion.prompt, *completion.token_ids]
        exact, rounded = (
            logprobs(m, tokens).gather(1, torch.tensor(tokens[1:], device=job.device)[:, None])[:, 0]
            for m in (model, half)
        )
        squares["ours"].append((ours(completion, job.device) - exact) ** 2)
        squares["transformers"].append((rounded - exact) ** 2)
    error, peer = (torch.cat(values).mean().sqrt().item() for values in squares.values())
    return {"error_rms": error, "transformers_rms": peer, "limit": BFLOAT16_LIMIT, "passed": error <= 2 * peer}
