"""What a browser opens: GET /, GET /docs, and the OpenAPI document behind it."""

from __future__ import annotations

import json
import re

import pytest

from jamba_server.server.version import package_version
from tests.server.conftest import Bench, MakeBench

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("prefix", ["", "/jamba"])
async def test_the_root_says_what_this_is(make_bench: MakeBench, prefix: str) -> None:
    """Without the chat page, of which tests/server/page has the tests."""
    names = ("jamba", "<b>&alias")
    async with make_bench(root_path=prefix, served_model_name=names, ui=False).http() as http:
        machine = await http.get(f"{prefix}/")
        browser = await http.get(f"{prefix}/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        linked = [(await http.get(link)).status_code for link in machine.json()["links"].values()]
    assert machine.json() == {
        "name": "jamba-server",
        "version": package_version(),
        "models": list(names),
        "links": {
            "docs": f"{prefix}/docs",
            "openapi.json": f"{prefix}/openapi.json",
            "v1/models": f"{prefix}/v1/models",
            "health": f"{prefix}/health",
            "metrics": f"{prefix}/metrics",
        },
    }
    assert set(linked) == {200}
    assert browser.headers["content-type"].startswith("text/html")
    assert "&lt;b&gt;&amp;alias" in browser.text
    assert "<b>" not in browser.text
    assert urls(browser.text) == {"data:,", *machine.json()["links"].values()}
    assert {machine.headers["vary"], browser.headers["vary"]} == {"Accept"}


@pytest.mark.parametrize("prefix", ["", "/jamba"])
async def test_docs_needs_no_other_server(make_bench: MakeBench, prefix: str) -> None:
    async with make_bench(root_path=prefix, api_key=("key",)).http() as http:
        page = (await http.get(f"{prefix}/docs")).text
        assets = urls(page) - {"data:,"}
        assert len(assets) == 3  # a script, a style, the document
        for url in assets:
            assert url.startswith(f"{prefix}/")
            asset = await http.get(url)
            assert asset.status_code == 200, url
            assert (await http.get(url.removeprefix(prefix))).content == asset.content  # a proxy may take it off
            if url.endswith(".css"):
                assert set(re.findall(r"url\([\"']?(.{5})", asset.text)) == {"data:"}
        document = (await http.get(f"{prefix}/openapi.json")).json()
        assert (await http.get(f"{prefix}/redoc", headers={"x-api-key": "key"})).status_code == 404
    assert "//" not in re.sub("// `SwaggerUI.*", "", page)
    assert '"validatorUrl": null' in page
    assert document.get("servers", []) == ([{"url": prefix}] if prefix else [])


def urls(page: str) -> set[str]:
    return {url for match in re.findall(r"""(?:href|src)="([^"]*)"|url: '([^']*)'""", page) for url in match if url}


async def test_the_document_declares_the_keys(make_bench: MakeBench) -> None:
    async with make_bench().http() as http:
        without_keys = (await http.get("/openapi.json")).json()
    async with make_bench(api_key=("key",)).http() as http:
        document = (await http.get("/openapi.json")).json()
        statuses = {
            path: (await http.request(method, path, headers={"Content-Type": "application/json"})).status_code
            for path, operations in document["paths"].items()
            for method in operations
        }
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["x-api-key"]["in"], schemes["x-api-key"]["name"]) == ("header", "x-api-key")
    # what the document says of every operation is what the server does
    for path, operations in document["paths"].items():
        for operation in operations.values():
            wanted = [{"bearer": []}, {"x-api-key": []}] if statuses[path] == 401 else None
            assert operation.get("security") == wanted, path
    assert without_keys["components"]["securitySchemes"] == schemes
    assert '"security":' not in json.dumps(without_keys)


SESSION_PATHS = ("", "/{name}", "/{name}/pin", "/{name}/fork", "/{name}/rewind", "/{name}/export", "/import")
SCORES = {"/v1/score", "/v1/rerank"}  # they need a classifier, which this model is not


async def test_the_openapi_document(bench: Bench) -> None:
    async with bench.http() as http:
        document = (await http.get("/openapi.json")).json()
        docs = await http.get("/docs")
    assert docs.status_code == 200
    paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}", "/tokenize", "/detokenize"}
    paths |= {
        "/",
        "/api/hello",
        "/tokenizer_info",
        "/v1/chat/completions/render",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/streams/{stream_id}",
    }
    paths |= {"/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"}
    paths |= {"/v1/batches", "/v1/batches/{batch_id}", "/v1/batches/{batch_id}/cancel"}
    paths |= {f"/v1/sessions{end}" for end in SESSION_PATHS}
    paths |= {"/v1/embeddings", "/pooling", "/classify", "/v1/decisions", *SCORES}
    responses = {"", "/input_tokens", "/{response_id}", "/{response_id}/input_items", "/{response_id}/cancel"}
    paths |= {f"/v1/responses{end}" for end in responses}
    paths |= {f"/v1/sessions{end}" for end in ("", "/{name}", "/{name}/fork", "/{name}/rewind", "/{name}/pin")}
    assert set(document["paths"]) == paths | {"/health", "/ready", "/live", "/version", "/server_info", "/metrics"}
    schemas = document["components"]["schemas"]
    chat_request = schemas["ChatCompletionRequest"]
    assert chat_request["additionalProperties"] is True
    assert {"maximum": 2, "minimum": 0, "type": "number"} in chat_request["properties"]["temperature"]["anyOf"]
    assert "422" not in document["paths"][CHAT]["post"]["responses"]
    references = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(references) <= set(schemas)


async def test_every_field_of_a_request_is_described(bench: Bench) -> None:
    """Each schema that a request's body reaches: a sentence and a type a field; each body an example that works."""
    async with bench.http() as http:
        document = (await http.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        found: set[str] = set()
        for path, methods in document["paths"].items():
            if "requestBody" not in methods.get("post", {}):
                continue
            [(media, content)] = methods["post"]["requestBody"]["content"].items()
            if media == "multipart/form-data":
                assert all(field["description"].endswith(".") for field in content["schema"]["properties"].values())
                continue
            if media == "application/octet-stream":  # a file with a session
                continue
            name = content["schema"]["$ref"].rsplit("/", 1)[1]
            [example] = schemas[name]["examples"]
            # The example of a batch names a file that has to be uploaded first.
            wanted = 400 if path == "/v1/batches" else 200
            if "{" not in path:  # tests/server/test_sessions.py calls the paths below the name of a session
                reply = await http.post(path, json=example)
                assert reply.status_code == wanted or (path in SCORES and "model_not_capable" in reply.text)
            todo = {name}
            while todo:
                found |= todo
                text = json.dumps([schemas[each]["properties"] for each in todo])
                todo = set(re.findall(r"#/components/schemas/(\w+)", text)) - found
    assert {"ChatCompletionRequest", "FunctionDefinition", "EarlierCall", "TokenizeRequest"} <= found
    for name in found:
        for field, schema in schemas[name]["properties"].items():
            described = schema.get("description", "").endswith((".", "]", "}"))
            assert described or "const" in schema, (name, field)  # the one value of such a field says what it is
            kinds = schema.get("anyOf") or schema.get("oneOf") or [schema]
            assert any(kind.get("type") != "null" for kind in kinds), (name, field)
