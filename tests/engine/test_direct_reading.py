"""Tensors that compiled code reads straight into a model are those that numpy and torch read, bit for bit."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from jamba_server.engine.convert.__main__ import main as convert
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.gguf.reader import read_gguf
from jamba_server.engine.gguf.weights import read_tensors
from jamba_server.engine.read_ahead import ReadAhead, reading_early
from jamba_server.kernels.cpu.a8 import Packer as PackerA8
from jamba_server.kernels.cpu.linear import Packer
from jamba_server.kernels.cpu.read import Reader
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.llm import LLM
from jamba_server.server.demo import demo_folder
from tests.engine.test_gguf_exact import WIDE
from tests.tiny import save_tiny

CASES: Final[Mapping[str, Mapping[str, str]]] = {
    "": {},
    "int8": {},
    "int4": {"activation_quantization": "none"},
    "int4-g32": {"activation_quantization": "int8", "dtype": "bfloat16"},
    "Q8_0": {},
    "Q4_0": {"activation_quantization": "int8"},
    "BF16": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with experts and the vocabulary of the demonstration model."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    settings: dict[str, Any] = WIDE | {"vocab_size": 4100, "eos_token_id": [2, 4]}
    save_tiny(folder, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_folder() / name, folder / name)
    return folder


def packed(path: Path, settings: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Returns the bytes of all weights that are packed while a model is loaded."""
    found: list[bytes] = []

    def noting(pack: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: object, weight: object) -> object:
            result = pack(self, weight)
            assert isinstance(result.panels, Tensor)
            found.append(result.panels.numpy().tobytes())
            return result

        return call

    with monkeypatch.context() as patch:
        for packer in (Packer, PackerA8):
            patch.setattr(packer, "__call__", noting(packer.__call__))
        LLM(path, threads=2, max_num_seqs=2, **settings)
    return found


@pytest.mark.parametrize("form", CASES)
def test_the_packed_weights_are_the_same(
    form: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("model.gguf" if form in ("Q8_0", "Q4_0", "BF16") else "model") if form else source
    if form:
        convert(source, path, form)
    try:
        Reader()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    calls: list[str] = []

    for name in ("numbers", "nibbles", "blocks"):
        method = getattr(Reader, name)

        def call(self: Reader, *args: Any, method: Any = method, name: str = name, **kwargs: Any) -> object:
            calls.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Reader, name, call)
    directly = packed(path, CASES[form], monkeypatch)
    expected = {"int4": "nibbles", "int4-g32": "nibbles", "Q8_0": "blocks", "Q4_0": "blocks"}.get(form, "numbers")
    assert calls.count(expected) >= len(directly)
    monkeypatch.setattr("jamba_server.engine.in_file._reader", lambda: None)
    assert packed(path, CASES[form], monkeypatch) == directly


def test_a_file_that_was_cut_after_its_header_was_read(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert(source, path, "Q8_0")
    tensor = list(read_gguf(path).tensors.values())[-1]
    [*_, last] = read_tensors(read_gguf(path), torch.bfloat16)
    os.truncate(path, tensor.start + tensor.num_bytes - 1)
    with pytest.raises(CheckpointError, match="has become shorter while it was read"):
        _ = last.loaded
    with pytest.raises(CheckpointError, match="is incomplete"):
        read_gguf(path)  # the header that was read before is not used for a file that has changed


def test_a_window_is_read_ahead_and_the_rest_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 1 << 20
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(4 * piece + 1)
    asked: list[tuple[int, int]] = []
    changed = threading.Condition()

    def advise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        with changed:
            asked.append((start, size))
            changed.notify_all()

    def wait(count: int) -> None:
        with changed:
            assert changed.wait_for(lambda: len(asked) >= count, timeout=60)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with ReadAhead(paths, window=2 * piece) as ahead:
        wait(3)  # the pieces that begin within the window
        ahead.used(piece)
        wait(4)
        assert asked == [(i * piece, piece) for i in range(4)]
        ahead.used(8 * piece + 2)
        wait(10)
    assert asked == [(i * piece, piece) for i in range(5)] * 2


def test_reading_ahead_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 22))
    with ReadAhead([tmp_path / "a", tmp_path / "missing"], window=0):
        pass
    with ReadAhead([tmp_path / "missing"]):
        pass


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_files_that_are_not_there_are_not_read(load_format: str, tmp_path: Path) -> None:
    with reading_early(tmp_path, load_format):
        pass
    with reading_early(tmp_path / "missing", load_format):
        pass
