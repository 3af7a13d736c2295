"""`jamba list` and `jamba rm` on a hub cache that a test has written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli.application import app
from jamba_server.server.cli.models import cached, removal
from jamba_server.server.demo import demo_folder
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny

OLD, NEW = "0" * 39 + "1", "f" * 40
GB = 10**9


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def memory(*_: object) -> tuple[str, int]:
        return "cpu", 4 * GB

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(cached, "find_memory", memory)
    return folder


def store(cache: Path, name: str, files: Mapping[str, bytes], commit: str = NEW, ref: str | None = "main") -> Path:
    """Writes a revision as the hub's client does: blobs, and a snapshot of links to them. Returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    if ref:
        (repository / "refs" / ref).write_text(commit)
    for file, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        (repository / "blobs" / digest).write_bytes(data)
        (snapshot / file).symlink_to(Path("..", "..", "blobs", digest))
    return snapshot


def jamba(*arguments: str, status: int = 0, typed: str = "") -> str:
    result = CliRunner().invoke(app, arguments, input=typed)
    if isinstance(result.exception, CheckpointError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def listed() -> dict[str, dict[str, object]]:
    return {row["id"]: row for row in json.loads(jamba("list", "--json"))}


def demo(*names: str) -> dict[str, bytes]:
    names = names or ("config.json", "tokenizer.json", "model.safetensors")
    return {name: (demo_folder() / name).read_bytes() for name in names}


def test_what_the_cache_holds(cache: Path) -> None:
    store(cache, "org/whole", demo())
    store(cache, "org/config-only", demo("config.json"))
    store(cache, "org/other", {"config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'})
    store(cache, "org/broken-GGUF", {"a-Q4_K_M.gguf": b"no header", "a-Q8_0.gguf": b"none either"})
    rows = listed()
    shown = {name: (row["architecture"], row["quantization"], row["fits"]) for name, row in rows.items()}
    assert shown == {
        "org/whole": ("JambaForCausalLM", "bfloat16", "yes"),
        "org/config-only": ("JambaForCausalLM", "bfloat16", "incomplete"),
        "org/other": ("LlamaForCausalLM", "-", "cannot be loaded"),
        "org/broken-GGUF:Q4_K_M": ("-", "-", "cannot be loaded"),
        "org/broken-GGUF:Q8_0": ("-", "-", "cannot be loaded"),
    }
    assert rows["org/whole"]["num_bytes"] == sum(map(len, demo().values()))
    assert (rows["org/whole"]["revision"], rows["org/whole"]["refs"]) == (NEW, ["main"])
    text = jamba("list")
    assert "org/whole" in text and "ffffffff (main)" in text and "17.7 MB" in text
    assert "org/other: cannot be loaded: " in text and 'model_type is "llama"' in text


def test_a_gguf_file_is_listed_with_its_quantisation(cache: Path) -> None:
    save_tiny(cache.parent, hidden_size=64, mamba_dt_rank=32, intermediate_size=64)
    file = write_gguf(cache.parent / "model.gguf", cache.parent, lambda name: "Q8_0")
    store(cache, "org/demo-GGUF", {"demo-Q8_0.gguf": file.read_bytes()})
    row = listed()["org/demo-GGUF:Q8_0"]
    assert (row["architecture"], row["quantization"], row["fits"]) == ("JambaForCausalLM", "Q8_0", "yes")


def test_a_model_that_is_too_large_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(*_: object) -> tuple[str, int]:
        return "cpu", 10**6

    monkeypatch.setattr(cached, "find_memory", memory)
    store(cache, "org/whole", demo())
    assert listed()["org/whole"]["fits"] == "no"
    assert "org/whole: no: The weights need " in jamba("list")


def test_an_empty_cache_is_no_error(cache: Path) -> None:
    assert jamba("list") == f"The hub cache {cache} holds no models; `jamba pull MODEL` downloads one.\n"
    cache.rmdir()
    assert json.loads(jamba("list", "--json")) == []


def test_what_is_no_model_in_the_cache_is_named(cache: Path) -> None:
    (cache / "models--org--torn").mkdir()
    store(cache, "gpt2", demo("config.json"))
    text = jamba("list")
    assert "A part of the cache cannot be read: Snapshots dir doesn't exist in cached repo" in text
    assert "gpt2 " in text
    assert jamba("rm", "gpt2", "--yes").startswith("deleted gpt2: 802 bytes")


def test_rm_asks_and_says_what_was_freed(cache: Path) -> None:
    store(cache, "org/name", {"config.json": b"{}", "model.safetensors": b"x" * 5000})
    store(cache, "copy/name", {"config.json": b"{}", "model.safetensors": b"x" * 5000})  # with the same commit
    assert "Aborted" in jamba("rm", "org/name", typed="n\n", status=1)
    assert "Aborted" in jamba("rm", "org/name", typed="", status=1)
    assert "Delete 1 revision of org/name (main)" in jamba("rm", "org/name", typed="n\n", status=1)
    assert (cache / "models--org--name").exists()
    assert jamba("rm", "org/name", typed="y\n").endswith("deleted org/name: 5,002 bytes (5.0 kB) were freed\n")
    assert not (cache / "models--org--name").exists()
    assert list(listed()) == ["copy/name"]


def test_rm_of_a_revision_keeps_what_the_other_needs(cache: Path) -> None:
    kept = store(cache, "org/name", {"config.json": b"{}", "model.safetensors": b"new"})
    store(cache, "org/name", {"config.json": b"{}", "model.safetensors": b"older"}, OLD, "v1")
    with pytest.raises(CheckpointError, match=r"not its revision v2; it has 00000000, ffffffff, main, v1\."):
        jamba("rm", "org/name", "--yes", "--revision", "v2")
    assert "5 bytes" in jamba("rm", "org/name", "--yes", "--revision", OLD[:8])
    assert (kept / "config.json").read_bytes() == b"{}"
    assert [row["revision"] for row in listed().values()] == [NEW]


def test_rm_of_one_quantisation(cache: Path) -> None:
    snapshot = store(cache, "org/n-GGUF", {"a-Q4_K_M.gguf": b"four", "a-Q8_0.gguf": b"eight", "b-Q8_0.gguf": b"eight"})
    with pytest.raises(CheckpointError, match="it has no quantisation Q2_K; name one of Q4_K_M, Q8_0"):
        jamba("rm", "org/n-GGUF:Q2_K", "--yes")
    assert jamba("rm", "org/n-GGUF:q8_0", "--yes") == "deleted org/n-GGUF:q8_0: 5 bytes (5 bytes) were freed\n"
    assert [path.name for path in snapshot.iterdir()] == ["a-Q4_K_M.gguf"]
    jamba("rm", "org/n-GGUF:Q4_K_M", "--yes")
    assert not (cache / "models--org--n-GGUF").exists(), "nothing was left in it"


def test_what_cannot_be_deleted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="has no model org/name; `jamba list` shows what it has"):
        jamba("rm", "org/name")
    with pytest.raises(CheckpointError, match="MODEL is empty"):
        jamba("rm", "")
    with pytest.raises(CheckpointError, match="is a local path"):
        jamba("rm", str(cache))
    store(cache, "org/name", {"config.json": b"{}"})

    def nothing(self: object) -> None: ...

    monkeypatch.setattr("huggingface_hub.utils.DeleteCacheStrategy.execute", nothing)
    with pytest.raises(CheckpointError, match="cannot be deleted; is the folder yours"):
        jamba("rm", "org/name", "--yes")


def test_the_commands_do_without_torch() -> None:
    program = f"import sys, {cached.__name__}, {removal.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
