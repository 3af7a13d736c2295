"""Tries Aider, a coding assistant: asks a question about a file, with and without streaming."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, QUESTION, URL, check

# Aider reads from files what limits a model has and which extra fields its requests have. These dictionaries are the
# contents of the files.
LIMITS = {f"openai/{MODEL}": {"max_input_tokens": 3500, "max_output_tokens": 500, "litellm_provider": "openai"}}
SETTINGS = f"""
- name: openai/{MODEL}
  edit_format: ask
  extra_params: {{max_tokens: 200, stop: ["."]}}
"""


def ask(option):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text("print('hello')\n")
        (folder / "limits.json").write_text(json.dumps(LIMITS))
        (folder / "settings.yml").write_text(SETTINGS)
        command = [
            *(str(Path(sys.executable).parent / "aider"), "--model", f"openai/{MODEL}", "--chat-mode", "ask"),
            *("--openai-api-base", f"{URL}/v1", "--openai-api-key", "none", "--no-git", "--yes-always"),
            *("--map-tokens", "0", "--no-check-update", "--analytics-disable", "--no-show-model-warnings"),
            *("--model-metadata-file", "limits.json", "--model-settings-file", "settings.yml", "--no-fancy-input"),
            *(option, "--message", QUESTION, "main.py"),
        ]
        done = subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert "Tokens:" in done.stdout and "Error" not in done.stdout, done.stdout[-500:]


check("chat", lambda: ask("--no-stream"))
check("stream", lambda: ask("--stream"))
