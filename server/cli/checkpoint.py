"""Finds the model to load: a folder, a GGUF file, a hub id that is downloaded, or the demonstration model of this
package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.foreign import names_a_file
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.weight_files import INDEX_FILE
from jamba_server.server.cli.download import download
from jamba_server.server.cli.gguf_choice import split_name
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder

CONFIG_FILES = ("config.json", "generation_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
# The files of a model that a server needs. The index of the weights tells whether the output head is separate from the
# embedding, so it belongs to the configuration.
CONFIG_PATTERNS = (*CONFIG_FILES, INDEX_FILE)
PATTERNS = (*CONFIG_PATTERNS, *TEXT_FILES, *WEIGHT_FILES)
DEMO_NAME = "jamba-demo"
_NAME_SHOWN = 200  # maximum number of characters that an error message quotes from a model's name


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The place and the name of a model. The field `folder` is the path of a local folder or GGUF file. Clients of the
    API use the name unless --served-model-name gives another name. `demo` is true if the model is the demonstration
    model."""

    folder: Path
    name: str
    demo: bool = False


def find_checkpoint(config: ServerConfig, *, config_only: bool = False) -> Checkpoint:
    """Returns the model that `config` names. If the model is a hub id, missing files are downloaded. With `config_only`
    only the configuration files are downloaded, otherwise all files that a server needs. Of a hub id with GGUF files,
    such as `org/name-GGUF:Q4_K_M`, the file with the named quantisation is downloaded.

    Raises CheckpointError with one sentence that says what to do.
    """
    if config.model is None:
        return Checkpoint(demo_folder(), DEMO_NAME, demo=True)
    folder = Path(config.model).expanduser()
    if is_local(folder):
        # Raises errors in config.json at once, before the slow loading of tokenizer and engine.
        load_model_config(folder)
        if config.revision is not None:
            raise CheckpointError(f"--revision {config.revision} is for hub ids, but {config.model} is a local path.")
        return Checkpoint(folder, folder.stem if folder.is_file() else folder.resolve().name)
    hub_id, quantization = split_hub_id(config.model)
    if quantization is not None:
        file = download(hub_id, config.revision, [], quantization)
        load_model_config(file)
        return Checkpoint(file, config.model)
    patterns = [*CONFIG_PATTERNS]
    if not config_only:
        patterns += TEXT_FILES
        patterns += () if config.load_format == "dummy" else WEIGHT_FILES
    folder = download(config.model, config.revision, patterns)
    load_model_config(folder)
    return Checkpoint(folder, config.model)


def split_hub_id(model: str) -> tuple[str, str | None]:
    """Returns the hub id in `model`, and the quantisation that it asks for, as `gguf_choice.split_name` explains.
    Raises CheckpointError if `model` has not the form of a hub id."""
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"There is no folder {model[:_NAME_SHOWN]}, and a hub id has the form ORGANISATION/NAME.")
    return split_name(model)


def refuse_local(model: str, why: str) -> None:
    """Raises CheckpointError if the argument of a command is empty or a local path. `why` ends the sentence that says
    so, because the command needs a model of the hub."""
    if not model.strip():
        raise CheckpointError("MODEL is empty; name a model of the hub, such as ORGANISATION/NAME.")
    if is_local(Path(model).expanduser()):
        raise CheckpointError(f"{model} is a local path{why}")


def is_local(path: Path) -> bool:
    """Returns whether `path` is a local path, which is not looked up on the hub. A local path exists, or its name ends
    like that of a weights file."""
    try:
        return path.exists() or names_a_file(path.name)
    except OSError as error:  # the name is too long for a path, or this process may not read a parent folder
        raise CheckpointError(f"{str(path)[:_NAME_SHOWN]} cannot be read: {error.strerror}.") from error
