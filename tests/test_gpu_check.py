"""`benchmarks.gpu.check` at a tiny shape on a CPU: a mistake in it would cost a rented GPU's time."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.gpu import (
    check,
    engine,
    parity,
    peer_transformers,
    serving,
    sweep,
)
from benchmarks.gpu.predict import Ceilings, decode_work, prefill_work
from benchmarks.gpu.record import Job, Record
from benchmarks.gpu.report import failures, markdown, read_parts
from benchmarks.gpu.tests import run_tests
from benchmarks.shapes import Format, write_config
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.quantization import FORMATS

CEILINGS = Ceilings(bandwidth=1e10, matmul=1e11)


def config(shape: str, folder: Path) -> JambaConfig:
    write_config(shape, folder)
    return load_model_config(folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "x-parts").mkdir()
    return tmp_path


def run_part(part: str, out: Path, monkeypatch: pytest.MonkeyPatch, **job: Any) -> Record:
    """In this process, with given ceilings."""
    module = importlib.import_module(f"benchmarks.gpu.{check.MODULES[part]}")
    if hasattr(module, "measure_ceilings"):
        monkeypatch.setattr(module, "measure_ceilings", lambda device: CEILINGS)
    path = out / "x-parts" / f"{part}.json"
    module.run(Job(part=part, path=str(path), device="cpu", **job), Record(path))
    record = Record(path)
    assert record.running is None
    assert [row["error"] for row in record.rows.values() if "error" in row] == []
    return record


# Predictions ------------------------------------------------------------------------------------------------------


def test_the_mini_shape_is_the_published_one(tmp_path: Path) -> None:
    assert config("mini", tmp_path).num_parameters() == 51_570_323_328


def test_a_decode_step_moves_weights_states_and_keys(tmp_path: Path) -> None:
    dense, plain = config("3b", tmp_path), Format.parse("bf16").policy
    parameters, state, kv = 3_029_337_472, 9_318_400, 1024  # the model's, a sequence's, a token's; bytes
    for sequences in (1, 256):
        work = decode_work(dense, plain, sequences=sequences, context=1000)
        moved = 2 * parameters + sequences * (2 * state + 1000 * kv)
        assert work.bytes == pytest.approx(moved, rel=2e-3)  # a few numbers are float32
        assert work.operations == pytest.approx(2 * sequences * parameters, rel=1e-2)
    assert work.seconds(Ceilings(1e9, 1e30)) == work.bytes / 1e9
    assert work.seconds(Ceilings(1e30, 1e9)) == work.operations / 1e9
    assert (work.bound(Ceilings(1e9, 1e30)), work.bound(Ceilings(1e30, 1e9))) == ("bandwidth", "matmul rate")


def test_one_token_reads_two_experts_of_a_layer(tmp_path: Path) -> None:
    mini, plain = config("mini", tmp_path), Format.parse("bf16").policy
    work = decode_work(mini, plain, sequences=1, context=0)
    embedding, active = 65536 * 4096, 12_110_311_296
    assert work.bytes == pytest.approx(2 * (active - embedding) + 2 * 16_056_320, rel=2e-3)
    # the matmul rate of an H100 is reached by a prompt, its bandwidth by a decode step
    ceilings = Ceilings(3e12, 8e14)
    assert work.bound(ceilings) == "bandwidth"
    prompt = prefill_work(mini, plain, tokens=32768, chunk=8192)
    assert prompt.bound(ceilings) == "matmul rate"
    attention = 4 * 4 * 4096 * 32768**2 / 2  # scores and values, four layers, the causal half
    assert prompt.operations == pytest.approx(2 * 32768 * (active - 2 * embedding) + attention, rel=1e-3)


# Parts ------------------------------------------------------------------------------------------------------------


def test_the_engine_is_measured_and_not_measured_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DECODE_SECONDS", 0.01)
    record = run_part("mini", out, monkeypatch, shape="tiny", format="int8", options={"enable_prefix_caching": True})
    decode = record.rows["tiny, int8, enable_prefix_caching=true, decode, 2"]
    assert decode["predicted"] > 0 and decode["tok_s"] > 0 and decode["bound"] == "bandwidth"
    assert {row.get("kind") for row in record.rows.values()} == {None, "decode", "prefill", "one request"}
    assert record.rows["tiny, int8, enable_prefix_caching=true, profile, prefill, 32"]["longest"]
    assert record.runs[0]["engine"]["quantization"] == "int8"
    again = run_part("mini", out, monkeypatch, shape="tiny", format="int8", options={"enable_prefix_caching": True})
    assert (again.rows, again.runs) == (record.rows, record.runs)
    cold = run_part("mini", out, monkeypatch, shape="tiny", cold=True)
    assert "tiny, bf16, first reply, nothing compiled before" in cold.rows


def test_the_server_is_measured(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "OUTPUT_LEN", 4)
    monkeypatch.setattr(serving, "CLIENTS", {"tiny": (2,)})
    options = {"enable_prefix_caching": False, "max_num_batched_tokens": 64}
    record = run_part("http", out, monkeypatch, shape="tiny", options=options)
    row = next(row for row in record.rows.values() if row.get("kind") == "http")
    assert row["completed"] == row["planned"] == 8
    assert any("64" in line for line in record.runs[0]["server"]), "the option has come to the server"


def test_transformers_agrees_and_is_measured(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LENGTHS", (1, 20))
    monkeypatch.setattr(peer_transformers, "SIZES", {"tiny": engine.Sizes(sequences=(2,), prompts=(8,))})
    for name in ("WARM_UP", "STEPS"):
        monkeypatch.setattr(peer_transformers, name, 1)
    measured = run_part("parity", out, monkeypatch)
    assert [row["passed"] for row in measured.rows.values()] == [True, True, True]
    assert "experts, float32, without graphs" in measured.rows
    peer = run_part("transformers", out, monkeypatch, shape="tiny")
    assert {row["kind"] for row in peer.rows.values()} == {"decode", "prefill"}
    text = markdown("x", read_parts("x", [out]), sweep=True)
    assert "| transformers, experts, float32 |" in text


def test_kernels_are_compared_and_timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "groups", lambda maker: [maker.experts(3), maker.recurrence(2, 1)])
    monkeypatch.setattr(sweep, "median_seconds", lambda work, device: work() is None or 1e-6)
    record = run_part("sweep", out, monkeypatch, shape="tiny")
    assert {row["op"] for row in record.rows.values()} >= {"run_experts", "mamba_decode"}
    assert failures(read_parts("x", [out])) == []
    assert markdown("x", read_parts("x", [out]), sweep=True).count("| tiny | run_experts |") == 1 + len(FORMATS)


def test_what_pytest_says_is_counted(tmp_path: Path) -> None:
    tests = tmp_path / "test_x.py"
    tests.write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    row = run_tests([str(tests), "--confcutdir", str(tmp_path)], tmp_path / "log")
    assert (row["passed"], row["counts"]) == (False, {"passed": 1, "failed": 1})
    assert [name.split("::")[1].split()[0] for name in row["failed"]] == ["test_b"]


# The command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_and_reports(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["gpu_check", "--name", "x", "--device", "cpu", "--out", str(out), "--earlier", str(out)]
    measured = [*arguments, "--only", "kernels", "--minutes", "2", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", measured)
    check.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--report"])
    check.main()
    assert set(json.loads((out / "x.json").read_text())) == {"kernels"}
    assert "commit abc" in (out / "x.md").read_text()


def supervised(out: Path, monkeypatch: pytest.MonkeyPatch, ends: list[tuple[int | None, bool]]) -> Record:
    """A job whose processes measure one cell each, begin another if so told, and end with a status."""
    path = out / "x-parts" / "3b.json"
    left = iter(ends)

    def run_process(job: Job, deadline: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
        status, begun = next(left)
        record = Record(path)
        record.start_run(job)
        record.finish(f"cell {len(record.rows)}", {"load_seconds": 1})
        record.running = "another" if begun else None
        record.write()
        return status, "Segmentation fault"

    monkeypatch.setattr(check, "run_process", run_process)
    check.supervise(Job(part="3b", path=str(path), device="cpu"), check.time.monotonic() + 100, {})
    assert list(left) == []
    return Record(path)


def test_a_process_that_dies_costs_one_cell(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = supervised(out, monkeypatch, [(-11, True), (0, False)])
    assert [key for key, row in record.rows.items() if "error" in row] == ["another"]
    assert "status -11: Segmentation fault" in record.rows["another"]["error"]
    assert len(failures(read_parts("x", [out]))) == 1
    record.forget_errors()
    assert "another" not in Record(record.path).rows, "it is tried again"


def test_when_time_is_up_nothing_is_lost(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = supervised(out, monkeypatch, [(None, True)])
    assert (list(record.rows), record.running) == (["cell 0"], None)
    assert "time was up after 1 cells" in markdown("x", read_parts("x", [out]), sweep=False)
    assert failures(read_parts("x", [out])) == []


def test_what_fails_before_its_first_cell_is_reported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "run_process", lambda *args: (1, "ModuleNotFoundError: transformers"))
    job = Job(part="transformers", path=str(out / "x-parts" / "transformers.json"), device="cpu", shape="tiny")
    check.supervise(job, check.time.monotonic() + 100, {})
    assert failures(read_parts("x", [out])) == [
        "transformers: tiny, bf16, start: the process ended with status 1: ModuleNotFoundError: transformers"
    ]


def test_a_process_that_gets_nowhere_is_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CELL_SECONDS", 0.05)
    monkeypatch.setattr(check, "POLL_SECONDS", 0.02)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    status, why = check.watch(process, out / "none.json", check.time.monotonic() + 50)
    assert (status, process.returncode) == (-signal.SIGKILL, -signal.SIGTERM)
    assert "finished no cell" in why


def test_what_a_dead_process_has_left_behind_is_ended() -> None:
    """A server in a session of its own."""
    ours, other = (
        subprocess.Popen(["sleep", "60"], start_new_session=True, env={check.MARK: name}) for name in ("a", "ab")
    )
    try:
        check.kill_marked(f"{check.MARK}=a")
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_cache_of_kernels_is_kept_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(part="3b", path="", device="cpu", cold=True)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert check.environment_of("fresh", job)["TRITON_CACHE_DIR"] == "fresh"
    warm = msgspec.structs.replace(job, cold=False)
    monkeypatch.setattr("os.access", lambda path, mode: True)
    assert "TRITON_CACHE_DIR" not in check.environment_of("", warm)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert Path(check.environment_of("", warm)["TRITON_CACHE_DIR"]).is_absolute()
    monkeypatch.setenv("TRITON_CACHE_DIR", "given")
    assert check.environment_of("", warm)["TRITON_CACHE_DIR"] == "given"


def test_a_process_is_stopped_when_time_is_up(out: Path) -> None:
    job = Job(part="mini", path=str(out / "x-parts" / "mini.json"), device="cpu", shape="tiny")
    status, _ = check.run_process(job, check.time.monotonic(), {"PATH": ""})
    assert status is None


def test_options_reach_the_engine_or_are_refused() -> None:
    pairs = ["enable-prefix-caching=false", "enable_priority=true", "max_num_seqs=9", "model=a b"]
    parsed = check.parse_options([*pairs, 'kernels={"moe": "reference", "sample": "cpu"}'])
    kernels = parsed.pop("kernels")
    assert parsed == {"enable_prefix_caching": False, "enable_priority": True, "max_num_seqs": 9, "model": "a b"}
    flags = ["--no-enable-prefix-caching", "--enable-priority", "--max-num-seqs", "9", "--model", "a b"]
    assert serving.flags(parsed) == flags
    assert serving.flags({"kernels": kernels}) == ["--kernels", "moe=reference", "--kernels", "sample=cpu"]
    with pytest.raises(SystemExit, match="KEY=VALUE"):
        check.parse_options(["seed"])
    with pytest.raises(SystemExit, match="no such field"):
        check.parse_options(["seed=1", "no_such_field=1"])
    with pytest.raises(SystemExit, match="flags of their own"):
        check.parse_options(["quantization=int8"])


def test_each_part_has_its_jobs(tmp_path: Path) -> None:
    arguments = check.parse_arguments(["--name", "x", "--engine", "seed=1"])
    jobs = {part: check.make_jobs(part, arguments, tmp_path) for part in check.MODULES}
    names = {part: [(job.shape, job.format, job.cold) for job in found] for part, found in jobs.items()}
    assert names["3b"] == [("3b", "bf16", True), ("3b", "bf16", False), ("3b", "bf16", False)]
    assert [job.options["batch_invariant"] for job in jobs["3b"]] == [False, False, True]
    assert names["mini"] == [("mini", name, False) for name in ("int8", "int8", "bf16", "bf16")]
    assert [job.options for job in jobs["http"]] == [{"seed": 1, "batch_invariant": False}]
    assert [job.options for job in jobs["transformers"]] == [{}, {}]
    chosen = check.parse_arguments(["--name", "x", "--engine", "batch_invariant=true"])
    assert [job.options for job in check.make_jobs("3b", chosen, tmp_path)] == [{"batch_invariant": True}] * 2
    given = check.parse_arguments(["--name", "x", "--formats", "int4", "--shape", "tiny"])
    assert [(job.shape, job.format) for job in check.make_jobs("http", given, tmp_path)] == [("tiny", "int4")]
