"""The command `python -m jamba_server.kernels` prints as JSON the hardware and the selected kernels."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from jamba_server.kernels.cpu.a8 import machine_units
from jamba_server.kernels.cpu.library import ARM_LEVELS, compiled_levels, library
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.kernels.table import describe

# Maps the name under which a CPU feature is printed to the name that the feature has in Linux's file /proc/cpuinfo.
CPU_FLAGS = {"avx2": "avx2", "avx512f": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_tile"}
ARM_FLAGS = {"neon": "asimd", "dot": "asimddp", "bf16": "bf16", "i8mm": "i8mm"}
CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Returns the versions of Python and torch, the CPU's features, the instruction sets of the CPU kernels and of
    their products with 8-bit activations, what is known of AMX, the number of threads, the GPUs, and the kernels for
    each device.

    The CPU features are None where /proc/cpuinfo does not exist, the instruction sets and what is known of AMX are None
    where the CPU kernels were not built, and the GPUs are None without CUDA.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_flags": _cpu_flags(),
        "cpu_level": _cpu_level(),
        "cpu_levels": list(compiled_levels(platform.machine())),
        "cpu_units": _cpu_units(),
        "cpu_amx": _cpu_amx(),
        "threads": torch.get_num_threads(),
        "cuda_devices": _cuda_devices(),
        "kernels": {device: [dataclasses.asdict(row) for row in describe(device)] for device in devices},
    }


def _cpu_flags() -> dict[str, bool] | None:
    if not CPU_INFO.exists():
        return None
    words = set(CPU_INFO.read_text().split())
    flags = ARM_FLAGS if compiled_levels(platform.machine()) == ARM_LEVELS else CPU_FLAGS
    return {flag: name in words for flag, name in flags.items()}


def _cpu_level() -> str | None:
    try:
        return library().level()
    except KernelUnavailable:
        return None


def _cpu_units() -> str | None:
    try:
        return machine_units()
    except KernelUnavailable:
        return None


def _cpu_amx() -> str | None:
    try:
        return library().amx()
    except KernelUnavailable:
        return None


def _cuda_devices() -> list[dict[str, Any]] | None:
    if not torch.cuda.is_available():
        return None
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": device.name, "memory_bytes": device.total_memory, "capability": f"{device.major}.{device.minor}"}
        for device in properties
    ]


if __name__ == "__main__":
    json.dump(machine(), sys.stdout, indent=2)
    sys.stdout.write("\n")
