"""A request's way through the modules, counted on the real server and engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_a_chat_request_takes_few_hops() -> None:
    command = [sys.executable, "-m", "tools.hops"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    down, back = re.split(r"^back: ", result.stdout, flags=re.MULTILINE)
    modules = [re.findall(r"^  (?:->|\|\|) (\S+)", way, flags=re.MULTILINE) for way in (down, back)]
    assert modules[0][0] == "server.http.routes.chat"
    assert modules[0][-1].startswith("kernels.")
    assert modules[1][0] == "engine.model_runner"
    assert modules[1][-1].startswith("server.http.")
    for way, most in ((down, 10), (back, 8)):
        count = re.search(r"(\d+) hops", way)
        assert count is not None
        assert int(count[1]) <= most, result.stdout
