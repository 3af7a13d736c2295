"""Computes how many tokens per second this engine could reach on an H100 and on an H200. Nothing is measured.

    python -m benchmarks.gpu.predictions

The program writes results/gpu-predictions.md. For every cell of the GPU check's parts `3b` and `mini` it lists the
tokens per second that the bytes and operations of `predict` allow. For every kernel that the part `tune` times, it
lists the shortest possible time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.compile import shapes_alone
from benchmarks.gpu.engine import SIZES
from benchmarks.gpu.predict import Ceilings, Work, decode_work, prefill_work
from benchmarks.gpu.sweep import config_of
from benchmarks.shapes import Format

RESULTS = Path(__file__).parents[1] / "results"
# Assumed limits of each GPU, which are not measured. The field `bandwidth` is the rate of a large copy in bytes per
# second. The field `matmul` is the rate of the matrix products of prefill in operations per second.
GPUS = {"H100": Ceilings(bandwidth=3.0e12, matmul=650e12), "H200": Ceilings(bandwidth=4.3e12, matmul=650e12)}
MODELS = (("3b", ("bf16",)), ("mini", ("int8", "bf16")))
CONTEXT = 128  # number of tokens that each sequence has before the decode step
CHUNK = 8192  # largest number of prompt tokens that the engine computes in a step, if there is enough memory
HEAD = """# Predictions for GPUs: nothing here has been measured

Every number is computed, by `python -m benchmarks.gpu.predictions`, from the bytes that must be moved and the
operations that must be done. Assumed are, of an H100 and an H200, 3.0 and 4.3 TB/s (the data sheets say 3.35 and 4.8)
and of both 650 TFLOP/s in bfloat16 (a single large product reaches about 800). No launch, no imperfect overlap and no
kernel's own loss is in them: they are limits, and a measurement is a share of them. The targets are 80% of them at one
sequence, 70% at 256, and 50% for prompts. Mini's weights in bfloat16 (96 GiB) do not fit on an H100 of 80 GB.
"""


def cells() -> Iterator[tuple[str, str, str, int, Work]]:
    """Yields one prediction for each decode and prefill measurement that the parts `3b` and `mini` of the GPU check
    make.

    A prediction is (model, weight format, name, number of tokens, numbers of bytes and operations).
    """
    for shape, formats in MODELS:
        config, sizes = config_of(shape), SIZES[shape]
        for name in formats:
            policy = Format.parse(name).policy
            for count in sizes.sequences:
                work = decode_work(config, policy, sequences=count, context=CONTEXT)
                yield shape, name, f"decode, {count}", count, work
            for length in sizes.prompts:
                chunk = min(length, CHUNK)
                yield (
                    shape,
                    name,
                    f"prefill, {length:,}",
                    length,
                    prefill_work(config, policy, tokens=length, chunk=chunk),
                )


def rate(tokens: int, work: Work, ceilings: Ceilings) -> str:
    limit = "memory" if work.bound(ceilings) == "bandwidth" else "products"
    return f"{tokens / work.seconds(ceilings):,.0f} | {1e3 * work.seconds(ceilings):,.2f} | {limit}"


def engine_table() -> list[str]:
    each = [f"{gpu}, tok/s | ms | limit" for gpu in GPUS]
    lines = [
        f"| model | weights | what | {' | '.join(each)} |",
        f"| --- | --- | --- |{' ---: | ---: | --- |' * len(GPUS)}",
    ]
    for shape, name, what, tokens, work in cells():
        rates = [rate(tokens, work, ceilings) for ceilings in GPUS.values()]
        lines.append(f"| {shape} | {name} | {what} | {' | '.join(rates)} |")
    return lines


def kernel_table() -> list[str]:
    lines = [f"| model | tuned | in a step | {' | '.join(f'{gpu}, us' for gpu in GPUS)} |"]
    lines.append(f"| --- | --- | ---: |{' ---: |' * len(GPUS)}")
    for shape, _ in MODELS:
        for target in shapes_alone(shape):
            floors = [f"{1e6 * target.work().seconds(ceilings):.1f}" for ceilings in GPUS.values()]
            lines.append(f"| {shape} | {target.label} | {target.count} | {' | '.join(floors)} |")
    return lines


def markdown() -> str:
    told = "How long each kernel takes at least, a call, that the part `tune` times:"
    return "\n".join([HEAD, *engine_table(), "", told, "", *kernel_table()]) + "\n"


def main() -> None:
    (RESULTS / "gpu-predictions.md").write_text(markdown())


if __name__ == "__main__":
    main()
