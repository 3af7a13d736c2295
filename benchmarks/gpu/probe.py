"""Says in a few seconds whether a machine can run the GPU check, and checks the claim that decides exactness.

    python -m benchmarks.gpu.probe

It prints the C compiler, Python's headers, the versions of the packages, and every import that fails. With a GPU it
also launches a kernel, and compares the tiles of matrix products: a row of the tile of a decode step (64 x 32) must
have the same bits as this row of the tile of a prompt (128 x 128). All promises of equal bits rest on this. Last it
compares kernels that are launched before the kernel before them has ended with the same kernels, one after the other.
The part `probe` of the GPU check records the same.

Outside functions this module imports only the standard library, so that it can name whatever else is missing.
"""

from __future__ import annotations

import ctypes.util
import importlib
import json
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from benchmarks.gpu.record import Job, Record

VERSIONS: Final = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "mamba-ssm", "causal-conv1d")
# The modules of the project that each part of the GPU check begins with.
OWN: Final = ("check", "tests", "parity", "engine", "serving", "peer_transformers", "sweep", "tune", "counters")
PROGRAMS: Final = ("nvidia-smi", "ncu", "compute-sanitizer", "cuobjdump", "git")
# The sizes of the compared products: numbers of rows that use the tiles of a decode step, beside ROWS rows that use the
# tile of a prompt, and (outputs, inputs). Inputs that are no multiple of the tiles' 64 end within a tile, as do 1000
# outputs. Of the last two, K is split into sections, and the tile of a prompt is the widest one.
ROWS, FEW = 1024, (1, 5, 64)
SIZES: Final = {"whole tiles": (1000, 2560), "a rest": (1000, 2600), "long": (1000, 8192)}
MORE: Final = {"sections": (2560, 5120), "wide": (16384, 512)}
# The chain of kernels whose launches are compared: the number of pairs of kernels, their size, and how often it runs.
CHAIN, CHAIN_SIZE, REPLAYS = 50, 1024, 20
FORMATS: Final = ("bf16", "int8", "int4", "fp8")


def compiler() -> dict[str, Any]:
    """Returns what triton needs to build its launcher: a C compiler, Python.h and the driver's library."""
    gcc = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    first = subprocess.run([gcc, "--version"], capture_output=True, text=True, check=False).stdout if gcc else ""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = {
        "compiler": first.partition("\n")[0],
        "python_h": str(header) if header.is_file() else "",
        "libcuda": ctypes.util.find_library("cuda") or "",
    }
    return {"passed": bool(gcc) and header.is_file(), **found}


def machine() -> dict[str, Any]:
    """Returns the versions of the packages, the version of Python, and the paths of the programs that parts of the
    check start. A program that is missing has the path ""."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {name: shutil.which(name) or "" for name in PROGRAMS}


def imports() -> dict[str, Any]:
    """Imports every package that the check needs, then the module of each part. `missing` has the errors by name."""
    from benchmarks.gpu.wheels import EXPECTED

    gathered = ("msgspec", "llguidance", "fastapi", "uvicorn", "python_multipart", "gguf")
    missing: dict[str, str] = {}
    for name in (*EXPECTED, *gathered, *(f"benchmarks.gpu.{part}" for part in OWN)):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever fails, the others are tried
            missing[name] = f"{type(error).__name__}: {error}"
    return {"passed": not missing, "missing": missing}


def gpu() -> dict[str, Any]:
    """Returns the GPU's properties."""
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", 0),
        "cuda": str(getattr(torch, "version").cuda),  # noqa: B009 - torch's stubs lack the attribute
    }


def launch(device: str = "cuda") -> dict[str, Any]:
    """Compiles and runs one small kernel, and compares its results. Returns the seconds of the first and of the second
    launch."""
    import torch

    from jamba_server.kernels.triton.gated import silu_and_mul

    gate_up = torch.randn(3, 200, device=device)

    def timed() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        result = silu_and_mul(gate_up).cpu()
        return result, time.perf_counter() - start

    (_, first), (found, second) = timed(), timed()
    gate, up = gate_up.cpu().double().chunk(2, dim=1)
    error = (found - torch.nn.functional.silu(gate) * up).abs().max().item()
    return {"passed": error < 1e-5, "worst": error, "first_seconds": first, "second_seconds": second}


def tiles(format: str, device: str = "cuda", sizes: Mapping[str, tuple[int, int]] = SIZES) -> dict[str, Any]:
    """Compares the products of few rows with the same rows of a product of many rows, bit by bit.

    `format` is the format of the weights, and `sizes` has their outputs and inputs. Returns the number of products with
    different bits, the largest difference, and the largest error beside float64 relative to the largest result.
    """
    import torch

    from jamba_server.engine.quantization.quantize import quantize
    from jamba_server.kernels.triton.linear import Linear

    linear, generator = Linear(), torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"products": 0, "different": 0, "largest_difference": 0.0, "beside_float64": 0.0}
    for outputs, size in sizes.values():
        x = torch.randn(ROWS, size, generator=generator).to(device, torch.bfloat16)
        weight = (torch.randn(outputs, size, generator=generator) / size**0.5).to(device, torch.bfloat16)
        packed = linear.pack(weight if format == "bf16" else quantize(weight, format))  # pyright: ignore[reportArgumentType]
        many = linear(x, packed)
        if format == "bf16":
            exact = x.double() @ weight.double().T
            found["beside_float64"] = max(
                found["beside_float64"], ((many - exact).abs().max() / exact.abs().max()).item()
            )
        for rows in FEW:
            few = linear(x[:rows], packed)
            found["products"] += 1
            found["different"] += not torch.equal(few, many[:rows])
            difference = (few.float() - many[:rows].float()).abs().max().item()
            found["largest_difference"] = max(found["largest_difference"], difference)
    return {"passed": not found["different"] and found["beside_float64"] < 1e-2, **found}


def dependent(device: str = "cuda") -> dict[str, Any]:
    """Compares a chain of kernels whose launches do not wait for the kernel before (`launch.DEPENDENT`) with the same
    chain, bit by bit, in a CUDA graph that runs many times. Returns the microseconds of a kernel in both chains."""
    from unittest import mock

    import torch

    from jamba_server.kernels.triton import launch
    from jamba_server.kernels.triton.linear import Linear
    from jamba_server.kernels.triton.norm import rms_norm

    linear, generator = Linear(), torch.Generator().manual_seed(0)
    weight = (torch.randn(CHAIN_SIZE, CHAIN_SIZE, generator=generator) / 8).to(device, torch.bfloat16)
    x = torch.randn(3, CHAIN_SIZE, generator=generator).to(device, torch.bfloat16)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(CHAIN):
            y, _ = rms_norm(linear(y, weight), weight[0], 1e-6)
        return y

    expected, found = chain(), dict[str, float]()
    same = True
    for name, early in (("us", False), ("us_dependent", True)):
        with mock.patch.object(launch, "DEPENDENT", early):
            results, seconds = _replayed(chain, device)
        same &= all(torch.equal(result, expected) for result in results)
        found[name] = 1e6 * seconds / (2 * CHAIN)
    return {"passed": same, **found}


def _replayed(chain: Callable[[], Any], device: str) -> tuple[list[Any], float]:
    """Returns the results of a chain of kernels that a graph runs several times, and the seconds of the last run.
    Without a GPU, the chain runs once."""
    import torch

    if device == "cpu":
        return [chain()], 0.0
    chain()  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    results: list[Any] = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        results.append(result.clone())
    end.synchronize()
    return results, start.elapsed_time(end) / 1e3


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the cells that need a GPU, in order."""
    equal = {f"equal bits of tiles, {name}": partial(tiles, name) for name in FORMATS}
    more = {f"equal bits of larger tiles, {name}": partial(tiles, name, sizes=MORE) for name in FORMATS[:2]}
    return {"gpu": gpu, "launch": launch, **equal, **more, "dependent launches": dependent}


def run(job: Job, record: Record) -> None:
    """Runs the part `probe` of the GPU check."""
    record.start_run(job)
    wanted = {"compiler": compiler, "machine": machine, "imports": imports}
    for name, measure in (wanted | (cells() if job.device == "cuda" else {})).items():
        record.cell(job.key(name), measure)


def main() -> None:
    for name, measure in {"compiler": compiler, "machine": machine, "imports": imports}.items():
        print(f"{name}: {json.dumps(measure())}", flush=True)
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"No GPU can be used: torch is missing ({error}).") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"No GPU: torch {torch.__version__} sees no NVIDIA GPU.")
    failed: list[str] = []
    for name, measure in cells().items():
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001 - whatever fails, the other cells are tried
            row = {"passed": False, "raised": f"{type(error).__name__}: {error}"}
        print(f"{name}: {json.dumps(row)}", flush=True)
        failed += [] if row.get("passed", True) else [name]
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
