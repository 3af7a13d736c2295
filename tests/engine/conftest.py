"""The engine's tests with GPU kernels are collected where those can run."""

from __future__ import annotations

import torch

from jamba_server.kernels.triton import interpreted

# `make test` runs it in triton's interpreter, in a process of its own
collect_ignore = [] if interpreted() or torch.cuda.is_available() else ["test_triton.py"]
