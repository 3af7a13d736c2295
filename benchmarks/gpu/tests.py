"""Runs the part `kernels` of the GPU check: pytest runs the kernel tests in all dtypes, and the tests that need a
GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Job, Record

ROOT = Path(__file__).parents[2]
WORKERS = 8  # number of pytest processes that run at the same time on the same GPU
NO_TESTS = 5  # exit status of pytest if it finds no tests
TEST_SECONDS = 120  # time limit of one test in seconds, if pytest-timeout is installed
KERNELS = "tests/kernels"
PRODUCTS = [f"{KERNELS}/test_{name}.py" for name in ("linear", "moe", "quantized")]
RECURRENCE = [f"{KERNELS}/test_{name}.py" for name in ("conv", "scan", "scan_chunked", "recurrence", "mamba")]
OTHERS = [KERNELS, "tests/engine/test_triton.py", *(f"--ignore={path}" for path in (*PRODUCTS, *RECURRENCE))]
# The tests are divided into sets that run one after another, so that the results of completed sets are kept if time
# runs out.
SETS = {
    "cuda": {
        "triton, products": [*PRODUCTS, "-k", "triton"],
        "triton, recurrence": [*RECURRENCE, "-k", "triton"],
        "triton, others": [*OTHERS, "-k", "triton"],
        "marked cuda": [KERNELS, "tests/engine", "-m", "cuda"],
    },
    "cpu": {"a few": [f"{KERNELS}/test_norm.py"]},
}
# The project's own pytest configuration is not used, because it needs plugins that may be missing. The project's
# configuration also turns warnings into errors, but other versions of torch may print other warnings.
CONFIGURATION = "[pytest]\naddopts = -q -rfE\nmarkers = cuda: needs an NVIDIA GPU\n"


def run(job: Job, record: Record) -> None:
    record.start_run(job)
    for name, arguments in SETS[job.device].items():
        record.cell(job.key(name), partial(run_tests, arguments, record.path.with_suffix(".log")))


def run_tests(arguments: list[str], log: Path) -> dict[str, Any]:
    """Runs pytest and counts passed, failed and skipped tests. The output is appended to the file `log`, so that the
    output is kept if pytest is killed."""
    begin = log.stat().st_size if log.is_file() else 0
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "pytest.ini"
        mode = "asyncio_mode = auto\n" if find_spec("pytest_asyncio") else ""
        configuration.write_text(CONFIGURATION + mode)
        command = [sys.executable, "-m", "pytest", "-c", str(configuration), "--rootdir", str(ROOT)]
        command += ["-p", "no:cacheprovider", *arguments]
        if find_spec("xdist"):
            command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
        if find_spec("pytest_timeout"):
            command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
        with log.open("a") as output:
            status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_bytes()[begin:].decode()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last_line(text))}
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    row: dict[str, Any] = {"exit": status, "passed": status in (0, NO_TESTS), "counts": counts, "failed": failed[:50]}
    return row if row["passed"] else row | {"output": text[-4000:]}


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""
