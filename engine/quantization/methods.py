"""Recognises checkpoints that other tools have quantised by methods that this server does not read, and tells the user
how to proceed. Weights that are not quantised in the checkpoint can be quantised by this server itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from jamba_server.engine.config import Quantization
from jamba_server.engine.errors import CheckpointError, shown

COMPRESSED_TENSORS: Final = "compressed-tensors"
READ: Final = "compressed-tensors, gptq, awq, bitsandbytes and the format of mlx-lm"
OWN: Final = "jamba-server"  # the method of folders that `jamba convert` writes
# With these methods, vLLM quantises the weights when it loads a checkpoint. The weights in the files are therefore not
# quantised.
MADE_AT_LOAD: Final[frozenset[str]] = frozenset({"experts_int8"})
# Maps the setting `quant_method` of a checkpoint to (name of the quantisation method, format). The format is the value
# of --quantization that an error message recommends, because its number of bits per weight is closest to that of the
# method. The format is None if the method allows several numbers of bits.
_METHODS: Final[Mapping[str, tuple[str, Quantization | None]]] = {
    "aqlm": ("AQLM", "int4"),
    "auto-round": ("AutoRound", "int4"),
    "awq": ("AWQ", "int4"),
    "bitnet": ("BitNet", "int4"),
    "bitsandbytes": ("bitsandbytes", None),
    "eetq": ("EETQ", "int8"),
    "exl2": ("ExLlamaV2", "int4"),
    "exl3": ("ExLlamaV3", "int4"),
    "fbgemm_fp8": ("FBGEMM", "fp8"),
    "fp8": ("fp8 with scales of blocks or whole tensors", "fp8"),
    "fp_quant": ("FP-Quant", "int4"),
    "gguf": ("GGUF", "int4"),
    "gptq": ("GPTQ", None),
    "higgs": ("HIGGS", "int4"),
    "hqq": ("HQQ", "int4"),
    "marlin": ("Marlin", "int4"),
    "modelopt": ("NVIDIA ModelOpt", None),
    "mxfp4": ("MXFP4", "int4"),
    "quanto": ("Quanto", None),
    "quark": ("AMD Quark", None),
    "sinq": ("SINQ", "int4"),
    "spqr": ("SpQR", "int4"),
    "torchao": ("torchao", None),
    "vptq": ("VPTQ", "int4"),
}
_ALIASES: Final[Mapping[str, str]] = {
    "autoawq": "awq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "finegrained_fp8": "fp8",
    "gptq_marlin": "gptq",
    "gptq_marlin_24": "gptq",
    "gptqmodel": "gptq",
    "intel/auto-round": "auto-round",
    "marlin24": "marlin",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "nvfp4": "modelopt",
}
# Maps the name of a file that a tool writes beside quantised weights to the quantisation method of that tool. Older
# tools write nothing about quantisation to config.json.
METHOD_FILES: Final[Mapping[str, str]] = {
    "hf_quant_config.json": "modelopt",
    "quant_config.json": "awq",
    "quantize_config.json": "gptq",
}
_NEAREST_BY_BITS: Final[Mapping[object, Quantization]] = {2: "int4", 3: "int4", 4: "int4", 8: "int8"}


def refuse_foreign(path: Path, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the config.json at `path` says that the weights are quantised by a method that this
    server does not read. The error names the method and tells the user how to proceed."""
    if values.get("quantization") is not None:
        value = shown(values["quantization"])
        raise CheckpointError(
            f"{path}: quantization is {value}; the settings of mlx-lm, bits and group_size, are expected."
        )
    if values.get("compression_config") is not None:
        value = shown(values["compression_config"])
        raise CheckpointError(
            f"{path}: compression_config is {value}; this is an old name of quantization_config, and this server reads "
            f"{COMPRESSED_TENSORS} only under the new one; rename the key."
        )
    config = values.get("quantization_config")
    if not isinstance(config, dict):
        return
    settings = cast(dict[str, Any], config)
    method = settings.get("quant_method")
    if isinstance(method, str) and method not in (COMPRESSED_TENSORS, OWN, *MADE_AT_LOAD):
        raise CheckpointError(
            f"{path}: quantization_config.quant_method is {shown(method)}{_label(method)}; this server reads "
            f"{READ} only. {advice(_nearest(method, settings))}"
        )


def made_at_load(config: object) -> str | None:
    """Returns the `quant_method` of the quantization_config `config` if this method quantises the weights while a
    server loads them, so that the weights in the files are not quantised. Returns None otherwise."""
    method = cast(dict[str, object], config).get("quant_method") if isinstance(config, dict) else None
    return method if isinstance(method, str) and method in MADE_AT_LOAD else None


def refuse_file(path: Path) -> CheckpointError:
    """Returns the error for a checkpoint folder that contains the file `path`, whose name is a key of
    `METHOD_FILES`."""
    method = METHOD_FILES[path.name]
    name, nearest = _METHODS[method]
    return CheckpointError(
        f"{path.parent} has weights quantised by {name} ({path.name}), which this server does not read. "
        f"{advice(nearest)}"
    )


def advice(nearest: Quantization | None) -> str:
    formats = "int8, int4 or fp8" if nearest is None else nearest
    return (
        f"Serve the original checkpoint with plain weights instead; to reduce its memory, add --quantization {formats}."
    )


def _label(method: str) -> str:
    name, _ = _METHODS.get(_ALIASES.get(method, method), ("", None))
    return f", weights quantised by {name}" if name and name.lower() != method else ""


def _nearest(method: str, settings: Mapping[str, Any]) -> Quantization | None:
    bits = settings.get("bits")
    by_bits = _NEAREST_BY_BITS.get(bits) if isinstance(bits, int) else None
    _, usual = _METHODS.get(_ALIASES.get(method, method), ("", None))
    return by_bits or usual
