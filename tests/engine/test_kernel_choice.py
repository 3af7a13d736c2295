"""Kernels that were wished for and cannot do what the other choices ask."""

from __future__ import annotations

import pytest
import torch

from engine.core import check_flash_attention
from engine.errors import ConfigError
from kernels.table import OPS


@pytest.mark.parametrize("op", ["attention_prefill", "attention_decode"])
def test_flash_attention_wants_its_own_pages(op: str) -> None:
    names = dict.fromkeys(OPS, "triton") | {op: "flash-attn"}
    for size in (16, 128, 300):
        with pytest.raises(ConfigError, match=rf"{op}=flash-attn reads pages of .* 256 tokens, not of {size}"):
            check_flash_attention(size, torch.bfloat16, names)
    with pytest.raises(ConfigError, match="not float32"):
        check_flash_attention(256, torch.float32, names)
    check_flash_attention(512, torch.float16, names)
    check_flash_attention(16, torch.float32, dict.fromkeys(OPS, "triton"))
