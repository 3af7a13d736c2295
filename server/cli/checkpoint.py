"""Finds the model to load: a folder, a hub id that is downloaded, or the demonstration model of this package."""

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
_NAME_SHOWN = 200  # maximum number of characters that an error message quotes from a model's name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The local folder and the name of a model. Clients of the API use this name unless --served-model-name gives
    another. `demo` is true if the model is the demonstration model."""

    folder: Path
    name: str
    demo: bool = False


def find_checkpoint(config: ServerConfig, *, config_only: bool = False) -> Checkpoint:
    """Returns the model that `config` names. If the model is a hub id, its missing files are downloaded: all files that
    a server needs, or only the configuration files if `config_only` is true.

    Raises CheckpointError with one sentence that says what to do.
    """
    if config.model is None:
        return Checkpoint(demo_folder(), DEMO_NAME, demo=True)
    folder = Path(config.model).expanduser()
    if is_local(folder):
        load_model_config(folder)  # errors in config.json are raised before the tokenizer and the engine load
        if config.revision is not None:
            raise CheckpointError(f"--revision {config.revision} is for hub ids, but {config.model} is a folder.")
        return Checkpoint(folder, folder.resolve().name)
    if config.model.startswith((".", "/", "~")) or config.model.count("/") != 1:
        raise CheckpointError(f"There is no folder {config.model}, and a hub id has the form ORGANISATION/NAME.")
    patterns = [
        *CONFIG_FILES,
        INDEX_FILE,
    ]  # the index of the weights tells whether the model has an output head besides the embedding
    if not config_only:
        patterns += TEXT_FILES
        patterns += () if config.load_format == "dummy" else WEIGHT_FILES
    folder = download(config.model, config.revision, patterns)
    load_model_config(folder)
    return Checkpoint(folder, config.model)


def is_local(path: Path) -> bool:
    """Returns whether `path` exists or ends like the name of a weights file. Such a path is not looked up on the
    hub."""
    try:
        return path.exists() or names_a_file(path.name)
    except OSError as error:  # the name is too long for a path, or this process may not read a parent folder
        raise CheckpointError(f"{str(path)[:_NAME_SHOWN]} cannot be read: {error.strerror}.") from error
