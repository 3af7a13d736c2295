"""Shows on stderr what fraction of a model has loaded, and then the model's size, memory and limits."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from jamba_server.engine.start.machine import format_bytes
from jamba_server.engine.types import EngineInfo
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults

logger = logging.getLogger(__name__)

LOG_STEP = 0.25  # fraction of a phase after which a log line is written, if stderr is no terminal


class LoadProgress:
    """Shows the progress of each phase of the engine's start. On a terminal it is a progress bar, otherwise a few log
    lines. The engine's client calls the method `update`."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("starting", total=None) if self._bar else None
        self._logged: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes the progress bar. Further calls do nothing."""
        if self._bar:
            self._bar.stop()

    def update(self, phase: str, fraction: float) -> None:
        """Shows which fraction (from 0 to 1) of the phase named `phase` is done."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=phase, total=1.0, completed=fraction)
        elif fraction >= self._logged.get(phase, 0.0):
            logger.info("%s: %.0f %%", phase, 100 * fraction)
            # The next log line is written at this fraction. If the engine restarts, the engine's fractions begin at 0
            # again. A fraction that has been logged is not logged again.
            self._logged[phase] = (int(fraction / LOG_STEP) + 1) * LOG_STEP


def describe_engine(info: EngineInfo, defaults: GenerationDefaults) -> list[str]:
    """Returns lines on the loaded model: its size, memory, limits, kernels and sampling defaults, and whether its
    results are reproducible bit by bit."""
    sampling = ", ".join(f"{name} {value:g}" for name, value in defaults.non_defaults().items()) or "OpenAI's defaults"
    eos = ", ".join(map(str, info.eos_token_ids)) or "none"
    tokens = info.num_kv_blocks * info.block_size
    names = sorted(set(info.kernels.values()))
    kernels = "; ".join(f"{name}: {', '.join(op for op, n in info.kernels.items() if n == name)}" for name in names)
    return [
        f"model     {info.architecture}, {info.num_parameters:,} parameters, "
        f"{describe_weights(info.dtype, info.quantization, info.quantize_mamba)}"
        f"{'' if info.activation_quantization == 'none' else f', {info.activation_quantization} activations'}"
        f" on {info.device}, "
        f"loaded in {info.load_seconds:.1f} s",
        f"memory    weights {format_bytes(info.weight_bytes)}; KV pages {format_bytes(info.kv_bytes)} for {tokens:,} "
        f"tokens; states {format_bytes(info.state_bytes)}: {info.max_num_seqs} running, "
        f"{info.num_saved_states} saved{' as int8' if info.state_cache_dtype == 'int8' else ''}",
        *([f"classes   {', '.join(info.labels[:8])}{', ...' if len(info.labels) > 8 else ''}"] if info.labels else []),
        f"limits    {info.max_model_len:,} tokens per sequence, {info.max_num_seqs} sequences, "
        f"{info.max_num_batched_tokens} prompt tokens per step"
        f"{f', {mixed} beside replies' if (mixed := info.max_num_mixed_tokens) < info.max_num_batched_tokens else ''}",
        *([f"steps     {info.step_size}"] if info.step_size else []),
        *([f"threads   {info.threads}"] if info.threads else []),
        f"kernels   {kernels if len(names) > 1 else f'{names[0]} for all ops'}",
        f"results   {describe_results(info)}",
        f"sampling  {sampling}; eos token ids {eos}",
    ]


def describe_role(config: ServerConfig) -> list[str]:
    """Returns a line on the server's part in handing prompts over, or none if it computes prompts and replies alone."""
    if config.role == "prefill":
        return ["role      prefill: this server computes prompts for decode servers, and no replies"]
    if config.role == "decode":
        servers = ", ".join(config.prefill_url)
        return [
            f"role      decode: prompts that lack at least {config.prefill_min_tokens} tokens are computed by {servers}"
            f"; if that fails or takes {config.prefill_timeout:g} s, by this server"
        ]
    return []


def describe_results(info: EngineInfo) -> str:
    """Returns words that say whether a request's results are the same bits in every batch, for every division of its
    prompt into chunks, and with the prefix cache."""
    inexact = f"last bits may depend on the batch: {', '.join(info.batch_dependent_ops)}"
    if info.state_cache_dtype == "auto":
        return (
            inexact if info.batch_dependent_ops else "the same bits in every batch, however prompts are cut and cached"
        )
    batch = inexact if info.batch_dependent_ops else "the same bits in every batch, however prompts are cut"
    return f"{batch}; not exact after a prefix-cache hit or a preemption: {info.state_cache_dtype} saved states"


def describe_weights(dtype: str, quantization: str | None, quantize_mamba: bool) -> str:
    """Returns the number formats of the weights in words, such as `bfloat16 with int8 weights`."""
    if quantization is None:
        return dtype
    return f"{dtype} with {quantization} weights" + (" (Mamba mixers too)" if quantize_mamba else "")
