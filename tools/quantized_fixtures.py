"""Writes tiny checkpoints with the packages that quantise: `python -m tools.quantized_fixtures TOOL FOLDER`.

`tests/data/prequantized/` has what this program wrote, and `tests/data/README.md` names the versions. Each folder has
the checkpoint that a package wrote and `expected.json`: a prompt, and the log-probabilities that transformers computes
for it in float32 from the numbers to which the package itself dequantises its weights.

The packages are no dependencies of this project. Install the one that TOOL needs into an environment of its own:
bitsandbytes and accelerate, llmcompressor, mlx[cpu] and mlx-lm, gptqmodel, or autoawq.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import oracle_logits, save_tiny

# Every row has a multiple of 64 inputs, because the packages leave other rows as they are.
SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_dt_rank": 64,
    "mamba_d_state": 8,
}
DENSE: Final[dict[str, Any]] = SHAPE | {"num_experts": 1, "num_experts_per_tok": 1}
# GPTQModel's and our AWQ folders leave dt_proj as it is.
FEW: Final[dict[str, Any]] = DENSE | {"mamba_dt_rank": 8}
SMALL: Final[dict[str, Any]] = FEW | {"hidden_size": 32}
PROMPT: Final = list(range(3, 40))
# What the GPTQ and AWQ folders leave as it is, as the tools' definitions of Jamba do.
PLAIN: Final = ("embed_tokens", "lm_head", "x_proj", "dt_proj", "router")
Numbers = dict[str, Tensor]
"""Maps names of weights to the float32 numbers that they stand for."""


def bitsandbytes(source: Path, target: Path, **options: Any) -> Numbers:
    functional = import_module("bitsandbytes.functional")
    config = transformers.BitsAndBytesConfig(**options)
    model: Any = transformers.JambaForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    numbers: Numbers = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            module.weight.quant_state.dtype = torch.float32  # so that the numbers are not rounded
            numbers[f"{name}.weight"] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            scales = module.weight.SCB[:, None].float()
            numbers[f"{name}.weight"] = module.weight.data.float() * (scales / 127)
    return numbers


def llmcompressor(source: Path, target: Path, **scheme: Any) -> Numbers:
    """Quantises with llm-compressor, without calibration data: the scales come from the weights."""
    package, modifiers = import_module("llmcompressor"), import_module("llmcompressor.modifiers.quantization")
    decompress: Any = import_module("compressed_tensors.compressors").decompress_module
    model: Any = transformers.JambaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    recipe = modifiers.QuantizationModifier(ignore=["lm_head", "re:.*router"], **scheme)
    package.oneshot(model=model, recipe=recipe)
    model.save_pretrained(target, save_compressed=True)
    numbers: Numbers = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data = module.weight_scale.data.float()  # so that the numbers are not rounded
            decompress(module)
            numbers[f"{name}.weight"] = module.weight.detach()
    return numbers


def mlx(source: Path, target: Path, *, bits: int, size: int) -> Numbers:
    core, utils = import_module("mlx.core"), import_module("mlx_lm.utils")
    core.set_default_device(core.cpu)
    model, config = utils.load_model(source)
    model.update(import_module("mlx.utils").tree_map(lambda x: x.astype(core.bfloat16), model.parameters()))
    model, config = utils.quantize_model(model, config, group_size=size, bits=bits)
    utils.save_model(target, model, donate_model=False)
    utils.save_config(config, target / "config.json")
    numbers: Numbers = {}
    for name, module in model.named_modules():
        if "scales" not in module:
            continue
        plain = core.dequantize(
            module.weight,
            module.scales.astype(core.float32),
            module.biases.astype(core.float32),
            group_size=module.group_size,
            bits=module.bits,
        )
        weight = torch.tensor(plain.tolist())
        layer, stacked, projection = name.partition(".switch_mlp.")
        if stacked:
            numbers |= {f"{layer}.experts.{e}.{projection}.weight": weight[e] for e in range(len(weight))}
        else:
            numbers[f"{name}.weight"] = weight
    return numbers


def with_linear_modules(
    source: Path, target: Path, settings: dict[str, Any], replace: Callable[[str, torch.nn.Linear], tuple[Any, Tensor]]
) -> Numbers:
    """Writes a checkpoint with the linear modules of a package whose own commands do not work with Jamba. `replace`
    returns the module that takes the place of one of the model's linear modules, and the numbers in it."""
    model: Any = transformers.JambaForCausalLM.from_pretrained(source, dtype=torch.float16)
    numbers: Numbers = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and not any(part in name for part in PLAIN):
            module, numbers[f"{name}.weight"] = replace(name, linear)
            model.set_submodule(name, module)
    model.config.quantization_config = settings
    model.save_pretrained(target)
    return numbers


def scales_of(linear: torch.nn.Linear, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points [N, G] from the largest and smallest number of each group. `groups` has the group
    of each input."""
    weight = linear.weight.data.float()
    parts = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    scales = ((high - low) / 15).half()
    return scales, (-low / scales.float()).round().clamp(0, 15)


def autoawq(source: Path, target: Path, *, size: int) -> Numbers:
    """Packs with AutoAWQ's linear module, because AutoAWQ has no class for Jamba."""
    kind: Any = import_module("awq.modules.linear.gemm").WQLinear_GEMM
    unpack: Any = import_module("awq.utils.packing_utils").dequantize_gemm

    def replace(name: str, linear: torch.nn.Linear) -> tuple[Any, Tensor]:
        scales, zeros = scales_of(linear, torch.arange(linear.in_features) // size)
        module = kind.from_linear(linear, 4, size, False, scales.T.contiguous(), zeros.T.contiguous())
        plain = unpack(module.qweight, module.qzeros, module.scales.float(), 4, size)
        return module, plain.T.contiguous()

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return with_linear_modules(source, target, settings | {"modules_to_not_convert": list(PLAIN)}, replace)


def gptqmodel(source: Path, target: Path, *, size: int, desc_act: bool) -> Numbers:
    """Packs with GPTQModel's linear module. GPTQModel's own loop, which calibrates the weights, does not run here."""
    kind: Any = import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    to_v1: Any = import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    generator = torch.Generator().manual_seed(0)

    def replace(name: str, linear: torch.nn.Linear) -> tuple[Any, Tensor]:
        inputs, outputs = linear.in_features, linear.out_features
        order = torch.randperm(inputs, generator=generator) if desc_act else torch.arange(inputs)
        groups = (order // size).int()
        scales, zeros = scales_of(linear, groups)
        module = kind(
            bits=4, group_size=size, sym=False, desc_act=desc_act, in_features=inputs, out_features=outputs, bias=False
        )
        module.pack_original(linear, scales, zeros, groups)
        module.optimize = lambda *_, **__: None  # torch.compile would take minutes
        module.post_init()
        kept, module.scales = module.scales, module.scales.float()  # so that the numbers are not rounded
        plain = module.dequantize_weight().float().T.contiguous()
        module.scales = kept
        to_v1(module, import_module("gptqmodel").QuantizeConfig(bits=4, group_size=size, sym=False, desc_act=desc_act))
        return module, plain

    settings = {"quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": desc_act, "sym": False}
    return with_linear_modules(source, target, settings | {"checkpoint_format": "gptq"}, replace)


def save(config: Any, tensors: Mapping[str, Tensor], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")


TOOLS: Final[dict[str, tuple[dict[str, Any], str, Callable[[Path, Path], Numbers]]]] = {
    "bitsandbytes-nf4": (
        DENSE,
        "bfloat16",
        lambda source, target: bitsandbytes(
            source, target, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ),
    "bitsandbytes-int8": (SMALL, "bfloat16", lambda source, target: bitsandbytes(source, target, load_in_8bit=True)),
    "llmcompressor-w4a16": (
        SHAPE,
        "bfloat16",
        lambda source, target: llmcompressor(
            source,
            target,
            config_groups={
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "strategy": "group",
                        "group_size": 32,
                        "symmetric": False,
                    },
                }
            },
        ),
    ),
    "llmcompressor-w8a8": (
        SMALL,
        "bfloat16",
        lambda source, target: llmcompressor(source, target, targets="Linear", scheme="W8A8"),
    ),
    "mlx-4": (SHAPE, "bfloat16", lambda source, target: mlx(source, target, bits=4, size=64)),
    "mlx-8": (SMALL, "bfloat16", lambda source, target: mlx(source, target, bits=8, size=32)),
    "autoawq": (FEW, "float16", lambda source, target: autoawq(source, target, size=32)),
    "gptqmodel": (
        FEW,
        "float16",
        lambda source, target: gptqmodel(source, target, size=32, desc_act=False),
    ),
    "gptqmodel-desc-act": (
        FEW,
        "float16",
        lambda source, target: gptqmodel(source, target, size=32, desc_act=True),
    ),
}


def write(tool: str, target: Path) -> None:
    """Writes the checkpoint of a tool to `target`, and what is expected of it."""
    shape, dtype, quantize = TOOLS[tool]
    with TemporaryDirectory() as folder:
        source, plain = Path(folder) / "source", Path(folder) / "plain"
        save_tiny(source, **shape)
        rounded = {
            name: tensor.to(getattr(torch, dtype)) if tensor.ndim > 1 and not name.endswith("A_log") else tensor
            for name, tensor in load_file(source / "model.safetensors").items()
        }
        config = transformers.AutoConfig.from_pretrained(source)
        config.dtype = dtype
        save(config, {name: tensor.to(getattr(torch, dtype)) for name, tensor in rounded.items()}, source)
        numbers = quantize(source, target)
        assert numbers, "the package quantised nothing"
        tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
        assert numbers.keys() <= tensors.keys(), numbers.keys() - tensors.keys()
        assert all(numbers[name].shape == tensors[name].shape for name in numbers)
        config.dtype = "float32"
        save(config, tensors | {name: tensor.float() for name, tensor in numbers.items()}, plain)
        model = transformers.JambaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        found = oracle_logits(model, PROMPT).log_softmax(-1)
    logprobs = [round(found[i, token].item(), 6) for i, token in enumerate(PROMPT[1:])]
    expected = {"prompt": PROMPT, "logprobs": logprobs, "quantized": sorted(numbers)}
    (target / "expected.json").write_text(json.dumps(expected) + "\n")
    for path in target.iterdir():
        if path.name not in ("config.json", "model.safetensors", "expected.json", "quantize_config.json"):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("folder", type=Path, help="the folder to write")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    write(flags.tool, flags.folder)


if __name__ == "__main__":
    main()
