"""Prepares every test run: the imported packages are this checkout's, the network is off, torch has one thread, signals
have their usual handlers, and a table of all outcomes ends the run."""

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

# A test that needs the network must fail. huggingface_hub reads this variable when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("JAMBA_")]:
    del os.environ[name]  # the options of the person who runs the tests must not change them


class Checkout(FileFinder):
    """Finds the modules at the top of the checkout, but not this project's folders, as where the package is installed.
    Otherwise transformers, which looks for Hugging Face's package `kernels`, would import the folder of that name."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname in FOLDERS else super().find_spec(fullname, target)


sys.path_importer_cache[str(ROOT)] = Checkout(str(ROOT), (SourceFileLoader, SOURCE_SUFFIXES))


def know_signals() -> None:
    """Gives the signals that tests send the handlers that a command in a terminal has. A job in the background, or
    under nohup, ignores SIGINT, and a supervisor may have blocked some signals. All processes that tests start would
    inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture(autouse=True)
def known_signals() -> None:
    """Sets the signals before every test, so that no test depends on one that ran before it."""
    know_signals()


def pytest_configure() -> None:
    know_signals()  # for processes and threads that live longer than a test
    if not Path(jamba_server.__file__).resolve().is_relative_to(ROOT):
        pytest.exit(
            f"`import jamba_server` finds {jamba_server.__file__}, which is not this checkout: run `make test`.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_collection_finish() -> None:
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # more threads do not help with tiny tensors, and are slow on a busy machine


STRAY = pytest.StashKey[set[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Runs in the process that shares the tests among workers (pytest-xdist), when a worker has ended."""
    node.config.stash.setdefault(STRAY, set()).update(getattr(node, "workeroutput", {}).get("stray", ()))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["stray"] = stray_modules()  # a worker of pytest-xdist reports its stray modules to the main process
    elif stray(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def stray(config: pytest.Config) -> list[str]:
    """Returns the stray modules of this process and of all workers."""
    return sorted(config.stash.get(STRAY, set[str]()).union(stray_modules()))


def stray_modules() -> list[str]:
    """Returns the folders of this project that were imported outside of the package `jamba_server`, such as `kernels`.
    Such a module would exist twice, with different classes. Where the package is installed, another package may have
    this name."""
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
