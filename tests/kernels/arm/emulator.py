"""Runs the compiled kernels for ARM on an emulated processor, in place of the library of this machine.

`build` compiles the kernels and `driver.cpp` with a cross compiler, and `EmulatedLibrary` runs them in qemu's user
mode. The Python code above the library works as ever: it passes addresses, and a call copies the memory at these
addresses to the emulated process and back. So `EmulatedLibrary.watching` notes where tensors and structures are.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jamba_server.kernels.cpu import library as library_module
from jamba_server.kernels.cpu.library import FLOAT, POINTER, Library
from jamba_server.kernels.ops import KernelUnavailable

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "kernels/cpu/src"
BUILD = ROOT / "build/arm"
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-fno-exceptions", "-fno-schedule-insns", "-fvisibility=hidden",
         "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized")  # fmt: skip
SYSTEM = "/usr/aarch64-linux-gnu"  # where the cross compiler's package has the libraries for ARM
_FILES = ("read_numbers", "read_nibbles", "read_blocks")  # functions whose first argument is an open file


def objects() -> dict[str, Path]:
    """Compiles the kernels where they have changed. Maps the name of each source file to its object file."""
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*SOURCES.glob("*.h"), *SOURCES.glob("*.inl")]
    newest = max(path.stat().st_mtime for path in headers)
    names = {path.stem: path for path in SOURCES.glob("*.cpp") if path.stem != "module"} | {
        "driver": Path(__file__).with_name("driver.cpp")
    }
    found = {name: BUILD / f"{name}.o" for name in names}

    def compile_one(name: str) -> None:
        source, target = names[name], found[name]
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sorted(names)))
    return found


def build() -> Path:
    """Compiles and links the program that runs the kernels, and returns its path."""
    program = BUILD / "driver"
    subprocess.run([COMPILER, "-rdynamic", "-pthread", *objects().values(), "-o", program, "-ldl"], check=True)
    return program


class EmulatedLibrary(Library):
    """The functions of the library, computed by the kernels for ARM on an emulated processor `cpu` of qemu."""

    def __init__(self, program: Path, cpu: str) -> None:
        self.path = program
        command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, str(program)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._memory = _Memory()

    def function(self, name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            returned = self._call(name, arguments, values)
            return None if result is None else returned

        return call

    def close(self) -> None:
        """Ends the emulated process."""
        self._process.terminate()
        self._process.communicate()

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
        """Takes the place of this machine's library, and knows the memory of which an address is asked meanwhile."""
        monkeypatch.setattr(library_module, "open_library", lambda _: self)
        monkeypatch.setattr(ctypes, "addressof", self._memory.note_structure)
        with _Addresses(self._memory):
            yield
        self._memory.forget()

    def _call(self, name: str, kinds: tuple[Any, ...], values: tuple[Any, ...]) -> int:
        """Sends a call, and copies what the call has left in memory.

        A call is the name of the function, the buffers, the pointers that lie in buffers, and the arguments. All counts
        and numbers of buffers have 32 bits, and sizes and offsets have 64. A result is whether the function exists and
        what it returned, with 64 bits each, and the contents of the buffers.
        """
        buffers = _Buffers(self._memory)
        arguments = [
            buffers.argument(b"d" if name in _FILES and i == 0 else b"n" if kind is FLOAT else b"i", kind, value)
            for i, (kind, value) in enumerate(zip(kinds, values, strict=True))
        ]
        send, receive = self._process.stdin, self._process.stdout
        assert send is not None and receive is not None
        send.write(struct.pack("<I", len(name)) + name.encode() + buffers.contents())
        send.write(struct.pack("<I", len(arguments)) + b"".join(arguments))
        send.flush()
        header = receive.read(16)
        if len(header) < 16:
            raise RuntimeError(f"the emulated process ended in {name} with status {self._process.wait()}")
        is_known, returned = struct.unpack("<qq", header)
        if not is_known:
            raise KernelUnavailable(f"there is no function {name}")
        for region in buffers.regions:
            region.write(receive.read(region.size))
        return returned


class _Region:
    """Memory of this process: the storage of a tensor, or a structure."""

    def __init__(self, start: int, size: int, owner: Any) -> None:
        self.start, self.size, self.owner = start, size, owner

    def read(self) -> bytes:
        return ctypes.string_at(self.start, self.size)

    def write(self, contents: bytes) -> None:
        if not isinstance(self.owner, ctypes.Structure):  # whose pointers are other ones there
            ctypes.memmove(self.start, contents, self.size)

    def pointers(self) -> list[tuple[int, int]]:
        """Returns the offset and the value of each pointer in a structure that is not null."""
        if not isinstance(self.owner, ctypes.Structure):
            return []
        kind = type(self.owner)
        names = [field[0] for field in kind._fields_ if field[1] is POINTER]  # pyright: ignore[reportPrivateUsage]
        found = [(getattr(kind, name).offset, getattr(self.owner, name)) for name in names]
        return [(offset, value) for offset, value in found if value]


class _Memory:
    """The regions of which an address was asked. They are kept, so that no address is given to another one."""

    def __init__(self) -> None:
        self._regions: dict[int, _Region] = {}
        self._starts: list[int] = []
        self._addressof = ctypes.addressof

    def note_tensor(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._note(storage.data_ptr(), storage.nbytes(), storage)

    def note_structure(self, structure: Any) -> int:
        start = self._addressof(structure)
        self._note(start, ctypes.sizeof(structure), structure)
        return start

    def _note(self, start: int, size: int, owner: Any) -> None:
        if start and start not in self._regions:
            bisect.insort(self._starts, start)
            self._regions[start] = _Region(start, size, owner)

    def find(self, address: int) -> _Region:
        place = bisect.bisect_right(self._starts, address)
        region = self._regions[self._starts[place - 1]] if place else None
        if region is None or address > region.start + region.size:
            raise RuntimeError(f"nobody asked for the address {address:#x} that a kernel receives")
        return region

    def forget(self) -> None:
        self._regions.clear()
        self._starts.clear()


class _Addresses(TorchFunctionMode):
    """Notes every tensor of which an address is asked."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data_ptr:
            self._memory.note_tensor(args[0])
        return func(*args, **(kwargs or {}))


class _Buffers:
    """The regions of one call, in the order in which they are sent."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._numbers: dict[int, int] = {}
        self._pointers: list[bytes] = []
        self.regions: list[_Region] = []

    def argument(self, letter: bytes, kind: Any, value: Any) -> bytes:
        if kind is POINTER:
            return b"p" + self._place(value) if value else b"i" + struct.pack("<q", 0)
        return letter + struct.pack("<f" if kind is FLOAT else "<q", value)

    def contents(self) -> bytes:
        sent = [struct.pack("<Q", region.size) + region.read() for region in self.regions]
        return b"".join([struct.pack("<I", len(sent)), *sent, struct.pack("<I", len(self._pointers)), *self._pointers])

    def _place(self, address: int) -> bytes:
        """Returns the number of the buffer that has the address, and the offset in this buffer."""
        region = self._memory.find(address)
        if region.start not in self._numbers:
            self._numbers[region.start] = len(self.regions)
            self.regions.append(region)
            number = self._numbers[region.start]
            self._pointers += [
                struct.pack("<IQ", number, offset) + self._place(value) for offset, value in region.pointers()
            ]
        return struct.pack("<IQ", self._numbers[region.start], address - region.start)
