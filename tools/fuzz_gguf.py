"""Changes bytes of small GGUF files at random and loads the results: `python -m tools.fuzz_gguf --mutations 2000`.

Each mutated file must load and answer a prompt, or end in one CheckpointError or ConfigError. Nothing else may happen:
no other exception, no crash, no error text of more than 1 kB, no more than 20 seconds of processor time, and no more
than 1 GB of memory. Nine in ten mutations are in the header. The mutations run in child processes, so that a crash is
seen, and a limit of their address space bounds the memory.

Without --file, tiny models with random weights are written, one for each of several types of blocks. The mutations take
the files in turn. The same --seed gives the same mutations.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

MEMORY: Final = 1 << 30  # bytes that a child may take beyond what it has after its imports
PER_CHILD: Final = 500  # mutations
SECONDS: Final = 900.0  # time limit for the mutations of one child
SECONDS_EACH: Final = 20.0  # limit of the processor time for one mutation
# The types of the matrices in the tiny models.
KINDS: Final = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
NUMBERS_END: Final = 1500  # the numbers of the model are in about the first 1500 bytes of a header
# Numbers that programs often handle wrongly.
NUMBERS: Final = (
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def place_of(header: int, size: int, generator: random.Random) -> int:
    """Returns where to change a file of `size` bytes. Most of a header is the vocabulary, so two of three changes of
    the header are in the numbers at its beginning or in the list of tensors at its end."""
    if generator.random() >= 0.9:
        return generator.randrange(size)
    ranges = (0, NUMBERS_END), (header * 3 // 4, header), (0, header)
    return generator.randrange(*generator.choice(ranges))


def mutated(data: bytes, header: int, generator: random.Random) -> bytes:
    """Returns `data` with one to four changes. `header` is the size of the header in bytes."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        place = min(place_of(header, len(result), generator), max(0, len(result) - 8))
        match generator.randrange(7):
            case 0:
                result[place] ^= 1 << generator.randrange(8)
            case 1:
                result[place] = generator.randrange(256)
            case 2:
                result[place : place + 8] = struct.pack("<Q", generator.choice(NUMBERS))
            case 3:
                result[place : place + 4] = struct.pack("<I", generator.choice(NUMBERS) % 2**32)
            case 4:
                del result[place : place + generator.randrange(1, 64)]
            case 5:
                result[place:place] = generator.randbytes(generator.randrange(1, 64))
            case _:
                del result[generator.randrange(1, len(result)) :]
        if len(result) < 16:
            break
    return bytes(result)


def try_file(path: Path) -> str:
    """Loads all that a server loads of the file, and answers a prompt. Returns "loaded", or "refused" if an error names
    what is wrong."""
    # These imports take seconds and are needed in child processes only.
    from jamba_server.engine.errors import CheckpointError, ConfigError
    from jamba_server.llm import LLM
    from jamba_server.server.text.chat_template import ChatTemplate
    from jamba_server.server.text.tokenizer import Tokenizer

    errors: list[str] = []
    try:
        ChatTemplate.from_folder(path, Tokenizer.from_folder(path))
    except (CheckpointError, ConfigError) as error:
        errors.append(str(error))
    try:
        llm = LLM(path, max_num_seqs=1, max_model_len=64, threads=1, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
        llm.generate([[1, 3]], max_tokens=2)
    except (CheckpointError, ConfigError) as error:
        errors.append(str(error))
    if any(len(error) >= 1024 for error in errors):
        return "refused with a long error"
    return "refused" if errors else "loaded"


def child(sources: list[Path], first: int, count: int) -> None:
    """Tries the mutations with the seeds `first` to `first + count - 1`. Prints the seed before each one, so that the
    parent knows which one has ended the process, and then the result."""
    import_module("jamba_server.llm")  # the memory is measured after the imports
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    contents = [(source.read_bytes(), header_size(source)) for source in sources]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for seed in range(first, first + count):
            print(seed, end=" ", flush=True)
            data, header = contents[seed % len(contents)]
            path.write_bytes(mutated(data, header, random.Random(seed)))
            signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)  # its signal ends the process
            print(try_file(path), flush=True)


def header_size(path: Path) -> int:
    """Returns the offset of the first tensor's bytes."""
    from jamba_server.engine.gguf.reader import read_gguf

    return min(tensor.start for tensor in read_gguf(path).tensors.values())


def run(sources: list[Path], first: int, total: int) -> int:
    """Runs all mutations. Returns the number of failures, each of which is printed with its seed."""
    results, failures, started = dict.fromkeys(("loaded", "refused"), 0), 0, time.monotonic()
    seed, end = first, first + total
    while seed < end:
        count = min(PER_CHILD, end - seed)
        command = [sys.executable, "-m", "tools.fuzz_gguf", "--child", str(seed), str(count)]
        command += [f"--file={source}" for source in sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            output, status, errors = done.stdout, done.returncode, done.stderr
        except subprocess.TimeoutExpired as late:
            output, status, errors = (late.stdout or b"").decode(), -1, "it has not ended in time"
        if not output:
            raise SystemExit(f"A child has ended before its first mutation: {errors}")
        for line in output.splitlines():
            number, _, result = line.partition(" ")
            seed = int(number) + 1
            if result in results:
                results[result] += 1
            elif result:
                failures += 1
                print(f"seed {number}: {result}", flush=True)
        if status:
            failures += 1
            print(f"seed {seed - 1} failed with status {status}: {errors.strip().splitlines()[-1:]}", flush=True)
    seconds = time.monotonic() - started
    print(f"{results['loaded']} loaded, {results['refused']} refused, {failures} failed, {seconds:.0f} s")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, action="append", help="a file to mutate  [default: tiny models]")
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first mutation")
    parser.add_argument("--child", type=int, nargs=2, metavar=("FIRST", "COUNT"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child is not None:
        child(flags.file, *flags.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(flags.file or tiny_files(Path(folder)), flags.seed, flags.mutations) > 0)


def tiny_files(folder: Path) -> list[Path]:
    """Writes tiny models with a vocabulary and a template."""
    from tests.engine.test_gguf_exact import WIDE
    from tests.engine.test_gguf_vocabulary import LEARNT, vocabulary
    from tests.gguf_file import write_gguf
    from tests.tiny import save_tiny

    def kinds(kind: str) -> Callable[[str], str]:
        """Returns the function that gives each matrix its type: `kind`, but F16 for dt_proj, because its rows of four
        numbers are shorter than a block."""
        return lambda name: "F16" if name.endswith("ssm_dt.weight") else kind

    metadata, paths = vocabulary(LEARNT), list[Path]()
    for kind in KINDS:
        changes: dict[str, Any] = WIDE if kind.endswith("_K") else {"intermediate_size": 64}  # rows of whole blocks
        save_tiny(folder / kind, vocab_size=len(metadata["tokenizer.ggml.tokens"]), **changes)
        paths.append(write_gguf(folder / kind / "model.gguf", folder / kind, kinds(kind), vocabulary=metadata))
    return paths


if __name__ == "__main__":
    main()
