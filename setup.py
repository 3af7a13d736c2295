"""Builds the C++ kernels of `kernels.cpu` into one shared library, which needs no torch and fits all Python versions.

All other metadata of the package is in pyproject.toml. After a change of the C++ code, build the library again with
`python setup.py build_ext --inplace`.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

SOURCES = "kernels/cpu/src"
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # that warning is wrong about gcc's own intrinsics

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
                "-pthread",
                *WARNINGS,
            ],
            extra_link_args=["-pthread"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
