"""The compiled kernels of `kernels.cpu`: one shared library that depends on neither torch nor the version of Python.

Everything else about the package is in pyproject.toml. While working on them: `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

SOURCES = "kernels/cpu/src"
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # the last is wrong about gcc's own intrinsics

setup(
    ext_modules=[
        Extension(
            "jamba_server.kernels.cpu._native",
            sorted(glob(f"{SOURCES}/*.cpp")),
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inl")),
            language="c++",
            # The package works without it, on the reference kernels, and says so.
            optional=True,
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            # No -march: functions carry their own targets and are chosen when the library runs. No contraction of
            # a * b + c, which would make results depend on the compiler's mood; fused products are written out.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-pthread",
                *WARNINGS,
            ],
            extra_link_args=["-pthread"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
