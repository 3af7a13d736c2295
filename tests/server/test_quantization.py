"""The real engine in int8 behind the real server: the same bits alone and among others, in chunks and whole."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.cli.terminal import describe_engine
from jamba_server.server.config_sources import load_config
from jamba_server.server.demo import demo_folder
from jamba_server.server.generation_defaults import GenerationDefaults
from tests.server.real_engine import served_engine

PROMPT = "Once upon a time there was a small bird who lived in a tall tree near the river. One day the bird"
OTHERS = [f"{'The dog ran to the park. ' * count}Then" for count in range(1, 12)]
REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "max_tokens": 40, "logprobs": 3},
    {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 40, "logprobs": 3},
)
Reply = tuple[str, list[str], list[float], list[dict[str, float]], str]


async def complete(client: AsyncOpenAI, prompt: str, request: dict[str, Any]) -> Reply:
    reply = await client.completions.create(model="jamba-demo", prompt=prompt, **request)
    [choice] = reply.choices
    scores: Any = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) > 5
    return choice.text, scores.tokens, scores.token_logprobs, scores.top_logprobs, choice.finish_reason


async def run(*flags: tuple[str, str]) -> tuple[list[Reply], EngineClient]:
    """What every request gets alone; among others it must get the same."""
    common = {"quantization": "int8", "quantize_mamba": "true", "served_model_name": ["jamba-demo"], "threads": "1"}
    config = load_config({**common, **dict(flags)}, {})
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    try:
        async with served_engine(config, engine) as client:
            alone = [await complete(client, PROMPT, request) for request in REQUESTS]
            for request, expected in zip(REQUESTS, alone, strict=True):
                prompts = [*OTHERS[:5], PROMPT, *OTHERS[5:]]
                together = await asyncio.gather(*(complete(client, prompt, request) for prompt in prompts))
                assert together[5] == expected
                assert len({reply[0] for reply in together}) > 2, "the others are others"
    finally:
        await engine.close()
    return alone, engine


async def test_int8_gives_the_same_bits_alone_among_others_and_in_chunks() -> None:
    whole, engine = await run()
    [line, *_] = describe_engine(engine.info, GenerationDefaults())
    assert "bfloat16 with int8 weights (Mamba mixers too) on cpu" in line
    chunked, _ = await run(("max_num_batched_tokens", "7"), ("max_num_seqs", "4"), ("enable_prefix_caching", "false"))
    assert chunked == whole
