"""The process of `jamba convert`: `python -m jamba_server.engine.convert SOURCE TARGET FORMAT`.

The command runs in a process of its own because the conversion needs torch. An error is written to standard error in
one sentence, and the exit status is then 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jamba_server.engine.convert.metadata import FILE_TYPES
from jamba_server.engine.convert.to_folder import convert_to_folder
from jamba_server.engine.convert.to_gguf import convert_to_gguf
from jamba_server.engine.errors import JambaError


def main(source: Path, target: Path, form: str) -> None:
    """Converts the checkpoint `source`. `form` is the name of a type of a GGUF file, or of a weight format."""
    if form in FILE_TYPES:
        convert_to_gguf(source, target, form)
    else:
        convert_to_folder(source, target, form)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except (JambaError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
