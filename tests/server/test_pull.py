"""`jamba pull` against a small hub on a loopback address."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli import application, hub
from jamba_server.server.cli.download import Download, HubFile
from jamba_server.server.cli.models.selection import select
from jamba_server.server.demo import demo_folder
from tests.geometries import write_geometry
from tests.server.fake_hub import COMMIT, REPOSITORY, Hub, serve_hub

DEMO: Mapping[str, bytes] = {
    path.name: path.read_bytes() for path in demo_folder().iterdir() if path.suffix in (".json", ".jinja", ".md")
} | {"model.safetensors": (demo_folder() / "model.safetensors").read_bytes()}
OTHERS: Mapping[str, bytes] = {"pytorch_model.bin": b"p", "modeling_jamba.py": b"import os", "onnx/config.json": b"{}"}

Pull = Callable[..., tuple[int | str, str]]


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Pull:
    """Runs `jamba pull` with an empty cache at a hub; its exit status or last sentence, and all that it printed."""

    def run(at: Hub, *arguments: str) -> tuple[int | str, str]:
        monkeypatch.setenv("HF_ENDPOINT", at.url)
        monkeypatch.setattr(sys, "argv", ["jamba", "pull", *arguments])
        with pytest.raises(SystemExit) as ended:
            application.run()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out

    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return run


def one_sentence(result: tuple[int | str, str]) -> str:
    status, _ = result
    assert isinstance(status, str), "the command should have failed"
    assert status.startswith("jamba: ")
    assert "\n" not in status
    return status


def test_a_model_comes_whole_and_the_rest_is_explained(pull: Pull, tmp_path: Path) -> None:
    with serve_hub(Hub({**DEMO, **OTHERS})) as at:
        status, out = pull(at, REPOSITORY)
        assert status == 0
        folder = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
        expected = {name: data for name, data in DEMO.items() if name != "README.md"}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
        assert "pytorch_model.bin (1 file, 1 byte): weights as pickle, which could run code" in out
        assert "modeling_jamba.py (1 file, 9 bytes): code, which this server never runs" in out
        assert "onnx/config.json (1 file, 2 bytes): in a subfolder" in out
        assert f"org/name is complete: JambaForCausalLM, bfloat16, in {folder}" in out
        assert "fits into the free memory of this machine: yes" in out
        at.fetched.clear()
        assert pull(at, REPOSITORY, "--revision", COMMIT)[0] == 0
        assert at.fetched == []


def test_a_gguf_file_is_named_by_its_quantisation(pull: Pull) -> None:
    with serve_hub(Hub({"name-Q4_K_M.gguf": b"four", "name-Q8_0.gguf": b"eight"})) as at:
        status, out = pull(at, f"{REPOSITORY}:Q8_0")
        assert status == 0
        assert "name-Q4_K_M.gguf (1 file, 4 bytes): another quantisation" in out
        assert [name for name, _ in at.fetched] == ["name-Q8_0.gguf"]
        assert "it has no safetensors files, but 2 of GGUF; write org/name:Q4_K_M" in one_sentence(pull(at, REPOSITORY))
        assert "it has no quantisation Q2_K; name one of Q4_K_M, Q8_0" in one_sentence(pull(at, f"{REPOSITORY}:Q2_K"))


def test_a_pull_that_was_killed_goes_on_with_the_missing_files(pull: Pull, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--org--name"
    with serve_hub(Hub(DEMO, stalls="model.safetensors")) as at:
        environment = {"HF_ENDPOINT": at.url, "HF_HOME": str(tmp_path)}
        program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        program += "from jamba_server.server.cli.application import run; run()"
        command = [sys.executable, "-c", program, "pull", REPOSITORY]
        with subprocess.Popen(command, env={**os.environ, **environment}) as process:
            while not (at.stalled.is_set() and (blobs / "snapshots" / COMMIT / "tokenizer.json").exists()):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
        at.stalls = None
        at.go_on.set()
        at.fetched.clear()
        assert pull(at, REPOSITORY)[0] == 0
        assert at.fetched == [("model.safetensors", None)], "the other files were complete"


def test_a_wrong_checksum_is_found_and_the_file_is_fetched_again(pull: Pull) -> None:
    with serve_hub(Hub(DEMO, damaged={"model.safetensors"})) as at:
        sentence = one_sentence(pull(at, REPOSITORY))
        assert "model.safetensors of org/name has the SHA-256 checksum " in sentence
        assert "the file is damaged and was deleted; run the command again" in sentence
        at.damaged.clear()
        at.fetched.clear()
        assert pull(at, REPOSITORY)[0] == 0
        assert at.fetched == [("model.safetensors", None)]


def test_check_finds_what_was_damaged_on_the_disk(pull: Pull, tmp_path: Path) -> None:
    with serve_hub(Hub(DEMO)) as at:
        assert pull(at, REPOSITORY)[0] == 0
        [blob] = [path for path in (tmp_path / "hub").glob("*/blobs/*") if hub.SHA256.fullmatch(path.name)]
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        assert "has the SHA-256 checksum" in one_sentence(pull(at, REPOSITORY, "--check"))
        assert not blob.exists()


def test_a_gated_model_without_a_token(pull: Pull) -> None:
    with serve_hub(Hub(DEMO, gated=True)) as at:
        sentence = one_sentence(pull(at, REPOSITORY))
    assert sentence.startswith(f"jamba: org/name is gated: accept its licence on {at.url}/org/name and set HF_TOKEN")


def test_a_disk_that_is_too_small_is_found_before_the_download(pull: Pull) -> None:
    with serve_hub(Hub(DEMO, sizes={"model.safetensors": 1 << 60})) as at:
        sentence = one_sentence(pull(at, REPOSITORY))
    assert "The missing files of org/name have 1.2 EB, but the disk of the hub cache" in sentence
    assert "model.safetensors" not in [name for name, _ in at.fetched]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_becomes_full(error: Exception) -> None:
    sentence = hub.describe(error, Download(REPOSITORY, None, []))
    assert sentence.startswith(f"The disk of the hub cache {constants.HF_HUB_CACHE} is full, so org/name is not")


def test_a_model_of_another_kind_is_refused_before_its_weights_come(pull: Pull) -> None:
    other = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
    with serve_hub(Hub({"config.json": other, "model.safetensors": b"weights"})) as at:
        assert 'model_type is "llama"; this server runs "jamba" models only' in one_sentence(pull(at, REPOSITORY))
    assert [name for name, _ in at.fetched] == ["config.json"]


def test_revisions_and_paths(pull: Pull, tmp_path: Path) -> None:
    with serve_hub(Hub(DEMO)) as at:
        assert "not its revision v9." in one_sentence(pull(at, REPOSITORY, "--revision", "v9"))
        local = write_geometry(tmp_path, "3b")
        assert "is a local path: there is nothing to download" in one_sentence(pull(at, str(local)))
    sentence = one_sentence(pull(at, REPOSITORY))
    assert f"{at.url} cannot be asked for the files of org/name" in sentence


def test_pickles_have_no_weights_that_are_read() -> None:
    with pytest.raises(CheckpointError, match=r"no safetensors files; pytorch_model\.bin would have to be converted"):
        select(REPOSITORY, [HubFile("pytorch_model.bin", 5), HubFile("config.json", 2)], None)
