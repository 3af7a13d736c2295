"""Where the model is: the demonstration checkpoint, a folder, or a hub id that is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli.download import download
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder

CONFIG_FILES = ("config.json", "generation_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
DEMO_NAME = "jamba-demo"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A local folder and the name by which the model is served unless another is asked for."""

    folder: Path
    name: str
    demo: bool = False


def find_checkpoint(config: ServerConfig, *, config_only: bool = False) -> Checkpoint:
    """Downloads what is missing of a hub id: all that a server needs, or only the configuration.

    Raises CheckpointError with one sentence that says what to do.
    """
    if config.model is None:
        return Checkpoint(demo_folder(), DEMO_NAME, demo=True)
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if config.revision is not None:
            raise CheckpointError(f"--revision {config.revision} is for hub ids, and {config.model} is a folder.")
        return Checkpoint(folder, folder.resolve().name)
    if config.model.startswith((".", "/", "~")) or config.model.count("/") != 1:
        raise CheckpointError(f"There is no folder {config.model}, and a hub id has the form ORGANISATION/NAME.")
    patterns = [*CONFIG_FILES]
    if not config_only:
        patterns += TEXT_FILES
        patterns += () if config.load_format == "dummy" else WEIGHT_FILES
    return Checkpoint(download(config.model, config.revision, patterns), config.model)
