"""What every test run needs: packages that are ours, no network, few threads, known signals, and a closing table."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter, defaultdict
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jamba_server

ROOT = Path(__file__).parent.parent
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed")
FOLDERS = ("server", "engine", "kernels")

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs the network must fail
for name in [name for name in os.environ if name.startswith("JAMBA_")]:
    del os.environ[name]  # settings of the person who runs the tests are not the tests'


class Checkout(FileFinder):
    """The modules at the top of the checkout, as they are where the package is installed: without our folders. Else
    transformers, which looks for Hugging Face's `kernels`, would find and import ours."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname in FOLDERS else super().find_spec(fullname, target)


sys.path_importer_cache[str(ROOT)] = Checkout(str(ROOT), (SourceFileLoader, SOURCE_SUFFIXES))


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


STRAY = pytest.StashKey[set[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Runs in the process that shares the tests among workers (pytest-xdist), when a worker has ended."""
    node.config.stash.setdefault(STRAY, set()).update(getattr(node, "workeroutput", {}).get("stray", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["stray"] = stray_modules()  # a worker tells the process that counts
    elif stray(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def stray(config: pytest.Config) -> list[str]:
    """The stray modules of this process and of all workers."""
    return sorted(config.stash.get(STRAY, set[str]()).union(stray_modules()))


def stray_modules() -> list[str]:
    """Our folders that were imported by a name which is not ours, such as `kernels`: each would be there a second time,
    with classes of its own, and in an installed environment the name may be that of somebody else's package."""
    modules = {name: sys.modules[name] for name in FOLDERS if name in sys.modules}
    return [n for n, m in modules.items() if any(Path(path).resolve() == ROOT / n for path in m.__path__)]


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
    if names := stray(terminalreporter.config):
        terminalreporter.line(f"FAILED: imported past the package jamba_server: {', '.join(names)}", red=True)
