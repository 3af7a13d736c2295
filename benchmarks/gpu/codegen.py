"""Compiles the GPU kernels without a GPU. Lists, for each kernel, the number of registers, the number of spilled bytes,
the size of the shared memory, and the matrix instruction.

    python -m benchmarks.gpu.codegen [--name triton-codegen] [--targets 80,86,89,90,100,120]

Every op of `kernels.triton` is called at the shapes of the 3B and Mini models in bfloat16, once for each target, since
tile sizes may depend on the target. Kernel launches are recorded instead of run. Then they are compiled with the same
specialisation as Triton's launcher uses: multiples of 16 are marked as such, and arguments equal to 1 are constants.

The program fails if a kernel spills more than MAX_SPILLED bytes of registers, if it needs more shared memory than a
program may have on the target, or if two ops that must give identical results add numbers in different orders. It also
fails if a kernel reads or writes memory before it has waited for the kernel before it, on targets where it may be
launched early.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.calls import (
    attention_calls,
    decode_calls,
    format_calls,
    mamba_calls,
    product_calls,
    row_calls,
    sectioned_calls,
)
from benchmarks.gpu.formats import FORMATS
from benchmarks.gpu.rehearsal import MODELS, STEPS, rehearsal_of
from jamba_server.kernels.triton.launch import capability

RESULTS = Path(__file__).parents[1] / "results"
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
TYPES.update({torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8", torch.uint8: "u8"})
# The largest number of columns of tensor memory that a kernel can use. Tensor memory is the memory of the matrix units
# on Blackwell GPUs. If a kernel needs more columns, Triton produces no compiled kernel and reports no error.
TENSOR_COLUMNS = 512
FP8_CAPABILITY = 89  # 10 * the lowest compute capability that supports 8-bit floating point numbers
# The first capability * 10 whose GPUs launch a kernel before the one before it has ended, the instruction that waits
# for it, and what accesses memory that other kernels write.
DEPENDENT_TARGET, WAIT = 90, "griddepcontrol.wait"
ACCESS = re.compile(r"\b(?:ld|st|atom|red)\.global|\bcp\.async\.c")
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may use, by target (CUDA C++ Programming Guide, technical specifications)."""
MAX_SPILLED = 64
"""Bytes of registers that a thread may spill. On GPUs other than sm_90, some products with weights of 4 bits spill a
few bytes. A smaller tile would avoid this, but it would read each weight twice as often."""
# Each key of TWINS is an op. This op must give bitwise the same results as the ops in the key's value, called one after
# another. The op in the key must therefore add the terms of its sums in the same order as the ops in the value.
TWINS = {
    "selective_state_update": ("selective_scan",),
    "selective_scan, 64": ("selective_scan",),
    "selective_state_update, 64": ("selective_scan",),
    "mamba_decode, 1": ("selective_scan", "rms_norm 16", "rms_norm 256"),
    "mamba_decode, 256": ("selective_scan", "rms_norm 16", "rms_norm 256"),
    "mamba_decode, Q8_0, 1": ("selective_scan", "rms_norm 16", "rms_norm 256"),
    "mamba_decode, Q8_0, 256": ("selective_scan", "rms_norm 16", "rms_norm 256"),
    "mamba_decode, Q4_K, 1": ("selective_scan", "rms_norm 16", "rms_norm 256"),
    "mamba_decode, Q4_K, 256": ("selective_scan", "rms_norm 16", "rms_norm 256"),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a Triton kernel, with all values that are needed to compile the kernel.

    `signature` has the types of the arguments by name. `constants` has the values of arguments that are compile-time
    constants. `aligned` names the arguments that are multiples of 16.
    """

    op: str
    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.kernel, "__name__", "?")

    def runs_on(self, capability: int) -> bool:
        return capability >= FP8_CAPABILITY or "*fp8e4nv" not in self.signature.values()


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a compiled kernel: the number of registers, the numbers of bytes of memory, and the matrix
    instruction in the kernel's code.

    `registers` and `spilled` (bytes) are per thread. `shared` (bytes), `warps` and `tensor_columns` are per program.
    `waits` says whether the kernel waits for the kernel before it where it must, before it accesses memory.
    """

    op: str
    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    warps: int
    instruction: str
    reductions: tuple[str, ...]
    tensor_columns: int = 0
    waits: bool = True


def record(op: str, call: Callable[[], object]) -> list[Launch]:
    """Calls the function `call` with kernel launches disabled. Returns an object `Launch` for each kernel launch that
    the function `call` would have made."""
    launches: list[Launch] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        launches.append(specialize(op, kernel, values, options))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def specialize(op: str, kernel: JITFunction[Any], values: dict[str, Any], options: dict[str, Any]) -> Launch:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if free and value % 16 == 0:
                aligned.append(name)
    return Launch(op, kernel, signature, constants, tuple(aligned), options)


_target: contextvars.ContextVar[GPUTarget] = contextvars.ContextVar("_target")


class Compiling:
    """Replaces Triton's driver, which kernels ask for the GPU that they are compiled for."""

    def get_current_target(self) -> GPUTarget:
        return _target.get()


def compile_for(launch: Launch, capability: int) -> Resources:
    _target.set(GPUTarget("cuda", capability, 32))
    names = list(launch.kernel.arg_names)
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled: Any = triton.compile(source, target=_target.get(), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(DISASSEMBLER), "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return Resources(
        op=launch.op,
        kernel=launch.name,
        target=f"sm_{capability}",
        registers=counts["REG"],
        spilled=counts["STACK"] + counts["LOCAL"],
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instruction=next((name for name in INSTRUCTIONS if name in ptx), ""),
        reductions=reductions(compiled.asm["ttgir"]),
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        waits=waits_first(ptx) if capability >= DEPENDENT_TARGET else WAIT not in ptx,
    )


def waits_first(ptx: str) -> bool:
    """Returns whether a kernel waits for the kernel before it, and accesses memory only afterwards."""
    access = ACCESS.search(ptx)
    return access is not None and 0 <= ptx.find(WAIT) < access.start()


def reductions(ir: str) -> tuple[str, ...]:
    """Returns a text for each float32 sum in a kernel. The text says how the terms are divided among warps and threads,
    which determines the order of the additions."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    operands = re.findall(r'"tt.reduce".*?axis = (\d+) .*?\) : \(tensor<([\dx]*)xf32, (#\w+)>\)', ir, re.DOTALL)
    # Sums over axis 0 are left out. Only the scan kernel has such sums. Each of these sums adds only zeros to one
    # number, so the order of the additions has no effect.
    return tuple(
        sorted({summation(int(axis), shape, layouts[layout]) for axis, shape, layout in operands if axis != "0"})
    )


def summation(axis: int, shape: str, layout: str) -> str:
    """Returns a text that says in which order the elements of a tensor are added in a sum along the axis `axis`. The
    tensor has the shape `shape` and the layout `layout`.

    In a blocked layout, the order depends only on the size and the layout of `axis` itself. In the layout of a matrix
    product whose warps have rows of their own, it does not depend on the number of rows and warps.
    """
    fields = dict(re.findall(r"(sizePerThread|threadsPerWarp|warpsPerCTA) = \[([\d, ]*)\]", layout))
    if layout.startswith("#ttg.nvidia_mma") and axis == 1 and fields["warpsPerCTA"].endswith(", 1"):
        return f"{shape.split('x')[1]} {re.sub(r'warpsPerCTA = [^]]*]', 'warps of rows', layout)}"
    if not layout.startswith("#ttg.blocked"):
        return f"{shape} {layout}"
    elements, warps, threads = (
        int(fields[name].split(", ")[axis]) for name in ("sizePerThread", "warpsPerCTA", "threadsPerWarp")
    )
    return f"{shape.split('x')[axis]} by {warps} warps, {threads} threads, {elements} elements"


def launches_on(target: int) -> list[Launch]:
    """Returns the kernel launches of all ops that a GPU of compute capability `target` / 10 can run."""
    capability.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(target, 10)):
        found = all_launches()
    without = {launch.op for launch in found if not launch.runs_on(target)}
    return [launch for launch in found if launch.op not in without]


def rehearsed(known: list[Launch]) -> list[Launch]:
    """Returns the kernel launches of whole models. A launch is left out if a launch in the list `known` uses the same
    compiled kernel.

    The field `op` of each launch lists the values of its compile-time constants.
    """
    seen, found = {identity(launch) for launch in known}, list[Launch]()
    for model in MODELS:
        for launch in record(model, partial(rehearsal_of(model).launch, STEPS)):
            if (key := identity(launch)) not in seen:
                seen.add(key)
                constants = [f"{name} {value}" for name, value in launch.constants.items() if value and name.isupper()]
                op = f"{model}: {', '.join(constants)}"
                others = sum(other.op.startswith(op) and other.kernel is launch.kernel for other in found)
                found.append(replace(launch, op=f"{op} ({others + 1})" if others else op))
    return found


def identity(launch: Launch) -> str:
    """Returns a text that identifies the compiled kernel of a launch. Launches with equal texts use the same compiled
    kernel."""
    return repr(replace(launch, op=""))


def all_launches() -> list[Launch]:
    calls = [*mamba_calls(5120, 16), *decode_calls(5120, 16, 160), *attention_calls(20, 1, 128), *row_calls()]
    calls += [call for format in ("", *FORMATS) for call in product_calls(format)]
    calls += [*sectioned_calls(), *format_calls()]
    launches = [launch for op, call in calls for launch in record(op, call)]
    launches += rehearsed(launches)
    # The attention kernels are compiled again for the Mini model, because the numbers of heads are compile-time
    # constants of these kernels.
    mini = [launch for op, call in attention_calls(32, 8, 128) for launch in record(f"{op}, Mini", call)]
    narrow = attention_calls(32, 8, 128, torch.float8_e4m3fn)
    launches += mini + [launch for op, call in narrow for launch in record(f"{op}, fp8", call)]
    for size, groups in ((64, 4), (64, 20), (128, 1), (256, 20)):
        for stored in (torch.bfloat16, torch.float8_e4m3fn):
            for op, call in attention_calls(2 * groups, 2, size, stored):
                if op != "write_kv":
                    launches += record(f"{op}, {groups} x {size}{', fp8' * (stored != torch.bfloat16)}", call)
    return launches


def problems(found: list[Resources]) -> list[str]:
    messages = [f"{r.op}: {r.kernel} spills {r.spilled} bytes on {r.target}" for r in found if r.spilled > MAX_SPILLED]
    for r in found:
        if r.shared > (limit := SHARED_KIB[int(r.target[3:])] * 1024):
            messages.append(f"{r.op}: {r.kernel} takes {r.shared} bytes of shared memory on {r.target} of {limit}")
        if r.tensor_columns > TENSOR_COLUMNS:
            messages.append(f"{r.op}: {r.kernel} takes {r.tensor_columns} columns of tensor memory on {r.target}")
    messages += [f"{r.op}: {r.kernel} accesses memory before it waits, on {r.target}" for r in found if not r.waits]
    for target in sorted({r.target for r in found}):
        sums: dict[str, set[str]] = {}
        for r in found:
            if r.target == target:
                sums.setdefault(r.op, set()).update(r.reductions)
        decodes = {op: (op.replace("decode", "prefill"),) for op in sums if op.startswith("attention_decode")}
        for op, twins in (TWINS | decodes).items():
            expected = {order for twin in twins for order in sums[twin]}
            if sums[op] != expected or not expected:
                messages.append(f"{target}: {op} sums as {sums[op]}, but {', '.join(twins)} as {expected}")
    return messages


def table(found: list[Resources]) -> str:
    targets = sorted({r.target for r in found}, key=lambda target: int(target[3:]))
    lines = [f"| op | kernel | warps | {' | '.join(targets)} |", f"| --- | --- | ---: |{' ---: |' * len(targets)}"]
    rows: dict[tuple[str, str], dict[str, Resources]] = {}
    for r in found:
        rows.setdefault((r.op, r.kernel), {})[r.target] = r
    for (op, kernel), by_target in rows.items():
        cells = [
            f"{r.registers}, {r.spilled}, {r.shared / 1024:.1f} KiB {r.instruction.split('.')[0]}".rstrip()
            if (r := by_target.get(target))
            else ""
            for target in targets
        ]
        warps = next(iter(by_target.values())).warps
        lines.append(f"| {op} | {kernel} | {warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="write the results to benchmarks/results/NAME.md and NAME.json")
    parser.add_argument(
        "--targets", default=",".join(map(str, SHARED_KIB)), help="compute capabilities to compile for, times ten"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    targets = [int(target) for target in arguments.targets.split(",")]
    if unknown := set(targets) - set(SHARED_KIB):
        parser.error(f"--targets: {sorted(unknown)} unknown; there are {', '.join(map(str, SHARED_KIB))}")
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}))
        stack.enter_context(mock.patch.object(driver, "_active", Compiling()))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        pairs = [(launch, target) for target in targets for launch in launches_on(target)]
        jobs = [pool.submit(compile_for, *pair) for pair in pairs]
        found = [job.result() for job in jobs]
    seconds = time.monotonic() - started
    text = "Registers a thread, bytes spilled, shared memory and matrix instruction, bfloat16, compiled by triton "
    text += f"{triton.__version__} without a GPU.\n\n{table(found)}\n"
    print(f"{text}\n{len(found)} kernels compiled in {seconds:.0f} s")
    if arguments.name:
        (RESULTS / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{text}")
        report = {"triton": triton.__version__, "kernels": [asdict(r) for r in found]}
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if messages := problems(found):
        raise SystemExit("\n".join(messages))


if __name__ == "__main__":
    main()
