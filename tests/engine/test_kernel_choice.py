"""Kernels that cannot do what other choices ask, and pages in fp8, which not all of them read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.kernel_choice import check_kernels
from jamba_server.kernels.table import OPS
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, GREEDY, OTHERS, SAMPLED, SUBJECT, result

FP8 = EngineConfig(model="m", kv_cache_dtype="fp8")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("op", ["attention_prefill", "attention_decode"])
def test_flash_attention_wants_its_own_pages(op: str) -> None:
    names = dict.fromkeys(OPS, "triton") | {op: "flash-attn"}
    for size in (16, 128, 300):
        with pytest.raises(ConfigError, match=rf"{op}=flash-attn needs .* multiple of 256 tokens, not {size}:"):
            check_kernels(EngineConfig(model="m", block_size=size), torch.bfloat16, CUDA, names)
    config = EngineConfig(model="m", block_size=512)
    with pytest.raises(ConfigError, match="not float32"):
        check_kernels(config, torch.float32, CUDA, names)
    check_kernels(config, torch.float16, CUDA, names)
    check_kernels(EngineConfig(model="m"), torch.float32, CUDA, dict.fromkeys(OPS, "triton"))


def test_fp8_pages_want_kernels_that_read_them() -> None:
    large = EngineConfig(model="m", kv_cache_dtype="fp8", block_size=256)
    for name in ("cpu", "flash-attn", "torch"):
        names = dict.fromkeys(OPS, "triton") | {"attention_decode": name}
        with pytest.raises(ConfigError, match=rf"kv_cache_dtype 'fp8' .*_decode={name};.*attention=reference"):
            check_kernels(large, torch.bfloat16, CPU, names)
        check_kernels(EngineConfig(model="m", block_size=256), torch.bfloat16, CPU, names)
    for names in (dict.fromkeys(OPS, "reference"), dict.fromkeys(OPS, "triton") | {"attention_prefill": "torch"}):
        check_kernels(FP8, torch.bfloat16, CPU, names)


def test_fp8_pages_want_a_gpu_that_has_such_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict.fromkeys(OPS, "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 8\.9, not 8\.6"):
        check_kernels(FP8, torch.bfloat16, CUDA, names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_kernels(FP8, torch.bfloat16, CUDA, names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def load(folder: Path, kv_cache_dtype: str, **settings: Any) -> LLM:
    fixed = {"load_format": "dummy", "threads": 1, "max_model_len": 512, "kernels": {"attention": "reference"}}
    return LLM(folder, kv_cache_dtype=kv_cache_dtype, **fixed, **settings)


def test_an_engine_on_fp8_pages(folder: Path) -> None:
    """Half the bytes a page; near to what it says with wide pages; exact in any batch, chunking and from the cache."""
    sizes = {"max_num_seqs": 4, "state_cache_memory_bytes": 1 << 20}
    plain, narrow = (load(folder, dtype, **sizes) for dtype in ("auto", "fp8"))
    assert plain.core.info.kv_bytes / plain.core.info.num_kv_blocks == pytest.approx(
        2 * narrow.core.info.kv_bytes / narrow.core.info.num_kv_blocks, rel=0.01
    )
    expected = [result(narrow.generate([SUBJECT], params)[0]) for params in (GREEDY, SAMPLED)]
    wide = result(plain.generate([SUBJECT], GREEDY)[0])
    assert wide != expected[0]
    assert wide[1][0][0] == pytest.approx(expected[0][1][0][0], abs=0.05)
    chunked = load(folder, "fp8", max_num_batched_tokens=16, **sizes)
    for llm in (chunked, narrow):
        for params, alone in zip((GREEDY, SAMPLED), expected, strict=True):
            assert result(llm.generate([OTHERS[0], SUBJECT, OTHERS[1]], params)[1]) == alone
