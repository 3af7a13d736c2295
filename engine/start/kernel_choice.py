"""Checks that the chosen kernels support the other options of the server, such as the page size and the dtype of the KV
cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.kernels.external import FLASH_PAGE

FP8_KERNELS = ("triton", "reference")  # the kernels that can read and write KV pages in float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # the lowest compute capability of GPUs that support float8_e4m3fn


def check_kernels(config: EngineConfig, dtype: torch.dtype, device: torch.device, names: Mapping[str, str]) -> None:
    """Raises ConfigError if a chosen kernel does not support the page size or the dtypes that the options ask for.
    `names` maps each operation to the name of the kernel chosen for it."""
    _check_flash_attention(config.block_size, dtype, names)
    if config.kv_cache_dtype == "fp8":
        _check_fp8_pages(device, names)


def _check_flash_attention(block_size: int, dtype: torch.dtype, names: Mapping[str, str]) -> None:
    ops = [op for op in ("attention_prefill", "attention_decode") if names[op] == "flash-attn"]
    if ops and block_size % FLASH_PAGE:
        raise ConfigError(
            f"kernels: {ops[0]}=flash-attn needs a block_size that is a multiple of {FLASH_PAGE} tokens, not "
            f"{block_size}: add --block-size {FLASH_PAGE}, or choose another kernel."
        )
    if ops and dtype == torch.float32:
        raise ConfigError(f"kernels: {ops[0]}=flash-attn supports bfloat16 and float16, not float32.")


def _check_fp8_pages(device: torch.device, names: Mapping[str, str]) -> None:
    able = {"write_kv": FP8_KERNELS, "attention_prefill": (*FP8_KERNELS, "torch"), "attention_decode": FP8_KERNELS}
    unable = [f"{op}={names[op]}" for op, kernels in able.items() if names[op] not in kernels]
    if unable:
        raise ConfigError(
            f"kv_cache_dtype 'fp8' is not supported by the kernels {', '.join(unable)}; leave the option out, or add "
            "--kernels attention=reference, which is slow."
        )
    if device.type == "cuda" and (have := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        raise ConfigError(
            "kv_cache_dtype 'fp8' needs a GPU of compute capability {}.{}, not {}.{}.".format(*FP8_CAPABILITY, *have)
        )
