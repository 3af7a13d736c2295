"""Builds the C++ kernels of `kernels.cpu` into one shared library, which needs no torch and fits all Python versions.

All other metadata of the package is in pyproject.toml. After a change of the C++ code, build the library again with
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "kernels/cpu/src"
LIBRARY = "kernels/cpu/_native.abi3.so"
# The two warnings that are turned off are wrong about gcc's own intrinsics.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# gcc for ARM moves loads far ahead of their use before it assigns registers. The matrix products would then keep their
# sums in memory. gcc for x86-64 does not do this.
ARM_FLAGS = ["-fno-schedule-insns"] if platform.machine() == "aarch64" else []

# On Linux the library contains what it uses of the compiler's own libraries, so that a wheel runs where they are older.
STATIC = ["-static-libstdc++", "-static-libgcc", "-Wl,--as-needed"] if sys.platform == "linux" else []


class ParallelBuild(build_ext):
    """Compiles the source files on all cores. A library that was built in
    place and is newer than all sources is taken as it is."""

    def build_extension(self, ext: Extension) -> None:
        if is_current(LIBRARY, [*ext.sources, *ext.depends, "setup.py"]):
            target = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not (os.path.exists(target) and os.path.samefile(LIBRARY, target)):
                shutil.copy2(LIBRARY, target)
            return
        compile_one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_one_by_one([source], **options), slowest_first(sources))
            return [path for paths in compiled for path in paths]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def is_current(library: str, sources: list[str]) -> bool:
    """Returns whether the file `library` exists and is newer than all of the files `sources`."""
    return os.path.exists(library) and all(os.path.getmtime(path) < os.path.getmtime(library) for path in sources)


def slowest_first(sources: list[str]) -> list[str]:
    """Returns the source files, those with kernels for several instruction sets first. They take longest to compile."""

    def has_kernels(path: str) -> bool:
        with open(path, encoding="utf-8") as file:
            return '.inl"' in file.read()

    return sorted(sources, key=lambda path: (not has_kernels(path), path))


setup(
    ext_modules=[
        Extension(
            "jamba_server.kernels.cpu._native",
            sorted(glob(f"{SOURCES}/*.cpp")),
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inl")),
            language="c++",
            # Without a C++ compiler the package is still installed. It then uses the reference kernels and says so.
            optional=True,
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            # There is no -march, because each function names its own target and is chosen at run time. The compiler
            # must not fuse a * b + c by itself, because results would depend on its version. The code calls fma where
            # it wants a fused product.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-fno-exceptions",
                "-pthread",
                *ARM_FLAGS,
                *WARNINGS,
            ],
            extra_link_args=["-pthread", *STATIC],
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
