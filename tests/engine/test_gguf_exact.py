"""Weights that stay in the blocks of a GGUF file: exact whatever the batch, in the memory that the plan says."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.gguf.blocks import TYPES
from jamba_server.engine.gguf.stored import format_of
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.quantization import Format, QuantizationPolicy
from jamba_server.engine.quantization.blocks import common_format
from jamba_server.engine.start.contents import conversions
from jamba_server.engine.types import Request, SamplingParams, TokenLogprob
from jamba_server.engine.weight_sizes import kept_formats, step_bytes, weight_bytes
from jamba_server.llm import LLM, Completion
from tests.gguf_file import write_gguf
from tests.nightly import each_pair
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
Q4_0, Q8_0, Q4_K, Q6_K, IQ4_NL = (format_of(TYPES[number]) for number in (2, 8, 12, 14, 20))


def written(folder: Path, kind: str, second: str | None = None, **changes: Any) -> Path:
    """A file whose matrices have one type, but the value and down projections the second one."""
    save_tiny(folder, **WIDE | changes)

    def kind_of(name: str) -> str:
        if name.endswith("ssm_dt.weight"):  # its rows have four numbers
            return "F16"
        return second if second and name.split(".")[-2] in ("attn_v", "ffn_down", "ffn_down_exps") else kind

    return write_gguf(folder / "model.gguf", folder, kind_of)


def of_four_types(name: str) -> str:
    """Each of the four types is that of some matrices of an attention layer and of a Mamba layer."""
    kinds = {"attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q6_K", "ssm_in": "Q8_0", "ssm_x": "Q6_K", "ssm_dt": "F16"}
    kinds |= {"ffn_down_exps": "Q6_K", "ffn_down": "Q8_0", "ffn_up": "Q4_0", "output": "Q6_K"}
    return kinds.get(name.split(".")[-2], "Q4_K")


def result(completion: Completion) -> tuple[list[int], list[Any]]:
    return completion.token_ids, [(entry.logprob, entry.top) for entry in completion.logprobs]


@each_pair({"kind": ("Q4_0", "Q4_K", "Q6_K", "Q8_0"), "activations": ("none", "int8")})
def test_a_reply_is_the_same_in_every_company(kind: str, activations: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)

    def load(**settings: Any) -> LLM:
        changes = {"threads": 1, "max_num_seqs": 4, "activation_quantization": activations} | settings
        return LLM(path, max_model_len=512, **changes)

    llm = load()
    assert llm.core.info.activation_quantization == activations
    alone = result(llm.generate([SUBJECT], GREEDY)[0])
    assert len({logprob for logprob, _ in alone[1]}) > 1, "a reply of equal numbers would say little"
    [cached] = llm.generate([SUBJECT], GREEDY)
    assert cached.num_cached > 0
    assert result(cached) == alone
    batch = load(max_num_seqs=32).generate([*OTHERS[:17], SUBJECT, *OTHERS[17:]], GREEDY)
    assert result(batch[17]) == alone
    for chunk in (1, 7):
        chunked = load(max_num_batched_tokens=chunk, max_num_seqs=1, enable_prefix_caching=False)
        assert result(chunked.generate([SUBJECT], GREEDY)[0]) == alone
    assert result(load(threads=2).generate([SUBJECT], GREEDY)[0]) == alone


async def test_a_reply_is_the_same_after_the_engine_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With this machine's default of `activation_quantization`."""
    monkeypatch.setattr("jamba_server.engine.process.restarts.BACKOFF_SECONDS", 0.0)
    save_tiny(tmp_path, **WIDE)
    path = write_gguf(tmp_path / "model.gguf", tmp_path, of_four_types)
    assert {entry.kind for entry in load_model_config(path).stored.values()} == {"Q4_0", "Q4_K", "Q6_K", "Q8_0"}
    # The reply is so long that the engine, which dies early in it, cannot have finished it before.
    params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True, logprobs=3)
    alone = LLM(path, max_model_len=512, threads=1, max_num_seqs=4).generate([SUBJECT], params)[0]
    engine = EngineClient(EngineConfig(model=str(path), max_model_len=512, threads=1, max_num_seqs=4))
    await engine.start()
    first, tokens, logprobs = engine.pid, list[int](), list[TokenLogprob]()
    assert first is not None
    async with engine.generate([Request(id="a", prompt=SUBJECT, params=params)]) as updates:
        async for update in updates:
            if not tokens:
                os.kill(first, signal.SIGKILL)
            tokens += update.token_ids
            logprobs += update.logprobs
    assert engine.pid != first
    await engine.close()
    assert (tokens, [(entry.logprob, entry.top) for entry in logprobs]) == result(alone)


def test_a_format_for_several_matrices() -> None:
    assert common_format([Q4_0, Q4_0]) == Q4_0
    wide = Format(bits=8, limit=127, group_size=32)
    assert common_format([Q4_0, Q8_0]) == wide
    assert common_format([Q8_0, Q6_K]) == replace(wide, group_size=16)
    assert common_format([Q8_0, Q4_K]) == replace(wide, has_offset=True)
    assert common_format([IQ4_NL, Q4_0]) == wide, "the table has whole numbers"
    for other in (
        replace(Q4_0, group_size=None),
        replace(Q4_0, is_unsigned=True, has_zero=True),
        replace(IQ4_NL, table=(0.5,) * 16),
        Format(bits=8, limit=255, group_size=32, is_unsigned=True, has_offset=True),
    ):
        assert common_format([other, Q4_0]) is None


def test_every_matrix_keeps_its_format(tmp_path: Path) -> None:
    config = load_model_config(path := written(tmp_path, "Q4_K", "Q6_K"))
    kept = kept_formats(config)
    assert kept == {name: entry.format for name, entry in config.stored.items()}
    experts, attention = "model.layers.1.feed_forward.experts.3.", "model.layers.1.self_attn."
    for four, eight in ((f"{attention}q_proj", f"{attention}v_proj"), (f"{experts}up_proj", f"{experts}down_proj")):
        assert (kept[f"{four}.weight"], kept[f"{eight}.weight"]) == (Q4_K, Q6_K)
    assert {"model.embed_tokens.weight", "model.layers.0.mamba.x_proj.weight"} <= set(kept)
    policy = QuantizationPolicy.of(EngineConfig(model=str(path)), blocks=kept)
    assert conversions(config, policy, "bfloat16") == ()
    requested = QuantizationPolicy.of(EngineConfig(model=str(path), quantization="int8"), blocks=kept)
    assert (requested.blocks, requested.quantization) == ({}, "int8")
    assert conversions(config, requested, "bfloat16") == ()


def test_experts_share_a_format_or_are_converted(tmp_path: Path) -> None:
    config = load_model_config(written(tmp_path, "Q4_K"))
    gate, up, down = (f"model.layers.1.feed_forward.experts.0.{name}_proj.weight" for name in ("gate", "up", "down"))
    other = replace(config.stored[gate], format=Q8_0, kind="Q8_0")
    kept = kept_formats(replace(config, stored={**config.stored, gate: other}))
    assert kept[gate] == kept[up] == Format(bits=8, limit=127, group_size=32, has_offset=True)
    assert kept[down] == Q4_K
    plain = replace(config, stored={name: entry for name, entry in config.stored.items() if name != down})
    policy = QuantizationPolicy(blocks=kept_formats(plain))
    assert not any(".experts." in name for name in policy.blocks)
    [text] = conversions(plain, policy, "bfloat16")
    count = len(plain.stored)
    assert text.startswith(f"11 of {count} quantised matrices are converted to bfloat16 (11 of type Q4_K)")


@each_pair({"kind": ("Q8_0", "Q4_0", "Q4_K", "Q6_K"), "tied": (False, True)})
def test_the_plan_counts_the_bytes_of_blocks(kind: str, tied: bool, tmp_path: Path) -> None:
    path = written(tmp_path, kind, tie_word_embeddings=tied)
    config = load_model_config(path)
    policy = QuantizationPolicy(blocks=kept_formats(config))
    numbers = sum(entry.numbers for entry in config.stored.values())
    plain = ("router.weight", "conv1d.weight", "dt_proj.weight", "A_log")
    stored = load_file(tmp_path / "model.safetensors")
    assert numbers == sum(w.size for name, w in stored.items() if w.ndim > 1 and not name.endswith(plain))
    form = config.stored["model.embed_tokens.weight"].format
    assert form is not None
    saved = 2 * numbers - form.num_bytes(1, numbers)
    assert weight_bytes(config, 2) - weight_bytes(config, 2, policy=policy) == saved
    llm = LLM(path, threads=1, max_num_seqs=1)
    assert llm.core.info.weight_bytes == weight_bytes(config, 2, policy=policy)
    assert step_bytes(config, 2, policy=policy) < step_bytes(config, 2)


def test_a_requested_format_replaces_the_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, "Q8_0")
    llm = LLM(path, threads=1, max_num_seqs=1, quantization="int8")
    plain = LLM(tmp_path, threads=1, max_num_seqs=1, dtype="bfloat16", quantization="int8")
    assert llm.core.info.quantization == "int8"
    assert llm.core.info.weight_bytes == plain.core.info.weight_bytes
    ours, theirs = (model.generate([SUBJECT], GREEDY)[0] for model in (llm, plain))
    assert ours.token_ids == theirs.token_ids
