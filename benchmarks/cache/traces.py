"""Compares policies of the prefix cache on published traces, with the real scheduler and cache and a simulated model.

    python -m benchmarks.cache.traces --name cache-traces --traces FOLDER --parts real,table
    python -m benchmarks.cache.traces --name cache-traces --parts chats --llama-server PATH --gguf FILE

`real` replays the beginning of a trace on a real engine of the shape `small`, fits the time of a step to what was
measured, and replays the same requests in the simulation, to see whether it agrees. `table` replays traces with each
policy and each size of the cache in the simulation, and `parts` with parts of this server's policy left out. `chats`
sends the workload `multi-turn` of `jamba bench` to this server and to llama.cpp's, with the same GGUF file. FOLDER has
the files azure-llm-trace-2023-conv.csv.xz and -code.csv.xz, made of the Azure public dataset (CC BY 4.0), with the
columns seconds,input_tokens,output_tokens.

A trace has no text: which requests share a prefix is drawn by the model `ChatTrees`. All parts write into
benchmarks/results/NAME.json, and NAME.md is made of what is there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.cache import chats
from benchmarks.cache.policies import PARTS, ROWS, Row
from benchmarks.cache.replay import Costs, Real, Replay, Simulated, Summary, summarize
from benchmarks.cache.results import RESULTS, to_markdown
from benchmarks.http.serving import describe_commit
from benchmarks.shapes import write_config
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.cache.state_store import SlotStates
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.scheduler import Scheduler
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.cli.bench.sessions import Session, TokenRange
from jamba_server.server.cli.bench.workloads import Trace

MIB = 1 << 20
TOKENS = TokenRange(3, 32767)
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_BATCHED_TOKENS = 8192, 16, 256
SEED = 0
# The arrival times of each trace are multiplied by this factor, because two cores are slower than what the trace was
# recorded on. Without a cache, the engine is then busy for about half of the time with chats. Code completions come in
# bursts, during which requests wait.
TIME_SCALE = {"conv": 3.0, "code": 2.0}
# The times of steps in the table: those of the shape `small` in bfloat16 in benchmarks/results/cpu-small-moe.md. It has
# 8,235 prompt tokens/s, and 2.5, 4.7 and 5.4 ms for a step in which 1, 8 and 16 sequences decode.
TABLE_COSTS = Costs(step=2.6, prompt_token=0.121, decode=0.19)


def load_sessions(folder: Path, trace: str, count: int) -> list[Session]:
    """Makes conversations of the first `count` requests of a trace."""
    path = str(folder / f"azure-llm-trace-2023-{trace}.csv.xz")
    workload = Trace(trace=path, sharing="chats", time_scale=TIME_SCALE[trace])
    return workload.sessions(np.random.default_rng(SEED), count, TOKENS)


def sizes_of_small() -> CacheSpec:
    with tempfile.TemporaryDirectory() as folder:
        write_config("small", Path(folder))
        config = load_model_config(Path(folder))
    return CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))


def make_scheduler(spec: CacheSpec, row: Row, memory: int, share: float) -> Scheduler:
    """Makes a scheduler with a cache of `memory` bytes beside the slots of running sequences. The part `share` of it is
    for saved states."""
    page = spec.kv_bytes_per_token * row.block_size
    saved = int(memory * share) // spec.bytes_per_saved_state
    regular = -(-4 * spec.bytes_per_saved_state // page) * row.block_size
    cache = CacheManager(
        SlotStates(1 + MAX_NUM_SEQS + saved),
        num_pages=1 + int(memory * (1 - share)) // page,
        block_size=row.block_size,
        interval=regular if row.regular else (1 << 20) * row.block_size,
        enabled=row.enabled,
        policy=row.policy(saved + MAX_NUM_SEQS),
    )
    return Scheduler(
        cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_mixed_tokens=MAX_BATCHED_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(),
    )


def simulate(sessions: list[Session], spec: CacheSpec, row: Row, memory: int, costs: Costs) -> Summary:
    """Returns the result of a row of the table, with the best of the row's shares."""
    found: list[Summary] = []
    for share in row.shares:
        engine = Simulated(make_scheduler(spec, row, memory, share), costs, first_token=1 << 20)
        found.append(summarize(Replay(sessions).run(engine)))
    return max(found)


def measure_real(flags: argparse.Namespace) -> dict[str, Any]:
    """Replays requests on a real engine with a cache of --real-mib, and again in the simulation."""
    spec, sessions, memory = sizes_of_small(), load_sessions(flags.traces, "conv", flags.real_requests), flags.real_mib
    state_bytes = memory * MIB // 4
    with tempfile.TemporaryDirectory() as folder:
        write_config("small", Path(folder))
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            threads=torch.get_num_threads(),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            kv_cache_memory_bytes=memory * MIB - state_bytes,
            state_cache_memory_bytes=state_bytes,
        )
    info, engine = llm.core.info, Real(llm.core)
    real = summarize(Replay(sessions).run(engine))
    costs = Costs.fit(engine.steps)
    return {
        "requests": flags.real_requests,
        "mib": memory,
        "pages": info.num_kv_blocks,
        "saved_states": info.num_saved_states,
        "steps": len(engine.steps),
        "seconds": sum(seconds for _, seconds in engine.steps),
        "costs": asdict(costs),
        "real": real._asdict(),
        "simulated": simulate(sessions, spec, ROWS[0], memory * MIB, costs)._asdict(),
    }


def measure_table(flags: argparse.Namespace, costs: Costs, rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    spec, found = sizes_of_small(), list[dict[str, Any]]()
    for trace in flags.table_traces.split(","):
        sessions = load_sessions(flags.traces, trace, flags.requests)
        for mib in map(int, flags.sizes.split(",")):
            for row in rows:
                summary = simulate(sessions, spec, row, mib * MIB, costs)
                found.append({"trace": trace, "mib": mib, "policy": row.name, **summary._asdict()})
                sys.stderr.write(f"{found[-1]}\n")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--parts", default="real,table,parts", help="parts to measure: real, table, parts, chats")
    parser.add_argument("--traces", type=Path, help="folder with the traces")
    parser.add_argument("--table-traces", default="conv,code", help="traces of the table")
    parser.add_argument("--requests", type=int, default=1000, help="requests of each trace in the table")
    parser.add_argument("--sizes", default="64,128,256", help="sizes of the cache in MiB")
    parser.add_argument("--real-requests", type=int, default=40, help="requests that the real engine answers")
    parser.add_argument("--real-mib", type=int, default=24, help="size of the real engine's cache in MiB")
    parser.add_argument("--llama-server", type=Path, help="path of llama.cpp's server")
    parser.add_argument("--llama-version", default="not named", help="version of llama.cpp, for the report")
    parser.add_argument("--gguf", type=Path, help="GGUF file for the part chats")
    return parser.parse_args()


def main() -> None:
    flags = parse_arguments()
    path = RESULTS / f"{flags.name}.json"
    report: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    for part in flags.parts.split(","):
        conditions = {"date": utc_now(), "commit": describe_commit(), "versions": describe_versions(("torch", "numpy"))}
        if part == "real":
            found: Any = measure_real(flags)
        elif part == "chats":
            found = chats.measure(flags.gguf, flags.llama_server) | {"llama.cpp version": flags.llama_version}
        else:
            rows = {"table": ROWS, "parts": PARTS}[part]
            found = {"requests": flags.requests, "rows": measure_table(flags, TABLE_COSTS, rows)}
            found["costs"] = asdict(TABLE_COSTS)
        report[part] = found | conditions | {"machine": msgspec.to_builtins(describe_machine())}
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        (RESULTS / f"{flags.name}.md").write_text(to_markdown(flags.name, report))
    sys.stdout.write((RESULTS / f"{flags.name}.md").read_text())


if __name__ == "__main__":
    main()
