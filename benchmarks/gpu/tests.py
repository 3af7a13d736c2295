"""Runs the part `kernels` of the GPU check: pytest runs the kernel tests in all dtypes, and the tests that need a GPU.

The part `sanitizer` runs the tests of a Mamba layer and of the experts under NVIDIA's compute-sanitizer, which finds
accesses outside of tensors and races between the threads of a program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Job, Record

ROOT = Path(__file__).parents[2]
SPARE_CORES = 2  # cores that get no pytest process: one feeds the GPU's driver, one runs the check itself
MOST_WORKERS = 14  # each pytest process holds about half a GiB of the GPU's memory
NO_TESTS = 5  # exit status of pytest if it finds no tests
TEST_SECONDS = 120  # time limit of one test in seconds, if pytest-timeout is installed
SANITIZED_SECONDS = 200  # the same under compute-sanitizer, where kernels run many times slower
KERNELS = "tests/kernels"


def _files(*names: str) -> list[str]:
    return [f"{KERNELS}/test_{name}.py" for name in names]


# The tests are divided into sets that run one after another, so that the results of completed sets are kept if time
# runs out. The sets come in the order of what a failure would mean for a model's results.
NAMED: Mapping[str, Sequence[str]] = {
    "same bits": _files("triton", "exact", "mamba", "recurrence"),
    "products": _files("linear", "torch_ops"),
    "attention": _files("attention"),
    "experts": _files("moe"),
    "recurrence": _files("conv", "scan", "scan_chunked"),
    "sampling": _files("sample", "bitmask", "norm", "slots"),
    "quantised products": _files("quantized", "formats", "triton_formats"),
}
_REST = [KERNELS, "tests/engine/test_triton.py", *(f"--ignore={f}" for files in NAMED.values() for f in files)]
SETS = {
    "cuda": {
        **{f"triton, {name}": [*files, "-k", "triton"] for name, files in NAMED.items()},
        "triton, others": [*_REST, "-k", "triton"],
        "marked cuda": [KERNELS, "tests/engine", "-m", "cuda"],
    },
    "cpu": {"a few": _files("norm")},
}
# compute-sanitizer's tools, and the tests that run under them. These tests launch every kernel of their file; others
# repeat them in other dtypes ("dtype1" is bfloat16) or with other sizes.
TOOLS = ("racecheck", "memcheck")
SANITIZED = {
    "mamba": [*_files("mamba"), "-k", "triton"],
    "experts": [*_files("moe"), "-k", "triton and (dtype1 or zero)"],
    "scan": [
        *_files("scan", "scan_chunked"),
        "-k",
        "triton and dtype1 and (mixed-16 or many-16 or update or 3-dtype1)",
    ],
}
SANITIZER_STATUS = 86  # exit status if the sanitizer has found an error
# The project's own pytest configuration is not used, because it needs plugins that may be missing. The project's
# configuration also turns warnings into errors, but other versions of torch may print other warnings.
CONFIGURATION = "[pytest]\naddopts = -q -rfE\nmarkers = cuda: needs an NVIDIA GPU\n"


def run(job: Job, record: Record) -> None:
    record.start_run(job)
    log = record.path.with_suffix(".log")
    if job.part == "sanitizer":
        for tool in TOOLS:
            for name, arguments in SANITIZED.items():
                record.cell(job.key(tool, name), partial(run_sanitized, tool, arguments, log))
        return
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - SPARE_CORES))
    for name, arguments in SETS[job.device].items():
        record.cell(job.key(name), partial(run_tests, arguments, log, workers=workers))


def run_sanitized(tool: str, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs tests under a tool of compute-sanitizer, in one process. The row passes if the tests pass and the tool finds
    nothing."""
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        return {"left_out": "compute-sanitizer is not installed"}
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(SANITIZER_STATUS)]
    # Without torch's own cache each tensor is an allocation, so that an access after a tensor's end is found.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    prefix = [sanitizer, *options]
    return run_tests(arguments, log, prefix=prefix, environment=environment, test_seconds=SANITIZED_SECONDS)


def run_tests(
    arguments: Sequence[str],
    log: Path,
    *,
    workers: int = 1,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    test_seconds: int = TEST_SECONDS,
) -> dict[str, Any]:
    """Runs pytest and counts passed, failed and skipped tests. The output is appended to the file `log`, so that the
    output is kept if pytest is killed. `prefix` is a program that runs pytest."""
    begin = log.stat().st_size if log.is_file() else 0
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "pytest.ini"
        mode = "asyncio_mode = auto\n" if find_spec("pytest_asyncio") else ""
        configuration.write_text(CONFIGURATION + mode)
        command = [*prefix, sys.executable, "-m", "pytest", "-c", str(configuration), "--rootdir", str(ROOT)]
        command += ["-p", "no:cacheprovider", *arguments]
        if find_spec("xdist") and workers > 1:
            command += ["-n", str(workers)]
        if find_spec("pytest_timeout"):
            command += [f"--timeout={test_seconds}", "--timeout-method=thread"]
        with log.open("a") as output:
            status = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment
            ).returncode
    text = log.read_bytes()[begin:].decode()
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary_of(text))
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    row: dict[str, Any] = {"exit": status, "passed": status in (0, NO_TESTS), "counts": counts, "failed": failed[:50]}
    return row if row["passed"] else row | {"output": text[-4000:]}


def summary_of(text: str) -> str:
    """Returns the line in which pytest counts the tests. A sanitizer prints its own lines after it."""
    counted = re.compile(r"\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+ ?s")
    lines = [line for line in text.strip().splitlines() if counted.search(line)]
    return lines[-1] if lines else ""
