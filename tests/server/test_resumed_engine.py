"""The real engine behind the real server: a stream loses its connection and its engine, and is read on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.real_engine import served_engine

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


async def test_no_event_is_lost_or_doubled(tmp_path: Path) -> None:
    config = ServerConfig(served_model_name=("jamba-demo",), threads=1, max_num_seqs=4, dtype="float32")
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    try:
        async with served_engine(config, engine) as openai, httpx.AsyncClient(timeout=60) as http:
            base = str(openai.base_url)
            whole = (await http.post(f"{base}completions", json=BODY)).json()["choices"][0]["text"]
            ids, texts = list[str](), list[str]()
            headers = {"x-on-disconnect": "continue"}
            url, method = f"{base}completions", "POST"
            while not texts or texts[-1] != "[DONE]":
                async with http.stream(method, url, json=BODY | {"stream": True}, headers=headers) as reply:
                    assert reply.status_code == 200
                    limit = len(texts) + 30  # then the client breaks the connection
                    async for line in reply.aiter_lines():
                        if line.startswith("id: "):
                            ids.append(line.removeprefix("id: "))
                        elif line.startswith("data: "):
                            texts.append(line.removeprefix("data: "))
                        if len(texts) == limit:
                            break
                if len(ids) == 30 and engine.pid is not None:
                    os.kill(engine.pid, signal.SIGKILL)
                headers = {"last-event-id": ids[-1]}
        stream = ids[0].partition(":")[0]
        assert ids == [f"{stream}:{number}" for number in range(len(ids))]
        chunks = [httpx.Response(200, text=text).json() for text in texts[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert engine.supervision.restarts["signal"] == 1
        async with asyncio.timeout(10):
            while engine.stats.num_running:
                await asyncio.sleep(0.01)
        steps = engine.supervision.step_times
        assert sum(steps["decode"].counts) >= 200
        assert sum(steps["prefill"].counts) >= 1
        assert steps["decode"].seconds > 0
    finally:
        await engine.close()
