"""Weights that stay in the blocks of a GGUF file: exact whatever the batch, in the memory that the plan says."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.quantization import Format, QuantizationPolicy
from jamba_server.engine.quantization.blocks import common_format
from jamba_server.engine.start.contents import conversions
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_sizes import kept_formats, step_bytes, weight_bytes
from jamba_server.llm import LLM, Completion
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny

# Rows of whole blocks of 256 numbers.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
SUBJECT = [1, *((7 * i) % 61 + 3 for i in range(69))]
OTHERS = [[1, *((5 * i + n) % 61 + 3 for i in range(3 + n))] for n in range(31)]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3)
FOUR, SIX, EIGHT = (Format(bits=b, limit=m, group_size=g) for b, m, g in ((4, 7, 32), (8, 127, 16), (8, 127, 32)))


def written(folder: Path, kind: str, second: str | None = None, **changes: Any) -> Path:
    """A file whose matrices have one type, but the value and down projections the second one."""
    save_tiny(folder, **WIDE | changes)

    def kind_of(name: str) -> str:
        if name.endswith("ssm_dt.weight"):  # its rows have four numbers
            return "F16"
        return second if second and name.split(".")[-2] in ("attn_v", "ffn_down", "ffn_down_exps") else kind

    return write_gguf(folder / "model.gguf", folder, kind_of)


def result(completion: Completion) -> tuple[list[int], list[Any]]:
    return completion.token_ids, [(entry.logprob, entry.top) for entry in completion.logprobs]


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q8_0"])
def test_a_reply_is_the_same_in_every_company(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)

    def load(**settings: Any) -> LLM:
        return LLM(path, max_model_len=512, **{"threads": 1, "max_num_seqs": 4} | settings)

    llm = load()
    alone = result(llm.generate([SUBJECT], GREEDY)[0])
    assert len(set(alone[0])) > 1, "a reply of one token would say little"
    [cached] = llm.generate([SUBJECT], GREEDY)
    assert cached.num_cached > 0
    assert result(cached) == alone
    batch = load(max_num_seqs=32).generate([*OTHERS[:17], SUBJECT, *OTHERS[17:]], GREEDY)
    assert result(batch[17]) == alone
    for chunk in (1, 7):
        chunked = load(max_num_batched_tokens=chunk, max_num_seqs=1, enable_prefix_caching=False)
        assert result(chunked.generate([SUBJECT], GREEDY)[0]) == alone
    assert result(load(threads=2).generate([SUBJECT], GREEDY)[0]) == alone


def test_formats_of_a_fused_product() -> None:
    blocks = {"a": FOUR, "b": FOUR, "c": SIX, "d": EIGHT}
    assert common_format(blocks, [["a", "b"]]) == (FOUR,)
    assert common_format(blocks, [["a", "c"]]) == (SIX,), "4 bits in groups of 32 fit into 8 bits in groups of 16"
    assert common_format(blocks, [["a", "b"], ["d"]]) == (EIGHT, EIGHT), "experts have one number of bits"
    assert common_format(blocks, [["a", "d"], ["c"]]) == (EIGHT, SIX), "but each product has groups of its own"
    assert common_format(blocks, [["a", "e"]]) is None
    assert common_format({}, [["a"]]) is None


def test_weights_stay_where_the_kernels_can_read_them(tmp_path: Path) -> None:
    path = written(tmp_path, "Q4_K", "Q6_K")
    config = load_model_config(path)
    blocks = kept_formats(config, "cpu")
    experts = "model.layers.1.feed_forward.experts."
    assert set(blocks) == {"model.layers.0.feed_forward.down_proj.weight"}, "Q4_K stands beside the other Q6_K weights"
    assert config.stored[f"{experts}3.down_proj.weight"].kind == "Q6_K"
    assert kept_formats(config, "cuda") == {}
    policy = QuantizationPolicy.of(EngineConfig(model=str(path)), blocks=blocks)
    [text] = conversions(config, policy, "bfloat16")
    count = len(config.stored)
    assert text.startswith(f"{count - 1} of {count} quantised matrices are converted to bfloat16 (")
    assert "5 of type Q6_K" in text
    requested = QuantizationPolicy.of(EngineConfig(model=str(path), quantization="int8"), blocks=blocks)
    assert (requested.blocks, requested.quantization) == ({}, "int8")
    assert conversions(config, requested, "bfloat16") == ()


@pytest.mark.parametrize(("kind", "bits", "group"), [("Q8_0", 8, 32), ("Q4_0", 4, 32), ("Q6_K", 8, 16)])
def test_the_plan_counts_the_bytes_of_blocks(kind: str, bits: int, group: int, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    config = load_model_config(path)
    policy = QuantizationPolicy(blocks=kept_formats(config, "cpu"))
    h = 256
    numbers = 4 * h * h  # q, k, v and o: two heads and one of 128
    numbers -= h * h  # k and v have half of the rows
    numbers += 2 * 2 * h * h + 2 * h * h + 3 * h * h + 4 * 3 * h * h + 64 * h  # Mamba, the MLP, experts, head
    saved = round(numbers * (2 - bits / 8 - 4 / group))
    assert weight_bytes(config, 2) - weight_bytes(config, 2, policy=policy) == saved
    llm = LLM(path, threads=1, max_num_seqs=1)
    assert llm.core.info.weight_bytes == weight_bytes(config, 2, policy=policy)
    assert step_bytes(config, 2, policy=policy) < step_bytes(config, 2)
    del llm
    gc.collect()


def test_a_requested_format_replaces_the_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, "Q8_0")
    llm = LLM(path, threads=1, max_num_seqs=1, quantization="int8")
    plain = LLM(tmp_path, threads=1, max_num_seqs=1, dtype="bfloat16", quantization="int8")
    assert llm.core.info.quantization == "int8"
    assert llm.core.info.weight_bytes == plain.core.info.weight_bytes
    ours, theirs = (model.generate([SUBJECT], GREEDY)[0] for model in (llm, plain))
    assert ours.token_ids == theirs.token_ids
