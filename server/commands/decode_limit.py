"""What the memory's bandwidth allows a decode step, beside what was measured. A part of `jamba plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.cache.spec import available_cpus
from engine.errors import ConfigError
from engine.model_config import JambaConfig, step_bytes
from engine.quantization import QuantizationPolicy
from server.bench.conditions import read_bandwidth
from server.bench.report import Report
from server.bench.runner import ClosedLoop
from server.options import parse_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """A decode step of `sequences` at once reads `step_bytes` of weights. Tokens a second of all of them together: what
    the bandwidth allows, and what `jamba bench` measured (None: not known)."""

    sequences: int
    step_bytes: int
    limit: float | None
    measured: float | None


def decode_limits(
    model: JambaConfig,
    dtype_bytes: int,
    policy: QuantizationPolicy,
    *,
    bandwidth: float | None,
    measured: Mapping[int, float],
) -> tuple[Decode, ...]:
    """For one sequence, and for as many as tokens a second have been `measured` for. `bandwidth`: bytes a second."""

    def decode(sequences: int) -> Decode:
        read = step_bytes(model, dtype_bytes, num_sequences=sequences, policy=policy)
        limit = None if bandwidth is None else bandwidth / read * sequences
        return Decode(sequences=sequences, step_bytes=read, limit=limit, measured=measured.get(sequences))

    return tuple(map(decode, sorted({1, *measured})))


def find_bandwidth(device: str, bandwidth: str | None, threads: int | None) -> float | None:
    """Bytes a second: `bandwidth` if it is given, else what `threads` threads of this CPU read; None for a GPU."""
    if bandwidth is None:
        return read_bandwidth(threads or available_cpus()) if device == "cpu" else None
    try:
        value = parse_size(bandwidth)
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(f"--bandwidth is {bandwidth!r}; it must be a size such as 3.35TB, read in a second.")
    return value


def describe_decode(decode: Decode, bandwidth: float | None) -> str:
    """In powers of 1000, as makers give bandwidths."""
    one = decode.sequences == 1
    at = "at 1 sequence" if one else f"at {decode.sequences} sequences"
    read = f"{decode.step_bytes / 1e9:.3g} GB a {'token' if one else 'step'}"
    measured = "" if decode.measured is None else f"; measured {_figure(decode.measured)} tok/s"
    if bandwidth is None or decode.limit is None:
        return f"decode {at}: {read} (with --bandwidth: the limit){measured}"
    share = "" if decode.measured is None else f", {decode.measured / decode.limit:.0%} of it"
    limit = f"{read} / {bandwidth / 1e9:,.0f} GB/s = {_figure(decode.limit)} tok/s"
    return f"decode limit {at}: {limit}{measured}{share}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read_bench(path: Path) -> dict[int, float]:
    """Decoded tokens a second by clients at once, from a `jamba bench` report's closed loops. Raises ConfigError."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--bench {path} cannot be read as a report of `jamba bench --output`: {error}.") from error
    return {
        level.load.concurrency: 1000 * level.load.concurrency / level.tpot_ms.mean
        for level in report.levels
        if isinstance(level.load, ClosedLoop) and level.tpot_ms
    }
