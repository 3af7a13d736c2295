"""Downloads, against a small hub on a loopback address: what they say and fetch, how they fail and end."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli import download as module
from jamba_server.server.cli.download import download
from jamba_server.server.cli.gguf_choice import NoSuchFile, choose, split_name
from tests.server.fake_hub import COMMIT, REPOSITORY, Hub, serve_hub

WEIGHTS = bytes(range(256)) * 4096
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"not wanted"}
PATTERNS = ["config.json", "*.safetensors"]
# A shell's background jobs ignore Ctrl-C, and so may this test's process: the command must not inherit that.
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from jamba_server.server.cli.application import run; run()"
)

ServeHub = Callable[[Hub], AbstractContextManager[Hub]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ServeHub:
    """Makes a hub the one that processes started here know, with an empty cache."""

    @contextmanager
    def start(hub: Hub) -> Generator[Hub]:
        with serve_hub(hub):
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            yield hub

    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return start


def test_what_matches_comes_with_one_line_and_only_once(
    serve: ServeHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with serve(Hub(FILES)):
        folder = download(REPOSITORY, None, PATTERNS)
        assert download(REPOSITORY, None, PATTERNS) == folder
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert caplog.messages == ["downloading org/name, 2 files, 1.0 MB"]
    out, err = capfd.readouterr()
    assert [out, *(line for line in err.splitlines() if not line.endswith(caplog.messages[0]))] == [""]


def test_without_the_hub_what_is_here_serves(serve: ServeHub) -> None:
    with serve(Hub(FILES)):
        folder = download(REPOSITORY, None, PATTERNS)
    assert download(REPOSITORY, None, PATTERNS) == folder


def test_ctrl_c_ends_a_download_at_once_and_the_next_one_takes_what_has_come(serve: ServeHub, tmp_path: Path) -> None:
    with serve(Hub(FILES, stalls="model.safetensors")) as hub, ExitStack() as stack:
        command = [sys.executable, "-c", INTERRUPTIBLE, "serve", "--port", "0", REPOSITORY]
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        repository = tmp_path / "hub" / "models--org--name"
        while not (hub.stalled.is_set() and (repository / "snapshots" / COMMIT / "config.json").exists()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)  # the hub says nothing more, so nothing but this ends it
        assert process.wait(timeout=10) == 130
        assert process.stderr is not None
        lines = [line.rstrip().partition(": ")[2] for line in process.stderr]
        assert not list((repository / "blobs").glob("*.incomplete"))
        hub.stalls = None
        hub.fetched.clear()
        folder = download(REPOSITORY, None, PATTERNS)
    assert lines[2:] == ["downloading org/name, 2 files, 1.0 MB"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched == [("model.safetensors", None)]


def test_a_connection_that_breaks_is_made_again_where_it_was(serve: ServeHub) -> None:
    weights = WEIGHTS * 24  # the hub's client takes 10 MiB at a time: half of this has one of them
    with serve(Hub({"model.safetensors": weights}, cuts="model.safetensors")) as hub:
        folder = download(REPOSITORY, None, PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert hub.fetched == [("model.safetensors", None), ("model.safetensors", f"bytes={10 * 1024**2}-")]


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, {"X-Error-Code": "RepoNotFound"}), r"has no such model \(or it is private: set HF_TOKEN\)\.$"),
        ((401, {}), r"answers 401 Unauthorized when asked for org/name: set HF_TOKEN to a token that may read it\.$"),
        ((403, {"X-Error-Code": "GatedRepo"}), "org/name is gated: accept its licence on http"),
        ((403, {}), r"answers 403 Forbidden when asked for org/name: set HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "has no such model"),
        ((500, {}), r"answers 500 Internal Server Error when asked for org/name\.$"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence(
    serve: ServeHub, refusal: tuple[int, dict[str, str]], sentence: str
) -> None:
    with serve(Hub(FILES, refusal=refusal)), pytest.raises(CheckpointError, match=sentence):
        download(REPOSITORY, None, PATTERNS)


@pytest.mark.parametrize("answer", [b"<html>", b"[1]", b"{}"])
def test_a_malformed_answer_is_one_sentence(serve: ServeHub, answer: bytes) -> None:
    with (
        serve(Hub(FILES, strange=answer)) as hub,
        pytest.raises(
            CheckpointError, match=f"^{hub.url} answers in a way that the hub's client cannot read"
        ) as caught,
    ):
        download(REPOSITORY, None, PATTERNS)
    assert "\n" not in str(caught.value)


def test_an_unknown_revision_is_named(serve: ServeHub) -> None:
    with serve(Hub(FILES)), pytest.raises(CheckpointError, match=r"has org/name, but not its revision v9\.$"):
        download(REPOSITORY, "v9", PATTERNS)


def test_a_hub_that_is_not_there_is_named(serve: ServeHub) -> None:
    with serve(Hub(FILES)) as hub:
        pass
    with pytest.raises(CheckpointError, match=f"and {hub.url} cannot be reached"):
        download(REPOSITORY, None, PATTERNS)


def test_a_process_that_ends_early_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", "raise SystemExit('out of order')"))
    with pytest.raises(CheckpointError, match="downloads org/name has ended without a result: out of order"):
        download(REPOSITORY, None, PATTERNS)


GGUF_FILES = {
    "name-Q4_K_M.gguf": b"four",
    "name-Q8_0-00001-of-00002.gguf": b"eight",
    "name-Q8_0-00002-of-00002.gguf": b"more",
    "README.md": b"",
}


def test_the_quantisation_picks_the_gguf_file(serve: ServeHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serve(Hub(GGUF_FILES)):
        usual = download(REPOSITORY, None, [], "")
        eight = download(REPOSITORY, None, [], "q8_0")
        with pytest.raises(CheckpointError) as refusal:
            download(REPOSITORY, None, [], "Q2_K")
    assert (usual.name, usual.read_bytes()) == ("name-Q4_K_M.gguf", b"four")
    assert eight.name == "name-Q8_0-00001-of-00002.gguf"
    assert eight.with_name("name-Q8_0-00002-of-00002.gguf").read_bytes() == b"more"
    assert str(refusal.value) == (
        "org/name cannot be used: it has no quantisation Q2_K; name one of Q4_K_M, Q8_0 after a colon."
    )
    assert "org/name has the quantisations Q4_K_M, Q8_0; name-Q4_K_M.gguf is taken" in caplog.messages
    assert download(REPOSITORY, None, [], "Q8_0") == eight, "without the hub, the file in the cache serves"


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (["a.Q4_K_M.gguf", "a.Q6_K.gguf"], "Q6_K", ["a.Q6_K.gguf"]),
        (["a-bf16.gguf"], "", ["a-bf16.gguf"]),
        (["a-IQ4_XS.gguf", "a-Q4_K_M.gguf"], "iq4_xs", ["a-IQ4_XS.gguf"]),
        (["model.gguf"], "", ["model.gguf"]),
    ],
)
def test_choices(files: list[str], wanted: str, chosen: list[str]) -> None:
    assert choose(files, wanted)[0] == chosen


def test_no_choice() -> None:
    with pytest.raises(NoSuchFile, match="it has no GGUF files"):
        choose([], "")
    with pytest.raises(NoSuchFile, match="it has no Q4_K_M, which is taken by default; name one of F16, Q8_0 after a"):
        choose(["a-Q8_0.gguf", "a-F16.gguf"], "")


def test_names_of_gguf_models() -> None:
    assert split_name("org/name") == ("org/name", None)
    assert split_name("org/name-GGUF") == ("org/name-GGUF", "")
    assert split_name("org/name-GGUF:Q4_0") == ("org/name-GGUF", "Q4_0")
