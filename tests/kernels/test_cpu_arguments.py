"""Tensors that the compiled library must not be given, in an interpreter without assertions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.ops import KernelUnavailable

ROOT = Path(__file__).parent.parent.parent
TAKEN = {  # rightly: copied into one piece before the call, or of any size or dtype
    "stride": {
        *(f"{op}.{i}" for op in ("copy_slots", "compress_states", "restore_states") for i in (1, 2, 3)),
        *("run_experts.2", "run_experts.3", "run_experts.pack.0", "run_experts.pack.1", "linear.pack.0"),
    },
    "shape": {
        *(
            "route_experts.0",
            "sample.0",
            "apply_bitmask.0",
            "linear.pack.0",
            "linear.rows.1",
            "linear.rows of a plain weight.1",
        ),
    },
    "dtype": {"copy_slots.0.0", "copy_slots.0.1"},
    "device": set[str](),
}


def test_each_tensor_that_could_not_be_read_is_refused_without_assertions() -> None:
    try:
        library()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    command = (sys.executable, "-O", "-m", "tests.kernels.bad_arguments")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = {(where, way): (kind, text) for where, way, kind, text in map(json.loads, done.stdout.splitlines())}
    assert len(said) > 400
    wrong = {key: kind for key, (kind, _) in said.items() if kind != "ValueError" and key[0] not in TAKEN[key[1]]}
    assert wrong == {}
    assert said["rms_norm.3", "shape"][1] == (
        "residual must be float32 [3, 16], contiguous behind dimension 0, in the CPU's memory; "
        "it is float32 [3, 15] with strides [16, 1] on cpu"
    )
    assert said["linear.0", "device"][1].startswith("x must be float32 [3, 16], ")
    assert said["linear.0", "device"][1].endswith(" on meta")
    assert said["silu_and_mul.0", "dtype"][1] == "the cpu kernels compute in float32, bfloat16, float16, not in float64"
