"""guidellm: a short benchmark of streamed chats."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, check


def stream():
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).parent / "guidellm"), "benchmark", "run"),
            *("--target", URL, "--model", MODEL, "--processor", os.environ["TOKENIZER"]),
            *("--profile", "synchronous", "--max-requests", "3", "--data", "prompt_tokens=32,output_tokens=16"),
            *("--output-dir", folder, "--outputs", "json"),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        [report] = Path(folder).glob("*.json")
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        assert totals["successful"] == 3 and not totals["errored"], totals


check("stream", stream)
