"""Computes the highest decoding speed (tokens per second) that the memory bandwidth allows.

The commands `jamba plan` and `jamba bench` print this limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jamba_server.engine.config import EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.quantization import FORMATS, QuantizationPolicy
from jamba_server.engine.start.contents import read_plan
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.weight_sizes import policy_of, step_bytes
from jamba_server.server.cli.bench.conditions import read_bandwidth
from jamba_server.server.cli.bench.report import Level, Report
from jamba_server.server.cli.bench.runner import ClosedLoop
from jamba_server.server.options import parse_size

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """The bytes moved in one decode step and the tokens decoded per second, if `sequences` sequences run at the same
    time.

    A step reads `step_bytes` bytes of weights. It reads and writes the states of all sequences, `state_bytes` bytes in
    total for reading and writing. Keys and values are left out, since a hybrid model has few of them. `limit` and
    `measured` are tokens per second of all sequences together: `limit` is the most that the bandwidth allows, or None
    if the bandwidth is not known. `measured` was measured by `jamba bench`, or is None.
    """

    sequences: int
    step_bytes: int
    state_bytes: int
    limit: float | None
    measured: float | None


def decode_limits(
    model: JambaConfig,
    dtype: str,
    policy: QuantizationPolicy,
    *,
    bandwidth: float | None,
    measured: Mapping[int, float],
    parts: Sequence[Parts | None] = (None,),
) -> tuple[Decode, ...]:
    """Returns the limits of the decoding speed, first for one sequence, then for each number of sequences in
    `measured`.

    `measured` maps a number of sequences to tokens per second. `bandwidth` is in bytes per second.
    `parts` has what one rank of each stage owns, if several ranks run the model. The bytes are those that these ranks
    read, and the time of exchanges between ranks is not counted. The stages run one step after the other, each on a
    part of the sequences, and all stages work at the same time if there are as many sequences.
    """
    slots = [cache_layout(model, block_size=1, dtype=dtype, parts=own).num_bytes("slot") for own in parts]

    def decode(sequences: int) -> Decode:
        steps = min(sequences, len(parts))
        each = -(-sequences // steps)
        read = [step_bytes(model, DTYPE_BYTES[dtype], num_sequences=each, policy=policy, parts=own) for own in parts]
        moved = [own + 2 * each * slot for own, slot in zip(read, slots, strict=True)]
        one_round = max(sum(moved), steps * max(moved))
        return Decode(
            sequences=sequences,
            step_bytes=sum(read),
            state_bytes=2 * each * sum(slots),
            limit=None if bandwidth is None else bandwidth / one_round * sequences,
            measured=measured.get(sequences),
        )

    return tuple(map(decode, sorted({1, *measured})))


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model under test, the number formats of its weights, and the memory bandwidth.

    `policy` names the quantised weights; all other weights have the model's own dtype. `bandwidth` is the memory
    bandwidth of the server's device in bytes per second, or None if it is not known.
    """

    model: JambaConfig
    policy: QuantizationPolicy
    bandwidth: float | None

    @classmethod
    def find(cls, folder: Path, *, bandwidth: str | None, quantization: str | None, quantize_mamba: bool) -> Served:
        """Reads the configuration of the model in `folder`. Raises ConfigError for options that are not allowed, and
        CheckpointError for a config.json that is missing or wrong."""
        formats: dict[str, Quantization] = {name: name for name in FORMATS}
        kind = None if quantization is None else formats.get(quantization)
        if kind is None and (quantization is not None or quantize_mamba):
            shown = "missing" if quantization is None else repr(quantization)
            raise ConfigError(f"--quantization is {shown}; it must be one of {', '.join(FORMATS)}.")
        speed = None if bandwidth is None else parse_bandwidth(bandwidth)
        engine = EngineConfig(model=str(folder), quantization=kind, quantize_mamba=quantize_mamba)
        model = read_plan(folder).config
        policy = policy_of(engine, model)
        return cls(model=model, policy=policy, bandwidth=speed)

    def describe(self, levels: Iterable[Level]) -> list[str]:
        """Returns lines with the limit of the decoding speed and the measured speed: one line for one sequence, and one
        line for each number of clients in `levels`."""
        model, measured = self.model, decode_rates(levels)
        limits = decode_limits(model, model.dtype, self.policy, bandwidth=self.bandwidth, measured=measured)
        return [describe_decode(limit, self.bandwidth) for limit in limits]


def find_bandwidth(device: str, bandwidth: str | None, threads: int | None) -> float | None:
    """Returns the memory bandwidth in bytes per second. If `bandwidth` is given, that text is parsed. If not, the
    bandwidth of a CPU is measured with `threads` threads that read memory, and None is returned for a GPU."""
    if bandwidth is None:
        return read_bandwidth(threads or available_cpus()) if device == "cpu" else None
    return parse_bandwidth(bandwidth)


def parse_bandwidth(bandwidth: str) -> float:
    """Converts a text such as 3.35TB, the bytes read per second, to a number.

    Raises ConfigError for a text that is not a size above 0.
    """
    try:
        value = parse_size(bandwidth)
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(
            f"--bandwidth is {bandwidth!r}; it must be the bytes that are read per second, such as 3.35TB."
        )
    return value


def describe_decode(decode: Decode, bandwidth: float | None) -> str:
    """Returns a line to print with the limit of the decoding speed and the measured speed in `decode`. GB in the line
    means 10**9 bytes."""
    one = decode.sequences == 1
    at = "at 1 sequence" if one else f"at {decode.sequences} sequences"
    moved = (decode.step_bytes + decode.state_bytes) / 1e9
    read = f"{moved:.3g} GB per {'token' if one else 'step'}"
    measured = "" if decode.measured is None else f"; measured {_figure(decode.measured)} tok/s"
    if bandwidth is None or decode.limit is None:
        return f"decode {at}: {read} (--bandwidth shows the limit){measured}"
    share = "" if decode.measured is None else f", {decode.measured / decode.limit:.0%} of it"
    limit = f"{read} / {bandwidth / 1e9:,.0f} GB/s = {_figure(decode.limit)} tok/s"
    return f"decode limit {at}: {limit}{measured}{share}"


def _figure(value: float) -> str:
    """Returns a number as text with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read_bench(path: Path) -> dict[int, float]:
    """Reads a report of `jamba bench`. Returns a mapping from the number of clients to the measured decoding speed in
    tokens per second. Loads without a fixed number of clients are ignored. Raises ConfigError."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--bench {path} cannot be read as a report of `jamba bench --output`: {error}.") from error
    return decode_rates(report.levels)


def decode_rates(levels: Iterable[Level]) -> dict[int, float]:
    """Returns a mapping from the number of clients to the measured decoding speed in tokens per second. Loads in
    `levels` without a fixed number of clients are ignored."""
    return {
        level.load.concurrency: 1000 * level.load.concurrency / level.tpot_ms.mean
        for level in levels
        if isinstance(level.load, ClosedLoop) and level.tpot_ms
    }
