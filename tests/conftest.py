"""What every test run needs: packages that are ours, no network, few threads, known signals, and a closing table."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import jamba_server

ROOT = Path(__file__).parent.parent
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the network must fail
for name in [name for name in os.environ if name.startswith("JAMBA_")]:
    del os.environ[name]  # settings of the person who runs the tests are not the tests'


def know_signals() -> None:
    """Sets the signals that tests send as a terminal's foreground has them. A job in the background, or under nohup,
    inherits SIGINT ignored, a supervisor's child some of them blocked; and so would all processes that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture(autouse=True)
def known_signals() -> None:
    """Before every test, so that none of them depends on one that ran before it."""
    know_signals()


def pytest_configure() -> None:
    know_signals()  # for what lives longer than a test
    if not Path(jamba_server.__file__).resolve().is_relative_to(ROOT):
        pytest.exit(
            f"`import jamba_server` finds {jamba_server.__file__}, which is not this checkout: run `make test`.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_collection_finish() -> None:
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much on a machine that is busy


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, float] = defaultdict(float)
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport):
                path = Path(report.location[0])
                folder = str(path.parent if path.parent.name != "tests" else path)
                counts[folder][outcome] += 1
                seconds[folder] += report.duration
    terminalreporter.section("what ran")
    for folder, outcomes in sorted(counts.items()):
        words = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.line(f"{folder:<32} {words} in {seconds[folder]:.1f} s")
