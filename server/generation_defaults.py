"""The class `GenerationDefaults` reads the default values of sampling parameters from a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from jamba_server.engine.checkpoint import open_checkpoint, read_object
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.validation import RANGES


def _within(field: str) -> Meta:
    """Returns the allowed range of the sampling parameter `field` as a constraint for msgspec."""
    low, high, is_open = RANGES[field]
    return Meta(gt=low, le=high) if is_open else Meta(ge=low, le=high)


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The default values of sampling parameters, for requests that do not give them. The fields are named as in
    generation_config.json.

    The model's generation_config.json gives them; a parameter that it lacks has OpenAI's default. As in vLLM,
    `do_sample` has no effect: every request samples with its own temperature.
    """

    temperature: Annotated[float, _within("temperature")] = 1.0
    top_p: Annotated[float, _within("top_p")] = 1.0
    top_k: Annotated[int, _within("top_k")] = 0
    min_p: Annotated[float, _within("min_p")] = 0.0
    repetition_penalty: Annotated[float, _within("repetition_penalty")] = 1.0

    @classmethod
    def of(cls, folder: Path) -> GenerationDefaults:
        """Reads the sampling defaults of the model in `folder`. Raises CheckpointError with the file, the key and the
        allowed range."""
        checkpoint, name = open_checkpoint(folder), "generation_config.json"
        path = checkpoint.where(name)
        values = {k: v for k, v in (read_object(checkpoint, name) or {}).items() if v is not None}
        if values.get("top_k") == -1:  # some models write -1 for "all tokens"; this server writes 0 instead
            del values["top_k"]
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path}: {error}.") from error

    def non_defaults(self) -> dict[str, float]:
        """Returns the model's sampling defaults that differ from the defaults of OpenAI's API, by name."""
        plain = GenerationDefaults()
        return {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) != getattr(plain, n)}
