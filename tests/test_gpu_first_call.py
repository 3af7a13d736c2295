"""What the first minutes on a rented machine with a GPU need: packages, a probe, an order, and programs that may be
missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks.gpu import check, counters, probe, tests, tune, wheels
from benchmarks.gpu.record import Job, Record
from benchmarks.gpu.report import markdown, read_parts


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "x-parts").mkdir()
    return tmp_path


def test_the_first_call_begins_with_the_probe_and_the_comparison() -> None:
    assert check.parse_arguments(["--name", "x", "--call", "first"]).only == "probe,parity,3b,kernels"
    assert {part for parts in check.CALLS.values() for part in parts} == set(check.MODULES)
    for parts in check.CALLS.values():
        # what has no limit of its own comes last, and what has one leaves it some time
        limits = [check.LIMITS.get(part) for part in parts]
        assert None not in limits[:-1] or parts == check.CALLS["rest"]
        assert sum(limit or 0 for limit in limits) < 60 * check.MINUTES


@pytest.mark.parametrize("module", ["probe", "check --name x --call first"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so(module: str) -> None:
    command = [sys.executable, "-m", *f"benchmarks.gpu.{module}".split()]
    done = subprocess.run(command, cwd=check.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"No GPU: torch {torch.__version__} sees no NVIDIA GPU.")
    assert done.stderr.count("\n") == 1


ONLY = """
import importlib.metadata, re, sys
from benchmarks.gpu.wheels import EXPECTED, MISSING
from packaging.requirements import Requirement
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
owners = importlib.metadata.packages_distributions()
allowed, more = set(), ["jamba-server", "packaging", *MISSING, *(owner for name in EXPECTED for owner in owners[name])]
needs = {plain(name) for name in ("jamba-server", *MISSING)}  # what they need must be gathered or expected itself
while more:
    name = plain(more.pop())
    if name in allowed:
        continue
    allowed.add(name)
    if name not in needs:
        lines = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        more += [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if path is None and name in owners and not allowed.intersection(map(plain, owners[name])):
            raise ModuleNotFoundError(f"{name} is neither gathered nor expected", name=name)
sys.meta_path.insert(0, Refuse())
"""
PROBED = "from benchmarks.gpu.probe import imports; print(imports()['missing'])"
SERVED = """
import jamba_server.server.http.app, jamba_server.server.cli.application, jamba_server.server.cli.server
import jamba_server.server.http.connections.server, tests.engine.test_triton, tests.kernels.test_mamba
"""


def test_the_gathered_wheels_are_all_that_is_missing() -> None:
    """In an interpreter that has no other package than those and what torch's machine has."""
    done = subprocess.run(
        [sys.executable, "-c", ONLY + PROBED + SERVED], cwd=check.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "{}"), done.stderr[-1000:]


def test_an_import_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "EXPECTED", ("json", "no_such_package"))
    monkeypatch.setattr(probe, "OWN", ())
    assert probe.imports() == {
        "passed": False,
        "missing": {"no_such_package": "ModuleNotFoundError: No module named 'no_such_package'"},
    }


def test_wheels_are_those_of_another_python(tmp_path: Path) -> None:
    command = wheels.command(tmp_path, "3.12")
    assert command[command.index("--python-version") + 1] == "3.12"
    assert {"--no-deps", "--only-binary=:all:", "manylinux_2_28_x86_64"} <= set(command)
    assert f"msgspec=={msgspec.__version__}" in command
    names = {name: f"{name.replace('-', '_')}-1.0-py3-none-any.whl" for name in wheels.MISSING}
    for name in list(names)[1:]:
        (tmp_path / names[name]).write_bytes(b"x" * 2000)
    with pytest.raises(SystemExit, match="has no wheel of msgspec"):
        wheels.table(tmp_path)
    (tmp_path / names["msgspec"]).write_bytes(b"")
    assert wheels.table(tmp_path).endswith(f"      {2 * (len(names) - 1)} kB  {len(names)} wheels")
    (tmp_path / "msgspec-2.0-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(SystemExit, match="of which one must go: msgspec-1"):
        wheels.table(tmp_path)


def test_a_part_makes_room_for_the_next(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: dict[str, float] = {}
    now = check.time.monotonic()
    monkeypatch.setattr(check.time, "monotonic", lambda: now)
    monkeypatch.setattr(check, "supervise", lambda job, deadline, environment: ends.update({job.part: deadline - now}))
    check.measure(check.parse_arguments(["--name", "x", "--call", "first", "--out", str(out), "--minutes", "3"]))
    assert ends == {"probe": check.LIMITS["probe"], "parity": check.LIMITS["parity"], "3b": 180, "kernels": 180}


def test_counters_are_read_from_the_profilers_table(tmp_path: Path) -> None:
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","x"\n'
        '"","","us","%",""\n'
        '"0","linear_kernel, (1)","12.5","81","7"\n'
        "==PROF== Disconnected\n"
    )
    name = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
    kernel = {"kernel": "linear_kernel, (1)", "gpu__time_duration.sum": "12.5 us", name: "81 %"}
    assert counters.parsed(text) == [kernel]
    with pytest.raises(RuntimeError, match="ncu printed no table: ERR_NVGPUCTRPERM"):
        counters.parsed("ERR_NVGPUCTRPERM")
    counters.call_once("tiny", "cpu")
    path = tmp_path / "x-parts" / "counters.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"rows": {"in_proj": {"kernels": [kernel], "run": 0}}, "runs": []}))
    assert "| in_proj | linear_kernel, (1) |" in markdown("x", read_parts("x", [tmp_path]), sweep=True)


def test_every_counted_call_can_be_made() -> None:
    for call in counters.CALLS.values():
        shape = counters.Shape.of(call.shape, counters.config_of(call.shape))
        assert call.make(counters.Maker(shape, torch.device("meta"))).operations >= 0


def test_without_its_program_a_measurement_is_left_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert counters.counted("tiny", out / "log") == {"left_out": "ncu is not installed"}
    path = out / "x-parts" / "sanitizer.json"
    tests.run(Job(part="sanitizer", path=str(path), device="cuda"), Record(path))
    record = Record(path)
    assert {row["left_out"] for row in record.rows.values()} == {"compute-sanitizer is not installed"}
    assert "- sanitizer: racecheck, mamba: compute-sanitizer is not installed" in markdown(
        "x", read_parts("x", [out]), sweep=False
    )


def test_a_sanitizers_own_lines_do_not_hide_the_counts() -> None:
    assert tests.summary_of("...\n3 passed, 1 skipped in 1 s\n===== ERROR SUMMARY: 0 errors") == (
        "3 passed, 1 skipped in 1 s"
    )


def test_what_is_tuned_first_are_products_and_int8_experts() -> None:
    labels = tune.targets_of("mini", "meta").labels()
    first = [label for label in labels if tune.FIRST.search(label)]
    assert {"in_proj, 1 rows", "out_proj, 8192 rows", "experts, int8, 8 rows", "lm_head, 64 rows"} <= set(first)
    assert not [label for label in first if "int4" in label or "fp8" in label or "scan" in label]
    assert len(first) < len(labels) / 2
