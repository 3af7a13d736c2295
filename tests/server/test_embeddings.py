"""/v1/embeddings and /pooling on a real engine, compared with transformers' hidden states."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from tests.server.conftest import Bench
from tests.server.vector_server import save_model, serve_model

TEXTS = ["hello the world", "the", "hello hello hello hello in the hell"]


@pytest.fixture(scope="module")
def oracle_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("embeddings")
    return save_model(folder), folder


@pytest.fixture(scope="module")
def served(oracle_folder: tuple[Any, Path]) -> Bench:
    return serve_model(oracle_folder[1])


def hidden_states(oracle: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return oracle.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].numpy()


def unit(vector: Any) -> Any:
    return vector / np.sqrt((vector.astype(np.float64) ** 2).sum())


async def post(bench: Bench, path: str, status: int = 200, **body: Any) -> Any:
    async with bench.http() as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_embeddings_equal_transformers(served: Bench, oracle_folder: tuple[Any, Path], pooling: str) -> None:
    raw = await post(served, "/v1/embeddings", input=TEXTS, pooling=pooling, use_activation=False)
    unit_vectors = await post(served, "/v1/embeddings", input=TEXTS, pooling=pooling)
    pooled = await post(served, "/pooling", input=TEXTS, pooling=pooling)
    for number, request in enumerate(served.engine.requests[-len(TEXTS) :]):
        states = hidden_states(oracle_folder[0], request.prompt)
        expected = states[-1] if pooling == "last" else states.mean(axis=0)
        assert np.abs(np.array(raw["data"][number]["embedding"]) - expected).max() < 1e-4
        assert np.abs(np.array(unit_vectors["data"][number]["embedding"]) - unit(expected)).max() < 1e-4
        assert pooled["data"][number]["data"] == unit_vectors["data"][number]["embedding"]


async def test_the_official_client(served: Bench) -> None:
    async with served.openai() as client:
        both = await client.embeddings.create(model="jamba", input=TEXTS)  # the client asks for base64 by itself
        [one] = (await client.embeddings.create(model="jamba", input=TEXTS[2], encoding_format="float")).data
        assert both.usage.prompt_tokens == both.usage.total_tokens > 0
        assert [item.index for item in both.data] == [0, 1, 2]
        assert both.data[2].embedding == one.embedding
        assert sum(x * x for x in one.embedding) == pytest.approx(1)
        tokens = served.engine.requests[-1].prompt
        [of_ids] = (await client.embeddings.create(model="jamba", input=tokens)).data
        assert of_ids.embedding == one.embedding
        short = await client.embeddings.create(model="jamba", input=[tokens, tokens], dimensions=5)
        expected = unit(np.array(one.embedding)[:5])
        assert all(np.abs(item.embedding - expected).max() < 1e-6 for item in short.data)
        for wrong in ({"input": ""}, {"input": []}, {"input": "a", "dimensions": 33}, {"input": [[1], [2048]]}):
            with pytest.raises(openai.BadRequestError):
                await client.embeddings.create(model="jamba", **wrong)  # type: ignore[arg-type]


async def test_base64_has_the_same_numbers(served: Bench) -> None:
    long = "hello the world " * 9
    numbers = await post(served, "/v1/embeddings", input=long)
    text = await post(served, "/v1/embeddings", input=long, encoding_format="base64")
    decoded = np.frombuffer(base64.b64decode(text["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == numbers["data"][0]["embedding"]
    assert text["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_2048_inputs(served: Bench) -> None:
    """More than the queue takes at a time, and the last one is not forgotten."""
    inputs = [[5 + number % 90, 7] for number in range(2048)]
    many = await post(served, "/v1/embeddings", input=inputs, encoding_format="base64")
    one = await post(served, "/v1/embeddings", input=inputs[-1], encoding_format="base64")
    assert [item["index"] for item in many["data"]] == list(range(2048))
    assert many["data"][-1]["embedding"] == one["data"][0]["embedding"]
    assert many["usage"]["prompt_tokens"] == 4096
    error = await post(served, "/v1/embeddings", 400, input=[*inputs, [5]])
    assert "2048" in error["error"]["message"]


async def test_the_server_chooses_the_default_pooling(oracle_folder: tuple[Any, Path], served: Bench) -> None:
    by_mean = serve_model(oracle_folder[1], embedding_pooling="mean")
    given = await post(served, "/v1/embeddings", input=TEXTS[0], pooling="mean")
    default = await post(by_mean, "/v1/embeddings", input=TEXTS[0])
    assert default["data"] == given["data"]
    assert default["data"] != (await post(served, "/v1/embeddings", input=TEXTS[0]))["data"]


async def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.final_layernorm.weight"][:] = 3e38  # finite, but the products are not
    save_file(tensors, tmp_path / "model.safetensors")
    broken = serve_model(tmp_path)
    for pooling in ("last", "mean"):
        error = await post(broken, "/v1/embeddings", 500, input="hello", pooling=pooling)
        assert "not finite" in error["error"]["message"]
