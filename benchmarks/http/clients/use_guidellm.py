"""Tries guidellm, a load generator: runs a short benchmark of streamed chats."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, check


def stream():
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={URL},model={MODEL}", "--profile", "kind=synchronous"),
            *("--constraint", "kind=max_requests,count=3"),
            *("--tokenizer", f"kind=huggingface_auto,model={os.environ['TOKENIZER']}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--output", f"kind=json,path={report}"),
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        assert totals["successful"] == 3 and not totals["errored"], totals


check("stream", stream)
