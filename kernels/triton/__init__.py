"""This package has the kernels for NVIDIA GPUs, written in the language Triton.

Installing them needs no compiler. At the first start, triton builds its launcher with a C compiler and Python's
headers, and keeps it in its cache. Results are batch-invariant because
* every sum has one fixed order: tiles have a fixed shape, K is split at fixed places only, and attention processes keys
  in splits of fixed length;
* the prefill op and the decode op of a pair run the same code over the same tiles;
* the compiler must not fuse a multiplication and an addition by itself (`EXACT` in `launch`); the code calls `tl.fma`
  where it wants a fused operation.

With TRITON_INTERPRET=1 the kernels run slowly on CPU tensors, for tests. Triton reads this variable when a kernel is
defined.
"""

from __future__ import annotations

import os
import subprocess
from importlib import import_module
from importlib.util import find_spec

import torch

from jamba_server.kernels.ops import KernelUnavailable

MIN_CAPABILITY = (8, 0)  # The lowest compute capability of GPUs whose tensor cores support bfloat16.


def interpreted() -> bool:
    """Returns whether the kernels run in triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ensure_available() -> None:
    """Raises the exception KernelUnavailable if the Triton kernels cannot run on this machine."""
    if find_spec("triton") is None:
        raise KernelUnavailable("the package triton is not installed")
    if interpreted():
        return
    if not torch.cuda.is_available():
        raise KernelUnavailable("torch sees no CUDA device")
    if (capability := torch.cuda.get_device_capability()) < MIN_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        raise KernelUnavailable(f"the GPU has compute capability {have}; {need} is needed")
    try:
        import_module("triton.runtime").driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(
            f"triton cannot build its launcher, for which it needs a C compiler (gcc), Python's headers (python3-dev) "
            f"and the driver's libcuda.so.1: {error}"
        ) from error
