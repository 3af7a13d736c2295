"""Runs the part `transformers` of the GPU check: times the method `generate` of transformers, with the same model
shapes and on the same GPU as this engine.

transformers uses mamba-ssm and causal-conv1d if they are installed. Otherwise it uses plain torch code, which scans
token by token.
"""

from __future__ import annotations

import gc
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from benchmarks.gpu.engine import DECODE_PROMPT, OTHERS, SIZES, too_large
from benchmarks.gpu.predict import Ceilings, Work, decode_work, measure_ceilings, prefill_work
from benchmarks.gpu.record import Job, Record
from benchmarks.shapes import Format, write_config
from jamba_server.engine.model_config import JambaConfig, load_model_config

KERNELS = ("mamba_ssm", "causal_conv1d")
STEPS = 8
WARM_UP = 64  # number of tokens in the first prompt, which warms up the GPU and is not timed
PATIENCE = 45.0  # a prompt is not timed if its prefill is estimated to take more seconds than this


def run(job: Job, record: Record) -> None:
    if job.format != "bf16" or job.options:
        raise SystemExit("The part transformers takes neither --formats nor --engine.")
    transformers.logging.set_verbosity_error()
    sizes = SIZES.get(job.shape, OTHERS)
    wanted = [job.key("prefill", length) for length in sizes.prompts]
    wanted += [job.key("decode", count) for count in sizes.sequences]
    if job.key("memory") in record.rows or all(key in record.rows for key in wanted):
        return
    ceilings = measure_ceilings(job.device)
    found = {name: find_spec(name) is not None for name in KERNELS}
    record.start_run(job, before=msgspec.to_builtins(ceilings), kernels=found)
    with tempfile.TemporaryDirectory() as folder:
        write_config(job.shape, Path(folder))
        config = load_model_config(Path(folder))
        if (reason := too_large(config, job)) is not None:
            record.cell(job.key("memory"), lambda: {"left_out": reason})
            return
        peer = Peer(Path(folder), job, config, ceilings)
    for length in sizes.prompts:
        record.cell(job.key("prefill", length), partial(peer.prefill, length))
    for count in sizes.sequences:
        record.cell(job.key("decode", count), partial(peer.decode, count))
    del peer
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    record.note(after=msgspec.to_builtins(measure_ceilings(job.device)))


class Peer:
    """A transformers model with random weights on one device, and functions that time its prefill and decode.

    `rate` is the prefill rate of the last prompt, from which the time of the next prompt is estimated.
    """

    def __init__(self, folder: Path, job: Job, config: JambaConfig, ceilings: Ceilings) -> None:
        self.config, self.policy, self.ceilings = config, Format.parse(job.format).policy, ceilings
        self.rate: float | None = None  # prefill rate in tokens per second, or None before the first prompt is timed
        own = transformers.AutoConfig.from_pretrained(folder)
        with torch.device(job.device):
            self.model: Any = transformers.AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16).eval()
        self.model.generation_config.eos_token_id = None

    def seconds(self, count: int, length: int, tokens: int) -> float:
        prompts = torch.randint(3, self.config.vocab_size, (count, length), device=self.model.device)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        replies = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        assert replies[:, length:].cpu().shape == (count, tokens), "copying to the CPU waits until the device is done"
        return time.perf_counter() - start

    def prefill(self, length: int) -> dict[str, Any]:
        if self.rate and length / self.rate > PATIENCE:
            return {"left_out": f"{length / self.rate:.0f} s, by the last prompt's {self.rate:,.0f} tok/s"}
        if self.rate is None:
            self.seconds(1, WARM_UP, 1)
        seconds = self.seconds(1, length, 1)
        self.rate = length / seconds
        work = prefill_work(self.config, self.policy, tokens=length, chunk=length)
        return self.row("prefill", length, self.rate, length, work)

    def decode(self, count: int) -> dict[str, Any]:
        self.seconds(count, DECODE_PROMPT, 2)
        seconds = self.seconds(count, DECODE_PROMPT, STEPS + 1) - self.seconds(count, DECODE_PROMPT, 1)
        work = decode_work(self.config, self.policy, sequences=count, context=DECODE_PROMPT + STEPS // 2)
        return self.row("decode", count, count * STEPS / seconds, count, work)

    def row(self, kind: str, size: int, rate: float, tokens: int, work: Work) -> dict[str, Any]:
        predicted = tokens / work.seconds(self.ceilings)
        return {"kind": kind, "size": size, "tok_s": rate, "predicted": predicted, "bound": work.bound(self.ceilings)}
