"""Aider: a question about a file, with and without streaming."""

import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, QUESTION, URL, check


def ask(*options):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "main.py").write_text("print('hello')\n")
        (Path(folder) / "models.json").write_text(
            f'{{"openai/{MODEL}": {{"max_input_tokens": 3500, "max_output_tokens": 64, "litellm_provider": "openai"}}}}'
        )
        (Path(folder) / "settings.yml").write_text(
            f"- name: openai/{MODEL}\n  edit_format: ask\n  extra_params: {{max_tokens: 64}}\n"
        )
        command = [
            *(str(Path(sys.executable).parent / "aider"), "--model", f"openai/{MODEL}", "--chat-mode", "ask"),
            *("--openai-api-base", f"{URL}/v1", "--openai-api-key", "none", "--no-git", "--yes-always"),
            *("--map-tokens", "0", "--no-check-update", "--analytics-disable", "--no-show-model-warnings"),
            *("--model-metadata-file", "models.json", "--model-settings-file", "settings.yml", "--no-fancy-input"),
            *(*options, "--message", QUESTION, "main.py"),
        ]
        done = subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-2000:])
        assert "Tokens:" in done.stdout and "Error" not in done.stdout, done.stdout[-500:]


check("chat", lambda: ask("--no-stream"))
check("stream", lambda: ask("--stream"))
