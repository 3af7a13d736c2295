"""The kernels for NVIDIA GPUs, in Triton: no compiler is needed at install. At the first start triton builds its
launcher, with a C compiler and Python's headers, and keeps it in its cache.

Results do not depend on batch mates or on chunking because
* every sum has one order: tiles are fixed, no product is split over K, keys are taken in splits of fixed length;
* an op for one token and its twin for many run the same code over the same tiles;
* the compiler may not fuse a multiplication and an addition by itself (`EXACT` in `launch`): `tl.fma` says where.

With TRITON_INTERPRET=1, which triton reads when a kernel is defined, they run on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import os
import subprocess
from importlib import import_module
from importlib.util import find_spec

import torch

from jamba_server.kernels.ops import KernelUnavailable

MIN_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ensure_available() -> None:
    """Raises KernelUnavailable where these kernels cannot run."""
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
