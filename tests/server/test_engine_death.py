"""The real engine behind the real server, killed in the middle of eight streams: nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncOpenAI

from jamba_server.engine.process.client import EngineClient
from jamba_server.engine.process.streams import Stream
from jamba_server.engine.types import FromEngine, Request, StepResult
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.real_engine import served_engine

NUM_TOKENS = 160
NUM_CHOICES = 9  # of all requests together
SPLIT_FROM = 60  # the stop string ends here or later, when all streams have long been open
CHAT = [{"role": "user", "content": "Tell me a story about a dog and a ball."}]


class MortalEngine(EngineClient):
    """Kills its child once: when `kill_after` tokens of the choice with a stop string have arrived, which is submitted
    last."""

    kill_after: int | None = None
    num_choices = 0

    @asynccontextmanager
    async def generate(self, requests: list[Request]) -> AsyncGenerator[Stream]:
        self.num_choices += len(requests)
        async with super().generate(requests) as stream:
            yield stream

    def receive(self, message: FromEngine) -> None:
        super().receive(message)
        if self.kill_after is None or self.num_choices < NUM_CHOICES or not isinstance(message, StepResult):
            return
        last = next(reversed(self._live.values()), None)
        if last is not None and len(last.generated) >= self.kill_after:
            self.kill_after = None
            assert self.pid is not None
            os.kill(self.pid, signal.SIGKILL)


def requests(stop: str | None, run: str) -> list[dict[str, Any]]:
    """Greedy, sampled without a seed, n = 2, log-probabilities, penalties, a stop string. What one run has cached is
    not found by another."""
    extra = {"ignore_eos": True, "cache_salt": run}
    base = {"messages": CHAT, "max_tokens": NUM_TOKENS, "stream": True, "extra_body": extra}
    greedy = base | {"temperature": 0}
    return [
        greedy,
        base,
        base | {"n": 2},
        greedy | {"logprobs": True, "top_logprobs": 2},
        base | {"logprobs": True, "top_logprobs": 1},
        base | {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        base | {"seed": 5, "extra_body": extra | {"min_tokens": 8, "repetition_penalty": 1.2}},
        greedy | ({"stop": stop} if stop else {}),
    ]


Reply = dict[int, tuple[str, list[tuple[str, float]], str | None]]


async def read(client: AsyncOpenAI, request: dict[str, Any], opened: asyncio.Event) -> Reply:
    """Returns, for each choice, its text, its tokens with their log-probabilities, and its finish reason."""
    texts: dict[int, str] = {}
    scores: dict[int, list[tuple[str, float]]] = {}
    finish: dict[int, str | None] = {}
    async for chunk in await client.chat.completions.create(model="jamba-demo", **request):
        opened.set()
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            scores.setdefault(choice.index, [])
            if choice.logprobs and choice.logprobs.content:
                scores[choice.index] += [(entry.token, entry.logprob) for entry in choice.logprobs.content]
            if choice.finish_reason:
                assert choice.index not in finish, "a choice ends once"
                finish[choice.index] = choice.finish_reason
    return {index: (texts[index], scores[index], finish[index]) for index in sorted(texts)}


FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8", "quantize_mamba": True},
}

# After how many tokens the engine is killed: before the stop string, and between its two halves
KILLS: dict[str, Callable[[int], Sequence[int]]] = {
    "float32": lambda split: (split // 2,),
    "bfloat16": lambda split: (split // 2, split),
    "int8": lambda split: (split,),
}


Run = Callable[..., Awaitable[tuple[list[Reply], int]]]


@asynccontextmanager
async def started(settings: dict[str, Any]) -> AsyncGenerator[Run]:
    """An engine, and a function that runs requests on it. The function returns the replies and how often the engine
    died."""
    config = ServerConfig(served_model_name=("jamba-demo",), threads=1, max_num_seqs=16, **settings)
    engine = MortalEngine(config.engine(demo_folder()))
    await engine.start()

    async def run(requests: list[dict[str, Any]], kill_after: int | None = None) -> tuple[list[Reply], int]:
        engine.kill_after, engine.num_choices = kill_after, 0
        first = engine.pid
        async with served_engine(config, engine) as client:
            tasks: list[asyncio.Task[Reply]] = []
            for request in requests:  # one after the other, so that each draws its own seed in every run
                opened = asyncio.Event()
                tasks.append(asyncio.create_task(read(client, request, opened)))
                await opened.wait()
            replies = [await task for task in tasks]
        return replies, int(engine.pid != first)

    try:
        yield run
    finally:
        await engine.close()


@pytest.mark.parametrize("form", FORMATS)
async def test_eight_streams_survive_the_death_of_the_engine(form: str) -> None:
    async with started(FORMATS[form]) as run:
        await check_deaths(run, KILLS[form])


async def check_deaths(run: Run, kills: Callable[[int], Sequence[int]]) -> None:
    [alone], deaths = await run(requests(None, "alone")[3:4])  # greedy, with its tokens
    assert deaths == 0
    text, scores, _ = alone[0]
    tokens = [token for token, _ in scores]
    assert len(tokens) == NUM_TOKENS, "one log-probability a token"
    stop, split = next(
        (stop, i)
        for i in range(SPLIT_FROM, NUM_TOKENS)
        if len(stop := tokens[i - 1][-2:] + tokens[i][:2]) == 4
        and stop in text  # no special token, of which a text has nothing
        and stop not in "".join(tokens[:i])  # it is complete with token i, and no sooner
    )
    expected, deaths = await run(requests(stop, "expected"))
    assert deaths == 0
    assert expected[7][0][0] == text[: text.index(stop)]
    assert expected[7][0][2] == "stop"
    for kill_after in kills(split):
        replies, deaths = await run(requests(stop, f"killed after {kill_after}"), kill_after)
        assert deaths == 1, "the engine must have been replaced"
        for reply, wanted in zip(replies, expected, strict=True):
            assert reply.keys() == wanted.keys()
            for index, (text, scores, finish) in reply.items():
                assert text == wanted[index][0]
                assert finish == wanted[index][2]
                assert scores == wanted[index][1], "every log-probability once, and the same bits"
