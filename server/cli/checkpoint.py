"""Where the model is: the demonstration checkpoint, a folder, or a hub id that is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.foreign import names_a_file
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.start.contents import INDEX_FILE
from jamba_server.server.cli.download import download
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder

CONFIG_FILES = ("config.json", "generation_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
DEMO_NAME = "jamba-demo"
_NAME_SHOWN = 200  # characters of a name that may be too long


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
    if is_local(folder):
        load_model_config(folder)  # says what is wrong before a tokenizer or an engine is loaded
        if config.revision is not None:
            raise CheckpointError(f"--revision {config.revision} is for hub ids, and {config.model} is a folder.")
        return Checkpoint(folder, folder.resolve().name)
    if config.model.startswith((".", "/", "~")) or config.model.count("/") != 1:
        raise CheckpointError(f"There is no folder {config.model}, and a hub id has the form ORGANISATION/NAME.")
    patterns = [*CONFIG_FILES, INDEX_FILE]  # the index says whether there is a head beside the embedding
    if not config_only:
        patterns += TEXT_FILES
        patterns += () if config.load_format == "dummy" else WEIGHT_FILES
    folder = download(config.model, config.revision, patterns)
    load_model_config(folder)
    return Checkpoint(folder, config.model)


def is_local(path: Path) -> bool:
    """Whether a name means something here, or could mean nothing on a hub."""
    try:
        return path.exists() or names_a_file(path.name)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise CheckpointError(f"{str(path)[:_NAME_SHOWN]} cannot be read: {error.strerror}.") from error
