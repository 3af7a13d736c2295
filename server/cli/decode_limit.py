"""What the memory's bandwidth allows a decode step, beside what was measured: for `jamba plan` and `jamba bench`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig, step_bytes
from jamba_server.engine.quantization import FORMATS, QuantizationPolicy
from jamba_server.engine.start.contents import read_plan
from jamba_server.engine.start.machine import available_cpus
from jamba_server.server.cli.bench.conditions import read_bandwidth
from jamba_server.server.cli.bench.report import Level, Report
from jamba_server.server.cli.bench.runner import ClosedLoop
from jamba_server.server.options import parse_size

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """A decode step of `sequences` at once reads `step_bytes` of weights, and reads and writes states, `state_bytes` in
    all; keys and values, little of a hybrid's, are left out. Tokens a second of all sequences together: what the
    bandwidth allows, and what `jamba bench` measured (None: not known)."""

    sequences: int
    step_bytes: int
    state_bytes: int
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

    slot = CacheSpec.of(model, block_size=1, dtype_bytes=dtype_bytes).bytes_per_slot

    def decode(sequences: int) -> Decode:
        read = step_bytes(model, dtype_bytes, num_sequences=sequences, policy=policy)
        states = 2 * sequences * slot
        return Decode(
            sequences=sequences,
            step_bytes=read,
            state_bytes=states,
            limit=None if bandwidth is None else bandwidth / (read + states) * sequences,
            measured=measured.get(sequences),
        )

    return tuple(map(decode, sorted({1, *measured})))


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A checkpoint as a server reads it: in the formats of `policy`, else in its own dtype. `bandwidth`: bytes that the
    server's device reads in a second, None where that is not known."""

    model: JambaConfig
    policy: QuantizationPolicy
    bandwidth: float | None

    @classmethod
    def find(cls, folder: Path, *, bandwidth: str | None, quantization: str | None, quantize_mamba: bool) -> Served:
        """Raises ConfigError and, for a folder without a configuration, CheckpointError."""
        formats: dict[str, Quantization] = {name: name for name in FORMATS}
        kind = None if quantization is None else formats.get(quantization)
        if kind is None and (quantization is not None or quantize_mamba):
            shown = "missing" if quantization is None else repr(quantization)
            raise ConfigError(f"--quantization is {shown}; it must be one of {', '.join(FORMATS)}.")
        speed = None if bandwidth is None else parse_bandwidth(bandwidth)
        engine = EngineConfig(model=str(folder), quantization=kind, quantize_mamba=quantize_mamba)
        model = read_plan(folder).config
        policy = QuantizationPolicy.of(engine, model.fp8_roles, model.made_at_load)
        return cls(model=model, policy=policy, bandwidth=speed)

    def describe(self, levels: Iterable[Level]) -> list[str]:
        """What the bandwidth allows beside what was measured, for one sequence and for the closed loops."""
        size = DTYPE_BYTES[self.model.dtype]
        limits = decode_limits(self.model, size, self.policy, bandwidth=self.bandwidth, measured=decode_rates(levels))
        return [describe_decode(limit, self.bandwidth) for limit in limits]


def find_bandwidth(device: str, bandwidth: str | None, threads: int | None) -> float | None:
    """Bytes a second: `bandwidth` if it is given, else what `threads` threads of this CPU read; None for a GPU."""
    if bandwidth is None:
        return read_bandwidth(threads or available_cpus()) if device == "cpu" else None
    return parse_bandwidth(bandwidth)


def parse_bandwidth(bandwidth: str) -> float:
    """Bytes a second."""
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
    moved = (decode.step_bytes + decode.state_bytes) / 1e9
    read = f"{moved:.3g} GB a {'token' if one else 'step'}"
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
    return decode_rates(report.levels)


def decode_rates(levels: Iterable[Level]) -> dict[int, float]:
    """Decoded tokens a second by clients at once, of the closed loops."""
    return {
        level.load.concurrency: 1000 * level.load.concurrency / level.tpot_ms.mean
        for level in levels
        if isinstance(level.load, ClosedLoop) and level.tpot_ms
    }
