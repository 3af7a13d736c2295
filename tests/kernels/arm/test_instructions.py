"""The instructions in the inner loops of the matrix products for ARM, as the cross compiler made them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.arm import emulator


class Instruction(NamedTuple):
    """One instruction of a function. `target` is the address that it may go to, or None if it is no branch."""

    address: int
    name: str
    arguments: str
    target: int | None


Functions = dict[str, list[Instruction]]
LATER = {"neon": ("sdot", "smmla", "bfmmla"), "neon_dot": ("smmla", "bfmmla")}


@pytest.fixture(scope="module", params=["gemm_neon", "gemm_neon_bf16", "a8_neon", "a8_neon_dot", "a8_neon_i8mm"])
def functions(request: pytest.FixtureRequest, program: Path) -> Functions:
    assert program.exists()
    return disassembled(request.param)


@cache
def disassembled(source: str) -> Functions:
    """Maps the name of each function of a source file to its instructions."""
    command = [emulator.DISASSEMBLER, "-d", "--no-show-raw-insn", "--demangle", str(emulator.BUILD / f"{source}.o")]
    found: Functions = {}
    name = ""
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = start[1].removeprefix("void ")
            found[name] = []
        elif part := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            target = re.match(r"(?:.*, )?([0-9a-f]+) <", part[3]) if part[2][0] in "bct" and part[2] != "bl" else None
            found[name].append(Instruction(int(part[1], 16), part[2], part[3], int(target[1], 16) if target else None))
    return found


def inner_loop(function: list[Instruction], name: str, count: int) -> list[Instruction]:
    """Returns the shortest loop with exactly `count` instructions `name`: from the target of a branch to the branch."""
    first = function[0].address
    ends = [(i.target, i.address) for i in function if i.target is not None and first <= i.target <= i.address]
    loops = [[i for i in function if start <= i.address <= end] for start, end in ends]
    return min((loop for loop in loops if sum(i.name == name for i in loop) == count), key=len)


@pytest.mark.parametrize(
    ("source", "name", "instruction", "count"),
    [
        ("gemm_neon", "neon::tile<float, 6, 1>", "fmla", 48),
        ("gemm_neon_bf16", "neon_bf16::tile<bf16, 6, 1>", "bfmmla", 24),
        ("gemm_neon_bf16", "neon_bf16::tile<bf16, 1, 2>", "bfmmla", 16),
        ("a8_neon_dot", "a8_neon_dot::a8_tile<a8_neon_dot::Four, 1, 4, 2>", "sdot", 64),
        ("a8_neon_dot", "a8_neon_dot::a8_tile<a8_neon_dot::Eight, 1, 1, 4>", "sdot", 32),
        ("a8_neon_i8mm", "a8_neon_i8mm::a8_tile<a8_neon_i8mm::Four, 1, 4, 2>", "smmla", 32),
        ("a8_neon_i8mm", "a8_neon_i8mm::a8_tile<a8_neon_i8mm::Eight, 1, 4, 2>", "smmla", 32),
        ("a8_neon_i8mm", "a8_neon_i8mm::a8_tile<a8_neon_i8mm::Eight, 1, 1, 4>", "sdot", 32),
    ],
)
def test_the_inner_loops_multiply_with_the_instructions_of_their_level(
    program: Path, source: str, name: str, instruction: str, count: int
) -> None:
    """The accumulators stay in registers: no vector is loaded from the stack or stored there."""
    assert program.exists()
    (function,) = (found for key, found in disassembled(source).items() if key.startswith(f"{name}("))
    loop = inner_loop(function, instruction, count)
    spills = [i for i in loop if re.fullmatch("(ld|st)[rp]", i.name) and i.arguments[0] == "q" and "[sp" in i.arguments]
    assert not spills


def test_no_function_has_instructions_of_a_later_level(functions: Functions) -> None:
    for name, instructions in functions.items():
        level = name.partition("::")[0].removeprefix("a8_")
        assert not {i.name for i in instructions} & set(LATER.get(level, ())), name
